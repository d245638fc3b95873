"""README is the manual: its code blocks run as they stand, its flags exist, and its figures are in the CSVs."""

import dataclasses
import re
from pathlib import Path

import pandas as pd

from jpq.cli.bench import Bench
from jpq.cli.evaluate import Evaluate
from jpq.cli.export import Export
from jpq.cli.pareto import Pareto
from jpq.config import Config
from jpq.data_free.settings import DataFreeSettings
from jpq.trials.settings import Study

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()


def test_python_blocks_run_one_after_the_other(capsys):
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    assert len(blocks) >= 2
    for block in blocks:
        exec(block, names)
    lines = capsys.readouterr().out.strip().splitlines()
    assert float(lines[0].split()[-1]) <= 0.01
    assert float(lines[-1]) <= 1e-9


def test_flags_exist():
    parts = [*vars(Config()).values(), DataFreeSettings, Pareto, Export, Study, Bench, Evaluate]
    fields = [f for part in parts for f in dataclasses.fields(part)]
    known = {f"--{f.name.replace('_', '-')}" for f in fields}
    known |= {f"--no-{f.name.replace('_', '-')}" for f in fields if f.type == "bool"}
    others = {"--config", "--help", "--input-shape", "--all", "--table"}
    foreign = (
        r"`python studies/[^`]*`|torchrun .* -m(?= jpq)|optuna-dashboard .*|sbatch .* \"(?=jpq)|kubectl .* --(?= jpq)"
    )
    of_jpq = re.sub(foreign, "", TEXT)  # which have flags of their own
    used = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", of_jpq)) - others
    assert used <= known, used - known


def test_links_and_commands_name_files_that_are_there():
    for path in re.findall(r"\b((?:studies|tests|jpq)/[\w./]+\.(?:py|csv|png))", TEXT):
        assert (ROOT / path).exists(), path


def test_figures_are_those_of_the_csvs(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "studies"))
    import summary

    assert summary.figures() in TEXT
    assert summary.figures().count("\n| ") > 10


def test_coverage_names_every_network_once(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "studies"))
    import coverage
    import summary

    assert summary.coverage() in TEXT
    table = pd.read_csv(ROOT / "studies" / "results" / "coverage.csv")
    assert table.model.is_unique
    assert set(table.model) <= set(coverage.names())
    assert len(coverage.names()) == 80 + 6 + 12 + 9
    rows = [line for line in summary.coverage().splitlines() if line.startswith("| ")][1:]
    counts = [[int(n) for n in re.findall(r"(\d+) of (\d+)", row.split("|")[2])[0]] for row in rows]
    assert sum(total for _, total in counts) == len(table)
    assert sum(exact for exact, _ in counts) == int((table.difference <= 1e-9).sum())


def test_allocators_are_those_of_the_csv(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "studies"))
    import summary

    from jpq.allocation.allocators import ALLOCATORS

    assert summary.allocation() in TEXT
    table = pd.read_csv(ROOT / "studies" / "results" / "allocation.csv")
    assert set(table.method) == {*ALLOCATORS, "djpq"}
    assert (table.target_used <= 1).all()
    assert {tuple(sorted(runs.method)) for _, runs in table.groupby(["target", "seed"])} == {
        tuple(sorted([*ALLOCATORS, "djpq"]))
    }


def test_scores_are_those_of_the_csv(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "studies"))
    import summary

    from jpq.methods.scores import SCORES

    assert summary.scores() in TEXT
    assert set(summary.SCORES) == set(SCORES)


def test_one_run_is_that_of_the_csv(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "studies"))
    import one_run

    assert one_run.summary() in TEXT
    table = pd.read_csv(ROOT / "studies" / "results" / "one_run.csv")
    kinds = table.groupby(["data", "target", "seed"]).kind.agg(set)
    assert all({"one run", "separate runs"} <= found for found in kinds)  # like beside like


def test_speed_is_that_of_the_csv(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "studies"))
    import speed
    import speed_table

    assert speed_table.speed() in TEXT
    table = pd.read_csv(ROOT / "studies" / "results" / "speed.csv")
    assert set(table.model) == set(speed.SHAPES)
    assert (table.n >= 20).all()
    rounded = table[(table.output_bits == 8) | (table.what == "int8")]
    assert (rounded.float_layers == 0).all()


def test_kernels_are_those_of_the_csv(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "studies"))
    import kernels

    assert kernels.summary() in TEXT
    table = pd.read_csv(ROOT / "studies" / "results" / "kernels.csv")
    assert (table.groupby(["target", "seed"]).size() == len(kernels.VARIANTS)).all()  # like beside like
    assert (table.target_used <= 1).all()
    assert (table.n >= 20).all()


def test_faults_are_those_of_the_csv(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "studies"))
    import summary

    assert summary.SECTIONS["faults"]() in TEXT
    table = pd.read_csv(ROOT / "studies" / "results" / "faults.csv")
    after = table.same_bits_afterwards.dropna().str.extract(r"(\d+) of (\d+)")
    assert (after[0] == after[1]).all(), "every run that was gone on with gave the same bits"
    assert set(table.exit_code) <= {0, 2, -9, 130, 143}


def test_fronts_are_those_of_the_csvs(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "studies"))
    import fronts

    assert fronts.summary() in TEXT
    for path in (ROOT / "studies" / "results").glob("front_*.csv"):
        table = pd.read_csv(path)
        assert table.epochs.nunique() == 1, "all ways have the same number of epochs"
        assert (table.accuracy.notna() == table.front).all(), "only what held-out accuracy chose was measured on test"
