"""Turns in sequences and bands of random draws: by hand, and their errors in simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from convergent import stats
from convergent.core.ids import seed
from convergent.stats.turns import ALPHA


def rng_of(name: str) -> np.random.Generator:
    return np.random.default_rng(seed("tests", "turns", name))


def test_turn_by_hand() -> None:
    # k = 2: sqrt(2 * 2 / 4) * (1 - 0) = 1; k = 1 and 3: sqrt(3 / 4) * 2 / 3. Of the 6 arrangements of two zeros and two ones, 0011 alone has T = 1.
    turn = stats.find_turn([0, 0, 1, 1])
    assert turn is not None and (turn.at, turn.rise) == (2, 1.0) and turn.p == pytest.approx(1 / 6) and turn.false_alarms == 0 and not turn.seen
    # The six arrangements' T: 0011 1; 0101, 0110 and 1001 their largest rises by hand; 1010 and 1100 as well.
    edge = math.sqrt(3 / 4)
    by_hand = [1, edge * 2 / 3, edge * 2 / 3, edge * 2 / 3, 0, -edge * 2 / 3]
    assert turn.expected == pytest.approx(np.mean(by_hand))


def test_a_fall_is_no_turn_and_where_the_rise_is() -> None:
    falls, rises = stats.find_turn([9, 8, 7, 2, 1]), stats.find_turn([1, 2, 7, 8, 9])
    assert falls is not None and falls.rise < 0 and falls.p > 0.9 and not falls.seen
    assert rises is not None and rises.at == 2 and rises.p == pytest.approx(1 / math.comb(5, 2)) and rises.seen
    late = stats.find_turn([10, 12, 11, 9, 10, 11, 12, 60, 62], "late")
    assert late is not None and late.at == 7 and late.seen


def test_what_is_no_sequence() -> None:
    assert stats.find_turn([5]) is None and stats.find_turn([]) is None and stats.find_turn([1, float("nan"), 3]) is None
    flat = stats.find_turn([3, 3, 3, 3, 3, 3, 3])
    assert flat is not None and flat.p == 1 and not flat.seen and flat.rise == pytest.approx(flat.expected)


def test_the_shortest_sequence_that_can_be_seen() -> None:
    n = stats.shortest_seen()
    assert stats.find_turn([0] * (n // 2) + [1] * (n - n // 2)).seen  # type: ignore[union-attr]
    assert not stats.find_turn([0] * ((n - 1) // 2) + [1] * (n - 1 - (n - 1) // 2)).seen  # type: ignore[union-attr]


def test_false_alarms_are_as_said_and_the_excess_covers_zero() -> None:
    """Scores of 8 questions with their own level and spread, in random order: nothing turns."""
    rng = rng_of("null")
    missed, seen, promised = 0, [], []
    for _ in range(60):
        level, spread = rng.normal(60, 15, 8), rng.uniform(2, 25, 8)
        made = [(q, stats.find_turn(rng.normal(level[q], spread[q], int(rng.integers(3, 8))), f"{i}")) for q in range(8) for i in range(3)]
        turns = [(q, t) for q, t in made if t is not None]
        excess = stats.clustered_mean([t.rise - t.expected for _, t in turns], [q for q, _ in turns])
        missed += not excess.low <= 0 <= excess.high
        seen += [t.seen for _, t in turns]
        promised += [t.false_alarms for _, t in turns]
    assert missed <= 8, "95 % intervals around 0 in 60 draws: 3 are expected to miss"
    assert np.mean(promised) <= ALPHA and abs(np.mean(seen) - np.mean(promised)) < 0.03


def test_a_planted_turn_is_found() -> None:
    rng = rng_of("planted")
    turns = [stats.find_turn(np.r_[rng.normal(30, 8, 3), rng.normal(80, 8, 4)], str(i)) for i in range(40)]
    assert np.mean([t.seen for t in turns if t]) > 0.9 and np.mean([t.at == 3 for t in turns if t]) > 0.9


def test_null_band_holds_its_level() -> None:
    """One more draw lies outside of the band of 199 in 5 % of cases; a plain quantile of the draws would be left more often."""
    x = rng_of("band").normal(size=(4000, 200))
    low, mean, high = stats.null_band(x[:, :199].T)
    outside = (x[:, 199] < low) | (x[:, 199] > high)
    assert abs(outside.mean() - 0.05) < 0.011 and mean.shape == (4000,)
    assert stats.null_band(np.arange(1, 200))[0] == pytest.approx(5), "rank 0.025 * 200"


def test_against_band_by_hand() -> None:
    d = stats.against_band(0.5, (0.8, 0.9, 0.95), 12, "199 draws")
    assert (d.estimate, d.low, d.high) == pytest.approx((-0.4, -0.45, -0.3)) and d.n == 12 and d.generalises_over == stats.OF_THIS_FILE
    inside = stats.against_band(0.85, (0.8, 0.9, 0.95), 12, "199 draws")
    assert inside.low < 0 < inside.high
