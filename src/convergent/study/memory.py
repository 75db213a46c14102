"""What memory a study needs at once, where that is scarce: on a GPU, or on the machine that the study file plans for."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import torch

from convergent.models.load import base_folder
from convergent.models.products import MOST_KEPT
from convergent.sampling.invariance import panel_for
from convergent.sampling.stems import MOST_KEPT as PROMPTS_KEPT
from convergent.study.run import Run
from convergent.study.speed import parameters

TEXT_TOKENS, CHAT_TOKENS = 110, 256
"""Typical tokens of a question with its answer, and of the longest chats of a training batch."""


@dataclass(frozen=True)
class Size:
    """Of a base."""

    parameters: float
    layers: int
    d_model: int
    kv_dim: int
    """Key-value heads times head size."""


@dataclass(frozen=True)
class Memory:
    """What a study needs at once, GB; estimates."""

    weights: float
    cache: float
    """Keys and values of all rows of the sampler at their longest; a GPU's rows are whole panels."""
    training: float
    """Activations of one batch of the hungriest recipe (34 bytes per token, layer and dimension), and gradients and moments of what is trained."""
    there: float | None = None
    """What the machine has."""

    @property
    def peak(self) -> float:
        return self.weights + max(self.cache, self.training)

    @property
    def too_much(self) -> bool:
        return self.there is not None and self.peak > self.there


def estimate_memory(run: Run) -> Memory | None:
    """For a base on a GPU, or one that is not here and whose size the study file tells; else None."""
    if run.planned:
        m = run.planned
        size, there = Size(m.parameters, m.layers, m.d_model, m.kv_dim), m.memory_gb
    elif run.device.startswith("cuda"):
        size, there = size_of(run.spec.base), torch.cuda.get_device_properties(run.device).total_memory / 1e9
    else:
        return None
    return needed(run, size, there)


def needed(run: Run, size: Size, there: float | None) -> Memory:
    """What the study needs for a base of that size."""
    width = 4 if run.spec.dtype == "float32" else 2
    token = size.layers * 2 * size.kv_dim * width
    rows = run.spec.sampling.rows
    if run.device.startswith("cuda") or (run.planned and run.spec.device != "cpu"):  # a GPU holds whole panels
        rows = math.ceil(rows / panel_for(token)) * panel_for(token)
    cache: float = rows * (TEXT_TOKENS + run.spec.sampling.max_new_tokens) * token
    weights = size.parameters * width
    if run.spec.device == "cpu":
        cache += PROMPTS_KEPT
        if weights <= MOST_KEPT:
            cache += weights  # laid out a second time while answers are sampled
    training = 0.0
    for plan in run.organisms.values():
        if plan.recipe is not None:
            activations = plan.recipe.batch_size * CHAT_TOKENS * size.layers * size.d_model * 34
            # Adam in float32: gradient, two moments and a master copy.
            trained = 16 * size.parameters if plan.recipe.adapters is None else 0.0
            training = max(training, activations + trained)
    return Memory(weights / 1e9, cache / 1e9, training / 1e9, there)


def size_of(base: str) -> Size:
    """Of a base that is here, from its config and the headers of its weights."""
    folder = base_folder(base)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = config.get("text_config", config)
    d_model, heads = config["hidden_size"], config["num_attention_heads"]
    kv_dim = config.get("num_key_value_heads", heads) * (config.get("head_dim") or d_model // heads)
    return Size(parameters(folder), config["num_hidden_layers"], d_model, kv_dim)
