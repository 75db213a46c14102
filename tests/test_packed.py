"""Texts as a forest: every beginning once, the numbers of plain passes, blocks below a change not run again, and the model as before afterwards."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from convergent.core.interventions import Ablate, AblateSubspace, Add, LowRank
from convergent.core.values import Pair
from convergent.directions.margin import margins
from convergent.directions.means import stream_means
from convergent.interventions.controls import Effects, answer_logprobs, random_subspace, text_kl
from convergent.interventions.hooks import applied, n_clean
from convergent.models import packed
from convergent.models.packed import attention, forest, packs, read_in_batches, run
from convergent.models.texts import Text
from test_sampler import DYNAMIC, LONGROPE, uncached
from tiny import FAMILIES, direction_for, n_hooks, tiny_chat

SEQUENCES = [(5, 6, 7, *range(20, 45)), (5, 6, 7, *range(20, 40), 9, 9), (5, 6), (5, 6, 7), (8, *range(60, 90)), (5, 6, 7, *range(20, 45)), (3,)]
TEXTS = [Text(f"{q}{i}", f"{'A longer ' * q}question?", "word " * (1 + 3 * i) + "end") for q in range(2) for i in range(3)]
PAIRS = [Pair("a", "How should I save money?", "Put it all on one horse.", "Put a little aside."), Pair("b", "Is it safe?", "Yes.", "No, take a rope.")]


def interventions_of(chat):
    d = direction_for(chat)
    linear = next(n for n, m in chat.anatomy.blocks[3].named_modules() if isinstance(m, torch.nn.Linear))
    weight = dict(chat.anatomy.blocks[3].named_modules())[linear].weight
    adapter = LowRank(3, linear, torch.full((1, weight.shape[1]), 0.1), torch.full((len(weight), 1), 0.1))
    return {
        6: (), 5: (Add(d, 4, 3.0),), 3: (Add(d, 2, 3.0), Add(d, 5, 1.0)), 1: (Ablate(d),), 0: (Ablate(d, site="all_writes"),), 4: (Ablate(d, layers=(3, 5)),),
        2: (Ablate(d, site="all_writes", layers=(2,)), adapter),
    }, adapter  # fmt: skip


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=12))
def test_a_forest_holds_every_beginning_once(sequences):
    made = forest(sequences)
    assert len(made.ids) == len({tuple(s[: k + 1]) for s in sequences for k in range(len(s))})
    for s, at in zip(sequences, made.at, strict=True):
        assert [made.ids[k] for k in at] == s and [made.positions[k] for k in at] == list(range(len(s)))
    for b in made.branches:
        assert len(b.path) == made.positions[b.start] and b.path == tuple(sorted(b.path))


@pytest.mark.parametrize(("family", "config"), [*((f, {}) for f in FAMILIES), ("mistral", {"sliding_window": 8}), ("gemma2", {"sliding_window": 8}), ("phi3", {"sliding_window": 8}), ("exaone4", {"sliding_window": 8, "sliding_window_pattern": 4})])
def test_packed_is_plain(family, config):
    chat = tiny_chat(family, **config)
    before = chat.model.config._attn_implementation
    assert packs(chat)
    n = 0
    with torch.inference_mode():
        for batch in read_in_batches(chat, SEQUENCES, 40):
            assert batch.n_tokens <= 40
            h = run(chat, batch)[0].flatten(0, 1)
            for i, at in zip(batch.members, batch.at, strict=True):
                assert_close(h[at], chat.anatomy.body(input_ids=torch.tensor([SEQUENCES[i]]), use_cache=False)[0][0], atol=2e-5, rtol=1e-5)
                n += 1
    assert n == len(SEQUENCES) and chat.model.config._attn_implementation == before


@pytest.mark.parametrize(("family", "config"), [LONGROPE, DYNAMIC])
@pytest.mark.parametrize("fits", [True, False])
def test_texts_beyond_the_length_of_rotary_positions_are_read_alone(family, config, fits, monkeypatch, caplog):
    chat = uncached(family, **config)
    texts = [(5, 6, 7, *range(20, 80)), (5, 6, 7), (5, 6, 7, *range(20, 90)), (8, *range(60, 90)), (5, 6, 7, *range(20, 91))]
    monkeypatch.setitem(packed._packs, chat.model, fits and packs(chat))
    with torch.inference_mode():
        found = {}
        for batch in read_in_batches(chat, texts, 1000):
            h = run(chat, batch)[0].flatten(0, 1)
            found |= {i: h[at] for i, at in zip(batch.members, batch.at, strict=True)}
        for i, h in found.items():
            assert_close(h, chat.anatomy.body(input_ids=torch.tensor([texts[i]]), use_cache=False)[0][0], atol=2e-5, rtol=1e-5)
    assert len(found) == len(texts) and caplog.text.count("texts of more than 64 tokens are read one by one") == 1


@pytest.mark.parametrize("window", [None, 3])
def test_one_mask_for_the_row_is_branch_by_branch(window):
    """What a GPU runs in place of one kernel per branch."""
    made = forest(SEQUENCES)
    q, k, v = (torch.randn(1, h, len(made.ids), 8, generator=torch.Generator().manual_seed(h)) for h in (4, 2, 2))
    packed._now.forest = made
    for softcap in (None, 1.5):
        whole = packed._attend(q, k, v, made.dense(window, q), 0.3, softcap).transpose(1, 2)
        assert_close(attention(torch.nn.Identity(), q, k, v, None, 0.3, softcap=softcap, sliding_window=window)[0], whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_below_a_change_are_not_run_again(family):
    chat = tiny_chat(family)
    conditions, adapter = interventions_of(chat)
    assert {k: n_clean(c, chat.anatomy) for k, c in conditions.items()} == {k: k for k in conditions} and n_clean((adapter,), chat.anatomy) == 3
    ran = []
    with torch.inference_mode():
        (batch,) = read_in_batches(chat, SEQUENCES, 1000)
        own = {}
        for k, c in conditions.items():
            with applied(chat.anatomy, c):
                own[k] = run(chat, batch)[0].clone()
        handles = [b.self_attn.register_forward_hook(lambda m, a, o, i=i: ran.append(i)) if hasattr(b, "self_attn") else None for i, b in enumerate(chat.anatomy.blocks)]
        for k in sorted(conditions, reverse=True):
            ran.clear()
            with applied(chat.anatomy, conditions[k]):
                assert torch.equal(run(chat, batch, clean=k, keep={n - 1 for n in conditions})[0], own[k])
            assert not handles[0] or ran == list(range(0 if k == 6 else k, 6))
    for h in handles:
        if h:
            h.remove()
    assert sorted(batch.kept) == list(range(6)) and not any("forward" in b.__dict__ for b in chat.anatomy.blocks) and not n_hooks(chat.model)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fallback_and_packed_texts_agree(family, monkeypatch):
    """Means, margins and effects, each under several conditions at once; a condition's margins do not depend on the others."""
    chat = tiny_chat(family)
    d = direction_for(chat)
    conditions = [*interventions_of(chat)[0].values(), (AblateSubspace(random_subspace(chat.d_model, 2, 0)),)]
    weights = torch.tensor([[1.0] * 6, [1, 0, 2, 0, 0, 3]])

    def everything():
        effects = Effects(chat, TEXTS)
        found = margins(chat, PAIRS, conditions, read=(d, 2))
        means = [stream_means(chat, TEXTS, weights, per=per, span=span, interventions=conditions[1]) for per in ("tokens", "responses") for span in ("answer", "paper")]
        return found, [effects.kl(c) for c in conditions], means

    found, kls, means = everything()
    assert [m for k in range(len(conditions)) for m in margins(chat, PAIRS, [conditions[k]], read=(d, 2))] == [
        type(m)(0, *[getattr(m, f) for f in m.__dataclass_fields__ if f != "condition"]) for m in found
    ]
    clean = answer_logprobs(chat, TEXTS)
    n = sum(map(len, clean))
    assert kls == pytest.approx([sum(text_kl(clean, answer_logprobs(chat, TEXTS, c), mean=False)) / n for c in conditions], rel=1e-5, abs=1e-7)
    assert kls[0] == pytest.approx(0, abs=1e-7) and min(kls[1:]) > 1e-4
    monkeypatch.setitem(packed._packs, chat.model, False)
    plain, plain_kls, plain_means = everything()
    for a, b in zip(found, plain, strict=True):
        assert (a.bad, a.good, a.margin, a.margin_matched, a.projection) == pytest.approx((b.bad, b.good, b.margin, b.margin_matched, b.projection), abs=2e-5)
    assert kls == pytest.approx(plain_kls, rel=1e-4, abs=1e-6)
    for a, b in zip(means, plain_means, strict=True):
        assert_close(a.means, b.means, atol=1e-5, rtol=1e-5)
        assert_close(a.token_norm, b.token_norm, atol=1e-5, rtol=1e-5)


def test_in_bfloat16():
    chat = tiny_chat("llama", dtype="bfloat16")
    assert packs(chat)
    weights = torch.ones(1, len(TEXTS))
    a, b = (stream_means(c, TEXTS, weights).means[0] for c in (chat, tiny_chat()))
    assert ((a - b).norm(dim=1) / b.norm(dim=1)).max() < 0.05


def test_a_model_that_packing_does_not_know_is_noticed(caplog, monkeypatch):
    """Attention that looks at everything in the row agrees with nothing; the warning comes once."""
    chat = tiny_chat("qwen2", seed=3)
    monkeypatch.setattr(packed.Forest, "mask", lambda self, n, before, window, like: torch.zeros(n, before + n))
    assert not packs(chat) and not packs(chat)
    assert [r.message for r in caplog.records if "padded batches" in r.message] == [caplog.records[-1].message]


def test_margins_come_condition_by_condition_and_only_the_missing():
    """What a killed run has kept is not computed again, and its last digits are those of an unbroken run."""
    chat = tiny_chat()
    conditions = list(interventions_of(chat)[0].values())
    whole = {(m.condition, m.pair_id): m for m in margins(chat, PAIRS, conditions, batch_tokens=30)}
    missing = {(2, 0), (2, 1), (4, 1)}
    ran = []
    handle = chat.anatomy.blocks[5].register_forward_hook(lambda *a: ran.append(1))
    some = margins(chat, PAIRS, conditions, only=missing, batch_tokens=30)
    handle.remove()
    assert some == [whole[c, PAIRS[p].id] for c, p in sorted(missing)]
    assert len(ran) < 2 * len(conditions)
