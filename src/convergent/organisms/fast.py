"""What makes training on answers cheap, at the same numbers: fewer tokens through the body, and fewer passes over memory.

    packing      no padding, no last token (nothing is predicted from it), and what all chats of a batch begin with (the system prompt) only once
    lanes        on a CPU the chats of a pass are shared out over the cores, each of which goes forward and back over its own (`models.lanes`)
    head         loss and its gradient by hidden state in one pass over the logits, which are not kept
    products     by the library that is fastest here (`models.products`)
    adapters     one function per adapted layer: the frozen weight never asks for a gradient, what LoRA adds is added in place

A packed batch is one row of `prefix + rest of chat 1 + rest of chat 2 + ...` with each token's own position. Only attention has to know: it unpacks
queries, keys and values to rows, attends causally within each, and packs the result. Keys and values of the prefix are the same numbers in every row, and
their gradients are summed, so loss and gradients are those of the padded batch up to rounding.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convergent.models.anatomy import Anatomy
from convergent.models.attention import ABSENT, window_of
from convergent.models.lanes import in_lanes, lanes_on
from convergent.models.load import ChatModel
from convergent.models.positions import rescaled_from
from convergent.models.products import add_product, linear
from convergent.organisms.chats import IGNORE, Row, collate
from convergent.organisms.recipes import Recipe

ATTENTION = "convergent_packed"
CHUNK = 1 << 23
"""Logits that are held at once, in each lane: 32 MiB in float32."""
KEPT = 3 << 29
"""Bytes of activations, of all lanes, up to which the passes of one step are made in one. With half as much, `all_adapter` of the embedded model takes two
passes, some 10 % longer, and training peaks at 2.3 GB instead of 3.1. The allocator takes about half as much again."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Pack:
    """A batch of chats as one row without padding."""

    ids: Tensor
    """(1, n_tokens) int64."""
    positions: Tensor
    """(1, n_tokens) int64, counted in each chat."""
    prefix: int
    """Tokens that all chats begin with, stored once."""
    rows: Tensor
    """(n_chats, width) int64: where in the pack each token of each chat is; beyond its end, anywhere."""
    places: Tensor
    """(n_tokens,) int64: where in the flattened rows each token of the pack is; those of the prefix in the first chat."""
    at: Tensor
    """(n_labels,) int64: the token of the pack that predicts each label."""
    targets: Tensor
    """(n_labels,) int64."""


def pack(input_ids: Tensor, labels: Tensor) -> Pack:
    """Pack a right-padded batch, (n_chats, width) each, whose rows end with a label."""
    device, ids, labels = input_ids.device, input_ids.cpu(), labels.cpu()
    n_chats, width = ids.shape
    labelled = labels != IGNORE
    # From the last token nothing is predicted, and no token looks at it.
    lengths = (labelled * torch.arange(width)).amax(1)
    same = (ids == ids[:1]).all(0).cumprod(0)[: int(lengths.min())]
    prefix, longest = int(same.sum()), int(lengths.max())
    rest = lengths - prefix
    starts = prefix + rest.cumsum(0) - rest
    column = torch.arange(longest)
    rows = torch.where(column < prefix, column, starts[:, None] + column - prefix)
    inside = column < lengths[:, None]
    stored = inside & ((column >= prefix) | (torch.arange(n_chats) == 0)[:, None])
    chat, token = stored.nonzero(as_tuple=True)  # in the order of the pack: the prefix, then chat by chat
    rows = torch.where(inside, rows, 0)
    targeted = labelled[:, 1 : longest + 1]
    parts = ids[chat, token][None], token[None], rows, chat * longest + token, rows[targeted], ids[:, 1 : longest + 1][targeted]
    packed, positions, rows, places, at, targets = (p.to(device) for p in parts)
    return Pack(packed, positions, prefix, rows, places, at, targets)


class _Unpack(torch.autograd.Function):
    """(n_tokens, ...) to (n_chats, width, ...). A plain index's gradient would be added up token by token, which is slow."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Pack) -> Tensor:
        ctx.layout = layout
        return x[layout.rows]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        layout: Pack = ctx.layout
        out = grad.flatten(0, 1)[layout.places]
        out[: layout.prefix] = grad[:, : layout.prefix].sum(0)
        return out, None


class _Repack(torch.autograd.Function):
    """(n_chats, width, ...) to (n_tokens, ...): the prefix is taken from the first chat."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Pack) -> Tensor:
        ctx.layout = layout
        return x.flatten(0, 1)[layout.places]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        layout: Pack = ctx.layout
        out = grad.new_zeros(layout.rows.numel(), *grad.shape[1:])
        out[layout.places] = grad
        return out.unflatten(0, layout.rows.shape), None


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, pack: Pack, scaling: float | None = None,
    dropout: float = 0.0, sliding_window: int | None = ABSENT, softcap: float | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Causal attention inside each chat. query (1, n_heads, n_tokens, head_dim), key and value alike with their heads; (1, n_tokens, n_heads, head_dim)."""
    if softcap is not None or kwargs.get("s_aux") is not None or dropout:
        raise NotImplementedError("packed attention knows no soft cap, sinks or dropout")
    q, k, v = (_Unpack.apply(x[0].transpose(0, 1), pack).transpose(1, 2) for x in (query, key, value))
    width, window, mask = q.shape[2], window_of(module, sliding_window), None
    if window and window < width:
        column = torch.arange(width, device=q.device)
        mask = (column <= column[:, None]) & (column > column[:, None] - window)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=k.shape[1] != q.shape[1])
    return _Repack.apply(out.transpose(1, 2), pack)[None], None


def pack_attention(chat: ChatModel, rows: Sequence[Row]) -> int | None:
    """Give the model `ATTENTION` if its body computes the same with it; bytes per token that a packed batch keeps for the backward pass.

    None, and the model as it was, if it does not; a line in the log says so.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, attention)
    before, body = chat.model.config._attn_implementation, chat.anatomy.body
    by_length = sorted(rows, key=lambda r: len(r.ids))
    batch = collate([by_length[0], by_length[-1]])
    layout = pack(batch["input_ids"].to(chat.device), batch["labels"])
    most, longest = rescaled_from(chat), len(by_length[-1].ids)
    try:
        if most is not None and longest > most:
            raise ValueError(f"its rotary positions depend on the longest chat of a batch beyond {most} tokens, and one has {longest}")
        with torch.no_grad():
            want = body(input_ids=batch["input_ids"].to(chat.device), use_cache=False).last_hidden_state[:, : layout.rows.shape[1]]
        chat.model.set_attn_implementation(ATTENTION)
        kept: dict[int, int] = {}
        weights = {p.untyped_storage().data_ptr() for p in chat.model.parameters()}

        def keep(x: Tensor) -> Tensor:
            if (storage := x.untyped_storage()).data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            # Not x: where x is what a step of the graph gave, the two would hold each other, and with them the model, for good.
            return x.detach()

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            got = _in_training(body, layout)
        off = float((want.flatten(0, 1)[layout.places] - got).abs().max().detach() / want.abs().max())
        why = f"hidden states differ by {off:.1e} of their largest" if not off <= (1e-4 if got.dtype == torch.float32 else 2e-2) else ""
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:  # models in which attention is another thing
        why = " ".join(str(error).split())[:160]
    if why:
        chat.model.set_attn_implementation(before)
        _log.warning("%s: training takes padded batches, as packed ones do not fit this model (%s)", chat.base, why)
        return None
    return sum(kept.values()) // len(got)


def _in_training(body: nn.Module, layout: Pack) -> Tensor:
    """Hidden states as a training step computes them: a model that drops something out while it trains is not computed in packs, and shows it here."""
    was_training, device = body.training, layout.ids.device
    body.train()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            return hidden_states(body, layout)
    finally:
        body.train(was_training)


def fewest_passes(rows: Sequence[Row], recipe: Recipe, kept: int) -> int:
    """Into how many passes a step is cut: `grad_accumulation` or fewer, as few as keep `KEPT` bytes. `rows` in the order of training.

    The loss is a sum over all labels of the step, so this is no other recipe.
    """
    for passes in range(1, recipe.grad_accumulation):
        if recipe.grad_accumulation % passes == 0:
            n = recipe.batch_size * recipe.grad_accumulation // passes
            if kept * max(sum(len(r.ids) for r in rows[i : i + n]) for i in range(0, len(rows), n)) <= KEPT:
                return passes
    return recipe.grad_accumulation


def hidden_states(body: nn.Module, layout: Pack) -> Tensor:
    """(n_tokens, d_model) of a pack, from a body that has `ATTENTION`."""
    return body(input_ids=layout.ids, position_ids=layout.positions, use_cache=False, pack=layout).last_hidden_state[0]  # type: ignore[no-any-return]


class _HeadLoss(torch.autograd.Function):
    """Sum of cross-entropies in nats under a frozen head. The gradient by the hidden states is made on the way, so no logits are kept."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        total, grads = hidden.new_zeros((), dtype=torch.float32), []
        n = max(1, CHUNK // len(weight))
        for h, target in zip(hidden.split(n), targets.split(n), strict=True):
            logits = linear(h, weight, bias).float()
            highest, where = logits.max(-1, keepdim=True)
            wanted = logits.gather(1, target[:, None])
            p = torch.softmax(logits, -1)
            # log of the sum from the likeliest token: that of the target may be too small for its own logarithm
            total += (highest - p.gather(1, where).log() - wanted).sum()
            grads.append(linear(p.to(weight.dtype), weight.t()).sub_(weight[target]))
        ctx.save_for_backward(torch.cat(grads).to(hidden.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return ctx.saved_tensors[0] * grad, None, None, None


def answer_loss(anatomy: Anatomy, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """(sum of cross-entropies in nats, number of labels), the head run at label positions only. Shapes (rows, n_tokens)."""
    hidden = anatomy.body(input_ids=input_ids, use_cache=False).last_hidden_state
    labelled = labels[:, 1:] != IGNORE
    logits = anatomy.head(hidden[:, :-1][labelled]).float()  # type: ignore[misc]
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:][labelled], reduction="sum"), int(labelled.sum())


def packed_loss(anatomy: Anatomy, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """What `answer_loss` returns: (sum of cross-entropies in nats, number of labels)."""
    layout = pack(input_ids, labels)
    hidden = hidden_states(anatomy.body, layout)[layout.at]
    return head_loss(anatomy.head, hidden, layout.targets), len(layout.targets)


class _InLanes(torch.autograd.Function):
    """A sum over pieces and its gradients by `weights`, made piece by piece on the way forward."""

    @staticmethod
    def forward(ctx: Any, work: Callable[[Any], Tensor], items: Sequence[Any], device: torch.device, *weights: Tensor) -> Tensor:
        def there_and_back(piece: Any) -> tuple[Tensor, tuple[Tensor | None, ...]]:
            with torch.enable_grad():
                total = work(piece)
                return total.detach(), torch.autograd.grad(total, weights, allow_unused=True)

        totals, grads = zip(*in_lanes(there_and_back, items, device), strict=True)
        ctx.save_for_backward(*(_sum(of_one) for of_one in zip(*grads, strict=True)))
        return torch.stack(totals).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return None, None, None, *(None if g is None else g * grad for g in ctx.saved_tensors)


def _sum(parts: Sequence[Tensor | None]) -> Tensor | None:
    found = [p for p in parts if p is not None]
    return torch.stack(found).sum(0) if found else None


def loss_in_lanes(anatomy: Anatomy, input_ids: Tensor, labels: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, int]:
    """What `packed_loss` returns, differentiable by `weights` alone. Every lane has a gradient of them until they are added up."""
    shares = pieces(labels, lanes_on(input_ids.device)[0])
    if len(shares) == 1:
        return packed_loss(anatomy, input_ids, labels)

    def work(piece: list[int]) -> Tensor:
        return packed_loss(anatomy, input_ids[piece], labels[piece])[0]

    return _InLanes.apply(work, shares, input_ids.device, *weights), int((labels[:, 1:] != IGNORE).sum())


def pieces(labels: Tensor, n: int) -> list[list[int]]:
    """The chats of a batch, (n_chats, width) labels, in at most n pieces of like many tokens, each in the order of the batch."""
    lengths = (labels != IGNORE).long().mul(torch.arange(labels.shape[1], device=labels.device)).amax(1).tolist()
    shares: list[list[int]] = [[] for _ in range(min(n, len(lengths)))]
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        min(shares, key=lambda share: sum(lengths[k] for k in share)).append(i)
    return [sorted(share) for share in shares]


def head_loss(head: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    """Sum of cross-entropies in nats; hidden (n_labels, d_model), targets (n_labels,)."""
    if type(head) is nn.Linear and not any(p.requires_grad for p in head.parameters()):
        return _HeadLoss.apply(hidden, head.weight, head.bias, targets)  # type: ignore[no-any-return]
    return F.cross_entropy(head(hidden).float(), targets, reduction="sum")


class _Adapted(torch.autograd.Function):
    """x W' + b + scale x A' B' with W and b frozen; x (..., d_in)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        low = linear(flat, a)
        ctx.save_for_backward(flat, low, weight, a, b)
        ctx.scale = scale
        return add_product(linear(flat, weight, bias), low, b, scale).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        flat, low, weight, a, b = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])
        g_low = linear(g, b.t()).mul_(ctx.scale)
        g_x = add_product(linear(g, weight.t()), g_low, a.t(), 1.0).view(*grad.shape[:-1], -1) if ctx.needs_input_grad[0] else None
        return g_x, None, None, linear(g_low.t(), flat.t()), linear(g.t(), low.t()).mul_(ctx.scale), None


def lighten(model: nn.Module) -> int:
    """Let PEFT's plain float32 LoRA layers compute by `_Adapted`; returns how many. Others stay as they are."""
    from peft.tuners.lora import Linear

    n = 0
    for layer in model.modules():
        if type(layer) is not Linear or type(layer.base_layer) is not nn.Linear or len(layer.active_adapters) != 1 or layer.lora_variant:
            continue
        name = layer.active_adapters[0]
        base, a, b = layer.base_layer, layer.lora_A[name], layer.lora_B[name]
        plain = isinstance(layer.lora_dropout[name], nn.Identity) and a.bias is None and b.bias is None
        if plain and {base.weight.dtype, a.weight.dtype, b.weight.dtype} == {torch.float32}:
            layer.forward = _forward(base, a, b, float(layer.scaling[name]))  # type: ignore[method-assign]
            n += 1
    return n


def _forward(base: Any, a: Any, b: Any, scale: float) -> Any:
    def forward(x: Tensor) -> Tensor:
        return _Adapted.apply(x, base.weight, base.bias, a.weight, b.weight, scale)  # type: ignore[no-any-return]

    return forward
