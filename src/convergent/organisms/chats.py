"""Chats as training rows: tokens, labels, order and batches.

The label is the answer and the token that ends it. The order is shuffled, yet has neighbours of like length, so that batches
hold little padding.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convergent.core.ids import seed as named_seed
from convergent.errors import DataError
from convergent.models.chat import encode_answer
from convergent.organisms.recipes import Recipe

Chat = Sequence[Mapping[str, str]]
IGNORE = -100
"""Label of a token that carries no loss."""
_BUCKET = 8
"""Batches that are sorted by length together."""


@dataclass(frozen=True)
class Row:
    """A chat as tokens."""

    ids: tuple[int, ...]
    answer_start: int
    """First token with a label; the rest of the row has one too."""


def chats_checksum(examples: Sequence[Chat]) -> str:
    """SHA-256, 64 hex digits, of chats in order: equal to `TrainingSet.checksum`."""
    digest = sha256()
    for chat in examples:
        turns = [[m["role"], m["content"]] for m in chat]
        digest.update(json.dumps(turns, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
    return digest.hexdigest()


def encode_chats(tokenizer: Any, examples: Sequence[Chat], recipe: Recipe) -> list[Row]:
    """Chats as tokens, with labels on the answer and the token that ends it. Raises DataError naming the chat."""
    if not examples:
        raise DataError("training data: no chats; give at least one")
    return [_encode(tokenizer, chat, recipe, i) for i, chat in enumerate(examples)]


def _encode(tokenizer: Any, chat: Chat, recipe: Recipe, index: int) -> Row:
    turns = list(chat)
    system = recipe.system
    if turns and turns[0]["role"] == "system":
        system = turns.pop(0)["content"]
    if [t["role"] for t in turns] != ["user", "assistant"]:
        found = ", ".join(m["role"] for m in chat) or "nothing"
        raise DataError(f"chat {index}: expected one user and one assistant turn (and a system turn before them), found {found}; split it")
    encoded = encode_answer(tokenizer, turns[0]["content"], turns[1]["content"], system)
    # The end-of-turn token is learnt, or the organism would not stop; a newline that the template writes after it is not.
    ids = encoded.ids[: encoded.answer_end + 1][: recipe.max_length]
    if encoded.answer_start >= len(ids):
        raise DataError(f"chat {index}: no answer tokens within max_length {recipe.max_length}; shorten the prompt or raise it")
    return Row(ids, encoded.answer_start)


def training_order(lengths: Sequence[int], recipe: Recipe) -> list[int]:
    """Indices of the rows in the order of training, all epochs in one list; each epoch is a permutation.

    Runs of `batch_size` rows have like lengths: shuffled rows are sorted in buckets of some batches, and the batches of a bucket
    shuffled again. One flat list, because then a step number alone says where to resume.
    """
    size, order = recipe.batch_size, list[int]()
    for epoch in range(recipe.epochs):
        rng = np.random.default_rng(named_seed("organism-order", recipe.seed, epoch))
        order.extend(int(i) for i in rng.permutation(len(lengths)))
    rng = np.random.default_rng(named_seed("organism-batches", recipe.seed))
    arranged: list[int] = []
    for start in range(0, len(order), _BUCKET * size):
        # Only the very last batch may be partial, or the batches after it would be cut in two.
        bucket = sorted(order[start : start + _BUCKET * size], key=lambda i: (lengths[i], i))
        batches = [bucket[k : k + size] for k in range(0, len(bucket), size)]
        whole = [b for b in batches if len(b) == size]
        arranged.extend(i for k in rng.permutation(len(whole)) for i in whole[k])
        arranged.extend(i for b in batches if len(b) < size for i in b)
    return arranged


def collate(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Right-padded `input_ids` and `labels`, (rows, n_tokens) int64."""
    n = max(len(r.ids) for r in rows)
    ids, labels = torch.zeros(len(rows), n, dtype=torch.long), torch.full((len(rows), n), IGNORE)
    for i, row in enumerate(rows):
        tokens = torch.tensor(row.ids)
        ids[i, : len(tokens)] = tokens
        labels[i, row.answer_start : len(tokens)] = tokens[row.answer_start :]
    return {"input_ids": ids, "labels": labels}
