"""A value against one more draw of a null: by hand, and how often it errs where the value is such a draw."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import t as student

from convergent import stats
from convergent.core.ids import seed
from convergent.errors import InputError

PAIRS = [f"p{i}" for i in range(8)]


def rng_of(name: str) -> np.random.Generator:
    return np.random.default_rng(seed("tests", "nulls", name))


def test_by_hand() -> None:
    """Draws 0, 1, 2 in every pair, value 4 and 6 in two pairs: mean 5 over 1, over pairs +-t(1) * 1, over draws +-t(2) sqrt(4 / 3) * 1."""
    draws = [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]
    found = stats.draws_difference([4.0, 6.0], draws, ["a", "b"], ["a", "b"])
    half = math.hypot(student.ppf(0.975, 1), student.ppf(0.975, 2) * math.sqrt(4 / 3))
    assert found.estimate == 4 and found.bounds == pytest.approx([4 - half, 4 + half])
    assert found.generalises_over == f"{stats.OVER_QUESTIONS}, {stats.OVER_DRAWS}" and "3 draws" in found.method and found.clusters == 2


def test_only_what_both_hold_is_compared_and_order_does_not_matter() -> None:
    rng = rng_of("order")
    a, draws = rng.normal(size=8), rng.normal(size=(4, 8))
    found = stats.draws_difference(a, list(draws), PAIRS, PAIRS)
    turned = stats.draws_difference(a, list(draws[:, ::-1]), PAIRS, PAIRS[::-1])
    assert turned.bounds == pytest.approx(found.bounds)
    more = stats.draws_difference(a, [[*d, 100.0 * i] for i, d in enumerate(draws)], PAIRS, [*PAIRS, "elsewhere"])
    assert more.bounds == pytest.approx(found.bounds)


def test_never_narrower_than_over_texts_or_over_draws() -> None:
    rng = rng_of("narrower")
    for texts, spread in ((1.0, 0.01), (0.01, 1.0), (1.0, 1.0)):
        draws = spread * rng.normal(size=(5, 1)) + texts * rng.normal(size=(5, 8))
        a = 1 + texts * rng.normal(size=8)
        found = stats.draws_difference(a, list(draws), PAIRS, PAIRS)
        over_texts = stats.paired_difference(a, draws.mean(0), PAIRS, PAIRS)
        half = student.ppf(0.975, 4) * math.sqrt(1.2) * draws.mean(1).std(ddof=1)
        assert found.high - found.estimate >= max(over_texts.high - over_texts.estimate, half)


def test_what_cannot_be_said() -> None:
    with pytest.raises(InputError, match="draws: got 2; the spread between draws needs 3 or more"):
        stats.draws_difference([1.0, 2.0], [[0.0, 0.0]] * 2, ["a", "b"], ["a", "b"])
    alike = stats.draws_difference([1.0, 1.0], [[0.0, 0.0]] * 3, ["a", "b"], ["a", "b"])
    assert alike.estimate == 1 and not alike.defined
    assert math.isnan(stats.draws_p([1.0, 1.0], [[0.0, 0.0]] * 3, ["a", "b"], ["a", "b"]))
    assert not stats.draws_difference([], [[]] * 3, [], []).defined and math.isnan(stats.draws_p([], [[]] * 3, [], []))


def test_the_p_agrees_with_the_interval() -> None:
    rng = rng_of("p")
    for effect in (-4.0, -0.5, 0.0, 0.5, 2.0, 3.0, 4.0, 6.0):
        a, draws = effect + rng.normal(size=8), list(rng.normal(size=(5, 1)) + rng.normal(size=(5, 8)))
        found = stats.draws_difference(a, draws, PAIRS, PAIRS)
        above, below = (stats.draws_p(a, draws, PAIRS, PAIRS, sign) for sign in (1, -1))
        assert above + below == pytest.approx(1) and (above < stats.ONE_SIDED) == (found.low > 0) and (below < stats.ONE_SIDED) == (found.high < 0)
    # At the p itself the interval of level 1 - 2 p ends at 0.
    at = stats.draws_difference(a, draws, PAIRS, PAIRS, 1 - 2 * above)
    assert at.low == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("shape", ["normal", "skewed"])
@pytest.mark.parametrize("k", [3, 5])
def test_a_value_that_is_one_more_draw_passes_as_rarely_as_claimed(k: int, shape: str) -> None:
    """Draws differ three times as much as texts do inside a draw; texts have levels of their own, which cancel. Claimed: above, at 2.5 %.

    Against a single draw, by the interval over texts, the same value passes far more often: what this guards against. Skewed (exponential) draws are
    the worst that was tried: 4 to 8 % (docs/coverage.md).
    """
    rng, n = rng_of(f"{k} {shape}"), 600
    level = rng.normal(size=(n, k + 1, 1)) if shape == "normal" else rng.exponential(size=(n, k + 1, 1))
    x = 3 * level / math.sqrt(8) + rng.normal(size=(n, k + 1, 8)) + 5 * rng.normal(size=(n, 1, 8))
    passed = single = 0
    for real, *draws in x:
        passed += stats.draws_difference(real, draws, PAIRS, PAIRS).low > 0
        single += stats.paired_difference(real, draws[0], PAIRS, PAIRS).low > 0
    assert passed / n < (0.035 if shape == "normal" else 0.075) and single / n > 0.15, (passed / n, single / n)


def test_a_real_effect_is_found() -> None:
    """Six standard deviations of the draws: found by five draws nearly always, by three in half of the cases."""
    rng = rng_of("power")
    found = dict.fromkeys((3, 5), 0)
    for k in found:
        for _ in range(100):
            draws = rng.normal(size=(k, 1)) + 0.3 * rng.normal(size=(k, 8))
            found[k] += stats.draws_difference(6 + 0.3 * rng.normal(size=8), list(draws), PAIRS, PAIRS).low > 0
    assert found[5] > 90 and 40 < found[3] < 95, found


def test_mean_over_draws_by_hand() -> None:
    """1, 2, 3: mean 2, sd 1, so +-t(2) / sqrt(3)."""
    found = stats.draws_mean([1.0, 2.0, 3.0])
    half = student.ppf(0.975, 2) / math.sqrt(3)
    assert (found.estimate, found.n, found.generalises_over) == (2, 3, stats.OVER_DRAWS) and found.bounds == pytest.approx([2 - half, 2 + half])
    assert stats.draws_mean_p([1.0, 2.0, 3.0]) == pytest.approx(student.sf(2 * math.sqrt(3), 2))
    assert stats.draws_mean_p([1.0, 2.0, 3.0], -1) == pytest.approx(student.cdf(2 * math.sqrt(3), 2))
    alone = stats.draws_mean([4.0])
    assert alone.estimate == 4 and not alone.defined and math.isnan(stats.draws_mean_p([4.0]))
    assert stats.draws_mean_p([1.0, 1.0]) == 0 and stats.draws_mean_p([1.0, 1.0], -1) == 1
