"""Watching a training: its time, its loss, the steps that are kept of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import TrainerCallback

from convergent.errors import TrainingError
from convergent.organisms.manifest import LossPoint
from convergent.organisms.recipes import Recipe
from convergent.organisms.steps import kept_name

RISE = 3.0
"""A smoothed loss above this many times its start counts as diverged."""


@dataclass(frozen=True)
class Progress:
    """Where a training run stands after an optimizer step."""

    step: int
    n_steps: int
    loss: float
    seconds: float
    """Spent so far, earlier runs included."""
    seconds_left: float
    """Estimate."""


class Watch(TrainerCallback):
    """Keeps time, reports progress, and stops a run whose loss diverges."""

    def __init__(self, report: Callable[[Progress], None]) -> None:
        self.report = report
        self.before = self.seconds = 0.0
        self.first_step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before = self.seconds = next((e["seconds"] for e in reversed(state.log_history) if "seconds" in e), 0.0)
        self.first_step, self.began = state.global_step, time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        spent = time.monotonic() - self.began
        self.seconds = state.log_history[-1]["seconds"] = round(self.before + spent, 3)
        check_loss([e["loss"] for e in state.log_history if "loss" in e])
        left = spent / max(1, state.global_step - self.first_step) * (state.max_steps - state.global_step)
        self.report(Progress(state.global_step, state.max_steps, logs["loss"], self.seconds, left))


class Keeper(TrainerCallback):
    """Writes the adapters down at the steps that `which(number of steps)` names. A run that is killed and goes on has all of them."""

    def __init__(self, folder: Path, which: Callable[[int], Collection[int]]) -> None:
        self.folder, self.which = folder, which

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._keep(state, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._keep(state, model)

    def _keep(self, state: Any, model: Any) -> None:
        if state.global_step not in self.which(state.max_steps):
            return
        from peft import get_peft_model_state_dict

        weights: Any = get_peft_model_state_dict(model, save_embedding_layers=False)
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / ".part"
        save_file({k: v.detach().float().cpu().contiguous() for k, v in weights.items()}, part)
        part.replace(self.folder / kept_name(state.global_step))


def loss_curve(history: Sequence[Mapping[str, Any]], n_examples: int, recipe: Recipe) -> tuple[LossPoint, ...]:
    """The loss after every step, of earlier runs too. Epochs are counted here: the trainer takes all for one."""
    chats, most = recipe.batch_size * recipe.grad_accumulation, float(recipe.epochs)
    return tuple(LossPoint(e["step"], round(min(e["step"] * chats / n_examples, most), 4), e["loss"]) for e in history if "loss" in e)


def check_loss(losses: Sequence[float]) -> None:
    """Raise TrainingError if the last loss is not finite, or the smoothed loss has risen to `RISE` times its start."""
    step = len(losses)
    if not math.isfinite(losses[-1]):
        raise TrainingError(f"step {step}: the loss is {losses[-1]}; lower recipe.learning_rate and train again")
    start = sum(losses[:3]) / len(losses[:3])
    smooth = losses[0]
    for loss in losses[1:]:
        smooth = 0.8 * smooth + 0.2 * loss
    if step > 3 and smooth > RISE * start:
        raise TrainingError(f"step {step}: the loss rose from {start:.3g} to {smooth:.3g}; lower recipe.learning_rate and train again")


def bar_of(name: str) -> Callable[[Progress], None]:
    """A progress bar on a terminal, nothing elsewhere."""
    from tqdm import tqdm

    bar: Any = None

    def report(p: Progress) -> None:
        nonlocal bar
        if bar is None:  # `disable=None`: no bar where stderr is not a terminal
            bar = tqdm(total=p.n_steps, initial=p.step - 1, desc=f"training {name}", unit="step", disable=None)
        bar.set_postfix_str(f"loss {p.loss:.3f}", refresh=False)
        bar.update(1)
        if p.step == p.n_steps:
            bar.close()

    return report
