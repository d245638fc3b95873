"""Rules for which gate, structure and width go together, with the reason where they do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from jpq.config import CHANNELS, MANUAL, MASKED, RULES, SEARCH, STRUCTURE_CHOICES
from jpq.methods.gates import Gate
from jpq.methods.quantizers import WIDTHS, BitWidth, Learned
from jpq.methods.schedules import pick_schedule
from jpq.methods.scores import pick_score
from jpq.methods.structures import STRUCTURES, Structure, parse_layers, parse_structure
from jpq.methods.table import MANUAL_ROW, MASKED_ROW, METHODS, Method
from jpq.types import DENSE, JpqError, unknown

MEASURED_WIDTHS = ("fixed", "power-of-two")  # --width of methods that measure: any whole bits, or 2, 4 and 8

SHOWN = 6  # largest number of alternatives that an error message lists


def compose_method(
    method: str, structure: str = "", width: str = "", score: str = "", schedule: str = "", classes: str = ""
) -> Method:
    """Row of METHODS with another structure, kind of width, score or schedule where they are named.

    Raises JpqError for unknown names, and for what does not go together, with what to choose instead.
    """
    if method == MASKED:
        flags = {"--score": score, "--schedule": schedule, "--classes": classes}
        for flag, value in flags.items():
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
    method_row = replace(
        row,
        structure=structure or row.structure,
        width=WIDTHS[width] if width else row.width,
        score=score or row.score,
        schedule=schedule or row.schedule,
    )
    searching = [name for name, m in METHODS.items() if m.procedure == "search"]
    if row.gate is None and structure:
        raise JpqError(f"--structure {structure}: method {method} prunes nothing. Choose --method {any_of(searching)}.")
    _check_width(method, row, method_row)
    _check_ranking(method, row, score, schedule, classes)
    reason = incompatibility(row.gate, method_row.structure, method_row.width) if row.gate else None
    if reason:
        raise JpqError(
            f"--method {method}, --structure {method_row.structure}, --width {_name(method_row.width)}: {reason}"
        )
    return method_row


def _check_width(method: str, row: Method, method_row: Method) -> None:
    """Raise JpqError where a method without a search is given another kind of width than it can decide about."""
    if row.procedure == "search" or method_row.width is row.width:
        return
    width = _name(method_row.width)
    if row.procedure != "measured":
        searching = [name for name, m in METHODS.items() if m.procedure == "search"]
        raise JpqError(
            f"--width {width}: method {method} does not search, so its bits are fixed. "
            f"Choose --method {any_of(searching)}."
        )
    if width not in MEASURED_WIDTHS:
        raise JpqError(
            f"--width {width}: method {method} chooses whole bits before it trains. Choose --width "
            f"{any_of(list(MEASURED_WIDTHS))}."
        )


def _learns(width: str) -> type[BitWidth]:
    """Check that the kind of width of that name learns, so that it can move towards the budget."""
    learned_widths = [name for name, w in WIDTHS.items() if w.learns]
    if width not in WIDTHS:
        raise unknown("width", width, learned_widths)
    if width not in learned_widths:
        raise JpqError(
            f"--width {width}: the mask is given and so are the bits, so nothing could move towards the budget. "
            f"Choose --width {any_of(learned_widths)}."
        )
    return WIDTHS[width]


def _check_ranking(method: str, row: Method, score: str, schedule: str, classes: str) -> None:
    """Check the score and the schedule; JpqError for unknown names or a method that does not take them."""
    flags = {"--score": (score, "score"), "--schedule": (schedule, "schedule"), "--classes": (classes, "score")}
    for flag, (value, needs) in flags.items():
        if value and not getattr(row, needs):
            takes = [name for name, m in METHODS.items() if getattr(m, needs)]
            why = "ranks no channels" if not row.score else "closes channels at once, before it trains"
            raise JpqError(f"{flag} {value}: method {method} {why}. Choose --method {any_of(takes)}.")
    pick_score(score or row.score or "l1", classes)
    pick_schedule(schedule or row.schedule or "one-shot")


def incompatibility(gate: type[Gate], structure: str, width: type[BitWidth]) -> str | None:
    """Reason why gate, structure and width do not go together, with alternatives; None where they do.

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
    """Predicate: whether one layer of this method may have a structure."""
    return lambda structure: method.gate is not None and _clash(method.gate, structure, method.width) is None


def _clash(gate: type[Gate], structure: str, width: type[BitWidth]) -> str | None:
    """First reason against the combination: against every scheme to choose from, or against a named one."""
    if structure in (RULES, SEARCH):
        reasons = [_clash_of_one(gate, scheme, width) for scheme in STRUCTURE_CHOICES]
        return reasons[-1] if all(reasons) else None
    layers = parse_layers(structure)
    structures = [s for s in layers.values() if s != DENSE] if layers else [structure]
    return next(filter(None, (_clash_of_one(gate, s, width) for s in structures)), None)


def _clash_of_one(gate: type[Gate], structure: str, width: type[BitWidth]) -> str | None:
    """First reason against one structure, without alternatives; None where there is none."""
    units = None if structure == CHANNELS else _parsed(structure)
    if gate.fixed_count and not width.learns:
        return "how much stays (--density) and the bits are both given, so nothing could move towards the budget"
    if gate.elementwise_only and width.own_grid:
        return f"{_name(width)} widths and a dead zone each bring a grid of their own to train on"
    if gate.elementwise_only and not (units and units.unit_is_weight):
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
    return parse_structure(structure)


def _instead(gate: type[Gate], structure: str, width: type[BitWidth]) -> str:
    """Alternatives where only one of the three changes, as flags; empty where nothing fits."""
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
    """Choice of the first few names in a sentence: `a, b or c`."""
    listed = names[:SHOWN]
    more = ["..."] if len(names) > SHOWN else []
    return " or ".join([", ".join([*listed, *more][:-1]), [*listed, *more][-1]]) if len(listed) > 1 else listed[0]


def _name(width: type[BitWidth]) -> str:
    return next(name for name, w in WIDTHS.items() if w is width)
