"""Golden costs (the tables in the BOPs sheet, exact integers), the three ways to count, and targets."""

import math
from dataclasses import replace
from fractions import Fraction
from functools import cache

import pytest
import torch

from jpq import costs
from jpq.compression.usage import exact_usage
from jpq.costs.target import Controller, Target, parse_share, parse_target, parse_targets, used_share
from jpq.plan import LayerPlan, Plan
from jpq.tasks.models import build
from jpq.tracing.channel_shares import ChannelShares
from jpq.tracing.sites import channels
from jpq.tracing.trace import trace
from jpq.types import JpqError

# exact BOPs at W8A8, W4A8, W4A4, W3A3, W2A2 with the image at 8 bits
UNIFORM = {
    "lenet5": ((1, 28), 4_267_008, [273_088_512, 136_544_256, 75_644_928, 45_315_072, 22_597_632]),
    "vgg7": ((3, 32), 615_917_568, [39_418_724_352, 19_709_362_176, 9_911_304_192, 5_596_342_272, 2_506_137_600]),
    "resnet20": ((3, 32), 40_551_040, [2_595_266_560, 1_297_633_280, 655_894_528, 371_594_880, 167_512_576]),
    "resnet56": ((3, 32), 125_485_696, [8_031_084_544, 4_015_542_272, 2_014_849_024, 1_136_006_784, 507_251_200]),
}
WIDTHS = [(8, 8), (4, 8), (4, 4), (3, 3), (2, 2)]


@cache
def traced(name):
    (channels_in, side), *_ = UNIFORM[name]
    return trace(build(name, 10, channels_in), torch.randn(2, channels_in, side, side))


def uniform_plan(network, w, a, sites=(), kept=None):
    layers = {x.name: LayerPlan(w, 8 if x.reads_input else a, False) for x in network.layers}
    return Plan("test", layers, kept or {s.name: (True,) * s.n for s in sites})


@pytest.mark.parametrize("name", sorted(UNIFORM))
def test_uniform_bits_cost_what_the_published_tables_say(name):
    network = traced(name)
    shares = ChannelShares(network, ())
    _, macs, bops = UNIFORM[name]
    for (w, a), want in zip(WIDTHS, bops, strict=True):
        uses = exact_usage(network, shares, uniform_plan(network, w, a))
        assert costs.bops(uses) == want
        assert costs.macs(uses) == macs
    assert costs.baseline(uses)["bops"] == macs * 1024


@pytest.mark.parametrize(("name", "want"), [("vgg7", 10_025_041_920), ("resnet20", 670_081_024)])
def test_first_and_last_layer_at_eight_bits(name, want):
    """The convention of HAWQ-V3: W4A4, with the first and the last layer at 8 bits."""
    network = traced(name)
    plan = uniform_plan(network, 4, 4)
    ends = {x.name: LayerPlan(8, 8, False) for x in (network.layers[0], network.layers[-1])}
    uses = exact_usage(network, ChannelShares(network, ()), replace(plan, layers={**plan.layers, **ends}))
    assert costs.bops(uses) == want


@pytest.mark.parametrize(
    ("name", "w", "share"), [("vgg7", 2, 0.06223), ("lenet5", 2, 0.05744), ("vgg7", 1, 0.03112), ("resnet20", 4, 0.125)]
)
def test_weights_alone_at_few_bits(name, w, share):
    """Published rows of Bayesian Bits' convention (image at 8 bits); 12.5 % for 4-bit weights under a 32-bit image."""
    network = traced(name)
    plan = uniform_plan(network, w, 32)
    if w == 4:
        plan = replace(plan, layers={x: LayerPlan(w, 32, False) for x in plan.layers})
    uses = exact_usage(network, ChannelShares(network, ()), plan)
    assert float(costs.bops(uses) / costs.baseline(uses)["bops"]) == pytest.approx(share, abs=5e-6)


def test_resnet20_with_inner_channels_halved():
    """MACs 20,497,024 and W4A4 335,030,272 = 0.80683 %."""
    network = traced("resnet20")
    sites = [s for s in channels(network) if s.name.endswith("conv1") and s.name != "conv1"]
    kept = {s.name: tuple(i % 2 == 0 for i in range(s.n)) for s in sites}
    uses = exact_usage(network, ChannelShares(network, sites), uniform_plan(network, 4, 4, sites, kept))
    assert costs.macs(uses) == 20_497_024
    assert costs.bops(uses) == 335_030_272


def test_vgg7_with_every_hidden_width_halved():
    """MACs 154,866,688 and W4A4 2,506,178,560."""
    network = traced("vgg7")
    sites = channels(network)
    kept = {s.name: tuple(i % 2 == 0 for i in range(s.n)) for s in sites}
    uses = exact_usage(network, ChannelShares(network, sites), uniform_plan(network, 4, 4, sites, kept))
    assert costs.macs(uses) == 154_866_688
    assert costs.bops(uses) == 2_506_178_560


def test_depthwise_layers_cost_linearly():
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 1), torch.nn.Conv2d(8, 8, 3, padding=1, groups=8), torch.nn.Conv2d(8, 4, 1)
    )
    network = trace(net, torch.randn(1, 3, 6, 6))
    (site,) = [s for s in channels(network) if s.n == 8]
    half = {site.name: (True, False) * 4}
    full = {site.name: (True,) * 8}
    shares = ChannelShares(network, [site])
    ratio = [
        Fraction(costs.macs([h]), costs.macs([f]))
        for h, f in zip(
            exact_usage(network, shares, uniform_plan(network, 8, 8, [site], half)),
            exact_usage(network, shares, uniform_plan(network, 8, 8, [site], full)),
            strict=True,
        )
    ]
    assert ratio == [Fraction(1, 2)] * 3


def test_size_counts_weights_at_their_bits_and_two_numbers_per_channel():
    use = costs.LayerUse("x", 1, 1000, 10, 1, Fraction(1, 2), 1, 4, 8)
    assert costs.size([use]) == (1000 / 2 * 4 + 5 * 64) / 8


def test_size_counts_the_weights_that_a_mask_keeps_and_the_mask():
    use = costs.LayerUse("x", 1, 1000, 10, 1, 1, Fraction(1, 4), 4, 8, mask_bits=811)
    assert costs.size([use]) == Fraction(250 * 4 + 811 + 10 * 64, 8)


def test_zeros_that_lie_anywhere_cost_a_device_as_much_as_other_weights():
    masked = costs.LayerUse("x", 1000, 100, 10, 1, 1, Fraction(1, 4), 4, 8, mask_bits=100, scheme="elementwise")
    regular = replace(masked, regular=True)
    assert costs.bops([masked]) == costs.bops_structured([regular]) == 1000 * 32 // 4
    assert costs.bops_structured([replace(masked, regular=False)]) == 1000 * 32


def test_layers_in_floating_point_have_a_bias_and_no_scale():
    use = costs.LayerUse("x", 1, 1000, 10, 1, 1, 1, 32, 32)
    assert costs.size([use]) == 4 * (1000 + 10) == costs.baseline([use])["size"]


def test_the_fp32_size_is_that_of_all_parameters():
    uses = exact_usage(traced("lenet5"), ChannelShares(traced("lenet5"), ()), uniform_plan(traced("lenet5"), 4, 4))
    assert costs.baseline(uses)["size"] == 4 * sum(p.numel() for p in build("lenet5", 10, 1).parameters())


def test_the_fp32_baseline_keeps_all_of_a_pruned_and_masked_layer():
    full = costs.LayerUse("x", 1000, 100, 10, 1, 1, 1, 4, 4)
    half = Fraction(1, 2)
    pruned = replace(full, inputs=half, outputs=half, density=half, positions=half, mask_bits=50, scheme="elementwise")
    assert costs.baseline([pruned]) == costs.baseline([full])
    assert costs.dense(pruned, 8) == costs.dense(full, 8)


@pytest.mark.parametrize(
    ("text", "limit"),
    [("1%", 10_000), ("0.25%", 2_500), ("100%", 10**6), ("12k", 12_000), ("0.5M", 500_000), ("1e3", 1000)],
)
def test_amounts(text, limit):
    assert parse_target("bops", text, 10**6).limit == limit


@pytest.mark.parametrize("text", ["0", "0%", "101%", "2M", "-1%", "much", "", "1 percent", "50KB", "nan", "inf"])
def test_bad_amounts_are_refused(text):
    with pytest.raises(JpqError, match="target_bops"):
        parse_target("bops", text, 10**6)


@pytest.mark.parametrize(
    ("text", "share"),
    [("50%", Fraction(1, 2)), ("0.913", Fraction(913, 1000)), (" 91.3 % ", Fraction(913, 1000)), ("0", 0), ("1", 1)],
)
def test_shares_are_read_exactly(text, share):
    assert parse_share(text) == share


@pytest.mark.parametrize("text", ["1.01", "101%", "half", "-0.5", "nan", "inf", "", "%", "0.5k", "1e999999999"])
def test_other_texts_are_no_share(text):
    assert parse_share(text) is None


def test_sizes_take_bytes():
    assert parse_target("size", "50KB", 10**6).limit == 50_000


def goal_and_uses(bits):
    """A toy with one layer whose bits are a tensor."""
    use = lambda b: [costs.LayerUse("x", 100, 10, 1, 1, 1, 1, b, b)]  # noqa: E731
    return parse_targets({"bops": "1%"}, use(32))[0], use(bits)


def test_controller_reaches_the_wanted_cost_within_two_percent_and_stays():
    goal, _ = goal_and_uses(32)
    bits = torch.tensor(8.0, requires_grad=True)
    controller = Controller((goal,))
    controller.begin(goal_and_uses(8.0)[1])
    optim = torch.optim.Adam([bits], 0.02)
    seen = []
    for step in range(1500):
        _, uses = goal_and_uses(bits)
        loss = controller.loss(uses, step / 1500) - 0.3 * bits  # the task always wants more bits
        optim.zero_grad()
        loss.backward()
        optim.step()
        seen.append(float(used_share(goal, goal_and_uses(float(bits))[1])))
    assert 0.98 < sum(seen[-200:]) / 200 < 1.02
    assert min(seen) > 0.9  # no overshoot on the way down


def test_controller_is_silent_at_or_below_the_aim_and_survives_a_checkpoint():
    goal, uses = goal_and_uses(torch.tensor(2.0))
    controller = Controller((goal,))
    controller.begin(goal_and_uses(8.0)[1])
    assert controller.loss(uses, 1.0) == 0
    assert controller.ramped_limit(goal, 1.0) == goal.limit
    assert controller.ramped_limit(goal, 0.0) == pytest.approx(6400)
    half = goal.limit * math.sqrt(6400 / goal.limit)  # half way down the ramp: the geometric mean of both ends
    assert controller.ramped_limit(goal, controller.ramp / 2) == pytest.approx(half, rel=1e-12)
    twin = Controller((goal,))
    twin.restore(controller.state())
    assert twin.pressure == controller.pressure
    assert twin.ramped_limit(goal, 0.3) == controller.ramped_limit(goal, 0.3)


def uses_over(goal, excess):
    """Uses of the toy whose cost is e^excess times the limit, as tensors."""
    return goal_and_uses(torch.tensor(math.sqrt(goal.limit * math.exp(excess) / 100), dtype=torch.float64))[1]


@pytest.mark.parametrize(("excess", "counted"), [(0.2, 0.2), (3.0, 0.5), (-0.3, -0.3), (-4.0, -0.5)])
def test_the_multiplier_grows_with_the_excess_of_which_half_a_nat_counts_at_most(excess, counted):
    goal, _ = goal_and_uses(32)
    controller = Controller((goal,))
    controller.begin(uses_over(goal, 0.0), multiplier=2.0)
    loss = controller.loss(uses_over(goal, excess), 1.0)
    assert float(loss) == pytest.approx(2.0 * max(excess, 0.0), rel=1e-9)  # by the multiplier before the step
    assert controller.multiplier() == pytest.approx(2.0 * math.exp(controller.rate * counted), rel=1e-9)


@pytest.mark.parametrize(("excess", "bound"), [(1.0, "high"), (-1.0, "low")])
def test_the_multiplier_stays_where_it_can_come_back_from(excess, bound):
    goal, _ = goal_and_uses(32)
    controller = Controller((goal,))
    controller.begin(uses_over(goal, 0.0), multiplier=1.0)
    for _ in range(300):
        controller.loss(uses_over(goal, excess), 1.0)
    assert controller.multiplier() == getattr(controller, bound)


def test_a_search_that_begins_below_its_target_may_use_all_of_it():
    goal, uses = goal_and_uses(2.0)
    controller = Controller((goal,))
    controller.begin(uses)
    assert controller.ramped_limit(goal, 0.0) == goal.limit


def test_prices_weigh_every_target_by_its_own_multiplier():
    bits = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
    use = costs.LayerUse("x", 100, 1000, 1, 1, 1, 1, bits, torch.tensor(8.0, dtype=torch.float64))
    controller = Controller((Target("bops", "", 10), Target("size", "", 10)))
    controller.pressure = {"bops": 0.5, "size": 3.0}
    weighted = controller.weighted_cost([use])
    size = (1000 * 4 + 64) / 8
    assert float(weighted) == pytest.approx(0.5 * math.log(100 * 4 * 8) + 3.0 * math.log(size), rel=1e-6)
    (price,) = torch.autograd.grad(weighted, bits)
    assert float(price) == pytest.approx(0.5 / 4 + 3.0 * 125 / size, rel=1e-6)
    assert controller.multiplier() == 3.0


def test_costs_in_messages_are_rounded_up():
    """A limit that a message names is one that is met."""
    assert Target("bops", "", 1).format_cost(Fraction(12_340_001, 10)) == "1,234,001"
    assert Target("latency", "", 1).format_cost(512_301) == "0.5124 ms"


def test_several_targets_push_only_where_they_are_exceeded():
    use = costs.LayerUse(
        "x", 100, 1000, 1, 1, 1, 1, torch.tensor(4.0, requires_grad=True), torch.tensor(4.0, requires_grad=True)
    )
    loose, tight = Target("bops", "", 10**6), Target("size", "", 100)
    controller = Controller((loose, tight))
    controller.begin([use])
    grads = torch.autograd.grad(controller.loss([use], 1.0), (use.w_bits, use.a_bits), allow_unused=True)
    assert grads[0] > 0
    assert grads[1] is None


def test_a_network_that_costs_nothing_has_no_price():
    keep = torch.zeros((), requires_grad=True)
    use = costs.LayerUse("a", 100, 100, 10, keep, keep, 1, torch.tensor(8.0), torch.tensor(8.0))
    controller = Controller((Target("bops", "1000", 1000),))
    controller.pressure["bops"] = 1.0
    weighted = controller.weighted_cost([use])
    assert weighted == 0
    (price,) = torch.autograd.grad(weighted, keep)
    assert price == 0
