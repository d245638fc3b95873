"""Offsets per layer that Optuna chooses: the search baseline, one trial after the other, no gradient.

Units go by their place in their layer plus the layer's offset, and as many go as the goal asks: every trial meets the
budget, and what differs is only where. The sampler is a tree-structured Parzen estimator (J. Bergstra et al., NeurIPS
2011), seeded; the first trial is offset 0 everywhere, which is the uniform allocation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import optuna

REACH = 0.5  # largest offset, in shares of a layer's units (or in bits, times `scale`)


def search(
    names: Sequence[str], accuracy: Callable[[dict[str, float]], float], trials: int, seed: int, reach: float = REACH
) -> dict[str, float]:
    """The offsets, one for each name in [-reach, reach], with the best accuracy of so many trials."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed % 2**32, multivariate=True)
    )
    study.enqueue_trial(dict.fromkeys(names, 0.0))
    study.optimize(
        lambda trial: accuracy({name: trial.suggest_float(name, -reach, reach) for name in names}), n_trials=trials
    )
    return {name: float(study.best_params[name]) for name in names}
