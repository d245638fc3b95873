"""What papers claim: the table is whole and was computed, and its script measures."""

from pathlib import Path

import pandas as pd
import pytest

import jpq

ROOT = Path(__file__).parents[1]
PUBLISHED = {"dpf", "pdp", "smart", "dpp", "spp", "gdp", "dais", "dhp", "dsp", "bayesian-bits", "codeq", "admm"}


@pytest.fixture(scope="module")
def claims():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "studies"))
        import claims

        return claims


@pytest.fixture(scope="module")
def table(claims):
    return pd.read_csv(claims.RESULTS / "claims.csv")


def test_every_claim_has_one_line_in_order(claims, table):
    assert list(table.columns) == claims.COLUMNS
    assert list(zip(table.method, table.claim, strict=True)) == [(c.method, c.text) for c in claims.CLAIMS]
    assert set(table.method) == PUBLISHED
    assert not table.isna().any().any()


def test_lines_say_what_was_measured_and_how_to_repeat_it(table):
    assert set(table.holds) <= {"yes", "partly", "no"}
    assert (table.n >= 1).all()
    assert table.measured.str.contains(r"\d").all()
    assert (table.command == "python studies/claims.py --only " + table.method).all()
    assert (table.source == table.method.map(lambda m: jpq.METHODS[m].paper)).all()


def test_rules_state_themselves(claims):
    assert all(getattr(c.measure, "func", c.measure).__doc__ for c in claims.CLAIMS)
    from trial import better, verdict

    assert [better([2, 3], [1, 1]), better([2, 0.5], [1, 1]), better([1, 1], [1, 1])] == ["yes", "partly", "no"]
    assert [verdict(True), verdict(False, True), verdict(False)] == ["yes", "partly", "no"]


@pytest.mark.parametrize("method", ["dhp"])
def test_a_cheap_claim_measures_again_what_the_table_says(method, claims, table):
    (claim,) = [c for c in claims.CLAIMS if c.method == method]
    row, old = claim.row(), table[table.method == method].iloc[0]
    assert list(row) == claims.COLUMNS
    assert (row["holds"], row["n"]) == (old.holds, old.n)


def test_a_short_run_is_watched_at_every_step(claims):
    import trial

    seen = []
    net = trial.started("dais", 0, 6, bops="1%")
    trial.trained(net, 0, 6, lambda: seen.append(net.turn))
    assert seen == ["decisions", "weights"] * 3
    assert 0 <= trial.landed(net, 0, 2) <= 100
