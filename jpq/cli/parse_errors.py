"""Sentences about flags that cannot be parsed: unknown ones, missing values, values of another type."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

ALIASES = {"min_metric": "min-accuracy"}  # setting -> the name of its flag, where that differs; both are read

KINDS = {int: "a whole number", float: "a number", str: "a value", Path: "a path"}  # type -> its name in a sentence


def explain_parse_error(flags: type[Any], command: str, args: Sequence[str], without_flag: str = "") -> str:
    """The first mistake in the arguments of a command, in one sentence with the way out.

    Args:
        flags: the dataclass of its flags, which may hold sections that are dataclasses.
        command: its name, for the hint at its help page.
        args: as they were given.
        without_flag: what may stand there without a flag, such as "RUNS ..."; empty: nothing.
    """
    hints = flag_types(flags)
    hint_at_help = f"See jpq {command} --help."
    texts = list(args)
    while texts:
        word, equals, value = texts.pop(0).partition("=")
        if not _is_flag(word):
            if without_flag:
                continue
            return f"'{word}' belongs to no flag. {hint_at_help}"
        name = word.lstrip("-").replace("_", "-")
        hint = hints.get(name)
        if hint is None:
            return f"{_unknown_flag(word, hints)} {hint_at_help}"
        if hint is bool:
            if equals:
                return f"{word} takes no value: give {word} alone, or --no-{name.removeprefix('no-')}. {hint_at_help}"
            continue
        values = [value] if equals else _take_values(texts, hint)
        if problem := _find_misfit(word, values, hint):
            return f"{problem} {hint_at_help}"
    if without_flag:
        return f"Name {without_flag}. {hint_at_help}"
    return f"These flags cannot be read together. {hint_at_help}"


def flag_types(flags: type[Any]) -> dict[str, Any]:
    """Flag without its dashes -> type of its value, sections included; "no-..." for flags that are on or off."""
    hints = get_type_hints(flags)
    found: dict[str, Any] = {}
    for field in dataclasses.fields(flags):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            found |= flag_types(typing.cast("type[Any]", hint))
            continue
        name = field.name.replace("_", "-")
        found[name] = hint
        if field.name in ALIASES:
            found[ALIASES[field.name]] = hint
        if hint is bool:
            found[f"no-{name}"] = hint
    return found


def _is_flag(word: str) -> bool:
    return word.startswith("-") and not word[1:2].isdigit() and word[1:2] != "." and word != "-"


def _unknown_flag(word: str, hints: Mapping[str, Any]) -> str:
    """The sentence about a flag that a command does not have, with the nearest that it has."""
    name = word.lstrip("-").replace("_", "-")
    known = [flag for flag in hints if name.startswith("no-") or not flag.startswith("no-")]
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.6)
    begin = [flag for flag in known if flag.startswith(name)]
    likely = [f"--{flag}" for flag in dict.fromkeys((*begin, *near))][:4]
    return f"Unknown flag {word}." + (f" Did you mean {' or '.join(likely)}?" if likely else "")


def _take_values(texts: list[str], hint: Any) -> list[str]:
    """The words behind a flag that are its values, taken off the list."""
    most = _most_values(hint)
    values: list[str] = []
    while texts and not _is_flag(texts[0]) and len(values) < most:
        values.append(texts.pop(0))
    return values


def _entries(hint: Any) -> tuple[Any, ...]:
    """Types of the entries of a value: of a tuple each, else the type itself, without None."""
    if get_origin(hint) in (typing.Union, types.UnionType):
        return _entries(next(kind for kind in get_args(hint) if kind is not type(None)))
    return get_args(hint) if get_origin(hint) is tuple else (hint,)


def _most_values(hint: Any) -> float:
    entries = _entries(hint)
    return float("inf") if Ellipsis in entries else len(entries)


def _find_misfit(word: str, values: Sequence[str], hint: Any) -> str:
    """A sentence about values that are too few or of another type; empty where they fit."""
    entries = _entries(hint)
    several = Ellipsis in entries
    if not several and len(values) < len(entries):
        kind = KINDS.get(entries[0], "a value")
        wanted = kind if len(entries) == 1 else f"{len(entries)} values, each {kind}"
        return f"{word} needs {wanted}{', not one' if values else ''}."
    kinds = entries[:1] * len(values) if several else entries
    for text, kind in zip(values, kinds, strict=True):
        if not _reads_as(text, kind):
            return f"{word} {' '.join(values)}: '{text}' is not {KINDS[kind]}."
    return ""


def _reads_as(text: str, kind: Any) -> bool:
    if kind not in (int, float):
        return True
    try:
        kind(text)
    except ValueError:
        return False
    return True
