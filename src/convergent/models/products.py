"""The products of linear layers, by the library that is fastest on this CPU.

torch multiplies float32 by MKL, which keeps to AVX2 on processors that are not Intel's. oneDNN, which torch brings too, is more than twice as fast where such a
processor has AVX-512; which of the two is used is tried once per machine and remembered. bfloat16 is oneDNN's in any case, but lays every weight out anew at
every call, which with few rows takes longer than the product: in decoding, weights are kept in its own layout (`laid_out`).

Both are float32 products of the same numbers, summed in another order.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convergent.models.patched import forward_of
from convergent.models.probe import remembered

WORTH_IT = 1.3
"""oneDNN must be this many times faster in float32: near one, the choice would follow the noise, and last bits with it."""
MOST_KEPT = 4 << 30
"""Bytes of linear layers up to which they are kept in oneDNN's layout while answers are sampled, beside the weights themselves."""


def by_onednn(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of this dtype are oneDNN's here: float32 if it is `WORTH_IT`, bfloat16 where torch leaves it to oneDNN anyway."""
    if device.type != "cpu" or not _available():
        return False
    if dtype == torch.float32:
        return onednn_speedup() >= WORTH_IT
    return dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@functools.cache
def onednn_speedup() -> float:
    """How many times faster a float32 product of 64 rows is by oneDNN than by torch's choice, on one thread; remembered per machine and torch version."""
    return remembered("onednn_probe", 1, lambda: _seconds(F.linear) / _seconds(_product))


@functools.cache
def _available() -> bool:
    try:
        x, w = torch.ones(4, 8), torch.ones(2, 8)
        return torch.backends.mkldnn.is_available() and torch.equal(_product(x, w), F.linear(x, w))
    except (AttributeError, RuntimeError):  # a build without it, or with other names
        return False


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


@torch.inference_mode()
def _seconds(product: Callable[[Tensor, Tensor], Tensor]) -> float:
    x, w = torch.ones(64, 576), torch.ones(1536, 576)
    before, best = torch.get_num_threads(), math.inf
    torch.set_num_threads(1)
    try:
        for _ in range(12):  # the first makes the kernel
            start = time.perf_counter()
            product(x, w)
            best = min(best, time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    return best


class _Linear(torch.autograd.Function):
    """x W' + b; x (n, d_in), W (d_out, d_in)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        return (
            _product(grad, weight.t()) if for_x else None,
            _product(grad.t(), x.t()) if for_weight else None,
            grad.sum(0) if for_bias else None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W' + b as torch's `linear`, gradients included; x (..., d_in), weight (d_out, d_in), bias (d_out,) -> (..., d_out)."""
    if x.dtype != weight.dtype or not x.numel() or not by_onednn(x.dtype, x.device):
        return F.linear(x, weight, bias)
    flat = x.reshape(-1, x.shape[-1])
    differentiated = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    y: Tensor = _Linear.apply(flat, weight, bias) if differentiated else _product(flat, weight, bias)
    return y.view(*x.shape[:-1], -1)


def add_product(y: Tensor, x: Tensor, weight: Tensor, scale: float) -> Tensor:
    """y + scale x W', in place, without gradients; y (n, d_out), x (n, d_in), weight (d_out, d_in)."""
    if by_onednn(x.dtype, x.device):
        return y.add_(_product(x, weight), alpha=scale)
    return y.addmm_(x, weight.t(), alpha=scale)


def speed_up(model: nn.Module) -> None:
    """Let the float32 linear layers of `model` compute by `linear` from now on, where that is another library."""
    for layer in _plain(model, torch.float32):
        layer.forward = functools.partial(_forward, layer)  # type: ignore[method-assign]


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, layer.weight, layer.bias)


@contextmanager
def sped_up(model: nn.Module) -> Iterator[None]:
    """Run the body with `speed_up`; the layers are as they were afterwards."""
    with ExitStack() as stack:
        for layer in _plain(model, torch.float32):
            stack.enter_context(forward_of(layer, functools.partial(_forward, layer)))
        yield


@contextmanager
def laid_out(model: nn.Module) -> Iterator[None]:
    """Run the body, which computes no gradient, with the linear layers in oneDNN's layout, up to `MOST_KEPT` bytes of weights; beyond, as `sped_up`."""
    if not kept_bytes(model):
        with sped_up(model):
            yield
        return
    with ExitStack() as stack:
        layouts: dict[int, Any] = {}
        for layer in _plain(model):
            w = layer.weight
            if id(w) not in layouts:
                with torch.inference_mode():
                    layouts[id(w)] = torch.ops.mkldnn._reorder_linear_weight(w.detach(), None)
            stack.enter_context(forward_of(layer, functools.partial(_kept_forward, layer, layouts[id(w)])))
        yield


def _kept_forward(layer: nn.Linear, layout: Any, x: Tensor) -> Tensor:
    if x.dtype != layer.weight.dtype or not x.numel():
        return F.linear(x, layer.weight, layer.bias)
    return _product(x, layout, layer.bias)


def product_of(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    """(n, d_in) to (n, d_out) by the library that computes this layer now."""
    own = layer.__dict__.get("forward")
    return own if own is not None else lambda x: F.linear(x, layer.weight, layer.bias)


def in_force(model: nn.Module) -> bool:
    """Whether linear layers of `model` compute by oneDNN now."""
    return any("forward" in m.__dict__ for m in _plain(model))


def kept_bytes(model: nn.Module) -> int:
    """Bytes that `laid_out` takes beside the weights."""
    weights = {id(m.weight): m.weight for m in _plain(model)}
    n_bytes = sum(w.numel() * w.element_size() for w in weights.values())
    return n_bytes if n_bytes <= MOST_KEPT else 0


def _plain(model: nn.Module, dtype: torch.dtype | None = None) -> list[nn.Linear]:
    """The linear layers that oneDNN computes here, of that dtype or of any. Those of another class may do something else, and keep it."""
    plain = [m for m in model.modules() if type(m) is nn.Linear and by_onednn(m.weight.dtype, m.weight.device)]
    return [m for m in plain if dtype in (None, m.weight.dtype)]
