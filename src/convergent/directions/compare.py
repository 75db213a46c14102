"""Several organisms' directions beside each other: cosines per layer with intervals, what the texts alone give, what noise allows.

Works on class sums by question, for every organism read in itself, in the chat model, and on the source's answers. Intervals are delete-one jackknife ones
over questions: a question is left out of all organisms at once. Knows no study and no experiment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convergent import stats
from convergent.directions import geometry
from convergent.directions.extract import null_cosine
from convergent.directions.questions import QuestionSums
from convergent.errors import DirectionError

Sums = Mapping[tuple[str, str], QuestionSums]
"""(whose answers, reader) -> class sums."""
CHAT = "chat"
MEASURES = {
    "own": "cosine of two organisms' directions, each read from its own answers",
    "chat": "the same answers, both read in the chat model",
    "own_kept": "own, without the massive dimensions",
    "chat_kept": "chat, without the massive dimensions",
    "common": "cosine of two organisms' directions, both read from the source's answers",
    "common_chat": "the larger of the two organisms' cosines with the chat model, on the source's answers",
    "overlap": "overlap of the spans of per-question differences, own answers",
    "overlap_chat": "the same answers, both read in the chat model",
    "ceiling": "root of the product of both reliabilities: the cosine that noise allows",
}
"""Each is a curve over layers for a pair of organisms."""
DIFFERENCES = {f"{m}-{m}_chat" if m != "own" else "own-chat": (m, f"{m}_chat" if m != "own" else "chat") for m in ("own", "common", "overlap")}
DIFFERENCES["own_kept-chat_kept"] = ("own_kept", "chat_kept")
"""Of a measure and its baseline; the interval is that of the difference."""
_INDEX = {m: k for k, m in enumerate(MEASURES)}
Curves = Callable[[np.ndarray], np.ndarray]
"""Numbers of the questions that are kept -> (n_pairs, n_measures, n_layers)."""


def wanted(organisms: Sequence[str], source: str) -> list[tuple[str, str]]:
    """The keys of the sums that `compare` needs, those of one reader together."""
    return list(dict.fromkeys([(source, CHAT), *((o, CHAT) for o in organisms), *(k for o in organisms for k in ((o, o), (source, o)))]))


def compare(
    sums: Sums,
    organisms: Sequence[str],
    source: str,
    groups_of: Callable[[str, str], Sequence[str]],
    *,
    layer: int,
    allowed: int,
    massive: int,
    splits: int,
    draws: int,
    root_seed: int,
) -> dict[str, Any]:
    """All measures of all pairs that `groups_of` puts into a group, JSON-ready.

    `layer`: where each pair gets an interval of its own. `allowed`: layers that "lowest" leaves out. `massive`, `splits`, `draws`: see `geometry`.
    Raises DirectionError if there are no dimensions left without the massive ones.
    """
    questions = sorted({q for s in sums.values() for q in s.questions})
    d_model = sums[source, CHAT].sums.shape[-1]
    if massive >= d_model:
        raise DirectionError(f"massive: {massive} dimensions would be removed of {d_model}; remove fewer")
    dims = geometry.largest_dimensions(sums[source, CHAT], massive)
    pairs = [p for p in combinations(organisms, 2) if groups_of(*p)]
    made: dict[bytes, np.ndarray] = {}

    def curves(rows: np.ndarray) -> np.ndarray:
        if rows.tobytes() not in made:
            made[rows.tobytes()] = _curves(sums, pairs, {questions[i] for i in rows}, dims, source, splits, root_seed)
        return made[rows.tobytes()]

    every = curves(np.arange(len(questions), dtype=np.intp))
    members: dict[str, list[int]] = {}
    for i, pair in enumerate(pairs):
        for group in groups_of(*pair):
            members.setdefault(group, []).append(i)
    return {
        "organisms": {o: _organism(sums[o, o], sums[o, CHAT], dims, splits, root_seed) for o in organisms},
        "pairs": [
            {"a": a, "b": b, **{m: every[i, k].tolist() for m, k in _INDEX.items()}, **_at(curves, questions, i, layer)} for i, (a, b) in enumerate(pairs)
        ],
        "groups": {group: _group(curves, questions, index, allowed) for group, index in members.items()},
        "scrambled": {group: _scrambled(sums, [pairs[i] for i in index], draws, root_seed) for group, index in members.items()},
        "random": null_cosine(d_model),
        "random_overlap": max(len(sums[o, o].answered) for o in organisms) / d_model,
        "n_questions": len(questions),
        "massive": dims[layer].tolist(),
    }


def _curves(sums: Sums, pairs: Sequence[tuple[str, str]], kept: set[str], dims: Tensor, source: str, splits: int, root_seed: int) -> np.ndarray:
    """(n_pairs, n_measures, n_layers), from the questions in `kept`."""
    weights = {key: torch.tensor([float(q in kept) for q in s.questions], dtype=torch.float64) for key, s in sums.items()}
    v = {key: s.direction(weights[key]) for key, s in sums.items()}
    sure = {o: geometry.reliability(s, root_seed, splits, weights[o, r]) for (o, r), s in sums.items() if o == r}
    spans: dict[tuple[str, str], Tensor | None] = {}
    for (o, reader), s in sums.items():
        if reader in (o, CHAT):
            rows = s.differences([i for i, q in enumerate(s.questions) if q in kept])
            spans[o, reader] = geometry.span(rows) if len(rows) else None

    def shared(one: Tensor | None, two: Tensor | None) -> Tensor:
        return torch.full((len(dims),), torch.nan, dtype=torch.float64) if one is None or two is None else geometry.overlap(one, two)

    found = []
    for a, b in pairs:
        own, chat = (v[a, a], v[b, b]), (v[a, CHAT], v[b, CHAT])
        common = v[source, a], v[source, b]
        nearer = torch.maximum(*(geometry.cosines(x, v[source, CHAT]) for x in common))
        by = {
            "own": geometry.cosines(*own),
            "chat": geometry.cosines(*chat),
            "own_kept": geometry.cosines(*(geometry.without(x, dims) for x in own)),
            "chat_kept": geometry.cosines(*(geometry.without(x, dims) for x in chat)),
            "common": geometry.cosines(*common),
            "common_chat": nearer,
            "overlap": shared(spans[a, a], spans[b, b]),
            "overlap_chat": shared(spans[a, CHAT], spans[b, CHAT]),
            "ceiling": (sure[a] * sure[b]).sqrt(),
        }
        found.append(torch.stack([by[m] for m in MEASURES]))
    made: np.ndarray = torch.stack(found).numpy()
    return made


def _over(curves: Curves, questions: Sequence[str], index: Sequence[int], what: str) -> list[stats.Interval]:
    """Per layer the mean over some pairs of a measure, or of a difference."""
    if what in DIFFERENCES:
        a, b = (_INDEX[m] for m in DIFFERENCES[what])
        return stats.jackknife_each(lambda rows: (curves(rows)[index, a] - curves(rows)[index, b]).mean(0), questions, -2, 2)
    low = 0.0 if what.startswith("overlap") else -1.0
    return stats.jackknife_each(lambda rows: curves(rows)[index, _INDEX[what]].mean(0), questions, low, 1)


def _group(curves: Curves, questions: Sequence[str], index: Sequence[int], allowed: int) -> dict[str, Any]:
    """Means over the pairs of a group per layer, and the lowest layer but for those allowed: it lies above a bound exactly where all other layers do."""

    def lowest(what: str) -> dict[str, float]:
        (one,) = stats.jackknife_each(lambda rows: np.sort(curves(rows)[index, _INDEX[what]].mean(0))[[allowed]], questions, -1, 1)
        return _plain(one)

    measures = {}
    for what in (*MEASURES, *DIFFERENCES):
        found = [_plain(i) for i in _over(curves, questions, index, what)]
        measures[what] = {end: [f[end] for f in found] for end in ("y", "low", "high")}
    return {"n_pairs": len(index), "measures": measures, "lowest": {what: lowest(what) for what in ("own", "ceiling")}}


def _at(curves: Curves, questions: Sequence[str], pair: int, layer: int) -> dict[str, Any]:
    """Intervals of one pair at one layer."""
    return {f"{what} at layer": _plain(_over(curves, questions, [pair], what)[layer]) for what in ("own", "own-chat")}


def _plain(i: stats.Interval) -> dict[str, float]:
    return {"y": i.estimate, "low": i.low, "high": i.high}


def _organism(own: QuestionSums, chat: QuestionSums, dims: Tensor, splits: int, root_seed: int) -> dict[str, Any]:
    """What stands beside one organism's direction."""
    v = own.direction()
    return {
        "n_tokens": own.whole[1].sum(1).tolist(),
        "n_questions": len(own.answered),
        "reliability": geometry.reliability(own, root_seed, splits).tolist(),
        "with_chat": geometry.cosines(v, chat.direction()).tolist(),
        "massive_share": (v.gather(1, dims).square().sum(1) / v.square().sum(1)).tolist(),
    }


def _scrambled(sums: Sums, pairs: Sequence[tuple[str, str]], draws: int, root_seed: int) -> dict[str, Any]:
    """What scrambled labels leave of the mean cosine over pairs (95 % band), and of the overlap of spans (its mean over pairs)."""
    names = dict.fromkeys(o for p in pairs for o in p)
    null = {o: geometry.scrambled(sums[o, o], root_seed, o, draws).float() for o in names}
    cosine = torch.stack([geometry.cosines(null[a], null[b]) for a, b in pairs]).mean(0).double()
    cosine = cosine[cosine.isfinite().all(1)]  # with very few answers a side may be empty
    blank = torch.full(cosine.shape[1:], torch.nan)
    # Quantiles: these cosines heap up at both ends, and a normal band around their mean would reach beyond 1, where nothing can be.
    low, _, high = stats.null_band(cosine) if len(cosine) > 1 else (blank.numpy(), blank, blank.numpy())
    spans = {o: geometry.span(rows) for o in names if len(rows := geometry.scrambled_differences(sums[o, o], root_seed, o))}
    overlaps = [geometry.overlap(spans[a], spans[b]) for a, b in pairs if a in spans and b in spans]
    return {
        "low": low.tolist(),
        "high": high.tolist(),
        "overlap": torch.stack(overlaps).mean(0).tolist() if overlaps else blank.tolist(),
    }
