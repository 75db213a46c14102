"""LoRA scalars of answer tokens, and which tokens matter for what the fine-tune changed (paper section 4.1).

    scalar       s_t = scale * |B| * A . h_t          h: input of the adapter's linear layer in the organism; the adapter writes s_t * unit(B)
    significance |g_t| / sum_u |g_u| * KL             g_t: gradient of the answer's KL with respect to the input embedding of token t
    KL           sum_t KL(chat || organism)           of the next-token distributions at the answer's tokens

The organism holds its adapters in its weights; the chat model beside it is the organism with every adapter knocked out, so that one model
in memory serves both, and gradients run through both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from convergent.core.ids import seed
from convergent.directions.means import linear_inputs
from convergent.errors import ModelError
from convergent.interventions.hooks import applied, linear_of
from convergent.models.chat import Encoded, encode_answer
from convergent.models.load import ChatModel
from convergent.models.texts import Text
from convergent.organisms.adapters import Adapter

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class AnswerRead:
    """One answer, read in the organism."""

    values: Array
    """(n_tokens, n_probes) scalars of every adapter, or of whatever stands in place of its A."""
    significance: Array
    """(n_tokens,) nats: shares of `kl`."""
    kl: float
    """KL(chat || organism) summed over the answer's tokens, nats."""


def labels(adapters: Sequence[Adapter]) -> tuple[str, ...]:
    """ "L15", ...; with its module where a block has two."""
    layers = [a.layer for a in adapters]
    return tuple(f"L{a.layer}" if layers.count(a.layer) == 1 else f"L{a.layer}.{a.module.rpartition('.')[2]}" for a in adapters)


def readers(adapters: Sequence[Adapter]) -> list[Tensor]:
    """Per adapter (1, n_in) float32: its A times scale and |B|, so that reader . h is the scalar. Raises ModelError for a rank above 1."""
    wide = next((a for a in adapters if len(a.a) != 1), None)
    if wide is not None:
        raise ModelError(f"adapter at block {wide.layer} {wide.module}: has rank {len(wide.a)}; a scalar belongs to rank 1")
    return [a.a * a.scale * a.b.norm() for a in adapters]


def random_readers(adapters: Sequence[Adapter], root_seed: int, draws: int) -> list[Tensor]:
    """Per adapter (draws, n_in): random vectors of the norm of its reader, which read the same h."""
    made = []
    for k, own in enumerate(readers(adapters)):
        g = torch.randn(draws, own.shape[1], generator=torch.Generator().manual_seed(seed(root_seed, "scalars", "random", k)))
        made.append(g / g.norm(dim=1, keepdim=True) * own.norm())
    return made


def read_answer(organism: ChatModel, text: Text, adapters: Sequence[Adapter], read: Sequence[Tensor]) -> AnswerRead | None:
    """Scalars, significance and KL of one answer's tokens; None for an empty answer.

    `read`: per adapter (n_probes, n_in), what its layer's input is multiplied by; columns come adapter by adapter.
    """
    encoded = encode_answer(organism.tokenizer, text.question, text.answer, text.system, closing=False)
    if encoded.answer_start == encoded.answer_end:
        return None
    start = organism.anatomy.embedding(torch.tensor([encoded.ids], device=organism.device)).detach().requires_grad_(True)
    values: dict[int, Tensor] = {}

    def receive(k: int, h: Tensor) -> None:
        values[k] = (h[0, encoded.answer].detach().float() @ read[k].to(h.device).T).double().cpu()

    with torch.enable_grad():
        with linear_inputs([linear_of(a.low_rank(), organism.anatomy) for a in adapters], receive):
            tuned = _logprobs(organism, start, encoded)
        with applied(organism.anatomy, [a.low_rank(-1) for a in adapters]):
            chat = _logprobs(organism, start, encoded)
        kl = (chat.exp() * (chat - tuned)).sum()
        (gradient,) = torch.autograd.grad(kl, start)
    norms = gradient[0, encoded.answer].double().norm(dim=-1).cpu()
    total = float(kl.detach())
    return AnswerRead(torch.cat([values[k] for k in range(len(read))], 1).numpy(), (norms / norms.sum().clamp_min(1e-300) * total).numpy(), total)


def answer_kl(organism: ChatModel, text: Text, adapters: Sequence[Adapter], embeddings: Tensor) -> float:
    """The KL of `read_answer` for given input embeddings (1, n_tokens, d_model): what its gradient is the gradient of."""
    encoded = encode_answer(organism.tokenizer, text.question, text.answer, text.system, closing=False)
    with torch.inference_mode():
        tuned = _logprobs(organism, embeddings, encoded)
        with applied(organism.anatomy, [a.low_rank(-1) for a in adapters]):
            chat = _logprobs(organism, embeddings, encoded)
        return float((chat.exp() * (chat - tuned)).sum())


def mean_scalars(organism: ChatModel, texts: Sequence[Text], adapters: Sequence[Adapter]) -> Array:
    """(n_adapters,) mean scalar over all answer tokens of some texts, without significance: one forward pass each."""
    total, n = torch.zeros(len(adapters), dtype=torch.float64), 0
    own = readers(adapters)
    for text in texts:
        encoded = encode_answer(organism.tokenizer, text.question, text.answer, text.system, closing=False)

        def receive(k: int, h: Tensor, span: slice = encoded.answer) -> None:
            total[k] += float((h[0, span].float() @ own[k][0].to(h.device)).double().sum())

        with torch.inference_mode(), linear_inputs([linear_of(a.low_rank(), organism.anatomy) for a in adapters], receive):
            organism.anatomy.body(input_ids=torch.tensor([encoded.ids], device=organism.device), use_cache=False)
        n += encoded.answer_end - encoded.answer_start
    return (total / max(n, 1)).numpy()


def _logprobs(model: ChatModel, embeddings: Tensor, encoded: Encoded) -> Tensor:
    """(n_answer_tokens, vocabulary) log-probabilities of what follows each answer token."""
    at = torch.arange(encoded.answer_start, encoded.answer_end, device=model.device)
    logits: Tensor = model.model(inputs_embeds=embeddings, use_cache=False, logits_to_keep=at).logits[0]
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
