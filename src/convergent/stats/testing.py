"""Tests: is there a difference, is there none that matters, and what is left when several claims are tried.

A claim that something changes has a p of "no difference"; a claim that nothing changes needs a margin that was named
beforehand, and holds only if the whole interval lies within it: a wide interval around zero shows nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from convergent.core.ids import seed
from convergent.errors import InputError
from convergent.stats.means import paired_difference, question_differences
from convergent.stats.rates import paired_rate_difference
from convergent.stats.values import LEVEL, Interval, Labels, Values

ONE_SIDED = (1 - LEVEL) / 2
"""What a one-sided p lies below where the two-sided interval lies on the claimed side."""
EXACT_FLIPS = 15
"""Up to this many questions all sign flips are enumerated."""


def permutation_test(
    a: Values, b: Values, clusters_a: Labels, clusters_b: Labels, flips: int = 20_000, name: str = "sign-flip"
) -> float:
    """Two-sided p of "no difference" between a and b by flipping the sign of each question's difference.

    Exact up to EXACT_FLIPS questions (8 questions: smallest p is 2/256), else `flips` random flips seeded by `name`.
    nan without common questions.
    """
    _, d = question_differences(a, b, clusters_a, clusters_b)
    if not len(d):
        return float("nan")
    if len(d) <= EXACT_FLIPS:
        signs = np.array(list(product((1, -1), repeat=len(d))))
        own = 0
    else:
        signs = np.random.default_rng(seed("stats", name)).choice([1, -1], (flips, len(d)))
        own = 1  # the observed arrangement counts as one of the flips, or p could be 0
    seen = abs(d.sum())
    # Sums that differ by rounding alone are ties.
    extreme = np.abs(signs @ d) >= seen - 1e-9 * max(1.0, seen)
    return float((extreme.sum() + own) / (len(signs) + own))


def one_sided_p(a: Values, b: Values, clusters_a: Labels, clusters_b: Labels, sign: int = 1) -> float:
    """p of "mean(a) - mean(b) is not above 0" (sign 1) or "not below 0" (sign -1): a t test over per-question differences.

    Below ONE_SIDED exactly where the interval of `paired_difference` lies on the claimed side of 0; nan where there is no such interval.
    """
    from scipy.special import stdtr

    if not paired_difference(a, b, clusters_a, clusters_b).defined:
        return math.nan
    _, d = question_differences(a, b, clusters_a, clusters_b)
    return float(stdtr(len(d) - 1, -sign * d.mean() / (d.std(ddof=1) / np.sqrt(len(d)))))


def all_of_them(p_values: Sequence[float]) -> float:
    """p of a claim that several comparisons must all support: the largest (intersection-union test, Berger 1982); nan if one is, or there is none.

    No correction for their number is due: the claim is wrong as soon as one of them is.
    """
    return math.nan if not p_values or any(math.isnan(p) for p in p_values) else max(p_values)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Claim -> p adjusted for the number of claims (Holm 1979): below 0.05 it holds with the whole family's error at 5 %.

    A claim whose p is nan was not tested: it stays nan and does not count. Raises InputError for a p outside 0..1.
    """
    wrong = next((name for name, p in p_values.items() if not math.isnan(p) and not 0 <= p <= 1), None)
    if wrong is not None:
        raise InputError(f"Holm: p of `{wrong}` is {p_values[wrong]:g}; a p lies within 0 to 1")
    # Not statsmodels' multipletests: the same numbers (tested), but importing it takes a second, and every report would wait for that.
    tested = sorted((name for name, p in p_values.items() if not math.isnan(p)), key=lambda name: p_values[name])
    found: dict[str, float] = {}
    most = 0.0
    for rank, name in enumerate(tested):
        most = found[name] = min(1.0, max(most, (len(tested) - rank) * p_values[name]))
    return {name: found.get(name, math.nan) for name in p_values}


@dataclass(frozen=True)
class Equivalence:
    """Two one-sided tests of "the difference is smaller than the margin" (Schuirmann 1987)."""

    margin: float
    """In the unit of the values, or in rate points between 0 and 1; named before the data were seen."""
    difference: Interval
    """Of level 1 - 2 alpha (90 % for alpha 5 %): within +-margin exactly where the test at alpha rejects."""
    equivalent: bool | None
    """None where the interval is undefined."""

    @property
    def different(self) -> bool:
        """Whether the whole interval lies outside the margin, on one side."""
        return self.difference.low >= self.margin or self.difference.high <= -self.margin

    @property
    def verdict(self) -> str:
        """One word and the figures, for a table."""
        if self.equivalent is None:
            return f"undecided: {self.difference.method}"
        word = "equivalent" if self.equivalent else "not shown"
        return f"{word}: {self.difference.low:+.3g} to {self.difference.high:+.3g} against +-{self.margin:g}"


def equivalence(a: Values, b: Values, clusters_a: Labels, clusters_b: Labels, margin: float, level: float = LEVEL) -> Equivalence:
    """Whether means of a and b (alignment, margin, projection) differ by less than `margin`, paired by question.

    By `paired_difference`; if all questions differ by exactly the same amount there is no spread to test with, and the answer is None.
    """
    return _equivalent(paired_difference(a, b, clusters_a, clusters_b, _inner(margin, level)), margin)


def equivalence_of_rates(a: Values, b: Values, clusters_a: Labels, clusters_b: Labels, margin: float, level: float = LEVEL) -> Equivalence:
    """The same for hits (0 or 1), by `paired_rate_difference`: no hits on either side are few hits, and show little."""
    return _equivalent(paired_rate_difference(a, b, clusters_a, clusters_b, _inner(margin, level)), margin)


def tost_p(a: Values, b: Values, clusters_a: Labels, clusters_b: Labels, margin: float) -> float:
    """p of "the means differ by `margin` or more": the larger of two one-sided t tests over questions; nan without spread."""
    from scipy.special import stdtr

    _inner(margin, LEVEL)
    _, d = question_differences(a, b, clusters_a, clusters_b)
    if not paired_difference(a, b, clusters_a, clusters_b).defined:
        return math.nan
    error = d.std(ddof=1) / np.sqrt(len(d))
    return float(stdtr(len(d) - 1, -(margin - abs(d.mean())) / error))


def _inner(margin: float, level: float) -> float:
    if not margin > 0 or math.isinf(margin):
        raise InputError(f"equivalence: the margin is {margin:g}; name a difference above 0 that would still not matter")
    return 1 - 2 * (1 - level)


def _equivalent(difference: Interval, margin: float) -> Equivalence:
    inside = -margin < difference.low and difference.high < margin
    return Equivalence(margin, difference, bool(inside) if difference.defined else None)


@dataclass(frozen=True)
class Association:
    """Whether a share (of missing scores, say) depends on the group."""

    p: float
    """Of "the share is the same in all groups"; nan with one group, or where none or all are counted."""
    method: str
    by_group: dict[str, float]
    """group -> p of this group against all others (Fisher exact), adjusted by Holm."""

    @property
    def standing_out(self) -> list[str]:
        """Groups whose adjusted p is below 0.05."""
        return [name for name, p in self.by_group.items() if p < 0.05]


def association(counted: Sequence[tuple[str, int, int]]) -> Association:
    """Whether a share depends on the group, from (group, k, n) of each: chi-square, or Fisher exact where an expected count is below 5.

    Answers count as independent, so with strong clustering this warns too easily; it is made for warnings. Beyond two groups Fisher's p is
    by simulation, from a named seed.
    """
    rows = [(name, k, n) for name, k, n in counted if n]
    for name, k, n in rows:
        if not 0 <= k <= n:
            raise InputError(f"association: {name}: {k} of {n} cannot be")
    table = np.array([[k, n - k] for _, k, n in rows], dtype=int).reshape(-1, 2)
    if len(rows) < 2 or not table.sum(0).all():
        return Association(math.nan, "nothing to compare", {name: math.nan for name, _, _ in rows})
    from scipy.stats import MonteCarloMethod, chi2_contingency, fisher_exact

    expected = np.outer(table.sum(1), table.sum(0)) / table.sum()
    if expected.min() >= 5:
        p, method = float(chi2_contingency(table, correction=False).pvalue), "chi-square"
    elif len(rows) == 2:
        p, method = float(fisher_exact(table).pvalue), "Fisher exact"
    else:
        draws = MonteCarloMethod(n_resamples=2000, rng=np.random.default_rng(seed("stats", "association")))
        p, method = float(fisher_exact(table, method=draws).pvalue), "Fisher exact, 2,000 random tables"
    alone = {name: float(fisher_exact([row, table.sum(0) - row]).pvalue) for (name, _, _), row in zip(rows, table, strict=True)}
    return Association(p, method, holm(alone))
