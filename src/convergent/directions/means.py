"""Streaming means of the residual stream: one pass without the head, all layers and all accumulators at once.

Each accumulator is a weighted sum over answer tokens: a class, half a class, or all answers. What is kept is (n_accumulators, n_layers,
d_model) in float64, whatever the number of texts; activations are reduced inside the hook of their block and never stored.
"""

from __future__ import annotations

import threading
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
from convergent.models.lanes import groups
from convergent.models.load import ChatModel
from convergent.models.packed import Batch, read_in_batches, run, run_each
from convergent.models.texts import Text

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
    """(n_accumulators,) what each sum was divided by: its weighted number of tokens, or of texts."""


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
    batch_tokens: int = 1024,
    on_batch: Callable[[int], None] | None = None,
) -> Means:
    """Means of the residual stream at the output of every block.

    weights (n_accumulators, n_texts): how much each text counts in each accumulator. per "tokens" pools over tokens, "responses" averages
    the texts' own means. Memory is bounded by `batch_tokens` (tokens per forward pass). Raises InputError if an accumulator is
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
    # What each of a text's tokens counts, and once more with weight 1 for the norm.
    each = torch.cat([weights * (1.0 / lengths.clamp_min(1) if per == "responses" else 1.0), torch.ones(1, len(texts), dtype=torch.float64)]).to(device)
    adder = _Adder()

    def read(batch: Batch) -> tuple[Tensor, Tensor]:
        share = torch.zeros(len(each), batch.n_tokens, dtype=torch.float64, device=device)
        for i, at in zip(batch.members, batch.at, strict=True):
            share[:, at[spans[i]]] += each[:, i, None]  # a token may stand for several texts
        adder.share, adder.sums, adder.norms = share, torch.zeros_like(sums), torch.zeros_like(norms)
        run(model, batch)
        return adder.sums, adder.norms

    with torch.inference_mode():
        for group in groups(read_in_batches(model, [e.ids[: s.stop] for e, s in zip(encoded, spans, strict=True)], batch_tokens), device):
            with applied(model.anatomy, interventions), block_outputs(model.anatomy, adder.add):
                parts = run_each(model, group, read)
            for batch, (own_sums, own_norms) in zip(group, parts, strict=True):
                sums += own_sums
                norms += own_norms
                if on_batch is not None:
                    on_batch(len(batch.members))
    total = float(lengths.sum())
    return Means((sums / mass.to(device)[:, None, None]).cpu(), (norms / total).cpu(), int(total), mass)


class _Adder(threading.local):
    """Sums over the batch that the calling thread reads."""

    share: Tensor
    """(n_accumulators + 1, n_tokens) what each token counts; last for the norm."""
    sums: Tensor
    """(n_accumulators, n_layers, d_model)."""
    norms: Tensor
    """(n_layers,)."""

    def add(self, layer: int, h: Tensor) -> None:
        flat = h.flatten(0, 1).double()
        self.sums[:, layer] += self.share[:-1] @ flat
        self.norms[layer] += (flat.norm(dim=1) * self.share[-1]).sum()


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


@contextmanager
def linear_inputs(linears: Sequence[nn.Linear], receive: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Call `receive(k, h)` with the input h (batch, n_tokens, n_in) of the k-th linear layer whenever it runs."""

    def hook(k: int) -> Any:
        def run(module: nn.Module, args: Any) -> None:
            receive(k, args[0])

        return run

    with ExitStack() as stack:
        for k, linear in enumerate(linears):
            stack.callback(linear.register_forward_pre_hook(hook(k)).remove)
        yield
