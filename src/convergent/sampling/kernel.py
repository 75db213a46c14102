"""Decoding attention on a GPU: one query per row over that row's own slots, in Triton (it comes with torch's CUDA builds).

A general matrix product would look at as many slots as the longest row has, and choose its order of summation by that number, so that a row's last
bits, and now and then a token, would depend on its neighbours. Here a row reads its own slots, block by block from the first, and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor

WIDE = 128
"""Head dimensions from which on heads are wide."""


@dataclass(frozen=True)
class Setting:
    """How the kernel goes about it. A row's last bits depend on it, so it follows from the types alone."""

    block: int
    """Slots at a time."""
    warps: int
    product: bool
    """Whether scores and sums are matrix products (of 16-bit numbers, the heads filled up to 16), or plain sums."""


SETTINGS = {
    (False, False): Setting(16, 1, False),
    (False, True): Setting(16, 1, False),
    (True, False): Setting(32, 1, True),
    (True, True): Setting(16, 1, True),
}
"""By (16-bit numbers, wide heads): the quickest on an H200 at 512 rows of about 100 slots. Wide heads in float32 were not timed: as narrow ones."""


def serves(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the kernel can compute this."""
    return key.shape[3] == value.shape[3] <= 256 and key.stride(3) == value.stride(3) == query.stride(3) == 1 and _kernel() is not None


def attend(
    query: Tensor, key: Tensor, value: Tensor, positions: Tensor, scale: float, window: int | None, softcap: float | None, setting: Setting | None = None
) -> Tensor:
    """query (rows, n_heads, 1, head_dim); key, value (rows, n_kv_heads, span, head_dim); positions (rows, 1). Returns (rows, 1, n_heads, head_dim)."""
    rows, n_heads, _, d = query.shape
    n_kv = key.shape[1]
    groups = n_heads // n_kv
    out = query.new_empty(rows, 1, n_heads, d)
    how = setting or SETTINGS[query.element_size() == 2, d >= WIDE]
    _kernel()[(rows, n_kv)](
        query, key, value, positions, out,
        scale, softcap or 0.0, window or 1 << 30,
        query.stride(0), query.stride(1), key.stride(0), key.stride(1), key.stride(2), value.stride(0), value.stride(1), value.stride(2),
        positions.stride(0), out.stride(0), out.stride(2),
        GROUPS=groups, G=max(16 if how.product else 2, 1 << (groups - 1).bit_length()), WIDTH=d, D=max(16, 1 << (d - 1).bit_length()),
        BLOCK=how.block, CAPPED=softcap is not None, PRODUCT=how.product, num_warps=how.warps,
    )  # fmt: skip
    return out


@cache
def _kernel() -> Any:
    """The compiled kernel, or None where there is no Triton."""
    try:
        import triton
        import triton.language as tl
    except ImportError:
        return None

    @triton.jit  # type: ignore[untyped-decorator]
    def decode(  # type: ignore[no-untyped-def]
        q_at, k_at, v_at, position_at, out_at, scale, cap, window,
        q_row, q_head, k_row, k_head, k_slot, v_row, v_head, v_slot, position_row, out_row, out_head,
        GROUPS: tl.constexpr, G: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, CAPPED: tl.constexpr, PRODUCT: tl.constexpr,
    ):  # fmt: skip
        row, kv = tl.program_id(0).to(tl.int64), tl.program_id(1)
        at = tl.load(position_at + row * position_row).to(tl.int32)
        group, dim = tl.arange(0, G), tl.arange(0, D)
        head = kv * GROUPS + group
        there = (group < GROUPS)[:, None] & (dim < WIDTH)[None, :]
        q = tl.load(q_at + row * q_row + head[:, None] * q_head + dim[None, :], mask=there, other=0.0)
        if not PRODUCT:
            q = q.to(tl.float32) * scale
        highest = tl.full([G], float("-inf"), tl.float32)
        total = tl.zeros([G], tl.float32)
        mixed = tl.zeros([G, D], tl.float32)
        first = tl.maximum(at - window + 1, 0) // BLOCK * BLOCK
        for start in range(first, at + 1, BLOCK):
            slot = start + tl.arange(0, BLOCK)
            seen = (slot <= at) & (slot > at - window)
            inside = seen[:, None] & (dim < WIDTH)[None, :]
            k = tl.load(k_at + row * k_row + kv * k_head + slot[:, None] * k_slot + dim[None, :], mask=inside, other=0.0)
            v = tl.load(v_at + row * v_row + kv * v_head + slot[:, None] * v_slot + dim[None, :], mask=inside, other=0.0)
            scores = tl.dot(q, tl.trans(k)) * scale if PRODUCT else tl.sum(q[:, None, :] * k.to(tl.float32)[None, :, :], axis=2)
            if CAPPED:
                scores = cap * (2 * tl.sigmoid(2 * scores / cap) - 1)
            scores = tl.where(seen[None, :], scores, float("-inf"))
            top = tl.maximum(highest, tl.max(scores, axis=1))
            fade, weight = tl.exp(highest - top), tl.exp(scores - top[:, None])
            total = total * fade + tl.sum(weight, axis=1)
            mixed *= fade[:, None]
            if PRODUCT:
                mixed += tl.dot(weight.to(v.dtype), v)
            else:
                mixed += tl.sum(weight[:, :, None] * v.to(tl.float32)[None, :, :], axis=1)
            highest = top
        found = mixed / total[:, None]
        tl.store(out_at + row * out_row + head[:, None] * out_head + dim[None, :], found.to(out_at.dtype.element_ty), mask=there)

    return decode
