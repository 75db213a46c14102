"""A static key-value cache with one slot of fixed length per row, and the attention that reads it.

transformers hands keys and values to `update` and calls the attention function that we register; both meet in
`SlotCache.step`, which says where each row writes and how far it may look. Every row starts at slot 0 (no left padding), so the
numbers a row sees, and the order in which they are summed, do not depend on its neighbours' lengths.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from convergent.errors import ModelError
from convergent.sampling import kernel

ATTENTION = "convergent_slots"
SPAN = 32
"""Attention looks at a multiple of this many positions: few distinct shapes, and sums in a fixed order."""


@dataclass
class Step:
    """What one forward pass does with the cache."""

    rows: slice
    """Rows of the cache that the batch occupies."""
    positions: Tensor
    """(batch, n_tokens) position of every new token."""
    span: int
    """Positions visible to any row, rounded up to a multiple of SPAN."""
    stored: int = 0
    """Layers that handed over keys and values."""
    read: int = 0
    """Layers that attended to them here; fewer than `stored` if a model brings an attention of its own."""


class _Now(threading.local):
    step: Step


_now = _Now()


@contextmanager
def attending(positions: Tensor) -> Iterator[None]:
    """Run the body with `attention` at given positions (batch, n_tokens), for a call outside a model."""
    _now.step = Step(slice(0, len(positions)), positions, 0)
    yield


@dataclass(frozen=True, eq=False)
class _Stack:
    """Layers whose keys and values have the same shapes: (n_layers, n_rows, n_kv_heads, length, head_dim)."""

    layers: tuple[int, ...]
    keys: Tensor
    values: Tensor


class SlotCache:
    """Keys and values of `n_rows` sequences of up to `length` tokens, for all layers. Grown on first use."""

    def __init__(self, n_rows: int, length: int) -> None:
        self.n_rows, self.length = n_rows, math.ceil(length / SPAN) * SPAN
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.step: Step | None = None
        self._stacks: list[_Stack] = []

    def begin(self, rows: slice, positions: Tensor, furthest: int) -> Step:
        """Prepare the next forward pass: `furthest` is the largest number of tokens any of its rows will hold after it."""
        # On a GPU always the whole length: one shape, so one graph, and the kernel reads no further than each row has come.
        span = math.ceil(furthest / SPAN) * SPAN if positions.device.type == "cpu" else self.length
        self.step = Step(rows, positions, min(self.length, span))
        return self.step

    def update(self, k: Tensor, v: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new keys and values (batch, n_kv_heads, n_tokens, head_dim); return all that the rows may look at."""
        step = self.step
        if step is None:
            raise RuntimeError("SlotCache.begin was not called before the forward pass")
        step.stored += 1
        _now.step = step  # the attention function of this very layer is called next, and reads it
        if layer not in self.keys:
            self.keys[layer] = k.new_zeros(self.n_rows, k.shape[1], self.length, k.shape[3])
            self.values[layer] = v.new_zeros(self.n_rows, v.shape[1], self.length, v.shape[3])
        keys, values = self.keys[layer], self.values[layer]
        if k.shape[2] > 1:
            n = k.shape[2]  # prefill of one sequence from position 0
            keys[step.rows, :, :n] = k
            values[step.rows, :, :n] = v
        else:
            where = torch.arange(step.rows.start, step.rows.stop, device=k.device)
            keys[where, :, step.positions[:, 0]] = k[:, :, 0]
            values[where, :, step.positions[:, 0]] = v[:, :, 0]
        return keys[step.rows, :, : step.span], values[step.rows, :, : step.span]

    def copy_row(self, source: SlotCache, row: int, n_tokens: int) -> None:
        """Take the first `n_tokens` positions of row 0 of `source` into `row`; clears nothing else."""
        if not self._stacks:
            for found in source.stack():
                shape = (len(found.layers), self.n_rows, found.keys.shape[2], self.length)
                keys, values = (t.new_zeros(*shape, t.shape[4]) for t in (found.keys, found.values))
                self._stacks.append(_Stack(found.layers, keys, values))
                self.keys.update(zip(found.layers, keys, strict=True))
                self.values.update(zip(found.layers, values, strict=True))
        for mine, theirs in zip(self._stacks, source.stack(), strict=True):
            mine.keys[:, row, :, :n_tokens] = theirs.keys[:, 0, :, :n_tokens]
            mine.values[:, row, :, :n_tokens] = theirs.values[:, 0, :, :n_tokens]

    def move(self, source: int, target: int, n_tokens: int) -> None:
        """Copy the first `n_tokens` positions of row `source` to row `target`."""
        for one in self.stack():
            for tensor in (one.keys, one.values):
                tensor[:, target, :, :n_tokens] = tensor[:, source, :, :n_tokens]

    def stack(self) -> list[_Stack]:
        """Put layers of one shape together, if they are not yet: a row is copied in a few operations, not in two per layer."""
        if not self._stacks:
            alike: dict[tuple[torch.Size, torch.Size], list[int]] = {}
            for layer in sorted(self.keys):
                alike.setdefault((self.keys[layer].shape, self.values[layer].shape), []).append(layer)
            for layers in alike.values():
                keys, values = (torch.stack([store.pop(i) for i in layers]) for store in (self.keys, self.values))
                self._stacks.append(_Stack(tuple(layers), keys, values))
                self.keys.update(zip(layers, keys, strict=True))
                self.values.update(zip(layers, values, strict=True))
        return self._stacks

    # What transformers asks of a cache when it prepares masks and positions.
    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    is_compileable = False


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Grouped-query attention of new tokens over cached slots.

    query (batch, n_heads, n_tokens, head_dim); key, value (batch, n_kv_heads, span, head_dim). Each query at position p sees the
    slots p' <= p (and p' > p - sliding_window). Returns (batch, n_tokens, n_heads, head_dim). Plain matmuls: for one query and few heads
    they are about twice as fast on a CPU as the fused kernel. On a GPU, decoding has a kernel of its own (`kernel`).
    """
    if kwargs.get("s_aux") is not None:
        raise ModelError(f"{type(module).__name__}: attention sinks are not supported by the sampler")
    _now.step.read += 1
    positions = _now.step.positions
    b, n_heads, n, d = query.shape
    n_kv = key.shape[1]
    groups = n_heads // n_kv
    scale = d**-0.5 if scaling is None else scaling
    window = sliding_window if sliding_window is not None else getattr(module, "sliding_window", None)
    if n == 1 and query.device.type == "cuda" and kernel.serves(query, key, value):
        return kernel.attend(query, key, value, positions, scale, window, softcap), None
    slots = torch.arange(key.shape[2], device=key.device)
    hidden = slots[None, None, :] > positions[:, :, None]
    if window:
        hidden = hidden | (slots[None, None, :] <= positions[:, :, None] - window)
    q = (query * scale).reshape(b, n_kv, groups * n, d)
    scores = torch.matmul(q, key.transpose(2, 3))
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.view(b, n_kv, groups, n, -1).masked_fill_(hidden[:, None, None], float("-inf"))
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype).view(b, n_kv, groups * n, -1)
    out = torch.matmul(weights, value)
    return out.view(b, n_heads, n, d).transpose(1, 2), None
