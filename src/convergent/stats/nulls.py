"""What random draws of a null leave: bands of quantiles, and a value against one more draw.

A direction that means nothing is one more random direction. So a claim that a direction does more than random ones needs the spread between draws:
an interval over texts against a single draw holds for that draw alone, and lies on the claimed side by chance far too often.

    half width^2 = (half width over texts)^2 + (t(k - 1) sqrt(1 + 1 / k) sd)^2        sd: of the k draws' own means

The second term is the prediction bound of one more draw beside the mean of k; the first is the interval of the value minus that mean. Squares of half
widths are added (as in MOVER, Zou and Donner 2008), so the interval is never narrower than either. Draws are taken as normal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from convergent.errors import InputError
from convergent.stats.means import paired_difference
from convergent.stats.values import LEVEL, OF_THIS_FILE, OVER_DRAWS, Interval, Labels, Values, floats, t_interval, t_quantile

FEWEST_DRAWS = 3
"""Two draws have one degree of freedom, whose bound is 15 standard deviations wide."""

Band = tuple[Any, Any, Any]
"""low, mean, high; floats, or arrays with one entry per layer."""


def null_band(draws: Any, level: float = LEVEL) -> Band:
    """Quantiles and mean of draws (n_draws, ...): a value that is one more such draw lies outside with probability 1 - level.

    Quantiles at rank p (n + 1), so that this holds exactly for n + 1 a multiple of 2 / (1 - level), as 199 for 95 %; with too few draws
    for it the band ends at the outermost ones and is left too often. nan in a draw stays nan.
    """
    x = np.asarray(draws, dtype=float)
    tail = (1 - level) / 2
    low, high = np.quantile(x, [tail, 1 - tail], axis=0, method="weibull")
    return low, x.mean(axis=0), high


def against_band(value: float, band: Band, n: int, what: str) -> Interval:
    """A value minus the mean of its null band; the interval leaves 0 out exactly where the value lies outside of the band.

    `n`: answers behind the value; `what`: what was drawn, as in "199 random subsets". It says nothing beyond these answers.
    """
    low, mean, high = (float(b) for b in band)
    return Interval(value - mean, value - high, value - low, n, f"quantiles of {what}", OF_THIS_FILE)


def beyond_draws(difference: Interval, draws: Values, level: float = LEVEL) -> Interval:
    """The interval of a value minus the mean of k draws, made to hold against one more draw too.

    `difference`: over texts or questions, of that level; `draws` (k,): each draw's own value. Undefined stays undefined.
    Raises InputError for k < FEWEST_DRAWS.
    """
    x = floats(draws)
    if len(x) < FEWEST_DRAWS:
        raise InputError(f"draws: got {len(x)}; the spread between draws needs {FEWEST_DRAWS} or more")
    half = float(t_quantile(len(x) - 1, level) * math.sqrt(1 + 1 / len(x)) * x.std(ddof=1))
    low = difference.estimate - math.hypot(difference.estimate - difference.low, half)
    high = difference.estimate + math.hypot(difference.high - difference.estimate, half)
    over = f"{difference.generalises_over}, {OVER_DRAWS}"
    return replace(difference, low=low, high=high, method=f"{difference.method}; prediction from {len(x)} draws", generalises_over=over)


def draws_mean(draws: Values, level: float = LEVEL) -> Interval:
    """Mean of draws (k,) of one quantity, each its own value, with t over draws; undefined below two."""
    x = floats(draws)
    if len(x) < 2:
        return Interval(float(x[0]) if len(x) else math.nan, math.nan, math.nan, len(x), "undefined (one draw)", OVER_DRAWS)
    return Interval(*t_interval(x, level), len(x), f"t over {len(x)} draws", OVER_DRAWS)


def draws_mean_p(draws: Values, sign: int = 1) -> float:
    """p of "the mean over draws is not above 0" (sign 1) or "not below" (-1): below ONE_SIDED exactly where `draws_mean` lies on that side; nan below two."""
    from scipy.special import stdtr

    x = floats(draws)
    if len(x) < 2:
        return math.nan
    error = float(x.std(ddof=1)) / math.sqrt(len(x))
    mean = sign * float(x.mean())
    return float(stdtr(len(x) - 1, -mean / error)) if error > 0 else float(mean <= 0)


def draws_difference(a: Values, draws: Sequence[Values], clusters_a: Labels, clusters: Labels, level: float = LEVEL) -> Interval:
    """Mean of a minus the mean of k draws, paired by question, against one more draw: `beyond_draws` of `paired_difference`.

    draws (k, n): values of each draw, all with the labels `clusters` (n,).
    """
    mean, each = _draws(draws, clusters_a, clusters)
    return beyond_draws(paired_difference(a, mean, clusters_a, clusters, level), each, level)


def draws_p(a: Values, draws: Sequence[Values], clusters_a: Labels, clusters: Labels, sign: int = 1) -> float:
    """p of "a is not above one more draw" (sign 1) or "not below" (-1): below ONE_SIDED exactly where `draws_difference` lies on the claimed side.

    nan where that interval is undefined.
    """
    from scipy.optimize import brentq

    found = draws_difference(a, draws, clusters_a, clusters)
    if not found.defined:
        return math.nan
    size = abs(found.estimate)

    def short(log_p: float) -> float:
        """How far the interval of level 1 - 2 p ends short of 0."""
        made = draws_difference(a, draws, clusters_a, clusters, 1 - 2 * math.exp(log_p))
        return size - (made.high - made.low) / 2

    least, most = math.log(1e-12), math.log(0.5 - 1e-12)
    p = math.exp(least if short(least) > 0 else most if short(most) < 0 else brentq(short, least, most))
    return p if sign * found.estimate > 0 else 1 - p


def _draws(draws: Sequence[Values], clusters_a: Labels, clusters: Labels) -> tuple[np.ndarray, np.ndarray]:
    """(n,) mean over draws, and (k,) each draw's mean over the questions that are compared."""
    x = np.stack([floats(d) for d in draws])
    both = set(clusters_a)
    kept = np.array([label in both for label in clusters], dtype=bool)
    return x.mean(0), x[:, kept].mean(1) if kept.any() else np.full(len(x), math.nan)
