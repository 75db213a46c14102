"""A heat map of a chapter's grid: every cell with its number, two colours that meet at a middle, empty cells crossed out.

Blue and orange are told apart by every kind of colour blindness; opacity over the page's own ground carries the size, so light, dark and print
need no palettes of their own. Too many columns for the width are set in blocks under each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from textwrap import wrap
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import Rectangle

from convergent.core.chapter import Grid
from convergent.report import svg
from convergent.report.drawing import Legend
from convergent.report.svg import NARROW, WIDE
from convergent.report.text import missing, number

PALEST, DARKEST = 0.05, 0.55
"""Opacity of a cell at the middle and at the value farthest from it; its number stays readable on both grounds."""
BROADEST = 104
CHARACTER = 0.6
"""Width of a character in font sizes, on the wide side."""


def legend(grid: Grid) -> list[Legend]:
    """What the two colours mean, and the crossed cells where there are any."""
    values = _values(grid)
    known = values[np.isfinite(values)]
    found: list[Legend] = []
    if grid.middle is None:
        found = [Legend("Darker: larger", svg.css(svg.REAL), "heat", False, "none")]
    else:
        middle = f"{grid.middle:g}".replace("-", "−")
        sides = ((known < grid.middle, f"below {middle}", svg.CONTROL), (known > grid.middle, f"above {middle}", svg.REAL))
        found = [Legend(text, svg.css(colour), "heat", False, "none") for some, text, colour in sides if some.any()]
    if len(known) < values.size:
        found.append(Legend("not measured", svg.css(svg.MUTED), "cross", False, "none"))
    return found


def describe(grid: Grid) -> str:
    """The grid in a sentence or two, for who cannot see it."""
    values = _values(grid)
    said = f"{len(grid.rows)} rows, {len(grid.columns)} columns. "
    if not np.isfinite(values).any():
        return said + "Nothing was measured."
    places = [np.unravel_index(f(values), values.shape) for f in (np.nanargmin, np.nanargmax)]
    low, high = (f"{number(values[i, j], grid.digits)} ({grid.rows[i]}, {grid.columns[j]})" for i, j in places)
    return said + f"Lowest {low}, highest {high}."


def draw_grid(id_: str, grid: Grid, desc: str) -> tuple[str, str]:
    """The SVG for wide and for narrow pages."""
    both = []
    for layout, wide in (("wide", True), ("narrow", False)):
        size, draw = _layout(grid, wide)
        both.append(svg.render(f"{id_}-{layout}", grid.title, desc + " All values are in the table below.", size, draw))
    return both[0], both[1]


def _values(grid: Grid) -> np.ndarray:
    known = [[float("nan") if missing(v) or not np.isfinite(v) else float(v) for v in row] for row in grid.values]
    return np.array(known, dtype=float).reshape(len(grid.rows), len(grid.columns))


def _layout(grid: Grid, wide: bool) -> tuple[tuple[float, float], Any]:
    width, font = (WIDE, 12.5) if wide else (NARROW, 11.0)
    longest = max((len(r) for r in grid.rows), default=1)
    left = min(330.0, longest * CHARACTER * font + 12) if wide else 0.0
    values = _values(grid)
    digits = max((len(number(v, grid.digits)) for v in values.ravel() if np.isfinite(v)), default=1)
    narrowest = max(30.0, digits * CHARACTER * font + 8)
    columns = max(1, len(grid.columns))
    per_block = max(1, min(columns, int((width - left) // narrowest)))
    blocks = -(-columns // per_block)
    per_block = -(-columns // blocks)  # even blocks
    each = min(BROADEST if wide else width / 3, (width - left) / per_block)
    room = max(3, int((each - 6) / (CHARACTER * font)))
    longest_word = max((len(w) for c in grid.columns for w in c.split()), default=1)
    heads = [wrap(c, room) or [""] for c in grid.columns]
    upright = longest_word > room or max((len(h) for h in heads), default=1) > 3
    if upright:
        heads = [[_cut(c, 24)] for c in grid.columns]
    step = 28.0 if wide else 42.0
    tops, top = [], 0.0  # of the cells of each block; the heads stand above them
    for first in range(0, columns, per_block):
        mine = heads[first : first + per_block]
        top += max((len(h[0]) for h in mine), default=1) * CHARACTER * font + 12 if upright else max(map(len, mine), default=1) * 1.25 * font + 10
        tops.append(top)
        top += step * len(grid.rows) + 14
    return (width, top), partial(_draw, grid=grid, values=values, heads=heads, plan=(left, each, font, step, tops, per_block, upright, wide))


def _draw(fig: Canvas, grid: Grid, values: np.ndarray, heads: Sequence[Sequence[str]], plan: tuple[Any, ...]) -> None:
    left, each, font, step, tops, per_block, upright, wide = plan
    page = svg.canvas(fig)
    strength = _strengths(values, grid.middle)
    bar = step - 3 if wide else 22.0
    for first, top in zip(range(0, len(grid.columns), per_block), tops, strict=True):
        shown = range(first, min(first + per_block, len(grid.columns)))
        for j in shown:
            x = left + (j - first + 0.5) * each
            if upright:
                page.text(x, top - 6, heads[j][0], fontsize=font - 0.5, rotation=90, va="bottom", ha="center", color=svg.INK)
            for n, line in enumerate([] if upright else heads[j]):
                at = top - 6 - 1.25 * font * (len(heads[j]) - n - 0.5)
                page.text(x, at, line, fontsize=font - 0.5, va="center", ha="center", color=svg.INK)
        for i, name in enumerate(grid.rows):
            y = top + step * (i + 0.5) + (0 if wide else 8)
            most = int((left - 8) / (CHARACTER * font)) if wide else 56
            page.text(0, y if wide else y - 19, _cut(name, most), fontsize=font, va="center", color=svg.INK)
            for j in shown:
                _cell(page, left + (j - first) * each, y, each, bar, float(values[i, j]), strength[i, j], grid.digits, font)


def _strengths(values: np.ndarray, middle: float | None) -> np.ndarray:
    """-1..1: distance from the middle in units of the farthest value; 0..1 from the lowest to the highest where there is no middle."""
    known = values[np.isfinite(values)]
    if not known.size:
        return values
    if middle is None:
        return np.asarray((values - known.min()) / (float(np.ptp(known)) or 1.0))
    return np.asarray((values - middle) / (float(np.abs(known - middle).max()) or 1.0))


def _cell(page: Axes, x: float, y: float, width: float, height: float, value: float, strength: float, digits: int, font: float) -> None:
    if missing(value):
        page.add_patch(Rectangle((x + 1.5, y - height / 2 + 0.5), width - 3, height - 1, fill=False, edgecolor=svg.LINE, lw=1))
        page.plot([x + 1.5, x + width - 1.5], [y + height / 2 - 0.5, y - height / 2 + 0.5], color=svg.LINE, lw=1)
        return
    alpha = PALEST + (DARKEST - PALEST) * abs(strength)
    colour = svg.REAL if strength >= 0 else svg.CONTROL
    page.add_patch(Rectangle((x + 1, y - height / 2), width - 2, height, facecolor=colour, edgecolor="none", alpha=alpha))
    page.text(x + width / 2, y, number(value, digits), fontsize=font - 0.5, va="center", ha="center", color=svg.INK)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: max(1, most - 1)].rstrip() + "…"
