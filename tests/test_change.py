"""Change-points and turns: worked by hand, found where planted, and false alarms as often as they say."""

from __future__ import annotations

import numpy as np
import pytest

from convergent.errors import InputError
from convergent.stats import change_point, local_cosine
from convergent.stats.change import _largest_t


def test_largest_t_by_hand() -> None:
    rates = np.array([0.0, 1.0, 0.0, 5.0, 6.0, 5.0])
    t, k = _largest_t(rates[None, :, None], np.ones(6))
    a, b = rates[:3], rates[3:]
    pooled = np.sqrt((((a - a.mean()) ** 2).sum() + ((b - b.mean()) ** 2).sum()) / 4)
    assert k[0] == 3 and t[0] == pytest.approx((b.mean() - a.mean()) / pooled / np.sqrt(1 / 3 + 1 / 3))
    # An increment over twice the time weighs like two of half the time.
    once, _ = _largest_t(rates[None, :, None], np.array([1.0, 1, 1, 2, 1, 1]))
    low, high = np.average(a), np.average(b, weights=[2, 1, 1])
    within = ((a - low) ** 2).sum() + (np.array([2, 1, 1]) * (b - high) ** 2).sum()
    assert once[0] == pytest.approx((high - low) * np.sqrt(3 * 4 / 7) / np.sqrt(within / 4))


def noise(n: int, alike: float, rng: np.random.Generator) -> np.ndarray:
    e = rng.standard_normal(n)
    for i in range(1, n):
        e[i] = alike * e[i - 1] + np.sqrt(1 - alike**2) * e[i]
    return e


def test_a_planted_change_is_found_where_it_is() -> None:
    times = np.concatenate([[0, 0.5], np.arange(1.0, 16)])  # unequal times, as in a warm-up
    rates = np.where(times[1:] <= 6, 0.2, 2.0) + 0.1 * np.random.default_rng(0).standard_normal(16)
    found = change_point(times, np.concatenate([[3.0], 3 + np.cumsum(rates * np.diff(times))]), "planted")
    assert found is not None and times[found.index] == 6
    assert found.before == pytest.approx(0.2, abs=0.15) and found.after == pytest.approx(2.0, abs=0.15)
    assert found.false_alarm.high < 0.05 and found.statistic > found.threshold


@pytest.mark.parametrize("alike", [0.0, 0.5])
def test_false_alarms_are_as_rare_as_they_say(alike: float) -> None:
    rng = np.random.default_rng(1)
    alarms = 0
    for i in range(60):
        found = change_point(np.arange(17.0), np.concatenate([[0], np.cumsum(1 + noise(16, alike, rng))]), str(i), draws=200)
        assert found is not None
        alarms += found.false_alarm.estimate < 0.05
    assert alarms <= 8  # 3 expected; 8 or fewer with 99 %


def test_shuffling_alone_would_take_slow_noise_for_changes() -> None:
    """Why there are two nulls."""
    rng = np.random.default_rng(2)
    made = [change_point(np.arange(17.0), np.concatenate([[0], np.cumsum(noise(16, 0.7, rng))]), str(i), draws=200) for i in range(40)]
    assert np.mean([m is not None and m.shuffled.estimate < 0.05 for m in made]) > 0.2


def test_what_shows_nothing_and_what_is_refused() -> None:
    assert change_point(np.arange(8.0), np.arange(8.0) ** 2, "short") is None
    assert change_point(np.arange(20.0), 3 * np.arange(20.0), "a straight line has no change") is None
    with pytest.raises(InputError, match="times must ascend"):
        change_point([0, 1, 1, 2], [0, 1, 2, 3], "x")
    with pytest.raises(InputError, match="a value is missing"):
        change_point(np.arange(12.0), [float("nan"), *range(11)], "x")


def test_local_cosine_by_hand() -> None:
    corner = [[0, 0], [1, 0], [2, 0], [2, 1], [2, 2]]
    assert local_cosine(corner, 1)[1:4] == pytest.approx([1, 0, 1]) and local_cosine(corner, 2)[2] == pytest.approx(0)
    assert np.isnan(local_cosine(corner, 2)[[0, 1, 3, 4]]).all()
    assert np.isnan(local_cosine([[0.0], [0.0], [1.0]], 1)[1]), "no way in, no angle"


def path(steps: np.ndarray) -> np.ndarray:
    return np.vstack([np.zeros(steps.shape[1]), steps.cumsum(0)])


def test_a_turn_is_found_where_it_is_and_none_in_a_straight_or_a_random_path() -> None:
    rng = np.random.default_rng(4)
    steps = np.zeros((16, 200))
    steps[:9, 0], steps[9:, :2] = 1, (0.5, np.sqrt(0.75))
    found = change_point(np.arange(17.0), path(steps + 0.05 * rng.standard_normal(steps.shape)), "turn")
    assert found is not None and found.index == 9 and found.false_alarm.high < 0.05
    assert found.cosine == pytest.approx(0.5, abs=0.05) and found.before == pytest.approx(1, rel=0.2)
    for straight in (0.0, 1.0):
        steps = rng.standard_normal((60, 16, 50)) + straight
        made = [change_point(np.arange(17.0), path(s), str(i), draws=200) for i, s in enumerate(steps)]
        assert sum(m is not None and m.false_alarm.estimate < 0.05 for m in made) <= 8


def test_a_path_in_many_dimensions_is_read_by_its_inner_products() -> None:
    steps = np.random.default_rng(5).standard_normal((12, 40))
    rotation = np.linalg.qr(np.random.default_rng(6).standard_normal((40, 40)))[0]
    one, other = (change_point(np.arange(13.0), path(s), "same", draws=50) for s in (steps, steps @ rotation))
    assert one is not None and other is not None
    assert one.index == other.index and one.statistic == pytest.approx(other.statistic) and one.cosine == pytest.approx(other.cosine)
