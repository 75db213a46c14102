"""Reading prompts, each alone: what follows from a prompt depends on nothing else. What conditions share of one is read once (`stems`).

On a GPU a prompt is filled up to a multiple of SPAN tokens, so that there are few shapes and a pass can be replayed: launched one by one, its
thousand small kernels take ten times as long as they run. What is filled in comes after the prompt, which does not look ahead.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from convergent.errors import ModelError
from convergent.interventions.hooks import Rows
from convergent.models.load import ChatModel
from convergent.sampling.cache import SPAN, SlotCache
from convergent.sampling.draw import sent
from convergent.sampling.graphs import Graphs
from convergent.sampling.proof import OWN_ATTENTION
from convergent.sampling.stems import Prompt, Stems

Start: TypeAlias = tuple[SlotCache, Tensor]
"""Cache of one row and (1, vocabulary) logits after the prompt."""


@dataclass(eq=False)
class _Frame:
    """What a replayed pass over so many tokens reads and writes."""

    cache: SlotCache
    inputs: Tensor
    """(2, tokens): the tokens, and their positions; those filled in stand at the last one's, so that no table ends before them."""
    last: Tensor
    """(1,): where the prompt's last token is."""
    condition: Tensor
    """(1,)."""
    logits: Tensor | None = None


class Reader:
    """Reads prompts of one model with `forward` (ids, positions, cache, kept=...) -> (1, vocabulary) logits."""

    def __init__(self, model: ChatModel, forward: Callable[..., Tensor], stems: Stems) -> None:
        self._model, self._forward, self._stems = model, forward, stems
        self.fills_up = model.device.type == "cuda"
        self.forget()

    def forget(self) -> None:
        """Give back all memory."""
        self._frames: dict[int, _Frame] = {}
        self._graphs = Graphs(self._model.device)

    def read(self, asked: Prompt, rows: Rows) -> Start:
        """Cache and logits after the prompt, under its condition."""
        condition, prompt = asked
        if self.fills_up:
            return self._replayed(prompt, condition, rows)
        device, n = self._model.device, len(prompt)
        cache = SlotCache(1, n)
        rows.set([condition])
        with self._stems.reading(asked, cache) as n_read:
            logits = self._pass(cache, torch.tensor([prompt], device=device), torch.arange(n, device=device)[None], n_read=n_read)
            cache.stack()  # before other lanes see it
        return cache, logits

    def _replayed(self, prompt: tuple[int, ...], condition: int, rows: Rows) -> Start:
        device, n = self._model.device, len(prompt)
        size = math.ceil(n / SPAN) * SPAN
        if size not in self._frames:
            zero = torch.zeros(1, dtype=torch.long, device=device)
            self._frames[size] = _Frame(SlotCache(1, size), torch.zeros(2, size, dtype=torch.long, device=device), zero, zero.clone())
        frame = self._frames[size]
        here = torch.tensor([[*prompt, *prompt[-1:] * (size - n)], [*range(n), *[n - 1] * (size - n)]])
        frame.inputs.copy_(sent(here, device))
        both = sent(torch.tensor([n - 1, condition]), device)
        frame.last.copy_(both[:1])
        frame.condition.copy_(both[1:])
        rows.set(frame.condition)
        self._graphs.run(size, partial(self._fill, frame))
        assert frame.logits is not None, "a pass was run"
        own = SlotCache(1, n)
        own.copy_row(frame.cache, 0, n)
        return own, frame.logits.clone()

    def _fill(self, frame: _Frame) -> None:
        logits = self._pass(frame.cache, frame.inputs[:1], frame.inputs[1:], frame.last)
        if frame.logits is None:
            frame.logits = torch.empty_like(logits)
        frame.logits.copy_(logits)

    def _pass(self, cache: SlotCache, ids: Tensor, positions: Tensor, kept: int | Tensor = 1, n_read: int = 0) -> Tensor:
        """`n_read`: blocks from the first on that are not run."""
        step = cache.begin(slice(0, 1), positions, ids.shape[1])
        logits = self._forward(ids, positions, cache, kept=kept)
        if not step.stored == step.read == self._model.n_layers - n_read:
            raise ModelError(OWN_ATTENTION.format(type(self._model.model).__name__))
        return logits
