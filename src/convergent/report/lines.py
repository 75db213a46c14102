"""Lines: one panel per quantity, side by side on wide pages and stacked on narrow ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator

from convergent.report import svg
from convergent.report.drawing import Figure, Legend
from convergent.report.svg import NARROW, STEPS, WIDE


@dataclass(frozen=True)
class Line:
    """One series of a line panel, with intervals (low, high) where there are any."""

    x: np.ndarray
    y: np.ndarray
    colour: str
    marker: str = ""
    dash: Any = "solid"
    hollow: bool = False
    faint: bool = False
    thin: tuple[np.ndarray, np.ndarray] | None = None
    band: tuple[np.ndarray, np.ndarray] | None = None


@dataclass(frozen=True)
class Plot:
    """One panel of a line figure."""

    title: str
    x_label: str
    lines: tuple[Line, ...]
    band: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
    """x, low, high of a shaded null band."""
    mark_x: float | None = None
    y_limits: tuple[float, float] | None = None


def css_dash(dash: Any) -> str:
    return "" if dash == "solid" else " ".join(f"{v:g}" for v in dash[1])


def line_figure(
    id_: str,
    title: str,
    caption: str,
    desc: str,
    plots: Sequence[Plot],
    columns: int,
    legend: Sequence[Legend],
    header: tuple[str, ...],
    rows: tuple[tuple[str, ...], ...],
) -> Figure:
    drawings = []
    for layout, width, count in (("wide", WIDE, min(columns, len(plots))), ("narrow", NARROW, 1)):
        height = 300 if layout == "wide" else 232
        lines = -(-len(plots) // count)
        draw = partial(_panels, plots=plots, columns=count, width=width, height=height)
        drawings.append(svg.render(f"{id_}-{layout}", title, desc, (width, lines * height), draw))
    return Figure(id_, title, caption, desc, drawings[0], drawings[1], tuple(legend), header, rows)


def _panels(fig: Canvas, plots: Sequence[Plot], columns: int, width: float, height: float) -> None:
    page = svg.canvas(fig)
    size = 13 if width == WIDE else 12
    cell = (width + 36) / columns
    for k, plot in enumerate(plots):
        x, y = (k % columns) * cell, (k // columns) * height
        ax = svg.axes(fig, x + 40, y + 34, cell - 36 - 44, height - 34 - 52)
        page.text(x, y + 14, plot.title, fontsize=size, fontweight="bold", va="center", color=svg.INK)
        middle = x + 40 + (cell - 80) / 2
        page.text(middle, y + height - 16, plot.x_label, fontsize=size - 1, va="center", ha="center", color=svg.MUTED)
        ax.grid(color=svg.LINE, lw=1)
        ax.set_axisbelow(True)
        ax.xaxis.set_major_locator(MaxNLocator(7 if cell > 400 else 5, integer=plot.x_label != "λ", steps=STEPS))
        ax.yaxis.set_major_locator(MaxNLocator(5, steps=STEPS))
        if plot.band:
            ax.fill_between(*plot.band, color=svg.BAND, lw=0)
        if plot.mark_x is not None:
            ax.axvline(float(plot.mark_x), color=svg.MUTED, lw=1, ls=(0, (4, 3)))
        for line in plot.lines:
            _line(ax, line)
        ax.margins(0.04, 0.08)
        if plot.y_limits:
            ax.set_ylim(*plot.y_limits)


def _line(ax: Axes, line: Line) -> None:
    for ends, lw, alpha in ((line.band, 7.0, 0.28), (line.thin, 1.5, 1.0)):
        if ends:
            x, y = segments(line.x, *ends)
            ax.plot(x, y, color=line.colour, lw=lw, alpha=alpha, solid_capstyle="butt")
    face = svg.PAPER if line.hollow else line.colour
    ax.plot(
        line.x,
        line.y,
        color=line.colour,
        lw=1 if line.faint else 2,
        alpha=0.35 if line.faint else 1.0,
        ls="solid" if line.faint else line.dash,
        marker=line.marker or None,
        ms=6.5,
        mfc=face,
        mec=line.colour,
        mew=1.6,
        markevery=1 if line.thin else max(1, len(line.x) // 8),
    )


def segments(at: Any, low: Any, high: Any) -> tuple[np.ndarray, np.ndarray]:
    """Where the intervals low..high at `at` (each (n,)) run, as one path with gaps: (3 n,) positions, (3 n,) values. Missing ends leave nothing."""
    at, low, high = (np.asarray(v, dtype=float) for v in (at, low, high))
    gap = np.full_like(at, np.nan)
    return np.column_stack([at, at, gap]).ravel(), np.column_stack([np.where(np.isnan(high), np.nan, low), np.where(np.isnan(low), np.nan, high), gap]).ravel()
