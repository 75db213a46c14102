"""A grid of rates: one row per condition, one column per threshold, each cell with its number; darker is more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from textwrap import shorten
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import Rectangle

from convergent.report import svg
from convergent.report.drawing import Figure
from convergent.report.results import GROUPS, Results, core, heading
from convergent.report.svg import NARROW, WIDE
from convergent.report.text import missing, number, rate, short_labels, spread

PALEST, DARKEST = 0.04, 0.5
"""Opacity of a cell at 0 and at the largest rate of the grid; the number in it stays readable."""
NARROW_COLUMNS = 5
"""Thresholds that a narrow page has room for."""


def sensitivity(results: Results) -> Figure:
    """EM of every condition over a grid of thresholds: how much of a rate is the threshold."""
    s, c, title = results.sensitivity, results.conditions, "EM and its threshold"
    s = s[s["condition"].isin(c["name"])]
    if s.empty:
        return Figure("fig-sensitivity", title)
    cells = s.pivot_table(index="condition", columns="aligned_below", values="em", dropna=False)
    cells["n"] = s.groupby("condition")["n_valid"].first()
    cells = cells.reindex(c["name"])
    columns = [float(x) for x in sorted(s["aligned_below"].unique())]
    mark, coherent = results.thresholds["aligned"], s["coherent_above"].iloc[0]
    labels = dict(zip(c["name"], c["label"], strict=True))
    least, most = (dict(zip(map(str, cells.index), cells[columns[k]].astype(float).tolist(), strict=True)) for k in (0, -1))
    mover = max(least, key=lambda name: -1.0 if missing(most[name] - least[name]) else most[name] - least[name])
    desc = (
        f"{len(c)} conditions as rows, {len(columns)} thresholds as columns. The rate of {labels[mover]} moves most, from "
        f"{short_percent(least[mover])} to {short_percent(most[mover])} %."
    )
    caption = (
        f"EM: aligned below the threshold at the head of the column and coherent above {coherent:g}, in per cent of the {spread(cells['n'])} answers of "
        f"each condition that have both scores (n). Framed: {mark:g}, the threshold of every other figure here. A difference between conditions that is there "
        f"in one column only is one of the threshold. {desc} The 95 % interval over questions of each cell is in the table."
    )
    few = columns[:: max(1, -(-len(columns) // NARROW_COLUMNS))]
    shown = core(c)
    if len(shown) < len(c):
        caption += f" Drawn: {len(shown)} of {len(c)} conditions, the others in the table."
    drawings = [
        grid_drawing("fig-sensitivity", title, desc + " All values are in the table below.", shown, cells, wanted, mark, wide)
        for wanted, wide in ((columns, True), (few, False))
    ]
    lookup = s.set_index(["condition", "aligned_below"])
    rows = []
    for name in c["name"]:
        if name not in lookup.index.get_level_values(0):
            continue
        parts = [lookup.loc[(name, x)] for x in columns]
        rows.append((labels[name], number(parts[0]["n_valid"], 0), *(rate(p) for p in parts)))
    header = ("Condition", "n", *(f"below {x:g}" for x in columns))
    return Figure("fig-sensitivity", title, caption, desc, drawings[0], drawings[1], (), header, tuple(rows))


def grid_drawing(
    id_: str, title: str, desc: str, conditions: pd.DataFrame, cells: pd.DataFrame, columns: Sequence[float], mark: float | None, wide: bool
) -> str:
    """The SVG of a grid. `conditions`: name, label, group; `cells`: (name, column) -> rate in 0..1, and `n` per name; `mark`: the column in use."""
    height, draw = _grid(conditions, cells, columns, mark, wide)
    return svg.render(f"{id_}-{'wide' if wide else 'narrow'}", title, desc, (WIDE if wide else NARROW, height), draw)


def short_percent(rate: float) -> str:
    """A rate as a whole percentage; what is there and below a half is "<1"."""
    if missing(rate):
        return "–"
    return "<1" if 0 < rate < 0.005 else number(100 * rate, 0)


def _grid(
    conditions: pd.DataFrame, cells: pd.DataFrame, columns: Sequence[float], mark: float | None, wide: bool
) -> tuple[float, Callable[[Canvas], None]]:
    width = WIDE if wide else NARROW
    left, top, step, head, count = (330, 48, 26, 38, 56) if wide else (0, 46, 44, 40, 46)
    bar = step - 3 if wide else 24
    each = (width - left - count) / len(columns)
    order = [g for g in GROUPS if (conditions["group"] == g).any()] + [g for g in dict.fromkeys(conditions["group"]) if g not in GROUPS]
    y, heads, places = float(top), [], {}
    for group in order:
        heads.append((y + head - 14, heading(group)))
        y += head
        for i in conditions.index[conditions["group"] == group]:
            places[i] = y + step / 2 + (0 if wide else 8)
            y += step
    draw = partial(_draw, conditions, cells, columns, mark, wide, heads, places, (width, left, each, bar, y))
    return y + 8, draw


def _draw(
    conditions: pd.DataFrame, cells: pd.DataFrame, columns: Sequence[float], mark: float | None, wide: bool, heads: list[tuple[float, str]],
    places: dict[int, float], size: tuple[float, float, float, float, float], fig: Canvas,
) -> None:  # fmt: skip
    width, left, each, bar, bottom = size
    page, font = svg.canvas(fig), 13 if wide else 11.5
    largest = max((float(v) for v in cells[list(columns)].to_numpy().ravel() if not missing(v)), default=0.0) or 1.0
    page.text(left, 12, "EM, % of valid answers, for aligned below", fontsize=font, fontweight="bold", va="center", color=svg.INK)
    page.text(width, 34, "n", fontsize=font - 1, va="center", ha="right", color=svg.MUTED)
    for k, column in enumerate(columns):
        bold = "bold" if column == mark else "normal"
        page.text(left + (k + 0.5) * each, 34, f"{column:g}", fontsize=font - 0.5, va="center", ha="center", color=svg.INK, fontweight=bold)
    for at, text in heads:
        page.text(0, at, shorten(str(text), 90 if wide else 58, placeholder="…"), fontsize=font, fontweight="bold", va="center", color=svg.INK)
        page.plot([0, width], [at + 13, at + 13], color=svg.LINE, lw=1)
    labels = short_labels([str(conditions.at[i, "label"]) for i in places], 46 if wide else 56)
    for (i, at), label in zip(places.items(), labels, strict=True):
        page.text(0, at if wide else at - 20, label, fontsize=font, va="center", color=svg.INK)
        row: Any = cells.loc[str(conditions.at[i, "name"])]
        page.text(width, at, number(row["n"], 0), fontsize=font - 1, va="center", ha="right", color=svg.MUTED)
        for k, column in enumerate(columns):
            _cell(page, left + k * each, at, each, bar, float(row[column]), largest, font)
    if mark is not None and mark in columns and places:
        x = left + list(columns).index(mark) * each
        # One frame where labels stand beside the cells; where they stand above, it would run through them.
        frames = [(22.0, bottom - 22)] if wide else [(22.0, 22.0), *((at - bar / 2, bar) for at in places.values())]
        for top, height in frames:
            page.add_patch(Rectangle((x + 0.5, top), each - 1, height, fill=False, edgecolor=svg.INK, lw=1.4, clip_on=False))


def _cell(page: Axes, x: float, y: float, width: float, height: float, rate: float, largest: float, font: float) -> None:
    if not missing(rate):
        alpha = PALEST + (DARKEST - PALEST) * rate / largest
        page.add_patch(Rectangle((x + 1, y - height / 2), width - 2, height, facecolor=svg.REAL, edgecolor="none", alpha=alpha, clip_on=False))
    page.text(x + width / 2, y, short_percent(rate), fontsize=font - 0.5, va="center", ha="center", color=svg.INK)
