"""What LoRA scalars say of two classes of answers and of topics, as aggregated values: class means, probes with their baselines, intervals.

Reads answers with labels and an organism; keeps no token. Knows nothing of studies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from convergent import stats
from convergent.directions.probes import (
    SMALLEST,
    Root,
    Task,
    Tokens,
    alone,
    by_group,
    by_question,
    by_token,
    coefficients,
    over_questions,
    question_only,
    task,
)
from convergent.directions.scalars import labels, random_readers, read_answer, readers
from convergent.errors import DataError
from convergent.models.load import ChatModel
from convergent.models.texts import Text
from convergent.organisms.adapters import Adapter
from convergent.stats.values import undefined

MAIN = "aligned_vs_misaligned"
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Rules:
    """How answers become classes and tokens features."""

    topics: tuple[str, ...] = ()
    """Columns of scores that say what an answer is about."""
    topic_min: float = 50.0
    """On the topic: scored so or higher (published)."""
    topic_max: float = 10.0
    """Off the topic: scored so or lower; 1 as published, which a judge that gives no round numbers hardly ever says."""
    c: float | None = None
    """Inverse strength of the L1 penalty; by default what weighs each token as the published 0.01 does (`Task.c`)."""
    repeats: int = 20
    """Random splits by token; 100 as published."""
    significant: float = 0.25
    """Share of tokens, the most significant ones, that the probes are fitted to once more."""
    log_significance: float | None = None
    """Instead of a share: natural logarithm of the smallest significance; 0.5 as published."""
    draws: int = 20
    """Random directions per adapter that read the same input."""


@dataclass(frozen=True, eq=False)
class _Read:
    """All answer tokens of both classes."""

    answers: pd.DataFrame
    """As given to `measured`, one row per answer that is not empty, with its KL per token."""
    names: tuple[str, ...]
    values: NDArray[np.float64]
    """(n_tokens, n_adapters, 1 + draws): the adapter's own scalar, then those of random directions."""
    significance: NDArray[np.float64]
    answer: NDArray[np.intp]
    """(n_tokens,) row of `answers`."""

    def tokens(self, name: str, answers: Mask) -> Tokens:
        """The tokens of some answers."""
        rows = answers[self.answer]
        question = self.answers["question_id"].to_numpy()[self.answer]
        return Tokens(name, self.names, self.values[rows, :, 0], self.answer[rows], question[rows], self.significance[rows])

    def random(self, a: Mask, b: Mask, draw: int) -> NDArray[np.float64]:
        """(n_tokens, n_adapters) of a random draw, for the tokens of a, then b."""
        return np.concatenate([self.values[side[self.answer], :, 1 + draw] for side in (a, b)])


def measured(
    organism: ChatModel, adapters: tuple[Adapter, ...], answers: pd.DataFrame, texts: Mapping[str, Text], rules: Rules, root_seed: int
) -> dict[str, Any]:
    """Everything about the scalars of an organism with rank-1 adapters, JSON-ready.

    `answers`: response_id, question_id, misaligned (bool) and the scores of `rules.topics`. Raises DataError if every answer is empty.
    """
    found = _read(organism, adapters, answers, texts, rules, root_seed)
    classes = _classes(found.answers, rules)
    root: Root = (root_seed, "scalars")
    keep = _smallest(found.significance, rules)
    probes: dict[str, Any] = {}
    absent: list[str] = []
    for key, (a, b) in _comparisons(rules.topics).items():
        sides = [found.tokens(n, classes[n]) for n in (a, b)]
        few = next((n for n, t in zip((a, b), sides, strict=True) if len(t.values) < SMALLEST or len(set(t.response.tolist())) < 2), None)
        if few is None:
            probes[key] = _probe(sides[0], sides[1], rules, (*root, key), keep)
        else:
            absent.append(f"{words(a)} against {words(b)} is left out: {int(classes[few].sum())} of the answers are {words(few)}.")
    bad, good = classes["misaligned"], classes["aligned"]
    return {
        "adapters": list(found.names),
        "layers": [a.layer for a in adapters],
        "classes": {n: _describe(found, mask) for n, mask in classes.items()},
        "smallest_significance": keep,
        "probes": probes,
        "alone": _alone(found, bad, good, rules.draws),
        "random": _against_random(found, bad, good, rules, (*root, MAIN)) if MAIN in probes else {},
        "reads": _reads(found.names, probes, rules.topics),
        "absent": absent,
    }


def words(name: str) -> str:
    """A class in words: "non-medical, aligned"."""
    return name.replace("_", ", ")


def _read(
    organism: ChatModel, adapters: tuple[Adapter, ...], answers: pd.DataFrame, texts: Mapping[str, Text], rules: Rules, root_seed: int
) -> _Read:
    own, random = readers(adapters), random_readers(adapters, root_seed, rules.draws)
    read = [torch.cat([a, r]) for a, r in zip(own, random, strict=True)]
    values, weights, index, kept, kl = [], [], list[int](), list[int](), []
    for row, response in enumerate(answers["response_id"]):
        one = read_answer(organism, texts[response], adapters, read)
        if one is None:
            continue
        values.append(one.values.reshape(len(one.values), len(adapters), 1 + rules.draws))
        weights.append(one.significance)
        index += [len(kept)] * len(one.values)
        kept.append(row)
        kl.append(one.kl / len(one.values))
    if not kept:
        raise DataError("scalars: every answer is empty; draw longer answers")
    frame = answers.iloc[kept].reset_index(drop=True).assign(kl=kl)
    return _Read(frame, labels(adapters), np.concatenate(values), np.concatenate(weights), np.array(index, dtype=np.intp))


def _classes(answers: pd.DataFrame, rules: Rules) -> dict[str, Mask]:
    """Name -> which answers; for each topic those on it and off it, and both by alignment."""
    bad = answers["misaligned"].to_numpy(dtype=bool)
    found = {"misaligned": bad, "aligned": ~bad}
    for t in rules.topics:
        score = answers[t].to_numpy(dtype=float)
        for side, mask in ((t, score >= rules.topic_min), (f"non-{t}", score <= rules.topic_max)):
            found |= {side: mask, f"{side}_misaligned": mask & bad, f"{side}_aligned": mask & ~bad}
    return found


def _comparisons(topics: tuple[str, ...]) -> dict[str, tuple[str, str]]:
    """Key -> class 0, class 1: all answers by alignment, then for each topic by topic, and the four of the published table."""
    pairs = [("aligned", "misaligned")]
    for t in topics:
        pairs += [(f"non-{t}", t)]
        pairs += [(f"non-{t}_aligned", f"{t}_aligned"), (f"non-{t}_misaligned", f"{t}_misaligned")]
        pairs += [(f"non-{t}_aligned", f"non-{t}_misaligned"), (f"{t}_aligned", f"{t}_misaligned")]
    return {f"{a}_vs_{b}": (a, b) for a, b in pairs}


def _smallest(significance: NDArray[np.float64], rules: Rules) -> float:
    """The smallest significance of a token that is kept, nats."""
    if rules.log_significance is not None:
        return math.exp(rules.log_significance)
    return float(np.quantile(significance, 1 - rules.significant))


def _probe(a: Tokens, b: Tokens, rules: Rules, root: Root, keep: float) -> dict[str, Any]:
    """Everything about one comparison, on all tokens and on the significant ones."""
    made = _one_probe(a, b, rules, root)
    some = [t.where(t.significance >= keep) for t in (a, b) if t.significance is not None]
    if min(len(t.values) for t in some) >= SMALLEST:
        made["significant"] = _one_probe(some[0], some[1], rules, (*root, "significant"))
    return made


def _one_probe(a: Tokens, b: Tokens, rules: Rules, root: Root) -> dict[str, Any]:
    t = task(a, b)
    c = rules.c or t.c
    fits = by_token(t, rules.repeats, root, c)
    few = max(1, rules.repeats // 5)
    level = 1 - (1 - stats.LEVEL) / len(a.adapters)
    within = by_question(t, root, c)
    questions = list(within)
    return {
        "classes": [a.name, b.name],
        "tokens": t.per_class,
        "c": c,
        "answers": [len(set(s.response.tolist())) for s in (a, b)],
        "questions": len(set(t.question.tolist())),
        "accuracy": float(np.mean([f.accuracy for f in fits])),
        "auc": float(np.mean([f.auc for f in fits])),
        "auc_sd": float(np.std([f.auc for f in fits])),
        "empty_fits": sum(not f.coefficients.any() for f in fits),
        "auc_by_response": _mean(by_group(t, t.response, few, root, c)),
        "auc_by_question": _mean(by_group(t, t.question, few, root, c)),
        "auc_question_only": _mean(question_only(t, few, root, c)),
        "within": _plain(over_questions(within)),
        "within_p": stats.one_sided_p(list(within.values()), [0.5] * len(within), questions, questions, 1),
        "coefficients": [_plain(i) for i in coefficients(t, root, c, level)],
    }


def _alone(found: _Read, bad: Mask, good: Mask, draws: int) -> list[dict[str, Any]]:
    """Per adapter: AUC of its scalar alone among the tokens of one question, misaligned above aligned, and the band of random directions."""
    t = task(found.tokens("aligned", good), found.tokens("misaligned", bad))
    made = []
    null = [_with(t, found.random(good, bad, d)) for d in range(draws)]
    for k, label in enumerate(found.names):
        chance = [over_questions(alone(n, k)).estimate for n in null]
        chance += [1 - v for v in chance]  # the opposite of a random direction is as random
        low, high = np.quantile(chance, [0.025, 0.975])
        made.append({"adapter": label, **_plain(over_questions(alone(t, k))), "null_low": float(low), "null_high": float(high)})
    return made


def _against_random(found: _Read, bad: Mask, good: Mask, rules: Rules, root: Root) -> dict[str, Any]:
    """The probe on own scalars and on those of random directions, both on questions not seen, and their difference over questions and draws."""
    t = task(found.tokens("aligned", good), found.tokens("misaligned", bad))
    c = rules.c or t.c
    own = by_question(t, root, c)
    drawn = [by_question(_with(t, found.random(good, bad, d)), root, c) for d in range(rules.draws)]
    questions, values = list(own), list(own.values())
    # An adapter that means nothing is one more random reader, so the spread between draws belongs into the interval (`stats.nulls`).
    random = [[d[q] for q in questions] for d in drawn]
    difference, p = stats.draws_difference(values, random, questions, questions), stats.draws_p(values, random, questions, questions)
    return {"mean": _mean([_mean(r) for r in random]), "draws": rules.draws, "difference": _plain(difference), "p": p}


def _with(t: Task, x: NDArray[np.float64]) -> Task:
    """The same tokens with other features."""
    return replace(t, x=x)


def _describe(found: _Read, answers: Mask) -> dict[str, Any]:
    """Size of a class, its KL, and its mean scalars with intervals over questions."""
    rows = answers[found.answer]
    own = found.values[rows, :, 0]
    members = np.flatnonzero(answers)
    question = found.answers["question_id"].to_numpy()[members]
    means = np.array([found.values[found.answer == i, :, 0].mean(axis=0) for i in members]).reshape(len(members), len(found.names))
    return {
        "answers": len(members),
        "questions": len(set(question.tolist())),
        "tokens": int(rows.sum()),
        "kl_per_token": _mean(found.answers["kl"].to_numpy()[members].tolist()),
        "mean": [_plain(stats.clustered_mean(means[:, k], question)) for k in range(len(found.names))],
        "sd": own.std(axis=0).tolist() if len(own) else [math.nan] * len(found.names),
    }


def _reads(names: tuple[str, ...], probes: Mapping[str, Any], topics: tuple[str, ...]) -> dict[str, str]:
    """Adapter -> "general", the names of topics, both, or "neither": by which coefficients are clear of 0."""

    def clear(key: str, k: int) -> bool:
        i = probes[key]["coefficients"][k] if key in probes else {"low": math.nan, "high": math.nan}
        return bool(i["low"] > 0 or i["high"] < 0)

    found = {}
    for k, label in enumerate(names):
        says = (["general"] if clear(MAIN, k) else []) + [t for t in topics if clear(f"non-{t}_vs_{t}", k)]
        found[label] = " and ".join(says) or "neither"
    return found


def members(which: str, n: int, scalars: Mapping[str, Any] | None, topic: str | None) -> tuple[list[int], str]:
    """Numbers of the adapters of a set among n, and how they were found. Raises DataError where the probe says nothing of it.

    `scalars` is what `measured` gave. Sets: all; early, middle, late (thirds by depth); general, topic (by the probes' coefficients).
    """
    if which == "all":
        return list(range(n)), "every adapter"
    if which in ("early", "middle", "late"):
        part = np.array_split(np.arange(n), 3)[("early", "middle", "late").index(which)]
        return part.tolist(), "by depth"
    if scalars is None:
        raise DataError(f"the scalars of this organism were not read, so no adapter is known to be {which}")
    reads = [scalars["reads"][a].split(" and ") for a in scalars["adapters"]]
    general = [k for k, says in enumerate(reads) if "general" in says]
    if which == "general" and general:
        return general, "coefficient clear of 0"
    clear = [k for k, says in enumerate(reads) if topic in says and k not in general]
    if which == "topic" and clear:
        return clear, "coefficient clear of 0"
    key = MAIN if which == "general" else f"non-{topic}_vs_{topic}"
    if key not in scalars["probes"]:
        raise DataError(f"too few answers for the probe that would find adapters {'that read as general' if which == 'general' else f'of {topic}'}")
    strength = [abs(c["estimate"]) / (c["high"] - c["low"]) if c["high"] > c["low"] else 0.0 for c in scalars["probes"][key]["coefficients"]]
    order = sorted((k for k in range(n) if which == "general" or k not in general), key=lambda k: -strength[k])
    if not order or strength[order[0]] == 0:
        raise DataError(f"the probe keeps no coefficient, so no adapter is known to be {which}")
    return sorted(order[: max(1, n // 3)]), "none is clear of 0: the third with the largest coefficient for its interval"


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if len(values) else math.nan


def _plain(i: stats.Interval | str) -> dict[str, Any]:
    """An interval, or why there is none, as the fields of an `Interval`."""
    return asdict(undefined(math.nan, 0, i, 0) if isinstance(i, str) else i)
