"""Shape aliases, the error that users see, and the names that every package needs."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
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


VALUE = r"-?\d(?:[^\s;()]*[^\s;:(),.])?|nan|-?inf(?!\w)"  # behind a flag: an amount
FLAG = re.compile(rf"(?<![\w/-])--(no-)?([a-z][a-z0-9-]*)((?: (?:{VALUE}))*)")
COMMAND = re.compile(r"`(jpq [a-z-]+)( [^`]*)?`")
SWITCHES = frozenset({"run_code", "open_norms", "overwrite", "resume", "skip_bad", "strict"})  # settings of yes or no
PLAIN = re.compile(r"[+-]?\d+(\.\d+)?(e[+-]?\d+)?|nan|-?inf")  # values that Python writes without quotes


class JpqError(Exception):
    """An error that the user can act on: cause, place and remedy in one sentence; exit code 2 on the command line.

    The sentence names settings as flags (`--lr 0.1`) and puts commands between backticks. The command line prints that
    sentence (`command_line`); in Python the same settings are parameters (`lr=0.1`), and `str` gives it so.

    Args:
        text: the sentence.
    """

    def __init__(self, text: object = "") -> None:
        words = str(text).split(" ")
        self.command_line = " ".join(w if len(w) <= LONGEST_WORD else f"{w[:40]}...{w[-10:]}" for w in words)
        self.parameters: Mapping[str, str] = {}  # settings that have another name where the error was raised
        super().__init__(self.command_line)

    def __str__(self) -> str:
        return name_parameters(self.command_line, self.parameters)


def name_parameters(text: str, names: Mapping[str, str] | None = None) -> str:
    """A sentence that names flags, such as `--lr 0.1`, with parameters in their place, such as `lr=0.1`.

    Args:
        text: the sentence; of commands between backticks only the name is kept, since their flags are no parameters.
        names: parameters that are called otherwise, such as {"target_bops": "bops"}.
    """

    def write_parameter(match: re.Match[str]) -> str:
        negated, flag, behind = match.groups()
        name = flag.replace("-", "_")
        name = (names or {}).get(name, name)
        if negated:
            return f"{name}=False"
        values = [v if PLAIN.fullmatch(v) else repr(v) for v in re.findall(VALUE, behind)]
        if not values:
            is_switched_on = name in SWITCHES and match.string[: match.start()].endswith("add ")
            return f"{name}=True" if is_switched_on else name
        return f"{name}={values[0] if len(values) == 1 else '(' + ', '.join(values) + ')'}"

    return FLAG.sub(write_parameter, COMMAND.sub(r"`\1`", text))


def plural(noun: str) -> str:
    """Several of what a noun names."""
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")


def unknown(what: str, name: str, known: Iterable[str]) -> JpqError:
    """The error for a name that a table does not have, with the closest names that it has."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"Did you mean {' or '.join(close)}?" if close else f"Choose from {', '.join(known)}."
    return JpqError(f"Unknown {what} '{name}'. {hint}")
