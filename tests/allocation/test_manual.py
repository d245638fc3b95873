"""Decisions by hand: how they are written, the plan that they give, and what does not go together."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import config, shortened
from torch import nn

import jpq
from jpq.allocation import manual
from jpq.config import MANUAL, Decide, read_toml
from jpq.methods.gates import Ranked
from jpq.methods.quantizers import Fixed
from jpq.types import JpqError

NAMES = ["conv1", "layer1.0.conv1", "layer1.0.conv2", "layer1.10.conv1", "layer2.0.conv1", "fc"]
KEYS = [*NAMES, "layer1", "layer1.0", "layer2"]


def oracle(entries, name):
    """The value of the longest key that is the name or a whole beginning of it."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        if ".".join(parts[:length]) in entries:
            return entries[".".join(parts[:length])]
    return entries.get("", 1.0)


@given(st.dictionaries(st.sampled_from(["", *KEYS]), st.sampled_from([0.25, 0.5, 0.75]), max_size=6), st.randoms())
def test_the_longest_name_counts(entries, random):
    order = list(entries.items())
    random.shuffle(order)
    text = ", ".join(f"{name}={value}" if name else str(value) for name, value in order)
    found = manual.parse_named_values("--densities", text, NAMES, manual.parse_density, 1.0)
    assert found == {name: oracle(entries, name) for name in NAMES}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("4/4,conv=8/8", "Unknown name in bits 'conv'. Did you mean conv1"),
        ("layer1.1=4/4", "Unknown name in bits 'layer1.1'. Did you mean layer1"),
        ("4/9", "bits='4/9': give weight bits / activation bits, each from 2 to 8"),
        ("fc=4", "bits fc=4: give weight bits / activation bits"),
        ("fc=4/4,fc=5/5", "bits says fc twice"),
        ("4/4,5/5", "bits says the value for all the rest twice"),
    ],
)
def test_bits_that_make_no_sense(text, reason):
    with pytest.raises(JpqError) as error:
        manual.parse_named_values("--bits", text, NAMES, manual.parse_widths, (8, 8))
    assert reason in str(error.value)


@pytest.mark.parametrize("text", ["0", "1.01", "half", "-0.5", "120%", "nan"])
def test_densities_that_are_no_share(text):
    with pytest.raises(JpqError, match="give the share that stays, above 0 and at most 1"):
        manual.parse_named_values("--densities", text, NAMES, manual.parse_density, 1.0)


@pytest.fixture(scope="module")
def net():
    """ResNet8 with the channels of each site ranked by its place: the last is the best."""
    torch.manual_seed(0)
    model = jpq.tasks.models.build("resnet8", 10, 3)
    example = torch.rand(2, 3, 32, 32)
    network = jpq.trace(model, example)
    made = jpq.attach(
        model, network, jpq.channels(network), Ranked, lambda layer: (Fixed(8), Fixed(8)), [example], MANUAL
    )
    for gate in made.gates:
        gate.margins.copy_(torch.arange(1, gate.n + 1)[None] / gate.n)
    return made


@given(w=st.integers(2, 8), a=st.integers(2, 8), inner=st.floats(0.01, 1), rest=st.floats(0.01, 1))
def test_the_plan_is_what_was_said(net, w, a, inner, rest):
    said = Decide(bits=f"{w}/{a},layer2=3/5", densities=f"{rest},layer2={inner}")
    plan = manual.manual_plan(net, said)
    for site in net.sites:
        density = inner if site.name.startswith("layer2") else rest
        kept = plan.kept[site.name]
        k = max(1, round(density * site.n))
        assert kept == (False,) * (site.n - k) + (True,) * k
    for layer in net.network.layers:
        bits = plan.layers[layer.name]
        asked = (3, 5) if layer.name.startswith("layer2") else (w, a)
        assert (bits.w_bits, bits.a_bits) == (asked[0], 8 if layer.reads_input else asked[1])


def test_what_nothing_says_is_as_wide_as_allowed(net):
    plan = manual.manual_plan(net, Decide(densities="conv1=0.5", w_bits=(2, 6), a_bits=(2, 5)))
    inner = [x for name, x in plan.layers.items() if not net.network.layer(name).reads_input]
    assert {(x.w_bits, x.a_bits) for x in inner} == {(6, 5)}
    assert [name for name, kept in plan.kept.items() if not all(kept)] == ["conv1"]


@pytest.mark.parametrize(("units", "density", "stay"), [(5, 0.5, 3), (7, 0.5, 4), (50, 0.29, 15), (5, 0.01, 1)])
def test_shares_between_two_numbers_of_units_are_rounded_half_up_as_by_gates(units, density, stay):
    model, x = nn.Sequential(nn.Conv2d(3, units, 3), nn.ReLU(), nn.Conv2d(units, 2, 3)).eval(), torch.randn(2, 3, 8, 8)
    network = jpq.trace(model, x)
    eight = Fixed(8)
    net = jpq.attach(model, network, jpq.channels(network), Ranked, lambda _: (eight, eight), [x], MANUAL)
    plan = manual.manual_plan(net, Decide(densities=str(density)))
    assert [sum(kept) for kept in plan.kept.values()] == [stay]


def test_a_run_costs_what_was_said_and_is_verified(tmp_path):
    asked = shortened(config(tmp_path))
    said = Decide(bits="4/3,0=8/8,6=2/2", densities="0.5,3=25%")
    result = jpq.optimize(replace(asked, budget=jpq.Budget(), decide=said))
    rows = {row.name: row for row in result.layers}
    assert {name: (r.inputs, r.outputs, r.w_bits, r.a_bits) for name, r in rows.items()} == {
        "0": (1, 16, 8, 8),
        "3": (16, 16, 4, 3),
        "6": (16, 32, 2, 2),
        "11": (32, 10, 4, 3),
    }
    by_formula = 9 * 64 * 16 * 8 * 8 + 9 * 16 * 16 * 16 * 12 + 9 * 16 * 16 * 32 * 4 + 320 * 12
    assert result.compressed.bops == by_formula
    assert result.verified["masked_vs_rebuilt_float64"] < 1e-9
    assert json.loads((result.folder / "result.json").read_text())["method"] == MANUAL
    assert read_toml(result.folder / "config.toml").decide == replace(said, method=MANUAL)


def test_a_target_beside_them_must_hold(tmp_path):
    asked = replace(config(tmp_path, target_bops="0.5%"), decide=Decide(bits="8/8"))
    macs = 9 * (64 * 1 * 32 + 16 * 32 * 64 + 16 * 64 * 64) + 640
    with pytest.raises(JpqError, match=f"the decisions of bits and densities cost {64 * macs:,}"):
        jpq.optimize(asked)
    assert not list(tmp_path.glob("*/float.safetensors")), "no training before the refusal"


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"method": "l0"}, "method l0 would too"),
        ({"structure": "2:4"}, "structure='2:4': bits says the decisions"),
        ({"width": "power-of-two"}, "width power-of-two: bits says the decisions"),
        ({"bits": None, "method": MANUAL}, "method by-hand: say the decisions with bits and densities"),
    ],
)
def test_what_does_not_go_with_them(tmp_path, other, reason):
    asked = replace(config(tmp_path), decide=replace(Decide(bits="4/4"), **other))
    with pytest.raises(JpqError, match=reason):
        asked.check()


def test_the_default_leaves_hashes_as_they_were(tmp_path):
    plain, said = config(tmp_path), replace(config(tmp_path), decide=Decide(bits="4/4"))
    assert plain.hash() != said.hash()
    assert "bits" not in jpq.config.to_tree(plain)["decide"]
