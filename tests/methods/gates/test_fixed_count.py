"""Exactly k, whatever the scores; ties, padding, rounding."""

import math

import pytest
import torch

from jpq.methods.gates.fixed_count import SMALL, kept_count, kept_counts, strongest_rows, topk_rows
from jpq.methods.structures import Window
from jpq.types import JpqError


def slow(scores, k, valid):
    """Sort each row by (score falling, index rising), padding left out."""
    out = torch.zeros_like(scores)
    for r, row in enumerate(scores.tolist()):
        real = [i for i in range(len(row)) if valid is None or valid[r, i]]
        order = sorted(real, key=lambda i: (-(-math.inf if math.isnan(row[i]) else row[i]), i))
        out[r, order[: int(k[r])]] = 1
    return out


def scores_of(kind, rows, n):
    s = torch.randn(rows, n)
    if kind == "tied":
        s = s.mul(1.5).round()
    if kind == "equal":
        s = torch.zeros(rows, n)
    if kind == "wild":
        s[:, ::3] = -math.inf
        s[:, 1::4] = math.inf
        s[:, 2::5] = math.nan
    return s


@pytest.mark.parametrize("kind", ["plain", "tied", "equal", "wild"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("rows", "n"), [(1, 1), (1, 60), (9, 4), (7, SMALL), (7, SMALL + 1), (5, 90), (0, 4), (0, 40)])
def test_the_same_as_sorting_every_row(kind, padded, rows, n):
    for seed in range(4):
        torch.manual_seed(seed)
        s = scores_of(kind, rows, n)
        valid = torch.rand(rows, n) < 0.7 if padded else None
        room = valid.sum(1) if padded else torch.full((rows,), n)
        for k in (0, 1, n // 3, n // 2, n):
            kept = topk_rows(s, k, valid)
            assert torch.equal(kept, slow(s, [k] * rows, valid))
            assert torch.equal(kept.sum(1).long(), room.clamp(max=k))
        each = torch.randint(0, n + 1, (rows,))
        assert torch.equal(topk_rows(s, each, valid), slow(s, each, valid))


def test_ties_go_to_the_lower_index_in_short_and_long_rows():
    for n in (8, 80):
        assert topk_rows(torch.zeros(2, n), 3).nonzero()[:, 1].tolist() == [0, 1, 2, 0, 1, 2]


def test_no_gradient_and_the_dtype_of_the_scores():
    s = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    kept = topk_rows(s, 2)
    assert kept.dtype == torch.float64
    assert not kept.requires_grad


@pytest.mark.parametrize("k", [-1, 6, torch.tensor([1, 6])])
def test_a_count_that_no_row_has_is_refused(k):
    with pytest.raises(JpqError, match="of 5 units"):
        topk_rows(torch.randn(2, 5), k)


def test_windows_keep_their_quota_and_short_ones_what_they_have():
    torch.manual_seed(0)
    for keep, of in ((2, 4), (1, 4), (3, 5)):
        window, size = Window(keep, of), torch.Size((6, 11, 3, 3))
        kept = topk_rows(window.pool(torch.randn(size)).abs(), window.quota(), window.valid(size))
        mask = window.expand(kept, size)
        for start in range(0, 11, of):
            part = mask[:, start : start + of]
            assert bool((part.sum(1) == min(keep, part.shape[1])).all())


def test_densities_round_half_up():
    assert [kept_count(d, 5) for d in (0, 0.09, 0.1, 0.5, 0.89, 0.9, 1)] == [0, 0, 1, 3, 4, 5, 5]
    assert kept_count(0.29, 50) == 15  # 14.5, though 0.29 * 50 is 14.499999999999998 in floating point
    assert kept_counts(0.5, torch.tensor([1, 2, 3, 0])).tolist() == [1, 1, 2, 0]
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(JpqError, match="share"):
            kept_count(bad, 5)


def test_the_strongest_rows_are_those_whose_kept_units_weigh_most():
    kept = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0], [0.0, 1.0, 0.0]])
    weights = torch.tensor([[1.0, 9.0, 9.0], [9.0, 1.0, 1.0], [9.0, 3.0, 9.0]])  # kept: 1, 2 and 3
    assert strongest_rows(kept, weights, 2).tolist() == [[0.0, 0.0, 0.0], [0.0, 1.0, 1.0], [0.0, 1.0, 0.0]]
    assert torch.equal(strongest_rows(kept, weights, 3), kept)
