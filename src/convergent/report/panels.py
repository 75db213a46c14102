"""The panels of a chapter's chart. Each is one drawing that serves every width: the page sets two beside each other, a phone one under the other.

Lines over a quantity, or, where x is a set of names, rows with dots and intervals, each name above its row so that none is cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from textwrap import wrap
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import ScaledTranslation

from convergent.core.chapter import Chart, Panel, Series
from convergent.report import svg
from convergent.report.drawing import Legend
from convergent.report.lines import css_dash, segments
from convergent.report.svg import STEPS
from convergent.report.text import missing, number

WIDTH, PLOT, LEFT = 440, 210, 46
"""Pixels: of a panel, of the height of its axes, and of the room for numbers beside them."""
TITLE, SMALL = 13, 12
MANY = 12
"""Points from which on intervals are a band along the line instead of a bar at each."""
DODGE = 5.0
"""Pixels between the intervals of two series at the same x."""


@dataclass(frozen=True)
class Style:
    """How a label looks in every figure of its chapter."""

    colour: str
    marker: str
    dash: Any
    hollow: bool


def styles(charts: Iterable[Chart]) -> dict[str, Style]:
    """A style per label, the same wherever it appears. Colour, marker and dash change together, so it is told without colour; baselines are grey."""
    series = [s for c in charts for p in c.panels for s in p.series]
    found: dict[str, Style] = {}
    for s in series:
        if s.label not in found:
            k, n = len(found), len(svg.SERIES)
            turn = k // n  # from the seventh label on the colours come again, with other markers and dashes
            colour = svg.BASELINE if s.role == "baseline" else svg.SERIES[k % n]
            found[s.label] = Style(colour, svg.MARKERS[(k + turn) % n], svg.DASHES[(k + 2 * turn) % n], s.role == "control")
    return found


def legend(chart: Chart, style: Mapping[str, Style]) -> list[Legend]:
    """What the page draws above the panels: each label of the chart, and the band of chance by its name."""
    rows = all(p.ticks is not None for p in chart.panels)
    labels = dict.fromkeys(s.label for p in chart.panels for s in p.series)
    found = [
        Legend(label, svg.css(s.colour), s.marker, s.hollow, "none" if rows else css_dash(s.dash)) for label in labels for s in [style[label]]
    ]
    chance = dict.fromkeys(p.null_label for p in chart.panels if p.null is not None)
    if chance:
        found.append(Legend("; ".join(chance), "var(--band)", "band", False, "none"))
    return found


def draw_panels(id_: str, chart: Chart, style: Mapping[str, Style]) -> str:
    """The panels as SVG elements, in order; one series may stand in several, its style is the same."""
    drawings = []
    titles = [wrap(p.title, 54) or [""] for p in chart.panels]
    top = 8 + 18 * max(map(len, titles), default=1)  # the same in all, so that axes beside each other stand level
    most = max((len(p.series) for p in chart.panels), default=1)
    for k, (panel, title) in enumerate(zip(chart.panels, titles, strict=True)):
        height, draw = _rows(panel, style, top, most) if panel.ticks is not None else (top + PLOT + 48, partial(_lines, panel=panel, style=style, top=top))
        desc = f"{'Rows' if panel.ticks is not None else 'Horizontal'}: {panel.x_label}. Series: {', '.join(s.label for s in panel.series)}. {_range(panel)}"

        def whole(fig: Canvas, draw: Any = draw, title: Sequence[str] = title) -> None:
            page = svg.canvas(fig)
            for i, line in enumerate(title):
                page.text(0, 10 + 18 * i, line, fontsize=TITLE, fontweight="bold", va="center", color=svg.INK)
            draw(fig, page)

        drawings.append(svg.render(f"{id_}-{k + 1}", panel.title, desc, (WIDTH, height), whole))
    return "".join(drawings)


def _range(panel: Panel) -> str:
    values = np.concatenate([np.asarray(s.y, dtype=float) for s in panel.series]) if panel.series else np.array([])
    values = values[np.isfinite(values)]
    said = f"Values from {number(values.min(), 3)} to {number(values.max(), 3)}. " if values.size else "Nothing was measured. "
    return said + "All values are in the table below."


def _lines(fig: Canvas, page: Axes, panel: Panel, style: Mapping[str, Style], top: float) -> None:
    """One set of axes with the series as lines."""
    ax = svg.axes(fig, LEFT, top, WIDTH - LEFT - 12, PLOT)
    page.text(LEFT + (WIDTH - LEFT - 12) / 2, top + PLOT + 34, _cut(panel.x_label, 60), fontsize=SMALL, va="center", ha="center", color=svg.MUTED)
    if panel.log_x:
        ax.set_xscale("log", nonpositive="mask")
    if panel.null is not None:
        at, low, high = (np.asarray(v, dtype=float) for v in panel.null)
        ax.fill_between(at, low, high, color=svg.BAND, lw=0)
    if panel.mark_x is not None:
        ax.axvline(float(panel.mark_x), color=svg.MUTED, lw=1, ls=(0, (4, 3)))
    bars = [k for k, s in enumerate(panel.series) if s.low is not None and s.high is not None and len(s.x) < MANY]
    for k, s in enumerate(panel.series):
        aside = bars.index(k) - (len(bars) - 1) / 2 if k in bars else 0.0
        _line(ax, s, style[s.label], ax.transData + ScaledTranslation(aside * DODGE / 72, 0, fig.dpi_scale_trans))
        _within(ax, s, panel.log_x)
    ax.margins(0.05, 0.08)
    ax.autoscale_view()
    _x_ticks(ax, panel)
    _grid_lines(ax, "y")


def _line(ax: Axes, s: Series, look: Style, moved: Any) -> None:
    x, y = np.asarray(s.x, dtype=float), np.asarray(s.y, dtype=float)
    if s.low is not None and s.high is not None:
        low, high = np.asarray(s.low, dtype=float), np.asarray(s.high, dtype=float)
        if len(x) < MANY:
            ax.plot(*segments(x, low, high), color=look.colour, lw=1.6, solid_capstyle="butt", transform=moved)
        else:
            ax.fill_between(x, low, high, color=look.colour, alpha=0.16, lw=0)
    every = 1 if len(x) < MANY else max(1, len(x) // 8)
    face = svg.PAPER if look.hollow else look.colour
    ax.plot(
        x, y, color=look.colour, lw=2, ls=look.dash, marker=look.marker, ms=6.5, mfc=face, mec=look.colour, mew=1.6, markevery=every, transform=moved
    )


def _within(ax: Axes, s: Series, log_x: bool) -> None:
    """Make the axes hold a series: matplotlib does not see lines that are moved aside."""
    x = np.asarray(s.x, dtype=float)
    for ends in (s.y, s.low, s.high):
        if ends is not None:
            points = np.column_stack([x, np.asarray(ends, dtype=float)])
            points = points[np.isfinite(points).all(axis=1) & ((x > 0) | (not log_x))]
            if len(points):
                ax.update_datalim(points)


def _x_ticks(ax: Axes, panel: Panel) -> None:
    """Round numbers; whole ones where x is whole. A logarithmic axis of few values has its ticks at these."""
    x = np.unique(np.concatenate([np.asarray(s.x, dtype=float) for s in panel.series])) if panel.series else np.array([])
    x = x[np.isfinite(x)]
    if not panel.log_x:
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=bool((x == np.round(x)).all()), steps=STEPS))
        return
    x = x[x > 0]
    kept: list[float] = []
    if 0 < len(x) <= 12:
        room = 0.09 * (np.log(x[-1] / x[0]) or 1.0)
        for value in x:
            if not kept or np.log(value / kept[-1]) >= room:
                kept.append(float(value))
    ax.xaxis.set_major_locator(FixedLocator(kept) if kept else LogLocator(10, subs=(1.0, 2.0, 5.0), numticks=8))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}".replace("-", "−")))


def _grid_lines(ax: Axes, values: str) -> None:
    """Ticks of the axis of values, the grid, and a stronger line at 0 where 0 is in sight."""
    axis, ends, zero = (ax.yaxis, ax.get_ylim(), ax.axhline) if values == "y" else (ax.xaxis, ax.get_xlim(), ax.axvline)
    axis.set_major_locator(MaxNLocator(5, steps=STEPS))
    axis.set_major_formatter(FuncFormatter(_tick))
    ax.grid(color=svg.LINE, lw=1, axis="both" if values == "y" else "x")
    ax.set_axisbelow(True)
    if ends[0] < 0 < ends[1]:
        zero(0, color=svg.MUTED, lw=1, zorder=0.6)


def _tick(value: float, _: Any) -> str:
    text = f"{value:.0e}" if 0 < abs(value) < 1e-3 or abs(value) >= 1e6 else f"{value:,.3f}".rstrip("0").rstrip(".")
    return text.replace("-", "−")


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def _rows(panel: Panel, style: Mapping[str, Style], top: float, most: int) -> tuple[float, Any]:
    """Height and drawing of a panel of names: a row for each with room for `most` series under each other; numbers at the right where one is alone."""
    names = list(panel.ticks or ())
    each = 13.0  # pixels of one series in a row
    step = 30 + each * most
    head = 24.0
    height = top + head + step * len(names) + 6

    def draw(fig: Canvas, page: Axes) -> None:
        alone = len(panel.series) == 1
        right = 58 if alone else 8
        start = top + head
        ax = svg.axes(fig, 8, start, WIDTH - 8 - right, height - start)
        ax.set_ylim(height - start, 0)
        ax.set_yticks([])
        page.set_zorder(3)
        for i, name in enumerate(names):
            back = {"facecolor": svg.PAPER, "edgecolor": "none", "pad": 1.0}  # grid lines pass behind names
            page.text(0, start + i * step + 11, _cut(str(name), 62), fontsize=SMALL, va="center", color=svg.INK, bbox=back)
        if panel.null is not None:
            for x, low, high in zip(*panel.null, strict=True):
                if not (missing(low) or missing(high)):
                    ax.fill_between([low, high], x * step + 20, x * step + 24 + each * len(panel.series), color=svg.BAND, lw=0, zorder=0.5)
        for k, s in enumerate(panel.series):
            at, y = np.asarray(s.x, dtype=float) * step + 22 + each * (k + 0.5), np.asarray(s.y, dtype=float)
            look = style[s.label]
            if s.low is not None and s.high is not None:
                rows, ends = segments(at, s.low, s.high)
                ax.plot(ends, rows, color=look.colour, lw=2, solid_capstyle="butt")
            face = svg.PAPER if look.hollow else look.colour
            ax.plot(y, at, look.marker, ms=7, mfc=face, mec=look.colour, mew=1.7, ls="none", clip_on=False, zorder=5)
            for v, h in zip(y, at, strict=True):
                if missing(v):
                    page.text(12, start + h, "not measured", fontsize=SMALL - 1.5, va="center", color=svg.MUTED)
                elif alone:
                    page.text(WIDTH, start + h, _value(v), fontsize=SMALL - 0.5, va="center", ha="right", color=svg.INK)
        ax.margins(0.06, 0)
        ax.set_ylim(height - start, 0)
        ax.xaxis.tick_top()
        _grid_lines(ax, "x")
        if panel.mark_x is not None:
            ax.axvline(float(panel.mark_x), color=svg.MUTED, lw=1, ls=(0, (4, 3)))

    return height, draw


def _value(v: float) -> str:
    return number(v, 0 if abs(v) >= 1000 else 1 if abs(v) >= 10 else 2 if abs(v) >= 0.095 else 3)
