"""Training in bfloat16 (`--precision`): layers compute in it while they learn, and nothing else does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import jpq
from jpq.config import BFLOAT16, FLOAT32, Budget, Config, Decide, Run, Task, Train
from jpq.training.loop import Objective
from jpq.types import JpqError


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 10))


def types_of_layers(run: Any) -> dict[bool, set[torch.dtype]]:
    """Whether a convolution was in training mode -> the types of what all of them returned while something ran."""
    seen: dict[bool, set[torch.dtype]] = {True: set(), False: set()}

    def watch(module: nn.Module, args: object, out: Tensor) -> None:
        if isinstance(module, nn.Conv2d) and isinstance(out, Tensor):
            seen[module.training].add(out.dtype)

    hook = torch.nn.modules.module.register_module_forward_hook(watch)
    try:
        run()
    finally:
        hook.remove()
    return seen


def test_layers_and_the_teachers_compute_in_bfloat16_and_the_loss_in_float32() -> None:
    net, teacher, x, y = small_net(), small_net().eval(), torch.rand(16, 1, 8, 8), torch.arange(16) % 10
    losses = {}
    for precision, dtype in ((BFLOAT16, torch.bfloat16), (FLOAT32, torch.float32)):

        def step(precision: str = precision) -> None:
            losses[precision] = Objective(teacher, 1.0, 2.0, precision=precision)(net, x, y, 0.0)

        assert types_of_layers(step) == {True: {dtype}, False: {dtype}}  # the teacher is in evaluation mode
        losses[precision].backward()
        assert losses[precision].dtype == torch.float32
        assert {p.grad.dtype for p in net.parameters() if p.grad is not None} == {torch.float32}
    rounded, exact = losses[BFLOAT16].item(), losses[FLOAT32].item()
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.02)  # bfloat16 has 8 binary digits: 0.4 % of each number


def test_float32_leaves_a_callers_autocast_as_it_is() -> None:
    net, x, y = small_net(), torch.rand(16, 1, 8, 8), torch.arange(16) % 10
    with torch.autocast("cpu", torch.bfloat16):
        assert types_of_layers(lambda: Objective()(net, x, y, 0.0))[True] == {torch.bfloat16}


@pytest.mark.parametrize("method", ["djpq", "measured"])
def test_all_phases_of_a_run_learn_in_bfloat16_and_its_file_is_exact(tmp_path: Path, method: str) -> None:
    config = Config(
        task=Task(limit=300),
        budget=Budget(target_bops="4%"),
        decide=Decide(method=method),
        train=Train(
            epochs=2, float_epochs=2, batch_size=16, precision=BFLOAT16
        ),  # few samples for contests' many steps
        run=Run(out=tmp_path),
    )
    results: list[jpq.Result] = []
    seen = types_of_layers(lambda: results.append(jpq.optimize(config)))
    assert seen[True] == {torch.bfloat16}
    assert torch.float32 in seen[False]  # held-out and test data
    (result,) = results
    assert result.targets["bops"]["used"] <= 1
    assert result.verified["masked_vs_rebuilt_float64"] == 0
    assert result.verified["rebuilt_vs_onnxruntime"]["argmax_agreement"] == 1


def test_float32_is_the_default_and_keeps_the_names_of_runs() -> None:
    assert Train().precision == FLOAT32
    assert Config().folder() == Config(train=Train(precision=FLOAT32)).folder()
    assert Config().folder() != Config(train=Train(precision=BFLOAT16)).folder()


@pytest.mark.parametrize("name", ["", "half", "bf16", "float64"])
def test_other_precisions_are_refused(name: str) -> None:
    with pytest.raises(JpqError, match=f"choice of precision '{name}'.*bfloat16"):
        Config(train=Train(precision=name)).check()
