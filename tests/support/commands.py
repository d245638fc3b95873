"""Commands of jpq in an empty folder, and the error line of those that it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from jpq.cli.main import main

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working directory, on a screen of 100 columns."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")


def refused(args: list[str], capsys: Captured) -> str:
    """The one sentence on stderr of a command that must end with exit code 2."""
    assert main(args) == 2
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    lines = [line for line in err.splitlines() if "Warning" not in line and "warn" not in line]
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    return lines[0]
