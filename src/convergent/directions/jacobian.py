"""Jacobian products: what a small push at the output of one block does to the residual stream further down.

    J_l u = d/de  h_l(x + e u)  at e = 0        x: output of block L, pushed at every position;  h_l: output of block l >= L, per token

By forward-mode differentiation: one pass carries the derivative along every push through all later blocks at once, so J itself is never
formed and no step size is chosen. Pushes share one pass over the text up to block L. Attention takes torch's plain kernel, as the fast ones have no
forward derivative. Knows nothing of directions, adapters' files or judges.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from convergent.directions.means import block_outputs
from convergent.errors import DirectionError
from convergent.models.anatomy import stream, with_stream
from convergent.models.chat import encode_answer
from convergent.models.load import ChatModel
from convergent.models.texts import Text


@dataclass(frozen=True, eq=False)
class Products:
    """J u of some pushes u over the answer of one text; layers are L, L + 1, ... to the last block."""

    text: str
    """Its id."""
    n_tokens: int
    """Answer tokens."""
    sums: Tensor
    """(n_pushes, n_layers, d_model) float64: sum of J_l u over the answer's tokens."""
    squares: Tensor
    """(n_pushes, n_layers) float64: sum over tokens of |J_l u|^2."""
    along: Tensor
    """(n_pushes, n_layers) float64: sum over tokens of the squared part of J_l u that lies along J_l of the push `onto`, token by token."""


@dataclass(frozen=True, eq=False)
class Written:
    """A linear layer's input read as a rank-1 adapter reads it: pushes that are multiplied, position by position, by scale * (A h)."""

    linear: nn.Linear
    """Inside block L, or before it."""
    a: Tensor
    """(1, n_in)."""
    scale: float
    pushes: Tensor
    """(n_written, d_model)."""


def jacobian_products(
    model: ChatModel, texts: Sequence[Text], layer: int, pushes: Tensor, onto: int = 0, written: Written | None = None
) -> Iterator[Products]:
    """J u for every row u of `pushes` (k, d_model), and then for those of `written`, at the output of block `layer`, text by text.

    Texts without an answer token are left out. Raises DirectionError if a push does not fit the model.
    """
    every = pushes if written is None else torch.cat([pushes, written.pushes])
    if every.ndim != 2 or every.shape[1] != model.d_model or not 0 <= layer < model.n_layers or not 0 <= onto < len(every):
        raise DirectionError(
            f"push: {tuple(every.shape)} at the output of block {layer}, along push {onto}; needs (pushes, {model.d_model}) at one of blocks "
            f"0 to {model.n_layers - 1}"
        )
    every = every.to(model.device, next(model.model.parameters()).dtype)
    for text in texts:
        encoded = encode_answer(model.tokenizer, text.question, text.answer, text.system, closing=False)
        n = encoded.answer_end - encoded.answer_start
        if n:
            ids = torch.tensor([encoded.ids], device=model.device)
            yield _reduced(text.id, n, [t[:, encoded.answer].double() for t in _derivatives(model, ids, layer, every, written)], onto)


def _derivatives(model: ChatModel, ids: Tensor, layer: int, pushes: Tensor, written: Written | None) -> list[Tensor]:
    """Per block from `layer` on (n_pushes, n_tokens, d_model): J u at every token of ids (1, n_tokens); the last pushes are those of `written`."""
    scalars: list[Tensor] = []
    found: list[Tensor] = []

    def read(module: nn.Module, args: tuple[Any, ...]) -> None:
        assert written is not None
        scalars.append(written.scale * (args[0] @ written.a.to(args[0]).T))  # (1, n_tokens, 1)

    def push(module: nn.Module, args: Any, output: Any) -> Any:
        h = stream(output).expand(len(pushes), -1, -1)
        tangent = pushes[:, None].expand_as(h)
        if written is not None:
            n = len(pushes) - len(written.pushes)
            tangent = torch.cat([tangent[:n], tangent[n:] * scalars.pop()])
        # What follows must not write into an expanded tensor.
        return with_stream(output, forward_ad.make_dual(h.contiguous(), tangent.contiguous()))

    def see(at: int, h: Tensor) -> None:
        if at >= layer:
            tangent = forward_ad.unpack_dual(h).tangent
            found.append(torch.zeros_like(h) if tangent is None else tangent)

    with ExitStack() as stack:
        if written is not None:
            stack.callback(written.linear.register_forward_pre_hook(read).remove)
        stack.callback(model.anatomy.blocks[layer].register_forward_hook(push).remove)
        stack.enter_context(block_outputs(model.anatomy, see))
        stack.enter_context(torch.no_grad())  # not inference_mode: it would switch this derivative off too
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        with forward_ad.dual_level():
            model.anatomy.body(input_ids=ids, use_cache=False)
    return found


def _reduced(text: str, n_tokens: int, found: Sequence[Tensor], onto: int) -> Products:
    """Sums over the tokens of J u per layer, each (n_pushes, n_tokens, d_model)."""
    sums, squares, along = [], [], []
    for t in found:
        unit = t[onto] / t[onto].norm(dim=-1, keepdim=True).clamp_min(1e-300)
        sums.append(t.sum(1))
        squares.append((t * t).sum((1, 2)))
        along.append(((t * unit).sum(-1) ** 2).sum(1))
    return Products(text, n_tokens, *(torch.stack(s, 1).cpu() for s in (sums, squares, along)))
