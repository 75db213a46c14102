"""Whether this machine's kernels give a row of a batch the same bits whatever the other rows are, by trying.

It holds for common BLAS libraries once a product has a few rows, fewer in one thread than in several. Where it does not hold for any number of
rows, it may for one fixed number (a panel); and a row alone always is what it is. A GPU's library chooses its kernels by the number of rows, and a
step that is replayed has one shape anyway, so there it is a panel from the start.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from convergent.models.load import ChatModel
from convergent.models.products import in_force, product_of
from convergent.sampling.attention import attention
from convergent.sampling.cache import SHARED_FROM, SPAN, SlotCache, attending, now

LEAST = (1, 2, 4, 16)
"""Numbers of rows from which on products may be alike, in order of preference."""
PROMPT_ROWS = (1, 2, 3, 4, 5, 7, 16, 33, 64)
PANEL = 32
PANELS_ON_GPU = (512, 256, 128, 64, PANEL)
"""The first whose cache, at `PANEL_TOKENS` to a row, stays within `PANEL_BYTES`: it must follow from the model alone, as tokens may depend on it."""
PANEL_TOKENS, PANEL_BYTES = 1024, 16 << 30


@dataclass(frozen=True)
class Shape:
    """How many rows a forward pass may have."""

    least: int
    """Rows are filled up to so many."""
    panel: int | None = None
    """The only number allowed, or None for any from `least` on."""
    shares: bool = False
    """Whether one product may serve all rows that share a prompt."""


_known: dict[tuple[object, ...], Shape] = {}
_probing = threading.Lock()


def shape_of(model: ChatModel, n_rows: int) -> Shape:
    """The shape for batches of up to `n_rows`, probed once per process for models of the same sizes: lanes that begin together do not probe twice."""
    like = next(model.model.parameters())
    sizes = tuple(sorted({tuple(m.weight.shape) for m in model.model.modules() if isinstance(m, torch.nn.Linear)}))
    most = max(64, n_rows)
    key = (sizes, _heads(model), like.dtype, str(like.device), torch.get_num_threads(), most, in_force(model.model))
    with _probing:
        if key not in _known:
            _known[key] = _probe(model, most)
        return _known[key]


def _probe(model: ChatModel, n_rows: int) -> Shape:
    if model.device.type != "cpu":
        size = panel_on_gpu(model)
        return Shape(size, size) if _linears_are_invariant(model, size, ()) and _attention_is_invariant(model, (size,)) else Shape(1, 1)
    shares = sharing_is_invariant(model)
    for least in LEAST:
        if rows_are_invariant(model, n_rows, least):
            return Shape(least, shares=shares)
    if _linears_are_invariant(model, PANEL, ()) and _attention_is_invariant(model, (PANEL,)):
        return Shape(PANEL, PANEL, shares)
    return Shape(1, 1, shares)


def panel_on_gpu(model: ChatModel) -> int:
    """Rows that a GPU decodes at once."""
    _, n_kv, d, width = _heads(model)
    return panel_for((d + width) * model.n_layers * n_kv * next(model.model.parameters()).element_size())


def panel_for(token_bytes: int) -> int:
    """The same, from the bytes that the cache holds per token."""
    return next((size for size in PANELS_ON_GPU if size * token_bytes * PANEL_TOKENS <= PANEL_BYTES), PANEL)


@torch.inference_mode()
def smaller(model: ChatModel, shape: Shape) -> Shape:
    """With panels of half as many rows, or fewer where a row's bits depend on its place in such a panel; one row is the least."""
    size = (shape.panel or 1) // 2
    while size > 1 and not (_linears_are_invariant(model, size, ()) and _attention_is_invariant(model, (size,))):
        size //= 2
    return replace(shape, least=max(1, size), panel=max(1, size))


@torch.inference_mode()
def rows_are_invariant(model: ChatModel, n_rows: int, least: int) -> bool:
    """Whether matrix products of this model give a row the same bits for any number (>= `least`) and order of rows.

    Tried on every distinct shape of linear layer, and on attention over spans of several lengths.
    """
    sizes = sorted({*range(least, least + 8), n_rows // 2, n_rows - 1})
    return _linears_are_invariant(model, n_rows, sizes) and _attention_is_invariant(model, (least, 2 * least + 1, 32))


def _linears_are_invariant(model: ChatModel, n_rows: int, sizes: Sequence[int]) -> bool:
    """Whether linear layers give the same bits for `n_rows` rows, for these in reverse, and for the first m of `sizes`."""
    layers = {tuple(m.weight.shape): m for m in model.model.modules() if isinstance(m, torch.nn.Linear)}
    for layer in layers.values():
        product = product_of(layer)
        x = counted(n_rows, layer.weight.shape[1]).to(layer.weight)
        y = product(x)
        if not torch.equal(product(x.flip(0)).flip(0), y):
            return False
        if not all(torch.equal(product(x[:m]), y[:m]) for m in sizes):
            return False
    return True


def _heads(model: ChatModel) -> tuple[int, int, int, int]:
    """(query heads, key-value heads, head dimension of queries and keys, of values)."""
    text = model.model.config.get_text_config()
    n_heads = text.num_attention_heads
    d = getattr(text, "head_dim", None) or text.hidden_size // n_heads
    return n_heads, getattr(text, "num_key_value_heads", None) or n_heads, d, getattr(text, "v_head_dim", None) or d


def _attention_is_invariant(model: ChatModel, sizes: Sequence[int]) -> bool:
    """Whether attention gives a row the same bits for several numbers of rows and of slots beyond its own."""
    n_heads, n_kv, d, width = _heads(model)
    like = next(model.model.parameters())
    rows, longest = max(sizes), 5 * SPAN
    q = counted(rows, n_heads, 1, d).to(like)
    k, v = counted(rows, n_kv, longest, d).to(like), counted(rows, n_kv, longest, width).flip(0).to(like)
    found = []
    for n in sizes:
        with attending(torch.full((n, 1), SPAN - 2, device=like.device)):
            found += [attention(torch.nn.Module(), q[:n], k[:n, :, :s], v[:n, :, :s], None)[0] for s in (SPAN, 2 * SPAN, longest)]
    return all(torch.equal(f[: min(sizes)], found[0][: min(sizes)]) for f in found)


@torch.inference_mode()
def sharing_is_invariant(model: ChatModel) -> bool:
    """Whether attention to a prompt that is stored once gives a row the same bits for any number and order of rows that share it.

    Asked without regard to the size of a batch, as a row's tokens must not depend on it. Tried on prompts of several lengths.
    """
    n_heads, n_kv, d, width = _heads(model)
    like = next(model.model.parameters())
    most = max(PROMPT_ROWS)
    q = counted(most, n_heads, 1, d).to(like)
    k, v = counted(most, n_kv, SPAN, d).to(like), counted(most, n_kv, SPAN, width).flip(0).to(like)
    for length in (SHARED_FROM, SHARED_FROM + SPAN + 3, 8 * SHARED_FROM):
        prompt = SlotCache(1, length)
        prompt.keys[0], prompt.values[0] = (counted(1, n_kv, prompt.length, w).to(like) * s for w, s in ((d, 1.0), (width, -0.5)))
        cache = SlotCache(most, SPAN)

        def attend(order: list[int], cache: SlotCache = cache, prompt: SlotCache = prompt, length: int = length) -> Tensor:
            for place in range(len(order)):
                cache.share_row(prompt, place, length)
            now.step = cache.begin(slice(0, len(order)), torch.full((len(order), 1), length + 2), 3)
            return attention(torch.nn.Module(), q[order], k[order], v[order], None)[0]

        whole = attend(list(range(most)))
        if not torch.equal(attend(list(reversed(range(most)))).flip(0), whole):
            return False
        if not all(torch.equal(attend(list(range(m))), whole[:m]) for m in PROMPT_ROWS):
            return False
    return True


def counted(*shape: int) -> Tensor:
    """Numbers in [-1, 1] without pattern or random state."""
    return torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * 0.7310585).view(shape)
