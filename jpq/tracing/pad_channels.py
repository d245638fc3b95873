"""`PadChannels`: zero channels appended by a module, so that tracing can change their number."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class PadChannels(nn.Module):
    """Append zero channels along dim 1: [B, C, ...] -> [B, before + C + after, ...].

    The counts are attributes, not numbers in somebody's `forward`, so removing channels can change them.
    """

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.before = before
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        """Pad `x` over its channel dimension."""
        return F.pad(x, [0, 0] * (x.dim() - 2) + [self.before, self.after])

    def extra_repr(self) -> str:
        """Numbers of zero channels before and after, for `print(model)`."""
        return f"before={self.before}, after={self.after}"
