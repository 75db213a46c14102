"""Adapters during training: A and B at some optimizer steps, kept in `steps` inside the organism's folder.

One safetensors file per step, weights named as PEFT names them. They are no part of what the organism is: its content id does not count them, and
keeping them changes no weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from convergent.errors import ModelError
from convergent.organisms.adapters import Adapter, adapters_of, read_settings
from convergent.organisms.manifest import read_organism
from convergent.organisms.recipes import Recipe

STEPS = "steps"


@dataclass(frozen=True)
class Spacing:
    """Which steps of a training run are kept: the start, the end, and what lies between."""

    points: int = 16
    """So many equal parts."""
    every: int | None = None
    """Every so many optimizer steps instead."""

    def of(self, n_steps: int) -> tuple[int, ...]:
        """Steps, ascending: 0 is before the first update, `n_steps` after the last."""
        between = range(0, n_steps, self.every) if self.every else (int(i * n_steps / self.points + 0.5) for i in range(self.points))
        return tuple(sorted({*between, n_steps}))


@dataclass(frozen=True, eq=False)
class KeptSteps:
    """An organism's adapters at some steps of its training."""

    steps: tuple[int, ...]
    time: tuple[float, ...]
    """Sum of the learning rates before each step, in units of the highest: steps weighed by how far they could go."""
    adapters: tuple[tuple[Adapter, ...], ...]
    """Per step, every adapter by layer and module."""

    def at(self, share: float) -> tuple[Adapter, ...]:
        """The kept step nearest to this share of the training."""
        nearest = min(range(len(self.steps)), key=lambda i: abs(self.steps[i] - share * self.steps[-1]))
        return self.adapters[nearest]


def kept_name(step: int) -> str:
    """File of a step."""
    return f"{step:06d}.safetensors"


def read_steps(folder: Path, spacing: Spacing) -> KeptSteps | None:
    """The kept steps of a trained organism, or None if some that the spacing names are not there. Raises ModelError for files that cannot be read."""
    organism = read_organism(folder)
    steps = spacing.of(organism.loss_curve[-1].step)
    files = [folder / STEPS / kept_name(step) for step in steps]
    if not all(f.is_file() for f in files):
        return None
    settings = read_settings(folder)
    try:
        adapters = tuple(adapters_of(f, settings, load_file(f)) for f in files)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder / STEPS}: a kept step cannot be read ({error}); remove this folder, and the steps are made again") from error
    time = training_time(organism.recipe, steps[-1])
    return KeptSteps(steps, tuple(time[s] for s in steps), adapters)


def training_time(recipe: Recipe, n_steps: int) -> tuple[float, ...]:
    """(n_steps + 1,) sum of the learning rates of the first s steps, in units of the recipe's."""
    from transformers import get_scheduler

    name = "constant_with_warmup" if recipe.schedule == "constant" else recipe.schedule
    unused = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule: Any = get_scheduler(name, unused, num_warmup_steps=recipe.warmup_steps, num_training_steps=n_steps)
    total, found = 0.0, [0.0]
    for step in range(n_steps):
        total += float(schedule.lr_lambdas[0](step))
        found.append(total)
    return tuple(found)
