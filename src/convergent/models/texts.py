"""Questions with answers, and how they are batched for teacher-forced passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Text:
    """A question with an answer, as text or as the tokens that were sampled."""

    id: str
    question: str
    answer: str | tuple[int, ...]
    system: str = "default"


def batches(lengths: Sequence[int], batch_tokens: int, most: int | None = None) -> Iterator[list[int]]:
    """Indices in batches of similar length, at most `batch_tokens` padded tokens each (one text at least). Texts longer than `most` come alone."""
    batch: list[int] = []
    longest = 0
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if batch and (max(longest, lengths[i]) * (len(batch) + 1) > batch_tokens or (most is not None and lengths[i] > most)):
            yield batch
            batch, longest = [], 0
        batch.append(i)
        longest = max(longest, lengths[i])
    if batch:
        yield batch


def padded(sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Right-padded ids (batch, n_tokens) and their mask: positions count from 0, and a causal model never looks right."""
    n = max(len(s) for s in sequences)
    ids = torch.zeros(len(sequences), n, dtype=torch.long)
    mask = torch.zeros(len(sequences), n, dtype=torch.long)
    for row, s in enumerate(sequences):
        ids[row, : len(s)] = torch.tensor(list(s))
        mask[row, : len(s)] = 1
    return ids.to(device), mask.to(device)
