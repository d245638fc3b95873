"""The order alone: published examples, guarantees, and how much it saves on random segments."""

import random

import pytest

from jpq.export.unconstrained.channel_order import _lay_out, count_copied, is_contiguous, order_channels


def channels(sets):
    return sorted(set().union(*sets))


@pytest.mark.parametrize(
    ("sets", "best", "before", "after"),
    [  # worked by hand
        ([{0, 1}, {1, 2}, {2, 0, 4}], [1, 0, 2, 4], 3, 2),
        ([{0, 1, 2}, {0, 2}, {1, 2}, {3}], [0, 2, 1, 3], 2, 0),
        ([{1, 2}, {1}], [1, 2], 0, 0),
        ([{0, 1}, {1, 2}, {0, 2}], [0, 1, 2], 2, 2),  # a cycle: no order does better
        ([{0, 2}, {1, 3}], [0, 2, 1, 3], 4, 0),
    ],
)
def test_worked_examples(sets, best, before, after):
    found = order_channels(sets, channels(sets))
    assert (found, count_copied(sets, channels(sets)), count_copied(sets, found)) == (best, before, after)


def segment(seed, readers=None, n=12):
    rng = random.Random(seed)
    count = readers or rng.randint(2, 5)
    return [{c for c in range(n) if rng.random() < 0.5} or {0} for _ in range(count)]


def nested(rng, pool, depth=3):
    """A laminar family: any two sets are nested or disjoint."""
    out = [set(pool)]
    if depth and len(pool) > 1:
        cut = rng.randint(1, len(pool) - 1)
        for part in (pool[:cut], pool[cut:]):
            if rng.random() < 0.8:
                out += nested(rng, part, depth - 1)
    return out


def test_two_readers_never_copy():
    for seed in range(500):
        sets = segment(seed, readers=2)
        assert count_copied(sets, order_channels(sets, range(12))) == 0


def test_nested_and_disjoint_sets_never_copy():
    before = 0
    for seed in range(300):
        rng = random.Random(seed)
        pool = rng.sample(range(20), 16)
        sets = nested(rng, pool)
        rng.shuffle(sets)
        assert count_copied(sets, order_channels(sets, range(20))) == 0
        before += count_copied(sets, list(range(20)))
    assert before > 1000


def test_random_segments_copy_a_third():
    before = after = 0
    for seed in range(3000):
        sets = segment(seed)
        natural = list(range(12))
        found = order_channels(sets, natural)
        assert sorted(found) == natural
        assert count_copied(sets, found) <= count_copied(sets, natural)
        assert count_copied(sets, order_channels(sets, found)) <= count_copied(sets, found)
        before, after = before + count_copied(sets, natural), after + count_copied(sets, found)
    assert 0.28 < after / before < 0.40


def test_the_natural_order_stays_where_it_is_better():
    sets = [{1, 2, 3, 4}, {0, 1, 2}, {0, 1}, {1, 2, 3}]  # found by search: paths alone would copy 5 channels
    assert count_copied(sets, range(5)) == 0
    assert count_copied(sets, _lay_out([frozenset(s) for s in sets])) == 5
    assert order_channels(sets, range(5)) == [0, 1, 2, 3, 4]


def test_channels_that_nobody_keeps_come_last():
    assert order_channels([{1, 3}, {5}], range(6)) == [1, 3, 5, 0, 2, 4]
    assert order_channels([], range(3)) == [0, 1, 2]
    assert order_channels([set(), {2, 0}], range(3)) == [0, 2, 1]


def test_many_readers_stay_cheap():
    rng = random.Random(0)
    sets = [set(rng.sample(range(300), 6)) for _ in range(80)]
    assert count_copied(sets, order_channels(sets, range(300))) < count_copied(sets, range(300))


def test_contiguous():
    assert is_contiguous([4, 2, 3])
    assert is_contiguous([])
    assert not is_contiguous([1, 3])
