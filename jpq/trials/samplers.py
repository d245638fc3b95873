"""Samplers by name, seeded for each trial by the study's seed and the trial's number.

A new sampler is built for each trial; one that takes up an interrupted trial draws as that one did, and is left out of
the numbers of the others. So the draws of a trial do not depend on which worker runs it, two workers never draw the
same, and a study that was interrupted while it drew goes on as if it had not been.
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

from jpq.trials.attributes import AGAIN
from jpq.trials.settings import Study
from jpq.types import unknown

LIMITS = "limits"  # user attribute: name of a limit -> cost over limit - 1, at most 0 where it holds

STARTUP_TRIALS = 8  # random ones before a model is fitted

POPULATION = 20  # trials of a generation; does not follow --trials, which every worker may choose

HAS_CONSTRAINTS = hasattr(
    optuna.trial.Trial, "set_constraint"
)  # from Optuna 5 on trials hold their constraints themselves

SamplerFactory = Callable[[int], BaseSampler]


def feasibility(trial: FrozenTrial) -> Sequence[float]:
    """Constraints of a trial, for Optuna before 5: at most 0 where a limit holds."""
    return tuple(trial.user_attrs.get(LIMITS, {}).values())


def record_limits(trial: optuna.Trial, limits: Mapping[str, float]) -> None:
    """Tell the sampler how far a trial lies from its limits.

    Args:
        trial: that runs.
        limits: name of a cost -> cost over limit - 1, at most 0 where the limit holds.
    """
    trial.set_user_attr(LIMITS, dict(limits))
    with warnings.catch_warnings():  # a trial that is run again has them already
        warnings.simplefilter("ignore")
        for name, over in limits.items() if HAS_CONSTRAINTS else ():
            trial.set_constraint(f"at most the asked {name}", over)


def build_sampler(study: Study, seed: int) -> SeededSampler:
    """The sampler that a study names. Raises JpqError for an unknown name."""
    rule: dict[str, Any] = {} if HAS_CONSTRAINTS or not study.limits() else {"constraints_func": feasibility}
    table: dict[str, SamplerFactory] = {
        "tpe": lambda seed: TPESampler(
            seed=seed, n_startup_trials=STARTUP_TRIALS, multivariate=True, group=True, constant_liar=True, **rule
        ),
        "nsga2": lambda seed: NSGAIISampler(seed=seed, population_size=POPULATION, **rule),
        "gp": lambda seed: GPSampler(seed=seed, n_startup_trials=STARTUP_TRIALS, **rule),
        "random": lambda seed: RandomSampler(seed=seed),
    }
    if study.sampler not in table:
        raise unknown("sampler", study.sampler, table)
    return SeededSampler(table[study.sampler], seed)


class SeededSampler(BaseSampler):
    """A sampler that is built anew, with a seed of its own, for each trial.

    Args:
        factory: seed -> sampler.
        seed: of the study.
    """

    def __init__(self, factory: SamplerFactory, seed: int) -> None:
        self.factory, self.seed = factory, seed
        self.inner = self._sampler_of(0)

    def _sampler_of(self, number: int) -> BaseSampler:
        """The sampler of the trial with this number."""
        digest = hashlib.sha256(f"{self.seed} {number}".encode()).digest()
        with warnings.catch_warnings():  # Optuna's notes on what it may yet change
            warnings.simplefilter("ignore")
            return self.factory(int.from_bytes(digest[:4], "big"))

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Build the sampler of a new trial."""
        trials, number = study.get_trials(deepcopy=False), trial.number
        while AGAIN in trials[number].user_attrs:
            number = trials[number].user_attrs[AGAIN]
        again = sum(AGAIN in t.user_attrs for t in trials[:number])
        self.inner = self._sampler_of(number - again)
        self.inner.before_trial(study, trial)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Delegate to the sampler of this trial."""
        return self.inner.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Delegate to the sampler of this trial."""
        return self.inner.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Delegate to the sampler of this trial."""
        return self.inner.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """Delegate to the sampler of this trial."""
        self.inner.after_trial(study, trial, state, values)

    def reseed_rng(self) -> None:
        """Do nothing: every trial has a seed of its own."""
