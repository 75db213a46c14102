"""One token per row from logits, by inverse CDF.

The token is the first whose cumulative probability exceeds the row's own uniform number, so a draw needs no random state, no sort
(for top_p = 1) and no `multinomial`, which over a 49k vocabulary costs about as much as all linear layers. On a CPU a few rows are
drawn at a time: what is worked on stays in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from convergent.errors import ModelError

_BLOCK = 256
_ROWS = 8
_TOP = 1024
"""Tokens that a nucleus is looked for in before more are."""


def draw(logits: Tensor, temperature: Sequence[float], top_p: Sequence[float], u: Tensor) -> list[int]:
    """A token per row.

    logits (rows, vocabulary); temperature and top_p per row; u (rows,) float64 in [0, 1). Temperature 0 is greedy. top_p keeps the smallest set
    of most probable tokens with at least that mass (ties at its edge stay in). Raises ModelError for logits that are not numbers.
    """
    return checked(choose(logits, temperature, top_p, u).tolist())


def choose(logits: Tensor, temperature: Sequence[float], top_p: Sequence[float], u: Tensor) -> Tensor:
    """The same as (rows,) int64 where the logits are, -1 for a row whose logits are not numbers.

    A GPU is not waited for, except with a top_p below 1: how far a nucleus reaches is asked of it.
    """
    size = _ROWS if logits.device.type == "cpu" else len(logits)
    parts = [slice(i, i + size) for i in range(0, len(logits), size)]
    return torch.cat([_choose(logits[p].float(), temperature[p], top_p[p], u[p]) for p in parts])


def checked(tokens: list[int]) -> list[int]:
    """What `choose` found. Raises ModelError if some logits were not numbers."""
    if min(tokens) < 0:
        raise ModelError("sampling: the model's logits are not finite; use a smaller steering coefficient, or dtype float32")
    return tokens


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """On `device`, which is not waited for: it has its copy before anything it is given later runs."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _choose(logits: Tensor, temperature: Sequence[float], top_p: Sequence[float], u: Tensor) -> Tensor:
    device = logits.device
    top = logits.amax(-1, keepdim=True)
    heat = sent(torch.tensor([max(t, 1e-6) for t in temperature], dtype=logits.dtype), device)[:, None]
    weights = torch.sub(logits, top).div_(heat).exp_()
    if min(top_p) < 1:
        weights = _nucleus(weights, sent(torch.tensor(top_p, dtype=torch.float64), device))
    tokens = _invert(weights, sent(u, device))
    if min(temperature) <= 0:
        tokens = torch.where(sent(torch.tensor([t <= 0 for t in temperature]), device), logits.argmax(-1), tokens)
    return torch.where(torch.isfinite(top[:, 0]), tokens, -1)


def _invert(weights: Tensor, u: Tensor) -> Tensor:
    """First index whose cumulative weight exceeds u times the total, in two levels: blocks, then within one block."""
    rows, vocabulary = weights.shape
    if vocabulary % _BLOCK:
        weights = torch.nn.functional.pad(weights, (0, -vocabulary % _BLOCK))
    blocks = weights.view(rows, -1, _BLOCK)
    ends = blocks.sum(-1).double().cumsum(-1)
    total = ends[:, -1:]
    # u < 1, but the product may round up to the total; below it, the block found has some weight.
    target = torch.minimum(u[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    block = torch.searchsorted(ends, target, right=True).clamp_max(ends.shape[1] - 1)
    start = torch.where(block > 0, ends.gather(1, (block - 1).clamp_min(0)), 0.0)
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, _BLOCK))[:, 0]
    offset = torch.searchsorted(start + inside.double().cumsum(-1), target, right=True).clamp_max(_BLOCK - 1)
    # Block sums and running sums round differently, so a target at a block's very end can fall on a token of no weight.
    positive = inside > 0
    places = torch.arange(_BLOCK, device=weights.device)[None]
    before = torch.where(positive & (places <= offset), places, -1).amax(-1, keepdim=True)
    first = positive.int().argmax(-1, keepdim=True)
    return (block * _BLOCK + torch.where(before >= 0, before, first))[:, 0]


def _nucleus(weights: Tensor, top_p: Tensor) -> Tensor:
    """Weights with what lies outside the nucleus set to 0."""
    vocabulary = weights.shape[1]
    wanted = top_p * weights.sum(-1, dtype=torch.float64)
    n = min(_TOP, vocabulary)
    while True:
        ordered = weights.topk(n, dim=-1).values
        mass = ordered.double().cumsum(-1)
        if n == vocabulary or bool((mass[:, -1] >= wanted)[top_p < 1].all()):
            break
        n = min(8 * n, vocabulary)
    cut = torch.searchsorted(mass, wanted[:, None]).clamp_max(n - 1)
    inside = (weights >= ordered.gather(1, cut)) | (top_p >= 1)[:, None]
    return torch.where(inside, weights, torch.zeros_like(weights))
