"""Rates of hits (0 or 1): over answers, over questions, over questions and training runs; their differences and ratios."""

from __future__ import annotations

from typing import Any

import numpy as np

from convergent.core.ids import seed
from convergent.stats.values import (
    LEVEL,
    OVER_ANSWERS,
    OVER_QUESTIONS,
    Interval,
    Labels,
    Values,
    check_count,
    common,
    counts,
    counts_by_label,
    t_quantile,
    undefined,
    z_quantile,
)  # fmt: skip

PRIOR_ICC = 0.2
"""Correlation of hits within a question that is assumed while hits are few. EM in 16 released organisms: median 0.12,
quartiles 0.09 and 0.17, largest 0.38."""
PRIOR_RUN_ICC = 0.02
"""The same within a training run. One recipe over four seeds gave 8 to 15.5 % EM, a correlation of about 0.01."""
PRIOR_HITS = 5
"""Weight of the assumed correlation, in hits: with 5 hits half of the estimate is assumed, with 80 a seventeenth."""
SMALL_N = 40
"""Below this many answers `rate` is exact."""


def wilson(k: int, n: int, level: float = LEVEL) -> Interval:
    """Wilson score interval of k hits in n answers (Wilson 1927)."""
    check_count(k, n)
    low, high = wilson_bounds(k / n, n, z_quantile(level)) if n else (np.nan, np.nan)
    return Interval(k / n if n else np.nan, float(low), float(high), n, "Wilson", OVER_ANSWERS)


def clopper_pearson(k: int, n: int, level: float = LEVEL) -> Interval:
    """Exact interval of k hits in n answers (Clopper and Pearson 1934): never under-covers; for small n."""
    from scipy.special import betaincinv

    check_count(k, n)
    tail = (1 - level) / 2
    low = np.nan if not n else betaincinv(k, n - k + 1, tail) if k else 0.0
    high = np.nan if not n else betaincinv(k + 1, n - k, 1 - tail) if k < n else 1.0
    return Interval(k / n if n else np.nan, float(low), float(high), n, "Clopper-Pearson", OVER_ANSWERS)


def clustered_rate(hits: Values, clusters: Labels, level: float = LEVEL) -> Interval:
    """Rate of `hits` (0 or 1) with an interval over questions; always within [0, 1].

    Wilson's interval at the effective number of answers, n / design effect, with the t quantile of G - 1 degrees of
    freedom in place of the normal one. The design effect comes from the spread between questions (linearised variance,
    as for a survey), is never below 1, and leans on PRIOR_ICC while hits are few: no hits in 400 answers say little
    about an unasked question. Chosen over the percentile bootstrap because that covers 80 to 88 % with 8 questions.
    """
    k, n = counts(hits, clusters)
    total = int(n.sum())
    if len(n) < 2:
        return undefined(float(k.sum() / total) if total else np.nan, total, "needs two questions", len(n))
    low, high = clustered_bounds(k, n, level)
    method = "Wilson at the effective number of answers, t quantile"
    return Interval(float(k.sum() / total), float(low), float(high), total, method, OVER_QUESTIONS, len(n))


def bootstrap_rate(
    hits: Values, clusters: Labels, resamples: int = 4000, name: str = "rate", level: float = LEVEL
) -> Interval:
    """Rate with a percentile bootstrap over questions, seeded by `name`. Covers too little below some 20 questions."""
    k, n = counts(hits, clusters)
    total = int(n.sum())
    if len(n) < 2:
        return undefined(float(k.sum() / total) if total else np.nan, total, "needs two questions", len(n))
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
    (kb, nb), (ko, no), _ = common(counts_by_label(base, clusters_base), counts_by_label(other, clusters_other))
    total = int(nb.sum() + no.sum())
    method = "clustered interval of other's share of all hits"
    if len(nb) < 2 or not kb.sum():
        why = "needs two questions in common" if len(nb) < 2 else "base has no hits"
        return undefined(np.nan, total, f"{method}: {why}", len(nb))
    scale = nb.sum() / no.sum()
    low, high = clustered_bounds(ko, ko + kb, level)
    reduction = 1 - scale * ko.sum() / kb.sum()
    if np.count_nonzero(ko + kb) < 2:
        return undefined(float(reduction), total, f"{method}: all hits in one question", len(nb))
    bound = 1 - scale * high / (1 - high) if high < 1 else -np.inf
    return Interval(
        float(reduction), float(bound), float(1 - scale * low / (1 - low)), total, method, OVER_QUESTIONS, len(nb)
    )

def wilson_bounds(p: Any, n: Any, q: Any) -> tuple[Any, Any]:
    """Wilson's bounds for rate p in n answers at quantile q, elementwise; exactly 0 or 1 where p is."""
    centre = (p + q * q / (2 * n)) / (1 + q * q / n)
    half = q / (1 + q * q / n) * np.sqrt(p * (1 - p) / n + q * q / (4 * n * n))
    low = np.where(np.equal(p, 0), 0.0, np.clip(centre - half, 0, 1))
    return low, np.where(np.equal(p, 1), 1.0, np.clip(centre + half, 0, 1))


def clustered_bounds(k: np.ndarray, n: np.ndarray, level: float) -> tuple[Any, Any]:
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
    return wilson_bounds(p, total / effect, t_quantile(g - 1, level))




def rate(k: int, n: int, level: float = LEVEL) -> Interval:
    """Rate of k hits in n answers to these questions: exact (Clopper-Pearson) below SMALL_N answers, Wilson from there on."""
    return clopper_pearson(k, n, level) if n < SMALL_N else wilson(k, n, level)


def paired_rate_difference(hits_a: Values, hits_b: Values, clusters_a: Labels, clusters_b: Labels, level: float = LEVEL) -> Interval:
    """Rate of a minus rate of b over questions, paired by question, for hits that may be rare or none.

    Square-and-add from the two clustered rates with their correlation over questions (Newcombe 1998, paired method 10;
    Zou 2007). The correlation is taken one standard error (Fisher's z) below the one seen, never below 0, and leans on 0 while hits
    are few: without hits this is `rate_difference`. Questions that only one of them holds are left out.
    """
    (ka, na), (kb, nb), labels = common(counts_by_label(hits_a, clusters_a), counts_by_label(hits_b, clusters_b))
    total, g = int(na.sum() + nb.sum()), len(labels)
    if g < 2:
        return undefined(float(ka.sum() / na.sum() - kb.sum() / nb.sum()) if g else np.nan, total, "needs two questions in common", g)
    d, low, high = square_and_add(ka, na, kb, nb, level)
    return Interval(float(d), float(low), float(high), total, "Newcombe paired, from clustered rates and their correlation", OVER_QUESTIONS, g)


def square_and_add(ka: np.ndarray, na: np.ndarray, kb: np.ndarray, nb: np.ndarray, level: float = LEVEL) -> tuple[Any, Any, Any]:
    """Difference and bounds from hits and answers per question, each (..., n_questions); see `paired_rate_difference`."""
    pa, pb = ka.sum(-1) / na.sum(-1), kb.sum(-1) / nb.sum(-1)
    (la, ha), (lb, hb) = clustered_bounds(ka, na, level), clustered_bounds(kb, nb, level)
    phi = _correlation(ka, na, kb, nb)
    d = pa - pb
    below, above = (pa - la, hb - pb), (ha - pa, pb - lb)
    low = d - np.sqrt(np.maximum(below[0] ** 2 + below[1] ** 2 - 2 * phi * below[0] * below[1], 0))
    high = d + np.sqrt(np.maximum(above[0] ** 2 + above[1] ** 2 - 2 * phi * above[0] * above[1], 0))
    return d, np.maximum(low, -1), np.minimum(high, 1)


def _correlation(ka: np.ndarray, na: np.ndarray, kb: np.ndarray, nb: np.ndarray) -> Any:
    """Cautious correlation over questions of the two sides' deviations k - p n, (...,)."""
    ea = ka - (ka.sum(-1) / na.sum(-1))[..., None] * na
    eb = kb - (kb.sum(-1) / nb.sum(-1))[..., None] * nb
    scale = np.sqrt((ea**2).sum(-1) * (eb**2).sum(-1))
    r = np.where(scale > 0, (ea * eb).sum(-1) / np.where(scale > 0, scale, 1), 0.0)
    g = ka.shape[-1]
    cautious = np.tanh(np.maximum(np.arctanh(np.clip(r, 0, 0.999999)) - 1 / np.sqrt(max(g - 3, 1)), 0))
    fewer = np.minimum(np.minimum(ka.sum(-1), (na - ka).sum(-1)), np.minimum(kb.sum(-1), (nb - kb).sum(-1)))
    return cautious * fewer / (fewer + PRIOR_HITS)
