"""The interval of any statistic over questions, by leaving one question out at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from convergent.core.ids import seed
from convergent.stats.means import clustered_mean
from convergent.stats.values import LEVEL, Interval, undefined

Rows: TypeAlias = NDArray[np.intp]
MOST_GROUPS = 100
"""Beyond so many questions they are left out in random groups: as good an interval, and soon done."""
EDGE, MOST_ODDS = 1e-3, 500.0
"""How near to the end of its range a measure counts for its interval; and what `exp` can take."""


def jackknife(
    statistic: Callable[[Rows], float | str], labels: Sequence[Hashable] | None, low: float, high: float, level: float = LEVEL
) -> Interval | str:
    """Interval of any statistic over questions: t interval of its delete-one jackknife values (Tukey 1958), or why there is none.

    With G questions and the estimate e, question g has the value G e - (G - 1) e(without g); their spread is that of the estimate. Taken on the log odds
    of the range (`low`, `high`), so that bounds stay within and skew is met. Chosen over the percentile bootstrap, which covers too little with eight
    questions. `statistic` takes row numbers, and gives the reason where it is undefined; `labels`: the question of each row.
    """
    if labels is None:
        return "the rows name no question"
    groups = groups_of(labels)
    g = int(groups.max()) + 1 if len(groups) else 0
    if g < 2:
        return "needs two questions"
    every = statistic(np.arange(len(groups), dtype=np.intp))
    without = [statistic(np.flatnonzero(groups != i)) for i in range(g)]
    return leave_one_out(every, without, len(groups), low, high, level)


def leave_one_out(
    every: float | str, without: Sequence[float | str], n: int, low: float = -math.inf, high: float = math.inf, level: float = LEVEL
) -> Interval | str:
    """The interval of `jackknife` from values that are there already: of all questions, and `without` each of them in turn.

    For statistics of tensors too large to keep, whose values are computed where the tensors are. n: answers behind `every`.
    """
    lost = next((w for w in (every, *without) if isinstance(w, str)), None)
    if lost is not None:
        return f"undefined once a question is left out: {lost}"
    g = len(without)
    if g < 2:
        return "needs two questions"
    if not np.isfinite([every, *without]).all():
        return "undefined once a question is left out: not a number"

    def stretched(v: Any) -> Any:
        """Log odds of the place in the range: Fisher's z for a correlation, the logit for an AUC; a bias is far from its ends and stays."""
        if high > 1:
            return np.asarray(v, dtype=float)
        place = np.clip((np.asarray(v, dtype=float) - low) / (high - low), EDGE, 1 - EDGE)
        return np.log(place / (1 - place))

    def back(z: float) -> float:
        return min(max(z, low), high) if high > 1 else low + (high - low) / (1 + math.exp(-z))

    centre = float(stretched(every))
    values = g * centre - (g - 1) * stretched(without)
    if np.ptp(values) < 1e-12:
        return "the questions do not differ"
    # Around the estimate itself, not around its bias-corrected form: with few questions the correction is mostly noise.
    made = clustered_mean(values - values.mean() + centre, range(g), level)
    bounds = back(max(made.low, -MOST_ODDS)), back(min(made.high, MOST_ODDS))
    method = "t over questions, delete-one jackknife" + ("" if high > 1 else " of log odds")
    return replace(made, estimate=float(every), low=min(bounds[0], float(every)), high=max(bounds[1], float(every)), n=n, method=method)


def jackknife_each(statistic: Callable[[Rows], NDArray[np.float64]], labels: Sequence[Hashable], low: float, high: float) -> list[Interval]:
    """`jackknife` of each component of a statistic that is a vector, such as a cosine per layer; one call per question left out serves all.

    A component that is undefined, also with a question left out, has nan bounds and says why in `method`.
    """
    made: dict[bytes, NDArray[np.float64]] = {}

    def at(rows: Rows) -> NDArray[np.float64]:
        if rows.tobytes() not in made:
            made[rows.tobytes()] = np.asarray(statistic(rows), dtype=float)
        return made[rows.tobytes()]

    def component(k: int) -> Callable[[Rows], float | str]:
        return lambda rows: float(at(rows)[k]) if np.isfinite(at(rows)[k]) else "a class or a span is empty"

    every = at(np.arange(len(labels), dtype=np.intp))
    found = []
    for k, estimate in enumerate(every):
        one = jackknife(component(k), labels, low, high)
        found.append(undefined(float(estimate), len(labels), one, len(set(labels))) if isinstance(one, str) else one)
    return found


def groups_of(labels: Sequence[Hashable]) -> Rows:
    """Group number of each row: its question, or one of MOST_GROUPS random groups of questions."""
    names = sorted(set(labels), key=repr)
    order = np.random.default_rng(seed("agree", "groups")).permutation(len(names)) if len(names) > MOST_GROUPS else range(len(names))
    number = {name: int(k) % MOST_GROUPS for name, k in zip(names, order, strict=True)}
    return np.array([number[label] for label in labels], dtype=np.intp)
