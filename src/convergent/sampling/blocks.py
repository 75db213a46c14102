"""Decoder blocks of the common kind, decoded with fewer small operations and the same bits.

With few rows half of a step goes into launching some two thousand small operations. Blocks of norm, rotary attention, norm and gated MLP (Llama, Mistral,
Qwen2 and others of that build) are recognised by their parts. Whether both ways compute the same here, to the bit, is tried on this machine; where they do
not, or where an intervention acts inside a block, the block's own code runs. So an answer does not depend on which of the two computed it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from convergent.models.cached import cache_name
from convergent.models.load import ChatModel
from convergent.models.patched import forward_of
from convergent.models.products import in_force, product_of
from convergent.sampling.attention import attention
from convergent.sampling.cache import SPAN, SlotCache
from convergent.sampling.invariance import counted

ROWS = (1, 2, 3, 4, 7, 16, 33)
"""Numbers of rows at which both ways are compared."""


@dataclass(frozen=True, eq=False)
class _Parts:
    """What a block of this kind consists of."""

    attention: Any
    norms: tuple[Any, Any]
    linears: dict[str, nn.Linear]
    act: Callable[[Tensor], Tensor]


def _parts(block: Any) -> _Parts | None:
    """The parts, if it has just these."""
    own, mlp = getattr(block, "self_attn", None), getattr(block, "mlp", None)
    norms = getattr(block, "input_layernorm", None), getattr(block, "post_attention_layernorm", None)
    names = {n: p for p, ns in ((own, ("q_proj", "k_proj", "v_proj", "o_proj")), (mlp, ("gate_proj", "up_proj", "down_proj"))) for n in ns}
    linears = {n: getattr(p, n, None) for n, p in names.items()}
    if not all(type(m) is nn.Linear for m in linears.values()) or not callable(getattr(mlp, "act_fn", None)):
        return None
    if not all(type(n).__name__.endswith("RMSNorm") and hasattr(n, "variance_epsilon") for n in norms):
        return None
    if not all(hasattr(own, a) for a in ("head_dim", "scaling", "layer_idx")):
        return None
    # A window that its attention takes from elsewhere than itself would not be seen.
    if not hasattr(own, "sliding_window") and getattr(getattr(own, "config", None), "sliding_window", None) is not None:
        return None
    return _Parts(own, norms, linears, mlp.act_fn)  # type: ignore[arg-type, union-attr]


def _norm(x: Tensor, norm: Any) -> Tensor:
    wide = x.float()
    scaled = wide * wide.pow(2).mean(-1, keepdim=True).add_(norm.variance_epsilon).rsqrt_()
    return norm.weight * scaled.to(x.dtype)  # type: ignore[no-any-return]


def _decoding(own: Callable[..., Any], parts: _Parts, cache_is: str) -> Callable[..., Any]:
    """`own` for prompts, and for one new token a row the same in fewer steps."""
    attn, act, (first, second) = parts.attention, parts.act, parts.norms
    q_of, k_of, v_of, o_of, gate_of, up_of, down_of = (product_of(parts.linears[f"{n}_proj"]) for n in ("q", "k", "v", "o", "gate", "up", "down"))
    d, layer, scaling = attn.head_dim, attn.layer_idx, attn.scaling
    n_heads, n_kv = (parts.linears[f"{n}_proj"].out_features // d for n in ("q", "k"))

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        cache, (cos, sin) = kwargs.get(cache_is), kwargs.get("position_embeddings", (None, None))
        if args or x.shape[1] != 1 or not isinstance(cache, SlotCache) or cache.step is None or cos is None or cos.shape[-1] != d:
            return own(x, *args, **kwargs)
        rows = x.shape[0]
        h = _norm(x, first)
        both = torch.cat((q_of(h), k_of(h)), -1).view(rows, n_heads + n_kv, 1, d)
        cos, sin = cache.step.turned(cos, sin)
        # -b sin + a cos, b cos + a sin of the halves a, b, as the plain code has it, whose minus is in `sin` here.
        both = (both * cos).add_(torch.cat((both[..., d // 2 :], both[..., : d // 2]), -1).mul_(sin))
        keys, values = cache.update(both[:, n_heads:], v_of(h).view(rows, n_kv, 1, d), layer)
        seen = attention(attn, both[:, :n_heads], keys, values, None, scaling=scaling)[0]
        x = o_of(seen.view(rows, 1, -1)).add_(x)
        h = _norm(x, second)
        return down_of(act(gate_of(h)) * up_of(h)).add_(x)

    return forward


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


@contextmanager
def decoding_blocks(model: ChatModel, n_threads: int) -> Iterator[int]:
    """Run the body, whose passes have `n_threads` each, with blocks of the known kind decoded in fewer steps, where nothing is hooked inside; yields how many.

    Enter it with all hooks in place.
    """
    with ExitStack() as stack:
        n, name = 0, cache_name(model.model)
        for block, parts in fitting(model, n_threads) if model.device.type == "cpu" else ():
            if not any(_hooked(m) for m in block.modules() if m is not block):
                stack.enter_context(forward_of(block, _decoding(block.forward, parts, name)))
                n += 1
        yield n


_known: weakref.WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], list[tuple[nn.Module, _Parts]]]] = weakref.WeakKeyDictionary()


@torch.inference_mode()
def fitting(model: ChatModel, n_threads: int) -> list[tuple[nn.Module, _Parts]]:
    """The blocks of the known kind that give the same bits both ways; tried once per model, dtype, number of threads and library."""
    found = [(block, parts) for block in model.anatomy.blocks if (parts := _parts(block)) is not None]
    if not found:
        return []
    like = found[0][1].linears["q_proj"]
    key = like.weight.dtype, n_threads, in_force(found[0][0])
    known = _known.setdefault(model.model, {})
    if key not in known:
        before = torch.get_num_threads()
        torch.set_num_threads(n_threads)
        try:
            # Sizes are alike in all blocks, so the numbers of rows are tried on one; a block may differ in what it does.
            fits = all(_agree(model, *found[0], rows) for rows in ROWS)
            known[key] = [(block, parts) for block, parts in found if fits and _agree(model, block, parts, ROWS[2])]
        finally:
            torch.set_num_threads(before)
    return known[key]


def _agree(model: ChatModel, block: Any, parts: _Parts, rows: int) -> bool:
    """Whether both ways give the same bits for so many rows: of the output, and of what is stored."""
    like, d, layer, name = parts.linears["q_proj"].weight, parts.attention.head_dim, parts.attention.layer_idx, cache_name(model.model)
    x = counted(rows, 1, model.d_model).mul(3).to(like)
    angles = torch.arange(rows * (d // 2), dtype=torch.float64).view(rows, 1, -1)
    embeddings = tuple(torch.cat((t, t), -1).to(like) for t in (angles.cos(), angles.sin()))
    seen: list[list[Any]] = []
    try:
        for forward in (block.forward, _decoding(block.forward, parts, name)):
            cache, outputs = SlotCache(rows, SPAN), []
            for position in range(3):
                at = torch.full((rows, 1), position)
                cache.begin(slice(0, rows), at, position + 1)
                outputs.append(forward(x + position, position_ids=at, use_cache=True, position_embeddings=embeddings, **{name: cache}))
            seen.append([*outputs, cache.keys[layer], cache.values[layer]])
    except (RuntimeError, TypeError, AttributeError, KeyError, ValueError, IndexError):  # of some other build after all
        return False
    return all(isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b) for a, b in zip(*seen, strict=True))
