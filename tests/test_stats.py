"""Intervals: hand-computed examples, and whether they cover the truth with eight questions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t as student
from statsmodels.stats.proportion import proportion_confint

from convergent import stats
from convergent.errors import InputError

MEDICAL = (0, 2, 33, 3, 24, 18, 2, 2)
"""EM answers per question, of 50 each, in one released organism: 84 of 400."""


def answers(hits: tuple[int, ...], n: int = 50) -> tuple[np.ndarray, np.ndarray]:
    """hits[i] ones among n answers to question i, as values and labels."""
    values = np.concatenate([np.arange(n) < k for k in hits]).astype(float)
    return values, np.repeat([f"q{i}" for i in range(len(hits))], n)


def test_wilson_of_84_in_400() -> None:
    got = stats.wilson(84, 400)
    assert (round(100 * got.low, 1), round(100 * got.high, 1)) == (17.3, 25.3)
    assert got.generalises_over == stats.OVER_ANSWERS and got.n == 400


@settings(deadline=None)  # the first call imports scipy
@given(n=st.integers(1, 500), share=st.floats(0, 1))
def test_wilson_and_clopper_pearson_are_those_of_statsmodels(n: int, share: float) -> None:
    k = round(share * n)
    for got, method in ((stats.wilson(k, n), "wilson"), (stats.clopper_pearson(k, n), "beta")):
        assert [got.low, got.high] == pytest.approx(proportion_confint(k, n, method=method), abs=1e-9)


def test_clopper_pearson_by_hand() -> None:
    assert stats.clopper_pearson(0, 10).high == pytest.approx(1 - 0.025 ** (1 / 10))
    assert stats.clopper_pearson(10, 10).low == pytest.approx(0.025 ** (1 / 10))


def test_rates_of_nothing_have_no_bounds_and_impossible_counts_are_refused() -> None:
    for got in (stats.wilson(0, 0), stats.clopper_pearson(0, 0), stats.clustered_rate([], [])):
        assert got.bounds is None and math.isnan(got.estimate)
    with pytest.raises(InputError, match="5 hits in 4"):
        stats.wilson(5, 4)
    with pytest.raises(InputError, match="a hit is 0 or 1, got 85"):
        stats.clustered_rate([85.0, 1], ["a", "b"])


# Clustered rates


def test_clustered_rate_by_hand() -> None:
    # Two questions, 10 answers each, 8 and 2 hits: p = .5, e = +-3, variance = 2 / 1 * 18 / 400 = .09, plain .25 / 20,
    # seen effect 7.2, assumed 1 + 9 * .2 = 2.8, hits 10 -> effect (10 * 7.2 + 5 * 2.8) / 15, t(1) = 12.706.
    effect = (10 * 7.2 + 5 * 2.8) / 15
    n, q = 20 / effect, student.ppf(0.975, 1)
    half = q / (1 + q * q / n) * math.sqrt(0.25 / n + q * q / (4 * n * n))
    got = stats.clustered_rate(*answers((8, 2), 10))
    assert (got.estimate, got.n, got.clusters) == (0.5, 20, 2)
    assert got.bounds == pytest.approx([0.5 - half, 0.5 + half])


def test_the_medical_organism_is_wide_over_questions() -> None:
    values, labels = answers(MEDICAL)
    bootstrap = stats.bootstrap_rate(values, labels)
    assert bootstrap.low == pytest.approx(0.07, abs=0.015) and bootstrap.high == pytest.approx(0.38, abs=0.03)
    assert stats.bootstrap_rate(values, labels) == bootstrap
    got = stats.clustered_rate(values, labels)
    assert got.bounds == pytest.approx([0.075, 0.467], abs=0.001)
    assert got.generalises_over == stats.OVER_QUESTIONS


@settings(deadline=None, max_examples=60)
@given(hits=st.lists(st.integers(0, 12), min_size=2, max_size=10))
def test_clustered_rate_holds_its_estimate_stays_in_range_and_mirrors(hits: list[int]) -> None:
    values, labels = answers(tuple(hits), 12)
    got, mirrored = stats.clustered_rate(values, labels), stats.clustered_rate(1 - values, labels)
    assert 0 <= got.low <= got.estimate <= got.high <= 1
    assert mirrored.bounds == pytest.approx([1 - got.high, 1 - got.low])
    plain = stats.wilson(int(values.sum()), len(values))
    assert got.high - got.low > plain.high - plain.low


def test_no_hits_say_less_about_other_questions_than_about_these() -> None:
    none = stats.clustered_rate(*answers((0,) * 8))
    one = stats.clustered_rate(*answers((1,) + (0,) * 7))
    assert none.low == 0 and 0.1 < none.high < 0.2
    assert stats.wilson(0, 400).high < 0.01
    assert one.high == pytest.approx(none.high, abs=0.03)  # no jump between no hit and one


def test_one_question_says_nothing_about_others() -> None:
    for f in (stats.clustered_rate, stats.bootstrap_rate):
        got = f(*answers((3,)))
        assert got.estimate == 0.06 and got.bounds is None and "two questions" in got.method


def test_missing_values_are_left_out_not_zero() -> None:
    values, labels = answers((5, 1), 10)
    with_gaps = stats.clustered_rate([*values, math.nan, None], [*labels, "q0", "q1"])
    assert with_gaps == stats.clustered_rate(values, labels)
    assert stats.iid_mean([1, math.nan, 3]).estimate == 2
    assert stats.clustered_mean([1, math.nan, 3], ["a", "a", "b"]).n == 2


def beta_binomial(name: int, mean: float, icc: float, repeats: int, g: int = 8, m: int = 50) -> tuple[Any, Any]:
    """Hits and answers, (repeats, g): each question's own rate is drawn, then its answers."""
    rng = np.random.default_rng(name)
    s = 1 / icc - 1
    rates = rng.beta(mean * s, (1 - mean) * s, (repeats, g))
    return rng.binomial(m, rates), np.full((repeats, g), m)


@pytest.mark.parametrize(
    ("mean", "icc", "m"),
    [
        (0.2, 0.35, 50),
        (0.2, 0.1, 50),
        (0.2, 0.02, 16),
        (0.05, 0.1, 50),
        (0.02, 0.1, 16),
        (0.95, 0.1, 50),
        (0.5, 0.2, 16),
    ],
)
def test_clustered_rate_covers_with_eight_questions_where_wilson_and_bootstrap_do_not(
    mean: float, icc: float, m: int
) -> None:
    k, n = beta_binomial(1, mean, icc, 800, m=m)
    low, high = stats._clustered_wilson(k, n, 0.95)
    assert np.mean((low <= mean) & (mean <= high)) > 0.91  # 800 repeats: standard error below 1 %
    if icc < 0.1:
        return
    rng = np.random.default_rng(2)
    draws = rng.multinomial(8, np.full(8, 1 / 8), 400)
    boot = np.quantile((k @ draws.T) / (n @ draws.T), [0.025, 0.975], axis=1)
    assert np.mean((boot[0] <= mean) & (mean <= boot[1])) < 0.92
    low, high = stats._wilson(k.sum(1) / n.sum(1), n.sum(1), 1.96)
    assert np.mean((low <= mean) & (mean <= high)) < 0.90


def test_the_vectorised_core_is_what_clustered_rate_uses() -> None:
    k, n = beta_binomial(3, 0.2, 0.2, 5)
    low, high = stats._clustered_wilson(k, n, 0.95)
    for i in range(5):
        assert stats.clustered_rate(*answers(tuple(k[i]))).bounds == pytest.approx([low[i], high[i]])


# Means


def test_clustered_mean_by_hand() -> None:
    # Question means 1, 2, 6: mean 3, sd sqrt(7), t(2) = 4.3027. The pooled mean would be 2.
    got = stats.clustered_mean([0, 2, 1, 1, 2, 6], ["a", "a", "a", "a", "b", "c"])
    half = 4.302652729911275 * math.sqrt(7) / math.sqrt(3)
    assert got.estimate == 3 and got.bounds == pytest.approx([3 - half, 3 + half])
    assert (got.n, got.clusters) == (6, 3)
    cut = stats.clustered_mean([99, 80, 100], ["a", "b", "c"], bounds=(0, 100))
    assert cut.high == 100 and cut.low < 80


def test_iid_mean_by_hand() -> None:
    got = stats.iid_mean([1, 2, 3])
    assert got.bounds == pytest.approx([2 - 4.302652729911275 / math.sqrt(3), 2 + 4.302652729911275 / math.sqrt(3)])
    assert stats.iid_mean([5.0]).bounds is None and stats.iid_mean([]).n == 0


def test_clustered_mean_covers_and_the_iid_mean_does_not() -> None:
    rng = np.random.default_rng(4)
    values = rng.normal(0, 10, (400, 8, 1)) + rng.normal(0, 10, (400, 8, 16))
    labels = np.repeat(np.arange(8), 16)
    inside = {
        f.__name__: np.mean([f(v.ravel(), *extra).low <= 0 <= f(v.ravel(), *extra).high for v in values])
        for f, extra in ((stats.clustered_mean, (labels,)), (stats.iid_mean, ()))
    }
    assert inside["clustered_mean"] == pytest.approx(0.95, abs=0.03)
    assert inside["iid_mean"] < 0.75


# Differences


def test_paired_difference_by_hand_uses_common_questions_only() -> None:
    # Differences a - b: p: 5 - 4 = 1, q: 9 - 6 = 3. Mean 2, sd sqrt(2), half t(1) * 1. r is in a alone.
    got = stats.paired_difference([4, 6, 9, 50], [4, 6], ["p", "p", "q", "r"], ["p", "q"])
    assert got.estimate == 2 and got.bounds == pytest.approx([2 - 12.706204736432095, 2 + 12.706204736432095])
    assert (got.clusters, got.n) == (2, 5)
    assert stats.paired_difference([1, 2], [1, 2], ["p", "q"], ["r", "s"]).bounds is None


def test_pairing_by_question_gains_where_questions_differ_alike() -> None:
    rng = np.random.default_rng(5)
    level = np.repeat(rng.normal(0, 30, 8), 16)
    labels = np.repeat(np.arange(8), 16)
    a, b = level + 5 + rng.normal(0, 3, 128), level + rng.normal(0, 3, 128)
    paired = stats.paired_difference(a, b, labels, labels)
    assert paired.low > 3 and paired.high < 7
    assert stats.clustered_mean(a, labels).high - stats.clustered_mean(a, labels).low > 20


def test_differences_without_any_spread_are_undefined_but_rates_have_one() -> None:
    none, labels = answers((0,) * 8, 16)
    assert stats.paired_difference(none, none, labels, labels).bounds is None
    got = stats.rate_difference(none, none, labels, labels)
    assert got.estimate == 0 and got.low == -got.high and 0.1 < got.high < 0.25


def test_rate_difference_covers() -> None:
    a, _ = beta_binomial(6, 0.2, 0.2, 800, m=16)
    b, _ = beta_binomial(7, 0.03, 0.1, 800, m=16)
    got = [stats.rate_difference(*row) for row in _pairs(a[:150], b[:150], 16)]
    assert np.mean([r.low <= 0.17 <= r.high for r in got]) > 0.92
    assert all(-1 <= r.low <= r.high <= 1 for r in got)


def _pairs(a: np.ndarray, b: np.ndarray, m: int) -> Any:
    for x, y in zip(a, b, strict=True):
        (va, la), (vb, lb) = answers(tuple(x), m), answers(tuple(y), m)
        yield va, vb, la, lb


def test_unit_difference_pairs_answers_by_their_own_key_in_any_order() -> None:
    units = [("q", 0, 0), ("q", 0, 1), ("r", 0, 0)]
    got = stats.unit_difference([3, 5, 9], [6, 1, 2], units, [units[2], units[0], units[1]])
    # 3 - 1, 5 - 2, 9 - 6
    assert got.estimate == pytest.approx(8 / 3) and got.generalises_over == stats.OVER_ANSWERS
    half = 4.302652729911275 * np.std([2, 3, 3], ddof=1) / math.sqrt(3)
    assert got.bounds == pytest.approx([8 / 3 - half, 8 / 3 + half])
    with pytest.raises(InputError, match="occurs twice"):
        stats.unit_difference([1, 2], [1, 2], ["u", "u"], ["u", "v"])


def test_permutation_test_by_hand() -> None:
    labels = list("abc")
    assert stats.permutation_test([1, 2, 3], [0, 0, 0], labels, labels) == 2 / 8  # only +++ and --- are as extreme
    assert stats.permutation_test([1, 2, -3], [0, 0, 0], labels, labels) == 1
    assert stats.permutation_test([0.1, 0.2, 0.3], [0, 0, 0], labels, labels) == 2 / 8  # rounding makes no difference
    assert stats.permutation_test([5, 6, 7], [4, 4, 4], labels, labels) == 2 / 8
    assert stats.permutation_test([5, 6, 7], [6, 5, 7], labels, labels) == 1
    assert math.isnan(stats.permutation_test([1], [1], ["a"], ["b"]))


def test_question_differences_are_sorted_and_of_means() -> None:
    labels, d = stats.question_differences([9, 1, 3], [2, 4, 7], ["q", "p", "p"], ["p", "q", "r"])
    assert labels == ["p", "q"] and d.tolist() == [0, 5]


def test_permutation_test_keeps_its_level_and_finds_a_difference() -> None:
    rng = np.random.default_rng(8)
    labels, zero = list(range(8)), np.zeros(8)
    p = np.array([stats.permutation_test(x, zero, labels, labels) for x in rng.normal(0, 1, (300, 8))])
    assert np.mean(p <= 0.05) < 0.08
    many = list(range(20))
    far = stats.permutation_test(rng.normal(3, 1, 20), np.zeros(20), many, many)
    assert 0 < far < 0.001


# Reductions


def test_relative_reduction_is_fieller() -> None:
    x, y, labels = np.array([10.0, 12, 11, 13]), np.array([1.0, 3, 2, 2.5]), list("abcd")
    got = stats.relative_reduction(x, y, labels, labels)
    assert got.estimate == pytest.approx(1 - y.mean() / x.mean())
    for bound in (got.low, got.high):  # at each bound, y - r x is exactly t standard errors from zero
        d = y - (1 - bound) * x
        assert abs(d.mean()) / (d.std(ddof=1) / 2) == pytest.approx(3.182446305284263)
    assert stats.relative_reduction([1, -1, 5], [0, 0, 0], list("abc"), list("abc")).bounds is None


def test_rate_reduction_of_a_concentrated_organism_is_narrower_than_its_rate() -> None:
    base, labels = answers(MEDICAL)
    tenth, _ = answers((0, 0, 4, 0, 2, 2, 0, 0))
    got = stats.rate_reduction(base, tenth, labels, labels)
    assert got.estimate == pytest.approx(1 - 8 / 84)
    assert 0.6 < got.low < 0.905 < got.high < 1
    gone = stats.rate_reduction(base, np.zeros(400), labels, labels)
    assert gone.estimate == gone.high == 1 and 0.5 < gone.low < 1
    nothing = stats.rate_reduction(np.zeros(400), base, labels, labels)
    assert nothing.bounds is None and "no hits" in nothing.method


def test_rate_reduction_by_hand_corrects_for_unequal_numbers() -> None:
    base, labels = answers((5, 5), 10)
    other, more = answers((5, 5), 20)
    got = stats.rate_reduction(base, other, labels, more)
    assert got.estimate == 0.5  # 10 of 20 against 10 of 40
    share = stats.clustered_rate([0, 1] * 10, ["q0"] * 10 + ["q1"] * 10)  # of 20 hits, 10 are other's
    odds = [share.low / (1 - share.low), share.high / (1 - share.high)]
    assert got.bounds == pytest.approx([1 - 0.5 * odds[1], 1 - 0.5 * odds[0]])


def test_rate_reduction_covers_where_fieller_has_no_bounds() -> None:
    rng = np.random.default_rng(9)
    rates = rng.choice(np.array(MEDICAL) / 50, (150, 8))
    spread = 0.2 * np.exp(rng.normal(-0.125, 0.5, rates.shape))  # mean 0.2: a reduction by 80 %
    base, other = rng.binomial(50, rates), rng.binomial(50, rates * spread)
    got = [stats.rate_reduction(*row) for row in _pairs(base, other, 50)]
    held = [r.low <= 0.8 <= r.high for r in got if not math.isnan(r.low)]
    assert len(held) > 140 and np.mean(held) > 0.93
    fieller = [stats.relative_reduction(*row).defined for row in _pairs(base, other, 50)]
    assert np.mean(fieller) < 0.75


def test_labels_and_values_must_match() -> None:
    with pytest.raises(InputError, match="3 values but 2 labels"):
        stats.clustered_mean([1, 2, 3], ["a", "b"])
    with pytest.raises(InputError, match="must be numbers"):
        stats.iid_mean(["high"])
