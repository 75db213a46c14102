"""What all statistics share: the `Interval`, quantiles, and answers gathered by label."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from convergent.errors import InputError

LEVEL = 0.95
OVER_ANSWERS = "answers to these questions"
OVER_QUESTIONS = "questions like these"
OVER_BOTH = "questions like these and training runs like these"
OVER_DRAWS = "random draws like these"
OF_THIS_FILE = "these answers"
"""A finite target: nothing beyond the file is claimed."""

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


def t_interval(x: np.ndarray, level: float) -> tuple[float, float, float]:
    """Mean and t bounds of x (n,); nan bounds below two values."""
    if len(x) < 2:
        return (float(x[0]) if len(x) else np.nan), np.nan, np.nan
    half = float(t_quantile(len(x) - 1, level) * x.std(ddof=1) / np.sqrt(len(x)))
    return float(x.mean()), float(x.mean() - half), float(x.mean() + half)


def t_quantile(df: Any, level: float) -> Any:
    from scipy.special import stdtrit  # the function behind scipy.stats.t.ppf, without the second that importing scipy.stats takes

    return stdtrit(df, (1 + level) / 2)


def z_quantile(level: float) -> float:
    from scipy.special import ndtri

    return float(ndtri((1 + level) / 2))


def undefined(estimate: float, n: int, why: str, clusters: int) -> Interval:
    return Interval(estimate, np.nan, np.nan, n, f"undefined ({why})", OVER_QUESTIONS, clusters)


def check_count(k: int, n: int) -> None:
    if not 0 <= k <= n:
        raise InputError(f"rate: {k} hits in {n} answers cannot be; hits are counted among the answers")


def floats(values: Values) -> np.ndarray:
    try:
        return np.asarray(values, dtype=float)
    except (TypeError, ValueError) as error:
        raise InputError(f"statistics: values must be numbers, {error}") from error


def grouped(values: Values, labels: Labels) -> dict[Hashable, list[float]]:
    x, names = floats(values), list(labels)
    if len(x) != len(names):
        raise InputError(f"statistics: {len(x)} values but {len(names)} labels; give one label per value")
    groups: dict[Hashable, list[float]] = {}
    for value, name in zip(x.tolist(), names, strict=True):
        if not math.isnan(value):
            groups.setdefault(name, []).append(value)
    return groups


def means_by_label(values: Values, labels: Labels) -> dict[Hashable, tuple[float, int]]:
    """label -> (mean, number of values)."""
    return {name: (float(np.mean(x)), len(x)) for name, x in grouped(values, labels).items()}


def counts_by_label(hits: Values, labels: Labels) -> dict[Hashable, tuple[float, int]]:
    """label -> (hits, answers)."""
    groups = grouped(hits, labels)
    wrong = next((v for x in groups.values() for v in x if v not in (0, 1)), None)
    if wrong is not None:
        raise InputError(f"rate: a hit is 0 or 1, got {wrong:g}; compare with a threshold first")
    return {name: (sum(x), len(x)) for name, x in groups.items()}


def counts(hits: Values, labels: Labels) -> tuple[np.ndarray, np.ndarray]:
    """Hits and answers per label, each (n_labels,) float."""
    pairs = np.array(list(counts_by_label(hits, labels).values()), dtype=float).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def common(
    a: dict[Hashable, tuple[float, int]], b: dict[Hashable, tuple[float, int]]
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray], list[Hashable]]:
    """Both columns of a and of b at the labels they share, and those labels, sorted."""
    labels = sorted(a.keys() & b.keys(), key=repr)
    columns = [np.array([side[name] for name in labels], dtype=float).reshape(-1, 2).T for side in (a, b)]
    return (columns[0][0], columns[0][1]), (columns[1][0], columns[1][1]), labels
