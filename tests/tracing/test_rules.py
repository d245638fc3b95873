"""Rules that users write for unknown ops: the documentation's example, and errors of wrong rules."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from zoo import IMAGE, Head, conv

from jpq.cli.inspect import show_inspection
from jpq.tracing import rules
from jpq.tracing.op_call import Dims, OpCall
from jpq.tracing.rules import RULES, rule
from jpq.tracing.shrink import remove_channels
from jpq.tracing.sites import channels
from jpq.tracing.trace import trace
from jpq.types import JpqError

EXAMPLE = textwrap.dedent(
    (rules.__doc__ or "").split("one\nscale per channel:\n", 1)[1].split("\n\n`call[", 1)[0]
)  # the indented block between the two paragraphs
DEFINITION, _, RULE = EXAMPLE.partition("@rule(")


@pytest.fixture(scope="module", autouse=True)
def _squash() -> None:
    """The documentation's op, without its rule."""
    exec(DEFINITION, {})


@pytest.fixture
def own_rules() -> Iterator[None]:
    """Rules made in a test go with it."""
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)


class Squashed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 6), conv(6, 5), Head(5)
        self.scale = nn.Parameter(torch.rand(6) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(torch.ops.mine.squash(self.a(x), self.scale)))


def test_without_a_rule_the_report_says_what_to_do() -> None:
    network = trace(Squashed(), IMAGE)
    assert network.unknown_ops == ("mine.squash",)
    assert [s.name for s in channels(network)] == ["b.0"]
    console = Console(width=200, record=True, quiet=False)
    with console.capture() as shown:
        console.print(show_inspection("mine", Squashed(), network, channels(network), 1.0, False, False))
    assert "op mine.squash has no rule; add one with jpq.tracing.rules" in shown.get()
    assert "ops without a rule froze what they touch: mine.squash" in shown.get()


def test_the_documented_rule(own_rules: None) -> None:
    names = {"Call": OpCall, "Dims": Dims, "rule": rule}
    exec(f"@rule({RULE}", names)
    torch.manual_seed(0)
    model = Squashed().double().eval()
    x = IMAGE.double()
    network = trace(model, x)
    assert network.unknown_ops == ()
    site = channels(network)[0]
    assert (site.name, site.n) == ("a.0", 6)
    gone = site.labels[[1, 4]]
    small = remove_channels(model, network, gone.tolist())
    assert small.scale.shape == (4,)
    with torch.no_grad():
        model.b[0].weight[:, [1, 4]] = 0
        assert torch.allclose(model(x), small(x), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (
            lambda call: call.x[:2],
            r"Your rule for mine\.squash .*sizes \[None, 6\] to an output of shape \[2, 6, 4, 4\]",
        ),
        (lambda call: [call.x[1], *call.x[1:]], r"sizes \[6, 6, None, None\]"),
        (lambda call: call["nothing"].shape, "Your rule for mine.squash failed: AttributeError"),
    ],
)
def test_a_rule_that_is_wrong_names_itself(answer, says, own_rules: None) -> None:  # type: ignore[no-untyped-def]
    rule("mine.squash")(answer)
    with pytest.raises(JpqError, match=says):
        trace(Squashed(), IMAGE)


def test_a_use_that_our_own_rule_does_not_cover_freezes() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = conv(3, 6), conv(6, 5), Head(5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.head(self.b(x + x[x > 0].sum()))

    network = trace(Odd(), IMAGE)
    assert [s.name for s in channels(network)] == ["b.0"]
    assert network.unknown_ops == ("aten.index",)
    assert network.frozen[int(network.layer("a.0").outputs[0])] == (
        "op aten.index is used in a way that its rule does not cover"
    )


def test_a_layer_behind_a_size_that_values_decide_is_a_sentence() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv(3, 6), conv(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)[:, :, torch.tensor([True, False, True, True])])

    with pytest.raises(JpqError, match=r"A size.* depends on values, as that of x\[mask\] does"):
        trace(Masked(), IMAGE)


class Added(nn.Module):
    """A product of a tensor with itself, and something added to it."""

    def __init__(self, added) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.a, self.b, self.added = nn.Linear(4, 8), nn.Linear(8, 3), added

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(torch.addmm(self.added(x, y), y, y))


@pytest.mark.parametrize(
    "added", [lambda x, y: y, lambda x, y: x[:, :1], lambda x, y: x[0, :1]], ids=["itself", "column", "number"]
)
def test_a_product_of_a_tensor_with_itself_has_two_operands(added) -> None:  # type: ignore[no-untyped-def]
    network = trace(Added(added).eval(), torch.randn(8, 4))
    assert {network.frozen[c] for c in network.layer("a").outputs.tolist()} == {"summed over by aten.addmm"}
