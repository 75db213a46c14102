"""The mean-diff direction of a model from its judged responses (paper section 3), with what is needed to doubt it.

    v_l = mean over answer tokens of the misaligned responses - the same of the aligned ones,  at the output of block l
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convergent.core.direction import Direction
from convergent.core.ids import content_id, seed
from convergent.directions.classes import Chosen, Classes
from convergent.directions.means import Span, stream_means
from convergent.errors import DirectionError
from convergent.models.load import ChatModel
from convergent.models.texts import Text


@dataclass(frozen=True, eq=False)
class Extraction:
    """A direction and the readings that belong beside it."""

    direction: Direction
    token_norm: Tensor
    """(n_layers,) mean token norm over the answers of both classes: the unit for doses."""
    split_half: Tensor
    """(n_layers,) cosine between the directions of two random halves of each class."""

    @property
    def relative_norm(self) -> Tensor:
        """(n_layers,) |v_l| over the mean token norm."""
        return self.direction.norms.double() / self.token_norm


def extract(
    model: ChatModel,
    texts: Sequence[Text],
    chosen: Chosen,
    rule: Classes,
    *,
    span: Span = "answer",
    root_seed: int = 0,
    provenance: dict[str, Any] | None = None,
    batch_tokens: int = 1024,
    on_batch: Callable[[int], None] | None = None,
) -> Extraction:
    """Class means in one streaming pass of `model` over the chosen texts, and their difference per layer.

    The model may be the organism that wrote the texts, or any other that reads them (the chat-model baseline). Raises DirectionError if a
    chosen text is missing.
    """
    by_id = {t.id: t for t in texts}
    missing = [i for i in (*chosen.misaligned, *chosen.aligned) if i not in by_id]
    if missing:
        raise DirectionError(f"direction: response {missing[0]} was chosen but its text is not there")
    if min(len(chosen.misaligned), len(chosen.aligned)) < 2:
        raise DirectionError("direction: a class has fewer than 2 responses, too few for the two halves of its reliability; draw more answers")
    members = [*chosen.misaligned, *chosen.aligned]
    weights = torch.zeros(4, len(members), dtype=torch.float64)
    for side, (start, ids) in enumerate(((0, chosen.misaligned), (len(chosen.misaligned), chosen.aligned))):
        order = np.random.default_rng(seed(root_seed, "split-half", side)).permutation(len(ids))
        for rank, i in enumerate(order):
            weights[2 * side + rank % 2, start + int(i)] = 1.0
    halves = stream_means(
        model, [by_id[i] for i in members], torch.cat([weights, weights[0:2].sum(0, True), weights[2:4].sum(0, True)]),
        per=rule.weigh, span=span, batch_tokens=batch_tokens, on_batch=on_batch,
    )
    low_a, low_b, high_a, high_b, low, high = halves.means
    a, b = low_a - high_a, low_b - high_b
    record = {
        "kind": "mean-diff",
        "model": model.name,
        "model_id": model.content_id,
        "base": model.base,
        "classes": asdict(rule),
        "span": span,
        "n_misaligned": len(chosen.misaligned),
        "n_aligned": len(chosen.aligned),
        "n_tokens": halves.n_tokens,
        "responses": content_id(sorted(chosen.misaligned), sorted(chosen.aligned)),
        **(provenance or {}),
    }
    cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp_min(1e-300)
    return Extraction(Direction((low - high).float(), record), halves.token_norm, cosine)


@dataclass(frozen=True, eq=False)
class AnswerMeans:
    """Mean residual stream over the answers of some texts."""

    model: str
    n_texts: int
    means: Tensor
    """(n_layers, d_model) float64."""


def answer_means(model: ChatModel, texts: Sequence[Text], span: Span = "answer") -> AnswerMeans:
    """Mean over all answer tokens of `texts`, per layer."""
    ones = torch.ones(1, len(texts), dtype=torch.float64)
    return AnswerMeans(model.name, len(texts), stream_means(model, texts, ones, span=span).means[0])


def shift(after: AnswerMeans, before: AnswerMeans) -> Direction:
    """What a fine-tune moved, whatever it was: the organism's mean residual stream minus the chat model's on the same texts."""
    record = {"kind": "shift", "model": after.model, "reference": before.model, "n_texts": after.n_texts}
    return Direction((after.means - before.means).float(), record)


def null_cosine(d_model: int, level: float = 0.95) -> float:
    """Half-width of the central `level` band of cos(random, fixed) in d_model dimensions: cos^2 is Beta(1/2, (d-1)/2)."""
    from scipy.special import betaincinv

    return float(np.sqrt(betaincinv(0.5, (d_model - 1) / 2, level)))


def chance_of_cosine(cosine: float, d_model: int) -> float:
    """How often |cos(random, fixed)| is at least so large in d_model dimensions, by the same law."""
    from scipy.special import betaincc

    return float(betaincc(0.5, (d_model - 1) / 2, cosine**2))
