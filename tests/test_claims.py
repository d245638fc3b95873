"""Claims of papers: the table is whole, its script measures, and every verdict follows from the numbers of its line."""

import re
from pathlib import Path
from statistics import mean

import claims
import pandas as pd
import pytest
from support import trial

import jpq

ROOT = Path(__file__).parents[1]
PUBLISHED = {"dpf", "pdp", "smart", "dpp", "spp", "gdp", "dais", "dhp", "dsp", "bayesian-bits", "codeq", "admm"}
LATER_COLUMNS = ["threads", "commit"]  # empty in rows from before these columns existed


@pytest.fixture(scope="module")
def table():
    return pd.read_csv(claims.PATH)


def test_every_claim_has_one_line_in_order(table):
    assert list(table.columns) == claims.COLUMNS
    assert list(zip(table.method, table.claim, strict=True)) == [(c.method, c.text) for c in claims.CLAIMS]
    assert set(table.method) == PUBLISHED
    assert not table.drop(columns=LATER_COLUMNS).isna().any().any()


def test_lines_say_what_was_measured_and_how_to_repeat_it(table):
    assert set(table.holds) <= {"yes", "partly", "no", claims.channels.NOTHING_DROPPED}
    assert (table.n >= 1).all()
    assert table.measured.str.contains(r"\d").all()
    assert (table.command == "python studies/claims.py --only " + table.method).all()
    assert (table.source == table.method.map(lambda m: jpq.METHODS[m].paper)).all()


def test_rules_state_themselves():
    assert all(getattr(c.measure, "func", c.measure).__doc__ for c in claims.CLAIMS)
    compare, verdict = trial.compare_by_seed, trial.verdict
    assert [compare([2, 3], [1, 1]), compare([2, 0.5], [1, 1]), compare([1, 1], [1, 1])] == ["yes", "partly", "no"]
    assert [verdict(True), verdict(False, True), verdict(False)] == ["yes", "partly", "no"]


def test_a_claim_on_dropping_is_not_tested_where_nothing_was_dropped(monkeypatch):
    runs = {s: claims.channels.GdpRun(0, 160, 100.0, 100.0, 97.0, 97.0) for s in trial.SEEDS}
    monkeypatch.setattr(claims.channels, "gdp", runs.__getitem__)
    measures = (claims.channels.gdp_polarises, claims.channels.gdp_exact_zeros, claims.channels.gdp_drops_for_nothing)
    assert {measure().holds for measure in measures} == {claims.channels.NOTHING_DROPPED}
    runs.update({s: claims.channels.GdpRun(40, 160, 100.0, 100.0, 97.0, 97.0) for s in trial.SEEDS})
    assert {measure().holds for measure in measures} == {"yes"}


def numbers(text):
    """Every number of a text, in order."""
    return [float(x) for x in re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e-?\d+)?", text.replace(",", " "))]


def groups(text, *words):
    """The numbers of a text in front of each of these words."""
    parts = []
    for word in words:
        before, text = text.split(word, 1)
        parts.append(numbers(before))
    return parts


def rule_of_dpf_returns(text):
    returned = numbers(text)[0]
    return trial.verdict(returned >= 1, returned >= 0.1)


def rule_of_better(text, first, second):
    values, baseline = groups(text.split(":", 1)[1], first, second)
    return trial.compare_by_seed(values[-3:], baseline[-3:])


def rule_of_bits(text):
    at_two, _, at_eight = (numbers(part)[:3] for part in text.split(":", 1)[1].split(";"))
    loss = mean(at_eight) - mean(at_two)
    return trial.verdict(loss <= 1, loss <= 3)


def rule_of_admm(text):
    pairs = [numbers(part) for part in text.split(":", 1)[1].split(",")]
    falls = all(end < start for start, end in pairs)
    return trial.verdict(falls and max(end for _, end in pairs) < 0.1, falls)


def rule_of_codeq_ends(text):
    triples = [numbers(part) for part in text.split(":", 1)[1].split(";")]
    return trial.verdict(
        all(min(a, b) > between for a, b, between in triples), all(max(a, b) > between for a, b, between in triples)
    )


def rule_of_dais_accuracy(text):
    annealed, warm = groups(text.split(":", 1)[1], "(without annealing", ")")
    return trial.verdict(max(annealed) <= 0.25, mean(annealed) < mean(warm))


def rule_of_powers(text):
    widths = {int(w) for w in re.findall(r"\d+ x (\d+)", text)}
    return trial.verdict(widths <= {2, 4, 8} and len(widths) > 1, widths <= {2, 4, 8})


def rule_of_gates(text):
    least = min(numbers(text))
    return trial.verdict(least >= 5, least >= 0.5)


def rule_of_spp(text):
    back = numbers(text.split(";")[1])
    return trial.verdict(min(back) >= 1, min(back) > 0)


def rule_of_smart_closes(text):
    start, end = groups(text.split(":", 1)[1], "% after one step", "% at the end")
    return trial.verdict(max(end) <= 1, max(end) < min(start))


def rule_of_boundary(text):
    low, high = numbers(text.split("=")[1])[:2]
    worst = max(abs(low - 1), abs(high - 1))
    return trial.verdict(worst <= 0.1, worst <= 0.25)


def rule_of_gdp(text):
    dropped = [int(n) for n in re.findall(r"(\d+) of \d+", text)]
    assert len(dropped) == 3
    assert not all(dropped)
    return claims.channels.NOTHING_DROPPED


RULES = {
    "pruned weights return": rule_of_dpf_returns,
    "feedback beats a masked gradient, with SGD as in the paper": lambda t: rule_of_better(t, "with", "with"),
    "feedback beats a masked gradient, with Adam as here": lambda t: rule_of_better(t, "with", "with"),
    "weights at the boundary get the largest gradient of the mask": rule_of_boundary,
    "the falling temperature leaves no mask half-open": rule_of_smart_closes,
    "goes together with weights of few bits": rule_of_bits,
    "weights approach the pattern set": rule_of_admm,
    "beats projecting at once": lambda t: trial.compare_by_seed(*groups(t.split(":", 1)[1], "at once", "after")[::-1]),
    "the first and the last layer keep the most": rule_of_codeq_ends,
    "what was likely to be pruned may recover": rule_of_spp,
    "gates polarise": rule_of_gdp,
    "gates end as exact zeros or near 1": rule_of_gdp,
    "dropping costs nothing at the end": rule_of_gdp,
    "hard indicators cost no accuracy": rule_of_dais_accuracy,
    "learned groups beat pruning input channels for all filters alike": lambda t: rule_of_better(t, "with 4", "with 1"),
    "doubling gates land on powers of two": rule_of_powers,
    "training feels gates both shut and open": rule_of_gates,
}


@pytest.mark.parametrize("claim", RULES)
def test_the_verdict_follows_from_the_numbers_of_its_line(claim, table):
    (row,) = table[table.claim == claim].itertuples()
    assert RULES[claim](row.measured) == row.holds, row.measured


@pytest.mark.parametrize(
    "text", [c.text for c in claims.CLAIMS if c.method in ("dhp", "pdp") and "bound" not in c.text]
)
def test_a_cheap_claim_measures_again_what_the_table_says(text, table):
    (claim,) = [c for c in claims.CLAIMS if c.text == text]
    row, recorded = claim.row(), table[table.claim == text].iloc[0]
    assert list(row) == claims.COLUMNS
    assert (row["holds"], row["n"]) == (recorded.holds, recorded.n)


def test_a_short_run_is_watched_at_every_step():
    turns = []
    session = trial.start_compression("dais", 0, 6, bops="1%")
    trial.train(session, 0, 6, lambda: turns.append(session.turn))
    assert turns == ["decisions", "weights"] * 3
    assert 0 <= trial.accuracy_after_tuning(session, 0, 2) <= 100
