"""Dots with intervals: one row per condition, one panel per quantity.

Narrow pages get the label above its row. An estimate that is missing leaves the words "not measured" in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from textwrap import shorten
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator

from convergent.report import svg
from convergent.report.drawing import Figure, Legend
from convergent.report.lines import segments
from convergent.report.results import GROUPS, ROLES, heading
from convergent.report.svg import NARROW, STEPS, WIDE
from convergent.report.text import NOT_MEASURED, interval, missing, number, short_labels

ROLE_STYLE = {
    "real": (svg.REAL, "o", False),
    "control": (svg.CONTROL, "D", True),
    "baseline": (svg.BASELINE, "s", False),
}
"""Role -> colour, marker, hollow: told apart without colour."""


@dataclass(frozen=True)
class Panel:
    """One quantity of a dot figure: a column, its two intervals (column stems), and how it is printed."""

    title: str
    short: str
    column: str
    thin: str = ""
    band: str = ""
    scale: float = 1.0
    digits: int = 1
    zero: bool = False
    """Whether the axis must hold zero."""


def dot_figure(id_: str, title: str, frame: pd.DataFrame, panels: Sequence[Panel], caption: str) -> Figure:
    """The figure of `frame` (conditions) with one column per panel; says so if there is nothing to draw."""
    if frame.empty:
        return Figure(id_, title)
    header = ["Condition", "Group", "Role"]
    for p in panels:
        header += [
            p.title,
            *(["95 % independent"] if p.thin else []),
            *(["95 % clustered" if p.thin else "95 %"] if p.band else []),
        ]
    rows = []
    for row in frame.to_dict("records"):
        cells = [row["label"], heading(row["group"]), ROLES[row["role"]]]
        for p in panels:
            cells.append(number(scaled(row, p.column, p), p.digits))
            for stem in filter(None, (p.thin, p.band)):
                cells.append(interval(row[f"{stem}_low"], row[f"{stem}_high"], p.digits, p.scale))
        rows.append(tuple(cells))
    first = panels[0]
    known = frame[frame[first.column].notna()]
    desc = f"{len(frame)} conditions as rows, {len(panels)} quantities as columns."
    if len(known):
        by_value = known.sort_values(first.column)
        low, high = by_value.iloc[0], by_value.iloc[-1]
        desc += (
            f" {first.title}: lowest {number(low[first.column], first.digits)} ({low['label']}), highest "
            f"{number(high[first.column], first.digits)} ({high['label']})."
        )
    drawings = []
    for layout in ("wide", "narrow"):
        height, draw = _dots(frame, panels, layout == "wide")
        width = WIDE if layout == "wide" else NARROW
        drawings.append(
            svg.render(f"{id_}-{layout}", title, desc + " All values are in the table below.", (width, height), draw)
        )
    roles = [r for r in ROLES if (frame["role"] == r).any()]
    legend = tuple(Legend(ROLES[r], svg.css(s[0]), s[1], s[2], "none") for r in roles for s in [ROLE_STYLE[r]])
    return Figure(id_, title, caption, desc, drawings[0], drawings[1], legend, tuple(header), tuple(rows))


def scaled(row: Any, column: str, panel: Panel) -> float:
    return float(row[column]) * panel.scale


def _dots(frame: pd.DataFrame, panels: Sequence[Panel], wide: bool) -> tuple[float, Callable[[Canvas], None]]:
    """Height and drawing of a dot figure. Narrow pages get the label above its row."""
    width = WIDE if wide else NARROW
    left, top, step, head, value = (310, 52, 25, 38, 46) if wide else (0, 44, 40, 40, 39)
    size = 13 if wide else 11.5
    gap = 24 if wide else 14
    track = (width - left - gap * (len(panels) - 1)) / len(panels) - value
    order = [g for g in GROUPS if (frame["group"] == g).any()] + [
        g for g in dict.fromkeys(frame["group"]) if g not in GROUPS
    ]
    y, heads, places = float(top), [], {}
    for group in order:
        heads.append((y + head - 14, heading(group)))
        y += head
        for i in frame.index[frame["group"] == group]:
            places[i] = y + step / 2 + (0 if wide else 8)
            y += step
    height = y + 10

    def draw(fig: Canvas) -> None:
        page = svg.canvas(fig)
        page.set_zorder(3)
        back = {"facecolor": svg.PAPER, "edgecolor": "none", "pad": 1.5}  # grid lines pass behind texts
        for at, text in heads:
            label = shorten(str(text), 90 if wide else 58, placeholder="…")
            page.text(0, at, label, fontsize=size, fontweight="bold", va="center", color=svg.INK, bbox=back)
            page.plot([0, width], [at + 13, at + 13], color=svg.LINE, lw=1)
        labels = short_labels([str(frame.at[i, "label"]) for i in places], 46 if wide else 56)
        for at, label in zip(places.values(), labels, strict=True):
            page.text(
                0,
                at if wide else at - 17,
                label,
                fontsize=size,
                va="center",
                color=svg.INK,
                bbox=None if wide else back,
            )
        baseline = frame[frame["role"] == "baseline"].head(1)
        for k, panel in enumerate(panels):
            x = left + k * (track + value + gap)
            ax = svg.axes(fig, x, top, track, height - top - 4)
            ax.set_ylim(height - 4, top)
            ax.set_yticks([])
            ax.set_xlim(*_limits(frame, panel))
            ax.xaxis.set_major_locator(MaxNLocator(4 if wide else 2, steps=STEPS))
            ax.xaxis.tick_top()
            ax.tick_params(labelsize=12 if wide else 10.5)
            ax.grid(axis="x", color=svg.LINE, lw=1)
            ax.set_axisbelow(True)
            page.text(
                x,
                14,
                panel.title if wide else panel.short,
                fontsize=size if wide else 11,
                fontweight="bold",
                va="center",
                color=svg.INK,
            )
            if len(baseline) and not missing(baseline.iloc[0][panel.column]):
                ax.axvline(scaled(baseline.iloc[0], panel.column, panel), color=svg.BASELINE, lw=1, ls=(0, (4, 3)))
            _dots_of(ax, page, frame, panel, places, x, x + track + value, size)

    return height, draw


def _dots_of(
    ax: Axes, page: Axes, frame: pd.DataFrame, panel: Panel, places: Mapping[Any, float], left: float, right: float, size: float
) -> None:
    """The estimates of one quantity with their intervals at the heights `places`, and their numbers at `right`; one path per role and kind."""
    for role, (colour, marker, hollow) in ROLE_STYLE.items():
        rows = [i for i in places if frame.at[i, "role"] == role]
        at, mine = np.array([places[i] for i in rows]), frame.loc[rows]
        for stem, lw, alpha in ((panel.band, 9.0, 0.28), (panel.thin, 1.6, 1.0)):
            if stem and rows and mine[[f"{stem}_low", f"{stem}_high"]].notna().all(axis=1).any():
                y, x = segments(at, *(mine[f"{stem}_{end}"].to_numpy(float) * panel.scale for end in ("low", "high")))
                ax.plot(x, y, color=colour, lw=lw, alpha=alpha, solid_capstyle="butt")
        values = mine[panel.column].to_numpy(float) * panel.scale
        face = svg.PAPER if hollow else colour
        ax.plot(values, at, marker, ms=7.5, mfc=face, mec=colour, mew=1.8, ls="none", clip_on=False, zorder=5)
        for y, v in zip(at, values, strict=True):
            if missing(v):
                page.text(left, y, NOT_MEASURED, fontsize=size - 1.5, va="center", color=svg.MUTED)
            else:
                page.text(right, y, number(v, panel.digits), fontsize=size - 0.5, va="center", ha="right", color=svg.INK)


def _limits(frame: pd.DataFrame, panel: Panel) -> tuple[float, float]:
    """An axis that holds every estimate and interval, with room at both ends."""
    columns = [panel.column] + [f"{s}_{end}" for s in (panel.thin, panel.band) if s for end in ("low", "high")]
    values = frame[columns].to_numpy(float) * panel.scale
    values = np.append(values[np.isfinite(values)], [0.0] if panel.zero else [])
    if not values.size:
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    room = 0.05 * (high - low) or 0.5
    return low - room, high + room
