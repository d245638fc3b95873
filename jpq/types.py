"""Shape aliases, and the one error that users see."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch takes seconds to import, and `jpq --help` needs only the error
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    Labels = npt.NDArray[np.int64]  # [channels]: which class each channel belongs to; NONE where it has none
else:
    Tensor = Labels = Any

Units = Tensor  # [rows, n]: one number per unit of a site; the units of a row compete
Weight = Tensor  # shaped like the layer's weight
Share = Tensor | float  # a part of a whole, in [0, 1]

DENSE = "dense"  # the structure of a layer without a mask
NONE = -1  # a channel that carries no label: a constant, or something no rule could follow


LONGEST = 400  # characters of one word in an error; a file's content may be all one word


class JpqError(Exception):
    """What went wrong, where, and what to do about it: one sentence, exit code 2 on the command line."""

    def __init__(self, text: object = "") -> None:
        words = str(text).split(" ")
        super().__init__(" ".join(w if len(w) <= LONGEST else f"{w[:40]}...{w[-10:]}" for w in words))


def unknown(what: str, name: str, known: Iterable[str]) -> JpqError:
    """The error for a name that is not in a table, with the closest names that are."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"Did you mean {' or '.join(close)}?" if close else f"Choose from {', '.join(known)}."
    return JpqError(f"Unknown {what} '{name}'. {hint}")
