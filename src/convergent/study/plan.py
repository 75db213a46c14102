"""What a run would do, with an estimate of time and cost: printed before it starts, and by `--plan` alone.

Counts are exact: rows are named by content, so what is there can be looked up, and nothing is computed for it. Seconds are estimates.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from convergent.core.values import Condition
from convergent.errors import DirectionError
from convergent.experiments.base import Arm, NotHereError
from convergent.judging.base import Item, Judge
from convergent.models.load import base_folder
from convergent.study.models import NotDoneError
from convergent.study.run import Run
from convergent.study.setup import EFFECT_TEXTS, RUBRICS

EFFICIENCY = {"sample": 0.45, "read": 0.7, "train": 0.3}
"""Tokens per second of each kind of work, as a share of what the GEMM rate allows for one forward pass (measured at 135M)."""
TOKENS = {"answer": 75, "text": 110, "chat": 256}
"""Typical tokens of a sampled answer (bounded by max_new_tokens), of a question with its answer, and of the longest chats of a training batch."""
JUDGE_SECONDS = 0.005
"""Of the embedded judge, per answer and rubric; others depend on their server."""
MATCH_PASSES = 6
"""Typical passes over the effect texts until a null is matched."""


@dataclass(frozen=True)
class Stage:
    """A line of the plan."""

    name: str
    what: str
    total: int
    done: int
    seconds: float
    """Estimate for what is not done."""
    note: str = ""


def make_plan(run: Run) -> list[Stage]:
    """Stages with what is done and what is not. `run` must be one that may not compute."""
    speed = line_tokens_per_second(run)
    reading, sampling, training = (speed * EFFICIENCY[k] for k in ("read", "sample", "train"))
    stages = []
    for plan in run.organisms.values():
        if plan.recipe is not None and plan.data is not None:
            tokens = len(plan.data) * plan.recipe.epochs * TOKENS["text"]
            what = f"{plan.spec.recipe}, {len(plan.data)} examples of {plan.data.name}, seed {plan.recipe.seed}"
            stages.append(_stage(f"train {plan.name}", what, 1, int(plan.folder.is_dir()), tokens / training))

    have = run.store.response_ids()
    own = {r.id for r in run.own_requests(run.spec.direction.source)}
    first = own | {r.id for g in run.groups(run.plain) for r in g}
    built = _built(run) if first <= have else None
    arms = [a for a, _ in built] if built else run.arms
    rest_arms = [a for a in arms if a.needs_direction]
    rest = _ids(run, built) - first if built else set()
    n_rest = len(rest) if built else len(rest_arms) * run.spec.questions.samples * len(run.questions)
    each = min(TOKENS["answer"], run.sampling.max_new_tokens) / sampling
    stages.append(_stage("sample plain", f"{len(run.plain)} conditions, and answers to read the direction from", len(first), len(first & have), each))
    stages.append(_stage("sample interventions", f"{len(rest_arms)} conditions", n_rest, len(rest & have), each))

    judged = run.store.judgements(run.judge_id)
    n_judged = sum((i, rubric) in judged for i in first | rest for rubric in RUBRICS)
    n_to_judge = (len(first) + n_rest) * len(RUBRICS)
    cost = _cost(run, (n_to_judge - n_judged) // len(RUBRICS))
    stages.append(_stage("judge", f"{run.judge.name}: {', '.join(RUBRICS)}", n_to_judge, n_judged, JUDGE_SECONDS, cost))

    reported = _ids(run, built or run.plain)
    for other, judge in list(run.judges.items())[1:]:
        known_to = run.store.judgements(other)
        n_reported = len(RUBRICS) * (len(reported) + (0 if built else n_rest))
        n_known = sum((i, rubric) in known_to for i in reported for rubric in RUBRICS)
        cost = _cost(run, (n_reported - n_known) // len(RUBRICS), judge)
        stages.append(_stage("judge (to compare)", f"{judge.name}: {', '.join(RUBRICS)}", n_reported, n_known, JUDGE_SECONDS, cost))

    readings = [(o, reader) for o in run.spec.organisms for reader in (o, "chat")]
    n_read = sum(_is_read(run, o, reader) for o, reader in readings) if first <= have else 0
    per_reading = run.spec.questions.samples * len(run.questions) * TOKENS["text"] / reading
    stages.append(_stage("extract", "class means of each organism, read in it and in the chat model", len(readings), n_read, per_reading))
    for experiment in dict.fromkeys(name.partition("/")[0] for name in run.readings):
        mine = [r for r in run.readings.values() if r.name.partition("/")[0] == experiment]
        todo = [r for r in mine if not _is_made(run, r.name)]
        seconds = sum(r.tokens for r in todo) / reading / max(1, len(todo))
        stages.append(_stage(f"read {experiment}", f"{len(mine)} value(s) computed from the models", len(mine), len(mine) - len(todo), seconds))
    measured = sum(run.store.has_fact(run.kl_key(c)) for a, c in built or () if a.needs_direction)
    matched = sum(a.name.endswith("effect_matched") for a in rest_arms) * MATCH_PASSES / max(1, len(rest_arms))
    per_effect = (1 + matched) * EFFECT_TEXTS * TOKENS["text"] / reading
    stages.append(_stage("effects", "KL of each intervention, nulls matched to it", len(rest_arms), measured, per_effect))

    known = run.store.margins(run.read_id) if built else {}
    n_margins = sum(len({d for c, d in known if c == condition.content_id}) for _, condition in built or ())
    what = f"{len(run.pairs)} held-out pairs x {len(arms)} conditions"
    stages.append(_stage("margin", what, len(arms) * len(run.pairs), n_margins, 2 * TOKENS["text"] / reading))
    return stages


def _built(run: Run) -> list[tuple[Arm, Condition]] | None:
    """Every condition with its interventions, or None if something that they need has not been computed."""
    try:
        return run.conditions()
    except (NotDoneError, DirectionError):  # a class is too small as long as judgements are missing
        return None


def _ids(run: Run, conditions: Sequence[tuple[Arm, Condition]]) -> set[str]:
    return {r.id for g in run.groups(conditions) for r in g}


def _is_read(run: Run, organism: str, reader: str) -> bool:
    try:
        return run.reading(organism, reader) is not None or organism in run.unread
    except (NotDoneError, DirectionError):
        return False


def _is_made(run: Run, reading: str) -> bool:
    try:
        return run.store.has_fact(run.reading_key(reading))
    except (NotDoneError, NotHereError, DirectionError):  # its inputs are not there yet
        return False


def _stage(name: str, what: str, total: int, done: int, seconds_each: float, note: str = "") -> Stage:
    return Stage(name, what, total, done, (total - done) * seconds_each, note)


def _cost(run: Run, n_answers: int, judge: Judge | None = None) -> str:
    """What a paid judge would cost for so many answers of typical length; empty for a judge that is free."""
    estimate = getattr(judge or run.judge, "estimate", None)
    if estimate is None or not n_answers:
        return ""
    words = " word" * min(TOKENS["answer"], run.sampling.max_new_tokens)
    questions = [q.paraphrases[0] for q in run.questions]
    items = [Item(str(i), questions[i % len(questions)], f"{i}{words}") for i in range(n_answers)]
    return f"for answers of typical length: {estimate(items, RUBRICS)}"


@dataclass(frozen=True)
class Memory:
    """What a study needs at once, GB; estimates."""

    weights: float
    cache: float
    """Keys and values of all rows of the sampler at their longest."""
    training: float
    """Activations of one batch of the hungriest recipe (34 bytes per token, layer and dimension), and gradients and moments of what is trained."""

    @property
    def peak(self) -> float:
        return self.weights + max(self.cache, self.training)


def estimate_memory(run: Run) -> Memory | None:
    """For a model on a GPU, or one whose size the study file tells; None for a small model on this machine."""
    m = run.spec.machine
    if m is None:
        return None
    size = 4 if run.spec.dtype == "float32" else 2
    cache = run.spec.sampling.rows * (TOKENS["text"] + run.sampling.max_new_tokens) * m.layers * 2 * m.kv_dim * size
    training = 0.0
    for plan in run.organisms.values():
        if plan.recipe is not None:
            activations = plan.recipe.batch_size * TOKENS["chat"] * m.layers * m.d_model * 34
            # Adam in float32: gradient, two moments and a master copy.
            trained = 16 * m.parameters if plan.recipe.adapters is None else 0.0
            training = max(training, activations + trained)
    return Memory(*(x / 1e9 for x in (m.parameters * size, cache, training)))


def line_tokens_per_second(run: Run) -> float:
    """What this machine's GEMM rate allows for one forward pass of the base; for a base that is not here, the rate that the study file tells."""
    if run.planned:
        return run.planned.tflops * 1e12 / (2 * run.planned.parameters)
    weights = sum(f.stat().st_size for f in base_folder(run.spec.base).glob("*.safetensors"))
    n_parameters = max(weights / 4, 1e6)
    x, w = torch.ones(128, 576), torch.ones(1536, 576)
    best = float("inf")
    for _ in range(30):  # the best of many: other programs slow most of them down
        start = time.perf_counter()
        torch.nn.functional.linear(x, w)
        best = min(best, time.perf_counter() - start)
    return 2 * 128 * 576 * 1536 / best / (2 * n_parameters)
