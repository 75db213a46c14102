"""An experiment's chapter, drawn: its charts as figures, its sheets as tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from convergent.core.chapter import Chapter, Chart, Grid, Panel, Series, Sheet
from convergent.report import svg
from convergent.report.lines import Line, Plot, css_dash, line_figure
from convergent.report.results import clean
from convergent.report.svg import Figure, Legend
from convergent.report.text import interval, number


@dataclass(frozen=True)
class DrawnTable:
    """A sheet as texts."""

    title: str
    note: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Drawn:
    """A chapter ready for the page."""

    id: str
    title: str
    method: tuple[str, ...]
    figures: tuple[Figure, ...]
    tables: tuple[DrawnTable, ...]
    notes: tuple[str, ...]


def drawn(chapter: Chapter) -> Drawn:
    """The chapter with every figure drawn and every number printed."""
    figures = tuple(_chart(chapter.id, f) if isinstance(f, Chart) else _grid(chapter.id, f) for f in chapter.figures)
    tables = tuple(_table(s) for s in chapter.sheets if len(s.frame))
    return Drawn(chapter.id, chapter.title, tuple(chapter.method), figures, tables, tuple(chapter.notes))


def _chart(chapter: str, chart: Chart) -> Figure:
    labels = list(dict.fromkeys(s.label for p in chart.panels for s in p.series))
    style = {label: k % len(svg.SERIES) for k, label in enumerate(labels)}
    roles = {s.label: s.role for p in chart.panels for s in p.series}
    legend = [
        Legend(label, svg.css(svg.SERIES[k]), svg.MARKERS[k], roles[label] == "control", css_dash(svg.DASHES[k])) for label, k in style.items()
    ]
    if any(p.null for p in chart.panels):
        legend.append(Legend("Chance", "var(--band)", "band", False, "none"))
    plots = [_plot(p, style) for p in chart.panels]
    desc = f"{len(plots)} panel(s): {'; '.join(p.title for p in chart.panels)}. Series: {', '.join(labels)}."
    header = ("Panel", "Series", "x", "Value", "95 %")
    rows = tuple(
        (p.title, s.label, number(x, 2), number(s.y[i], 3), interval(s.low[i], s.high[i], 3) if s.low is not None and s.high is not None else "")
        for p in chart.panels
        for s in p.series
        for i, x in enumerate(s.x)
    )
    return line_figure(f"fig-{chapter}-{chart.id}", chart.title, chart.caption, desc, plots, min(2, len(plots)), legend, header, rows)


def _plot(panel: Panel, style: dict[str, int]) -> Plot:
    null = None if panel.null is None else tuple(np.asarray(v, dtype=float) for v in panel.null)
    lines = tuple(_line(s, style[s.label]) for s in panel.series)
    return Plot(panel.title, panel.x_label, lines, null, panel.mark_x)  # type: ignore[arg-type]


def _line(series: Series, k: int) -> Line:
    ends = None
    if series.low is not None and series.high is not None:
        ends = (np.asarray(series.low, dtype=float), np.asarray(series.high, dtype=float))
    x, y = np.asarray(series.x, dtype=float), np.asarray(series.y, dtype=float)
    return Line(x, y, svg.SERIES[k], svg.MARKERS[k], svg.DASHES[k], series.role == "control", thin=ends)


def _grid(chapter: str, grid: Grid) -> Figure:
    rows = tuple((name, *(number(v, grid.digits) for v in values)) for name, values in zip(grid.rows, grid.values, strict=True))
    desc = f"{len(grid.rows)} rows, {len(grid.columns)} columns."
    return Figure(f"fig-{chapter}-{grid.id}", grid.title, grid.caption, desc, header=("", *grid.columns), rows=rows)


def _table(sheet: Sheet) -> DrawnTable:
    def cell(value: object) -> str:
        if isinstance(value, bool | np.bool_):
            return "yes" if value else "no"
        if isinstance(value, int | np.integer):
            return number(value, 0)
        return number(value, sheet.digits) if isinstance(value, float) else clean(value)

    frame: pd.DataFrame = sheet.frame
    rows: Sequence[tuple[str, ...]] = [tuple(cell(v) for v in row) for row in frame.itertuples(index=False)]
    return DrawnTable(sheet.title, sheet.note, tuple(map(str, frame.columns)), tuple(rows))
