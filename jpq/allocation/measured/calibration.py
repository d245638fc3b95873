"""What sensitivities are measured on: inputs, the distance of two outputs, and where a table is kept.

Calibration samples are mixed in pairs, x = (x_i + x_j) / 2: the float network has been trained on them, and is so sure
of them that rounding activations looks a third cheaper than on images it has not seen; on mixed images the ratio of
activations to weights is that of unseen ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

from jpq.allocation.measured.partial import PartialTable
from jpq.allocation.measured.probe import Divergence
from jpq.allocation.measured.table import SensitivityTable
from jpq.compression.model import CompressedModel
from jpq.tracing.forward import batch_size, collect_tensors, register_dataclasses, take_samples
from jpq.tracing.network import Network
from jpq.types import JpqError

SAMPLES = 512  # of the calibration


@dataclass(frozen=True, eq=False)
class Measurement:
    """The means of measuring sensitivities; nothing is measured before it is asked for.

    Args:
        inputs: gives batches of training inputs, from the start at every call; never held-out ones.
        divergence: the task's distance of two outputs.
        model: checksum of the float weights.
        net: gives the network attached to the float weights; None: the one that is decided about.
        table: a table that is known already; None: it is measured.
        source: where that table is from, for messages.
        save: is given a table that was measured.
        progress: is told how many of the changes are measured.
        main_output: the tensor that divergences are of, out of what the model returns.
        notes: where the entries of a table are noted as soon as they are found; None: nowhere.
        same_samples: whether a table that is known must be of these very samples.
        task: name of the task whose distance `divergence` is; "": of none.
    """

    inputs: Callable[[], Iterable[Any]]
    divergence: Divergence
    model: str = ""
    net: Callable[[], CompressedModel] | None = None
    table: SensitivityTable | None = None
    source: str = ""
    save: Callable[[SensitivityTable, Network], None] = lambda table, network: None
    progress: Callable[[int, int], None] = lambda done, total: None
    main_output: Callable[[Any], Any] = lambda output: output
    notes: PartialTable | None = None
    same_samples: bool = False
    task: str = ""


def calibration_samples(inputs: Iterable[Any], count: int = SAMPLES) -> tuple[list[Any], list[Any]]:
    """(batches mixed in pairs, the same batches as they are) of up to `count` samples.

    Raises JpqError for inputs without a tensor, and where there are none.
    """
    plain: list[Any] = []
    left = count
    for batch in inputs:
        x = batch[0] if isinstance(batch, (tuple, list)) and len(batch) == 1 else batch
        if not collect_tensors(x):
            raise JpqError("Sensitivities are measured on batches of tensors, and this one holds none.")
        plain.append(take_samples(x, 0, left))
        left -= batch_size(plain[-1])
        if left <= 0:
            break
    if not plain:
        raise JpqError("Sensitivities are measured on training batches, and there are none: give evidence=[...].")
    return [mix_pairs(x) for x in plain], plain


def mix_pairs(x: Any) -> Any:
    """Each sample averaged with its neighbour, for a tensor [B, ...] or inputs of several.

    Samples of which a part is no real number (token numbers, with or without a mask) stay as they are.
    """
    if not isinstance(x, Tensor):
        register_dataclasses(x)
        mixable = all(t.is_floating_point() for t in collect_tensors(x))
        samples = batch_size(x)

        def mixed(leaf: Any) -> Any:
            rows = isinstance(leaf, Tensor) and leaf.shape[:1] == (samples,)
            return mix_pairs(leaf) if rows else leaf

        return tree_map(mixed, x) if mixable else x
    return 0.5 * (x + x.roll(1, 0)) if x.is_floating_point() and len(x) > 1 else x
