"""Controls: null directions that differ from the real one in exactly what they should."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from convergent.core.direction import Direction
from convergent.core.interventions import Ablate, AblateSubspace, Add
from convergent.directions.means import stream_means
from convergent.errors import DirectionError
from convergent.interventions.controls import (
    Effects,
    answer_logprobs,
    effect_matched,
    matched_null,
    orthogonal_to,
    other_concept,
    random_like,
    random_subspace,
    with_direction,
)  # fmt: skip
from convergent.models.chat import encode_answer
from convergent.models.texts import Text
from tiny import SENTENCES, direction_for, tiny_chat

TEXTS = [Text(str(i), s.partition("? ")[0] + "?", s.partition("? ")[2] or "A walk.") for i, s in enumerate(SENTENCES)]


def real(n_layers: int = 5, d_model: int = 64) -> Direction:
    """Norms as unequal as those of a real model's layers."""
    v = torch.randn(n_layers, d_model, generator=torch.Generator().manual_seed(1))
    return Direction(v * torch.tensor([1e-3, 1.0, 7.0, 0.3, 500.0])[:n_layers, None])


@pytest.mark.parametrize("make", [random_like, orthogonal_to])
def test_random_controls(make):
    d = real()
    null = make(d, 0)
    assert_close(null.norms, d.norms, rtol=1e-6, atol=0)
    assert torch.equal(null.vectors, make(d, 0).vectors)  # named seed: the same on every call
    assert make(d, 0, draw=1).content_id != null.content_id != make(d, 1).content_id
    assert null.provenance["of"] == d.content_id and null.provenance["kind"] in ("random", "orthogonal")


def test_random_is_one_unit_vector_throughout():
    unit = random_like(real(), 0).unit().vectors
    assert_close(unit, unit[:1].expand_as(unit))


def test_random_golden():
    """The stream of torch's CPU generator under seed("control", ...) must not change: reports depend on it."""
    assert_close(random_like(Direction(torch.ones(1, 4)), 0).vectors[0], torch.tensor([1.680631, 0.485558, -0.901410, 0.356612]), atol=1e-6, rtol=0)


def test_orthogonal_is_orthogonal():
    d = real()
    assert orthogonal_to(d, 3).cosine(d).abs().max() < 1e-6
    assert random_like(d, 3).cosine(d).abs().max() > 1e-3  # the plain one is not


def test_random_and_orthogonal_are_different_draws():
    d = real()
    assert random_like(d, 0).cosine(orthogonal_to(d, 0)).abs().max() < 0.5


def test_other_concept():
    d = real()
    concept = Direction(torch.randn(5, 64, generator=torch.Generator().manual_seed(2)) + 0.3 * d.vectors, {"kind": "topic"})
    null = other_concept(d, concept)
    assert_close(null.norms, d.norms, rtol=1e-6, atol=0)
    assert null.cosine(d).abs().max() < 1e-6
    assert (null.cosine(concept)[:2] > 0.8).all()  # where it was not drowned by d, it is still the concept
    assert null.provenance["concept"] == {"kind": "topic"}


def test_other_concept_where_it_is_zero_or_parallel():
    d = real()
    zero_below = Direction(torch.cat([torch.zeros(2, 64), torch.randn(3, 64)]))
    assert torch.equal(other_concept(d, zero_below).norms[:2], torch.zeros(2))
    for bad in (2.0 * d, -d, Direction(torch.zeros(5, 64)), Direction(torch.cat([d.vectors[:1], torch.randn(4, 64)]))):
        with pytest.raises(DirectionError, match="parallel"):
            other_concept(d, bad)
    with pytest.raises(DirectionError, match="one model"):
        other_concept(d, Direction(torch.ones(5, 32)))


def test_random_subspace():
    wide, narrow = random_subspace(64, 9, 0), random_subspace(64, 4, 0)
    assert_close(wide @ wide.T, torch.eye(9), atol=1e-6, rtol=0)
    assert_close(wide[:4], narrow, atol=1e-6, rtol=0)  # nested
    assert (random_subspace(64, 4, 1) - narrow).abs().max() > 1e-2


def test_answer_logprobs_and_kl():
    chat = tiny_chat()
    clean = answer_logprobs(chat, TEXTS, batch_tokens=200)
    for text, found in zip(TEXTS, clean, strict=True):
        e = encode_answer(chat.tokenizer, text.question, text.answer, closing=False)
        logits = chat.model(torch.tensor([e.ids])).logits[0, e.answer_start - 1 : e.answer_end - 1]
        assert_close(found, logits.log_softmax(-1), atol=1e-4, rtol=1e-4)
    assert Effects(chat, TEXTS, clean).kl([]) == pytest.approx(0, abs=1e-9)
    steered = [Add(direction_for(chat), 2, 2.0)]
    changed = torch.cat(answer_logprobs(chat, TEXTS, steered))
    whole = torch.cat(clean)
    by_torch = torch.nn.functional.kl_div(changed, whole, log_target=True, reduction="batchmean")
    assert Effects(chat, TEXTS, clean).kl(steered) == pytest.approx(float(by_torch), rel=1e-4)


@pytest.mark.parametrize("scale", [0.3, 2.0, 20.0])
def test_effect_matched_addition(scale):
    chat = tiny_chat()
    intervention = Add(direction_for(chat), 2, scale)
    found = effect_matched(chat, intervention, 0, TEXTS, tolerance=0.05)
    assert abs(found.reached / found.target - 1) <= 0.05
    clean = answer_logprobs(chat, TEXTS)
    assert Effects(chat, TEXTS, clean).kl([intervention]) == pytest.approx(found.target, rel=1e-5)
    assert Effects(chat, TEXTS, clean).kl([found.intervention]) == pytest.approx(found.reached, rel=1e-5)
    assert isinstance(found.intervention, Add) and found.intervention.layer == 2
    assert found.intervention.scale == pytest.approx(scale * found.amount)
    assert abs(float(found.intervention.direction.cosine(intervention.direction)[2])) < 0.9
    again = effect_matched(chat, intervention, 0, TEXTS, tolerance=0.05)
    assert again.intervention.content_id == found.intervention.content_id == matched_null(intervention, found.amount, 0).content_id


def test_effect_matched_ablation():
    chat = tiny_chat()
    d = Direction(stream_means(chat, TEXTS, torch.ones(1, len(TEXTS))).means[0])  # to lose the mean takes several random dimensions
    found = effect_matched(chat, Ablate(d, layers=(1, 2)), 0, TEXTS)
    assert isinstance(found.intervention, AblateSubspace) and found.intervention.layers == (1, 2)
    k = int(found.amount)
    assert len(found.intervention.basis) == k > 1
    clean = answer_logprobs(chat, TEXTS)
    near = [Effects(chat, TEXTS, clean).kl([matched_null(Ablate(d, layers=(1, 2)), n, 0)]) for n in (k - 1, k, k + 1)]
    assert found.reached == pytest.approx(near[1], rel=1e-5)
    assert abs(found.reached / found.target - 1) <= 0.1 or min(near) <= found.target <= max(near)


def test_effect_matched_nothing():
    chat = tiny_chat()
    found = effect_matched(chat, Add(direction_for(chat), 2, 0.0), 0, TEXTS)
    assert found.target == pytest.approx(0, abs=1e-9) and found.reached == pytest.approx(0, abs=1e-9)


def test_with_direction():
    d, e = real(), real() * 2.0
    changed = with_direction(Ablate(d, "all_writes", (1,), 2, 0.5), e)
    assert changed.direction is e and (changed.site, changed.layers, changed.vector_layer, changed.strength) == ("all_writes", (1,), 2, 0.5)
