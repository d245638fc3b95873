"""What proposes the next trial, seeded by the study's seed and the trial's number.

A sampler is made anew for each trial. So the draws of a trial do not depend on which worker runs it, two workers never
draw the same, and a study that was interrupted goes on as if it had not been.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from jpq.trials.settings import Study
from jpq.types import unknown

LIMITS = "limits"  # user attribute: name of a limit -> cost over limit - 1, at most 0 where it holds

FIRST = 8  # random trials before a model is fitted

POPULATION = 20  # trials of a generation; neither follows --trials, which every worker may choose

OWN = hasattr(optuna.trial.Trial, "set_constraint")  # from Optuna 5 on trials hold their constraints themselves

Make = Callable[[int], BaseSampler]


def feasibility(trial: FrozenTrial) -> Sequence[float]:
    """The constraints of a trial, for Optuna before 5."""
    return tuple(trial.user_attrs.get(LIMITS, {}).values())


def hold(trial: optuna.Trial, limits: Mapping[str, float]) -> None:
    """Tell the sampler how far a trial lies from its limits: cost over limit - 1."""
    trial.set_user_attr(LIMITS, dict(limits))
    with warnings.catch_warnings():  # of a trial that is run again they are known already
        warnings.simplefilter("ignore")
        for name, over in limits.items() if OWN else ():
            trial.set_constraint(f"at most the asked {name}", over)


def sampler(study: Study, seed: int) -> Seeded:
    """The named sampler. Raises JpqError for a name that is not known."""
    rule: dict[str, Any] = {} if OWN or not study.limits() else {"constraints_func": feasibility}
    table: dict[str, Make] = {
        "tpe": lambda seed: TPESampler(
            seed=seed, n_startup_trials=FIRST, multivariate=True, group=True, constant_liar=True, **rule
        ),
        "nsga2": lambda seed: NSGAIISampler(seed=seed, population_size=POPULATION, **rule),
        "gp": lambda seed: GPSampler(seed=seed, n_startup_trials=FIRST, **rule),
        "random": lambda seed: RandomSampler(seed=seed),
    }
    if study.sampler not in table:
        raise unknown("sampler", study.sampler, table)
    return Seeded(table[study.sampler], seed)


class Seeded(BaseSampler):
    """A sampler that is made anew, with a seed of its own, for each trial."""

    def __init__(self, make: Make, seed: int) -> None:
        self.make, self.seed = make, seed
        self.inner = self._made(0)

    def _made(self, number: int) -> BaseSampler:
        digest = hashlib.sha256(f"{self.seed} {number}".encode()).digest()
        with warnings.catch_warnings():  # Optuna's notes on what it may yet change
            warnings.simplefilter("ignore")
            return self.make(int.from_bytes(digest[:4], "big"))

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """A new sampler for a new trial."""
        self.inner = self._made(trial.number)
        self.inner.before_trial(study, trial)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """As the sampler has it."""
        return self.inner.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """As the sampler has it."""
        return self.inner.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """As the sampler has it."""
        return self.inner.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """As the sampler has it."""
        self.inner.after_trial(study, trial, state, values)

    def reseed_rng(self) -> None:
        """Nothing to do: every trial has a seed of its own."""
