"""Means of scores and margins: over answers, over questions, over questions and training runs; their differences and ratios."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np

from convergent.errors import InputError
from convergent.stats.values import (
    LEVEL,
    OVER_ANSWERS,
    OVER_QUESTIONS,
    Interval,
    Labels,
    Values,
    common,
    floats,
    means_by_label,
    t_interval,
    t_quantile,
    undefined,
)  # fmt: skip


def iid_mean(values: Values, level: float = LEVEL) -> Interval:
    """Mean with a t interval over answers, as if they were independent."""
    x = floats(values)
    x = x[~np.isnan(x)]
    mean, low, high = t_interval(x, level)
    return Interval(mean, low, high, len(x), "t over answers", OVER_ANSWERS)


def clustered_mean(
    values: Values, clusters: Labels, level: float = LEVEL, bounds: tuple[float, float] | None = None
) -> Interval:
    """Mean of question means with a t interval of G - 1 degrees of freedom; every question weighs alike.

    `bounds`: the values' range, e.g. (0, 100); the interval is cut there.
    """
    by = means_by_label(values, clusters)
    mean, low, high = t_interval(np.array([m for m, _ in by.values()]), level)
    if bounds is not None and not np.isnan(low):
        low, high = max(low, bounds[0]), min(high, bounds[1])
    return Interval(mean, low, high, sum(n for _, n in by.values()), "t over question means", OVER_QUESTIONS, len(by))


def question_differences(
    a: Values, b: Values, clusters_a: Labels, clusters_b: Labels
) -> tuple[list[Hashable], np.ndarray]:
    """Labels of the questions that both hold, sorted, and per question mean(a) - mean(b), shape (n_questions,)."""
    (xa, _), (xb, _), labels = common(means_by_label(a, clusters_a), means_by_label(b, clusters_b))
    return labels, xa - xb


def paired_difference(a: Values, b: Values, clusters_a: Labels, clusters_b: Labels, level: float = LEVEL) -> Interval:
    """Mean of a minus mean of b, paired by question: t interval over the per-question differences.

    Questions that only one of them holds are left out. Undefined if all questions differ by exactly the same, as where
    neither has a hit: no spread is seen, so none can be given; use `rate_difference` there.
    """
    (xa, na), (xb, nb), labels = common(means_by_label(a, clusters_a), means_by_label(b, clusters_b))
    d = xa - xb
    n = int(na.sum() + nb.sum())
    if len(d) >= 2 and np.ptp(d) <= 1e-12 * np.abs([xa, xb]).max():  # equal but for rounding
        return undefined(float(d[0]), n, "t over differences per question: they are all equal", len(d))
    mean, low, high = t_interval(d, level)
    return Interval(mean, low, high, n, "t over differences per question", OVER_QUESTIONS, len(labels))


def unit_difference(a: Values, b: Values, units_a: Labels, units_b: Labels, level: float = LEVEL) -> Interval:
    """Mean of a minus b, paired by unit, e.g. (question, paraphrase, sample): t over units, for these questions alone.

    The secondary interval beside `paired_difference`. Raises InputError if a unit occurs twice in one of them.
    """
    means_a, means_b = means_by_label(a, units_a), means_by_label(b, units_b)
    for means in (means_a, means_b):
        twice = next((unit for unit, (_, n) in means.items() if n > 1), None)
        if twice is not None:
            raise InputError(f"paired difference: unit {twice!r} occurs twice; a unit names one answer")
    (xa, _), (xb, _), _ = common(means_a, means_b)
    mean, low, high = t_interval(xa - xb, level)
    return Interval(mean, low, high, 2 * len(xa), "t over paired answers", OVER_ANSWERS)


def relative_reduction(
    base: Values, other: Values, clusters_base: Labels, clusters_other: Labels, level: float = LEVEL
) -> Interval:
    """1 - mean(other) / mean(base), paired by question, by Fieller's theorem with G - 1 degrees of freedom.

    For measured values such as margins; for hits use `rate_reduction`. Undefined where base's own mean is not clear of
    zero.
    """
    (x, nx), (y, ny), _ = common(means_by_label(base, clusters_base), means_by_label(other, clusters_other))
    n, g = int(nx.sum() + ny.sum()), len(x)
    if g < 2 or x.mean() == 0:
        return undefined(np.nan, n, "Fieller: needs two questions in common and a base that is not 0", g)
    t2 = t_quantile(g - 1, level) ** 2
    sxx, sxy, _, syy = (np.cov(x, y) / g).ravel()
    # Ratios r for which mean(y) - r mean(x) is within t standard errors of 0: a r^2 - 2 b r + c <= 0.
    a, b, c = x.mean() ** 2 - t2 * sxx, x.mean() * y.mean() - t2 * sxy, y.mean() ** 2 - t2 * syy
    estimate = float(1 - y.mean() / x.mean())
    if a <= 0:
        return undefined(estimate, n, "Fieller: base is not clear of zero", g)
    root = np.sqrt(max(b * b - a * c, 0.0))
    return Interval(estimate, float(1 - (b + root) / a), float(1 - (b - root) / a), n, "Fieller", OVER_QUESTIONS, g)
