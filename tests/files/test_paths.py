"""Paths as people give them: home folders, `latest` as link and as text file, names of runs, Windows' drives."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jpq.config import Budget, Config, Decide, Run, Task, from_tree, to_tree
from jpq.files.paths import check_name, expand_home, expand_paths, find_run, is_windows_path, mark_latest
from jpq.files.untrusted import names_code
from jpq.types import JpqError


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder of two runs, `b` begun last."""
    for place, name in enumerate("ab"):
        run = tmp_path / "runs" / name
        run.mkdir(parents=True)
        (run / "config.toml").write_text("", encoding="utf-8")
        os.utime(run / "config.toml", (place, place))
    return tmp_path / "runs"


def test_home_folders(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand_home("~/a b/c") == tmp_path / "a b" / "c"
    assert expand_home(Path("a~/~")) == Path("a~/~")
    with pytest.raises(JpqError, match="home folder that is not known"):
        expand_home("~no-such-user-here/x")


def test_every_path_of_a_config_is_expanded_and_the_hash_follows(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    given, written = (
        Config(
            task=Task(weights=Path(home, "w.pth"), data_root=Path(home, "data"), data=f"folder:{home}/photos"),
            budget=Budget(target_bops="1%", latency_table=Path(home, "t.csv")),
            decide=Decide(mask=Path(home, "mask.json")),
            run=Run(out=Path(home, "runs")),
        )
        for home in ("~", str(tmp_path))
    )
    assert given.check() == written.check()
    assert given.check().hash() == written.check().hash()
    plain = Config(budget=Budget(target_bops="1%"))
    assert expand_paths(plain) is plain


def test_new_settings_change_no_hash_and_no_file_at_their_defaults():
    config = Config(budget=Budget(target_bops="1%"))
    assert config.hash() == "d0095e8a878e"  # of version 0.1
    tree = to_tree(config)
    assert not {"image_size", "mean", "std", "skip_bad"} & tree["task"].keys()
    assert not {"name", "overwrite"} & tree["run"].keys()
    named = Config(budget=Budget(target_bops="1%"), run=Run(name="a", overwrite=True))
    assert named.hash() == config.hash()
    assert named.folder() == Path("runs/a")
    assert to_tree(named)["run"]["name"] == "a"
    assert "overwrite" not in to_tree(named)["run"]  # else a run from its file would remove another one
    sized = Config(
        task=Task(image_size=(8, 9), mean=(0.5,), std=(1.0,), skip_bad=True), budget=Budget(target_bops="1%")
    )
    assert sized.hash() != config.hash()
    assert from_tree(to_tree(sized), "file") == sized


def test_latest_is_a_link_that_every_path_goes_through(runs):
    mark_latest(runs / "a")
    assert (runs / "latest").resolve() == runs / "a"
    mark_latest(runs / "b")
    assert find_run(runs / "latest") == runs / "b"
    assert find_run(f"{runs}/latest/model.onnx") == runs / "b" / "model.onnx"
    assert find_run(runs / "a") == runs / "a"
    assert {p.name for p in runs.iterdir()} == {"a", "b", "latest"}


def test_latest_is_a_text_file_where_there_are_no_links(runs, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "symlink", refuse)
    mark_latest(runs / "b")
    mark_latest(runs / "a")
    assert (runs / "latest").read_text(encoding="utf-8") == "a\n"
    assert find_run(runs / "latest" / "plan.json") == runs / "a" / "plan.json"


def test_without_a_mark_latest_is_the_run_begun_last(runs, tmp_path):
    assert find_run(runs / "latest") == runs / "b"
    assert find_run(tmp_path / "empty" / "latest") == tmp_path / "empty" / "latest"


def test_what_jpq_did_not_make_is_not_replaced(runs):
    (runs / "latest").mkdir()
    mark_latest(runs / "a")
    assert not (runs / "latest").is_symlink()
    assert find_run(runs / "latest") == runs / "latest"
    (runs / "latest").rmdir()
    (runs / "latest").write_text("notes\nof mine: a/b\n", encoding="utf-8")
    mark_latest(runs / "a")
    assert (runs / "latest").read_text(encoding="utf-8").startswith("notes")
    assert find_run(runs / "latest") == runs / "latest"


@pytest.mark.parametrize(
    "name", ["a/b", "a\\b", "..", ".x", "~x", "latest", "con", "LPT1.txt", "a:b", " a", "a.", "x" * 300]
)
def test_names_that_cannot_be_folders_everywhere(name):
    with pytest.raises(JpqError, match="cannot be the name of a folder"):
        check_name(name)
    with pytest.raises(JpqError, match="cannot be the name of a folder"):
        Config(budget=Budget(target_bops="1%"), run=Run(name=name)).check()


def test_names_that_can():
    for name in ("flowers", "a b", "r20_1.5%", "über"):
        check_name(name)


def test_windows_paths_are_no_code():
    assert is_windows_path("C:\\data")
    assert is_windows_path("d:/data")
    assert not is_windows_path("C:make")
    for name in ("folder:C:\\data", "folder:d:/a b", "C:\\data", "digits"):
        assert not names_code(name, "data")
    assert not names_code("torchvision:resnet18")
    assert names_code("mycode:make")
    assert names_code("c:make")


def test_readers_of_data_are_no_code_as_data_and_are_code_as_models():
    from jpq.files.untrusted import KINDS
    from jpq.tasks.data import READERS

    assert set(KINDS["data"]) == set(READERS)
    for kind in READERS:
        assert not names_code(f"{kind}:reviews", "data")
        assert names_code(f"{kind}:make", "model")  # a module of that name would be imported
    assert names_code("timm:resnet18", "data")
    assert names_code("mine:Temperature", "task")
