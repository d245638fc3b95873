"""BatchNorm whose statistics stay: in training it normalises by its running statistics, as in evaluation.

Statistics of a batch are of use where the batch is a fair sample. Four crops of photographs are none: normalised by
their own mean and variance, DnCNN loses 8 to 9 dB. Such norms are marked on the float model, and copies keep the mark:
the norms' weights and biases go on learning, and `reestimate_batchnorm` leaves them alone.
"""

from __future__ import annotations

from torch import nn

KEPT = "keeps_statistics"  # attribute of a marked norm


def moving_norms(net: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The BatchNorm modules whose running statistics follow the data."""
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return [m for m in norms if m.track_running_stats and not hasattr(m, KEPT)]


def keep_statistics(net: nn.Module) -> None:
    """Mark all BatchNorm modules that have running statistics: these stay from now on, in copies of `net` too."""
    for norm in moving_norms(net):
        setattr(norm, KEPT, True)


def start_training(net: nn.Module) -> None:
    """Put a network into training mode, and marked norms into evaluation mode."""
    net.train()
    for module in net.modules():
        if hasattr(module, KEPT):
            module.eval()
