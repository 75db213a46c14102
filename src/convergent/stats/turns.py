"""One turn in a short sequence of scores, such as the sentences of an answer: where it is, and how often chance would show as clear a one.

    rise(k) = sqrt(k (n - k) / n) (mean of scores k.. - mean of scores ..k)          k = 1 .. n - 1
    T = max_k rise(k),  turn = argmax_k rise(k)

The weight makes rise(k) equally variable for all k if scores are alike (CUSUM; Page 1954). The null keeps the scores and shuffles their
order, so neither their level nor their spread can pass for a turn; up to EXACT scores all orders are tried. The order inside the two sides
changes nothing, so of n scores at best one in C(n, n/2) orders has the largest T: a short sequence can never show a turn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from convergent.core.ids import seed

EXACT = 6
"""Up to this many scores all orders are tried."""
SHUFFLES = 999
ALPHA = 0.1
"""A turn is seen at this p: five scores can have it, and 0.05 would take six."""


@dataclass(frozen=True)
class Turn:
    """The clearest rise of a sequence."""

    at: int
    """Number of scores before it, 1 to n - 1."""
    rise: float
    """T, in the unit of the scores."""
    expected: float
    """Mean of T over shuffles: what chance gives."""
    p: float
    """Share of orders with a T as large: the sequence's own counts as one."""
    false_alarms: float
    """Share of shuffles of this very sequence that have p <= ALPHA: at most ALPHA, less for short sequences."""

    @property
    def seen(self) -> bool:
        """Whether the rise is one that shuffles rarely have."""
        return self.p <= ALPHA + 1e-12


def find_turn(scores: Sequence[float], name: str = "turn") -> Turn | None:
    """The clearest rise, or None with fewer than two scores or a missing one; shuffles are seeded by `name`."""
    x = np.asarray(scores, dtype=float)
    if len(x) < 2 or np.isnan(x).any():
        return None
    n = len(x)
    if n <= EXACT:
        orders = x[np.array(list(permutations(range(n))))]
    else:
        rng = np.random.default_rng(seed("stats", "turn", name, n))
        orders = np.concatenate([x[None], rng.permuted(np.repeat(x[None], SHUFFLES, axis=0), axis=1)])
    rises = _rises(orders)
    best = rises.max(axis=1)
    own = rises[0]  # the first order is the sequence's own in both cases
    # Sums that differ by rounding alone are ties.
    p_of = 1 - np.searchsorted(np.sort(best), best - 1e-9 * np.maximum(1.0, np.abs(best))) / len(best)
    return Turn(int(own.argmax()) + 1, float(own.max()), float(best.mean()), float(p_of[0]), float(np.mean(p_of <= ALPHA + 1e-12)))


def _rises(orders: np.ndarray) -> np.ndarray:
    """(n_orders, n - 1) weighted rises at every place; orders (n_orders, n)."""
    n = orders.shape[1]
    k = np.arange(1, n)
    before = orders.cumsum(axis=1)[:, :-1]
    total = orders.sum(axis=1, keepdims=True)
    weighted: np.ndarray = np.sqrt(k * (n - k) / n) * ((total - before) / (n - k) - before / k)
    return weighted


def shortest_seen() -> int:
    """Scores from which on a turn can be seen at ALPHA."""
    return next(n for n in range(2, 20) if 1 / math.comb(n, n // 2) <= ALPHA)
