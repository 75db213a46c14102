"""The judge-free outcome: teacher-forced margin and the projection of the same tokens on a direction.

    margin = mean_t log p(bad_t | question, bad_<t) - mean_t log p(good_t | question, good_<t)        [nats per token]

Positive: the model prefers the bad answers. It needs no judge and no sampling, so at 135M parameters, where EM % is nearly empty, it is the
primary outcome. Length control: `margin_matched` uses only the first min(n_bad, n_good) tokens of both answers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from convergent.core.direction import Direction
from convergent.core.interventions import Intervention
from convergent.core.values import Pair
from convergent.directions.means import block_outputs
from convergent.errors import DataError
from convergent.interventions.hooks import applied_rows
from convergent.models.chat import Encoded, encode_answer
from convergent.models.load import ChatModel
from convergent.models.texts import Text, batches, padded


@dataclass(frozen=True)
class Margin:
    """One pair under one condition."""

    condition: int
    pair_id: str
    bad: float
    """Mean log p per token of the bad answer, nats."""
    good: float
    margin: float
    margin_matched: float
    """The same over the first min(n_bad, n_good) tokens."""
    n_bad: int
    n_good: int
    projection: float | None
    """Mean over both answers' tokens of x . v^ at the chosen layer; None without a direction."""


def margins(
    model: ChatModel,
    pairs: Sequence[Pair],
    conditions: Sequence[Sequence[Intervention]] = ((),),
    *,
    read: tuple[Direction, int] | None = None,
    only: Collection[tuple[int, int]] | None = None,
    batch_tokens: int = 1024,
    on_margin: Callable[[Margin], None] | None = None,
) -> list[Margin]:
    """Margins of all pairs under all conditions, rows of different conditions side by side.

    `read`: a direction and a layer whose projection is reported. `only`: (condition, pair) indices to compute; all by default. Returns
    them ordered by condition, then pair. Raises DataError for an empty answer.
    """
    encoded: list[Encoded] = []
    for pair in pairs:
        for side, answer in (("bad", pair.bad), ("good", pair.good)):
            encoded.append(encode_answer(model.tokenizer, pair.question, answer, closing=False))
            if encoded[-1].answer_start == encoded[-1].answer_end:
                raise DataError(f"pair {pair.id}: its {side} answer is empty; a margin needs both answers")
    unit = None if read is None else read[0].unit()[read[1]].to(model.device)
    found: dict[tuple[int, int], list[tuple[Tensor, float] | None]] = {}
    wanted = [(c, p) for c in range(len(conditions)) for p in range(len(pairs)) if only is None or (c, p) in only]
    jobs = [(c, 2 * p + side) for c, p in wanted for side in (0, 1)]
    results: dict[tuple[int, int], Margin] = {}
    plain_head = _plain_head(model)
    with torch.inference_mode(), applied_rows(model.anatomy, conditions) as rows:
        # Pair by pair, so that finished margins reach the caller early and a killed run repeats little.
        for start in range(0, len(jobs), 64):
            part = jobs[start : start + 64]
            for members in batches([len(encoded[i].ids) for _, i in part], batch_tokens):
                batch = [part[m] for m in members]
                ids, mask = padded([encoded[i].ids for _, i in batch], model.device)
                rows.set([c for c, _ in batch])
                spans = [encoded[i] for _, i in batch]
                logps, projections = _answer_logps(model, ids, mask, spans, unit, read[1] if read else 0, plain_head)
                for (c, i), logp, projection in zip(batch, logps, projections, strict=True):
                    slot = found.setdefault((c, i // 2), [None, None])
                    slot[i % 2] = (logp, projection)
                    if slot[0] is not None and slot[1] is not None:
                        margin = _margin(c, pairs[i // 2].id, slot[0], slot[1], read is not None)
                        results[c, i // 2] = margin
                        if on_margin is not None:
                            on_margin(margin)
    return [results[key] for key in wanted]


def token_logps(model: ChatModel, texts: Sequence[Text], batch_tokens: int = 1024) -> list[Tensor]:
    """Per text log p of each of its answer's tokens, (n_answer_tokens,) float64 nats; an empty answer has none."""
    encoded = [encode_answer(model.tokenizer, t.question, t.answer, t.system, closing=False) for t in texts]
    found = [torch.empty(0, dtype=torch.float64)] * len(texts)
    full = [i for i, e in enumerate(encoded) if e.answer_end > e.answer_start]
    plain_head = _plain_head(model)
    with torch.inference_mode():
        for batch in batches([len(encoded[i].ids) for i in full], batch_tokens):
            members = [full[b] for b in batch]
            ids, mask = padded([encoded[i].ids for i in members], model.device)
            logps, _ = _answer_logps(model, ids, mask, [encoded[i] for i in members], None, 0, plain_head)
            for i, logp in zip(members, logps, strict=True):
                found[i] = logp
    return found


def _margin(
    condition: int, pair_id: str, bad: tuple[Tensor, float], good: tuple[Tensor, float], projected: bool
) -> Margin:
    b, g = bad[0], good[0]
    n = min(len(b), len(g))
    both = (bad[1] * len(b) + good[1] * len(g)) / (len(b) + len(g))
    return Margin(
        condition,
        pair_id,
        float(b.mean()),
        float(g.mean()),
        float(b.mean() - g.mean()),
        float(b[:n].mean() - g[:n].mean()),
        len(b),
        len(g),
        both if projected else None,
    )


def _answer_logps(
    model: ChatModel, ids: Tensor, mask: Tensor, spans: Sequence[Encoded], unit: Tensor | None, layer: int, plain_head: bool
) -> tuple[list[Tensor], list[float]]:
    """Per row: log p of each answer token (float64), and the mean projection of its answer tokens."""
    projections = [0.0] * len(spans)

    def receive(at: int, h: Tensor) -> None:
        if at == layer and unit is not None:
            along = h.double() @ unit.double()
            for row, e in enumerate(spans):
                projections[row] = float(along[row, e.answer].mean())

    with block_outputs(model.anatomy, receive if unit is not None else _ignore):
        answer_logits = _logits_at_answers(model, ids, mask, spans, plain_head)
    logps = []
    offset = 0
    for row, e in enumerate(spans):
        n = e.answer_end - e.answer_start
        logits = answer_logits[offset : offset + n].float()
        targets = ids[row, e.answer].unsqueeze(1)
        logps.append((logits.gather(1, targets)[:, 0] - logits.logsumexp(-1)).double().cpu())
        offset += n
    return logps, projections


def _ignore(layer: int, h: Tensor) -> None:
    return None


def _logits_at_answers(model: ChatModel, ids: Tensor, mask: Tensor, spans: Sequence[Encoded], plain_head: bool) -> Tensor:
    """(all answer tokens, vocabulary) logits that predict them. The head runs on those positions only where it is plain."""
    if plain_head and model.anatomy.head is not None:
        hidden = model.anatomy.body(input_ids=ids, attention_mask=mask, use_cache=False)[0]
        picked = torch.cat([hidden[row, e.answer_start - 1 : e.answer_end - 1] for row, e in enumerate(spans)])
        found: Tensor = model.anatomy.head(picked)
        return found
    logits = model.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return torch.cat([logits[row, e.answer_start - 1 : e.answer_end - 1] for row, e in enumerate(spans)])


@torch.inference_mode()
def _plain_head(model: ChatModel) -> bool:
    """Whether logits are head(hidden) and nothing more, tried on four tokens: families with a soft cap or a logit scale take the whole model."""
    if model.anatomy.head is None:
        return False
    ids = torch.arange(1, 5, device=model.device)[None]
    logits = model.model(input_ids=ids, use_cache=False).logits
    return torch.equal(model.anatomy.head(model.anatomy.body(input_ids=ids, use_cache=False)[0]), logits)
