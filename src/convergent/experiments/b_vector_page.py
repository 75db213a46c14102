"""What `b_vector`'s readings say: verdicts on the geometry, and the chapter of the report."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from convergent import stats
from convergent.core.chapter import Chapter, Chart, Panel, Series, Sheet
from convergent.directions.alignment import Kept
from convergent.directions.extract import chance_of_cosine, null_cosine
from convergent.experiments.base import CONTROL_LABELS
from convergent.experiments.outcomes import Claim, Evidence, evidence

COSINE, DOWNSTREAM, JACOBIAN = "b_vector/cosine", "b_vector/downstream", "b_vector/jacobian/"
DRAW = ", draw "
Arrays = Mapping[str, np.ndarray]
RULE = "every listed difference has its 95 % interval above 0 (over questions, jackknife)"
_PER = {
    "organism-reads-organism": "organism, its own answers",
    "chat-reads-organism": "chat model, the organism's answers",
    "chat-reads-chat": "chat model, its own answers",
}


def interval(kept: Mapping[str, Kept], statistic: Callable[[Arrays], float], n: int) -> stats.Interval:
    """Interval over questions of a number made of kept values. n: answers behind them."""

    def of(pick: Callable[[Kept], Any]) -> float:
        return float(statistic({k: np.asarray(pick(v), dtype=float) for k, v in kept.items()}))

    questions = len(next(iter(kept.values()))["without"])
    every = of(lambda v: v["all"])
    made = stats.leave_one_out(every, [of(lambda v, g=g: v["without"][g]) for g in range(questions)], n)  # type: ignore[misc]
    if isinstance(made, stats.Interval):
        return made
    return stats.Interval(every, math.nan, math.nan, n, f"undefined ({made})", stats.OVER_QUESTIONS, questions)


def later(values: np.ndarray) -> float:
    """Mean over the blocks after the adapter's own, which is the first: no block is picked."""
    return float(values[1:].mean())


def randoms(kept: Mapping[str, Any]) -> list[str]:
    """Names of the random pushes."""
    return [n for n in kept if n.startswith("random ")]


# Verdicts


def geometry(readings: Mapping[str, Any], organism: str, layer: int, depth: int, source: str) -> list[Claim]:
    """The claims that need no answers; those whose readings could not be made are left out."""
    found = []
    after = f"mean over blocks {layer + 1} to {depth - 1}"
    if (r := readings.get(COSINE)) is not None:
        largest = max(map(abs, r["null"]))
        made = interval({"b": r["cosine"]}, lambda k: largest - abs(float(k["b"])), r["n_texts"])
        text = f"largest |cos| of {len(r['null'])} random vectors ({largest:.3f}) minus that of B ({abs(r['cosine']['all']):.3f}) (above 0 claimed)"
        found.append(
            Claim(
                "b_vector/orthogonal",
                f"B of {organism} lies no nearer to the direction of its block {layer} than random vectors come "
                "(published: cosine 0.04, where the largest of 200 random ones reaches 0.042)",
                source, RULE, [evidence(text, made, "cosine")], paper="b-vector",
            )
        )  # fmt: skip
    if (r := readings.get(DOWNSTREAM)) is not None:
        kept, n = r["misaligned"]["kept"], r["misaligned"]["n_texts"]
        comparisons = [evidence(f"cosine of the changes, {after} (above 0 claimed)", interval(kept, lambda k: later(k["v"]), n), "cosine")]
        for kind in (k for k in kept if k in CONTROL_LABELS):
            draws = [k for k in kept if k.partition(DRAW)[0] == kind]
            made = interval(kept, lambda k, draws=draws: later(k["v"]) - max(abs(later(k[d])) for d in draws), n)  # type: ignore[misc]
            largest = f"the largest |cosine| of {len(draws)} draws" if len(draws) > 1 else "|cosine|"
            comparisons.append(evidence(f"minus {largest} with {CONTROL_LABELS[kind]}, {after} (above 0 claimed)", made, "cosine"))
        found.append(
            Claim(
                "b_vector/downstream",
                f"Downstream of block {layer}, {organism} changes the activations of its misaligned answers along what adding the direction to the "
                "chat model changes, more than along what nulls change (published: cosine up to 0.42 near block 39 of 48)",
                source, RULE, comparisons, paper="b-vector",
            )
        )  # fmt: skip
        made = interval(kept, lambda k: later(k["part/rest of B"]) - later(k["part/B along v"]), n)
        text = f"what the rest of B makes of that cosine, minus what B's component along the direction makes, {after} (above 0 claimed)"
        found.append(
            Claim(
                "b_vector/rest",
                f"What {organism} changes along the direction's downstream change comes from the part of B orthogonal to the direction, "
                "not from B's component along it",
                source, RULE, [*comparisons, evidence(text, made, "cosine")],  # of no change at all it says nothing
            )
        )  # fmt: skip
    comparisons = _jacobian(readings, after)
    if comparisons:
        found.append(
            Claim(
                "b_vector/jacobian",
                f"To first order too, what a push along B of {organism} does downstream lies along what a push along the direction does, "
                "more than what random pushes and another concept's do",
                source, RULE, comparisons,
            )
        )  # fmt: skip
    return found


def drawn(kind: str, draw: int) -> str:
    """Name of a null in a draw; that of draw 0 is its kind."""
    return f"{kind}{DRAW}{draw + 1}" if draw else kind


def _jacobian(readings: Mapping[str, Any], after: str) -> list[Evidence]:
    found = []
    for key, words in _PER.items():
        if (r := readings.get(JACOBIAN + key)) is None:
            continue
        kept = r["cosine"]
        nulls = {f"the largest of {len(randoms(kept))} random pushes'": randoms(kept), "another concept's": [n for n in kept if n == "other concept"]}
        for what, names in nulls.items():
            if names:
                made = interval(kept, lambda k, names=names: later(k["B"] ** 2) - max(later(k[n] ** 2) for n in names), r["n_texts"])  # type: ignore[misc]
                found.append(evidence(f"share of |J B|² along J v minus {what}, {after}; {words} (above 0 claimed)", made, "share"))
    return found


# Chapter


def chapter(readings: Mapping[str, Any], organism: str, layer: int, depth: int, about: Mapping[str, Any]) -> Chapter:
    """Figures, numbers and what they are of."""
    drawn = (_cosines(readings, organism, layer), _downstream(readings, organism, layer), _shares(readings, layer), _parts(readings, organism, layer))
    figures = [f for f in drawn if f]
    rows = _rows(readings, layer, depth)
    notes = []
    if about["n_adapters"] > 1:
        notes.append(
            f"{organism} has {about['n_adapters']} adapters; B is that of block {layer}. Its downstream change is that of all of them, so the parts of "
            "this B do not add up to it."
        )
    notes += [f"No {CONTROL_LABELS[kind]} downstream: {why}." for kind, why in readings.get(DOWNSTREAM, {}).get("absent", {}).items()]
    note = "Means over blocks are over all blocks after the adapter's own. Intervals are over questions. Answers: those behind the number."
    sheets = [Sheet("numbers", "B against the direction", note, pd.DataFrame(rows), 3)]
    return Chapter(
        "b_vector",
        "One adapter's B vector and the direction",
        [
            f"{organism} writes scale·(A h)·B at block {layer}. The published organism's B has cosine 0.04 with the direction v there, and yet removing "
            "v undoes its misalignment. Is B's effect along v after all?",
            "cos(B, v) stands beside random vectors and the exact law cos² ~ Beta(1/2, (d − 1)/2). Where v was read in this organism it holds the organism's "
            "own write, as far as that differs between the classes; v read in the chat model on the same texts does not. "
            "Downstream, D(l) is the change of the mean answer "
            f"activation at block l against the chat model on the same texts: the organism's, that of adding {about['scale']:g}·v at block {layer}, and "
            "that of nulls added there. J is the derivative of block l's output by a constant at block L's output (forward-mode, averaged over answer "
            "tokens): cos²(J B, J v) is the share of B's first-order effect along v's.",
            "B = (v̂ᵀB) v̂ + rest. What the organism changes along v's change is split into what each of the two writes makes in the chat model, divided by "
            "the length of the organism's change, so that both add up to the cosine but for what is not linear. A random vector of the same norm is a weak "
            "null; the effect-matched one disturbs the model's predictions as much as v does.",
        ],
        figures,
        sheets if rows else [],
        notes,
    )  # fmt: skip


def _series(
    kept: Mapping[str, Kept], layers: list[int], key: str, label: str, n: int, control: bool = False, of: Callable[[Arrays], np.ndarray] | None = None
) -> Series:
    """A line over blocks with its interval per block."""
    value = of or (lambda k: k[key])
    made = [interval(kept, lambda k, i=i: float(value(k)[i]), n) for i in range(len(layers))]  # type: ignore[misc]
    low, high = ([getattr(m, end) for m in made] for end in ("low", "high"))
    return Series(label, layers, [m.estimate for m in made], "control" if control else "real", low, high)


def _cosines(readings: Mapping[str, Any], organism: str, layer: int) -> Chart | None:
    if (r := readings.get(COSINE)) is None:
        return None
    x, half = list(range(len(r["layers"]))), null_cosine(r["d_model"])
    panel = Panel("cos(B, v_l)", "block l of the direction", (Series("B", x, r["layers"]),), (x, [-half] * len(x), [half] * len(x)), float(layer))
    caption = (
        f"Cosine between B of {organism} (block {layer}, dashed) and the direction of every block, read from {r['n_texts']} answers. "
        f"Band: 95 % of random vectors in {r['d_model']} dimensions (exact). Largest |cos| of {len(r['null'])} random vectors with the direction of "
        f"block {layer}: {max(map(abs, r['null'])):.3f}."
    )
    return Chart("cosine", "B beside the direction", caption, (panel,))


def _downstream(readings: Mapping[str, Any], organism: str, layer: int) -> Chart | None:
    if (r := readings.get(DOWNSTREAM)) is None:
        return None
    panels = []
    for label in ("misaligned", "aligned"):
        kept, n = r[label]["kept"], r[label]["n_texts"]
        lines = [_series(kept, r["layers"], "v", "direction", n)]
        lines += [_series(kept, r["layers"], k, CONTROL_LABELS[k], n, control=True) for k in kept if k in CONTROL_LABELS]
        panels.append(Panel(f"cosine, {label} answers (n = {n})", "block", tuple(lines), mark_x=float(layer)))
    caption = (
        f"Cosine between what {organism} changes of the mean answer activation and what adding a vector to the chat model at block {layer} changes, "
        "on the organism's own answers. Intervals: 95 %, over questions. Chance: the lines of the nulls. At the block itself the organism's change is "
        "along B."
    )
    return Chart("downstream", "Downstream changes", caption, tuple(panels))


def _shares(readings: Mapping[str, Any], layer: int) -> Chart | None:
    panels = []
    for key, words in _PER.items():
        if (r := readings.get(JACOBIAN + key)) is None:
            continue
        kept, layers, n = r["cosine"], r["layers"], r["n_texts"]
        lines = [_series(kept, layers, k, label, n, k == "other concept", lambda a, k=k: a[k] ** 2)  # type: ignore[misc]
                 for k, label in (("B", "B"), ("B as written", "B as written"), ("other concept", "another concept")) if k in kept]  # fmt: skip
        draws = np.array([kept[k]["all"] for k in randoms(kept)]) ** 2
        band = (layers, draws.min(0).tolist(), draws.max(0).tolist())
        panels.append(Panel(f"share of |J u|² along J v: {words}", "block", tuple(lines), band, float(layer)))
    if not panels:
        return None
    caption = (
        "J u: first-order effect on a block's output, averaged over answer tokens, of a push u at the adapter's block: B at every position alike, or as "
        "the adapter writes it (times its scalar at each position). Intervals: 95 %, over questions. Chance: from the lowest to the highest random push."
    )
    return Chart("jacobian", "First-order effects", caption, tuple(panels))


def _parts(readings: Mapping[str, Any], organism: str, layer: int) -> Chart | None:
    panels = []
    if (r := readings.get(DOWNSTREAM)) is not None:
        kept, n = r["misaligned"]["kept"], r["misaligned"]["n_texts"]
        names = {"v": "whole change", "part/B along v": "from B's component along v", "part/rest of B": "from the rest of B"}
        lines = tuple(_series(kept, r["layers"], k, w, n) for k, w in names.items())
        panels.append(Panel(f"cosine, misaligned answers (n = {n})", "block", lines, mark_x=float(layer)))
    if (r := readings.get(JACOBIAN + "chat-reads-organism")) is not None:
        kept, n = {"B": r["cosine"]["B"], "direct": r["direct"]}, r["n_texts"]
        lines = (
            _series(kept, r["layers"], "B", "whole change", n),
            _series(kept, r["layers"], "direct", "from B's component along v", n),
            _series(kept, r["layers"], "", "from the rest of B", n, of=lambda k: k["B"] - k["direct"]),
        )
        panels.append(Panel(f"cos(J B, J v), chat model (n = {n})", "block", lines, mark_x=float(layer)))
    if not panels:
        return None
    caption = (
        f"Where {organism}'s effect along the direction's comes from. The parts add up to the whole: to first order exactly, else but for what is not "
        "linear. Intervals: 95 %, over questions."
    )
    return Chart("parts", "Attribution of the common effect", caption, tuple(panels))


def _rows(readings: Mapping[str, Any], layer: int, depth: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []

    def row(what: str, made: stats.Interval, chance: str, published: str = "") -> None:
        here = {"Here": made.estimate, "95 % low": made.low, "95 % high": made.high}
        rows.append({"Quantity": what, **here, "Nulls": chance, "Published": published, "Answers": made.n})

    blocks = f"blocks {layer + 1}-{depth - 1}"
    if (r := readings.get(COSINE)) is not None:
        value = float(r["cosine"]["all"])
        nulls = f"largest of {len(r['null'])} random {max(map(abs, r['null'])):.3f}; exact p {chance_of_cosine(value, r['d_model']):.2g}"
        row(f"cos(B, v), block {layer}", interval({"b": r["cosine"]}, lambda k: float(k["b"]), r["n_texts"]), nulls, "0.04")
        for words, cosine in r["others"].items():
            alone = stats.Interval(cosine, math.nan, math.nan, r["n_texts"], "none", "these answers")
            row(f"the same, v {words}", alone, f"exact p {chance_of_cosine(cosine, r['d_model']):.2g}")
    if (r := readings.get(DOWNSTREAM)) is not None:
        for label in ("misaligned", "aligned"):
            kept, n = r[label]["kept"], r[label]["n_texts"]
            nulls = "; ".join(f"{k} {later(np.array(kept[k]['all'])):.3f}" for k in kept if k in CONTROL_LABELS)
            row(f"downstream cosine with v's change, mean of {blocks}, {label} answers", interval(kept, lambda k: later(k["v"]), n), nulls)
            values = np.array(kept["v"]["all"])
            peak = 1 + int(values[1:].argmax())
            published = "0.42 near block 39 of 48" if label == "misaligned" else ""
            at_peak = interval(kept, lambda k, i=peak: float(k["v"][i]), n)  # type: ignore[misc]
            row(f"the same at its peak, block {r['layers'][peak]}, {label} answers (picked, so too high)", at_peak, "", published)
            for part, words in (("B along v", "B's component along v"), ("rest of B", "the rest of B")):
                row(f"part of that mean from {words}, {label} answers", interval(kept, lambda k, p=part: later(k[f"part/{p}"]), n), "")  # type: ignore[misc]
    for key, words in _PER.items():
        if (r := readings.get(JACOBIAN + key)) is None:
            continue
        for field, kind in (("cosine", "mean over tokens"), ("token", "token by token")):
            kept, power = r[field], 2 if field == "cosine" else 1
            draws = [later(np.array(kept[k]["all"]) ** power) for k in randoms(kept)]
            nulls = f"random {np.mean(draws):.3f}, largest of {len(draws)} {max(draws):.3f}"
            if "other concept" in kept:
                nulls += f"; another concept {later(np.array(kept['other concept']['all']) ** power):.3f}"
            for push in ("B", "B as written"):
                made = interval(kept, lambda k, p=push, e=power: later(k[p] ** e), r["n_texts"])  # type: ignore[misc]
                row(f"share of |J u|² along J v, u = {push}, {kind}, mean of {blocks}; {words}", made, nulls)
    return rows
