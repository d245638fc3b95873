"""What goes wrong in long trainings: each case ends in a model that meets its budget, or in one clear sentence."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support import kills
from thinned import thinned
from torch import Tensor

import jpq
from jpq.config import Config
from jpq.costs import LayerUse
from jpq.costs.target import Controller, parse_targets
from jpq.types import JpqError

RATES = st.floats(-6, 1).map(lambda power: 10.0**power)
# all that may go wrong
ONLY = r"|The loss is not a number in phase .* Lower --lr .*|.* of the model is NaN or infinite .* lower --lr\."
METHODS = ("djpq", "l0", "dpf", "bayesian-bits", "ranked", "gdp", "pdp", "dhp")


def meets_or_says(asked: Config) -> str:
    """What the JpqError says, or what is wrong with the model; "" where the run ended with one within its budget."""
    try:
        result = jpq.optimize(asked, final=False)
    except JpqError as error:
        return str(error)
    over = [name for name, target in result.targets.items() if target["reached"] > target["limit"]]
    bad = [row for row in result.history if not math.isfinite(row.loss)]
    state = jpq.load(result.folder)[0].state_dict()
    bad += [name for name, t in state.items() if t.is_floating_point() and not t.isfinite().all()]
    return f"over {over}, not finite {bad}" if over or bad else ""


@pytest.fixture(scope="module")
def float_weights(tiny_trial: Path) -> Path:
    return tiny_trial / "float.safetensors"


def at_rates(weights: Path, out: Path, method: str, lr: float, gate_lr: float, bit_lr: float) -> Config:
    asked = kills.tiny_config(out)
    return replace(
        asked,
        task=replace(asked.task, weights=weights, limit=80),
        train=replace(asked.train, lr=lr, epochs=3),
        decide=replace(asked.decide, method=method, gate_lr=gate_lr, bit_lr=bit_lr),
    )


QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True, "database": None}


@pytest.mark.slow  # in the fast suite: the largest rates, for the smallest budget
@pytest.mark.parametrize("examples", [1, 25])
def test_any_learning_rate(examples: int, float_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    @settings(max_examples=examples, **QUIET)
    @example(method="djpq", lr=10.0, gate_lr=10.0, bit_lr=10.0)
    @example(method="l0", lr=1e-6, gate_lr=10.0, bit_lr=10.0)
    @example(method="djpq", lr=1e-6, gate_lr=1e-6, bit_lr=1e-6)
    @given(method=st.sampled_from(METHODS), lr=RATES, gate_lr=RATES, bit_lr=RATES)
    def ends_in_a_model_or_a_sentence(method: str, lr: float, gate_lr: float, bit_lr: float) -> None:
        said = meets_or_says(at_rates(float_weights, tmp_path_factory.mktemp("run"), method, lr, gate_lr, bit_lr))
        assert re.fullmatch(ONLY, said)

    ends_in_a_model_or_a_sentence()


ODD = (
    "one_left_over",
    "black",
    "grey",
    "blank_channel",
    "rare_class",
    "absent_class",
    "one_class",
    "huge_values",
    "outlier",
)
PAIRS = [("djpq", name) for name in ODD] + [
    (method, name) for method in ("dais", "taylor", "two-stage", "catro") for name in ("black", "rare_class")
]
FEW = [pytest.param(*p, marks=[] if p in PAIRS[:1] else pytest.mark.slow) for p in PAIRS]


@pytest.mark.parametrize(("method", "data"), FEW)
def test_odd_data(method: str, data: str, tmp_path: Path) -> None:
    asked = kills.tiny_config(tmp_path)
    asked = replace(
        asked,
        task=replace(asked.task, data=f"odd_data:{data}", model="resnet8" if data == "blank_channel" else "convnet"),
        decide=replace(asked.decide, method=method, density=0.6),
        train=replace(asked.train, epochs=3, float_epochs=6),
    )
    if data == "one_class":
        with pytest.raises(JpqError, match="of one class, so there is nothing to tell apart"):
            jpq.optimize(asked)
        return
    if data in ("huge_values", "outlier"):  # squares of such pixels are beyond numbers of 32 bits
        with pytest.raises(JpqError, match=r"'[\w.]+' of the model is NaN or infinite|output of layer '[\w.]+'"):
            jpq.optimize(asked)
        return
    result = jpq.optimize(asked)
    assert isinstance(jpq.load(result.folder)[0], torch.nn.Module), "and it refuses what is not finite"
    assert result.verified["rebuilt_vs_onnxruntime"]["argmax_differs"] == 0
    assert all(target["reached"] <= target["limit"] for target in result.targets.values())
    assert all(math.isfinite(row.loss) for row in result.history)
    learnt = data not in ("black", "grey")
    assert result.float.accuracy == 1.0 or not learnt


def test_a_layer_that_was_dead_already(float_weights: Path, tmp_path: Path) -> None:
    state = load_file(float_weights)
    state["3.weight"].zero_()  # all units of the second convolution give a constant
    path = tmp_path / "dead.safetensors"
    save_file(state, path)
    asked = at_rates(path, tmp_path, "djpq", 3e-3, 0.05, 0.02)
    assert meets_or_says(asked) == ""


@pytest.mark.parametrize("method", thinned(["djpq", "l0", "ranked"], lambda _, method: method == "djpq"))
def test_every_layer_keeps_a_unit_at_the_smallest_budget(method: str, float_weights: Path, tmp_path: Path) -> None:
    asked = at_rates(float_weights, tmp_path, method, 3e-3, 10.0, 10.0)
    asked = replace(asked, budget=replace(asked.budget, target_bops="0.02%"), decide=replace(asked.decide, density=0.1))
    result = jpq.optimize(asked, final=False)
    assert all(row.outputs >= 1 and row.inputs >= 1 for row in result.layers)
    assert all(target["reached"] <= target["limit"] for target in result.targets.values())


def use(bits: Tensor | float) -> LayerUse:
    return LayerUse("a", 1000, 100, 10, 1.0, 1.0, 1.0, bits, 8.0)


@pytest.mark.parametrize("period", [1, 2, 7, 50])
def test_a_cost_that_swings_moves_the_pressure_no_further_than_its_bounds(period: int) -> None:
    (goal,) = parse_targets({"bops": "1%"}, [use(32.0)])
    controller = Controller((goal,))
    controller.begin([use(8.0)])
    for step in range(2000):
        bits = torch.tensor(8.0 if step // period % 2 else 1e-3, requires_grad=True)
        loss = controller.loss([use(bits)], step / 2000)
        assert math.isfinite(float(loss))
        assert controller.low <= controller.pressure["bops"] <= controller.high


def test_a_cost_of_nothing_and_one_beyond_all_numbers() -> None:
    (goal,) = parse_targets({"bops": "1%"}, [use(32.0)])
    controller = Controller((goal,))
    controller.begin([use(8.0)])
    assert float(controller.loss([use(torch.tensor(0.0, requires_grad=True))], 0.5)) == 0, "every unit is closed"
    assert controller.pressure["bops"] < 0.1
    controller.loss([use(torch.tensor(1e30, requires_grad=True))], 0.5)
    assert controller.pressure["bops"] <= controller.high
