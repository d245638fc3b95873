"""The typed getters of parsed trees: what they take, and that everything else gets one short sentence."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from jpq.files.untrusted import as_bool, as_dict, as_float, as_int, as_list, as_str


@pytest.mark.parametrize(
    ("get", "value", "wanted"),
    [
        (lambda v: as_int(v, 0, 8), 8, 8),
        (lambda v: as_float(v, 0, 1), 1, 1.0),
        (lambda v: as_float(v, 0, 1), 0.25, 0.25),
        (as_float, math.inf, math.inf),
        (as_bool, False, False),
        (as_str, "x" * 1000, "x" * 1000),
        (as_dict, {"a": 1}, {"a": 1}),
        (as_list, [1], [1]),
    ],
)
def test_values_of_the_right_type_come_back(get: Callable[[Any], Any], value: Any, wanted: Any) -> None:
    found = get(value)
    assert found == wanted
    assert type(found) is type(wanted)


@pytest.mark.parametrize(
    ("get", "value", "belongs"),
    [
        (lambda v: as_int(v, 0, 8), 9, "'9' where a whole number from 0 to 8 belongs"),
        (lambda v: as_int(v, 0, 8), True, "'True' where a whole number"),
        (lambda v: as_int(v, 0, 8), 1.0, "'1.0' where a whole number"),
        (lambda v: as_int(v, 0, 8), [[[1]]], "a list where a whole number"),
        (lambda v: as_float(v, 0, 1), 1.5, "'1.5' where a number from 0 to 1 belongs"),
        (as_float, math.nan, "'nan' where a number"),
        (as_float, 10**400, "where a number"),
        (as_float, False, "'False' where a number"),
        (as_float, "0.5", "'0.5' where a number"),
        (as_bool, 1, "'1' where true or false belongs"),
        (as_str, "x" * 1001, f"'{'x' * 40}' where text of at most 1000 characters belongs"),
        (as_dict, [], "a list where a table belongs"),
        (as_list, {"a": []}, "a dict where a list belongs"),
    ],
)
def test_other_values_are_refused_in_a_short_sentence(get: Callable[[Any], Any], value: Any, belongs: str) -> None:
    with pytest.raises(ValueError, match="where") as error:
        get(value)
    assert belongs in str(error.value)
    assert len(str(error.value)) < 120
