"""One token per row from logits, by inverse CDF.

The token is the first whose cumulative probability exceeds the row's own uniform number, so a draw needs no random state, no sort
(for top_p = 1) and no `multinomial`, which over a 49k vocabulary costs about as much as all linear layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from convergent.errors import ModelError

_BLOCK = 256


def draw(logits: Tensor, temperature: Tensor, top_p: Tensor, u: Tensor) -> Tensor:
    """Tokens (rows,) int64.

    logits (rows, vocabulary); temperature, top_p, u (rows,) float64, u in [0, 1). Temperature 0 is greedy. top_p keeps the smallest set of
    most probable tokens with at least that mass (ties at its edge stay in). Raises ModelError for logits that are not numbers.
    """
    logits = logits.float()
    if not bool(torch.isfinite(logits.amax(-1)).all()):
        raise ModelError("sampling: the model's logits are not finite; use a smaller steering coefficient, or dtype float32")
    scaled = logits / temperature.clamp_min(1e-6).to(logits)[:, None]
    weights = (scaled - scaled.amax(-1, keepdim=True)).exp_()
    if bool((top_p < 1).any()):
        weights = _nucleus(weights, top_p)
    tokens = _invert(weights, u)
    greedy = temperature <= 0
    return torch.where(greedy, logits.argmax(-1), tokens) if bool(greedy.any()) else tokens


def _invert(weights: Tensor, u: Tensor) -> Tensor:
    """First index whose cumulative weight exceeds u times the total, in two levels: blocks, then within one block."""
    rows, vocabulary = weights.shape
    blocks = torch.nn.functional.pad(weights, (0, -vocabulary % _BLOCK)).view(rows, -1, _BLOCK)
    ends = blocks.sum(-1).double().cumsum(-1)
    target = (u * ends[:, -1])[:, None]
    block = torch.searchsorted(ends, target, right=True).clamp_max(ends.shape[1] - 1)
    start = torch.where(block > 0, ends.gather(1, (block - 1).clamp_min(0)), 0.0)
    inside = start + blocks[torch.arange(rows, device=weights.device), block[:, 0]].double().cumsum(-1)
    offset = torch.searchsorted(inside, target, right=True).clamp_max(_BLOCK - 1)
    token = (block * _BLOCK + offset).clamp_max(vocabulary - 1)
    # Block sums and running sums round differently, so a target at a block's very end can fall on a token of no weight.
    stray = weights.gather(1, token) <= 0
    if bool(stray.any()):
        ids = torch.arange(vocabulary, device=weights.device)[None]
        before = torch.where((weights > 0) & (ids <= token), ids, -1).amax(-1, keepdim=True)
        token = torch.where(stray, torch.where(before >= 0, before, weights.argmax(-1, keepdim=True)), token)
    return token[:, 0]


def _nucleus(weights: Tensor, top_p: Tensor) -> Tensor:
    """Weights with what lies outside the nucleus set to 0."""
    ordered = weights.sort(dim=-1, descending=True).values
    mass = ordered.double().cumsum(-1)
    cut = torch.searchsorted(mass, (top_p * mass[:, -1])[:, None]).clamp_max(weights.shape[1] - 1)
    kept = (weights >= ordered.gather(1, cut)) | (top_p >= 1)[:, None]
    return torch.where(kept, weights, torch.zeros_like(weights))
