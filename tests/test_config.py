"""Settings: what is refused, what comes back from TOML, and what a run's folder is named after."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jpq.config import Budget, Config, Decide, Run, Task, Train, read_toml, write_toml
from jpq.types import JpqError

ONE = Config(budget=Budget(target_bops="1%"))


def test_config_survives_toml(tmp_path: Path) -> None:
    config = Config(
        Task(model="lenet5", weights=Path("w.pth"), limit=100),
        Budget(target_bops="1%", target_size="50KB"),
        Decide(w_bits=(3, 5), skip=("conv1", "fc"), structure="2:4", width="power-of-two"),
        Train(lr=0.5, augment=False),
        Run(seed=7, out=Path("x/y"), resume=True),
    )
    write_toml(config, tmp_path / "config.toml")
    assert read_toml(tmp_path / "config.toml") == config


def test_a_whole_number_is_a_fine_float(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("[train]\ndistill = 2\n")
    found = read_toml(tmp_path / "c.toml").train.distill
    assert (found, type(found)) == (2.0, float)


def test_hash_is_stable() -> None:
    assert ONE.hash() == Config(budget=Budget(target_bops="1%")).hash()
    assert len(ONE.hash()) == 12
    assert set(ONE.hash()) <= set("0123456789abcdef")


@pytest.mark.parametrize(
    "config",
    [
        Config(train=Train(distill=0, weight_decay=0)),
        Config(task=Task(mean=(0,), std=(1,))),
        Config(task=Task(image_size=[])),  # type: ignore[arg-type]
        Config(run=Run(seed=np.int64(3))),  # type: ignore[arg-type]
    ],
    ids=["whole", "whole-of-many", "list", "numpy"],
)
def test_the_hash_of_settings_is_that_of_their_file(config: Config, tmp_path: Path) -> None:
    write_toml(config, tmp_path / "config.toml")
    assert read_toml(tmp_path / "config.toml").hash() == config.hash()


@pytest.mark.parametrize(
    "run", [Run(out=Path("elsewhere")), Run(device="cuda"), Run(threads=1), Run(resume=True)], ids=lambda r: str(r)
)
def test_hash_ignores_where_and_how_a_run_works(run: Run) -> None:
    assert replace(ONE, run=run).hash() == ONE.hash()
    assert replace(ONE, task=Task(data_root=Path("elsewhere"))).hash() == ONE.hash()


@pytest.mark.parametrize(
    "part",
    [
        {"train": Train(lr=1e-3)},
        {"train": Train(epochs=41)},
        {"run": Run(seed=1)},
        {"budget": Budget(target_bops="2%")},
        {"decide": Decide(method="l0")},
        {"decide": Decide(width="gated")},
        {"decide": Decide(structure="2:4")},
        {"decide": Decide(skip=("a",))},
        {"task": Task(weights=Path("w.pth"))},
    ],
    ids=str,
)
def test_hash_feels_everything_that_changes_the_result(part: dict[str, Any]) -> None:
    assert replace(ONE, **part).hash() != ONE.hash()


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"budget": Budget()}, "No target"),
        ({"budget": Budget(target_bops="1%", cost="bop")}, "cost .bop.*bops"),
        ({"budget": Budget(target_bops="1%", minimize="size")}, "minimize size is for max_drop and min_metric"),
        ({"budget": Budget(target_bops="1%", most_runs=3)}, "most_runs=3 is for max_drop and min_metric"),
        ({"run": Run(seed=10**18)}, "seed=10{18}: give a whole number of at most 18 digits"),
        ({"decide": Decide(w_bits=(5, 3))}, r"w_bits=\(5, 3\)"),
        ({"decide": Decide(a_bits=(1, 8))}, r"a_bits=\(1, 8\)"),
        ({"decide": Decide(image_bits=40)}, "image_bits=40"),
        ({"train": Train(search=1.0)}, "search=1.0"),
        ({"train": Train(lr=float("nan"))}, "lr=nan"),
        ({"train": Train(distill=-1.0)}, "distill=-1.0"),
        ({"train": Train(epochs=1)}, "epochs=1"),
        ({"train": Train(float_epochs=0)}, "needs weights"),
        ({"task": Task(held_out=0.0)}, "held_out=0.0"),
        ({"task": Task(limit=3)}, "limit=3"),
    ],
    ids=str,
)
def test_senseless_values_are_refused_by_their_name(part: dict[str, Any], words: str) -> None:
    with pytest.raises(JpqError, match=words):
        replace(ONE, **part).check()


def test_sensible_values_pass() -> None:
    assert ONE.check() is ONE
    replace(ONE, run=Run(seed=1 - 10**18)).check()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[train]\nlearning_rate = 1\n", "Unknown setting in .train. .*'learning_rate'"),
        ("[train]\nepoch = 1\n", "Did you mean epochs"),
        ("[trian]\n", "Did you mean train"),
        ("train = 3\n", "must be a table"),
        ("[train]\nlr = 'fast'\n", "train.lr is 'fast'; expected float"),
        ("[train]\nepochs = true\n", "train.epochs is True; expected int"),
        ("[decide]\nw_bits = [2, 3, 4]\n", "decide.w_bits"),
        ("[train\n", "not valid TOML"),
    ],
)
def test_bad_toml_says_what_and_where(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(JpqError, match=words):
        read_toml(tmp_path / "c.toml")


def test_a_config_that_is_not_there() -> None:
    with pytest.raises(JpqError, match=r"Cannot read the config file nowhere\.toml"):
        read_toml(Path("nowhere.toml"))
