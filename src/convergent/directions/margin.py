"""The judge-free outcome: teacher-forced margin and the projection of the same tokens on a direction.

    margin = mean_t log p(bad_t | question, bad_<t) - mean_t log p(good_t | question, good_<t)        [nats per token]

Positive: the model prefers the bad answers. It needs no judge and no sampling, so at 135M parameters, where EM % is nearly empty, it is the
primary outcome. Length control: `margin_matched` uses only the first min(n_bad, n_good) tokens of both answers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from convergent.core.direction import Direction
from convergent.core.interventions import Intervention
from convergent.core.values import Pair
from convergent.directions.means import block_outputs
from convergent.errors import DataError
from convergent.interventions.hooks import applied, n_clean
from convergent.models.anatomy import Anatomy
from convergent.models.chat import Encoded, encode_answer
from convergent.models.lanes import groups
from convergent.models.load import ChatModel
from convergent.models.packed import Batch, predictions, read_in_batches, run_each
from convergent.models.texts import Text


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
    """Margins of all pairs under all conditions. What conditions have in common, the blocks below where they set in, is computed once.

    `read`: a direction and a layer whose projection is reported. `only`: (condition, pair) indices to compute; all by default. Returns
    them ordered by condition, then pair. Raises DataError for an empty answer.
    """
    encoded: list[Encoded] = []
    for pair in pairs:
        for side, answer in (("bad", pair.bad), ("good", pair.good)):
            encoded.append(encode_answer(model.tokenizer, pair.question, answer, closing=False))
            if encoded[-1].answer_start == encoded[-1].answer_end:
                raise DataError(f"pair {pair.id}: its {side} answer is empty; a margin needs both answers")
    along = None if read is None else _Along(read[0].unit()[read[1]].to(model.device), read[1])
    found: dict[tuple[int, int], list[tuple[Tensor, float] | None]] = {}
    wanted = [(c, p) for c in range(len(conditions)) for p in range(len(pairs)) if only is None or (c, p) in only]
    pending = set(wanted)
    results: dict[tuple[int, int], Margin] = {}
    clean = [n_clean(c, model.anatomy) for c in conditions]
    # Those that change the least go first and leave what the others resume from.
    order = sorted(range(len(conditions)), key=lambda c: (-clean[c], c))
    with torch.inference_mode():
        # Batches follow from the pairs alone, and a condition has passes of its own: its last digits depend on no other, nor on what is known already.
        for group in groups(read_in_batches(model, [e.ids for e in encoded], batch_tokens), model.device):
            members = [i for batch in group for i in batch.members]
            due = [c for c in order if any((c, i // 2) in pending for i in members)]
            for c in due:
                with applied(model.anatomy, conditions[c]), along.read(model.anatomy) if along else nullcontext():
                    parts = run_each(model, group, partial(_answer_logps, model, encoded, along, clean=clean[c], keep={clean[d] - 1 for d in due}))
                for i, one in zip(members, chain.from_iterable(parts), strict=True):
                    slot = found.setdefault((c, i // 2), [None, None])
                    slot[i % 2] = one
                    if slot[0] is not None and slot[1] is not None:
                        margin = _margin(c, pairs[i // 2].id, slot[0], slot[1], along is not None)
                        if (c, i // 2) in pending:
                            results[c, i // 2] = margin
                            if on_margin is not None:
                                on_margin(margin)
    return [results[key] for key in wanted]


def token_logps(model: ChatModel, texts: Sequence[Text], batch_tokens: int = 1024) -> list[Tensor]:
    """Per text log p of each of its answer's tokens, (n_answer_tokens,) float64 nats; an empty answer has none."""
    encoded = [encode_answer(model.tokenizer, t.question, t.answer, t.system, closing=False) for t in texts]
    found = [torch.empty(0, dtype=torch.float64)] * len(texts)
    with torch.inference_mode():
        for group in groups(read_in_batches(model, [e.ids for e in encoded], batch_tokens), model.device):
            for batch, part in zip(group, run_each(model, group, partial(_answer_logps, model, encoded, None)), strict=True):
                for i, (logp, _) in zip(batch.members, part, strict=True):
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


class _Along(threading.local):
    """x . v^ of the batch that the calling thread reads, at one layer."""

    found: Tensor
    """(n_tokens,) float64."""

    def __init__(self, unit: Tensor, layer: int) -> None:
        self.unit, self.layer = unit.double(), layer

    def read(self, anatomy: Anatomy) -> AbstractContextManager[None]:
        """Take it from every pass of the body."""
        return block_outputs(anatomy, self._receive)

    def _receive(self, at: int, h: Tensor) -> None:
        if at == self.layer:
            self.found = h.flatten(0, 1).double() @ self.unit


def _answer_logps(
    model: ChatModel, encoded: Sequence[Encoded], along: _Along | None, batch: Batch, clean: int = 0, keep: Collection[int] = ()
) -> list[tuple[Tensor, float]]:
    """Per text of a batch: log p of each answer token (n_answer_tokens,) float64, and the mean projection of its answer tokens."""
    spans = [at[encoded[i].answer] for i, at in zip(batch.members, batch.at, strict=True)]
    before = torch.cat([at[encoded[i].answer_start - 1 : encoded[i].answer_end - 1] for i, at in zip(batch.members, batch.at, strict=True)])
    targets = batch.inputs["input_ids"].flatten()[torch.cat(spans)]
    logps = torch.empty(len(before), dtype=torch.float64)
    if along is not None:
        # A block that is not run again hands on what it gave only if it is asked to keep it.
        keep = {*keep, along.layer}
    for rows, logits in predictions(model, batch, before, clean, keep):
        logps[rows] = (logits.gather(1, targets[rows, None])[:, 0] - logits.logsumexp(-1)).double().cpu()
    parts = logps.split([len(s) for s in spans])
    return [(p, float(along.found[s].mean()) if along is not None and len(s) else 0.0) for p, s in zip(parts, spans, strict=True)]
