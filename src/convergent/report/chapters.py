"""An experiment's chapter, drawn: its charts as figures, its sheets as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from convergent.core.chapter import Chapter, Chart, Grid, Panel, Series, Sheet
from convergent.report import heat
from convergent.report.drawing import Drawn, DrawnTable, Figure
from convergent.report.panels import Style, draw_panels, legend, styles
from convergent.report.results import clean
from convergent.report.tables import NONE
from convergent.report.text import interval, missing, number


def drawn(chapter: Chapter) -> Drawn:
    """The chapter with every figure drawn and every number printed."""
    style = styles(f for f in chapter.figures if isinstance(f, Chart))
    figures = tuple(_chart(chapter.id, f, style) if isinstance(f, Chart) else _grid(chapter.id, f) for f in chapter.figures)
    tables = tuple(_table(s) for s in chapter.sheets if len(s.frame))
    return Drawn(chapter.id, chapter.title, tuple(chapter.method), figures, tables, tuple(chapter.notes))


def _chart(chapter: str, chart: Chart, style: Mapping[str, Style]) -> Figure:
    id_ = f"fig-{chapter}-{chart.id}"
    labels = tuple(dict.fromkeys(s.label for p in chart.panels for s in p.series))
    desc = f"{len(chart.panels)} panel{'s' if len(chart.panels) != 1 else ''}: {'; '.join(p.title for p in chart.panels)}. Series: {', '.join(labels)}."
    if any(p.null is not None for p in chart.panels):
        desc += " In brackets 95 % intervals; chance: the shaded band."
    groups = tuple((p.title if len(chart.panels) > 1 else "", _panel_rows(p, labels, any(q.null is not None for q in chart.panels))) for p in chart.panels)
    header = (" / ".join(dict.fromkeys(p.x_label for p in chart.panels)), *labels, *(["Chance"] if any(p.null is not None for p in chart.panels) else []))
    return Figure(id_, chart.title, chart.caption, desc, draw_panels(id_, chart, style), "", tuple(legend(chart, style)), header, groups=groups)


def _panel_rows(panel: Panel, labels: Sequence[str], chance: bool) -> tuple[tuple[str, ...], ...]:
    """A row per x, a cell per series: the value and, in brackets, its interval; the band of chance last."""
    cells = {(s.label, float(x)): _cell(s, i) for s in panel.series for i, x in enumerate(s.x)}
    band = {float(x): interval(low, high, 3) for x, low, high in zip(*panel.null, strict=True)} if panel.null is not None else {}
    rows = []
    for x in sorted({x for _, x in cells} | set(band)):
        whole = panel.ticks is not None and float(x).is_integer() and 0 <= x < len(panel.ticks)
        name = panel.ticks[int(x)] if whole and panel.ticks is not None else _x(x)
        rows.append((clean(name), *(cells.get((label, x), NONE) for label in labels), *([band.get(x, NONE)] if chance else [])))
    return tuple(rows)


def _x(x: float) -> str:
    return number(x, 0) if float(x).is_integer() else f"{x:.4g}".replace("-", "−")


def _cell(series: Series, i: int) -> str:
    value = number(series.y[i], 3)
    if series.low is None or series.high is None or missing(series.low[i]) or missing(series.high[i]):
        return value
    return f"{value} ({interval(series.low[i], series.high[i], 3)})"


def _grid(chapter: str, grid: Grid) -> Figure:
    rows = tuple((name, *(number(v, grid.digits) for v in values)) for name, values in zip(grid.rows, grid.values, strict=True))
    id_, desc = f"fig-{chapter}-{grid.id}", heat.describe(grid)
    wide, narrow = heat.draw_grid(id_, grid, desc) if grid.rows and grid.columns else ("", "")
    return Figure(id_, grid.title, grid.caption, desc, wide, narrow, tuple(heat.legend(grid)), ("", *grid.columns), rows)


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
