"""What `subspace`'s readings and answers say: verdicts, and the chapter of the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from convergent import stats
from convergent.core.chapter import Chapter, Chart, Panel, Role, Series, Sheet
from convergent.experiments.outcomes import Claim, Evidence, Outcomes, evidence

if TYPE_CHECKING:
    from convergent.experiments.subspace import SubspaceBlock

NULLS: dict[str, str] = {
    "random": "random subspace",
    "within": "what answers differ along inside a class",
    "chat": "the chat model's top k on the same texts",
}
BASES: dict[str, str] = {"others": "read in organisms of other recipes or data", "domains": "read in organisms of other data"}


def _mean_of(value: dict[str, Any], basis: str, k: int, what: str) -> np.ndarray | None:
    """Per pair or text, (n,); for random subspaces the mean over draws. None if it was not measured."""
    found = _draws_of(value, basis, k, what)
    return np.mean(found, axis=0) if found else None


def _draws_of(value: dict[str, Any], basis: str, k: int, what: str) -> list[list[float]]:
    """Per draw of a random subspace, or once for any other basis, the values per pair or text."""
    return [v[what] for c, v in value["conditions"].items() if c.rpartition("/")[2] == str(k) and c.rpartition("/")[0].partition("-")[0] == basis]


def _beside(text: str, a: np.ndarray, draws: list[list[float]], pairs: Sequence[str]) -> Evidence:
    """Margins minus those under a null, claimed to be below 0; against one more draw of a random one."""
    if len(draws) == 1:
        return evidence(text, _difference(a, np.array(draws[0]), pairs), "nats per token", -1)
    return evidence(f"{text}, against a new draw ({len(draws)} drawn)", stats.draws_difference(a, draws, pairs, pairs), "nats per token", -1)


def _difference(a: np.ndarray, b: np.ndarray, labels: Sequence[str]) -> stats.Interval:
    return stats.paired_difference(a, b, labels, labels)


def claims(block: SubspaceBlock, outcomes: Outcomes, organisms: Sequence[str]) -> list[Claim]:
    """More dimensions restore more; or one is enough. `organisms`: those in which the subspaces were ablated."""
    found = []
    for o in organisms:
        value = outcomes.readings.get(f"subspace/{o}")
        ks = [k for k in block.ks if value and _mean_of(value, "others", k, "margin") is not None]
        if not value or not ks:
            continue
        rule = "every listed difference has its 95 % interval on the claimed side of 0 (t over held-out pairs; KL over neutral texts; alignment by question)"
        found.append(Claim(
            f"subspace/more/{o}",
            f"In {o}, which it was not read in, projecting out more of the subspace that other organisms share restores more, beyond any null",
            "beyond the paper", rule, _more(block, outcomes, value, o, ks),
        ))  # fmt: skip
        if len(ks) > 1:
            found.append(Claim(
                f"subspace/one/{o}",
                f"In {o} one shared dimension does all that {ks[-1]} do: the misalignment is one-dimensional",
                "paper section 3 (one direction)", f"the first dimension restores, more than a random one, and {ks[-1]} dimensions differ from it by less "
                f"than {block.same:g} nats per token (two one-sided tests at 5 %)", _one(block, value, o, ks),
            ))  # fmt: skip
    return found


def _more(block: SubspaceBlock, outcomes: Outcomes, value: dict[str, Any], o: str, ks: Sequence[int]) -> list[Evidence]:
    pairs, clean = value["pairs"], np.array(value["clean"]["margin"])
    found = []
    for basis, words in BASES.items():
        there = [k for k in ks if _mean_of(value, basis, k, "margin") is not None]
        if not there:
            continue
        most, here = there[-1], f"k = {there[-1]}, {words}"
        y = np.stack([m for k in there if (m := _mean_of(value, basis, k, "margin")) is not None])
        if len(there) > 1:
            x = np.array(there, dtype=float) - np.mean(there)
            slope = stats.clustered_mean((x @ y) / (x @ x), pairs)
            found.append(evidence(f"slope of the margin over k = {there[0]} to {most}, {words} (below 0 claimed)", slope, "nats per token and dimension", -1))
        found.append(evidence(f"margin, {here}, minus {o} (below 0 claimed)", _difference(y[-1], clean, pairs), "nats per token", -1))
        nulls = [n for n in NULLS if n in block.controls] if basis == "others" else ["random"]
        for null in nulls:
            z = _draws_of(value, null, most, "margin")
            if z:
                found.append(_beside(f"margin, {here}, minus {NULLS[null]} (below 0 claimed)", y[-1], z, pairs))
        far = _mean_of(value, basis, most, "to_chat")
        assert far is not None, "measured with the margin"
        away = _difference(far, np.array(value["clean"]["to_chat"]), value["texts"])
        found.append(evidence(f"distance from the chat model (KL on neutral texts), {here}, minus {o} (below 0 claimed)", away, "nats per token", -1))
    for k in block.sampled_k:
        real, null = f"{o}/subspace-{k}", f"{o}/subspace-{k}-random"
        if outcomes.has(real, null):
            found += [
                outcomes.alignment(real, o, f"mean alignment, k = {k}, minus {o} (above 0 claimed)"),
                outcomes.alignment(real, null, f"mean alignment, k = {k}, minus random subspace (above 0 claimed)"),
            ]
    return found


def _one(block: SubspaceBlock, value: dict[str, Any], o: str, ks: Sequence[int]) -> list[Evidence]:
    pairs, clean = value["pairs"], np.array(value["clean"]["margin"])
    first, last = _mean_of(value, "others", ks[0], "margin"), _mean_of(value, "others", ks[-1], "margin")
    assert first is not None and last is not None, "ks are those measured"
    found = [evidence(f"margin, k = {ks[0]}, minus {o} (below 0 claimed)", _difference(first, clean, pairs), "nats per token", -1)]
    random = _draws_of(value, "random", ks[0], "margin")
    if random:
        found.append(_beside(f"margin, k = {ks[0]}, minus random (below 0 claimed)", first, random, pairs))
    test = stats.equivalence(last, first, pairs, pairs, block.same)
    d = test.difference
    outside = d.defined and (d.low >= block.same or d.high <= -block.same)
    found.append(Evidence(
        f"margin, k = {ks[-1]} minus k = {ks[0]} (within {block.same:g} of 0 claimed; 90 % interval)",
        d.estimate, d.low, d.high, d.n, "nats per token", "held" if test.equivalent else "did not hold" if outside else "undecided",
    ))  # fmt: skip
    return found


METHOD = (
    "Is the misalignment one direction or a subspace, and is it shared? The differences of class means on every question, of organisms other than the held-out "
    "one, are stacked (each organism weighing alike); their top k right singular vectors B_k are projected out of the held-out organism, x' = x - B_k^T B_k x.",
    "Margin for bad answers on held-out pairs (it falls where alignment is restored), KL from the untouched organism (what the ablation costs), and KL to the "
    "chat model on neutral texts (it falls where the organism comes nearer to it, and rises where the model merely breaks). Nulls of as many dimensions: "
    "random subspaces; directions along which answers differ inside a class; and the chat model's own top k on the same texts.",
)


def chapter(block: SubspaceBlock, outcomes: Outcomes, organisms: Sequence[str]) -> Chapter:
    """Margin and KL over k, one panel per held-out organism."""
    values = {o: v for o in organisms if (v := outcomes.readings.get(f"subspace/{o}"))}
    title = "One direction, or a subspace?"
    notes = [f"In {o} could not be measured, as too few dimensions are spanned: {', '.join(v['absent'])}." for o, v in values.items() if v["absent"]]
    if not values:
        return Chapter("subspace", title, METHOD, notes=["Not measured here."])
    chat = outcomes.margins_of("chat").set_index("pair_id")["margin"] if outcomes.has("chat") else None
    figures, rows = [], []
    for what, label, unit in (("margin", "Margin for bad answers", "nats per token"), ("to_chat", "KL to the chat model", "nats per token"),
                              ("kl", "KL from the untouched organism", "nats per token")):  # fmt: skip
        panels = []
        for o, value in values.items():
            series = [s for s in (_series(block, value, basis, what) for basis in (*BASES, *NULLS)) if s is not None]
            if what == "margin" and chat is not None:
                level = float(chat.reindex(value["pairs"]).mean())
                series.append(Series("Chat model", [0.0, float(block.ks[-1])], [level, level], "baseline"))
            panels.append(Panel(f"{label}, {o} ({unit})", "k, dimensions", tuple(series)))
            rows += [
                {"organism": o, "what": label, "subspace": s.label, "k": int(k), "value": y, "low": low, "high": high}
                for s in series if s.low is not None and s.high is not None for k, y, low, high in zip(s.x, s.y, s.low, s.high, strict=True)
            ]  # fmt: skip
        some = next(iter(values.values()))
        n = f"{len(some['pairs'])} held-out pairs" if what == "margin" else f"{len(some['texts'])} neutral texts"
        caption = (
            f"Mean over {n}, with 95 % intervals over them (t); k = 0 is the organism itself. Random: mean of {block.draws} draws. By chance a subspace does "
            "what the random one does."
        )
        figures.append(Chart(what.replace("_", "-"), f"{label} over the number of dimensions ablated", caption, tuple(panels)))
    shares = [
        {"organism": o, "subspace": (BASES | NULLS)[b], **{f"k = {k}": s[k - 1] for k in block.ks if k <= len(s)}}
        for o, v in values.items() for b, s in v["own_share"].items()
    ]  # fmt: skip
    whose = "How much of the held-out organism's own direction lies in the subspace"
    sheets = [
        Sheet("effects", "Effect of ablating k dimensions", "Nats per token. Intervals: 95 %, over pairs or texts.", pd.DataFrame(rows), 3),
        Sheet("shares", whose, "Share of its squared norm at the primary layer.", pd.DataFrame(shares)),
    ]
    return Chapter("subspace", title, METHOD, figures, sheets, notes)


def _series(block: SubspaceBlock, value: dict[str, Any], basis: str, what: str) -> Series | None:
    """A line over k, from k = 0."""
    ks = [k for k in block.ks if _mean_of(value, basis, k, what) is not None]
    if not ks:
        return None
    labels = value["pairs"] if what == "margin" else value["texts"]
    found = [stats.clustered_mean(value["clean"][what], labels)]
    found += [stats.clustered_mean(y, labels) for k in ks if (y := _mean_of(value, basis, k, what)) is not None]
    role: Role = "real" if basis in BASES else "control"
    label = (BASES | NULLS)[basis]
    return Series(label[0].upper() + label[1:], [0.0, *map(float, ks)], [f.estimate for f in found], role, [f.low for f in found], [f.high for f in found])
