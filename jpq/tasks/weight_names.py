"""Names of tensors in weights files, compared with those of a model's state.

Names are compared without the parts that wrappers insert (`plain_name`), and may stand behind a prefix, such as
`model.` of Lightning (`NamedState.match`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# parts of names that wrappers insert anywhere: DataParallel, torch.compile, FSDP, activation checkpoints
WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})

COUNTER = "num_batches_tracked"  # which weights from before PyTorch 0.4.1 lack, and few forward passes read

NO_WEIGHTS = frozenset({"total_ops", "total_params", "n_averaged", "position_ids", COUNTER})  # last parts of names

AUXILIARY = ("aux_classifier.", "aux1.", "aux2.", "AuxLogits.")  # beginnings of names of what only training uses

AVERAGED = re.compile(r"(^|[._])ema($|[._])")  # in the place, or prefix, of weights averaged over training

OLD_DENSENET = re.compile(r"(\bdenselayer\d+\.(?:norm|conv))\.([12])\b")  # torchvision's published files

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Match:
    """Tensors of a file by the names of a model's state, and how they were found."""

    tensors: Tensors
    left_out: tuple[str, ...] = ()  # names in the file that belong to other modules
    prefix: str = ""  # that was taken off the file's names


@dataclass(frozen=True)
class Misfit:
    """Plain names in which a file and a model differ, behind the prefix that they have most in common."""

    tensors: Tensors
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    shapes: tuple[str, ...]  # names of tensors of another shape


class NamedState:
    """A model's state by plain names, which a file's tensors are matched with."""

    def __init__(self, state: Tensors) -> None:
        self.state = state
        self.own = {plain_name(name): name for name in state}
        self.by_wrapper = len(self.own) == len(state)  # else some names differ in nothing but wrappers
        if not self.by_wrapper:
            self.own = {name: name for name in state}

    def shape(self, plain: str) -> torch.Size:
        """Shape of a tensor of the state."""
        return self.state[self.own[plain]].shape

    def plain(self, tensors: Tensors) -> dict[str, Tensor]:
        """A file's tensors by plain names, where those tell them apart."""
        plain = {plain_name(name): value for name, value in tensors.items()}
        return plain if self.by_wrapper and len(plain) == len(tensors) else dict(tensors)

    def match(self, tensors: Tensors) -> Match | None:
        """The tensors that fit the state; None where some are missing, of another shape, or unexpected.

        Tried in turn: the names as they are; those behind one prefix of the file, or of the model; and, where each
        name of the model ends the name of one tensor alone, those, behind at most two prefixes.
        """
        plain = self.plain(tensors)
        whole = self._behind(plain, "")
        if whole is not None:
            return whole
        behind = [match for match in self.behind_each_prefix(plain) if match is not None]
        averaged = [match for match in behind if AVERAGED.search(match.prefix)]
        chosen = averaged if len(averaged) == 1 else behind
        if chosen:
            return chosen[0] if all(equal(match.tensors, chosen[0].tensors) for match in chosen[1:]) else None
        return self._within_prefix(plain) or self._behind_two(plain)

    def behind_each_prefix(self, plain: Tensors) -> Iterator[Match]:
        """The matches of the tensors behind each prefix of their names, the shortest first."""
        for prefix in _prefixes(plain):
            match = self._behind(plain, prefix)
            if match is not None:
                yield match

    def misfit(self, tensors: Tensors) -> Misfit:
        """What differs, behind the prefix of the file, or with that of the model, that leaves most of its names."""
        plain = self.plain(tensors)
        ends = ((name, end) for name in plain for end in _ends(name) if end in self.own)
        counts = Counter(name[: len(name) - len(end)] for name, end in ends)
        best = max(counts, key=lambda prefix: (counts[prefix], -len(prefix)), default="")
        within = [{prefix + name: value for name, value in plain.items()} for prefix in self._common_prefixes()]
        candidates = [self._inside(plain, best), *(self._inside(named, "") for named in within)]
        inside = max(candidates, key=lambda tensors: len(self.own.keys() & tensors))
        return Misfit(
            inside,
            missing=tuple(name for name in self.own if name not in inside and not _may_be_missing(name)),
            unexpected=tuple(name for name in inside if name not in self.own),
            shapes=tuple(name for name in self.own if name in inside and inside[name].shape != self.shape(name)),
        )

    def _inside(self, plain: Tensors, prefix: str) -> dict[str, Tensor]:
        """The tensors behind a prefix, which is taken off, without those that hold no weights."""
        inside = {name[len(prefix) :]: value for name, value in plain.items() if name.startswith(prefix)}
        return {name: value for name, value in inside.items() if name in self.own or not _is_no_weight(name)}

    def _behind(self, plain: Tensors, prefix: str) -> Match | None:
        inside = self._inside(plain, prefix)
        if not self._fits(inside):
            return None
        left_out = tuple(name for name in plain if not name.startswith(prefix) and not _is_no_weight(name))
        return Match({self.own[name]: value for name, value in inside.items()}, left_out, prefix)

    def _fits(self, tensors: Tensors) -> bool:
        if not tensors or any(name not in self.own or tensors[name].shape != self.shape(name) for name in tensors):
            return False
        return all(name in tensors or _may_be_missing(name) for name in self.own)

    def _within_prefix(self, plain: Tensors) -> Match | None:
        """The match with a prefix of all of the model's names put before the file's."""
        for prefix in self._common_prefixes():
            match = self._behind({prefix + name: value for name, value in plain.items()}, "")
            if match is not None:
                return match
        return None

    def _common_prefixes(self) -> list[str]:
        """Beginnings, each ending with a dot, that all of the model's names have."""
        return [prefix for prefix in _prefixes(self.own) if all(name.startswith(prefix) for name in self.own)]

    def _behind_two(self, plain: Tensors) -> Match | None:
        """The match of parts of the model behind two prefixes, such as `backbone.` and `head.` of mmpretrain."""
        by_end: dict[str, list[str]] = {}
        for name in plain:
            for end in _ends(name):
                by_end.setdefault(end, []).append(name)
        chosen: dict[str, str] = {}
        for name in self.own:
            fitting = [whole for whole in by_end.get(name, []) if plain[whole].shape == self.shape(name)]
            if len(fitting) == 1:
                chosen[name] = fitting[0]
            elif fitting or not _may_be_missing(name):
                return None
        prefixes = {whole[: len(whole) - len(name)] for name, whole in chosen.items()}
        used = set(chosen.values())
        left_out = tuple(name for name in plain if name not in used and not _is_no_weight(name))
        if len(prefixes) > 2 or "" in prefixes or any(name.startswith(tuple(prefixes)) for name in left_out):
            return None
        tensors = {self.own[name]: plain[whole] for name, whole in chosen.items()}
        return Match(tensors, left_out, " and ".join(sorted(prefixes)))


def plain_name(name: str) -> str:
    """A name without the parts that wrappers insert, such as `module.` of DataParallel."""
    parts = name.split(".")
    return OLD_DENSENET.sub(r"\1\2", ".".join([part for part in parts[:-1] if part not in WRAPPERS] + parts[-1:]))


def equal(a: Tensors, b: Tensors) -> bool:
    """Whether two sets of tensors have the same names and values."""
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def _is_no_weight(name: str) -> bool:
    return name.rpartition(".")[2] in NO_WEIGHTS or name.startswith(AUXILIARY)


def _may_be_missing(name: str) -> bool:
    return name.rpartition(".")[2] == COUNTER


def _ends(name: str) -> Iterator[str]:
    """The name, and every end of it that begins behind a dot."""
    parts = name.split(".")
    return (".".join(parts[n:]) for n in range(len(parts)))


def _prefixes(names: Mapping[str, Any]) -> list[str]:
    """Every beginning of the names that ends with a dot, the shortest first."""
    parts = (name.split(".") for name in names)
    found = {".".join(part[:n]) + "." for part in parts for n in range(1, len(part))}
    return sorted(found, key=lambda prefix: (prefix.count("."), prefix))
