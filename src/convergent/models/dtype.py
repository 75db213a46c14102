"""`dtype: auto`: float32 unless bfloat16 is truly faster on this machine. Probed once by a short GEMM, remembered in the cache."""

from __future__ import annotations

import time
from typing import Literal

import torch

from convergent.errors import InputError
from convergent.models.probe import remembered
from convergent.models.products import linear

DtypeName = Literal["auto", "float32", "bfloat16"]
WORTH_IT = 1.3
"""bfloat16 must be this many times faster: it costs exactness (near-ties in sampling can depend on the batch)."""


def resolve_dtype(name: str, device: str = "cpu") -> torch.dtype:
    """The torch dtype for "auto", "float32" or "bfloat16" on `device`."""
    if name == "float32":
        return torch.float32
    if name == "bfloat16":
        return torch.bfloat16
    if name != "auto":
        raise InputError(f"dtype: {name!r} is not auto, float32 or bfloat16")
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if bf16_speedup() >= WORTH_IT else torch.float32


def bf16_speedup() -> float:
    """How many times faster a 128-row bfloat16 GEMM is than a float32 one here; remembered per machine and torch version."""
    return remembered("dtype_probe", torch.get_num_threads(), lambda: _gemm_seconds(torch.float32) / _gemm_seconds(torch.bfloat16))


def _gemm_seconds(dtype: torch.dtype) -> float:
    x, w = torch.ones(128, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
    linear(x, w)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        linear(x, w)
        best = min(best, time.perf_counter() - start)
    return best
