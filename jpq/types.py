"""Shape aliases, the error that users see, and the names that every package needs."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch takes seconds to import, and `jpq --help` needs only the error
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    Labels = npt.NDArray[np.int64]  # [channels]: class of each channel; NONE where it has none
else:
    Tensor = Labels = Any

Units = Tensor  # [rows, n]: one number per unit of a site; the units of a row compete
Weight = Tensor  # shaped like the layer's weight

DENSE = "dense"  # the structure of a layer without a mask
NONE = -1  # label of a channel without a class: a constant, or an op without a rule

LONGEST_WORD = 400  # largest number of characters of one word in an error message


class JpqError(Exception):
    """An error that the user can act on: cause, place and remedy in one sentence; exit code 2 on the command line."""

    def __init__(self, text: object = "") -> None:
        words = str(text).split(" ")
        super().__init__(" ".join(w if len(w) <= LONGEST_WORD else f"{w[:40]}...{w[-10:]}" for w in words))


def unknown(what: str, name: str, known: Iterable[str]) -> JpqError:
    """The error for a name that a table does not have, with the closest names that it has."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"Did you mean {' or '.join(close)}?" if close else f"Choose from {', '.join(known)}."
    return JpqError(f"Unknown {what} '{name}'. {hint}")
