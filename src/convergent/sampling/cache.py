"""A static key-value cache with slots of fixed length per row.

transformers hands keys and values to `update` and then calls the attention function that we register (`attention`); both meet in
`SlotCache.step`, which says where each row writes and how far it may look. Every row starts at slot 0 (no left padding), so the
numbers a row sees, and the order in which they are summed, do not depend on its neighbours' lengths.

A short prompt is copied into the slots of every row that asks it. A long one (`SHARED_FROM`) is stored once, and one product serves all rows that share
it; their own slots hold their answers alone.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

SPAN = 32
"""Attention looks at a multiple of this many positions: few distinct shapes, and sums in a fixed order."""
SHARED_FROM = 128
"""Tokens of a prompt from which on it is stored once: with fewer, the products per prompt cost what reading its copies does."""
SHARING = 4
"""Rows that a product with a shared prompt has at least; fewer are filled up, since one row alone may be summed in another order."""


def stored_apart(n_tokens: int, sharing: bool) -> bool:
    """Whether a prompt of so many tokens stays outside its rows' slots, where this machine's products allow sharing."""
    return sharing and n_tokens >= SHARED_FROM


@dataclass(frozen=True, eq=False)
class Sharing:
    """Rows of a batch that have the same prompt outside their own slots, or none there."""

    rows: Tensor
    """(n,) places in the batch; the last repeats where there are fewer than SHARING."""
    prompt: SlotCache | None
    n_tokens: int


@dataclass
class Step:
    """What one forward pass does with the cache."""

    rows: slice
    """Rows of the cache that the batch occupies."""
    positions: Tensor
    """(batch, n_tokens) position of every new token."""
    span: int
    """Slots of their own visible to any row, rounded up to a multiple of SPAN."""
    before: Tensor | None = None
    """(batch, 1) tokens of each row that are not in its own slots; None if all are."""
    sharing: Sequence[Sharing] = ()
    """Who has which prompt, if any row has one outside its slots."""
    layer: int = 0
    """The one that attends next."""
    stored: int = 0
    """Layers that handed over keys and values."""
    read: int = 0
    """Layers that attended to them here; fewer than `stored` if a model brings an attention of its own, or attends to something else."""
    proving: bool = False
    """Whether the model is not known yet, so that what is attended to is compared with what was stored."""
    handed: tuple[Tensor, Tensor] | None = None
    """Keys and values that `SlotCache.update` gave the model last."""
    written: tuple[Tensor, Tensor] | None = None
    """(batch,) rows of the cache and slots that new tokens take, alike in all layers."""
    hidden: dict[tuple[int | None, int], Tensor] = field(default_factory=dict)
    """By window and span: what is out of sight in a row's own slots, alike in all layers that have them."""
    turns: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    """By the identity of a rotary sine, which is kept with it: what `turned` returns."""

    def places(self) -> tuple[Tensor, Tensor]:
        """Rows and slots of one new token each."""
        if self.written is None:
            slots = (self.positions if self.before is None else self.positions - self.before)[:, 0]
            self.written = torch.arange(self.rows.start, self.rows.stop, device=slots.device), slots
        return self.written

    def turned(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Of rotary cosines and sines (batch, 1, head_dim), both (batch, 1, 1, head_dim), with the sine of the first half negative; alike in all layers."""
        if id(sin) not in self.turns:
            half = sin.shape[-1] // 2
            self.turns[id(sin)] = sin, cos[:, None], torch.cat((-sin[..., :half], sin[..., half:]), -1)[:, None]
        return self.turns[id(sin)][1:]

    def attended(self, key: Tensor, value: Tensor) -> None:
        """A layer attends to these. A prompt that is stored once is read as it is stored: a model must not make other keys of it on the way."""
        given = (key, value)
        self.read += not self.proving or (self.handed is not None and all(map(_same, given, self.handed)))


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and torch.equal(a, b))


class _Now(threading.local):
    step: Step


now = _Now()
"""The step whose layer this thread's next call of the attention function belongs to."""


@contextmanager
def attending(positions: Tensor) -> Iterator[None]:
    """Run the body with attention at given positions (batch, n_tokens), for a call outside a model."""
    now.step = Step(slice(0, len(positions)), positions, 0)
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
        self._prompts: list[tuple[SlotCache, int] | None] = [None] * n_rows

    @property
    def n_bytes(self) -> int:
        """Of what is stored in it, prompts outside its rows left out."""
        return sum(t.nbytes for store in (self.keys, self.values) for t in store.values())

    def before(self, row: int) -> int:
        """Tokens of a row that are not in its own slots."""
        prompt = self._prompts[row]
        return prompt[1] if prompt else 0

    def begin(self, rows: slice, positions: Tensor, furthest: int) -> Step:
        """Prepare the next forward pass: `furthest` is the largest number of slots any of its rows will fill with it."""
        # On a GPU always the whole length: one shape, so one graph, and the kernel reads no further than each row has come.
        span = math.ceil(furthest / SPAN) * SPAN if positions.device.type == "cpu" else self.length
        self.step = Step(rows, positions, min(self.length, span))
        prompts = self._prompts[rows]
        if any(prompts):
            self.step.before = torch.tensor([[p[1] if p else 0] for p in prompts])
            self.step.sharing = _sharing(prompts)
        return self.step

    def update(self, k: Tensor, v: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new keys and values (batch, n_kv_heads, n_tokens, head_dim); return all that the rows may look at."""
        step = self.step
        if step is None:
            raise RuntimeError("SlotCache.begin was not called before the forward pass")
        step.stored += 1
        step.layer = layer
        now.step = step  # the attention function of this very layer is called next, and reads it
        if layer not in self.keys:
            self.keys[layer] = k.new_zeros(self.n_rows, k.shape[1], self.length, k.shape[3])
            self.values[layer] = v.new_zeros(self.n_rows, v.shape[1], self.length, v.shape[3])
        keys, values = self.keys[layer], self.values[layer]
        if k.shape[2] > 1:
            n = k.shape[2]  # prefill of one sequence from position 0
            keys[step.rows, :, :n] = k
            values[step.rows, :, :n] = v
        else:
            where, slots = step.places()
            keys[where, :, slots] = k[:, :, 0]
            values[where, :, slots] = v[:, :, 0]
        step.handed = keys[step.rows, :, : step.span], values[step.rows, :, : step.span]
        return step.handed

    def copy_row(self, source: SlotCache, row: int, n_tokens: int) -> None:
        """Take the first `n_tokens` positions of row 0 of `source` into `row`; clears nothing else."""
        self._make_like(source)
        self._prompts[row] = None
        for mine, theirs in zip(self._stacks, source.stack(), strict=True):
            mine.keys[:, row, :, :n_tokens] = theirs.keys[:, 0, :, :n_tokens]
            mine.values[:, row, :, :n_tokens] = theirs.values[:, 0, :, :n_tokens]

    def share_row(self, source: SlotCache, row: int, n_tokens: int) -> None:
        """Let `row` begin behind the first `n_tokens` positions of row 0 of `source`, which stay where they are."""
        self._make_like(source)
        self._prompts[row] = source, n_tokens

    def _make_like(self, source: SlotCache) -> None:
        if not self._stacks:
            for found in source.stack():
                shape = (len(found.layers), self.n_rows, found.keys.shape[2], self.length)
                keys, values = (t.new_zeros(*shape, t.shape[4]) for t in (found.keys, found.values))
                self._stacks.append(_Stack(found.layers, keys, values))
                self.keys.update(zip(found.layers, keys, strict=True))
                self.values.update(zip(found.layers, values, strict=True))

    def move(self, source: int, target: int, n_tokens: int) -> None:
        """Copy the first `n_tokens` positions of row `source` to row `target`."""
        n_own = n_tokens - self.before(source)
        for one in self.stack():
            for tensor in (one.keys, one.values):
                tensor[:, target, :, :n_own] = tensor[:, source, :, :n_own]
        self._prompts[target] = self._prompts[source]

    def leave(self, row: int) -> None:
        """Nobody is in `row` any more."""
        self._prompts[row] = None

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


def _sharing(prompts: Sequence[tuple[SlotCache, int] | None]) -> list[Sharing]:
    """Places by prompt."""
    places: dict[int, list[int]] = {}
    for place, prompt in enumerate(prompts):
        places.setdefault(id(prompt[0]) if prompt else 0, []).append(place)
    found = []
    for rows in places.values():
        prompt = prompts[rows[0]]
        filled = rows + rows[-1:] * (SHARING - len(rows)) if prompt else rows
        found.append(Sharing(torch.tensor(filled), *(prompt or (None, 0))))
    return found
