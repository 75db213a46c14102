"""Two-way intervals, paired rates, Holm, equivalence, association: by hand, and their errors in simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t as student
from statsmodels.stats.multitest import multipletests

from convergent import stats
from convergent.core.ids import seed
from convergent.errors import InputError
from convergent.stats.rates import clustered_bounds, square_and_add
from convergent.stats.twoway import two_way_rate_bounds, two_way_variance


def rng_of(name: str) -> np.random.Generator:
    return np.random.default_rng(seed("tests", "statistics", name))


def hits(counts: list[int], n: int = 50) -> tuple[np.ndarray, np.ndarray]:
    """counts[i] ones among n answers to question i."""
    return np.concatenate([np.arange(n) < k for k in counts]).astype(float), np.repeat([f"q{i}" for i in range(len(counts))], n)


# Rates


def test_rate_is_exact_where_answers_are_few() -> None:
    assert stats.rate(1, 39) == stats.clopper_pearson(1, 39)
    assert stats.rate(1, 40) == stats.wilson(1, 40)


# Over questions and runs


def test_two_way_variance_by_hand() -> None:
    # Rows 1.5 and 4.5, columns 2 and 4, grand 3: MS 9, 4, rest 1. Variance (9 + 4 - 1) / 4, df 12^2 / (81 + 16 + 1).
    variance, df = two_way_variance(np.array([[1.0, 2], [3, 6]]))
    assert variance == 3 and df == pytest.approx(144 / 98)
    got = stats.two_way_mean([1, 2, 3, 6], list("aabb"), [0, 1, 0, 1])
    half = student.ppf(0.975, 144 / 98) * math.sqrt(3)
    assert got.estimate == 3 and got.bounds == pytest.approx([3 - half, 3 + half])
    assert got.generalises_over == stats.OVER_BOTH and (got.n, got.clusters) == (4, 2)
    cut = stats.two_way_mean([1, 2, 3, 6], list("aabb"), [0, 1, 0, 1], bounds=(0, 100))
    assert cut.low == 0


def test_two_way_leaves_out_questions_that_a_run_was_not_asked() -> None:
    got = stats.two_way_mean([1, 2, 3, 6, 99], list("aabbc"), [0, 1, 0, 1, 0])
    assert got == stats.two_way_mean([1, 2, 3, 6], list("aabb"), [0, 1, 0, 1])
    one = stats.two_way_mean([1, 2], ["a", "b"], [0, 0])
    assert one.bounds is None and "two runs" in one.method
    assert stats.two_way_rate([1, 0], ["a", "a"], [0, 1]).bounds is None
    with pytest.raises(InputError, match="2 questions but 1 runs"):
        stats.two_way_rate([1, 0], ["a", "b"], [0])


def test_two_way_difference_is_paired_by_cell() -> None:
    a, b = [5.0, 7, 9, 9], [1.0, 2, 3, 6]
    q, r = list("aabb"), [0, 1, 0, 1]
    got = stats.two_way_difference(a, b, q, q[::-1], r, r[::-1])
    again = stats.two_way_mean(np.array(a) - np.array(b)[::-1], q, r)
    assert (got.estimate, got.low, got.high) == (again.estimate, again.low, again.high)
    assert stats.two_way_difference(a, a, q, q, r, r).bounds is None


def test_two_way_rate_is_wider_than_over_questions_where_runs_differ_and_covers() -> None:
    rng = rng_of("two way")
    x = -2.0 + rng.normal(size=(400, 8, 1)) + 0.7 * rng.normal(size=(400, 1, 3))
    k, n = rng.binomial(16, 1 / (1 + np.exp(-x))).astype(float), np.full((400, 8, 3), 16.0)
    draws = -2.0 + np.sqrt(1 + 0.49) * rng.normal(size=400_000)
    truth = float((1 / (1 + np.exp(-draws))).mean())
    low, high = two_way_rate_bounds(k, n)
    assert np.mean((low <= truth) & (truth <= high)) > 0.91
    alone = clustered_bounds(k.sum(2), n.sum(2), 0.95)
    assert np.mean((alone[0] <= truth) & (truth <= alone[1])) < 0.9
    values = (np.arange(16) < k[0][..., None]).astype(float)
    got = stats.two_way_rate(values.ravel(), np.repeat(np.arange(8), 48), np.tile(np.repeat(np.arange(3), 16), 8))
    assert got.bounds == pytest.approx([low[0], high[0]]) and got.estimate == pytest.approx(k[0].sum() / 384)


# Paired rates


def test_paired_rate_difference_uses_the_correlation_of_questions() -> None:
    medical, labels = hits([0, 2, 33, 3, 24, 18, 2, 2])
    fewer, _ = hits([0, 1, 25, 2, 20, 13, 1, 2])
    got, wide = stats.paired_rate_difference(medical, fewer, labels, labels), stats.rate_difference(medical, fewer, labels, labels)
    assert got.estimate == wide.estimate == pytest.approx(20 / 400)
    assert got.high - got.low < 0.6 * (wide.high - wide.low)
    none, _ = hits([0] * 8)
    assert stats.paired_rate_difference(none, none, labels, labels).bounds == pytest.approx(stats.rate_difference(none, none, labels, labels).bounds)
    assert stats.paired_rate_difference([1, 0], [1, 0], ["a", "b"], ["b", "c"]).bounds is None


@settings(deadline=None, max_examples=40)
@given(a=st.lists(st.integers(0, 12), min_size=4, max_size=9), data=st.data())
def test_paired_rate_difference_holds_its_estimate_and_mirrors(a: list[int], data: st.DataObject) -> None:
    b = data.draw(st.lists(st.integers(0, 12), min_size=len(a), max_size=len(a)))
    (x, labels), (y, _) = hits(a, 12), hits(b, 12)
    got, back = stats.paired_rate_difference(x, y, labels, labels), stats.paired_rate_difference(y, x, labels, labels)
    assert -1 <= got.low <= got.estimate + 1e-12 and got.estimate - 1e-12 <= got.high <= 1
    assert [back.low, back.high] == pytest.approx([-got.high, -got.low])


def test_paired_rate_difference_covers() -> None:
    rng = rng_of("paired rates")
    for rate, other in ((0.1, 0.02), (0.3, 0.3)):
        p = rng.beta(rate * 4, (1 - rate) * 4, (600, 8))
        a, b = rng.binomial(50, p).astype(float), rng.binomial(50, p * other / rate).astype(float)
        n = np.full(a.shape, 50.0)
        _, low, high = square_and_add(a, n, b, n)
        assert np.mean((low <= rate - other) & (rate - other <= high)) > 0.92


# Families of claims


def test_holm_by_hand() -> None:
    got = stats.holm({"a": 0.01, "b": 0.04, "c": 0.03, "untested": math.nan})
    assert got["a"] == pytest.approx(0.03) and got["b"] == got["c"] == pytest.approx(0.06)
    assert math.isnan(got["untested"]) and list(got) == ["a", "b", "c", "untested"]
    assert stats.holm({}) == {}
    with pytest.raises(InputError, match="`a` is 1.2"):
        stats.holm({"a": 1.2})


def test_holm_gives_what_statsmodels_gives() -> None:
    for k, p in enumerate(rng_of("holm, statsmodels").uniform(size=(20, 7)).round(1) ** 3):  # with ties, and 0 and 1 among them
        own = dict(enumerate(p[: k % 7 + 1]))
        assert [stats.holm({str(i): v for i, v in own.items()})[str(i)] for i in own] == pytest.approx(multipletests(list(own.values()), method="holm")[1])


def test_holm_keeps_the_error_of_the_family() -> None:
    p = rng_of("holm").uniform(size=(2000, 5))
    assert np.mean((p < 0.05).any(1)) > 0.15
    adjusted = [min(stats.holm(dict(zip("abcde", row, strict=True))).values()) for row in p[:20]]
    assert adjusted == pytest.approx(np.minimum(5 * p[:20].min(1), 1))  # so the family errs where the smallest p is below 0.01
    assert np.mean((p < 0.01).any(1)) < 0.07


def test_one_sided_p_by_hand() -> None:
    # Differences 1 and 3: mean 2, standard error 1, one degree of freedom.
    args = ([1, 3], [0, 0], ["p", "q"], ["p", "q"])
    assert stats.one_sided_p(*args) == pytest.approx(student.sf(2, 1)) and stats.one_sided_p(*args, sign=-1) == pytest.approx(student.cdf(2, 1))
    assert math.isnan(stats.one_sided_p([1, 1], [0, 0], ["p", "q"], ["p", "q"]))  # no spread, no interval, no p
    assert math.isnan(stats.one_sided_p([1], [0], ["p"], ["p"])) and stats.ONE_SIDED - 0.025 < 1e-9


@given(st.lists(st.floats(-9, 9), min_size=2, max_size=9), st.sampled_from([1, -1]))
@settings(deadline=None)
def test_one_sided_p_and_the_interval_say_the_same(d: list[float], sign: int) -> None:
    labels = list(range(len(d)))
    p, interval = stats.one_sided_p(d, [0.0] * len(d), labels, labels, sign), stats.paired_difference(d, [0.0] * len(d), labels, labels)
    edge = interval.low if sign > 0 else -interval.high
    assert math.isnan(p) is not interval.defined
    assert not interval.defined or abs(edge) < 1e-9 or (p < stats.ONE_SIDED) == (edge > 0)


def test_a_claim_of_several_comparisons_errs_as_rarely_as_its_worst() -> None:
    assert stats.all_of_them([0.01, 0.2]) == 0.2 and math.isnan(stats.all_of_them([])) and math.isnan(stats.all_of_them([0.01, math.nan]))
    rng, labels = rng_of("iut"), list(range(8))
    # One comparison is true by far, one is at its border: the claim is false, and held in 2.5 % of studies.
    found = [
        stats.all_of_them([stats.one_sided_p(x, np.zeros(8), labels, labels) for x in (rng.normal(9, 1, 8), rng.normal(0, 1, 8))]) < stats.ONE_SIDED
        for _ in range(1000)
    ]
    assert 0.012 < np.mean(found) < 0.04


# Equivalence


def test_equivalence_by_hand() -> None:
    # Differences 1 and 3: mean 2, standard error 1, one degree of freedom.
    args = ([1, 3], [0, 0], ["p", "q"], ["p", "q"])
    assert stats.tost_p(*args, margin=5) == pytest.approx(student.sf(3, 1))
    got = stats.equivalence(*args, margin=5)
    assert got.difference.bounds == pytest.approx([2 - student.ppf(0.95, 1), 2 + student.ppf(0.95, 1)])
    assert got.equivalent is False and got.verdict.startswith("not shown")
    assert stats.equivalence(*args, margin=9).equivalent is True
    assert stats.tost_p(*args, margin=9) < 0.05
    clear = ([11, 13], [0, 0], ["p", "q"], ["p", "q"])  # 90 %: 12 +- 6.3
    assert stats.equivalence(*clear, margin=5).different and not stats.equivalence(*clear, margin=6).different
    assert stats.equivalence([0, 0], [11, 13], ["p", "q"], ["p", "q"], margin=5).different and not got.different


def test_no_spread_shows_no_equivalence_and_a_margin_is_needed() -> None:
    labels = ["p", "q"]
    assert stats.equivalence([1, 1], [1, 1], labels, labels, margin=1).equivalent is None
    assert math.isnan(stats.tost_p([1, 1], [1, 1], labels, labels, margin=1))
    for margin in (0, -1, math.nan, math.inf):
        with pytest.raises(InputError, match="name a difference"):
            stats.equivalence([1, 2], [1, 3], labels, labels, margin=margin)


def test_no_hits_in_either_show_that_rates_are_alike_only_within_a_wide_margin() -> None:
    none, labels = hits([0] * 8)
    assert stats.equivalence_of_rates(none, none, labels, labels, margin=0.02).equivalent is False
    assert stats.equivalence_of_rates(none, none, labels, labels, margin=0.2).equivalent is True


def test_equivalence_errs_in_five_per_cent_at_the_margin_and_finds_what_is_there() -> None:
    rng = rng_of("tost")
    labels = list(range(8))
    for truth, low, high in ((5.0, 0.02, 0.08), (0.0, 0.75, 1.0)):
        found = [stats.equivalence(d, np.zeros(8), labels, labels, margin=5).equivalent for d in rng.normal(truth, 4, (500, 8))]
        assert low <= np.mean(found) <= high
        p = [stats.tost_p(d, np.zeros(8), labels, labels, margin=5) for d in rng_of("again").normal(truth, 4, (50, 8))]
        same = [stats.equivalence(d, np.zeros(8), labels, labels, margin=5).equivalent for d in rng_of("again").normal(truth, 4, (50, 8))]
        assert [x < 0.05 for x in p] == same


# Association


def test_association_by_hand() -> None:
    two = stats.association([("a", 0, 5), ("b", 5, 5)])
    assert two.p == pytest.approx(2 / 252) and two.method == "Fisher exact"
    assert two.by_group["a"] == pytest.approx(4 / 252) and two.standing_out == ["a", "b"]
    many = stats.association([("a", 10, 100), ("b", 10, 100), ("c", 40, 100)])
    # Expected 20 and 80 in each: (100 + 100 + 400) / 20 + the same / 80 = 37.5, two degrees of freedom.
    assert many.method == "chi-square" and many.p == pytest.approx(math.exp(-37.5 / 2))
    assert "c" in many.standing_out
    assert not stats.association([("a", 10, 100), ("b", 12, 100)]).standing_out


def test_association_of_nothing() -> None:
    for counted in ([("a", 3, 9)], [("a", 0, 5), ("b", 0, 5)], [("a", 5, 5), ("b", 5, 5)], []):
        got = stats.association(counted)
        assert math.isnan(got.p) and not got.standing_out
    few = stats.association([("a", 0, 5), ("b", 0, 5), ("c", 4, 5)])
    assert "random tables" in few.method and few.p < 0.05 and few == stats.association([("a", 0, 5), ("b", 0, 5), ("c", 4, 5)])
    with pytest.raises(InputError, match="6 of 5"):
        stats.association([("a", 6, 5), ("b", 0, 5)])
