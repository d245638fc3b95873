"""Channels that close by a score while the network trains: schedules, thresholds, landing, resuming, bad input."""

from dataclasses import replace
from functools import cache
from itertools import pairwise, product

import pytest
import torch
import torch.nn.functional as F
from runs import QUICK, Stop, config, shortened
from thinned import thinned
from torch import nn

import jpq
from jpq import costs
from jpq.allocation import decision_data
from jpq.allocation.procedures import procedure_of
from jpq.allocation.ranking.scheduled_pruning import ScheduledPruning, find_threshold, macs_limit, uniform_keep_share
from jpq.config import Config, Decide
from jpq.methods.compatibility import compose_method
from jpq.methods.schedules import END, SCHEDULES, pick_schedule
from jpq.methods.scores import Score
from jpq.methods.table import METHODS
from jpq.tasks.data import load
from jpq.training import phases
from jpq.types import JpqError

RANKED = [name for name, m in METHODS.items() if m.schedule]


@cache
def digits():
    return load("digits", batch_size=16)


@cache
def batches():
    """The first eight training batches."""
    return list(digits().train.epoch(0))[:8]


STEPS = 24  # of a search


def network():
    torch.manual_seed(0)
    return jpq.tasks.models.build("convnet", 10, 1).eval()


def compressed(method="ranked", steps=STEPS, **asked):
    asked = {"bops": "1%", "density": 0.4, "evidence": batches(), **asked}
    return jpq.compress(network(), batches()[0][0], method, steps=steps, **asked)


def share(net):
    uses = net.net.exact_usage()
    return float(costs.macs(uses)) / costs.baseline(uses)["macs"]


def trained(net, steps):
    """Share of the MACs after every step."""
    net.train()
    optimizer = torch.optim.Adam(net.groups())
    found = []
    for i in range(steps):
        x, y = batches()[i % len(batches())]
        optimizer.zero_grad()
        (F.cross_entropy(net(x), y) + net.pressure()).backward()
        optimizer.step()
        net.step()
        found.append(share(net))
    return found


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_fall_from_all_to_the_density(name):
    schedule = SCHEDULES[name]
    last = len(schedule.times)
    found = [schedule.density(k, 0.3) for k in range(last + 1)]
    assert found[0] == 1
    assert found[-1] == pytest.approx(0.3)
    assert found == sorted(found, reverse=True)
    assert schedule.times[-1] <= END
    assert [schedule.due(t) for t in (-0.1, *schedule.times, 1.0)] == [0, *range(1, last + 1), last]


def test_the_shapes_are_those_of_the_papers():
    cubic, steps = SCHEDULES["cubic"], SCHEDULES["iterative"]
    assert cubic.density(10, 0.2) == pytest.approx(0.2 + 0.8 * 0.5**3)  # Zhu and Gupta at half of the way
    falls = [steps.density(k, 0.5) - steps.density(k + 1, 0.5) for k in range(10)]
    assert falls == pytest.approx([0.05] * 10), "the same share at every step"
    assert SCHEDULES["one-shot"].times == (0.0,)


BITS = ["learned", "power-of-two", "fixed"]
PAIRS = list(product(SCHEDULES, BITS))


# fast: each schedule and each width once
@pytest.mark.parametrize(
    ("schedule", "width"), thinned(PAIRS, lambda i, pair: i // len(BITS) % len(BITS) == BITS.index(pair[1]))
)
def test_the_density_is_reached_and_what_is_closed_stays_so(schedule, width):
    net = compressed(schedule=schedule, width=width, bops="1%" if width != "fixed" else "2%")
    if schedule == "one-shot":
        assert share(net) <= 0.4
    else:
        assert share(net) == 1
    closed, shares = [set()], []
    optimizer = torch.optim.Adam(net.groups())
    net.train()
    for i in range(STEPS):
        x, y = batches()[i % 8]
        optimizer.zero_grad()
        (F.cross_entropy(net(x), y) + net.pressure()).backward()
        optimizer.step()
        net.step()
        now = {(s, u) for s, g in enumerate(net.net.gates) for u in (g.keep()[0] == 0).nonzero()[:, 0].tolist()}
        assert now >= closed[-1]
        closed.append(now)
        shares.append(share(net))
    assert shares == sorted(shares, reverse=True)
    assert 0.3 < shares[-1] <= 0.4
    if schedule == "cubic":
        assert len(set(shares)) > 5
        assert shares[5] > SCHEDULES["cubic"].density(SCHEDULES["cubic"].due(5 / STEPS), 0.4) - 0.1
    goal = net.controller.targets[0]
    plan = net.discretize()
    assert costs.bops(net.net.exact_usage(plan)) <= goal.limit


def test_of_several_decisions_that_are_due_only_the_last_is_taken():
    net, asked = compressed(schedule="iterative"), []
    net.net.scheduled_pruning.draw_batches = lambda decision: asked.append(decision) or batches()
    net.net.scheduled_pruning(0.5)
    assert asked == [SCHEDULES["iterative"].due(0.5)]
    net.net.scheduled_pruning(0.5)
    assert len(asked) == 1


def test_a_search_that_ends_early_still_comes_to_its_density():
    net = compressed(schedule="cubic", steps=1000)
    trained(net, 2)
    assert share(net) == 1
    net.net.finish_search()
    assert 0.3 < share(net) <= 0.4


@pytest.mark.parametrize("density", [0.3, 0.45, 0.6, 0.75])
def test_scores_of_sets_are_told_how_many_units_the_cut_leaves(density):
    """Sites of different widths: half a unit is never rounded down, as the threshold on quantiles does not either."""

    class Counting(Score):
        def __init__(self):
            self.told = {}

        def __call__(self, site, evidence):
            self.told[site.name] = site.kept_count
            return torch.arange(len(site.weights))[None].float()

    torch.manual_seed(0)
    widths = (1, 10, 7, 16, 12)
    layers = [nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(12 * 16, 10)).eval()
    x = torch.randn(2, 1, 4, 4)
    net = jpq.compress(
        model, x, "ranked", steps=STEPS, bops="2%", density=0.9, evidence=[(x, torch.zeros(2).long())]
    ).net
    for gate in net.gates:
        gate.margins.fill_(1)
        gate.decisions.zero_()
    score = Counting()
    ScheduledPruning(net, score, SCHEDULES["one-shot"], density, lambda _: ())(0.0)
    kept = {site.name: int(gate.keep().sum()) for site, gate in zip(net.sites, net.gates, strict=True)}
    told = {site.name: score.told[site.taps[0].layer] for site in net.sites}
    assert told == kept


def test_threshold_is_the_lowest_that_fits():
    """Against brute force over all levels; a site's best unit is always spared."""
    net = compressed(schedule="cubic").net
    torch.manual_seed(1)
    quantiles = [torch.rand(1, site.n) for site in net.sites]

    def macs(level):
        plan = net.plan()
        kept = {}
        for site, q in zip(net.sites, quantiles, strict=True):
            kept[site.name] = tuple(u == int(q.argmax()) or float(v) > level for u, v in enumerate(q[0]))
        return float(costs.macs(net.exact_usage(replace(plan, kept=kept)))) / costs.baseline(net.exact_usage())["macs"]

    for density in (0.2, 0.5, 0.9, 1.0):
        found = find_threshold(net, quantiles, macs_limit(net, density))
        levels = [0.0, *sorted(float(v) for q in quantiles for v in q[0])]
        assert found == min(level for level in levels if macs(level) <= density)
    assert uniform_keep_share(net, macs_limit(net, 1.0)) == 1
    assert uniform_keep_share(net, macs_limit(net, 1e-9)) <= 1 / 2


@pytest.mark.parametrize("method", thinned(RANKED, lambda _, m: m in ("taylor", "catro")))  # all land in test_session
def test_methods_train_land_and_rebuild(method):
    net = compressed(method, steps=12)
    trained(net, 12)
    plan = net.discretize()
    small = net.finalize()
    limit = 0.01 * costs.baseline(net.net.exact_usage())["bops"]
    assert 0.97 * limit <= jpq.measure(small, batches()[0][0])["bops"] <= limit
    assert not all(all(units) for units in plan.kept.values())
    assert jpq.export.verify.difference(net.net, small, batches()[0][0]) < 1e-9


def test_landing_follows_the_ranking():
    net = compressed("ranked", schedule="one-shot", width="fixed", bops="2%")
    margins = {s.name: g.margins[0].clone() for s, g in zip(net.net.sites, net.net.gates, strict=True)}
    plan = net.discretize()
    for name, kept in plan.kept.items():
        keep = torch.tensor(kept)
        assert margins[name][keep].min() > margins[name][~keep].max()


def test_evidence_is_training_data_and_none_other(tmp_path, monkeypatch):
    """The batches that a score sees are of the training split, whatever decision asks for them."""
    seen = []
    original = decision_data.score_batches
    monkeypatch.setattr(phases, "score_batches", lambda data, n=0: seen.append((data, n)) or original(data, n))
    jpq.optimize(shortened(config(tmp_path, "taylor"), epochs=4), final=False)
    assert [n for _, n in seen] == sorted({n for _, n in seen})
    assert seen
    data = seen[0][0]
    for x, _ in original(replace(data, train=plain(data.train)), 3):
        apart = torch.cdist(x.flatten(1), data.train.normalise(data.train.images).flatten(1)).amin(1)
        assert float(apart.max()) < 1e-4


def plain(batches):
    """The same batches without augmentation."""
    return jpq.tasks.data.Batches(
        batches.images, batches.labels, mean=batches.mean, std=batches.std, batch_size=batches.batch_size, shuffle=True
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    asked = shortened(config(tmp_path_factory.mktemp("runs"), "taylor", replace(QUICK, search=0.67)), epochs=6)
    return asked, jpq.optimize(asked)


def test_a_run_reports_what_it_closed(finished):
    _, result = finished
    kept = [r.kept for r in result.history if r.phase == "search"]
    assert kept == sorted(kept, reverse=True)
    assert kept[-1] < 1
    assert 0.97 <= result.targets["bops"]["used"] <= 1
    assert result.verified["masked_vs_rebuilt_float64"] <= 1e-9


@pytest.mark.slow  # as test_resume.py, which resumes another method in the fast suite
@pytest.mark.parametrize(("phase", "epoch"), [("search", 2), ("search", 4), ("fine-tune", 2)])
def test_resuming_gives_the_same_bits_as_never_stopping(phase, epoch, finished, tmp_path):
    asked, whole = finished
    again = replace(asked, run=replace(asked.run, out=tmp_path))
    with pytest.raises(KeyboardInterrupt):
        jpq.optimize(again, Stop(phase, epoch), final=False)
    result = jpq.optimize(replace(again, run=replace(again.run, resume=True)), final=False)
    assert [repr(replace(r, seconds=0.0)) for r in result.history] == [
        repr(replace(r, seconds=0.0)) for r in whole.history
    ]
    ours, theirs = (jpq.load(r.folder)[0].state_dict() for r in (result, whole))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_classes_rank_and_the_report_says_what_its_accuracy_is_of(tmp_path):
    asked = shortened(config(tmp_path, "catro"))
    result = jpq.optimize(replace(asked, decide=replace(asked.decide, classes="0,3")), final=False)
    assert [n for n in result.notes if "ranked for classes 0,3 alone; every accuracy is on all classes" in n]


@pytest.mark.parametrize(
    ("method", "decide", "says"),
    [
        ("djpq", {"score": "l2"}, "score l2: method djpq ranks no channels. Choose method ranked, taylor"),
        ("two-stage", {"schedule": "cubic"}, "schedule cubic: method two-stage closes channels at once"),
        ("ranked", {"schedule": "cubik"}, "Unknown schedule 'cubik'. Did you mean cubic"),
        ("ranked", {"score": "tailor"}, "Did you mean taylor"),
        ("taylor", {"classes": "0,1"}, "score taylor does not look at classes. Choose score catro"),
        ("uniform", {"classes": "0,1"}, "method uniform ranks no channels"),
        ("catro", {"classes": "0;1"}, "by their numbers: classes='0,3,5'"),
        ("catro", {"classes": "3,50"}, "classes='3,50': data 'digits' has classes 0 to 9 only"),
        ("taylor", {"density": 1e-6}, "density=1e-06 cannot be met.*of the MACs stay"),
        ("taylor", {"structure": "elementwise"}, "decides about whole channels"),
    ],
)
def test_what_cannot_be_ends_before_training(method, decide, says, tmp_path):
    asked = config(tmp_path, method)
    watch = Stop("float", 1)
    with pytest.raises(JpqError, match=says):
        jpq.optimize(replace(asked, decide=replace(asked.decide, **decide)), watch)
    assert not hasattr(watch, "next")


def test_a_network_without_norms_has_no_scales_to_rank_by():
    """It is found out where the targets are tried, before anything trains."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 8), torch.nn.ReLU(), torch.nn.Linear(8, 10))
    net = jpq.compress(model, batches()[0][0], "ranked", bops="5%", evidence=batches())
    decide, check_feasible = Decide(method="ranked"), procedure_of("ranked").check_feasible
    check_feasible(net.net, net.controller.targets, decide)
    with pytest.raises(JpqError, match=r"pass no normalisation with a scale\. Choose another score"):
        check_feasible(net.net, net.controller.targets, replace(decide, score="bn-scale"))


def test_rows_carry_their_score_and_schedule():
    assert compose_method("taylor").score == "taylor"
    assert compose_method("taylor", score="l1", schedule="cubic") == replace(
        METHODS["taylor"], score="l1", schedule="cubic"
    )
    assert Config().decide == Decide(score="", schedule="", classes="")
    assert pick_schedule("cubic") is SCHEDULES["cubic"]
    assert isinstance(compressed().net.scheduled_pruning, ScheduledPruning)
