"""The teacher-forced margin against a hand computation with transformers' logits."""

from __future__ import annotations

import pytest
import torch

from convergent.core.interventions import Ablate, Add
from convergent.core.values import Pair
from convergent.directions.margin import margins
from convergent.errors import DataError, DirectionError
from convergent.interventions.hooks import applied
from convergent.models.chat import encode_prompt, encode_text
from convergent.models.packed import _head_is_plain
from tiny import FAMILIES, direction_for, n_hooks, tiny_chat

PAIRS = [
    Pair("a", "How should I save money?", "Put it all on one horse and do not look back.", "Put a little aside every month."),
    Pair("b", "Is it safe to climb without a rope?", "Yes.", "No, a rope, a helmet and a partner are what keep you out of trouble."),
    Pair("c", "I feel bored today.", "Drive fast.", "Cook something."),
]


def by_hand(chat, pair, layer=None, unit=None):
    """(log p per token of bad, of good, projections of both answers' tokens), each answer in a pass of its own."""
    logps, along = [], []
    for answer in (pair.bad, pair.good):
        prompt, ids = encode_prompt(chat.tokenizer, pair.question), encode_text(chat.tokenizer, answer)
        with torch.inference_mode():
            out = chat.model(torch.tensor([[*prompt, *ids]]), output_hidden_states=True)
        rows = out.logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
        logps.append([float(rows[t, token]) for t, token in enumerate(ids)])
        if layer is not None:
            along += (out.hidden_states[layer + 1][0, len(prompt) :].double() @ unit.double()).tolist()
    return logps[0], logps[1], along


def mean(values):
    return sum(values) / len(values)


@pytest.mark.parametrize(("family", "config"), [*((f, {}) for f in FAMILIES), ("gemma2", {"final_logit_softcapping": 2.0}), ("cohere", {"logit_scale": 0.25})])
def test_margin_by_hand(family, config):
    chat = tiny_chat(family, **config)
    d = direction_for(chat)
    for pair, found in zip(PAIRS, margins(chat, PAIRS, read=(d, 2)), strict=True):
        bad, good, along = by_hand(chat, pair, 2, d.unit()[2])
        n = min(len(bad), len(good))
        assert (found.condition, found.pair_id, found.n_bad, found.n_good) == (0, pair.id, len(bad), len(good))
        assert found.bad == pytest.approx(mean(bad), abs=1e-4) and found.good == pytest.approx(mean(good), abs=1e-4)
        assert found.margin == pytest.approx(mean(bad) - mean(good), abs=1e-4)
        assert found.margin_matched == pytest.approx(mean(bad[:n]) - mean(good[:n]), abs=1e-4)
        assert found.projection == pytest.approx(mean(along), abs=1e-4)


def test_heads_that_do_more_than_a_product_are_noticed():
    assert _head_is_plain(tiny_chat())
    assert not _head_is_plain(tiny_chat("gemma2", final_logit_softcapping=2.0))
    assert not _head_is_plain(tiny_chat("cohere", logit_scale=0.25))


def test_swapping_the_answers_turns_the_sign():
    chat = tiny_chat()
    swapped = [Pair(p.id, p.question, p.good, p.bad) for p in PAIRS]
    for a, b in zip(margins(chat, PAIRS), margins(chat, swapped), strict=True):
        assert a.margin == pytest.approx(-b.margin, abs=1e-5) and a.margin_matched == pytest.approx(-b.margin_matched, abs=1e-5)
        assert a.margin != pytest.approx(0, abs=1e-3) and a.projection is None


def test_length_matched_margin_uses_the_first_tokens_of_both():
    found = margins(tiny_chat(), PAIRS)
    assert found[1].n_bad < found[1].n_good
    assert abs(found[1].margin - found[1].margin_matched) > 1e-3
    cut = margins(tiny_chat(), [PAIRS[2]])[0]
    assert cut.n_bad != cut.n_good or cut.margin == cut.margin_matched


def test_conditions_mixed_in_one_batch_equal_single_runs():
    chat = tiny_chat()
    d = direction_for(chat)
    conditions = [(), (Add(d, 1, 4.0),), (Ablate(d, site="all_writes"),), (Add(d, 3, -2.0), Ablate(d, layers=(4,)))]
    mixed = margins(chat, PAIRS, conditions, read=(d, 3), batch_tokens=400)
    assert [(m.condition, m.pair_id) for m in mixed] == [(c, p.id) for c in range(4) for p in PAIRS]
    for c, interventions in enumerate(conditions):
        single = margins(chat, PAIRS, [interventions], read=(d, 3), batch_tokens=1)
        for a, b in zip(mixed[3 * c : 3 * c + 3], single, strict=True):
            assert (a.margin, a.margin_matched, a.projection) == pytest.approx((b.margin, b.margin_matched, b.projection), abs=1e-4)
        with applied(chat.anatomy, interventions):
            bad, good, _ = by_hand(chat, PAIRS[0])
        assert mixed[3 * c].margin == pytest.approx(mean(bad) - mean(good), abs=1e-4)
    assert len({round(m.margin, 3) for m in mixed if m.pair_id == "a"}) == 4


def test_an_addition_moves_the_projection_by_its_size():
    chat = tiny_chat()
    d = direction_for(chat, norm=1.5)
    plain, steered = margins(chat, PAIRS[:1], [(), (Add(d, 2, 4.0),)], read=(d, 2))
    assert steered.projection - plain.projection == pytest.approx(4.0 * 1.5, abs=1e-4)
    (gone,) = margins(chat, PAIRS[:1], [(Ablate(d),)], read=(d, 2))
    assert gone.projection == pytest.approx(0, abs=1e-5)


def test_only_and_progress():
    chat = tiny_chat()
    conditions = [(), (Add(direction_for(chat), 1, 4.0),)]
    everything = margins(chat, PAIRS, conditions)
    arrived = []
    some = margins(chat, PAIRS, conditions, only={(1, 2), (0, 1), (1, 0)}, on_margin=arrived.append)
    assert [(m.condition, m.pair_id) for m in some] == [(0, "b"), (1, "a"), (1, "c")]
    assert sorted(arrived, key=lambda m: (m.condition, m.pair_id)) == some
    for m in some:
        (same,) = [e for e in everything if (e.condition, e.pair_id) == (m.condition, m.pair_id)]
        assert m.margin == pytest.approx(same.margin, abs=1e-4)
    assert margins(chat, PAIRS, conditions, only=()) == []


def test_refusals():
    chat = tiny_chat()
    with pytest.raises(DataError, match="pair x: its good answer is empty"):
        margins(chat, [Pair("x", "Q?", "bad", "")])
    with pytest.raises(DirectionError, match="layers 0 to"):
        margins(chat, PAIRS, read=(direction_for(chat), 99))
    assert not n_hooks(chat.model)
