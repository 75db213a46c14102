"""The six figures: what is drawn, what is said under it, and the same as a table for who cannot see it.

Each is drawn twice, for wide and for narrow pages, out of the same rows. Two layouts serve all: dots with intervals (one row per
condition) and lines (one panel per quantity). Computes nothing but the smoothing of the loss.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from textwrap import shorten
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator

from convergent.report import svg
from convergent.report.results import GROUPS, ROLES, Results
from convergent.report.text import NOT_MEASURED, interval, missing, number, spread

WIDE, NARROW = 1040, 360
STEPS = [1, 2, 2.5, 5, 10]
ROLE_STYLE = {"real": (svg.REAL, "o", False), "control": (svg.CONTROL, "D", True), "baseline": (svg.BASELINE, "s", False)}
INTERVALS = (
    "Thin line: 95 % interval that takes answers as independent ({thin}). "
    "Broad band: 95 % interval clustered by question ({clusters} questions), the one to judge by."
)


@dataclass(frozen=True)
class Legend:
    """One entry of a legend, drawn by the page."""

    label: str
    colour: str
    marker: str = ""
    hollow: bool = False
    dash: str = ""
    """SVG stroke-dasharray; "none" draws no line."""


@dataclass(frozen=True)
class Figure:
    """A figure of the page; without drawings (`wide` empty) it says that nothing was measured."""

    id: str
    title: str
    caption: str = ""
    desc: str = ""
    wide: str = ""
    narrow: str = ""
    legend: tuple[Legend, ...] = ()
    header: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Panel:
    """One quantity of a dot figure: a column, its two intervals (column stems), and how it is printed."""

    title: str
    column: str
    thin: str = ""
    band: str = ""
    scale: float = 1.0
    digits: int = 1
    zero: bool = False
    """Whether the axis must hold zero."""


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


def all_figures(results: Results) -> list[Figure]:
    """Every figure, in the order of the page."""
    return [f(results) for f in (conditions, steering, cosines, norms, margins, training)]


# -- dots: one row per condition ------------------------------------------------------------------------------------------


MAIN = (
    Panel("Mean alignment (0–100)", "mean_aligned", "mean_aligned_iid", "mean_aligned"),
    Panel("EM answers (%)", "em_valid", "em_wilson", "em_clustered", scale=100, zero=True),
    Panel("Coherent answers (%)", "coherent", "coherent", "coherent_clustered", scale=100),
)
MARGIN = (
    Panel("Margin (nats per token)", "margin", "", "margin", digits=2, zero=True),
    Panel("Projection on the direction", "projection", digits=2),
)


def conditions(results: Results) -> Figure:
    """The main figure: alignment, EM % and coherence of every condition, with both intervals."""
    c, t = results.conditions, results.thresholds
    caption = (
        f"Each row is one condition with {spread(c['n_all'])} answers, of which {spread(c['n_valid'])} have both scores: that is "
        f"the denominator of all three columns. EM: aligned below {t['aligned']:g} and coherent above {t['coherent']:g}; "
        f"coherent: above {t['coherent']:g}. "
        + INTERVALS.format(thin="Wilson for shares, t for means", clusters=results.study.get("n_questions", "the"))
        + _without_band(c)
        + f" Dashed line: {_baseline(c)}. The axes are cut to the range of the data."
    )
    return _dot_figure("fig-conditions", "Alignment, EM and coherence by condition", results, c, MAIN, caption)


def _baseline(frame: pd.DataFrame) -> str:
    labels = frame.loc[frame["role"] == "baseline", "label"]
    return labels.iloc[0] if len(labels) else "none, as there is no baseline"


def _without_band(frame: pd.DataFrame) -> str:
    """Which of the main quantities have no clustered interval in any condition."""
    names = [p.title.split(" (")[0].lower() for p in MAIN if frame[f"{p.band}_low"].isna().all()]
    return f" No clustered interval was measured for {' and '.join(names)}." if names else ""


def margins(results: Results) -> Figure:
    """The judge-free outcomes, for the conditions where they were measured."""
    c = results.conditions
    c = c[c["margin"].notna() | c["projection"].notna()]
    if c.empty:
        return Figure("fig-margins", "Margin without a judge")
    caption = (
        "Margin: log-probability per token of bad minus good answers to the same held-out questions; above zero the condition "
        f"prefers the bad ones. n = {spread(c['n_pairs'])} pairs per condition; band: 95 % interval over pairs. Projection: mean "
        f"of the answers' tokens on the unit direction at layer {results.study.get('primary_layer', '')}, over {spread(c['n_all'])} "
        f"answers, without an interval. Dashed line: {_baseline(c)}. "
        f"{len(c)} of {len(results.conditions)} conditions; the others were not measured."
    )
    return _dot_figure("fig-margins", "Margin without a judge", results, c, MARGIN, caption)


def _dot_figure(
    id_: str, title: str, results: Results, frame: pd.DataFrame, panels: Sequence[Panel], caption: str
) -> Figure:
    if frame.empty:
        return Figure(id_, title)
    header = ["Condition", "Group", "Role"]
    for p in panels:
        header += [p.title, *(["95 % independent"] if p.thin else []), *(["95 % clustered" if p.thin else "95 %"] if p.band else [])]
    rows = []
    for row in frame.to_dict("records"):
        cells = [row["label"], GROUPS.get(row["group"], row["group"]), ROLES[row["role"]]]
        for p in panels:
            cells.append(number(_scaled(row, p.column, p), p.digits))
            for stem in filter(None, (p.thin, p.band)):
                cells.append(interval(row[f"{stem}_low"], row[f"{stem}_high"], p.digits, p.scale))
        rows.append(tuple(cells))
    first = panels[0]
    known = frame[frame[first.column].notna()]
    desc = f"{len(frame)} conditions as rows, {len(panels)} quantities as columns."
    if len(known):
        low, high = known.loc[known[first.column].idxmin()], known.loc[known[first.column].idxmax()]
        desc += (
            f" {first.title}: lowest {number(low[first.column], first.digits)} ({low['label']}), "
            f"highest {number(high[first.column], first.digits)} ({high['label']})."
        )
    drawings = []
    for layout in ("wide", "narrow"):
        height, draw = _dots(frame, panels, layout == "wide")
        width = WIDE if layout == "wide" else NARROW
        drawings.append(svg.render(f"{id_}-{layout}", title, desc + " All values are in the table below.", (width, height), draw))
    roles = [r for r in ROLES if (frame["role"] == r).any()]
    legend = tuple(Legend(ROLES[r], svg.css(s[0]), s[1], s[2], "none") for r in roles for s in [ROLE_STYLE[r]])
    return Figure(id_, title, caption, desc, drawings[0], drawings[1], legend, tuple(header), tuple(rows))


def _scaled(row: Any, column: str, panel: Panel) -> float:
    return float(row[column]) * panel.scale


def _dots(frame: pd.DataFrame, panels: Sequence[Panel], wide: bool) -> tuple[float, Callable[[Canvas], None]]:
    """Height and drawing of a dot figure. Narrow pages get the label above its row."""
    width = WIDE if wide else NARROW
    left, top, step, head, value = (310, 52, 25, 38, 46) if wide else (0, 44, 40, 40, 33)
    size = 13 if wide else 11.5
    gap = 24 if wide else 12
    track = (width - left - gap * (len(panels) - 1)) / len(panels) - value
    order = [g for g in GROUPS if (frame["group"] == g).any()] + [g for g in dict.fromkeys(frame["group"]) if g not in GROUPS]
    y, heads, places = float(top), [], {}
    for group in order:
        heads.append((y + head - 14, GROUPS.get(group, group)))
        y += head
        for i in frame.index[frame["group"] == group]:
            places[i] = y + step / 2 + (0 if wide else 8)
            y += step
    height = y + 10

    def draw(fig: Canvas) -> None:
        page = svg.canvas(fig)
        page.set_zorder(3)
        for at, text in heads:
            label = shorten(text, 90 if wide else 58, placeholder="…")
            back = {"facecolor": svg.PAPER, "edgecolor": "none", "pad": 2}  # grid lines pass behind the heading
            page.text(0, at, label, fontsize=size, fontweight="bold", va="center", color=svg.INK, bbox=back)
            page.plot([0, width], [at + 13, at + 13], color=svg.LINE, lw=1)
        for i, at in places.items():
            label = shorten(frame.at[i, "label"], 46 if wide else 56, placeholder="…")
            page.text(0, at if wide else at - 17, label, fontsize=size, va="center", color=svg.INK)
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
            title = panel.title if wide else re.sub(r"^(Mean|Projection) (alignment|on the direction)", _short, panel.title)
            page.text(x, 14, title, fontsize=size if wide else 11, fontweight="bold", va="center", color=svg.INK)
            if len(baseline) and not missing(baseline.iloc[0][panel.column]):
                ax.axvline(_scaled(baseline.iloc[0], panel.column, panel), color=svg.BASELINE, lw=1, ls=(0, (4, 3)))
            for i, at in places.items():
                _dot(ax, page, frame.loc[i], panel, at, x, x + track + value, size)

    return height, draw


def _short(match: re.Match[str]) -> str:
    return "Alignment" if match[1] == "Mean" else "Projection"


def _dot(ax: Axes, page: Axes, row: Any, panel: Panel, at: float, left: float, right: float, size: float) -> None:
    """One estimate with its intervals at height `at`, and its number at `right`."""
    value = _scaled(row, panel.column, panel)
    if missing(value):
        page.text(left, at, NOT_MEASURED, fontsize=size - 1.5, va="center", color=svg.MUTED)
        return
    colour, marker, hollow = ROLE_STYLE[row["role"]]
    for stem, lw, alpha in ((panel.band, 9.0, 0.28), (panel.thin, 1.6, 1.0)):
        ends = [_scaled(row, f"{stem}_{end}", panel) if stem else float("nan") for end in ("low", "high")]
        if not any(map(missing, ends)):
            ax.plot(ends, [at, at], color=colour, lw=lw, alpha=alpha, solid_capstyle="butt")
    face = svg.PAPER if hollow else colour
    ax.plot([value], [at], marker, ms=7.5, mfc=face, mec=colour, mew=1.8, clip_on=False, zorder=5)
    page.text(right, at, number(value, panel.digits), fontsize=size - 0.5, va="center", ha="right", color=svg.INK)


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


# -- lines: steering, layers, loss ----------------------------------------------------------------------------------------


def steering(results: Results) -> Figure:
    """Alignment, EM % and coherence over the steering coefficient; controls beside the direction."""
    c = results.conditions
    chosen = c[(c["group"] == "induction") & c["scale"].notna()]
    title = "Steering the chat model: outcome over λ"
    if chosen.empty:
        return Figure("fig-steering", title)
    start = c[(c["group"] == "plain") & (c["role"] == "baseline")].head(1).assign(scale=0.0)
    series: dict[tuple[str, str], pd.DataFrame] = {}
    for (role, stem), rows in chosen.groupby([chosen["role"], chosen["label"].map(_without_scale)], sort=False):
        rows = pd.concat([start, rows]) if role == "real" else rows
        series[str(role), str(stem)] = rows.sort_values("scale", kind="stable")
    step = 0.03 * float(chosen["scale"].max() - min(0.0, chosen["scale"].min()) or 1.0)
    legend: list[Legend] = []
    plots: list[list[Line]] = [[] for _ in MAIN]
    for k, ((role, stem), rows) in enumerate(series.items()):
        style = k % len(svg.SERIES)
        colour = svg.REAL if role == "real" and not legend else svg.SERIES[style]
        marker, hollow = svg.MARKERS[style], role == "control"
        legend.append(Legend(stem, svg.css(colour), marker, hollow, "none" if len(rows) == 1 else _css_dash(svg.DASHES[style])))
        shift = step * ((k + 1) // 2) * (1 if k % 2 else -1)  # side by side where λ is the same
        for lines, p in zip(plots, MAIN, strict=True):
            ends = {s: tuple(rows[f"{s}_{e}"].to_numpy() * p.scale for e in ("low", "high")) for s in (p.thin, p.band)}
            x, y = rows["scale"].to_numpy() + shift, rows[p.column].to_numpy() * p.scale
            lines.append(Line(x, y, colour, marker, svg.DASHES[style], hollow, thin=ends[p.thin], band=ends[p.band]))  # type: ignore[arg-type]
    dose = chosen.loc[chosen["dose"].notna()]
    per = f" λ = 1 is {number((dose['dose'] / dose['scale']).abs().median(), 3)} mean token norms." if len(dose) else ""
    caption = (
        f"λ multiplies the raw direction, added at the output of block {results.study.get('primary_layer', '')} at every "
        f"position.{per} λ = 0 is the chat model itself. Each point: {spread(chosen['n_all'])} answers, shares and means over the "
        f"{spread(chosen['n_valid'])} with both scores. "
        + INTERVALS.format(thin="Wilson for shares, t for means", clusters=results.study.get("n_questions", "the"))
        + _without_band(chosen)
        + " Points of equal λ are set side by side; filled: the direction, hollow: controls."
    )
    header = ("Series", "Role", "λ", "Dose", "n", *(p.title for p in MAIN))
    table = tuple(
        (stem, ROLES[role], number(r["scale"], 2), number(r["dose"], 3), number(r["n_valid"], 0))
        + tuple(number(_scaled(r, p.column, p), p.digits) for p in MAIN)
        for (role, stem), rows in series.items()
        for r in rows.to_dict("records")
    )
    desc = f"Three panels with λ on the horizontal axis and {len(series)} series: {', '.join(stem for _, stem in series)}."
    drawn = [Plot(p.title, "λ", tuple(lines)) for p, lines in zip(MAIN, plots, strict=True)]
    return _line_figure("fig-steering", title, caption, desc, drawn, 3, legend, header, table)


def _without_scale(label: str) -> str:
    """A label without its "λ = 2": what conditions of one series share."""
    stem = re.sub(r"[\s,;:(·-]*(?:λ|lambda)\s*=?\s*[-−+]?\d+(?:\.\d+)?\s*\)?", "", label).strip()
    return stem or label


def cosines(results: Results) -> Figure:
    """Cosine per layer between organisms, beside the chat model's own means on the same texts and the null band."""
    c = results.cosines
    title = "Cosine per layer between directions"
    pairs, base = c[c["kind"] == "organisms"], c[c["kind"] == "chat_baseline"]
    if pairs.empty and base.empty:
        return Figure("fig-cosines", title)
    nulls = [c[c["kind"] == k].groupby("layer")["cosine"] for k in ("null_low", "null_high")]
    low, high = nulls[0].min(), nulls[1].max()
    band = (low.index.to_numpy(float), low.to_numpy(), high.reindex(low.index).to_numpy()) if len(low) and len(high) else None
    layer = results.study.get("primary_layer")
    legend: list[Legend] = []
    lines: dict[str, list[Line]] = {"organisms": [], "chat_baseline": []}
    columns: dict[str, pd.Series] = {}
    styles = _styles(results)
    for k, ((a, b), rows) in enumerate(pairs.groupby(["a", "b"], sort=False)):
        _add(lines["organisms"], legend, columns, f"{a} and {b}", rows, "cosine", k)
    for k, (a, rows) in enumerate(base.groupby("a", sort=False)):
        _add(lines["chat_baseline"], legend, columns, f"{a} and chat model", rows, "cosine", styles.get(str(a), k))
    if band:
        legend.append(Legend("Null band: random vectors", "var(--band)", "band", False, "none"))
    at = [f"{name} {number(s.get(layer), 2)}" for name, s in columns.items()]
    desc = f"At layer {layer}: {'; '.join(at)}." + (
        f" Null band there: {interval(low.get(layer), high.get(layer), 2)}." if band else " No null band was measured."
    )
    caption = (
        "Left: directions of two organisms, each read in its own answers. Right: an organism's direction against the same class "
        "means read in the untouched chat model on the same texts; only what exceeds it can come from the fine-tune. One direction "
        "per organism, so n = 1 pair per line and no interval; shaded: 95 % of random vectors"
        f"{'' if band else ' (not measured)'}. Dashed upright: layer {layer}, used for single-layer interventions. {desc}"
    )
    plots = [
        Plot("Between organisms", "Layer (output of block)", tuple(lines["organisms"]), band, layer),
        Plot("Against the chat model on the same texts", "Layer (output of block)", tuple(lines["chat_baseline"]), band, layer),
    ]
    floor = min([0.0, *(s.min() for s in columns.values()), *([low.min()] if band else [])])
    plots = [Plot(p.title, p.x_label, p.lines, p.band, p.mark_x, (floor - 0.05, 1.03)) for p in plots if p.lines]
    header, rows = _layer_table({**columns, **({"null low": low, "null high": high} if band else {})}, 3)
    return _line_figure("fig-cosines", title, caption, desc, plots, 2, legend, header, rows)


NORMS = (
    ("norm", "Norm", 2),
    ("relative_norm", "Norm / mean token norm", 3),
    ("top_share", "Share of the 5 largest dimensions", 2),
    ("split_half", "Split-half cosine", 2),
)


def norms(results: Results) -> Figure:
    """Norm, relative norm, concentration and reliability of each direction per layer."""
    n, title = results.norms, "Size and reliability of the directions"
    measured = [m for m in NORMS if n[m[0]].notna().any()]
    if not measured:
        return Figure("fig-norms", title)
    styles, legend, plots, tables = _styles(results), [], [], {}
    layer = results.study.get("primary_layer")
    for column, name, _ in measured:
        lines: list[Line] = []
        for k, (organism, rows) in enumerate(n.groupby("organism", sort=False)):
            labels: list[Legend] = []
            _add(lines, labels, tables, f"{organism}: {name}", rows, column, styles.get(str(organism), k))
            if not plots:
                legend.append(Legend(str(organism), labels[0].colour, labels[0].marker, False, labels[0].dash))
        plots.append(Plot(name, "Layer (output of block)", tuple(lines), mark_x=layer))
    organisms = list(dict.fromkeys(n["organism"]))
    desc = f"{len(measured)} panels over the layers for {', '.join(organisms)}; dashed: layer {layer}."
    caption = (
        f"One direction per organism (n = 1 each), {n['layer'].nunique()} layers, no interval. Split-half: cosine of directions from "
        "two random halves of the answers; near zero the direction is noise. A share near 1 means that a few dimensions with "
        "massive activations carry the direction. Dashed upright: the layer of single-layer interventions."
    )
    header, rows = _layer_table(tables, 3)
    return _line_figure("fig-norms", title, caption, desc, plots, 2, legend, header, rows)


def training(results: Results) -> Figure:
    """Loss over steps of every organism."""
    t, title = results.training, "Training loss"
    t = t[t["loss"].notna()]
    if t.empty:
        return Figure("fig-training", title)
    styles, lines, legend, table = _styles(results), [], [], []
    for k, (organism, rows) in enumerate(t.groupby("organism", sort=False)):
        rows = rows.sort_values("step", kind="stable")
        style = styles.get(str(organism), k) % len(svg.SERIES)
        x, y = rows["step"].to_numpy(), rows["loss"].to_numpy()
        smooth = pd.Series(y).rolling(max(1, len(y) // 12), center=True, min_periods=1).mean().to_numpy()
        lines += [Line(x, y, svg.SERIES[style], faint=True)]
        lines += [Line(x, smooth, svg.SERIES[style], svg.MARKERS[style], svg.DASHES[style])]
        legend.append(Legend(str(organism), svg.css(svg.SERIES[style]), svg.MARKERS[style], False, _css_dash(svg.DASHES[style])))
        table.append((str(organism), number(x[-1], 0), number(y[0], 3), number(y.min(), 3), number(y[-1], 3)))
    caption = (
        f"Mean loss per logged step on answer tokens, {spread(t.groupby('organism').size())} points per organism, one run each, no "
        "interval. Faint: as logged; strong: running mean over a twelfth of the run."
    )
    desc = "; ".join(f"{o}: {first} at the start, {last} after {steps} steps" for o, steps, first, _, last in table) + "."
    header = ("Organism", "Steps", "First loss", "Lowest", "Last")
    plots = [Plot("Loss (nats per token)", "Step", tuple(lines))]
    return _line_figure("fig-training", title, caption, desc, plots, 1, legend, header, tuple(table))


def _styles(results: Results) -> dict[str, int]:
    """One style per organism, the same in every figure."""
    return {name: k for k, name in enumerate(results.organisms["name"])}


def _add(
    lines: list[Line], legend: list[Legend], columns: dict[str, pd.Series], label: str, rows: pd.DataFrame, column: str, k: int
) -> None:
    """One line over the layers, with its legend entry and its column of the table."""
    k %= len(svg.SERIES)
    rows = rows.sort_values("layer", kind="stable")
    lines.append(Line(rows["layer"].to_numpy(), rows[column].to_numpy(), svg.SERIES[k], svg.MARKERS[k], svg.DASHES[k]))
    legend.append(Legend(label, svg.css(svg.SERIES[k]), svg.MARKERS[k], False, _css_dash(svg.DASHES[k])))
    columns[label] = rows.groupby("layer")[column].first()


def _layer_table(columns: dict[str, pd.Series], digits: int) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    layers = sorted(set().union(*(s.index for s in columns.values())))
    rows = tuple((number(l, 0), *(number(s.get(l), digits) for s in columns.values())) for l in layers)  # noqa: E741
    return ("Layer", *columns), rows


def _css_dash(dash: Any) -> str:
    return "" if dash == "solid" else " ".join(f"{v:g}" for v in dash[1])


def _line_figure(
    id_: str, title: str, caption: str, desc: str, plots: Sequence[Plot], columns: int,
    legend: Sequence[Legend], header: tuple[str, ...], rows: tuple[tuple[str, ...], ...],
) -> Figure:  # fmt: skip
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
        for x, low, high in zip(line.x, *ends, strict=True) if ends else ():
            if not (missing(low) or missing(high)):
                ax.plot([x, x], [low, high], color=line.colour, lw=lw, alpha=alpha, solid_capstyle="butt")
    face = svg.PAPER if line.hollow else line.colour
    ax.plot(
        line.x, line.y, color=line.colour, lw=1 if line.faint else 2, alpha=0.35 if line.faint else 1.0,
        ls="solid" if line.faint else line.dash, marker=line.marker or None, ms=6.5, mfc=face, mec=line.colour, mew=1.6,
        markevery=1 if line.thin else max(1, len(line.x) // 8),
    )  # fmt: skip
