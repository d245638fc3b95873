"""The integer quantizer against plain autograd, against brute force, and inside brevitas's layers."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from jpq.methods.quantizers import (
    WIDTHS,
    Fixed,
    IntegerQuantizer,
    Learned,
    PowerOfTwo,
    act_quantizer,
    quantize_layer,
    weight_quantizer,
)
from jpq.methods.quantizers.uniform_integer import (
    _Quantize,
    fit_threshold,
    fit_weight_grid,
    levels,
    quantize_tensor,
    round_to_grid,
)
from jpq.types import JpqError


def reference(x, threshold, bits, signed):
    """The same formulas as a chain of differentiable operations, straight-through on round only."""
    n = torch.exp2(bits - float(signed)) - 1
    u = x / (threshold / n)
    rounded = (u + (u.round() - u).detach()) * (threshold / n)
    inside = (x.abs() <= threshold) if signed else (x >= 0) & (x <= threshold)
    clipped = x.sign() * threshold if signed else (x > 0) * threshold
    return torch.where(inside, rounded, clipped.expand_as(x))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", [(), (5, 1)])
@pytest.mark.parametrize("bits", [2.0, 3.0, 8.0])
def test_gradients_equal_autograd_of_the_plain_chain(signed, shape, bits):
    torch.manual_seed(0)
    x = torch.randn(5, 40, dtype=torch.float64, requires_grad=True)
    threshold = (torch.rand(shape, dtype=torch.float64) + 0.7).requires_grad_()
    b = torch.tensor(bits, dtype=torch.float64, requires_grad=True)
    jitter = torch.rand(5, 40, dtype=torch.float64, requires_grad=True)
    g = torch.randn(5, 40, dtype=torch.float64)
    inputs = (x, threshold, b, jitter)
    want = reference(x, threshold, b, signed) * jitter
    got = _Quantize.apply(x, threshold, b, signed, jitter)
    assert torch.allclose(got, want, atol=1e-12)
    pairs = zip(torch.autograd.grad(got, inputs, g), torch.autograd.grad(want, inputs, g), strict=True)
    for ours, theirs in pairs:
        assert torch.allclose(ours, theirs, atol=1e-10)


@pytest.mark.parametrize("signed", [True, False])
def test_bits_gradient_is_the_derivative_at_fixed_rounding(signed):
    """d x_q / d b by finite differences, with the rounded integers held: x_q = k * s(b)."""
    torch.manual_seed(1)
    x, threshold = torch.rand(1000, dtype=torch.float64) * 0.9, torch.tensor(1.0, dtype=torch.float64)
    b = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
    g = torch.randn(1000, dtype=torch.float64)
    (ours,) = torch.autograd.grad(_Quantize.apply(x, threshold, b, signed, None), b, g)
    # straight-through: d(round(u) s)/db = (round(u) - u) ds/db
    scale = lambda v: threshold / (2 ** (v - signed) - 1)  # noqa: E731
    slope = (scale(4 + 1e-6) - scale(4 - 1e-6)) / 2e-6
    u = x / scale(4.0)
    assert math.isclose(float(ours), float((g * (u.round() - u) * slope).sum()), rel_tol=1e-6)


@given(bits=st.integers(2, 8), signed=st.booleans(), seed=st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_grid(bits, signed, seed):
    """Exact zero, the right number of levels, error at most half a step inside the range, idempotent."""
    torch.manual_seed(seed)
    x = torch.randn(2000) if signed else torch.randn(2000).abs()
    threshold = torch.tensor(1.3)
    quantizer = IntegerQuantizer(threshold, Fixed(bits), signed)
    y, scale, zero, b = quantizer(torch.cat([x, torch.zeros(1), torch.linspace(-3, 3, 5000)]))
    assert float(b) == bits
    assert float(zero) == 0
    assert y[2000] == 0
    steps = (y / scale).round()
    assert torch.allclose(steps * scale, y, atol=1e-6)
    assert len(steps.unique()) == (2**bits - 1 if signed else 2**bits)
    inside = x.abs() <= 1.3
    assert float((y[:2000] - x)[inside].abs().max()) <= float(scale) / 2 + 1e-6
    assert torch.allclose(quantizer(y)[0], y, atol=1e-6)


def test_number_and_tensor_paths_agree():
    """A scalar range takes torch's scalar loops, the same range per channel the broadcasting ones."""
    x = torch.randn(6, 50, requires_grad=True)
    outs = []
    for shape in ((), (6, 1)):
        t = torch.full(shape, 0.9, requires_grad=True)
        b = torch.tensor(3.0, requires_grad=True)
        y = _Quantize.apply(x, t, b, True, None)
        grads = torch.autograd.grad(y.square().sum(), (x, t, b))
        outs.append((y, grads[0], grads[1].sum(), grads[2]))
    for one, other in zip(*outs, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", sorted(WIDTHS))
def test_widths_are_whole_and_stay_in_bounds(name):
    width = Fixed(5) if name == "fixed" else WIDTHS[name](8, 2, 8)
    assert float(width()) in width.choices
    assert (width.grid() is not None) == width.own_grid
    for p in width.parameters():
        slope = torch.autograd.grad(width(), p)[0]
        assert bool((slope > 0).all())
        assert name in ("gated", "squashed") or slope == 1
        for value in (-3.0, 2.4, 5.5, 99.0):
            p.data.fill_(value)
            width.after_step()
            assert float(width()) in width.choices
            assert width.choices[0] <= width.soft() <= width.choices[-1]


def test_power_of_two_only_gives_powers_of_two_and_switches_where_it_says():
    width = PowerOfTwo(8, 2, 16)
    for small in (2, 4, 8):
        for nudge, want in ((-0.01, small), (0.01, 2 * small)):
            width.bits.data.fill_(width.switch(small, 2 * small) + nudge)
            assert float(width()) == width.nearest(width.soft()) == want
    with pytest.raises(JpqError, match="No power of two"):
        PowerOfTwo(6, 5, 7)


@pytest.mark.parametrize("name", sorted(set(WIDTHS) - {"fixed", "gated"}))
@pytest.mark.parametrize("start", [2.5, 4.6, 7.0])
def test_a_learned_width_starts_where_it_is_asked_to(name, start):
    assert WIDTHS[name](start, 2, 8).soft() == pytest.approx(start, rel=1e-5)


@pytest.mark.parametrize("far", [-99.0, 99.0])
def test_a_squashed_width_that_went_far_can_come_back(far):
    width = WIDTHS["squashed"](5, 2, 8)
    width.theta.data.fill_(far)
    width.after_step()
    assert torch.autograd.grad(width(), width.theta)[0] > 1e-3


def test_a_rounded_step_moves_when_the_learned_one_has_reached_the_next_power():
    quantizer = IntegerQuantizer(torch.tensor(1.0), Fixed(4), True).train()
    quantizer.round_step(torch.tensor(0.125))
    for learned, step in ((1.9, 0.125), (2.1, 0.25), (1.1, 0.25), (0.9, 0.125)):  # in units of 0.125
        quantizer.log_threshold.data = (learned * 0.125 * quantizer.largest_integer()).log()
        quantizer(torch.randn(5))
        assert float(quantizer.step) == step


def test_nearest_prefers_more_bits_on_a_tie():
    assert Learned(3, 2, 8).nearest(4.5) == 5
    assert PowerOfTwo(3, 2, 8).nearest(2**1.5) == 4
    assert PowerOfTwo(3, 2, 8).nearest(2**2.5) == 8
    assert Learned(3, 2, 8).nearest(-1e6) == PowerOfTwo(3, 2, 8).nearest(-1e6) == 2


def test_fitted_range_beats_the_maximum_and_survives_zeros():
    torch.manual_seed(0)
    w = torch.randn(8, 400)
    w[3] = 0
    fitted = fit_threshold(w, 2, True, per_channel=True)
    assert fitted.shape == (8, 1)
    assert bool((fitted > 0).all())
    others = w.abs().amax(1)[[0, 1, 2, 4, 5, 6, 7]]
    assert float(fitted[3]) == pytest.approx(float(others.mean()))  # a row of zeros has the range of the others

    def error(ranges):
        return float((IntegerQuantizer(ranges, Fixed(2), True)(w)[0] - w).square().mean())

    assert error(fitted) < 0.5 * error(w.abs().amax(1, keepdim=True).clamp_min(1e-3))
    assert float(fit_threshold(torch.zeros(4), 8, False, False)) == 1.0


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(4, 6, 3), (2, 4, 9)),
        (nn.Conv2d(4, 6, 3, padding=1, groups=2), (2, 4, 5, 5)),
        (nn.Conv3d(2, 3, 2), (1, 2, 4, 4, 4)),
        (nn.ConvTranspose2d(4, 6, 3, 2, output_padding=1), (2, 4, 5, 5)),
        (nn.Linear(4, 6), (3, 7, 4)),
        (nn.Linear(4, 6, bias=False), (3, 4)),
    ],
)
def test_brevitas_layer_computes_on_our_grids(layer, shape):
    torch.manual_seed(0)
    x = torch.randn(shape)
    per_channel = not isinstance(layer, nn.ConvTranspose2d)
    w = IntegerQuantizer(fit_threshold(layer.weight.detach(), 4, True, per_channel), Learned(4, 2, 8), True)
    a = IntegerQuantizer(fit_threshold(x, 5, True, False), Learned(5, 2, 8), True)
    plain = type(layer).forward
    weight, inputs = w(layer.weight)[0], a(x)[0]
    twin = quantize_layer(layer, w, a)
    assert weight_quantizer(twin) is w
    assert act_quantizer(twin) is a
    out = twin(x)
    out.sum().backward()
    with torch.no_grad():
        layer.weight.copy_(weight)
        assert torch.allclose(plain(layer, inputs), out, atol=1e-5)
    assert w.width.bits.grad is not None
    assert a.width.bits.grad is not None


def test_learned_bits_survive_assigning_a_weight():
    layer = nn.Conv2d(3, 4, 3)
    w, a = (
        IntegerQuantizer(torch.ones(4, 1, 1, 1), Learned(5, 2, 8), True),
        IntegerQuantizer(torch.ones(()), Learned(5, 2, 8), False),
    )
    twin = quantize_layer(layer, w, a)
    w.width.bits.data.fill_(3.2)
    twin.weight = nn.Parameter(torch.randn(4, 3, 3, 3))
    assert weight_quantizer(twin).width.soft() == pytest.approx(3.2)
    twin.load_state_dict(twin.state_dict())
    assert weight_quantizer(twin) is w


def test_other_classes_are_refused():
    class Odd(nn.Conv2d):
        pass

    with pytest.raises(JpqError, match="Odd"):
        quantize_layer(
            Odd(1, 1, 1),
            IntegerQuantizer(torch.ones(()), Fixed(8), True),
            IntegerQuantizer(torch.ones(()), Fixed(8), True),
        )


def test_levels():
    assert float(levels(torch.tensor(2.0), True)) == 1  # -1, 0, 1
    assert float(levels(torch.tensor(4.0), False)) == 15


def test_a_step_that_is_a_power_of_two_goes_on_learning():
    x = torch.linspace(0, 4, 200)
    grid = IntegerQuantizer(torch.tensor(1.0), Fixed(3), False)
    grid.round_step(torch.tensor(0.125))
    optimizer = torch.optim.SGD([grid.log_threshold], lr=0.05)
    steps = set()
    for _ in range(400):
        optimizer.zero_grad()
        q = grid(x)[0]
        (q - x).square().mean().backward()
        optimizer.step()
        steps.add(float(grid.scale()))
    assert steps <= {0.125, 0.25, 0.5, 1.0}  # from power to power, to one of the two around the best, 4 / 7
    final = float(grid.scale())
    assert final in (0.5, 1.0)
    q = grid(x)[0]
    torch.testing.assert_close(q, (x / final).round().clamp(0, 7) * final, rtol=0, atol=0)
    grid.fix_step(grid.scale())
    torch.testing.assert_close(grid(x)[0], q.detach(), rtol=0, atol=0)
    assert not grid.power_of_two


def test_a_rounded_step_begins_near_the_learned_one_and_is_kept_in_states():
    grid = IntegerQuantizer(torch.tensor(2.2), Fixed(3), False)
    learned = float(grid.scale())
    grid.round_step(torch.tensor(0.25))
    assert float(grid.scale()) == 0.25
    assert float(grid.log_threshold.exp() / 7) == pytest.approx(learned, rel=1e-6)
    again = IntegerQuantizer(torch.tensor(1.0), Fixed(3), False)
    again.load_state_dict(grid.state_dict())
    assert float(again.scale()) == 0.25
    old = {name: t for name, t in grid.state_dict().items() if name not in ("step", "power_of_two")}
    fresh = IntegerQuantizer(torch.tensor(1.0), Fixed(3), False)
    fresh.load_state_dict(old)  # of a version that knew neither
    assert float(fresh.scale()) == pytest.approx(learned, rel=1e-6)


@pytest.mark.parametrize("rounded", [False, True])
def test_a_layer_that_is_called_twice_trains(rounded):
    quantizer = IntegerQuantizer(torch.tensor(1.0), Learned(4, 2, 8), True).train()
    if rounded:
        quantizer.step.fill_(0.125)
        quantizer.power_of_two.fill_(True)
    x = torch.randn(8, 8)
    y = quantizer(quantizer(x)[0] * 0.9)[0]
    y.square().sum().backward()
    assert quantizer.log_threshold.grad.abs() > 0
    assert quantizer.width.bits.grad.abs() > 0


def sided(x, threshold, bits, side):
    """The formulas of a signed grid whose additional level lies on `side`, as a chain of differentiable operations."""
    n = torch.exp2(bits - 1) - 1
    low, high = -(n + (side < 0)), n + (side > 0)
    scale = threshold / torch.maximum(-low, high)
    u = x / scale
    rounded = u + (u.round() - u).detach()
    return torch.where(u < low, low, torch.where(u > high, high, rounded)) * scale


SIDES = torch.tensor([-1, 1, 0, 1, -1], dtype=torch.int8)[:, None]


@pytest.mark.parametrize("side", [SIDES, torch.tensor(-1, dtype=torch.int8), torch.tensor(1, dtype=torch.int8)])
@pytest.mark.parametrize("bits", [2.0, 3.0, 7.0])
def test_gradients_of_all_levels_equal_autograd_of_the_plain_chain(side, bits):
    torch.manual_seed(0)
    x = (1.5 * torch.randn(5, 40, dtype=torch.float64)).requires_grad_()
    threshold = (torch.rand(side.shape, dtype=torch.float64) + 0.7).requires_grad_()
    b = torch.tensor(bits, dtype=torch.float64, requires_grad=True)
    g, inputs = torch.randn(5, 40, dtype=torch.float64), (x, threshold, b)
    want, got = sided(x, threshold, b, side), _Quantize.apply(x, threshold, b, True, None, side)
    assert torch.allclose(got, want, atol=1e-12)
    pairs = zip(torch.autograd.grad(got, inputs, g), torch.autograd.grad(want, inputs, g), strict=True)
    for ours, theirs in pairs:
        assert torch.allclose(ours, theirs, atol=1e-10)
    assert torch.equal(round_to_grid(x, threshold, b, True, side), got)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("side", [-1, 1])
def test_all_levels_of_a_width_are_used(bits, side):
    x = torch.linspace(-3, 3, 5001).expand(2, -1)  # 0 in the middle
    ranges, sides = torch.full((2, 1), 1.3), torch.full((2, 1), side, dtype=torch.int8)
    y, scale, _, _ = IntegerQuantizer(ranges, Fixed(bits), True, sides)(x)
    n = 2 ** (bits - 1) - 1
    low, high = (-n, n) if bits == 8 else (-n - (side < 0), n + (side > 0))
    assert (y[0] / scale[0]).round().unique().tolist() == list(range(low, high + 1))
    assert not y[:, 2500].any()
    assert float(y.abs().max()) == pytest.approx(1.3, rel=1e-6)  # the range is the end of the longer side
    quantizer = IntegerQuantizer(ranges, Fixed(bits), True, sides)
    assert torch.equal(quantizer(y)[0], y)
    assert quantizer.all_levels


@given(bits=st.integers(2, 7), seed=st.integers(0, 10**6), spread=st.floats(0.1, 3.0))
@example(bits=7, seed=275, spread=2.2333133280586464)
@settings(max_examples=30, deadline=None)
def test_all_levels_never_have_a_larger_error_and_take_the_better_side(bits, seed, spread):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(6, 30, generator=generator) + spread * torch.rand(6, 1, generator=generator)
    w[0], w[1] = 0, w[1].sign()

    def errors(weight, ranges, side):
        return (quantize_tensor(weight, ranges, bits, True, side) - weight).double().square().sum(1)

    rounding = 1 + 1e-5 + 2**bits * 2**-22  # a step's last digit moves the largest level, of 2^(b-1) steps, by as much
    narrow, none = fit_weight_grid(w, bits, True, False)
    assert not none.any()
    assert torch.equal(narrow, fit_threshold(w, bits, True, True))
    ranges, side = fit_weight_grid(w, bits, True, True)
    assert set(side.flatten().tolist()) <= {-1, 1}
    best = errors(w, ranges, side)
    assert bool((best <= errors(w, narrow, None) * rounding + 1e-9).all())
    n = 2 ** (bits - 1) - 1
    for fraction in torch.linspace(1, 1 / 40, 40).tolist():  # brute force over the same steps and both sides
        step = w.abs().amax(1, keepdim=True).clamp_min(1e-6) * fraction / n
        for other in (-1, 1):
            assert bool((best <= errors(w, step * (n + 1), torch.full_like(side, other)) * rounding + 1e-9).all())
    mirrored, other = fit_weight_grid(-w, bits, True, True)
    torch.testing.assert_close(errors(-w, mirrored, other), best, rtol=rounding - 1, atol=1e-9)


def test_a_long_tail_decides_the_side_at_any_width():
    w = torch.cat([torch.rand(2, 40) * 0.5, torch.tensor([[1.0], [1.0]])], 1) * torch.tensor([[1.0], [-1.0]])
    for bits in (2, 3, 4, 8, 16):
        assert fit_weight_grid(w, bits, True, True)[1].tolist() == [[1], [-1]], bits
    assert fit_weight_grid(w[:1], 3, False, True)[1].item() == 1


def test_the_side_stays_when_bits_change_and_fixing_them_changes_nothing():
    torch.manual_seed(0)
    w = torch.randn(6, 50)
    ranges, side = fit_weight_grid(w, 8, True, True)
    quantizer = IntegerQuantizer(ranges, Learned(8, 2, 8), True, side)
    steps = []
    for bits in (8, 4, 3, 2):
        quantizer.width.bits.data.fill_(bits)
        steps.append(quantizer.scale())
        assert torch.equal(quantizer.side, side)
    assert torch.equal(steps[2], 2 * steps[1])  # a bit less doubles the step
    before = quantizer(w)[0]
    quantizer.fix(2)
    assert torch.equal(quantizer(w)[0], before)
    quantizer.refit(w, 2)
    assert float((quantizer(w)[0] - w).square().sum()) < float((before - w).square().sum())
    assert quantizer.all_levels
    quantizer.fix_step(quantizer.scale())
    assert torch.equal(quantizer(w)[0], quantizer(quantizer(w)[0])[0])


def test_sides_are_kept_in_states_copies_and_pickles_and_old_states_are_narrow():
    torch.manual_seed(0)
    w = torch.randn(4, 30)
    ranges, side = fit_weight_grid(w, 3, True, True)
    quantizer = IntegerQuantizer(ranges, Fixed(3), True, side)
    fresh = IntegerQuantizer(torch.ones(4, 1), Fixed(3), True)
    fresh.load_state_dict(quantizer.state_dict())
    for other in (fresh, copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer))):
        assert torch.equal(other.side, side)
        assert torch.equal(other(w)[0], quantizer(w)[0])
    old = {name: t for name, t in quantizer.state_dict().items() if name != "side"}
    quantizer.load_state_dict(old)
    narrow = (w / (ranges / 3)).round().clamp(-3, 3) * (ranges / 3)
    torch.testing.assert_close(quantizer(w)[0], narrow)
    del quantizer._buffers["side"]  # a pickle of a version that had none
    assert not pickle.loads(pickle.dumps(quantizer)).all_levels


def test_a_mirrored_grid_rounds_the_mirrored_weight():
    torch.manual_seed(0)
    w, signs = torch.randn(4, 30), torch.tensor([[1.0], [-1.0], [-1.0], [1.0]])
    quantizer = IntegerQuantizer(fit_weight_grid(w, 2, True, True)[0], Fixed(2), True, SIDES[:4])
    before = quantizer(w)[0]
    quantizer.flip(signs)
    assert torch.equal(quantizer(w * signs)[0], before * signs)


def test_widths_with_a_grid_of_their_own_and_dead_zones_are_narrow():
    sides = torch.ones(3, 1, dtype=torch.int8)
    assert not IntegerQuantizer(torch.ones(3, 1), WIDTHS["gated"](8, 2, 8), True, sides).all_levels
    quantizer = IntegerQuantizer(torch.ones(3, 1), Fixed(4), True, sides)
    quantizer.use_dead_zone(lambda: (torch.tensor(1.0), torch.tensor(0.2)))
    assert not quantizer.all_levels
    assert not IntegerQuantizer(torch.ones(()), Fixed(4), False).all_levels


def test_brevitas_is_told_whether_the_range_is_narrow():
    ranges = torch.ones(4, 1, 1, 1)
    sides = -torch.ones(4, 1, 1, 1, dtype=torch.int8)
    act = IntegerQuantizer(torch.ones(()), Fixed(8), False)
    twin = quantize_layer(nn.Conv2d(3, 4, 3), IntegerQuantizer(ranges, Fixed(4), True, sides), act)
    assert not twin.weight_quant.is_narrow_range
    weight_quantizer(twin).fix(8)
    assert twin.weight_quant.is_narrow_range
    again = pickle.loads(pickle.dumps(copy.deepcopy(twin)))
    weight_quantizer(again).fix(4)
    assert not again.weight_quant.is_narrow_range
    weight_quantizer(again).side.zero_()
    assert again.weight_quant.is_narrow_range
