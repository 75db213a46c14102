"""Work side by side gives what it gives one after the other: on one core there is one lane, and all else in these tests runs so."""

from __future__ import annotations

import threading

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from convergent.core.interventions import Ablate, Add
from convergent.core.values import Pair
from convergent.directions.margin import margins, token_logps
from convergent.directions.means import stream_means
from convergent.interventions.controls import Effects, answer_logprobs
from convergent.judging import minilm
from convergent.models.lanes import groups, in_lanes, lanes_on
from convergent.models.texts import Text
from convergent.organisms import fast
from convergent.organisms.chats import Row, collate, encode_chats
from convergent.organisms.recipes import named_recipe
from convergent.organisms.train import train
from test_sampler import DYNAMIC, LONGROPE, uncached
from test_train_fast import adapted, quiet
from tiny import CHATS, direction_for, n_hooks, tiny_chat, tiny_model

CPU = torch.device("cpu")
TEXTS = [Text(str(i), f"Question {i % 3}?", "word " * (1 + i) + "end") for i in range(7)]
PAIRS = [Pair(str(i), f"How do I save {i} coins?", "Spend " * (i + 1), "Keep some of them.") for i in range(5)]


@pytest.mark.parametrize(("n_cores", "expected"), [(1, (1, 1)), (2, (2, 1)), (8, (8, 1)), (9, (4, 2)), (64, (8, 8))])
def test_lanes_of_a_machine(cores, n_cores, expected):
    cores(n_cores)
    assert lanes_on(CPU) == expected
    assert lanes_on(torch.device("cuda")) == (1, n_cores)


def test_work_is_shared_out_in_order(cores):
    cores(3)
    seen = {}

    def work(k):
        seen[k] = (threading.get_ident(), torch.get_num_threads(), torch.is_inference_mode_enabled())
        return k * k

    with torch.inference_mode():
        assert in_lanes(work, range(8), CPU) == [k * k for k in range(8)]
    assert {s[1:] for s in seen.values()} == {(1, True)}
    assert all(seen[k][0] == seen[k % 3][0] for k in range(8)) and threading.get_ident() not in {s[0] for s in seen.values()}
    assert torch.get_num_threads() == 3
    assert in_lanes(work, [5], CPU) == [25] and seen[5] == (threading.get_ident(), 3, False)
    assert in_lanes(work, [], CPU) == []


def test_an_error_ends_all_lanes(cores):
    cores(2)
    done, failed = [], threading.Event()

    def work(k):
        if k == 1:
            threading.Timer(0.2, failed.set).start()
            raise ValueError("one")
        assert failed.wait(30)
        done.append(k)

    with pytest.raises(ValueError, match="one"):
        in_lanes(work, range(100), CPU)
    assert done == [0] and torch.get_num_threads() == 2 and not [t for t in threading.enumerate() if t.name == "lane"]


def test_groups_are_made_when_they_are_due(cores):
    cores(3)
    made = []
    for group in groups((made.append(k) or k for k in range(7)), CPU):
        assert made[-1] == group[-1]
    assert group == [6]


@pytest.mark.parametrize(("family", "config"), [("llama", {}), ("qwen2", {}), ("gpt2", {}), ("gemma2", {"sliding_window": 8}), DYNAMIC, LONGROPE])
def test_reading_side_by_side(cores, family, config):
    """Means, margins, projections, log-probabilities and effects, under interventions and with blocks that are not run again."""
    d, found = None, {}
    for n in (1, 3):
        cores(n)
        chat = uncached(family, **config)
        d = direction_for(chat) if d is None else d
        conditions = [(), (Add(d, 2, 3.0),), (Ablate(d),)]
        steps = []
        means = stream_means(chat, TEXTS, torch.eye(len(TEXTS), dtype=torch.float64), interventions=conditions[1], batch_tokens=40, on_batch=steps.append)
        effects = Effects(chat, TEXTS, batch_tokens=40)
        found[n] = {
            "means": means.means, "norm": means.token_norm, "logps": token_logps(chat, TEXTS, 40), "all": answer_logprobs(chat, TEXTS, conditions[2], 40),
            "effects": [effects.kl(c) for c in conditions], "steps": steps,
            "margins": [(m.condition, m.pair_id, m.bad, m.good, m.projection) for m in margins(chat, PAIRS, conditions, read=(d, 3), batch_tokens=60)],
        }  # fmt: skip
        assert n_hooks(chat.model) == 0
        assert not any("forward" in block.__dict__ for block in chat.anatomy.blocks)
    for key in ("means", "norm", "logps", "all", "effects"):
        assert_close(found[3][key], found[1][key], atol=1e-6, rtol=1e-5)
    assert found[3]["steps"] == found[1]["steps"] and len(found[1]["steps"]) > 3
    for many, one in zip(found[3]["margins"], found[1]["margins"], strict=True):
        assert many[:2] == one[:2]
        assert many[2:] == pytest.approx(one[2:], abs=1e-5)


def test_margins_do_not_depend_on_what_is_known(cores):
    cores(3)
    chat = tiny_chat()
    conditions = [(), (Add(direction_for(chat), 2, 3.0),)]
    every = margins(chat, PAIRS, conditions, batch_tokens=60)
    some = {(0, 3), (1, 0), (1, 4)}
    assert margins(chat, PAIRS, conditions, only=some, batch_tokens=60) == [m for m in every if (m.condition, int(m.pair_id)) in some]


def test_embeddings_side_by_side_are_the_same_bits(cores, monkeypatch):
    monkeypatch.setattr(minilm, "_TOKENS_PER_BATCH", 64)
    texts = [f"{'word ' * (i % 30)} number {i}" for i in range(40)]
    found = []
    for n in (1, 2):
        cores(n)
        found.append(minilm.embed(texts, (2, 6)))
    assert torch.equal(*found)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_gradients_are_summed_over_the_lanes(cores, family):
    chat, model = adapted(family)
    chats = encode_chats(chat.tokenizer, CHATS, named_recipe("all_adapter", chat.n_layers))
    fast.lighten(model)
    assert fast.pack_attention(chat, chats) is not None
    batch = collate(chats[:5])
    weights = [p for p in model.parameters() if p.requires_grad]
    total, n = fast.packed_loss(chat.anatomy, batch["input_ids"], batch["labels"])
    want = torch.autograd.grad(total / n, weights)
    for n_cores in (2, 3, 8):
        cores(n_cores)
        again, m = fast.loss_in_lanes(chat.anatomy, batch["input_ids"], batch["labels"], weights)
        assert m == n
        assert_close(again, total, rtol=1e-6, atol=0)
        assert_close(torch.autograd.grad(again / m, weights), want, atol=5e-6, rtol=1e-4)


def test_a_weight_that_no_lane_needs_has_no_gradient(cores):
    cores(2)
    chat, model = adapted("llama")
    rows = [Row((5, 6, 7, 8, 9), 2), Row((5, 6, 4, 3), 2), Row((5, 9, 9), 1)]
    assert fast.pack_attention(chat, rows) is not None
    batch = collate(rows)
    used, unused = next(p for p in model.parameters() if p.requires_grad), torch.nn.Parameter(torch.ones(3))
    total, _ = fast.loss_in_lanes(chat.anatomy, batch["input_ids"], batch["labels"], [used, unused])
    total.backward()
    assert used.grad is not None and used.grad.any() and unused.grad is None


def test_pieces_have_like_many_tokens():
    def labels(*lengths):
        return collate([Row(tuple(range(1, n + 2)), 1) for n in lengths])["labels"]

    assert fast.pieces(labels(10, 1, 2, 9, 8), 2) == [[0, 1, 2], [3, 4]]
    assert fast.pieces(labels(5, 5), 8) == [[0], [1]]
    assert fast.pieces(labels(3), 1) == [[0]]


def test_a_training_in_lanes_is_the_training(cores, tmp_path, monkeypatch):
    recipe = named_recipe("all_adapter", 6, {"learning_rate": 3e-3, "batch_size": 2, "grad_accumulation": 2, "epochs": 4, "warmup_steps": 1, "rank": 4})
    taken, own = [], fast.loss_in_lanes
    monkeypatch.setattr(fast, "loss_in_lanes", lambda *args: taken.append(torch.get_num_threads()) or own(*args))
    curves, weights = [], []
    for n in (1, 2):
        cores(n)
        made = train(str(tiny_model()), recipe, CHATS, tmp_path / str(n), name="a", on_progress=quiet)
        curves.append([p.loss for p in made.loss_curve])
        weights.append(load_file(tmp_path / str(n) / "adapter_model.safetensors"))
    assert set(taken) == {1, 2} and curves[0][-1] < curves[0][0]
    assert curves[1] == pytest.approx(curves[0], abs=1e-4)
    for key, value in weights[0].items():
        assert_close(weights[1][key], value, rtol=0, atol=1e-3)
