"""Bands that chance leaves: quantiles of draws made as if there were nothing to find, and a value beside them."""

from __future__ import annotations

from typing import Any

import numpy as np

from convergent.stats.values import LEVEL, OF_THIS_FILE, Interval

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
