"""Attention of new tokens over a row's own slots and, where its prompt is stored apart, over that prompt.

Plain matrix products: for one query and few heads they are about twice as fast on a CPU as the fused kernel. On a GPU, decoding has a kernel of
its own (`kernel`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from convergent.errors import ModelError
from convergent.models.attention import ABSENT, window_of
from convergent.sampling import kernel
from convergent.sampling.cache import Sharing, now

ATTENTION = "convergent_slots"


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = ABSENT,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Grouped-query attention of new tokens over cached slots.

    query (batch, n_heads, n_tokens, head_dim); key, value (batch, n_kv_heads, span, head_dim). Each query at position p sees the
    positions p' <= p (and p' > p - sliding_window), in its row's slots and before them. Returns (batch, n_tokens, n_heads, value's head_dim).
    """
    if kwargs.get("s_aux") is not None:
        raise ModelError(f"{type(module).__name__}: attention sinks are not supported by the sampler")
    step = now.step
    step.attended(key, value)
    b, n_heads, n, d = query.shape
    width = value.shape[-1]  # not always the keys'
    n_kv, span = key.shape[1:3]
    scale = d**-0.5 if scaling is None else scaling
    window = window_of(module, sliding_window)
    if n == 1 and query.device.type == "cuda" and kernel.serves(query, key, value):
        return kernel.attend(query, key, value, step.positions, scale, window, softcap), None
    q = (query * scale).reshape(b, n_kv, -1, d)
    if key.dtype == torch.bfloat16 and key.device.type == "cpu":
        key = key.contiguous()  # oneDNN would copy the transposed slots number by number
    look = _Look(step.positions, window, softcap)
    if (window, span) not in step.hidden:
        slots = torch.arange(span, device=key.device)
        step.hidden[window, span] = look.hidden(slots if step.before is None else slots + step.before[:, :, None])
    scores = look.at(torch.matmul(q, key.transpose(2, 3)), step.hidden[window, span])
    if step.sharing:
        # Softmax takes both parts of a row together; its own slots' weights take the place of their scores.
        behind = q.new_zeros(*q.shape[:3], width)
        for sharing in step.sharing:
            _weigh(sharing, step.layer, q, scores, behind, look)
        return (torch.matmul(scores, value) + behind).reshape(b, n_heads, n, width).transpose(1, 2).contiguous(), None
    return torch.matmul(_softmax(scores), value).reshape(b, n_heads, n, width).transpose(1, 2).contiguous(), None


@dataclass(frozen=True)
class _Look:
    """What queries at `positions` (batch, n_tokens) may see, and how their scores are cut off."""

    positions: Tensor
    window: int | None
    softcap: float | None

    def of(self, rows: Tensor) -> _Look:
        return _Look(self.positions[rows], self.window, self.softcap)

    def hidden(self, seen: Tensor) -> Tensor:
        """(batch, n_tokens, n): where `seen`, the positions looked at ((n,) or (batch, 1, n)), is out of sight."""
        found = seen > self.positions[:, :, None]
        return found | (seen <= self.positions[:, :, None] - self.window) if self.window else found

    def at(self, scores: Tensor, hidden: Tensor) -> Tensor:
        """Scores (batch, n_kv_heads, groups * n_tokens, n) with -inf where they are `hidden`."""
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        b, n_kv, _, n_seen = scores.shape
        return scores.view(b, n_kv, -1, hidden.shape[1], n_seen).masked_fill_(hidden[:, None, None], float("-inf")).view(scores.shape)


def _softmax(scores: Tensor) -> Tensor:
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(scores.dtype)


def _weigh(sharing: Sharing, layer: int, q: Tensor, scores: Tensor, behind: Tensor, look: _Look) -> None:
    """For the rows of `sharing`: weights of their own slots into `scores`, the weighted sum of the prompt's values into `behind`.

    q, behind (batch, n_kv_heads, groups, head_dim of keys, of values) of one new token a row; scores (batch, n_kv_heads, groups, span).
    """
    rows = sharing.rows
    if sharing.prompt is None:
        scores[rows] = _softmax(scores[rows])
        return
    keys, values = sharing.prompt.keys[layer][0], sharing.prompt.values[layer][0]
    m, n_kv, groups, d = len(rows), *q.shape[1:]
    length = keys.shape[1]
    together = q[rows].transpose(0, 1).reshape(n_kv, m * groups, d)
    before = torch.matmul(together, keys.transpose(1, 2)).view(n_kv, m, groups, length).transpose(0, 1).contiguous()
    seen = torch.arange(length)
    mine = look.of(rows)
    before = mine.at(before, mine.hidden(seen.masked_fill(seen >= sharing.n_tokens, torch.iinfo(seen.dtype).max)))
    weights = _softmax(torch.cat([before, scores[rows]], dim=-1))
    scores[rows] = weights[..., length:]
    of_prompt = weights[..., :length].transpose(0, 1).reshape(n_kv, m * groups, length)
    behind[rows] = torch.matmul(of_prompt, values).view(n_kv, m, groups, values.shape[-1]).transpose(0, 1)
