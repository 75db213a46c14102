"""Questions with answers, and how they are batched for teacher-forced passes."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SHARED_BY = 4
"""Texts with the same beginning share one pass over it if so many do, on the mean; for fewer the smaller batches cost more than is saved."""


@dataclass(frozen=True)
class Text:
    """A question with an answer, as text or as the tokens that were sampled."""

    id: str
    question: str
    answer: str | tuple[int, ...]
    system: str = "default"


def batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, at most `batch_tokens` padded tokens each (one text at least)."""
    batch: list[int] = []
    longest = 0
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if batch and max(longest, lengths[i]) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch, longest = [], 0
        batch.append(i)
        longest = max(longest, lengths[i])
    if batch:
        yield batch


def groups(beginnings: Sequence[tuple[int, ...]]) -> list[tuple[tuple[int, ...], list[int]]]:
    """Texts by their first tokens: [(shared tokens, indices)], in order of appearance; one group that shares nothing if too few do."""
    found: dict[tuple[int, ...], list[int]] = {}
    for i, beginning in enumerate(beginnings):
        found.setdefault(beginning, []).append(i)
    if len(beginnings) < SHARED_BY * len(found):
        return [((), list(range(len(beginnings))))]
    return list(found.items())


class Beginning:
    """The keys and values of tokens that several texts begin with, computed once. Call it inside `inference_mode`."""

    def __init__(self, body: nn.Module, tokens: Sequence[int], device: torch.device) -> None:
        self.body, self.n = body, len(tokens)
        self.cache: Any = None
        if tokens:
            self.cache = body(input_ids=torch.tensor([list(tokens)], device=device), use_cache=True).past_key_values

    def run(self, ids: Tensor, mask: Tensor) -> None:
        """The body over the rest of the texts: right-padded ids (batch, n_tokens) and their mask."""
        if self.cache is None:
            self.body(input_ids=ids, attention_mask=mask, use_cache=False)
            return
        cache = copy.deepcopy(self.cache)  # a pass appends to it
        cache.batch_repeat_interleave(len(ids))
        seen = torch.ones(len(ids), self.n, dtype=mask.dtype, device=mask.device)
        positions = torch.arange(self.n, self.n + ids.shape[1], device=ids.device)[None].expand(len(ids), -1)
        self.body(input_ids=ids, attention_mask=torch.cat([seen, mask], 1), position_ids=positions, past_key_values=cache, use_cache=True)


def padded(sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Right-padded ids (batch, n_tokens) and their mask: positions count from 0, and a causal model never looks right."""
    n = max(len(s) for s in sequences)
    ids = torch.zeros(len(sequences), n, dtype=torch.long)
    mask = torch.zeros(len(sequences), n, dtype=torch.long)
    for row, s in enumerate(sequences):
        ids[row, : len(s)] = torch.tensor(list(s))
        mask[row, : len(s)] = 1
    return ids.to(device), mask.to(device)
