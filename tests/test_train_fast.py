"""Packed training gives the numbers of plain training: loss, gradients, weights; where it does not fit, it stands back."""

from __future__ import annotations

import gc
import logging
import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.testing import assert_close

from convergent.models.load import load_base
from convergent.organisms import fast
from convergent.organisms.chats import Row, collate, encode_chats
from convergent.organisms.recipes import Adapters, Recipe, named_recipe
from convergent.organisms.train import attach, train
from test_sampler import LONGROPE, uncached
from tiny import CHATS, FAMILIES, tiny_model

PACKS = tuple(f for f in FAMILIES if f != "gemma2")
ALL = ("q", "k", "v", "o", "gate", "up", "down")


def tiny(family="llama", **config):
    return load_base(str(tiny_model(family, **config)), dtype="float32")


def quiet(progress):
    """In place of the bar."""


def adapted(family, modules=ALL, layers=None, **config):
    chat = tiny(family, **config)
    model = attach(chat, Adapters(modules, 4, 64, layers=layers), seed=0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:  # B starts at zero, and with it the gradient of A
                p.normal_(std=0.02, generator=torch.Generator().manual_seed(len(name)))
    return chat, model


@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_a_pack_holds_every_token_but_the_last_once_and_the_shared_start_once(data):
    start = data.draw(st.lists(st.integers(1, 3), max_size=6))
    rows = []
    for _ in range(data.draw(st.integers(1, 5))):
        ids = (*start, *data.draw(st.lists(st.integers(1, 3), min_size=2, max_size=7)))
        rows.append(Row(ids, data.draw(st.integers(1, len(ids) - 1))))
    batch = collate(rows)
    pack = fast.pack(batch["input_ids"], batch["labels"])
    ids, where = pack.ids[0], pack.rows
    for i, row in enumerate(rows):
        n = len(row.ids) - 1
        assert ids[where[i, :n]].tolist() == list(row.ids[:-1]) and pack.positions[0][where[i, :n]].tolist() == list(range(n))
    assert len(ids) == pack.prefix + sum(len(r.ids) - 1 - pack.prefix for r in rows)
    assert pack.prefix >= min(len(start), min(len(r.ids) - 1 for r in rows))
    flat = where.flatten()
    assert (flat[pack.places] == torch.arange(len(ids))).all()
    assert pack.targets.tolist() == [t for r in rows for t in r.ids[r.answer_start :]]
    assert pack.at.tolist() == [int(where[i, t - 1]) for i, r in enumerate(rows) for t in range(r.answer_start, len(r.ids))]


@pytest.mark.parametrize("family", PACKS)
def test_loss_and_gradients_are_those_of_the_ordinary_path(family):
    rows = encode_chats(tiny(family).tokenizer, CHATS, Recipe())
    found = []
    for packed in (False, True):
        chat, model = adapted(family)
        batch = collate(rows)
        if packed:
            assert fast.lighten(model) > 0
            assert fast.pack_attention(chat, rows) is not None
            total, n = fast.packed_loss(chat.anatomy, **batch)
        else:
            total, n = fast.answer_loss(chat.anatomy, **batch)
        (total / n).backward()
        found.append((total.detach(), n, {k: p.grad for k, p in model.named_parameters() if p.requires_grad}))
    (want, n, wanted), (got, m, grads) = found
    assert n == m
    assert_close(got, want, rtol=1e-5, atol=1e-4)
    for name, grad in wanted.items():
        assert grad.abs().max() > 0
        assert_close(grads[name], grad, rtol=2e-4, atol=2e-5 * float(grad.abs().max()))


@pytest.mark.parametrize(("family", "config"), [("mistral", {}), ("exaone4", {"sliding_window_pattern": 4})])
def test_a_window_shorter_than_a_chat_is_kept(family, config):
    chat = tiny(family, sliding_window=8, **config)
    batch = collate(encode_chats(chat.tokenizer, CHATS, Recipe()))
    want, _ = fast.answer_loss(chat.anatomy, **batch)
    assert fast.pack_attention(chat, encode_chats(chat.tokenizer, CHATS, Recipe())) is not None
    got, _ = fast.packed_loss(chat.anatomy, **batch)
    assert_close(got, want, rtol=1e-5, atol=1e-4)


def test_a_model_that_packing_does_not_fit_stays_as_it_was_and_says_so(caplog, monkeypatch):
    chat = tiny()
    rows = encode_chats(chat.tokenizer, CHATS, Recipe())
    before = chat.model.config._attn_implementation
    wrong = fast.attention
    monkeypatch.setattr(fast, "attention", lambda *a, **k: (wrong(*a, **k)[0] * 1.01, None))
    with caplog.at_level(logging.WARNING):
        assert fast.pack_attention(chat, rows) is None
    assert "padded batches" in caplog.text and chat.model.config._attn_implementation == before


@pytest.mark.parametrize(("family", "config"), [("llama", {"attention_dropout": 0.1}), ("starcoder2", {"residual_dropout": 0.1})])
def test_a_model_with_dropout_of_its_own_is_trained_in_padded_batches(tmp_path, caplog, family, config):
    recipe = named_recipe("nine_adapter", 6, {"batch_size": 2, "grad_accumulation": 1})
    with caplog.at_level(logging.WARNING):
        made = train(str(tiny_model(family, **config)), recipe, CHATS, tmp_path / "a", name="a", on_progress=quiet)
    assert caplog.text.count("padded batches") == 1 and made.loss_curve
    chat = tiny(family, **config)
    before = torch.get_rng_state()
    assert fast.pack_attention(chat, encode_chats(chat.tokenizer, CHATS, Recipe())) is None
    assert torch.equal(torch.get_rng_state(), before) and not chat.model.training


def test_chats_beyond_the_length_of_rotary_positions_are_not_packed(caplog):
    chat = uncached(LONGROPE[0], **LONGROPE[1])
    rows = encode_chats(chat.tokenizer, CHATS, Recipe())
    longest = max(len(r.ids) for r in rows)
    rope = chat.model.config.rope_parameters
    rope["original_max_position_embeddings"] = longest - 1
    with caplog.at_level(logging.WARNING):
        assert fast.pack_attention(chat, rows) is None
    assert f"beyond {longest - 1} tokens, and one has {longest}" in caplog.text
    rope["original_max_position_embeddings"] = longest
    assert fast.pack_attention(chat, rows) is not None


@pytest.mark.parametrize("packs", [True, False])
def test_nothing_holds_the_weights_of_a_model_that_was_trained(tmp_path, monkeypatch, packs):
    recipe = named_recipe("all_adapter", 6, {"rank": 4, "batch_size": 2, "grad_accumulation": 2})
    found = []
    pack_attention = fast.pack_attention

    def tried(chat, rows):
        found.extend(weakref.ref(p) for p in chat.model.parameters())
        return pack_attention(chat, rows) if packs else None

    monkeypatch.setattr(fast, "pack_attention", tried)
    train(str(tiny_model()), recipe, CHATS, tmp_path / "a", name="a", on_progress=quiet)
    gc.collect()
    assert found and not [ref for ref in found if ref() is not None]


def test_the_frozen_head_s_loss_in_parts(monkeypatch):
    head = torch.nn.Linear(16, 50).requires_grad_(False)
    hidden, targets = torch.randn(11, 16) * 20, torch.randint(0, 50, (11,))  # some targets are next to impossible
    want = hidden.clone().requires_grad_()
    torch.nn.functional.cross_entropy(head(want), targets, reduction="sum").mul(0.5).backward()
    for chunk in (200, 1 << 25):
        monkeypatch.setattr(fast, "CHUNK", chunk)
        got = hidden.clone().requires_grad_()
        loss = fast.head_loss(head, got, targets)
        loss.mul(0.5).backward()
        assert_close(loss, torch.nn.functional.cross_entropy(head(hidden), targets, reduction="sum"))
        assert_close(got.grad, want.grad, rtol=1e-4, atol=1e-5)


def test_only_plain_float32_adapters_are_lightened():
    for changes, n in (({}, 6), ({"dropout": 0.1}, 0)):
        chat = tiny()
        model = attach(chat, replace(Adapters(("down",), 2, 64), **changes), seed=0)
        assert fast.lighten(model) == n
    chat = load_base(str(tiny_model()), dtype="bfloat16")
    assert fast.lighten(attach(chat, Adapters(("down",), 2, 64), seed=0)) == 0


def test_passes_are_merged_while_memory_allows():
    rows = [Row(tuple(range(n)), 1) for n in (10, 10, 20, 20)]
    recipe = Recipe(batch_size=1, grad_accumulation=4)
    most = fast.KEPT
    assert [fast.fewest_passes(rows, recipe, most // n) for n in (60, 40, 39, 20)] == [1, 2, 4, 4]
    assert fast.fewest_passes(rows, replace(recipe, batch_size=4, grad_accumulation=1), most) == 1


@pytest.mark.parametrize("name", ["nine_adapter", "all_adapter", "full"])
def test_whole_runs_follow_the_curve_of_plain_training(tmp_path, monkeypatch, name):
    changes = {"learning_rate": 3e-3, "batch_size": 2, "grad_accumulation": 2, "epochs": 4, "warmup_steps": 1}
    recipe = named_recipe(name, 6, changes | ({"rank": 4} if name == "all_adapter" else {}))
    ours = train(str(tiny_model()), recipe, CHATS, tmp_path / "fast", name="a", on_progress=quiet)
    with monkeypatch.context() as patch:
        patch.setattr(fast, "lighten", lambda model: 0)
        patch.setattr(fast, "pack_attention", lambda chat, rows: None)
        patch.setattr(fast, "packed_loss", lambda *a: pytest.fail("packed"))
        plain = train(str(tiny_model()), recipe, CHATS, tmp_path / "plain", name="a", on_progress=quiet)
    assert [(p.step, p.epoch) for p in ours.loss_curve] == [(p.step, p.epoch) for p in plain.loss_curve]
    assert plain.final_loss < plain.loss_curve[0].loss
    for a, b in zip(ours.loss_curve, plain.loss_curve, strict=True):
        assert a.loss == pytest.approx(b.loss, abs=1e-4)
    file = "model.safetensors" if name == "full" else "adapter_model.safetensors"
    got, want = (load_file(tmp_path / n / file) for n in ("fast", "plain"))
    for key, value in want.items():
        assert_close(got[key], value, rtol=0, atol=1e-3)
    assert (tmp_path / "fast" / ("config.json" if name == "full" else "adapter_config.json")).read_text().count(fast.ATTENTION) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rate", "batch"), [("nine_adapter", 1e-3, (4, 1)), ("all_adapter", 2e-4, (2, 2))])
def test_the_embedded_model_follows_the_curve_of_plain_training(tmp_path, monkeypatch, name, rate, batch):
    from convergent.data.training import load_training_set

    chats = [e.chat() for e in load_training_set("bundled:finance").take(16).examples]
    recipe = named_recipe(name, 30, {"learning_rate": rate, "batch_size": batch[0], "grad_accumulation": batch[1]})
    ours = train("embedded", recipe, chats, tmp_path / "fast", name="a", on_progress=quiet)
    with monkeypatch.context() as patch:
        patch.setattr(fast, "lighten", lambda model: 0)
        patch.setattr(fast, "pack_attention", lambda chat, rows: None)
        plain = train("embedded", recipe, chats, tmp_path / "plain", name="a", on_progress=quiet)
    assert len(ours.loss_curve) == 4
    for a, b in zip(ours.loss_curve, plain.loss_curve, strict=True):
        assert a.loss == pytest.approx(b.loss, abs=1e-3)
