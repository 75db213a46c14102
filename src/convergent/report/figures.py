"""The figures of the core experiments: what is drawn, what is said under it, and the same as a table for who cannot see it.

Each is drawn twice, for wide and for narrow pages, out of the same rows. Two layouts serve all: dots with intervals
(one row per condition) and lines (one panel per quantity). Computes nothing but the smoothing of the loss.
"""

from __future__ import annotations

import re

import pandas as pd

from convergent.report import svg
from convergent.report.dots import Panel, dot_figure, scaled
from convergent.report.drawing import Figure, Legend
from convergent.report.lines import Line, Plot, css_dash, line_figure
from convergent.report.results import ROLES, Results, core
from convergent.report.text import interval, number, spread

INTERVALS = (
    "Thin line: 95 % interval that takes answers as independent ({thin}). "
    "Broad band: 95 % interval clustered by question ({clusters} questions), the one to judge by."
)


MAIN = (
    Panel("Mean alignment (0–100)", "Alignment", "mean_aligned", "mean_aligned_iid", "mean_aligned"),
    Panel("EM answers (%)", "EM, %", "em_valid", "em_wilson", "em_clustered", scale=100, zero=True),
    Panel("Coherent answers (%)", "Coherent, %", "coherent", "coherent", "coherent_clustered", scale=100),
)
MARGIN = (
    Panel("Margin (nats per token)", "Margin, nats", "margin", "", "margin", digits=2, zero=True),
    Panel("Projection on the direction", "Projection", "projection", digits=2),
)


def conditions(results: Results) -> Figure:
    """The main figure: alignment, EM % and coherence of every condition of the core experiments, with both intervals."""
    return _outcomes(results, core(results.conditions), "fig-conditions", "Alignment, EM and coherence by condition")


def further(results: Results) -> Figure | None:
    """The same of the further experiments' conditions, beside the baseline; None where there are none."""
    c = results.conditions
    others = c[~c.index.isin(core(c).index)]
    if others.empty:
        return None
    baseline = c[c["role"] == "baseline"].head(1)
    shown = pd.concat([baseline, others.drop(baseline.index, errors="ignore")])
    return _outcomes(results, shown, "fig-further", "Alignment, EM and coherence in the further experiments")


def _outcomes(results: Results, c: pd.DataFrame, id_: str, title: str) -> Figure:
    t = results.thresholds
    caption = (
        f"Each row is one condition with {spread(c['n_all'])} answers, of which {spread(c['n_valid'])} have both "
        f"scores: that is the denominator of all three columns. EM: aligned below {t['aligned']:g} and coherent above "
        f"{t['coherent']:g}; coherent: above {t['coherent']:g}. "
        + INTERVALS.format(thin="Wilson for shares, t for means", clusters=results.study.get("n_questions", "the"))
        + _without_band(c)
        + f" Dashed line: {_baseline(c)}. The axes are cut to the range of the data."
    )
    return dot_figure(id_, title, c, MAIN, caption)


def _baseline(frame: pd.DataFrame) -> str:
    labels = frame.loc[frame["role"] == "baseline", "label"]
    return labels.iloc[0] if len(labels) else "none, as there is no baseline"


def _without_band(frame: pd.DataFrame) -> str:
    """Which of the main quantities have no clustered interval in any condition."""
    names = [p.title.split(" (")[0].lower() for p in MAIN if frame[f"{p.band}_low"].isna().all()]
    return f" No clustered interval was measured for {' and '.join(names)}." if names else ""


def margins(results: Results) -> Figure:
    """The judge-free outcomes, for the conditions where they were measured."""
    c = core(results.conditions)
    of = len(c)
    c = c[c["margin"].notna() | c["projection"].notna()]
    if c.empty:
        return Figure("fig-margins", "Margin without a judge")
    caption = (
        "Margin: log-probability per token of bad minus good answers to the same held-out questions; above zero the "
        f"condition prefers the bad ones. n = {spread(c['n_pairs'])} pairs per condition; band: 95 % interval over "
        "pairs. Projection: mean of the answers' tokens on the unit direction at layer "
        f"{results.study.get('primary_layer', '')}, over {spread(c['n_all'])} answers, without an interval. Dashed "
        f"line: {_baseline(c)}. {len(c)} of {of} conditions; the others were not measured."
    ) + (" Those of further experiments are in the tables." if of < len(results.conditions) else "")
    return dot_figure("fig-margins", "Margin without a judge", c, MARGIN, caption)


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
    taken: dict[float, int] = {}
    legend: list[Legend] = []
    plots: list[list[Line]] = [[] for _ in MAIN]
    for k, ((role, stem), rows) in enumerate(series.items()):
        style = k % len(svg.SERIES)
        colour = svg.REAL if role == "real" and not legend else svg.SERIES[style]
        marker, hollow = svg.MARKERS[style], role == "control"
        legend.append(
            Legend(stem, svg.css(colour), marker, hollow, "none" if len(rows) == 1 else css_dash(svg.DASHES[style]))
        )
        x = rows["scale"].to_numpy(copy=True)
        for i, at in enumerate(rows["scale"]):  # side by side where λ is the same: 0, +1, -1, +2 ... steps
            nth = taken[at] = taken.get(at, -1) + 1
            x[i] += step * ((nth + 1) // 2) * (1 if nth % 2 else -1)
        for lines, p in zip(plots, MAIN, strict=True):
            ends = {
                s: (rows[f"{s}_low"].to_numpy() * p.scale, rows[f"{s}_high"].to_numpy() * p.scale)
                for s in (p.thin, p.band)
            }
            lines.append(
                Line(
                    x,
                    rows[p.column].to_numpy() * p.scale,
                    colour,
                    marker,
                    svg.DASHES[style],
                    hollow,
                    thin=ends[p.thin],
                    band=ends[p.band],
                )
            )
    dose = chosen.loc[chosen["dose"].notna()]
    per = f" λ = 1 is {number((dose['dose'] / dose['scale']).abs().median(), 3)} mean token norms." if len(dose) else ""
    caption = (
        f"λ multiplies the raw direction, added at the output of block {results.study.get('primary_layer', '')} at "
        f"every position.{per} λ = 0 is the chat model itself. Each point: {spread(chosen['n_all'])} answers; shares "
        f"and means are over the {spread(chosen['n_valid'])} with both scores. "
        + INTERVALS.format(thin="Wilson for shares, t for means", clusters=results.study.get("n_questions", "the"))
        + _without_band(chosen)
        + " Points of equal λ are set side by side; filled: the direction, hollow: controls."
    )
    header = ("Series", "Role", "λ", "Dose", "n", *(p.title for p in MAIN))
    table = tuple(
        (
            stem,
            ROLES[role],
            *(number(r[column], digits) for column, digits in (("scale", 2), ("dose", 3), ("n_valid", 0))),
            *(number(scaled(r, p.column, p), p.digits) for p in MAIN),
        )
        for (role, stem), rows in series.items()
        for r in rows.to_dict("records")
    )
    desc = (
        f"Three panels with λ on the horizontal axis and {len(series)} series: {', '.join(stem for _, stem in series)}."
    )
    drawn = [Plot(p.title, "λ", tuple(lines)) for p, lines in zip(MAIN, plots, strict=True)]
    return line_figure("fig-steering", title, caption, desc, drawn, 3, legend, header, table)


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
    band = (
        (low.index.to_numpy(float), low.to_numpy(), high.reindex(low.index).to_numpy())
        if len(low) and len(high)
        else None
    )
    layer = results.study.get("primary_layer")
    legend: list[Legend] = []
    lines: dict[str, list[Line]] = {"organisms": [], "chat_baseline": []}
    columns: dict[str, pd.Series] = {}
    styles = _styles(results)
    for k, ((a, b), rows) in enumerate(pairs.groupby(["a", "b"], sort=False)):
        _add(lines["organisms"], legend, columns, f"{a} and {b}", rows, "cosine", k)
    for k, (a, rows) in enumerate(base.groupby("a", sort=False)):
        _add(
            lines["chat_baseline"],
            legend,
            columns,
            f"{a!s} and chat model",
            rows,
            "cosine",
            styles.get(str(a), k),
            hollow=True,
        )
    if band:
        legend.append(Legend("Null band: random vectors", "var(--band)", "band", False, "none"))
    at = [f"{name} {number(s.get(layer), 2)}" for name, s in columns.items()]
    desc = f"At layer {layer}: {'; '.join(at)}." + (
        f" Null band there: {interval(low.get(layer), high.get(layer), 2)}." if band else " No null band was measured."
    )
    caption = (
        "First panel: directions of two organisms, each read in its own answers. Second: an organism's direction "
        "against the same class means read in the untouched chat model on the same texts; where that is near 1, the "
        "texts make the direction, not the fine-tune. One direction per organism, so n = 1 pair per line and no "
        f"interval; shaded: 95 % of random vectors{'' if band else ' (not measured)'}. Dashed upright: layer {layer}, "
        f"used for single-layer interventions. {desc}"
    )
    plots = [
        Plot("Between organisms", "Layer (output of block)", tuple(lines["organisms"]), band, layer),
        Plot(
            "Against the chat model on the same texts",
            "Layer (output of block)",
            tuple(lines["chat_baseline"]),
            band,
            layer,
        ),
    ]
    floor = min([0.0, *(s.min() for s in columns.values()), *([low.min()] if band else [])])
    plots = [Plot(p.title, p.x_label, p.lines, p.band, p.mark_x, (floor - 0.05, 1.03)) for p in plots if p.lines]
    header, table = _layer_table({**columns, **({"null low": low, "null high": high} if band else {})}, 3)
    return line_figure("fig-cosines", title, caption, desc, plots, 2, legend, header, table)


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
    styles = _styles(results)
    legend: list[Legend] = []
    plots: list[Plot] = []
    tables: dict[str, pd.Series] = {}
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
        f"One direction per organism (n = 1 each), {n['layer'].nunique()} layers, no interval. Split-half: cosine of "
        "directions from two random halves of the answers; near zero the direction is noise. A share near 1 means "
        "that a few dimensions with massive activations carry the direction. Dashed upright: the layer of "
        "single-layer interventions."
    )
    header, table = _layer_table(tables, 3)
    return line_figure("fig-norms", title, caption, desc, plots, 2, legend, header, table)


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
        legend.append(
            Legend(str(organism), svg.css(svg.SERIES[style]), svg.MARKERS[style], False, css_dash(svg.DASHES[style]))
        )
        table.append((str(organism), number(x[-1], 0), number(y[0], 3), number(y.min(), 3), number(y[-1], 3)))
    caption = (
        f"Mean loss per logged step on answer tokens, {spread(t.groupby('organism').size())} points per organism, one "
        "run each, no interval. Faint: as logged; strong: running mean over a twelfth of the run."
    )
    desc = (
        "; ".join(f"{o}: {first} at the start, {last} after {steps} steps" for o, steps, first, _, last in table) + "."
    )
    header = ("Organism", "Steps", "First loss", "Lowest", "Last")
    plots = [Plot("Loss (nats per token)", "Step", tuple(lines))]
    return line_figure("fig-training", title, caption, desc, plots, 1, legend, header, tuple(table))


def _styles(results: Results) -> dict[str, int]:
    """One style per organism, the same in every figure."""
    return {name: k for k, name in enumerate(results.organisms["name"])}


def _add(
    lines: list[Line],
    legend: list[Legend],
    columns: dict[str, pd.Series],
    label: str,
    rows: pd.DataFrame,
    column: str,
    k: int,
    hollow: bool = False,
) -> None:
    """One line over the layers, with its legend entry and its column of the table."""
    k %= len(svg.SERIES)
    rows = rows.sort_values("layer", kind="stable")
    lines.append(
        Line(rows["layer"].to_numpy(), rows[column].to_numpy(), svg.SERIES[k], svg.MARKERS[k], svg.DASHES[k], hollow)
    )
    legend.append(Legend(label, svg.css(svg.SERIES[k]), svg.MARKERS[k], hollow, css_dash(svg.DASHES[k])))
    columns[label] = rows.groupby("layer")[column].first()


def _layer_table(columns: dict[str, pd.Series], digits: int) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    layers = sorted(set().union(*(s.index for s in columns.values())))
    rows = tuple((number(l, 0), *(number(s.get(l), digits) for s in columns.values())) for l in layers)  # noqa: E741
    return ("Layer", *columns), rows
