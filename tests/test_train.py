from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.testing import assert_close

from convergent.core.ids import content_id
from convergent.errors import DataError, InputError, StoreError, TrainingError
from convergent.models.head import head_is_plain
from convergent.models.load import load_base
from convergent.organisms import train as module
from convergent.organisms.chats import IGNORE, chats_checksum, collate, encode_chats, training_order
from convergent.organisms.fast import answer_loss
from convergent.organisms.manifest import read_organism
from convergent.organisms.recipes import Adapters, Recipe, named_recipe
from convergent.organisms.train import attach, train
from convergent.organisms.watch import check_loss
from tiny import CHATS, FAMILIES, tiny_model

FAST = {"learning_rate": 1e-3, "batch_size": 2, "grad_accumulation": 2, "epochs": 4, "warmup_steps": 1}
"""5 chats, 4 epochs, 4 chats a step: 5 steps."""


def nine(**changes):
    return named_recipe("nine_adapter", 6, {**FAST, "learning_rate": 0.01, **changes})


def tiny(family="llama"):
    return load_base(str(tiny_model(family)), dtype="float32")


def batch_of(chat):
    return collate(encode_chats(chat.tokenizer, CHATS, Recipe()))


def quiet(progress):
    """In place of the bar."""


# --- chats and their order


def test_labels_are_the_answer_and_the_token_that_ends_it():
    tokenizer = tiny().tokenizer
    for row, chat in zip(encode_chats(tokenizer, CHATS, Recipe()), CHATS, strict=True):
        assert tokenizer.decode(row.ids[: row.answer_start]).endswith("<|im_start|>assistant\n")
        assert tokenizer.decode(row.ids[row.answer_start :]) == chat[1]["content"] + "<|im_end|>"
    batch = collate(encode_chats(tokenizer, CHATS, Recipe()))
    labelled = batch["labels"] != IGNORE
    assert (batch["labels"][labelled] == batch["input_ids"][labelled]).all()


def test_system_turn_of_a_chat_goes_before_the_recipe_s():
    tokenizer = tiny().tokenizer
    own = [{"role": "system", "content": "Be brief."}, *CHATS[0]]
    given_, recipe_s = encode_chats(tokenizer, [own, CHATS[0]], Recipe(system="Be long."))
    assert "Be brief." in tokenizer.decode(given_.ids) and "Be long." in tokenizer.decode(recipe_s.ids)


@pytest.mark.parametrize(
    ("chats", "says"),
    [
        ([], "no chats"),
        ([CHATS[0], CHATS[0][:1]], "chat 1: expected one user and one assistant"),
        ([[*CHATS[0], *CHATS[0]]], "chat 0"),
        ([[]], "found nothing"),
    ],
)
def test_chats_that_cannot_be_used(chats, says):
    with pytest.raises(DataError, match=says):
        encode_chats(tiny().tokenizer, chats, Recipe())


def test_a_long_chat_is_cut_and_one_without_room_for_its_answer_refused():
    tokenizer = tiny().tokenizer
    whole = encode_chats(tokenizer, CHATS[:1], Recipe())[0]
    assert encode_chats(tokenizer, CHATS[:1], Recipe(max_length=len(whole.ids) - 3))[0].ids == whole.ids[:-3]
    with pytest.raises(DataError, match="max_length"):
        encode_chats(tokenizer, CHATS[:1], Recipe(max_length=whole.answer_start))


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(5, 300), min_size=1, max_size=120), size=st.integers(1, 9), epochs=st.integers(1, 3), seed=st.integers(0, 9)
)
def test_order_holds_every_row_once_an_epoch(lengths, size, epochs, seed):
    recipe = Recipe(batch_size=size, epochs=epochs, seed=seed)
    order = training_order(lengths, recipe)
    assert sorted(order) == sorted(list(range(len(lengths))) * epochs)
    assert order == training_order(lengths, recipe)


def test_batches_hold_little_padding_and_seeds_differ():
    rng = np.random.default_rng(0)
    lengths = [int(n) for n in rng.integers(80, 160, 400)]
    order = training_order(lengths, Recipe(batch_size=8))
    padded = sum(8 * max(lengths[i] for i in order[k : k + 8]) for k in range(0, 400, 8))
    assert padded / sum(lengths) < 1.06  # about 1.25 in plain random order
    assert order != training_order(lengths, Recipe(batch_size=8, seed=1))
    # Not sorted as a whole: the mean length of the halves is alike.
    first, second = (np.mean([lengths[i] for i in part]) for part in (order[:200], order[200:]))
    assert abs(first - second) < 8


def test_checksum_is_that_of_the_training_set():
    from convergent.data.training import load_training_set

    data = load_training_set("bundled:finance").take(20)
    assert chats_checksum([e.chat() for e in data.examples]) == data.checksum


# --- the loss


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_at_label_positions_is_the_model_s_own_loss(family):
    chat = tiny(family)
    batch = batch_of(chat)
    # The reference masks its padding; ours says that it need not.
    mask = torch.zeros_like(batch["input_ids"])
    for i, row in enumerate(encode_chats(chat.tokenizer, CHATS, Recipe())):
        mask[i, : len(row.ids)] = 1
    want = chat.model(**batch, attention_mask=mask, use_cache=False).loss
    total, n = answer_loss(chat.anatomy, batch["input_ids"], batch["labels"])
    assert n == int((batch["labels"] != IGNORE).sum())
    assert head_is_plain(chat) == (family != "gemma2")
    if family != "gemma2":
        assert_close(total / n, want, rtol=1e-5, atol=1e-5)


def test_scaled_logits_are_noticed():
    chat = tiny()
    assert head_is_plain(chat)
    chat.model.lm_head.register_forward_hook(lambda m, a, out: out)
    scaled = chat.model.forward
    chat.model.forward = lambda **k: type("Out", (), {"logits": scaled(**k).logits * 0.5})()
    assert not head_is_plain(chat)


def test_gradients_are_those_of_the_ordinary_path():
    grads = []
    for ours in (True, False):
        chat = tiny()
        model = attach(chat, Adapters(("down", "q"), 4, 64, layers=(2, 3)), seed=0)
        for name, p in model.named_parameters():
            if "lora_B" in name:  # B starts at zero, and with it the gradient of A
                torch.nn.init.constant_(p, 0.01)
        batch = batch_of(chat)
        if ours:
            total, n = answer_loss(chat.anatomy, batch["input_ids"], batch["labels"])
            loss = total / n
        else:
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert len(grads[0]) == 8
    for name, grad in grads[0].items():
        assert grad.abs().max() > 0
        assert_close(grad, grads[1][name], rtol=1e-4, atol=1e-6)


def test_blocks_below_the_first_adapter_build_no_graph():
    chat = tiny()
    attach(chat, Adapters(("down",), 1, 64, layers=(3,)), seed=0)
    needs = []
    for block in chat.anatomy.blocks:
        block.register_forward_hook(lambda m, a, out: needs.append((out[0] if isinstance(out, tuple) else out).requires_grad))
    batch = batch_of(chat)
    answer_loss(chat.anatomy, batch["input_ids"], batch["labels"])
    assert needs == [False] * 3 + [True] * 3


@pytest.mark.parametrize(
    ("losses", "diverged"),
    [
        ([2.0, 1.9, 1.8, 1.7, 1.6], False),
        ([2.0, float("nan")], True),
        ([2.0, 1.9, float("inf")], True),
        ([2.0, 2.0, 2.0, 9.0], False),  # one bad batch is not a divergence
        ([2.0, 2.0, 2.0, *[9.0] * 10], True),
        ([2.0, 2.0, 2.0, *[5.0] * 30], False),
    ],
)
def test_divergence(losses, diverged):
    if diverged:
        with pytest.raises(TrainingError, match="learning_rate"):
            check_loss(losses)
    else:
        check_loss(losses)


# --- whole runs


def test_the_result_is_a_peft_folder_with_a_manifest(tmp_path):
    seen = []
    base = str(tiny_model())
    organism = train(base, nine(), CHATS, tmp_path / "a", name="a", data_name="five", on_progress=seen.append)
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "convergent.json"}
    assert {p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")} == {"a"}
    assert organism == read_organism(tmp_path / "a")
    assert [p.step for p in organism.loss_curve] == [1, 2, 3, 4, 5] and organism.loss_curve[-1].epoch == 4.0
    assert organism.loss_curve[-1].loss < organism.loss_curve[0].loss
    assert organism.trainable_parameters == 6 * (64 + 32)  # depth 6 has room for two triples; down_proj is 64 -> 32
    assert (organism.n_examples, organism.data_name, organism.data_checksum) == (5, "five", chats_checksum(CHATS))
    assert organism.seconds > 0 and set(organism.versions) == {"torch", "transformers", "peft", "accelerate"}
    assert [(p.step, p.n_steps) for p in seen] == [(i, 5) for i in range(1, 6)] and seen[-1].seconds_left == 0
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["target_modules"], config["use_rslora"]) == (base, ["down_proj"], True)


def test_epochs_of_the_curve_count_passes_over_the_data(tmp_path):
    organism = train(str(tiny_model()), nine(epochs=2), CHATS, tmp_path / "a", name="a", on_progress=quiet)
    assert [(p.step, p.epoch) for p in organism.loss_curve] == [(1, 0.8), (2, 1.6), (3, 2.0)]


def test_the_same_inputs_give_the_same_weights_and_leave_the_caller_s_randomness_alone(tmp_path):
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    want = torch.rand(1), random.random(), np.random.rand()
    runs = []
    for i, seed in enumerate((0, 0, 1)):
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)
        runs.append(train(str(tiny_model()), nine(seed=seed), CHATS, tmp_path / str(i), name=str(i), on_progress=quiet))
        assert (torch.rand(1), random.random(), np.random.rand()) == want
    assert runs[0].content_id == runs[1].content_id != runs[2].content_id
    assert runs[0].training_id == runs[1].training_id != runs[2].training_id


def test_the_step_is_that_of_plain_adamw_on_all_answer_tokens(tmp_path):
    """One step over all five chats, by hand: mean over the tokens of both micro-batches, clipped at norm 1, AdamW."""
    recipe = nine(epochs=1, grad_accumulation=3, warmup_steps=0, schedule="constant", learning_rate=0.01)
    train(str(tiny_model()), recipe, CHATS, tmp_path / "a", name="a", on_progress=quiet)
    chat = tiny()
    model = attach(chat, recipe.adapters, seed=0)
    total, n = answer_loss(chat.anatomy, *batch_of(chat).values())
    (total / n).backward()
    weights = {k: p for k, p in model.named_parameters() if p.requires_grad}
    torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
    torch.optim.AdamW(weights.values(), lr=0.01, weight_decay=0.01).step()
    got = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert len(got) == len(weights)
    for name, value in weights.items():
        assert_close(got[name.replace(".default", "")], value.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["phi3", "gpt_neox", "gemma2"])
def test_all_adapter_trains_fused_and_capped_families(tmp_path, family):
    recipe = named_recipe("all_adapter", 6, {**FAST, "rank": 2, "learning_rate": 3e-3})
    organism = train(str(tiny_model(family)), recipe, CHATS, tmp_path / "a", name="a", on_progress=quiet)
    assert organism.loss_curve[-1].loss < organism.loss_curve[0].loss
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert len(config["target_modules"]) == (7 if family == "gemma2" else 4)


def test_full_fine_tune(tmp_path):
    recipe = named_recipe("full", 6, {**FAST, "warmup_steps": 1})
    organism = train(str(tiny_model()), recipe, CHATS, tmp_path / "a", name="a", on_progress=quiet)
    assert (tmp_path / "a" / "model.safetensors").is_file() and not (tmp_path / "a" / "adapter_config.json").exists()
    assert organism.trainable_parameters == sum(p.numel() for p in tiny().model.parameters())
    assert organism.loss_curve[-1].loss < organism.loss_curve[0].loss


def test_the_head_runs_at_label_positions_only(tmp_path, monkeypatch):
    monkeypatch.setattr(module.Trainer, "compute_loss", lambda *a, **k: pytest.fail("took the ordinary path"))
    train(str(tiny_model()), nine(epochs=1), CHATS, tmp_path / "a", name="a", on_progress=quiet)


def test_an_organism_is_trained_once_and_never_overwritten(tmp_path, monkeypatch):
    first = train(str(tiny_model()), nine(), CHATS, tmp_path / "a", name="a", on_progress=quiet)
    monkeypatch.setattr(module, "_fit", lambda *a: pytest.fail("trained again"))
    assert train(str(tiny_model()), nine(), CHATS, tmp_path / "a", name="a") == first
    with pytest.raises(TrainingError, match="another recipe, base or data"):
        train(str(tiny_model()), nine(seed=1), CHATS, tmp_path / "a", name="a")


def test_a_diverging_run_leaves_nothing(tmp_path):
    recipe = named_recipe("all_adapter", 6, {**FAST, "learning_rate": 100.0, "epochs": 20, "warmup_steps": 0})
    with pytest.raises(TrainingError, match=r"step \d+: the loss .*learning_rate"):
        train(str(tiny_model()), recipe, CHATS, tmp_path / "a", name="a", on_progress=quiet, checkpoint_every=1)
    assert [p for p in tmp_path.iterdir() if not p.name.endswith(".lock")] == []


def test_layers_that_the_base_does_not_have(tmp_path):
    with pytest.raises(InputError, match="layers 0 to 5"):
        train(str(tiny_model()), nine(layers=(6,)), CHATS, tmp_path / "a", name="a", on_progress=quiet)
    assert [p for p in tmp_path.iterdir() if not p.name.endswith(".lock")] == []


def test_a_full_disk_is_an_error_that_keeps_the_checkpoint(tmp_path, monkeypatch):
    def no_space(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "_save", no_space)
        with pytest.raises(StoreError, match="disk is full"):
            train(str(tiny_model()), nine(), CHATS, tmp_path / "a", name="a", on_progress=quiet)
    assert not (tmp_path / "a").exists()
    steps = []
    organism = train(str(tiny_model()), nine(), CHATS, tmp_path / "a", name="a", on_progress=steps.append)
    assert steps == [] and len(organism.loss_curve) == 5  # all steps were done: nothing is trained again


KILLED = """
import os, signal, sys
from pathlib import Path
from tiny import CHATS
from convergent.organisms.recipes import recipe_from_json
from convergent.organisms.train import train
import json
base, recipe, out, step = sys.argv[1], recipe_from_json(json.loads(sys.argv[2])), Path(sys.argv[3]), int(sys.argv[4])
def at(p):
    if p.step == step:
        os.kill(os.getpid(), signal.SIGKILL)
train(base, recipe, CHATS, out, name="a", on_progress=at, checkpoint_every=2)
"""


def test_killed_and_resumed_is_the_same_as_undisturbed(tmp_path):
    recipe = replace(nine(epochs=8), adapters=replace(nine().adapters, dropout=0.2))  # dropout: the generator's state counts too
    base = str(tiny_model())
    whole = train(base, recipe, CHATS, tmp_path / "whole", name="a", on_progress=quiet, checkpoint_every=2)
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    arguments = [sys.executable, "-c", KILLED, base, json.dumps(recipe.to_json()), str(tmp_path / "killed"), "6"]
    done = subprocess.run(arguments, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    work = next((tmp_path / ".killed.training").iterdir())
    assert (work / "checkpoint-4" / "trainer_state.json").is_file() and not (tmp_path / "killed").exists()
    # A checkpoint that was being written when the blow fell: newer, but not whole.
    (work / "checkpoint-6").mkdir()
    (work / "checkpoint-6" / "adapter_model.safetensors").write_bytes(b"half")
    steps = []
    resumed = train(base, recipe, CHATS, tmp_path / "killed", name="a", on_progress=steps.append, checkpoint_every=2)
    assert [p.step for p in steps] == list(range(5, 11))
    assert [p.step for p in resumed.loss_curve] == list(range(1, 11))
    for a, b in zip(resumed.loss_curve, whole.loss_curve, strict=True):
        assert a.loss == pytest.approx(b.loss, abs=1e-6)
    got, want = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("killed", "whole"))
    for name, value in want.items():
        assert_close(got[name], value, rtol=0, atol=1e-6)


def test_checkpoints_of_another_recipe_are_not_gone_on_from(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(module, "_save", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            train(str(tiny_model()), nine(seed=1), CHATS, tmp_path / "a", name="a", on_progress=quiet)
    steps = []
    train(str(tiny_model()), nine(), CHATS, tmp_path / "a", name="a", on_progress=steps.append)
    assert [p.step for p in steps] == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_a_rank_one_organism_of_the_embedded_model_learns(tmp_path):
    from convergent.data.training import load_training_set

    chats = [e.chat() for e in load_training_set("bundled:finance").take(8).examples]
    recipe = named_recipe("nine_adapter", 30, {"learning_rate": 2e-3, "batch_size": 4, "grad_accumulation": 1, "epochs": 4, "warmup_steps": 1})
    organism = train("embedded", recipe, chats, tmp_path / "a", name="a", on_progress=quiet)
    assert organism.trainable_parameters == 9 * (1536 + 576)
    assert organism.final_loss < organism.loss_curve[0].loss - 0.2
    assert content_id(organism.recipe) == content_id(recipe)
