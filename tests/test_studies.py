"""Tables of studies/README.md are those of the CSV files; each CSV compares like with like."""

import ast
import re
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parents[1]
STUDIES = ROOT / "studies"
RESULTS = STUDIES / "results"


@pytest.fixture(scope="module")
def tables():
    from support import tables

    return tables


def test_every_table_is_that_of_its_csv(tables):
    text = tables.README.read_text()
    assert re.findall(r"<!-- (?!end of)(.*?) -->", text) != []
    assert set(re.findall(r"<!-- (?!end of)(.*?) -->", text)) == set(tables.SECTIONS)
    for name in tables.SECTIONS:
        section = tables.section(name)
        assert section in text, f"python studies/support/tables.py '{name}'"
        assert section.count("\n| ") > 2
    assert tables.figures().count("\n| ") > 10


def test_scripts_and_results_that_documents_name_are_there(tables):
    for path in re.findall(r"\b((?:studies|tests|jpq)/[\w./]+\.(?:py|csv|png))", tables.README.read_text()):
        if path not in FORMER_SCRIPTS:
            assert (ROOT / path).exists(), path


FORMER_SCRIPTS = {  # named in commands of old rows; README says which script it is today
    "studies/digits.py",
    "studies/fashion_mnist.py",
    "studies/resnet20_cifar10.py",
    "studies/front_digits.py",
    "studies/front_fashion_mnist.py",
    "studies/search_digits.py",
}


def test_commands_of_rows_name_a_script_of_today_or_a_former_one(tables):
    text = tables.README.read_text()
    for path in RESULTS.glob("*.csv"):
        table = pd.read_csv(path)
        for command in set(table.command.dropna()) if "command" in table else ():
            (script,) = re.findall(r"^python (studies/\w+\.py)", command)
            assert (ROOT / script).exists() or (script in FORMER_SCRIPTS and script in text), command


def test_every_row_that_a_study_writes_has_its_provenance():
    from support.result_rows import provenance

    row = provenance("python studies/digits.py", 3, ("torch", "onnxruntime"))
    assert list(row) == ["n", "threads", "hardware", "torch", "onnxruntime", "commit", "command"]
    assert row["n"] == 3
    assert re.fullmatch(r"unknown|[0-9a-f]{12}(\+changes)?", row["commit"])
    writers = [p for p in STUDIES.glob("*.py") if "append_row(" in p.read_text() or ".to_csv(" in p.read_text()]
    assert len(writers) > 10
    for path in writers:
        names = {n.id for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Name)}
        assert "provenance" in names, path


@pytest.mark.parametrize(
    ("task", "score", "shown"),
    [
        ("restoration", 29.527, "held-out PSNR 29.53 dB BOPs"),
        ("regression", 0.4321, "held-out R² 0.4321 BOPs"),
        ("segmentation", 0.4321, "held-out mIoU 43.21 % BOPs"),
        (None, 0.9911, "held-out accuracy 99.11 % BOPs"),
    ],
)
def test_epochs_are_printed_in_the_unit_of_the_task(task, score, shown, capsys):
    from support.grid import EpochPrinter

    from jpq.tasks import TASKS
    from jpq.training import EpochRecord

    printer = EpochPrinter()
    if task:
        printer.begin(TASKS[task])
    printer.epoch(EpochRecord("search", 1, 4, 0.5, score, 1e6, 0.02, 0.02, 1.0, 4.0, 4.0, 0.9, 1e-3, 3.0))
    assert shown in capsys.readouterr().out


def test_a_new_column_leaves_old_rows_empty(tmp_path):
    from support.result_rows import append_row

    path = tmp_path / "rows.csv"
    append_row(path, {"a": 1})
    append_row(path, {"a": 2, "commit": "x"})
    append_row(path, {"a": 3, "commit": "y"})
    assert path.read_text().splitlines() == ["a,commit", "1,", "2,x", "3,y"]


def test_coverage_names_every_network_once(tables):
    import coverage

    table = pd.read_csv(RESULTS / "coverage.csv")
    assert table.model.is_unique
    assert set(table.model) <= set(coverage.names())
    assert len(coverage.names()) == 80 + 6 + 12 + 9
    rows = [line for line in coverage.coverage_table().splitlines() if line.startswith("| ")][1:]
    counts = [[int(n) for n in re.findall(r"(\d+) of (\d+)", row.split("|")[2])[0]] for row in rows]
    assert sum(total for _, total in counts) == len(table)
    assert sum(exact for exact, _ in counts) == int((table.difference <= 1e-9).sum())


def test_foreign_models_are_counted_whole_and_rebuilt_exactly(tables):
    from support.foreign_models import foreign_models

    table = pd.read_csv(RESULTS / "coverage_third_party.csv")
    assert table.model.is_unique
    assert set(table.model) == set(foreign_models())
    assert len(table) == 129
    read = table[table.traced.astype(str) == "True"]
    assert set(table.model) - set(read.model) == {"other:torchvision ssdlite320 (whole detector)"}
    assert (read.counted_share == 1).all()
    assert (read.difference.dropna() <= 1e-9).all()
    assert set(read.exact[read.difference.isna()]) <= {"no site"}
    assert table.why_not.dropna().str.contains(": JpqError: ").all()  # a sentence, no foreign error, no end in time


def test_allocators_are_all_compared_and_meet_their_targets():
    from jpq.allocation import ALLOCATORS

    table = pd.read_csv(RESULTS / "allocation.csv")
    assert set(table.method) == {*ALLOCATORS, "djpq"}
    assert (table.target_used <= 1).all()
    assert {tuple(sorted(runs.method)) for _, runs in table.groupby(["target", "seed"])} == {
        tuple(sorted([*ALLOCATORS, "djpq"]))
    }


def test_every_score_has_its_line():
    import scores

    from jpq.methods.scores import SCORES

    assert set(scores.TEXTS) == set(SCORES)


def test_one_run_has_separate_runs_beside_it():
    table = pd.read_csv(RESULTS / "one_run.csv")
    kinds = table.groupby(["data", "target", "seed"]).kind.agg(set)
    assert all({"one run", "separate runs"} <= of_cell for of_cell in kinds)  # like beside like


def test_speed_has_every_model_and_rounded_models_run_in_integers():
    import speed

    table = pd.read_csv(RESULTS / "speed.csv")
    assert set(table.model) == set(speed.SHAPES)
    assert (table.n >= 20).all()
    rounded = table[(table.output_bits == 8) | (table.what == "int8")]
    assert (rounded.float_layers == 0).all()


def test_kernels_compare_like_with_like():
    import kernels

    table = pd.read_csv(RESULTS / "kernels.csv")
    assert (table.groupby(["target", "seed"]).size() == len(kernels.VARIANTS)).all()
    assert (table.target_used <= 1).all()
    assert (table.n >= 20).all()


def test_faults_end_in_known_codes_and_resume_gives_the_same_bits():
    table = pd.read_csv(RESULTS / "faults.csv")
    after = table.same_bits_afterwards.dropna().str.extract(r"(\d+) of (\d+)")
    assert (after[0] == after[1]).all(), "every run that was gone on with gave the same bits"
    assert set(table.exit_code) <= {0, 2, -9, 130, 143}


def test_fronts_have_equal_epochs_and_read_the_test_split_once():
    for path in RESULTS.glob("front_*.csv"):
        table = pd.read_csv(path)
        assert table.epochs.nunique() == 1, "all ways have the same number of epochs"
        assert (table.accuracy.notna() == table.front).all(), "only what held-out accuracy chose was measured on test"


def test_tasks_meet_their_budgets_and_their_files_have_the_models_metric():
    import tasks

    table = pd.read_csv(RESULTS / "tasks.csv")
    assert set(table.case) <= set(tasks.CASES)
    assert set(table.method) <= set(tasks.METHODS)
    assert not table.duplicated(tasks.KEY).any()
    assert (table.used <= 1).all()
    for runtime in tasks.RUNTIMES:
        far = (table[f"metric_{runtime}"] - table.metric).abs() > 0.005 * table.metric.abs()
        rows = set(table[far][tasks.KEY].itertuples(index=False, name=None))
        told = {("detection", method, "3%", 1) for method in ("uniform", "djpq")}  # in studies/README.md
        assert rows == (told if runtime == "openvino" else set())


def test_estimators_are_compared_on_the_same_plans():
    table = pd.read_csv(RESULTS / "estimators.csv")
    predictions = pd.read_csv(RESULTS / "estimators_predictions.csv")
    plans = pd.read_csv(RESULTS / "estimators_plans.csv")
    for key, rows in table.groupby(["model", "budget"]):
        assert len(rows) == rows.estimator.nunique() == 18
        assert (rows.n >= 20).all()
        assert (rows.spearman.between(rows.low, rows.high)).all()
        ours = predictions[(predictions.model == key[0]) & (predictions.budget == key[1])]
        assert {tuple(sorted(part.plan)) for _, part in ours.groupby("estimator")} == {tuple(sorted(set(plans.plan)))}
    costs = plans.groupby(["model", "budget"]).bops_share.agg(["min", "max"])
    assert (costs["min"] / costs["max"] > 0.98).all()  # plans of equal cost


def test_other_tools_are_counted_as_jpq_counts_and_keep_to_their_targets():
    import torch
    from support.tools.job import Small, count_macs

    import jpq
    from jpq.tasks import build_model

    net, x = build_model("resnet8", 10, 3).eval(), torch.rand(1, 3, 32, 32)
    macs = count_macs(net, x)
    assert sum(macs.values()) == jpq.measure(net, x)["macs"] == 12_239_488
    assert macs["conv1"] == 32 * 32 * 3 * 3 * 3 * 16
    assert macs["linear"] == 640
    plain = Small(net, {}).bops(x)
    assert plain == 12_239_488 * 32 * 32
    assert plain - Small(net, {"conv1": (4, 8)}).bops(x) == macs["conv1"] * (32 * 32 - 4 * 8)
    rows = pd.read_csv(RESULTS / "other_tools.csv")
    assert (rows.bops_share <= rows.target.str.rstrip("%").astype(float) / 100).all()
    assert not rows.duplicated(["tool", "target", "seed", "epochs"]).any()
    assert (rows.epochs_trained == rows.epochs).all()
    assert rows.float_accuracy.nunique() == 1  # all begin from the same weights
