"""Intervals over questions *and* training runs: every question is asked of every run (or organism), and both are draws.

An interval over questions alone holds for other questions put to these very organisms; a claim about a recipe needs the spread
between runs too. Cells (question, run) are treated by the two-way analysis of variance with random rows and columns.
Only questions that every run was asked are used.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from convergent.errors import InputError
from convergent.stats.rates import PRIOR_HITS, PRIOR_ICC, PRIOR_RUN_ICC, wilson_bounds
from convergent.stats.values import LEVEL, OVER_BOTH, Interval, Labels, Values, counts_by_label, means_by_label, t_quantile


def two_way_rate(hits: Values, questions: Labels, runs: Labels, level: float = LEVEL) -> Interval:
    """Rate of `hits` (0 or 1) over questions and runs, within [0, 1].

    Wilson's interval at the effective number of answers, as `clustered_rate`, with the two-way variance and its Satterthwaite degrees of freedom.
    While hits are few the design effect leans on PRIOR_ICC within questions and PRIOR_RUN_ICC within runs.
    """
    cells: dict[Any, tuple[float, int]] = {**counts_by_label(hits, _pairs(questions, runs))}
    rows, columns = _crossed(list(cells))
    total = int(sum(cells[q, r][1] for q in rows for r in columns))
    hit = sum(cells[q, r][0] for q in rows for r in columns)
    p = float(hit / total) if total else np.nan
    if len(rows) < 2 or len(columns) < 2:
        return _none(p, total, len(rows))
    n = np.array([[cells[q, r][1] for r in columns] for q in rows], dtype=float)
    k = np.array([[cells[q, r][0] for r in columns] for q in rows])
    low, high = two_way_rate_bounds(k, n, level)
    return Interval(p, float(low), float(high), total, "Wilson at the effective number of answers, two-way variance, t quantile", OVER_BOTH, len(rows))


def two_way_mean(values: Values, questions: Labels, runs: Labels, level: float = LEVEL, bounds: tuple[float, float] | None = None) -> Interval:
    """Mean of cell means over questions and runs, t interval with Satterthwaite degrees of freedom; cut at `bounds` if given."""
    cells: dict[Any, tuple[float, int]] = {**means_by_label(values, _pairs(questions, runs))}
    return _mean(cells, "t over cells of question and run, two-way variance", level, bounds)


def two_way_difference(
    a: Values, b: Values, questions_a: Labels, questions_b: Labels, runs_a: Labels, runs_b: Labels, level: float = LEVEL
) -> Interval:
    """Mean of a minus mean of b, paired by (question, run), over questions and runs. For means, margins and hits that are not rare."""
    x, y = means_by_label(a, _pairs(questions_a, runs_a)), means_by_label(b, _pairs(questions_b, runs_b))
    cells = {key: (x[key][0] - y[key][0], x[key][1] + y[key][1]) for key in x if key in y}
    return _mean(cells, "t over differences per cell of question and run, two-way variance", level, None)


def two_way_variance(x: np.ndarray) -> tuple[Any, Any]:
    """Variance of the grand mean and its degrees of freedom, from cell means x (..., n_questions, n_runs).

    Rows and columns are random: (MS_rows + MS_columns - MS_rest) / cells, never below what rows or columns alone give.
    """
    g, s = x.shape[-2:]
    grand = x.mean((-2, -1), keepdims=True)
    row, column = x.mean(-1, keepdims=True), x.mean(-2, keepdims=True)
    ms_row = s * ((row - grand) ** 2).sum((-2, -1)) / (g - 1)
    ms_column = g * ((column - grand) ** 2).sum((-2, -1)) / (s - 1)
    ms_rest = ((x - row - column + grand) ** 2).sum((-2, -1)) / ((g - 1) * (s - 1))
    both = ms_row + ms_column - ms_rest
    spread = ms_row**2 / (g - 1) + ms_column**2 / (s - 1) + ms_rest**2 / ((g - 1) * (s - 1))
    df = np.where(spread > 0, both**2 / np.where(spread > 0, spread, 1), g - 1)
    larger = np.maximum(ms_row, ms_column)
    df = np.where(both >= larger, df, np.where(ms_row >= ms_column, g - 1, s - 1))
    return np.maximum(both, larger) / (g * s), np.clip(df, 1, None)


def two_way_rate_bounds(k: np.ndarray, n: np.ndarray, level: float = LEVEL) -> tuple[Any, Any]:
    """Bounds from hits and answers per cell, each (..., n_questions, n_runs); see `two_way_rate`."""
    total, hits = n.sum((-2, -1)), k.sum((-2, -1))
    p = hits / total
    variance, df = two_way_variance(k / n)
    plain = p * (1 - p) / total
    seen = np.where(plain > 0, variance / np.where(plain > 0, plain, 1), 1.0)
    by_question, by_run = (n.sum(-1) ** 2).sum(-1) / total, (n.sum(-2) ** 2).sum(-1) / total
    assumed = 1 + (by_question - 1) * PRIOR_ICC + (by_run - 1) * PRIOR_RUN_ICC
    rare = np.minimum(hits, total - hits)
    weight = rare / (rare + PRIOR_HITS)
    effect = np.maximum(weight * seen + (1 - weight) * assumed, 1.0)
    return wilson_bounds(p, total / effect, t_quantile(weight * df + (1 - weight) * (k.shape[-2] - 1), level))


def _mean(cells: dict[Any, tuple[float, int]], method: str, level: float, bounds: tuple[float, float] | None) -> Interval:
    rows, columns = _crossed(list(cells))
    total = sum(cells[q, r][1] for q in rows for r in columns)
    x = np.array([[cells[q, r][0] for r in columns] for q in rows], dtype=float).reshape(len(rows), len(columns))
    mean = float(x.mean()) if x.size else np.nan
    if len(rows) < 2 or len(columns) < 2:
        return _none(mean, total, len(rows))
    variance, df = two_way_variance(x)
    if np.ptp(x) <= 1e-12 * np.abs(x).max():  # equal but for rounding
        return Interval(mean, np.nan, np.nan, total, "undefined (all cells are equal)", OVER_BOTH, len(rows))
    half = float(t_quantile(df, level) * np.sqrt(variance))
    low, high = mean - half, mean + half
    if bounds is not None:
        low, high = max(low, bounds[0]), min(high, bounds[1])
    return Interval(mean, low, high, total, method, OVER_BOTH, len(rows))


def _none(estimate: float, n: int, questions: int) -> Interval:
    why = "undefined (needs two questions that two runs were both asked)"
    return Interval(estimate, np.nan, np.nan, n, why, OVER_BOTH, questions)


def _pairs(questions: Labels, runs: Labels) -> list[tuple[Any, Any]]:
    questions, runs = list(questions), list(runs)
    if len(questions) != len(runs):
        raise InputError(f"statistics: {len(questions)} questions but {len(runs)} runs; give one of each per value")
    return list(zip(questions, runs, strict=True))


def _crossed(cells: list[tuple[Any, Any]]) -> tuple[list[Any], list[Any]]:
    """Questions that every run holds, and the runs, both sorted."""
    runs = sorted({r for _, r in cells}, key=repr)
    held = set(cells)
    questions = sorted({q for q, _ in cells}, key=repr)
    return [q for q in questions if all((q, r) in held for r in runs)], runs
