"""What a run would do, with an estimate of time: printed before it starts, and by `--plan` alone."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from convergent.models.load import base_folder
from convergent.study.run import EFFECT_TEXTS, RUBRICS, Run

EFFICIENCY = {"sample": 0.45, "read": 0.7, "train": 0.3}
"""Tokens per second of each kind of work, as a share of what the GEMM rate allows for one forward pass (measured at 135M)."""
TOKENS = {"answer": 75, "text": 110}
"""Typical tokens of a sampled answer (bounded by max_new_tokens) and of a question with its answer."""


@dataclass(frozen=True)
class Stage:
    """A line of the plan."""

    name: str
    what: str
    total: int
    done: int
    seconds: float
    """Estimate for what is not done."""


def make_plan(run: Run) -> list[Stage]:
    """Stages with what is done and what is not; no model is loaded for it."""
    speed = _tokens_per_second(run)
    reading, sampling, training = (speed * EFFICIENCY[k] for k in ("read", "sample", "train"))
    stages = []
    for plan in run.organisms.values():
        if plan.recipe is not None and plan.data is not None:
            tokens = len(plan.data) * plan.recipe.epochs * TOKENS["text"]
            done = plan.folder.is_dir()
            stages.append(Stage(f"train {plan.name}", f"{plan.spec.recipe}, {len(plan.data)} examples of {plan.data.name}", 1, int(done), 0 if done else tokens / training))
    have = run.store.response_ids()
    length = min(TOKENS["answer"], run.sampling.max_new_tokens)
    plain = [a for a in run.arms if not a.needs_direction]
    wanted = [r.id for a in plain for r in run.requests([(a, run.condition(a))])]
    wanted += [r.id for r in run.own_requests(run.spec.direction.source)]
    per_arm = run.spec.questions.samples * len(run.questions)
    rest = per_arm * (len(run.arms) - len(plain))
    done = sum(i in have for i in wanted)
    stages.append(_answers("sample plain", f"{len(plain)} conditions, and answers to read the direction from", len(wanted), done, length / sampling))
    # Interventions exist only when the direction has been read, so rows of theirs are counted as the rest of the table.
    stages.append(_answers("sample interventions", f"{len(run.arms) - len(plain)} conditions", rest, min(rest, len(have) - done), length / sampling))
    judged = len(run.store.judgements(run.judge.name))
    answers = len(wanted) + rest
    stages.append(_answers("judge", f"{run.judge.name}: {', '.join(RUBRICS)}", answers * len(RUBRICS), min(judged, answers * len(RUBRICS)), 0.005))
    n_directions = 2 * len(run.spec.organisms)
    texts = n_directions * per_arm + EFFECT_TEXTS * (len(run.arms) + 16)
    stages.append(_answers("extract", f"{n_directions} readings, effect-matched nulls, KL", texts, 0 if done < len(wanted) else texts * bool(judged >= answers * len(RUBRICS)), TOKENS["text"] / reading))
    n = len(run.arms) * len(run.pairs)
    stages.append(_answers("margin", f"{len(run.pairs)} held-out pairs x {len(run.arms)} conditions", n, 0, 2 * TOKENS["text"] / reading))
    return stages


def _answers(name: str, what: str, total: int, done: int, seconds_each: float) -> Stage:
    done = max(0, done)
    return Stage(name, what, total, done, (total - done) * seconds_each)


def _tokens_per_second(run: Run) -> float:
    """What this machine's float32 GEMM rate allows for one forward pass of the base."""
    weights = sum(f.stat().st_size for f in base_folder(run.spec.base).glob("*.safetensors"))
    n_parameters = max(weights / 4, 1e6)
    x, w = torch.ones(128, 576), torch.ones(1536, 576)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        torch.nn.functional.linear(x, w)
        best = min(best, time.perf_counter() - start)
    return 2 * 128 * 576 * 1536 / best / (2 * n_parameters)
