"""The grid: any gate on any structure with any kind of width, and the reason where they do not go together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from jpq.config import CHANNELS, MANUAL, MASKED, RULES, SEARCH, STRUCTURE_CHOICES
from jpq.methods.gates import Gate
from jpq.methods.quantizers import WIDTHS, BitWidth, Fixed, Learned
from jpq.methods.schedules import pick_schedule
from jpq.methods.scores import pick_score
from jpq.methods.structures import STRUCTURES, Structure, by_layer, parse
from jpq.methods.table import MANUAL_ROW, MASKED_ROW, METHODS, Method
from jpq.types import DENSE, JpqError, unknown

SHOWN = 6  # alternatives that a refusal lists


def compose(
    method: str, structure: str = "", width: str = "", score: str = "", schedule: str = "", classes: str = ""
) -> Method:
    """A row of METHODS, with another structure, kind of width, score or schedule where they are named.

    Raises JpqError for unknown names, and for what does not go together, with what to choose instead.
    """
    if method == MASKED:
        given = {"--score": score, "--schedule": schedule, "--classes": classes}
        for flag, value in given.items():
            if value:
                raise JpqError(f"{flag} {value}: --mask says which weights are dropped. Leave {flag} out.")
        return replace(MASKED_ROW, width=_learns(width)) if width else MASKED_ROW
    if method == MANUAL:
        pick_score(score or MANUAL_ROW.score, classes)
        return replace(MANUAL_ROW, score=score or MANUAL_ROW.score)
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    if width and width not in WIDTHS:
        raise unknown("width", width, WIDTHS)
    row = METHODS[method]
    made = replace(
        row,
        structure=structure or row.structure,
        width=WIDTHS[width] if width else row.width,
        score=score or row.score,
        schedule=schedule or row.schedule,
    )
    others = [name for name, m in METHODS.items() if m.procedure == "search"]
    if row.gate is None and structure:
        raise JpqError(f"--structure {structure}: method {method} prunes nothing. Choose --method {any_of(others)}.")
    if row.procedure != "search" and made.width is not row.width:
        raise JpqError(
            f"--width {width}: method {method} does not search, so its bits are fixed. "
            f"Choose --method {any_of(others)}."
        )
    _check_ranking(method, row, score, schedule, classes)
    reason = incompatibility(row.gate, made.structure, made.width) if row.gate else None
    if reason:
        raise JpqError(f"--method {method}, --structure {made.structure}, --width {_name(made.width)}: {reason}")
    return made


def _learns(width: str) -> type[BitWidth]:
    """A kind of width that can move towards the budget where nothing else can."""
    learn = [name for name, w in WIDTHS.items() if not issubclass(w, Fixed)]
    if width not in WIDTHS:
        raise unknown("width", width, learn)
    if width not in learn:
        raise JpqError(
            f"--width {width}: the mask is given and so are the bits, so nothing could move towards the budget. "
            f"Choose --width {any_of(learn)}."
        )
    return WIDTHS[width]


def _check_ranking(method: str, row: Method, score: str, schedule: str, classes: str) -> None:
    """Raises JpqError for a score or a schedule of an unknown name, or with a method that does not take one."""
    flags = {"--score": (score, "score"), "--schedule": (schedule, "schedule"), "--classes": (classes, "score")}
    for flag, (given, needs) in flags.items():
        if given and not getattr(row, needs):
            takes = [name for name, m in METHODS.items() if getattr(m, needs)]
            why = "ranks no channels" if not row.score else "closes channels at once, before it trains"
            raise JpqError(f"{flag} {given}: method {method} {why}. Choose --method {any_of(takes)}.")
    pick_score(score or row.score or "l1", classes)
    pick_schedule(schedule or row.schedule or "one-shot")


def incompatibility(gate: type[Gate], structure: str, width: type[BitWidth]) -> str | None:
    """Why these three do not go together and what to choose instead; None where they do.

    Raises JpqError for a structure that cannot be read.
    """
    reason = _clash(gate, structure, width)
    if reason is None:
        return None
    instead = _instead(gate, structure, width)
    if not instead:  # one change is not enough
        rest = _instead(gate, structure, Learned)
        instead = f"--width learned{f' with {rest}' if rest else ''}"
    return f"{reason}. Choose {instead}."


def is_allowed(method: Method) -> Callable[[str], bool]:
    """Whether one layer of this method may have a structure."""
    return lambda structure: method.gate is not None and _clash(method.gate, structure, method.width) is None


def _clash(gate: type[Gate], structure: str, width: type[BitWidth]) -> str | None:
    """The first reason against it: against every scheme to choose from, or against one that is asked for."""
    if structure in (RULES, SEARCH):
        reasons = [_clash_of_one(gate, scheme, width) for scheme in STRUCTURE_CHOICES]
        return reasons[-1] if all(reasons) else None
    given = by_layer(structure)
    asked = [s for s in given.values() if s != DENSE] if given else [structure]
    return next(filter(None, (_clash_of_one(gate, s, width) for s in asked)), None)


def _clash_of_one(gate: type[Gate], structure: str, width: type[BitWidth]) -> str | None:
    """The first reason against one structure."""
    units = None if structure == CHANNELS else _parsed(structure)
    if gate.fixed_count and issubclass(width, Fixed):
        return "how much stays (--density) and the bits are both given, so nothing could move towards the budget"
    if gate.elementwise_only and width.own_grid:
        return f"{_name(width)} widths and a dead zone each bring a grid of their own to train on"
    if gate.elementwise_only and not (units and units.single_weights):
        return "a dead zone drops single weights, and these units are more than one"
    if units is None:
        return None
    if gate.channels_only:
        return "this method decides about whole channels, and this structure is a mask inside each layer"
    if units.quota() is not None and gate.enforces_quota == "never":
        return f"exactly {units.quota()} of each row must stay, and this method does not count the units of a row"
    if not units.partition and gate.enforces_quota != "always":
        return "these units overlap, so one of each row may count at any time, and this method counts at the end only"
    return None


def _parsed(structure: str) -> Structure:
    name = structure.partition(":")[0].strip()
    if name not in STRUCTURES and not name.isdigit():
        raise unknown("structure", name, [CHANNELS, RULES, SEARCH, *STRUCTURES, "2:4"])
    return parse(structure)


def _instead(gate: type[Gate], structure: str, width: type[BitWidth]) -> str:
    """What fits if only one of the three changes; empty where nothing does."""
    examples = [CHANNELS, *(named.example for named in STRUCTURES.values()), RULES]
    rows: dict[type[Gate], str] = {}  # the first method of each gate
    for name, method in METHODS.items():
        if method.gate and method.procedure == "search":
            rows.setdefault(method.gate, name)
    fits = {
        "--method": [name for g, name in rows.items() if not _clash(g, structure, width)],
        "--structure": [s for s in examples if not _clash(gate, s, width)],
        "--width": [name for name, w in WIDTHS.items() if not _clash(gate, structure, w)],
    }
    return ", or ".join(f"{flag} {any_of(names)}" for flag, names in fits.items() if names)


def any_of(names: list[str]) -> str:
    """The first few names as a choice in a sentence: `a, b or c`."""
    shown = names[:SHOWN]
    more = ["..."] if len(names) > SHOWN else []
    return " or ".join([", ".join([*shown, *more][:-1]), [*shown, *more][-1]]) if len(shown) > 1 else shown[0]


def _name(width: type[BitWidth]) -> str:
    return next(name for name, w in WIDTHS.items() if w is width)
