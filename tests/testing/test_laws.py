"""The laws of `jpq.testing` notice parts that break them, each with a sentence that names the law."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from jpq.methods.gates import VIB, Annealed, Feedback, FixedMask, Gate, GumbelTopK, HardConcrete, Ranked
from jpq.methods.scores import L1, HRank, Random, Score
from jpq.methods.structures import Axis, Block, Inputs, KernelPattern, Window
from jpq.tasks import Classification
from jpq.testing import check_gate, check_score, check_structure, check_task
from jpq.types import NONE, JpqError


class Logistic(Gate):
    """A sound gate: z = sigmoid(logit)."""

    def __init__(self, rows, n):
        super().__init__(rows, n)
        self.logit = nn.Parameter(torch.full((rows, n), 2.0))

    def relaxed(self):
        return torch.sigmoid(self.logit)

    def margin(self):
        return self.logit

    def keep_probability(self):
        return self.relaxed()


class StartsClosed(Logistic):
    def __init__(self, rows, n):
        super().__init__(rows, n)
        self.logit.data.neg_()


class OneRowOnly(Logistic):
    def margin(self):
        return self.logit[:1]


class SoftInEvaluation(Logistic):
    def multiplier(self):
        return self.relaxed()


class AboveOne(Logistic):
    def keep_probability(self):
        return 2 * self.relaxed()


class Falling(Logistic):
    def keep_probability(self):
        return 1 - self.relaxed()


class NoGradient(Logistic):
    def keep_probability(self):
        return self.relaxed().detach()


class HalfGradient(Logistic):
    def keep_probability(self):
        p = self.relaxed()
        return p + 0.5 * (p.detach() - p)


class WrongPenaltyGradient(VIB):
    def penalty(self):
        exact = super().penalty()
        return 0.9 * exact + 0.1 * exact.detach()


class WrongProbability(HardConcrete):
    def keep_probability(self):
        return torch.sigmoid(self.log_alpha)


class BiasedNoise(VIB):
    def input_noise(self, batch):
        return super().input_noise(batch) + 0.2


class Overflowing(Logistic):
    def margin(self):
        return self.logit * 1e35


class Forgetful(Ranked):
    def __init__(self, rows, n):
        super().__init__(rows, n)
        del self.margins
        self.register_buffer("margins", torch.ones(rows, n), persistent=False)


class OneMore(GumbelTopK):
    def count(self, density):
        return (super().count(density) + 1).clamp_max(self.n)


class PiledUp(Feedback):
    def relaxed(self):
        return torch.ones_like(self.kept)


class Deaf(FixedMask):
    def take(self, keep):
        pass


class Obedient(Logistic):
    def take(self, keep):
        self.logit.data.copy_(keep - 0.5)


def test_a_sound_gate_passes():
    check_gate(Logistic)
    check_gate(Annealed)


@pytest.mark.parametrize(
    ("gate", "law"),
    [
        (StartsClosed, "starts with 0 of"),
        (OneRowOnly, "not of the shape"),
        (SoftInEvaluation, "not zero exactly where dropped"),
        (AboveOne, r"leaves \[0, 1\]"),
        (Falling, "falls where"),
        (NoGradient, "has no gradient"),
        (HalfGradient, "finite differences"),
        (WrongPenaltyGradient, r"the gradient of penalty\(\)"),
        (WrongProbability, r"not P\(z != 0\)"),
        (BiasedNoise, "mean 1"),
        (Overflowing, "not finite"),
        (Forgetful, "does not restore"),
        (OneMore, "when the search ends, not"),
        (PiledUp, "add up to"),
        (Deaf, "does not hold"),
        (Obedient, "decided_outside"),
    ],
)
def test_a_broken_gate_is_noticed(gate, law):
    with pytest.raises(AssertionError, match=law):
        check_gate(gate)


def test_checks_leave_the_random_numbers_of_the_caller_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    check_gate(HardConcrete)
    check_score(Random)
    check_structure(Block(8, 4))
    assert torch.equal(torch.rand(3), expected)


class Inverted(Score):
    def __call__(self, site, evidence):
        return torch.arange(len(site.weights)).to(site.weights)[None]


class Flat(L1):
    def __call__(self, site, evidence):
        return super().__call__(site, evidence) * 0


class Transposed(L1):
    def __call__(self, site, evidence):
        return super().__call__(site, evidence).T


class Infinite(L1):
    def __call__(self, site, evidence):
        return super().__call__(site, evidence) / 0


class FirstSample(HRank):
    def __call__(self, site, evidence):
        super().__call__(site, evidence)
        return evidence.activations[:1].double().sum((2, 3))


class Unasked(Score):
    needs = frozenset({"activation"})

    def __call__(self, site, evidence):
        return site.weights.sum(1)[None]


class Guessing(Score):
    needs = frozenset({"activations"})

    def __call__(self, site, evidence):
        return site.weights.sum(1)[None]


class Unseeded(L1):
    def __call__(self, site, evidence):
        return torch.rand(1, len(site.weights))


class Meddling(L1):
    def __call__(self, site, evidence):
        site.weights.mul_(2)
        return super().__call__(site, evidence)


@pytest.mark.parametrize(
    ("score", "law"),
    [
        (Inverted, "permuted units"),
        (Flat, "all get the same score"),
        (Transposed, r"not \[1, n\]"),
        (Infinite, "not finite"),
        (FirstSample, "order of the samples"),
        (Unasked, "does not have"),
        (Guessing, "instead of raising JpqError"),
        (Unseeded, "permuted units|equal evidence"),
        (Meddling, "equal evidence|were changed"),
    ],
)
def test_a_broken_score_is_noticed(score, law):
    with pytest.raises(AssertionError, match=law):
        check_score(score)


class Nameless(Classification):
    metric_name = " "


class LossPerSample(Classification):
    def loss(self, output, target):
        return F.cross_entropy(output, target, reduction="none")


class LossWithoutGradient(Classification):
    def loss(self, output, target):
        return super().loss(output.detach(), target)


class RisingLoss(Classification):
    def loss(self, output, target):
        return -super().loss(output, target)


class MetricOfTheBatch(Classification):
    def metric(self, output, target):
        return super().metric(output, target).float().mean()


class ErrorRate(Classification):
    def metric(self, output, target):
        return ~super().metric(output, target)


class Percent(Classification):
    def metric(self, output, target):
        return 100.0 * super().metric(output, target)


class CertainChance(Classification):
    def chance(self, classes):
        return 1.0


class RefusesItsTargets(Classification):
    def check_target(self, target, classes):
        super().check_target(target, classes - 1)


class DivergenceOfNothing(Classification):
    def divergence(self, output, reference):
        return super().divergence(output, reference) + 0.1


class DistillsToNothing(Classification):
    def distill(self, student, teacher, temperature):
        return student.square().mean()


class TeachesTheTeacher(Classification):
    def distill(self, student, teacher, temperature):
        return F.mse_loss(student, teacher)


class OneDecision(Classification):
    def same_decision(self, a, b):
        return super().same_decision(a, b).all()


class NeverSame(Classification):
    def same_decision(self, a, b):
        return torch.zeros(len(a), dtype=torch.bool)


class AlwaysSame(Classification):
    def same_decision(self, a, b):
        return torch.ones(len(a), dtype=torch.bool)


class NegativeGap(Classification):
    def decision_gap(self, a, b):
        return -1 - super().decision_gap(a, b)


class FitsAnything(Classification):
    def fits(self, output, samples, classes):
        return True


@pytest.mark.parametrize(
    ("task", "law"),
    [
        (Nameless, "metric_name is empty"),
        (LossPerSample, "not a scalar"),
        (LossWithoutGradient, "loss has no gradient"),
        (RisingLoss, "loss of right outputs is not below"),
        (MetricOfTheBatch, "the metric of 8 samples is of"),
        (ErrorRate, "not better than that of random"),
        (Percent, "outside of metric_bounds"),
        (CertainChance, "not better than chance"),
        (RefusesItsTargets, "check_target refuses the example's targets"),
        (DivergenceOfNothing, "divergence of an output from itself is"),
        (DistillsToNothing, "not smallest where the student is the teacher"),
        (TeachesTheTeacher, r"use teacher\.detach"),
        (OneDecision, "no boolean per sample"),
        (NeverSame, "not the same decision as itself"),
        (AlwaysSame, "random outputs are the same decisions"),
        (NegativeGap, "decision_gap is negative"),
        (FitsAnything, "accepts a pair"),
    ],
)
def test_a_broken_task_is_noticed(task, law):
    with pytest.raises(AssertionError, match=law):
        check_task(task())


def test_a_task_whose_metric_is_better_where_it_is_lower():
    class RightErrorRate(ErrorRate):
        higher_is_better = False

        def chance(self, classes):
            return 1 - super().chance(classes)

    check_task(RightErrorRate())


def test_a_task_is_checked_on_a_batch_of_its_own():
    target = torch.tensor([0, 2, 1, 0])
    check_task(Classification(), 5.0 * F.one_hot(target, 3), target)


class ShiftedPool(Inputs):
    def pool(self, x):
        return super().pool(x).roll(1, 1)


class KeepsTheFirst(Inputs):
    def expand(self, z, weight):
        return super().expand(torch.cat([torch.ones_like(z[:, :1]), z[:, 1:]], 1), weight)


class ClaimsSingleWeights(Inputs):
    unit_is_weight = True


class NoPadding(Window):
    def valid(self, weight):
        return None


class Doubled(Block):
    def expand(self, z, weight):
        return super().expand(z, weight).double()


class Misspelt(Inputs):
    def spec(self):
        return "filters"


class Unlisted(Inputs):
    def spec(self):
        return "my-inputs"


class TwoOfThem(KernelPattern):
    def quota(self):
        return 2


@pytest.mark.parametrize(
    ("structure", "law"),
    [
        (ShiftedPool(), "not the adjoint"),
        (KeepsTheFirst(), "stay where no unit is kept|not the adjoint"),
        (ClaimsSingleWeights(), "not one weight"),
        (NoPadding(2, 4), "valid"),
        (Doubled(2, 3), "give a mask of torch.float64"),
        (Misspelt(), "which parse reads as"),
        (Unlisted(), "which parse does not read"),
        (TwoOfThem(), "must be 1"),
    ],
)
def test_a_broken_structure_is_noticed(structure, law):
    with pytest.raises(AssertionError, match=law):
        check_structure(structure)


def test_outputs_are_given_with_their_targets():
    task = Classification()
    with pytest.raises(JpqError, match="give both"):
        check_task(task, torch.eye(3))
    check_task(task, 9 * torch.eye(3), torch.arange(3))


def test_a_structure_of_a_traced_network_needs_its_sizes():
    import numpy as np

    axis = Axis(1, np.array([0, 1, NONE, 0, 2]), 3)  # no unit decides about the third
    check_structure(axis, [(4, 5, 3, 3)])
    with pytest.raises(AssertionError, match="give its `sizes`"):
        check_structure(axis, [(4, 6, 3, 3)])
    with pytest.raises(JpqError, match="traced network"):
        axis.spec()
