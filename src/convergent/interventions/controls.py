"""Nulls for a direction, each made in one call: random, orthogonal, another concept, effect-matched.

A random vector of the same norm is a weak null (a trained model is nearly blind to most directions), so three stronger ones stand beside
it: random but orthogonal to the direction; another concept that the model does represent; and a random one scaled until it disturbs the
model's predictions as much as the real one does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from convergent.core.direction import Direction
from convergent.core.ids import seed
from convergent.core.interventions import Add, Intervention
from convergent.errors import DirectionError
from convergent.interventions.hooks import applied
from convergent.models.chat import encode_answer
from convergent.models.load import ChatModel
from convergent.models.texts import Text, batches, padded


def random_like(direction: Direction, root_seed: int, draw: int = 0) -> Direction:
    """A random direction with the norm of `direction` in every layer (equal to 1e-6), one and the same unit vector throughout."""
    unit = _gaussian(direction, root_seed, "random", draw)
    return _with_norms(unit, direction, "random", root_seed, draw)


def orthogonal_to(direction: Direction, root_seed: int, draw: int = 0) -> Direction:
    """A random direction of the same norms that is orthogonal to `direction` in every layer."""
    v = direction.unit().vectors.double()
    g = _gaussian(direction, root_seed, "orthogonal", draw)
    return _with_norms(g - (g * v).sum(1, keepdim=True) * v, direction, "orthogonal", root_seed, draw)


def other_concept(direction: Direction, concept: Direction) -> Direction:
    """Another concept's direction at the norms of `direction`, without its component along it."""
    v = direction.unit().vectors.double()
    c = concept.vectors.double()
    direction._same_shape(concept)
    rest = c - (c * v).sum(1, keepdim=True) * v
    if bool((rest.norm(dim=1) < 1e-6 * c.norm(dim=1)).any()):
        raise DirectionError("other_concept: the concept is parallel to the direction; choose another one")
    made = _with_norms(rest, direction, "other_concept", 0, 0)
    return replace(made, provenance={**made.provenance, "concept": dict(concept.provenance)})


def _gaussian(direction: Direction, root_seed: int, name: str, draw: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed(root_seed, "control", name, draw))
    # One vector for all layers, as the real direction is nearly one: layer-wise draws would be a different intervention.
    one = torch.randn(direction.d_model, generator=generator, dtype=torch.float64)
    return one[None].expand(direction.n_layers, -1)


def _with_norms(v: Tensor, like: Direction, kind: str, root_seed: int, draw: int) -> Direction:
    scaled = v / v.norm(dim=1, keepdim=True) * like.vectors.double().norm(dim=1, keepdim=True)
    return Direction(scaled.float(), {"kind": kind, "of": like.content_id, "seed": root_seed, "draw": draw})


def with_direction(intervention: Intervention, direction: Direction) -> Intervention:
    """The same intervention along another direction."""
    return replace(intervention, direction=direction)


def scaled(intervention: Intervention, factor: float) -> Intervention:
    """The same intervention `factor` times as strong."""
    if isinstance(intervention, Add):
        return replace(intervention, scale=intervention.scale * factor)
    return replace(intervention, strength=intervention.strength * factor)


def effect_matched(
    model: ChatModel,
    intervention: Intervention,
    null: Direction,
    texts: Sequence[Text],
    tolerance: float = 0.1,
    max_factor: float = 1000.0,
) -> tuple[Intervention, float, float]:
    """`intervention` along `null`, scaled until its KL to the clean model equals that of the real one.

    Returns (matched intervention, KL of the real one, KL reached), in nats per answer token over `texts`. The KL of a random
    direction grows about as the square of its scale, so the search is a secant on log-log axes. If even `max_factor` does not reach the target,
    the strongest one is returned with the KL it reached.
    """
    clean = answer_logprobs(model, texts)
    target = kl_to_clean(model, clean, texts, [intervention])
    factor, best = 1.0, None
    for _ in range(12):
        candidate = scaled(with_direction(intervention, null), factor)
        reached = kl_to_clean(model, clean, texts, [candidate])
        if best is None or abs(math.log(max(reached, 1e-12) / target)) < abs(math.log(max(best[2], 1e-12) / target)):
            best = (candidate, factor, reached)
        if target <= 0 or abs(reached / target - 1) <= tolerance:
            break
        step = math.sqrt(target / max(reached, 1e-12))
        factor = min(factor * min(max(step, 0.2), 8.0), max_factor)
    assert best is not None
    return best[0], target, best[2]


def answer_logprobs(
    model: ChatModel, texts: Sequence[Text], interventions: Sequence[Intervention] = (), batch_tokens: int = 1024
) -> list[Tensor]:
    """Per text the log-probabilities (n_answer_tokens, vocabulary) float32 that predict its answer tokens."""
    encoded = [encode_answer(model.tokenizer, t.question, t.answer, t.system, closing=False) for t in texts]
    found: list[Tensor | None] = [None] * len(texts)
    with torch.inference_mode(), applied(model.anatomy, interventions):
        for members in batches([len(e.ids) for e in encoded], batch_tokens):
            ids, mask = padded([encoded[i].ids for i in members], model.device)
            logits = model.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            for row, i in enumerate(members):
                predicts = logits[row, encoded[i].answer_start - 1 : encoded[i].answer_end - 1]
                found[i] = predicts.float().log_softmax(-1)
    return [f for f in found if f is not None]


def kl_to_clean(
    model: ChatModel, clean: Sequence[Tensor], texts: Sequence[Text], interventions: Sequence[Intervention]
) -> float:
    """Mean over answer tokens of KL(clean || intervened), nats."""
    changed = answer_logprobs(model, texts, interventions)
    total, n = 0.0, 0
    for p, q in zip(clean, changed, strict=True):
        total += float((p.exp() * (p - q)).sum(-1).double().sum())
        n += len(p)
    return total / max(n, 1)


