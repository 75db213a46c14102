"""When a curve changes its rate, or a path its direction: found in training curves, with the rate of false alarms.

A curve that rises evenly has increments of one mean. `change_point` looks for the moment that best splits them into two means and asks how often a
curve without any change looks as split: its own increments in random order, and surrogates whose neighbouring increments are as alike as its own (slow
noise makes false changes). A path in many dimensions is treated alike: two means are then two directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from convergent.core.ids import seed
from convergent.errors import InputError
from convergent.stats.rates import clopper_pearson
from convergent.stats.values import Interval, Values, floats

EDGE = 2
"""Increments that must lie on either side of a change."""
FEWEST = 8
"""Fewer increments than this show nothing: even of eight, changes of three standard deviations are found only once in 20 times."""
MOST_ALIKE = 0.9
"""Bound of the lag-1 correlation of surrogates."""


@dataclass(frozen=True)
class ChangePoint:
    """The best split of a curve or path, and how easily chance makes one as good."""

    index: int
    """The change lies at this point."""
    before: float
    """Mean rate before it, units of the curve per unit of time; of a path the speed, |mean rate|."""
    after: float
    cosine: float
    """Between the mean rates before and after: for a curve 1 or -1, for a path how far it turns."""
    statistic: float
    """Largest two-sample t over all splits."""
    threshold: float
    """What 5 % of curves without a change exceed: the larger of the two nulls."""
    shuffled: Interval
    """Share of random orders of the increments with a statistic as large (its interval is over the draws)."""
    correlated: Interval
    """The same for surrogates with lag-1 correlation `alike`."""
    alike: float

    @property
    def false_alarm(self) -> Interval:
        """The less favourable of the two nulls."""
        return max(self.shuffled, self.correlated, key=lambda i: i.estimate)


def change_point(times: Values, values: Values | Sequence[Any], name: str, draws: int = 2000) -> ChangePoint | None:
    """Where the rate of a curve changes most; None for fewer than FEWEST increments, or where no increment differs from another.

    times (n,) ascending; values (n,), or (n, n_dimensions) for a path. Increments over equal times are taken to have equal noise. `name` seeds the draws.
    """
    t, y = floats(times), floats(values)
    y = y[:, None] if y.ndim == 1 else y
    if t.ndim != 1 or y.ndim != 2 or len(t) != len(y) or not (np.diff(t) > 0).all():
        raise InputError("change point: times must ascend, with one value each")
    if not np.isfinite(y).all():
        raise InputError("change point: a value is missing; leave its time out")
    weights, rates = np.diff(t), np.diff(y, axis=0) / np.diff(t)[:, None]
    n = len(rates)
    if n < FEWEST or np.ptp(rates, axis=0).max() <= 1e-12 * np.abs(rates).max():
        return None
    if rates.shape[1] > n:  # n increments lie in n dimensions: the same inner products, and draws stay small
        u, s, _ = np.linalg.svd(rates, full_matrices=False)
        rates = u * s
    found, splits = _largest_t(rates[None], weights)
    k, seen = int(splits[0]), float(found[0])
    root = np.sqrt(weights)[:, None]
    a, b = (np.average(rates[part], axis=0, weights=weights[part]) for part in (slice(0, k), slice(k, n)))
    rest = (rates - np.where((np.arange(n) < k)[:, None], a, b)) * root
    alike = _correlation(rest)
    rng = np.random.default_rng(seed("stats", "change-point", name))
    centred = (rates - np.average(rates, axis=0, weights=weights)) * root
    orders = rng.permuted(np.tile(np.arange(n), (draws, 1)), axis=1)
    noise = rng.standard_normal((draws, *rates.shape)) * np.sqrt((rest**2).mean(0))
    for i in range(1, n):
        noise[:, i] = alike * noise[:, i - 1] + np.sqrt(1 - alike**2) * noise[:, i]
    nulls = [_largest_t(z / root, weights)[0] for z in (centred[orders], noise)]
    # Statistics that differ by rounding alone are ties.
    shares = [clopper_pearson(int((null >= seen * (1 - 1e-9)).sum()), draws) for null in nulls]
    threshold = max(float(np.quantile(null, 0.95)) for null in nulls)
    speeds = float(np.linalg.norm(a)), float(np.linalg.norm(b))
    cosine = float(a @ b) / max(speeds[0] * speeds[1], 1e-300)
    ends = speeds if y.shape[1] > 1 else (float(a[0]), float(b[0]))
    return ChangePoint(k, *ends, cosine, seen, threshold, shares[0], shares[1], alike)


def _largest_t(rates: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Over the splits of rates (draws, n, n_dimensions): the largest t of the difference of weighted means, and the number of increments before it.

    t^2 = (n - 2) * squared distance of the means, weighed, over the squared distances of increments from their means, summed over dimensions.
    """
    n = rates.shape[1]
    k = np.arange(EDGE, n - EDGE + 1)
    w, s = np.cumsum(weights), np.cumsum(rates * weights[:, None], axis=1)
    low, high = w[k - 1], w[-1] - w[k - 1]
    apart = (s[:, -1:] - s[:, k - 1]) / high[:, None] - s[:, k - 1] / low[:, None]
    between = (apart**2).sum(2) * low * high / w[-1]
    total = (rates**2 * weights[:, None]).sum((1, 2)) - (s[:, -1] ** 2).sum(1) / w[-1]
    within = np.maximum(total[:, None] - between, 1e-12 * total[:, None]) / (n - 2)
    t = np.sqrt(between / np.maximum(within, 1e-300))
    best = t.argmax(1)
    return t[np.arange(len(t)), best], k[best]


def _correlation(rest: np.ndarray) -> float:
    """Lag-1 correlation of residuals (n, n_dimensions) around two fitted means, on the safe side; 0 to MOST_ALIKE.

    Put right for what fitting two means takes away, and one standard error up: a correlation that is too low by chance would raise two or three times as
    many false alarms as it should (simulated, see docs/experiments/dynamics.md).
    """
    n = len(rest)
    raw = float((rest[1:] * rest[:-1]).sum() / max(float((rest**2).sum()), 1e-300))
    alike = min(max((n * raw + 2) / (n - 4), 0.0), MOST_ALIKE)
    return float(min(alike + np.sqrt((1 - alike**2) / n), MOST_ALIKE))


def local_cosine(points: Values | Sequence[Any], window: int) -> np.ndarray:
    """(n,) cosine between the way into each point of a path and the way out of it: cos(p_s - p_(s - window), p_(s + window) - p_s).

    points (n, n_dimensions). nan where the window does not fit, or where the path stands still.
    """
    p = floats(points)
    found = np.full(len(p), np.nan)
    for s in range(window, len(p) - window):
        into, out = p[s] - p[s - window], p[s + window] - p[s]
        lengths = float(np.linalg.norm(into) * np.linalg.norm(out))
        found[s] = float(into @ out) / lengths if lengths > 0 else np.nan
    return found
