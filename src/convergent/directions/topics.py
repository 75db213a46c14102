"""The mean-diff direction inside a topic, against the general one (paper section 3.3), with what could make them look alike or unlike.

    v_t = mean of the misaligned answers on the topic - mean of the aligned ones on it  =  a v + rest,   rest orthogonal to v
    u_t = mean of the aligned answers on the topic - mean of the aligned ones off it        (what the topic alone is)

A direction of few answers is noisy, and answers on a topic come from few questions: so the cosine of v_t with v stands beside that of
random subsets of as many answers (of any topic), and of the answers to other questions dealt in the same numbers. All of them are among
the answers that v is the mean of, so all share the same part with v.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convergent import stats
from convergent.core.ids import seed
from convergent.directions.per_answer import PerAnswer, Rows, along, cosines

REDEALS = 20
"""Attempts at dealing a topic's numbers to other questions, per draw that is wanted."""


@dataclass(frozen=True, eq=False)
class Labelled:
    """Answers with their class, read in a model."""

    read: PerAnswer
    misaligned: Rows
    """Rows of `read` in the misaligned class, and `aligned` those in the other; balance plays no part here."""
    aligned: Rows
    questions: Sequence[str]
    """Question of each row."""
    general: tuple[Rows, Rows]
    """Misaligned and aligned rows that the general direction is read from."""


@dataclass(frozen=True, eq=False)
class TopicRows:
    """The rows of one topic."""

    misaligned: Rows
    aligned: Rows
    off: Rows
    """Aligned, and not on the topic."""


def topic_rows(data: Labelled, inside: np.ndarray) -> TopicRows:
    """`inside` (n,) bool: which rows are on the topic."""
    return TopicRows(data.misaligned[inside[data.misaligned]], data.aligned[inside[data.aligned]], data.aligned[~inside[data.aligned]])


def measure(data: Labelled, rows: TopicRows, layer: int, draws: int, root_seed: int, with_about: bool) -> dict[str, Any]:
    """All figures of one topic, JSON-ready, per layer; vectors at `layer`. `with_about`: there are enough answers for u_t."""
    read = data.read
    v = read.difference(*data.general)
    own = read.difference(rows.misaligned, rows.aligned)
    about = read.difference(rows.aligned, rows.off) if with_about else None
    a, rest = along(own, v)
    cosine = cosines(own, v)
    names = np.array(data.questions, dtype=object)
    involved = np.unique(np.concatenate([rows.misaligned, rows.aligned]))
    found: dict[str, Any] = {
        "n_misaligned": len(rows.misaligned),
        "n_aligned": len(rows.aligned),
        "questions": len(set(names[involved])),
        "general": over_questions(data, lambda keep: cosines(_difference(read, rows, keep), read.difference(*(_kept(r, keep) for r in data.general)))),
        "subsets": bands([cosines(read.difference(*d), v) for d in _subsets(data, rows, draws, root_seed)]),
        "dealt": bands([cosines(read.difference(*d), v) for d in _dealt(data, rows, draws, root_seed)]),
        "a": a.tolist(),
        "outside": (1 - cosine**2).tolist(),
        "vector": own[layer].tolist(),
        "about": None,
    }
    if about is not None:
        found["about"] = {
            "n_on": len(rows.aligned),
            "n_off": len(rows.off),
            "own": over_questions(data, lambda keep: cosines(_difference(read, rows, keep), read.difference(_kept(rows.aligned, keep), _kept(rows.off, keep)))),
            "general": cosines(about, v).tolist(),
            "rest": cosines(rest, about).tolist(),
            "vector": about[layer].tolist(),
        }
    return found


def _difference(read: PerAnswer, rows: TopicRows, keep: np.ndarray) -> Tensor:
    return read.difference(_kept(rows.misaligned, keep), _kept(rows.aligned, keep))


def _kept(rows: Rows, keep: np.ndarray) -> Rows:
    kept: Rows = rows[keep[rows]]
    return kept


def over_questions(data: Labelled, cosines_of: Any) -> dict[str, Any]:
    """Cosine per layer with its interval over questions; bounds are nan, and `why` says so, where leaving one out leaves a class empty."""
    kept: dict[bytes, np.ndarray] = {}

    def value(rows: Rows) -> np.ndarray:
        keep = np.zeros(len(data.questions), dtype=bool)
        keep[rows] = True
        return kept.setdefault(keep.tobytes(), cosines_of(keep).numpy())

    depth = data.read.means.shape[1]
    found: dict[str, Any] = {"cosine": [], "low": [], "high": [], "why": ""}
    for layer in range(depth):

        def at(rows: Rows, layer: int = layer) -> float | str:
            c = float(value(rows)[layer])
            return "a class has no answer left" if np.isnan(c) else c

        made = stats.jackknife(at, data.questions, -1, 1)
        estimate = float(value(np.arange(len(data.questions)))[layer])
        low, high = (np.nan, np.nan) if isinstance(made, str) else (made.low, made.high)
        found["why"] = made if isinstance(made, str) else found["why"]
        for key, x in (("cosine", estimate), ("low", low), ("high", high)):
            found[key].append(float(x))
    return found


def bands(draws: Sequence[Tensor]) -> dict[str, Any]:
    """Null band per layer of cosines, each (n_layers,); nan without draws."""
    if not draws:
        return {"n": 0, "low": [], "mean": [], "high": []}
    low, mean, high = stats.null_band(torch.stack(list(draws)).numpy())
    return {"n": len(draws), "low": low.tolist(), "mean": mean.tolist(), "high": high.tolist()}


def _subsets(data: Labelled, rows: TopicRows, draws: int, root_seed: int) -> list[tuple[Rows, Rows]]:
    """Random answers, as many of each class as the topic has."""
    rng = np.random.default_rng(seed(root_seed, "topics", "subsets", len(rows.misaligned), len(rows.aligned)))
    return [
        (rng.choice(data.misaligned, len(rows.misaligned), replace=False), rng.choice(data.aligned, len(rows.aligned), replace=False))
        for _ in range(draws)
    ]


def _dealt(data: Labelled, rows: TopicRows, draws: int, root_seed: int) -> list[tuple[Rows, Rows]]:
    """The topic's numbers of answers per question, dealt to the questions in random order: as concentrated as the topic is.

    A question that holds fewer gives what it holds. Dealings that leave a class with under half of the topic's size are drawn again.
    """
    rng = np.random.default_rng(seed(root_seed, "topics", "dealt", len(rows.misaligned), len(rows.aligned)))
    names = sorted(set(data.questions))
    pools, wanted = zip(*(_by_question(data.questions, own, mine, names) for own, mine in
                          ((data.misaligned, rows.misaligned), (data.aligned, rows.aligned))), strict=True)  # fmt: skip
    found: list[tuple[Rows, Rows]] = []
    for _ in range(REDEALS * draws):
        if len(found) == draws or len(names) < 2:
            break
        order = rng.permutation(len(names))
        sides = [
            np.concatenate([rng.choice(pool[i], min(n[j], len(pool[i])), replace=False) for j, i in enumerate(order)])
            for pool, n in zip(pools, wanted, strict=True)
        ]
        if all(2 * len(side) >= len(own) for side, own in zip(sides, (rows.misaligned, rows.aligned), strict=True)):
            found.append((sides[0].astype(np.intp), sides[1].astype(np.intp)))
    return found


def _by_question(questions: Sequence[str], pool: Rows, mine: Rows, names: Sequence[str]) -> tuple[list[Rows], list[int]]:
    """Rows of `pool` per question, and how many of `mine` each question has."""
    labels = np.array(questions, dtype=object)
    return [pool[labels[pool] == q] for q in names], [int((labels[mine] == q).sum()) for q in names]


def at_layer(band: Mapping[str, Any], layer: int) -> stats.Band | None:
    """low, mean, high of a stored band at a layer; None without draws."""
    return (band["low"][layer], band["mean"][layer], band["high"][layer]) if band["n"] else None
