"""Laws of a score: the ranking of the channels of one site, larger is more important."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import Tensor, nn

from jpq.allocation.ranking.rank import site_scores
from jpq.compression.attach import attach
from jpq.methods.gates import Ranked
from jpq.methods.quantizers import Fixed
from jpq.methods.scores import Chain, Evidence, Score, SiteView
from jpq.testing.expectation import expect
from jpq.tracing.sites import channels
from jpq.tracing.trace import trace
from jpq.types import JpqError

UNITS, SAMPLES, SIDE = 6, 8, 7  # of the made-up evidence: channels, samples of a batch, pixels of a map's side

SITE = "the site"


def check_score(cls: type[Score]) -> None:
    """Check the laws of scores on `cls()`.

    `[1, n]` finite numbers that tell units apart; permuted units get permuted scores; the order of samples does not
    matter; a random score follows the evidence's generator; weights are left as they are; missing evidence is refused
    with JpqError that names the site; every channel of a small network gets a number.

    Raises AssertionError with the law that is broken.
    """
    score = cls()
    unknown = score.needs - {field.name for field in fields(Evidence)}
    expect(not unknown, f"{cls.__name__}: needs names {sorted(unknown)}, which Evidence does not have.")
    for law in LAWS:
        law(score, cls.__name__)


def example_site(units: Sequence[int] = range(UNITS)) -> SiteView:
    """A site of six channels with random weights; `units`: their order."""
    weights = torch.rand(UNITS, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return SiteView(SITE, weights[list(units)])


def example_evidence(units: Sequence[int] = range(UNITS), samples: Sequence[int] = range(SAMPLES)) -> Evidence:
    """Evidence of every kind for `example_site`; the order of its units, and of the samples in its batch."""
    generator = torch.Generator().manual_seed(1)
    order, batch = list(units), list(samples)
    maps = torch.zeros(SAMPLES, UNITS, SIDE, SIDE)
    for unit in range(UNITS):
        maps[:, unit, : unit + 1, : unit + 1] = torch.eye(unit + 1)
    maps = maps * torch.rand(SAMPLES, 1, 1, 1, generator=generator).add(0.5)
    chain = torch.rand(3, 2, UNITS, dtype=torch.float64, generator=generator)[:, :, order]
    means = torch.rand(2, SAMPLES, UNITS, dtype=torch.float64, generator=generator)
    return Evidence(
        activations=maps[batch][:, order],
        means=means[:, batch][:, :, order],
        labels=torch.tensor([0, 0, 1, 1, 2, 2, 2, 2])[batch],
        gradients=(means[0][batch][:, order],),
        curvature=(means[1, 0, order],),
        scales=means[0, 0, order],
        chain=Chain(chain[0], chain[1], chain[2]),
        generator=torch.Generator().manual_seed(2),
        activation_gradients=maps[batch][:, order].square() - 0.1,
    )


def _gives_a_number_for_each_unit(score: Score, name: str) -> None:
    values = score(example_site(), example_evidence())
    expect(values.shape == (1, UNITS), f"{name}: {UNITS} units get scores of shape {tuple(values.shape)}, not [1, n].")
    expect(values.isfinite(), f"{name}: a score is not finite.")
    expect(len(values.unique()) > 1, f"{name}: units of different weights and evidence all get the same score.")


def _permuted_units_get_permuted_scores(score: Score, name: str) -> None:
    order = [3, 1, 5, 0, 2, 4]
    values, moved = score(example_site(), example_evidence()), score(example_site(order), example_evidence(order))
    if not _is_random(score):
        expect(torch.allclose(values[:, order], moved), f"{name}: permuted units do not get permuted scores.")


def _is_random(score: Score) -> bool:
    """Whether the score draws from the evidence's generator."""
    evidence = example_evidence()
    state = evidence.generator.get_state() if evidence.generator is not None else torch.empty(0)
    score(example_site(), evidence)
    return evidence.generator is not None and not torch.equal(state, evidence.generator.get_state())


def _the_order_of_samples_does_not_matter(score: Score, name: str) -> None:
    values = score(example_site(), example_evidence())
    shuffled = score(example_site(), example_evidence(samples=[5, 2, 7, 0, 1, 6, 3, 4]))
    expect(torch.allclose(values, shuffled), f"{name}: the order of the samples in a batch changes the scores.")


def _equal_evidence_gives_equal_scores(score: Score, name: str) -> None:
    site = example_site()
    before = site.weights.clone()
    values, repeated = score(site, example_evidence()), score(site, example_evidence())
    expect(torch.equal(values, repeated), f"{name}: equal evidence (and generator) gives other scores.")
    expect(torch.equal(site.weights, before), f"{name}: the weights were changed.")


def _missing_evidence_is_refused(score: Score, name: str) -> None:
    if not score.needs - {"generator"}:
        return
    try:
        score(example_site(), Evidence())
    except JpqError as error:
        expect(SITE in str(error), f"{name}: the error about missing evidence does not name the site: {error}")
    else:
        raise AssertionError(f"{name}: needs {sorted(score.needs)}, and does without it instead of raising JpqError.")


def _every_channel_of_a_network_gets_a_number(score: Score, name: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, images = _network().eval(), torch.randn(SAMPLES, 1, SIDE, SIDE)
        labels = torch.arange(SAMPLES) % 3
        network = trace(model, images)
        net = attach(model, network, channels(network), Ranked, lambda _: (Fixed(8), Fixed(8)), [images], "ranked")
        values = site_scores(net, score, [(images, labels)] * score.batches)
    for site in net.sites:
        scores: Tensor = values[site.name]
        expect(
            scores.shape == (site.n,),
            f"{name}: site '{site.name}' of a small network gets {tuple(scores.shape)} scores.",
        )
        expect(
            scores.isfinite(), f"{name}: a channel of '{site.name}' in a small network gets a score that is not finite."
        )
        expect(
            len(scores.unique()) > 1, f"{name}: all channels of '{site.name}' in a small network get the same score."
        )


def _network() -> nn.Module:
    """A small classifier in which every channel passes a BatchNorm."""
    features = [nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.BatchNorm2d(4), nn.ReLU()]
    for norm in (features[1], features[4]):
        nn.init.uniform_(norm.weight, 0.5, 1.5)  # type: ignore[arg-type]
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(4 * (SIDE - 4) ** 2, 3))


LAWS = (
    _gives_a_number_for_each_unit,
    _permuted_units_get_permuted_scores,
    _the_order_of_samples_does_not_matter,
    _equal_evidence_gives_equal_scores,
    _missing_evidence_is_refused,
    _every_channel_of_a_network_gets_a_number,
)
