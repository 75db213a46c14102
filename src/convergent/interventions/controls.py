"""Nulls for a direction, each made in one call: random, orthogonal, another concept, effect-matched.

A random vector of the same norm is a weak null (a trained model is nearly blind to most directions), so three stronger ones stand beside
it: random but orthogonal to the direction; another concept that the model does represent; and a random one scaled until it disturbs the
model's predictions as much as the real one does. A null is zero wherever the direction is zero in every layer, as where its massive dimensions were
taken out: else it would differ from the direction in the very thing that was removed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from convergent.core.direction import Direction
from convergent.core.ids import seed
from convergent.core.interventions import Ablate, AblateSubspace, Add, Intervention
from convergent.errors import DirectionError
from convergent.interventions.hooks import applied, n_clean
from convergent.models.chat import encode_answer
from convergent.models.load import ChatModel
from convergent.models.packed import CHUNK, Batch, predictions, read_in_batches, run_each
from convergent.models.texts import Text


def random_like(direction: Direction, root_seed: int, draw: int = 0) -> Direction:
    """A random direction with the norm of `direction` in every layer (equal to 1e-6), one and the same unit vector throughout."""
    unit = _gaussian(direction, root_seed, "random", draw)
    return _with_norms(unit, direction, "random", root_seed, draw)


def orthogonal_to(direction: Direction, root_seed: int, draw: int = 0) -> Direction:
    """A random direction of the same norms that is orthogonal to `direction` in every layer."""
    v = _units(direction)
    g = _gaussian(direction, root_seed, "orthogonal", draw)
    return _with_norms(g - (g * v).sum(1, keepdim=True) * v, direction, "orthogonal", root_seed, draw)


def other_concept(direction: Direction, concept: Direction) -> Direction:
    """Another concept's direction at the norms of `direction`, without its component along it.

    A layer where the concept is zero (below the first adapter of a fine-tune whose shift it is) stays zero.
    """
    direction._same_shape(concept)
    v = _units(direction)
    c = concept.vectors.double() * _used(direction)
    rest = c - (c * v).sum(1, keepdim=True) * v
    parallel = rest.norm(dim=1) <= 1e-6 * c.norm(dim=1)
    if bool(parallel.all()) or bool((parallel & (c.norm(dim=1) > 0)).any()):
        raise DirectionError("other_concept: the concept is parallel to the direction; choose another one")
    made = _with_norms(rest, direction, "other_concept", 0, 0)
    return replace(made, provenance={**made.provenance, "concept": dict(concept.provenance)})


def _units(direction: Direction) -> Tensor:
    """(n_layers, d_model) float64 unit rows; a zero row stays zero."""
    v = direction.vectors.double()
    units: Tensor = v / v.norm(dim=1, keepdim=True).clamp_min(1e-300)
    return units


def _gaussian(direction: Direction, root_seed: int, name: str, draw: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed(root_seed, "control", name, draw))
    # One vector for all layers, as the real direction is nearly one: layer-wise draws would be a different intervention.
    one = torch.randn(direction.d_model, generator=generator, dtype=torch.float64) * _used(direction)
    return one[None].expand(direction.n_layers, -1)


def _used(direction: Direction) -> Tensor:
    """(d_model,) float64: 0 where the direction is zero in every layer, else 1."""
    return (direction.vectors != 0).any(0).double()


def _with_norms(v: Tensor, like: Direction, kind: str, root_seed: int, draw: int) -> Direction:
    scaled = v / v.norm(dim=1, keepdim=True).clamp_min(1e-300) * like.vectors.double().norm(dim=1, keepdim=True)
    return Direction(scaled.float(), {"kind": kind, "of": like.content_id, "seed": root_seed, "draw": draw})


def rotated(direction: Direction, root_seed: int, draw: int = 0) -> Direction:
    """The rows of `direction` turned by one random rotation: same norms, same cosines between layers, none of the meaning.

    The null of pushes at several layers along different vectors, where one random vector for all would add up more than they do.
    """
    v = direction.vectors.double()
    own, weights = _orthonormal(v)
    generator = torch.Generator().manual_seed(seed(root_seed, "control", "rotated", draw))
    random, _ = _orthonormal(torch.randn(len(own), direction.d_model, generator=generator, dtype=torch.float64))
    return Direction((weights @ random).float(), {"kind": "rotated", "of": direction.content_id, "seed": root_seed, "draw": draw})


def _orthonormal(v: Tensor) -> tuple[Tensor, Tensor]:
    """(k, d_model) orthonormal rows that span v's rows (zero ones left out), and (n, k) weights with weights @ rows = v."""
    nonzero = v[v.norm(dim=1) > 0]
    q, r = torch.linalg.qr(nonzero.T)
    rows = (q * torch.sign(torch.diagonal(r))).T
    return rows, v @ rows.T


def with_direction(intervention: Add | Ablate, direction: Direction) -> Add | Ablate:
    """The same intervention along another direction."""
    return replace(intervention, direction=direction)


def random_subspace(d_model: int, k: int, root_seed: int, used: Tensor | None = None) -> Tensor:
    """(k, d_model) orthonormal rows; the first rows of a larger draw are those of a smaller one. `used` (d_model,): 0 where rows must be zero."""
    generator = torch.Generator().manual_seed(seed(root_seed, "control", "subspace"))
    # Gram-Schmidt by QR on rows drawn one after the other keeps the rows nested in k.
    rows = torch.stack([torch.randn(d_model, generator=generator, dtype=torch.float64) for _ in range(k)])
    if used is not None:
        rows = rows * used
    q, r = torch.linalg.qr(rows.T)
    nested: Tensor = (q * torch.sign(torch.diagonal(r))).T.float()
    return nested


@dataclass(frozen=True)
class Matched:
    """A null matched in effect."""

    intervention: Intervention
    amount: float
    """Add: factor on the scale of the random vector. Ablate: number of random dimensions projected out."""
    target: float
    """KL of the real intervention, nats per answer token."""
    reached: float
    """KL of the null."""


def effect_matched(
    model: ChatModel, intervention: Add | Ablate, root_seed: int, texts: Sequence[Text], tolerance: float = 0.1, along: Direction | None = None,
    effects: Effects | None = None, near: tuple[float, float] | None = None,
) -> Matched:  # fmt: skip
    """A random null whose KL to the clean model over `texts` equals that of `intervention`.

    For an addition a random vector is scaled: its KL grows about as the square of the scale, so the search is a secant on log-log axes.
    `along` is scaled in place of the random vector, if given. For an ablation random directions are added one by one to a subspace (bisection
    over their number); see `AblateSubspace`. `effects` of these texts in this model, if there are some. `near`: (amount, target) of another draw of
    this null, where the search begins; most draws need no more. The best found is returned with the KL it reached, also if the tolerance is missed.
    """
    effects = Effects(model, texts) if effects is None else effects
    start, target = (1.0, effects.kl([intervention])) if near is None else near
    tried: dict[float, Matched] = {}

    def attempt(amount: float) -> float:
        null = matched_null(intervention, amount, root_seed, along)
        tried[amount] = Matched(null, amount, target, effects.kl([null]))
        return tried[amount].reached

    def error(m: Matched) -> float:
        return _miss(m.reached, target)

    if isinstance(intervention, Add):
        _find_factor(attempt, target, tolerance, start)
    elif near is None or _miss(attempt(start), target) > tolerance:
        low, high = 0, 1
        while attempt(high) < target and high < model.d_model // 2:
            low, high = high, min(2 * high, model.d_model // 2)
        while high - low > 1 and error(min(tried.values(), key=error)) > tolerance:
            middle = (low + high) // 2
            low, high = (middle, high) if attempt(middle) < target else (low, middle)
    return min(tried.values(), key=error)


def factor_for_effect(
    model: ChatModel, real: Sequence[Intervention], null: Sequence[Add], texts: Sequence[Text], tolerance: float = 0.1, effects: Effects | None = None
) -> tuple[float, float, float]:
    """(factor, target, reached): the factor on the scales of all Adds of `null` at which their KL over `texts` is that of `real`, both KLs in nats."""
    effects = Effects(model, texts) if effects is None else effects
    target = effects.kl(real)
    tried: dict[float, float] = {}

    def attempt(factor: float) -> float:
        tried[factor] = effects.kl(times(null, factor))
        return tried[factor]

    _find_factor(attempt, target, tolerance)
    best = min(tried, key=lambda f: _miss(tried[f], target))
    return best, target, tried[best]


def times(adds: Sequence[Add], factor: float) -> tuple[Add, ...]:
    """The same additions, all scaled by one factor."""
    return tuple(replace(a, scale=a.scale * factor) for a in adds)


def _miss(reached: float, target: float) -> float:
    return abs(math.log(max(reached, 1e-12) / max(target, 1e-12)))


def _find_factor(attempt: Callable[[float], float], target: float, tolerance: float, start: float = 1.0) -> None:
    """Call `attempt(factor)`, which gives a KL, until it is within `tolerance` of the target: a secant on log-log axes from `start` on."""
    x = math.log(start)
    misses: list[tuple[float, float]] = []  # (log factor, log of reached over target)
    for _ in range(16):
        reached = attempt(math.exp(x))
        if target <= 0 or abs(reached / target - 1) <= tolerance:
            break
        misses.append((x, math.log(max(reached, 1e-12) / target)))
        below, above = [m for m in misses if m[1] < 0], [m for m in misses if m[1] > 0]
        if below and above:  # between the ends of the bracket; the slope of 2 alone can oscillate
            (x0, y0), (x1, y1) = max(below), min(above)
            x = x0 + (x1 - x0) * min(max(-y0 / (y1 - y0), 0.1), 0.9)
        else:
            x += min(max(-misses[-1][1] / 2, -1.6), 2.1)


def matched_null(intervention: Add | Ablate, amount: float, root_seed: int, along: Direction | None = None) -> Intervention:
    """The null of `effect_matched` at a given amount: random, or for an addition `along` a direction."""
    if isinstance(intervention, Add):
        null = random_like(intervention.direction, root_seed, draw=1) if along is None else along
        return replace(intervention, direction=null, scale=intervention.scale * amount)
    basis = random_subspace(intervention.direction.d_model, int(amount), root_seed, _used(intervention.direction))
    return AblateSubspace(basis, intervention.site, intervention.layers)


class Effects:
    """KL(clean || intervened) over the same texts for one intervention after another: the clean model is read once, and so are the blocks below a change."""

    def __init__(self, model: ChatModel, texts: Sequence[Text], clean: Sequence[Tensor] | None = None, batch_tokens: int = 1024) -> None:
        self.model = model
        with torch.inference_mode():
            self._batches = list(_answers(model, texts, batch_tokens))
        self.clean = _logprobs(model, self._batches, len(texts)) if clean is None else clean
        """Per text the log-probabilities (n_answer_tokens, vocabulary) float32 that predict its answer tokens."""

    def kl(self, interventions: Sequence[Intervention]) -> float:
        """Mean over answer tokens of KL(clean || intervened), nats."""
        clean = n_clean(interventions, self.model.anatomy)

        def read(one: tuple[Batch, list[Tensor]]) -> float:
            batch, before = one
            p = torch.cat([self.clean[i] for i in batch.members])
            return sum(float(_kl(p[rows], q.log_softmax(-1))) for rows, q in predictions(self.model, batch, torch.cat(before), clean, {clean - 1}))

        with torch.inference_mode(), applied(self.model.anatomy, interventions):
            return sum(run_each(self.model, self._batches, read)) / max(sum(map(len, self.clean)), 1)


def answer_logprobs(
    model: ChatModel, texts: Sequence[Text], interventions: Sequence[Intervention] = (), batch_tokens: int = 1024
) -> list[Tensor]:
    """Per text the log-probabilities (n_answer_tokens, vocabulary) float32 that predict its answer tokens."""
    with torch.inference_mode():
        return _logprobs(model, list(_answers(model, texts, batch_tokens)), len(texts), interventions)


def _answers(model: ChatModel, texts: Sequence[Text], batch_tokens: int) -> Iterator[tuple[Batch, list[Tensor]]]:
    """Batches, each with the tokens per text that come before an answer token."""
    encoded = [encode_answer(model.tokenizer, t.question, t.answer, t.system, closing=False) for t in texts]
    for batch in read_in_batches(model, [e.ids for e in encoded], batch_tokens):
        yield batch, [at[encoded[i].answer_start - 1 : encoded[i].answer_end - 1] for i, at in zip(batch.members, batch.at, strict=True)]


@torch.inference_mode()
def _logprobs(
    model: ChatModel, read: Sequence[tuple[Batch, list[Tensor]]], n_texts: int, interventions: Sequence[Intervention] = ()
) -> list[Tensor]:
    found: list[Tensor] = [torch.empty(0)] * n_texts

    def log_softmax(one: tuple[Batch, list[Tensor]]) -> list[Tensor]:
        batch, before = one
        return [logits.log_softmax(-1) for _, logits in predictions(model, batch, torch.cat(before))]

    with applied(model.anatomy, interventions):
        for (batch, before), parts in zip(read, run_each(model, read, log_softmax), strict=True):
            if parts:
                for i, own in zip(batch.members, torch.cat(parts).split([len(b) for b in before]), strict=True):
                    found[i] = own
    return found


def text_kl(p: Sequence[Tensor], q: Sequence[Tensor], mean: bool = True) -> list[float]:
    """Per text the mean (or sum) over its answer tokens of KL(p || q), nats, from log-probabilities as `answer_logprobs` gives them."""
    totals = [sum(float(_kl(x, y)) for x, y in zip(a.split(CHUNK), b.split(CHUNK), strict=True)) for a, b in zip(p, q, strict=True)]
    return [t / max(len(a), 1) for t, a in zip(totals, p, strict=True)] if mean else totals


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """Sum over rows of KL(p || q) from log-probabilities (n, vocabulary); float64."""
    return (p.exp() * (p - q)).sum(-1).double().sum()
