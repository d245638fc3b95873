"""Text files are written and read as UTF-8, whatever the locale: held by the syntax trees of jpq and its studies."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((*ROOT.glob("jpq/**/*.py"), *ROOT.glob("studies/**/*.py")))
NOT_FILES = (
    "os",
    "Image",
    "zipfile",
    "tarfile",
    "untrusted",
    "safetensors",
)  # whose open and read_text take no encoding


def calls_without_encoding(text: str) -> Iterator[int]:
    """The line of every call that opens, reads or writes a text file without an encoding."""
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call) or any(keyword.arg == "encoding" for keyword in node.keywords):
            continue
        function = node.func
        is_method = isinstance(function, ast.Attribute)
        name = function.attr if is_method else getattr(function, "id", "")
        owner = getattr(function.value, "id", "") if is_method else ""
        if owner in NOT_FILES or (is_method and name == "open" and not _is_mode(node)):
            continue
        binary = name == "open" and "b" in _mode(node)
        if (is_method and name in ("read_text", "write_text")) or (name == "open" and not binary):
            yield node.lineno


def _mode(call: ast.Call) -> str:
    arguments = call.args if isinstance(call.func, ast.Attribute) else call.args[1:]
    given = [keyword.value for keyword in call.keywords if keyword.arg == "mode"] or arguments[:1]
    return given[0].value if given and isinstance(given[0], ast.Constant) and isinstance(given[0].value, str) else ""


def _is_mode(call: ast.Call) -> bool:
    """Whether a method `open` is that of a path: called with a mode, a keyword, or from a name such as `path`."""
    named = ast.unparse(call.func.value).lower() if isinstance(call.func, ast.Attribute) else ""
    return bool(_mode(call) or call.keywords or "path" in named or "file" in named)


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("p.read_text()", [1]),
        ("p.write_text('x', newline='')", [1]),
        ("open(p)", [1]),
        ("open(p, 'w')", [1]),
        ("\nwith path.open() as f: pass", [2]),
        ("with x.open(newline='') as f: pass", [1]),
        ("with x.open('w') as f: pass", [1]),
        ("p.read_text(encoding='utf-8'); open(p, encoding='utf-8'); open(p, 'rb'); p.open(mode='wb')", []),
        ("self.layout.open(x); Image.open(file); untrusted.read_text(path)", []),
    ],
)
def test_the_check_finds_what_it_looks_for(text, lines):
    assert list(calls_without_encoding(text)) == lines


def test_no_text_file_is_opened_in_the_encoding_of_the_locale():
    assert len(SOURCES) > 200
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in SOURCES
        for line in calls_without_encoding(path.read_text(encoding="utf-8"))
    ]
    assert not found, "give encoding='utf-8'"
