"""Statistics: the only place that computes an interval.

Every interval says how it was made and what it generalises over. Two kinds exist, because answers to one question are
alike: an interval over *answers* holds for more answers to these very questions; an interval over *questions* holds for
other questions of this kind, and with eight questions it is wide. Missing values (nan, None) are left out, never zero.
What cannot be said (no row, one question) has nan bounds. Coverage by simulation: docs/statistics.md.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, TypeAlias

import numpy as np

from convergent.core.ids import seed
from convergent.errors import InputError

LEVEL = 0.95
OVER_ANSWERS = "answers to these questions"
OVER_QUESTIONS = "questions like these"

PRIOR_ICC = 0.2
"""Correlation of hits within a question that is assumed while hits are few. EM in 16 released organisms: median 0.12,
quartiles 0.09 and 0.17, largest 0.38."""
PRIOR_HITS = 5
"""Weight of the assumed correlation, in hits: with 5 hits half of the estimate is assumed, with 80 a seventeenth."""
EXACT_FLIPS = 15
"""Up to this many questions all sign flips are enumerated."""

Values: TypeAlias = Sequence[Any] | np.ndarray
"""Numbers or booleans, one per answer; anything that numpy reads as float, a pandas column too."""
Labels: TypeAlias = Sequence[Hashable] | np.ndarray
"""One label per answer, usually its question id."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % bounds (or another level), and what they are bounds of."""

    estimate: float
    low: float
    """nan where nothing can be said; `-inf` or `inf` where there is no bound on that side."""
    high: float
    n: int
    """Answers used."""
    method: str
    generalises_over: str
    clusters: int | None = None
    """Questions used, where that matters."""

    @property
    def defined(self) -> bool:
        """Whether there are two finite bounds."""
        return bool(np.isfinite(self.low) and np.isfinite(self.high))

    @property
    def bounds(self) -> list[float] | None:
        """[low, high], or None where not `defined`."""
        return [self.low, self.high] if self.defined else None


# Rates


def wilson(k: int, n: int, level: float = LEVEL) -> Interval:
    """Wilson score interval of k hits in n answers (Wilson 1927)."""
    _check_count(k, n)
    low, high = _wilson(k / n, n, _z(level)) if n else (np.nan, np.nan)
    return Interval(k / n if n else np.nan, float(low), float(high), n, "Wilson", OVER_ANSWERS)


def clopper_pearson(k: int, n: int, level: float = LEVEL) -> Interval:
    """Exact interval of k hits in n answers (Clopper and Pearson 1934): never under-covers; for small n."""
    from scipy.stats import beta

    _check_count(k, n)
    tail = (1 - level) / 2
    low = np.nan if not n else beta.ppf(tail, k, n - k + 1) if k else 0.0
    high = np.nan if not n else beta.ppf(1 - tail, k + 1, n - k) if k < n else 1.0
    return Interval(k / n if n else np.nan, float(low), float(high), n, "Clopper-Pearson", OVER_ANSWERS)


def clustered_rate(hits: Values, clusters: Labels, level: float = LEVEL) -> Interval:
    """Rate of `hits` (0 or 1) with an interval over questions; always within [0, 1].

    Wilson's interval at the effective number of answers, n / design effect, with the t quantile of G - 1 degrees of
    freedom in place of the normal one. The design effect comes from the spread between questions (linearised variance,
    as for a survey), is never below 1, and leans on PRIOR_ICC while hits are few: no hits in 400 answers say little
    about an unasked question. Chosen over the percentile bootstrap because that covers 80 to 88 % with 8 questions.
    """
    k, n = _counts(hits, clusters)
    total = int(n.sum())
    if len(n) < 2:
        return _undefined(float(k.sum() / total) if total else np.nan, total, "needs two questions", len(n))
    low, high = _clustered_wilson(k, n, level)
    method = "Wilson at the effective number of answers, t quantile"
    return Interval(float(k.sum() / total), float(low), float(high), total, method, OVER_QUESTIONS, len(n))


def bootstrap_rate(
    hits: Values, clusters: Labels, resamples: int = 4000, name: str = "rate", level: float = LEVEL
) -> Interval:
    """Rate with a percentile bootstrap over questions, seeded by `name`. Covers too little below some 20 questions."""
    k, n = _counts(hits, clusters)
    total = int(n.sum())
    if len(n) < 2:
        return _undefined(float(k.sum() / total) if total else np.nan, total, "needs two questions", len(n))
    draws = np.random.default_rng(seed("stats", "bootstrap", name)).multinomial(
        len(n), np.full(len(n), 1 / len(n)), resamples
    )
    low, high = np.quantile(draws @ k / (draws @ n), [(1 - level) / 2, (1 + level) / 2])
    method = "percentile bootstrap over questions"
    return Interval(float(k.sum() / total), float(low), float(high), total, method, OVER_QUESTIONS, len(n))


def rate_difference(
    hits_a: Values, hits_b: Values, clusters_a: Labels, clusters_b: Labels, level: float = LEVEL
) -> Interval:
    """Rate of a minus rate of b over questions, for hits that may be rare or none.

    Newcombe's square-and-add from the two clustered rates (Newcombe 1998, method 10). It does not use the pairing, so
    it is wide where questions differ alike in both; `paired_difference` is sharper and fails where all hits are absent.
    """
    a, b = clustered_rate(hits_a, clusters_a, level), clustered_rate(hits_b, clusters_b, level)
    d = a.estimate - b.estimate
    low = d - np.hypot(a.estimate - a.low, b.high - b.estimate)
    high = d + np.hypot(a.high - a.estimate, b.estimate - b.low)
    both = min(a.clusters or 0, b.clusters or 0)
    return Interval(d, float(low), float(high), a.n + b.n, "Newcombe from clustered rates", OVER_QUESTIONS, both)


def rate_reduction(
    base: Values, other: Values, clusters_base: Labels, clusters_other: Labels, level: float = LEVEL
) -> Interval:
    """1 - rate(other) / rate(base) of hits (0 or 1) over the questions that both hold; 0.9 is a reduction by 90 %.

    Among all hits of both, the share that `other` holds fixes the ratio; its clustered interval is turned into one of
    the reduction. The concentration of hits on few questions thus cancels out. Undefined without hits in base, or with
    all hits in one question.
    """
    (kb, nb), (ko, no), _ = _common(_counts_by_label(base, clusters_base), _counts_by_label(other, clusters_other))
    total = int(nb.sum() + no.sum())
    method = "clustered interval of other's share of all hits"
    if len(nb) < 2 or not kb.sum():
        why = "needs two questions in common" if len(nb) < 2 else "base has no hits"
        return _undefined(np.nan, total, f"{method}: {why}", len(nb))
    scale = nb.sum() / no.sum()
    low, high = _clustered_wilson(ko, ko + kb, level)
    reduction = 1 - scale * ko.sum() / kb.sum()
    if np.count_nonzero(ko + kb) < 2:
        return _undefined(float(reduction), total, f"{method}: all hits in one question", len(nb))
    bound = 1 - scale * high / (1 - high) if high < 1 else -np.inf
    return Interval(
        float(reduction), float(bound), float(1 - scale * low / (1 - low)), total, method, OVER_QUESTIONS, len(nb)
    )


# Means


def iid_mean(values: Values, level: float = LEVEL) -> Interval:
    """Mean with a t interval over answers, as if they were independent."""
    x = _floats(values)
    x = x[~np.isnan(x)]
    mean, low, high = _t_interval(x, level)
    return Interval(mean, low, high, len(x), "t over answers", OVER_ANSWERS)


def clustered_mean(
    values: Values, clusters: Labels, level: float = LEVEL, bounds: tuple[float, float] | None = None
) -> Interval:
    """Mean of question means with a t interval of G - 1 degrees of freedom; every question weighs alike.

    `bounds`: the values' range, e.g. (0, 100); the interval is cut there.
    """
    by = _means_by_label(values, clusters)
    mean, low, high = _t_interval(np.array([m for m, _ in by.values()]), level)
    if bounds is not None and not np.isnan(low):
        low, high = max(low, bounds[0]), min(high, bounds[1])
    return Interval(mean, low, high, sum(n for _, n in by.values()), "t over question means", OVER_QUESTIONS, len(by))


def question_differences(
    a: Values, b: Values, clusters_a: Labels, clusters_b: Labels
) -> tuple[list[Hashable], np.ndarray]:
    """Labels of the questions that both hold, sorted, and per question mean(a) - mean(b), shape (n_questions,)."""
    (xa, _), (xb, _), labels = _common(_means_by_label(a, clusters_a), _means_by_label(b, clusters_b))
    return labels, xa - xb


def paired_difference(a: Values, b: Values, clusters_a: Labels, clusters_b: Labels, level: float = LEVEL) -> Interval:
    """Mean of a minus mean of b, paired by question: t interval over the per-question differences.

    Questions that only one of them holds are left out. Undefined if all questions differ by exactly the same, as where
    neither has a hit: no spread is seen, so none can be given; use `rate_difference` there.
    """
    (xa, na), (xb, nb), labels = _common(_means_by_label(a, clusters_a), _means_by_label(b, clusters_b))
    d = xa - xb
    n = int(na.sum() + nb.sum())
    if len(d) >= 2 and np.ptp(d) <= 1e-12 * np.abs([xa, xb]).max():  # equal but for rounding
        return _undefined(float(d[0]), n, "t over differences per question: they are all equal", len(d))
    mean, low, high = _t_interval(d, level)
    return Interval(mean, low, high, n, "t over differences per question", OVER_QUESTIONS, len(labels))


def unit_difference(a: Values, b: Values, units_a: Labels, units_b: Labels, level: float = LEVEL) -> Interval:
    """Mean of a minus b, paired by unit, e.g. (question, paraphrase, sample): t over units, for these questions alone.

    The secondary interval beside `paired_difference`. Raises InputError if a unit occurs twice in one of them.
    """
    means_a, means_b = _means_by_label(a, units_a), _means_by_label(b, units_b)
    for means in (means_a, means_b):
        twice = next((unit for unit, (_, n) in means.items() if n > 1), None)
        if twice is not None:
            raise InputError(f"paired difference: unit {twice!r} occurs twice; a unit names one answer")
    (xa, _), (xb, _), _ = _common(means_a, means_b)
    mean, low, high = _t_interval(xa - xb, level)
    return Interval(mean, low, high, 2 * len(xa), "t over paired answers", OVER_ANSWERS)


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


def relative_reduction(
    base: Values, other: Values, clusters_base: Labels, clusters_other: Labels, level: float = LEVEL
) -> Interval:
    """1 - mean(other) / mean(base), paired by question, by Fieller's theorem with G - 1 degrees of freedom.

    For measured values such as margins; for hits use `rate_reduction`. Undefined where base's own mean is not clear of
    zero.
    """
    (x, nx), (y, ny), _ = _common(_means_by_label(base, clusters_base), _means_by_label(other, clusters_other))
    n, g = int(nx.sum() + ny.sum()), len(x)
    if g < 2 or x.mean() == 0:
        return _undefined(np.nan, n, "Fieller: needs two questions in common and a base that is not 0", g)
    t2 = _t(g - 1, level) ** 2
    sxx, sxy, _, syy = (np.cov(x, y) / g).ravel()
    # Ratios r for which mean(y) - r mean(x) is within t standard errors of 0: a r^2 - 2 b r + c <= 0.
    a, b, c = x.mean() ** 2 - t2 * sxx, x.mean() * y.mean() - t2 * sxy, y.mean() ** 2 - t2 * syy
    estimate = float(1 - y.mean() / x.mean())
    if a <= 0:
        return _undefined(estimate, n, "Fieller: base is not clear of zero", g)
    root = np.sqrt(max(b * b - a * c, 0.0))
    return Interval(estimate, float(1 - (b + root) / a), float(1 - (b - root) / a), n, "Fieller", OVER_QUESTIONS, g)


# Parts


def _wilson(p: Any, n: Any, q: Any) -> tuple[Any, Any]:
    """Wilson's bounds for rate p in n answers at quantile q, elementwise; exactly 0 or 1 where p is."""
    centre = (p + q * q / (2 * n)) / (1 + q * q / n)
    half = q / (1 + q * q / n) * np.sqrt(p * (1 - p) / n + q * q / (4 * n * n))
    low = np.where(np.equal(p, 0), 0.0, np.clip(centre - half, 0, 1))
    return low, np.where(np.equal(p, 1), 1.0, np.clip(centre + half, 0, 1))


def _clustered_wilson(k: np.ndarray, n: np.ndarray, level: float) -> tuple[Any, Any]:
    """Bounds from hits k in n answers per question, both (..., n_questions); see `clustered_rate`."""
    g = np.maximum((n > 0).sum(-1), 2)
    total, hits = n.sum(-1), k.sum(-1)
    p = hits / total
    variance = g / (g - 1) * ((k - p[..., None] * n) ** 2).sum(-1) / total**2
    plain = p * (1 - p) / total
    seen = np.where(plain > 0, variance / np.where(plain > 0, plain, 1), 1.0)
    assumed = 1 + ((n.astype(float) ** 2).sum(-1) / total - 1) * PRIOR_ICC
    rare = np.minimum(hits, total - hits)
    effect = np.maximum((rare * seen + PRIOR_HITS * assumed) / (rare + PRIOR_HITS), 1.0)
    return _wilson(p, total / effect, _t(g - 1, level))


def _t_interval(x: np.ndarray, level: float) -> tuple[float, float, float]:
    """Mean and t bounds of x (n,); nan bounds below two values."""
    if len(x) < 2:
        return (float(x[0]) if len(x) else np.nan), np.nan, np.nan
    half = float(_t(len(x) - 1, level) * x.std(ddof=1) / np.sqrt(len(x)))
    return float(x.mean()), float(x.mean() - half), float(x.mean() + half)


def _t(df: Any, level: float) -> Any:
    from scipy.stats import t

    return t.ppf((1 + level) / 2, df)


def _z(level: float) -> float:
    from scipy.stats import norm

    return float(norm.ppf((1 + level) / 2))


def _undefined(estimate: float, n: int, why: str, clusters: int) -> Interval:
    return Interval(estimate, np.nan, np.nan, n, f"undefined ({why})", OVER_QUESTIONS, clusters)


def _check_count(k: int, n: int) -> None:
    if not 0 <= k <= n:
        raise InputError(f"rate: {k} hits in {n} answers cannot be; hits are counted among the answers")


def _floats(values: Values) -> np.ndarray:
    try:
        return np.asarray(values, dtype=float)
    except (TypeError, ValueError) as error:
        raise InputError(f"statistics: values must be numbers, {error}") from error


def _grouped(values: Values, labels: Labels) -> dict[Hashable, list[float]]:
    x, names = _floats(values), list(labels)
    if len(x) != len(names):
        raise InputError(f"statistics: {len(x)} values but {len(names)} labels; give one label per value")
    groups: dict[Hashable, list[float]] = {}
    for value, name in zip(x.tolist(), names, strict=True):
        if not math.isnan(value):
            groups.setdefault(name, []).append(value)
    return groups


def _means_by_label(values: Values, labels: Labels) -> dict[Hashable, tuple[float, int]]:
    """label -> (mean, number of values)."""
    return {name: (float(np.mean(x)), len(x)) for name, x in _grouped(values, labels).items()}


def _counts_by_label(hits: Values, labels: Labels) -> dict[Hashable, tuple[float, int]]:
    """label -> (hits, answers)."""
    groups = _grouped(hits, labels)
    wrong = next((v for x in groups.values() for v in x if v not in (0, 1)), None)
    if wrong is not None:
        raise InputError(f"rate: a hit is 0 or 1, got {wrong:g}; compare with a threshold first")
    return {name: (sum(x), len(x)) for name, x in groups.items()}


def _counts(hits: Values, labels: Labels) -> tuple[np.ndarray, np.ndarray]:
    """Hits and answers per label, each (n_labels,) float."""
    pairs = np.array(list(_counts_by_label(hits, labels).values()), dtype=float).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def _common(
    a: dict[Hashable, tuple[float, int]], b: dict[Hashable, tuple[float, int]]
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray], list[Hashable]]:
    """Both columns of a and of b at the labels they share, and those labels, sorted."""
    labels = sorted(a.keys() & b.keys(), key=repr)
    columns = [np.array([side[name] for name in labels], dtype=float).reshape(-1, 2).T for side in (a, b)]
    return (columns[0][0], columns[0][1]), (columns[1][0], columns[1][1]), labels
