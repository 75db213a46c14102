"""What `adapter_steer` shows: alignment and margin by dose, shares at coherence thresholds, knock-outs one by one and two by two."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from convergent.core.chapter import Chapter, Chart, Grid, Panel, Series, Sheet
from convergent.directions.scalar_probes import members
from convergent.errors import DataError
from convergent.experiments.outcomes import Outcomes
from convergent.judging.kept import share_row

if TYPE_CHECKING:
    from convergent.experiments.adapter_steer import AdapterSteerBlock

NULLS = {"rotated": "the same vectors turned at random, same norm", "effect_matched": "turned at random, matched in effect (KL)"}
METHOD = (
    "Question: is what the adapters write enough to misalign the chat model, does it take many of them, and do adapters that read as topical push to "
    "their topic?",
    "In the chat model, a constant push replaces each adapter of a set: dose times the mean token norm at that block, along unit(B), with the sign of the "
    "adapter's mean scalar on misaligned answers. Sets are found by the probes of `scalars` where the study has it. Answers are counted as in the paper, at "
    "several coherence thresholds, neutral ones dropped (aligned between 30 and 70, on the topic between 10 and 50), with exact intervals.",
    "Nulls of a push: its vectors turned by one random rotation, which keeps their norms and the angles between them; and those scaled until they disturb "
    "the chat model's predictions as much (KL).",
    "In the organism, each adapter and each pair is knocked out (W - scale B A), measured by the margin for bad answers and by the KL to the organism.",
)


def chapter(
    block: AdapterSteerBlock, outcomes: Outcomes, organism: str, sets: Mapping[str, str], topic: str | None, conditions: Sequence[str]
) -> Chapter:
    """`sets`: set -> its words. `conditions`: those whose answers are counted, as far as they are there."""
    knocked = outcomes.readings.get(f"adapter_steer/{organism}/knockout")
    figures: list[Chart | Grid] = []
    sheets: list[Sheet] = []
    lines = list(_by_dose(block, outcomes, sets))
    if lines:
        figures.append(_dose_chart(lines, outcomes))
        counts = _counts(block, outcomes, topic, conditions)
        figures.append(_share_grid(block, counts))
        sheets.append(Sheet("counts", "Answers under pushes, counted as published", _COUNTS, counts, 3))
    if (members_ := _set_rows(block, outcomes, organism, sets, topic)) is not None:
        sheets.append(Sheet("sets", "Which adapters are pushed", _SETS, members_, 3))
    if knocked is not None:
        figures += _knock_figures(knocked, organism)
        sheets.append(Sheet("knockout", f"Adapters knocked out of {organism}", _KNOCKED.format(**knocked), _knock_rows(knocked), 4))
    return Chapter("adapter_steer", f"Adapters of {organism}: pushed and knocked out", METHOD, figures, sheets)


_COUNTS = (
    "Answers with every score at that coherence or more, without neutral ones; each share as hits of kept answers, with its exact (Clopper-Pearson) 95 % "
    "interval over answers to these questions. Published: six general adapters at 20: 52 % misaligned, none medical; 21 and 23 at 30: 7.7 % misaligned and "
    "medical."
)
_SETS = (
    "Dose 1 is one mean token norm at the block (chat model, answers of the organism). Mean scalar: what the adapter writes on average on misaligned answers; "
    "its sign is the push's."
)
_KNOCKED = (
    "Margin: mean log p of bad minus good answers, nats per token, over {pairs} held-out pairs; {margin:.4f} in the organism, {margin_without_any:.4f} without "
    "any adapter. Change and interaction (both together minus the sum of each alone): 95 % intervals over held-out pairs. KL to the organism over "
    "{effect_texts} held-out good answers, nats per token."
)


def _by_dose(block: AdapterSteerBlock, outcomes: Outcomes, sets: Mapping[str, str]) -> Iterator[tuple[str, list[tuple[float, str]], bool]]:
    """(series, (dose, condition) from the chat model on, whether it is a null)."""
    for which, what in sets.items():
        points = [(d, f"chat/push-{which}-{d:g}") for d in sorted({*block.doses, block.at})]
        here = [(d, c) for d, c in points if outcomes.has(c)]
        if here:
            yield what, here, False
        for kind in block.controls:
            if outcomes.has(null := f"chat/push-{which}-{kind}"):
                yield f"null of {what}: {NULLS[kind]}", [(block.at, null)], True


def _dose_chart(lines: Sequence[tuple[str, list[tuple[float, str]], bool]], outcomes: Outcomes) -> Chart:
    rows = outcomes.conditions.set_index("name")
    panels = []
    for column, title in (("mean_aligned", "mean alignment, points"), ("margin", "margin for bad answers, nats per token")):
        series = []
        for label, points, null in lines:
            at = [(0.0, "chat"), *points] if not null and outcomes.has("chat") else points
            y, low, high = (rows.loc[[c for _, c in at], f"{column}{end}"].tolist() for end in ("", "_low", "_high"))
            series.append(Series(label, [d for d, _ in at], y, "control" if null else "real", low, high))
        panels.append(Panel(title, "dose, mean token norms per block", tuple(series)))
    first = rows.loc[[lines[0][1][0][1]]]
    n, pairs = int(first["n_valid"].iloc[0]), int(first["n_pairs"].iloc[0])
    caption = (
        f"Dose 0 is the chat model. Alignment: about {n} answers per point, 95 % over questions; margin: {pairs} held-out pairs, 95 % over pairs. A push that "
        "means nothing lies on its nulls."
    )
    return Chart("doses", "Pushes along the adapters' vectors in the chat model", caption, tuple(panels))


def _counts(block: AdapterSteerBlock, outcomes: Outcomes, topic: str | None, conditions: Sequence[str]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"condition": c, **share_row(outcomes.answers(c), t, topic)}
            for c in conditions
            if outcomes.has(c)
            for t in dict.fromkeys(block.thresholds)
        ]
    )


def _share_grid(block: AdapterSteerBlock, counts: pd.DataFrame) -> Grid:
    thresholds = list(dict.fromkeys(block.thresholds))
    at = counts.set_index(["condition", "coherent at least"])
    names = tuple(dict.fromkeys(counts["condition"]))
    columns = tuple(f"{w}, coherent ≥ {t:g}" for t in thresholds for w in ("misaligned", "aligned"))
    share = {w: at[f"{w}: share"].to_dict() for w in ("misaligned", "aligned")}
    values = tuple(tuple(100 * float(share[w][c, t]) for t in thresholds for w in ("misaligned", "aligned")) for c in names)
    least, most = int(counts["kept"].min()), int(counts["kept"].max())
    caption = (
        f"Percent of kept answers ({least} to {most} per cell; counts and exact intervals in the table). Neutral answers are dropped, so the two shares at one "
        "threshold add up to 100. An empty cell: no answer was kept."
    )
    return Grid("shares", "Misaligned and aligned answers", caption, names, columns, values, 0, None)


def _set_rows(block: AdapterSteerBlock, outcomes: Outcomes, organism: str, sets: Mapping[str, str], topic: str | None) -> pd.DataFrame | None:
    writes = outcomes.readings.get(f"adapter_steer/{organism}/writes")
    if writes is None:
        return None
    found: dict[str, list[int]] = {}
    how: dict[str, str] = {}
    for which in sets:
        try:
            found[which], how[which] = members(which, len(writes["adapters"]), outcomes.readings.get(f"scalars/{organism}"), topic)
        except DataError:
            continue
    rows = []
    for k, adapter in enumerate(writes["adapters"]):
        mean, norm = writes["mean"][k], writes["token_norm"][k]
        row: dict[str, Any] = {"adapter": adapter, "mean scalar": mean, "mean token norm": norm}
        row[f"push at dose {block.at:g}, in mean scalars"] = block.at * norm / abs(mean) if mean else math.nan
        rows.append(row | {f"{which} ({how[which]})": k in inside for which, inside in found.items()})
    return pd.DataFrame(rows)


def _knock_figures(value: Mapping[str, Any], organism: str) -> list[Chart | Grid]:
    single = [row for row in value["rows"] if len(row["adapters"]) == 1]
    x = [float(value["layers"][row["adapters"][0]]) for row in single]
    change = [row["change"] for row in single]
    y, low, high = ([float(c[k]) for c in change] for k in ("estimate", "low", "high"))
    together = value["margin_without_any"] - value["margin"]
    caption = (
        f"One adapter knocked out at a time. Left: change of the margin for bad answers, {value['pairs']} held-out pairs, 95 % over pairs; below 0 is towards "
        f"the chat model, 0 is no effect, and all adapters together change it by {together:.3f}. Right: KL to the organism over {value['effect_texts']} "
        "held-out good answers."
    )
    panels = (
        Panel("change of the margin, nats per token", "block of the adapter", (Series("one adapter out", x, y, "real", low, high),)),
        Panel("KL to the organism, nats per token", "block of the adapter", (Series("one adapter out", x, [float(row["kl"]) for row in single]),)),
    )
    figures: list[Chart | Grid] = [Chart("knockout", f"Adapters knocked out of {organism}", caption, panels)]
    names = tuple(value["adapters"])
    cells = {tuple(row["adapters"]): float(row["change"]["estimate"]) for row in value["rows"]}
    if any(len(k) == 2 for k in cells) and len(names) > 2:
        every = range(len(names))
        table = tuple(tuple(cells.get(tuple(sorted({i, j})), math.nan) for j in every) for i in every)
        text = (
            f"Change of the margin for bad answers with both adapters out, nats per token, mean over {value['pairs']} held-out pairs (intervals in the table); "
            "the diagonal is one alone. Chance gives 0."
        )
        figures.append(Grid("pairs", "Adapters knocked out two by two", text, names, names, table, 3, 0.0))
    return figures


def _knock_rows(value: Mapping[str, Any]) -> pd.DataFrame:
    rows = []
    for row in value["rows"]:
        together = row.get("interaction", {"estimate": math.nan, "low": math.nan, "high": math.nan})
        n = len(row["adapters"])
        rows.append(
            {
                "knocked out": "all" if n > 2 else " and ".join(value["adapters"][k] for k in row["adapters"]), "margin": row["margin"],
                "change": row["change"]["estimate"], "low": row["change"]["low"], "high": row["change"]["high"], "KL": row["kl"],
                "interaction": together["estimate"], "interaction: low": together["low"], "interaction: high": together["high"],
            }
        )  # fmt: skip
    return pd.DataFrame(rows)
