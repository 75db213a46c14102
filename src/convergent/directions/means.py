"""Streaming means of the residual stream: one pass without the head, all layers and all accumulators at once.

Each accumulator is a weighted sum over answer tokens: a class, half a class, or all answers. What is kept is (n_accumulators, n_layers,
d_model) in float64, whatever the number of texts; activations are reduced inside the hook of their block and never stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from convergent.core.interventions import Intervention
from convergent.errors import InputError
from convergent.interventions.hooks import applied
from convergent.models.anatomy import Anatomy, stream
from convergent.models.chat import Encoded, encode_answer
from convergent.models.load import ChatModel
from convergent.models.texts import Beginning, Text, batches, groups, padded

Span = Literal["answer", "paper"]
"""answer: the answer's own tokens. paper: with the assistant header before and the closing tokens after, as the authors' code does."""


@dataclass(frozen=True, eq=False)
class Means:
    """Weighted means over tokens."""

    means: Tensor
    """(n_accumulators, n_layers, d_model) float64."""
    token_norm: Tensor
    """(n_layers,) mean L2 norm of a token's residual vector over all spans, float64."""
    n_tokens: int
    mass: Tensor
    """(n_accumulators,) float64: what each sum was divided by, tokens or responses."""


def span_of(encoded: Encoded, span: Span) -> slice:
    """The tokens of a text that count."""
    return encoded.answer if span == "answer" else slice(encoded.header_start, len(encoded.ids))


def stream_means(
    model: ChatModel,
    texts: Sequence[Text],
    weights: Tensor,
    *,
    per: Literal["tokens", "responses"] = "tokens",
    span: Span = "answer",
    interventions: Sequence[Intervention] = (),
    batch_tokens: int = 2048,
    on_batch: Callable[[int], None] | None = None,
) -> Means:
    """Means of the residual stream at the output of every block.

    weights (n_accumulators, n_texts): how much each text counts in each accumulator. per "tokens" pools over tokens, "responses" averages
    the texts' own means. Memory is bounded by `batch_tokens` (padded tokens per forward pass). Raises InputError if an accumulator is
    empty.
    """
    encoded = [encode_answer(model.tokenizer, t.question, t.answer, t.system) for t in texts]
    spans = [span_of(e, span) for e in encoded]
    lengths = torch.tensor([s.stop - s.start for s in spans], dtype=torch.float64)
    weights = weights.double()
    mass = (weights * (lengths if per == "tokens" else (lengths > 0).double())).sum(1)
    if bool((mass == 0).any()):
        raise InputError("means: an accumulator has no answer tokens; every class needs at least one non-empty answer")
    device = model.device
    sums = torch.zeros(len(weights), model.n_layers, model.d_model, dtype=torch.float64, device=device)
    norms = torch.zeros(model.n_layers, dtype=torch.float64, device=device)
    with torch.inference_mode(), applied(model.anatomy, interventions):
        # A question with many answers is read once: no token of it counts.
        for beginning, group in groups([tuple(e.ids[: s.start]) for e, s in zip(encoded, spans, strict=True)]):
            start = Beginning(model.anatomy.body, beginning, device)
            group = [i for i in group if len(encoded[i].ids) > start.n]  # an empty answer may leave no token at all
            for batch in batches([len(encoded[i].ids) - start.n for i in group], batch_tokens):
                members = [group[b] for b in batch]
                ids, mask = padded([encoded[i].ids[start.n :] for i in members], device)
                inside = torch.zeros_like(mask, dtype=torch.float64)
                for row, i in enumerate(members):
                    inside[row, spans[i].start - start.n : spans[i].stop - start.n] = 1.0
                scale = 1.0 / lengths[members].clamp_min(1) if per == "responses" else torch.ones(len(members), dtype=torch.float64)
                share = (weights[:, members] * scale).to(device)[:, :, None] * inside[None]
                with block_outputs(model.anatomy, _adder(sums, norms, share.flatten(1), inside.flatten())):
                    start.run(ids, mask)
                if on_batch is not None:
                    on_batch(len(members))
    total = float(lengths.sum())
    return Means((sums / mass.to(device)[:, None, None]).cpu(), (norms / total).cpu(), int(total), mass)


def _adder(sums: Tensor, norms: Tensor, share: Tensor, inside: Tensor) -> Callable[[int, Tensor], None]:
    def add(layer: int, h: Tensor) -> None:
        flat = h.flatten(0, 1).double()
        sums[:, layer] += share @ flat
        norms[layer] += (flat.norm(dim=1) * inside).sum()

    return add


@contextmanager
def block_outputs(anatomy: Anatomy, receive: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Call `receive(layer, h)` with h (batch, n_tokens, d_model) after every block while the body runs.

    Registered after any interventions in force, so it sees what the next block sees.
    """

    def hook(layer: int) -> Any:
        def run(module: nn.Module, args: Any, output: Any) -> None:
            receive(layer, stream(output))

        return run

    with ExitStack() as stack:
        for layer, block in enumerate(anatomy.blocks):
            stack.callback(block.register_forward_hook(hook(layer)).remove)
        yield
