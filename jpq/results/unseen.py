"""Whether a model with given weights was trained on the held-out images too: `held_out_warning`.

The rule was fixed before it was tried on trained weights. The metric of up to SAMPLES held-out samples is compared with
that of as many training samples, both as they are, without augmentation. A trained network is better on what it was
trained on; where the 95 % interval of the difference ends below GAP, the held-out samples look like samples that it was
trained on.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from jpq.results.formatting import format_value
from jpq.results.intervals import difference_interval
from jpq.tasks.batches import SplitBatches
from jpq.tasks.data import Data
from jpq.tracing.forward import call_model, eval_mode

SAMPLES = 2000  # of each split, at most
GAP = 0.02  # of the metric, a share: unseen images cost a trained network more than this


def held_out_warning(model: nn.Module, data: Data) -> str | None:
    """A sentence where the held-out samples have probably been trained on; None where not, or where few cannot tell.

    Args:
        model: float, with weights that were given.
        data: whose training and held-out splits are looked at; tasks whose metric is no share of samples are not.
    """
    task = data.task
    if task.metric_unit != "%" or task.metric_bounds != (0.0, 1.0) or not task.is_mean_over_samples:
        return None
    count = min(SAMPLES, data.held_out.size, data.train.size)
    held_out = _values(model, data, data.held_out, count)
    training = _values(model, data, data.train, count)
    if min(len(held_out), len(training)) < 2:
        return None
    means = float(held_out.mean()), float(training.mean())
    worse, better = means if task.higher_is_better else means[::-1]  # as unseen samples would have it
    _, largest = difference_interval(worse, better, min(len(held_out), len(training)))
    if largest >= GAP:
        return None
    shown = [format_value(mean, task.metric_unit) for mean in means]
    return (
        f"Held-out figures are probably optimistic: the float model's {task.metric_name} is {shown[0]} on "
        f"{len(held_out)} held-out samples and {shown[1]} on {len(training)} training samples, so these weights seem "
        "to have been trained on both; the test split says more."
    )


@torch.no_grad()
def _values(model: nn.Module, data: Data, split: SplitBatches, count: int) -> Tensor:
    """The metric of `count` samples of a split, without augmentation, [count]; empty where it is not one per sample."""
    values, samples = [], 0
    with eval_mode(model):
        for x, y in split.fixed_part(count / split.size):
            values.append(data.task.metric(data.task.main_output(call_model(model, x)), y).double().flatten())
            samples += len(y)
    found = torch.cat(values) if values else torch.empty(0)
    return found if len(found) == samples else torch.empty(0)
