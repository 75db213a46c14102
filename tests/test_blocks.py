"""Blocks decoded in fewer steps: the same bits as by their own code, and only where nothing acts inside them."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

import convergent.sampling.blocks as blocks
import convergent.sampling.sampler as sampler
from convergent.core.interventions import Ablate, Add
from convergent.core.values import Condition, Question, Sampling
from convergent.interventions.hooks import applied_rows
from convergent.models.products import laid_out
from convergent.sampling.attention import ATTENTION, attention
from convergent.sampling.blocks import decoding_blocks
from convergent.sampling.requests import make_requests
from convergent.sampling.sampler import sample
from tiny import FAMILIES, direction_for, tiny_chat

KNOWN = {"llama", "qwen2", "smollm3"}
"""Families built so; of others no block is."""
QUESTIONS = (Question("a", ("What would you do with one wish?", "Is it safe?")), Question("b", ("Tell me three thoughts about people. " * 20,)))


@contextmanager
def as_it_is(*args):
    yield 0


def counted(monkeypatch):
    """How many blocks each run of the sampler decodes in fewer steps."""
    seen, own = [], decoding_blocks

    @contextmanager
    def counting(model, n_threads):
        with own(model, n_threads) as n:
            seen.append(n)
            yield n

    monkeypatch.setattr(sampler, "decoding_blocks", counting)
    return seen


def answers(chat, conditions, n=6):
    made = [Condition(name, "chat", chat.content_id, interventions, Sampling(1.0, top_p, 14)) for name, interventions, top_p in conditions]
    return [(a.condition, a.token_ids, a.finish) for a in sample(chat, list(make_requests(made, QUESTIONS, n, 0)), n_rows=7)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_the_blocks_own_code(monkeypatch, family, dtype):
    """Plain, with a push after a block, and with writes ablated in one block: the last runs as it is, beside others that do not."""
    chat = tiny_chat(family, dtype)
    v = direction_for(chat)
    conditions = [("plain", (), 1.0), ("pushed", (Add(v, 1, 2.0),), 0.9), ("ablated", (Ablate(v, site="all_writes", vector_layer=1, layers=(1,)),), 1.0)]
    seen = counted(monkeypatch)
    for some in (conditions[:2], conditions):
        found = answers(chat, some)
        with monkeypatch.context() as patch:
            patch.setattr(sampler, "decoding_blocks", as_it_is)
            assert answers(chat, some) == found
    pushed, ablated = seen
    assert (pushed > 0) == (family in KNOWN)
    assert ablated == max(0, pushed - 1)
    assert family != "smollm3" or pushed < chat.n_layers  # some of its layers have no positions
    assert not any("forward" in b.__dict__ for b in chat.anatomy.blocks)


def test_a_condition_beside_another_that_acts_inside_blocks_gets_the_same_answers():
    chat = tiny_chat(seed=77)  # no other test has it
    v = direction_for(chat)
    plain, ablated = ("plain", (), 1.0), ("ablated", (Ablate(v, site="all_writes", vector_layer=1),), 1.0)
    alone = answers(chat, [plain])
    assert [a for a in answers(chat, [plain, ablated]) if a[0] == "plain"] == alone


@pytest.mark.parametrize("change", ["output", "stored", "type", "error"])
def test_a_block_that_computes_something_else_keeps_its_own_code(monkeypatch, change):
    chat = tiny_chat(seed=77)  # no other test has it
    odd = chat.anatomy.blocks[2]
    own = odd.forward

    def forward(x, **kwargs):
        if change == "error":
            raise TypeError("unexpected keyword")
        if change == "stored":
            cos, sin = kwargs["position_embeddings"]
            kwargs["position_embeddings"] = cos, -sin
        y = own(x, **kwargs)
        return (y,) if change == "type" else y + 1e-6 if change == "output" else y

    monkeypatch.setattr(blocks, "_known", type(blocks._known)())
    monkeypatch.setitem(odd.__dict__, "forward", forward)
    with torch.inference_mode(), sampler.slot_attention(chat.model), decoding_blocks(chat, 1) as n:
        assert n == chat.n_layers - 1
        assert odd.__dict__["forward"] is forward
    assert odd.__dict__["forward"] is forward


@pytest.mark.parametrize(
    ("family", "settings", "some"),
    [
        ("mistral", {"sliding_window": 8}, False),  # its attention takes the window from the config
        ("mistral", {"sliding_window": None}, True),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2}, True),
    ],
)
def test_what_is_known_and_what_is_not(monkeypatch, family, settings, some):
    chat = tiny_chat(family, **settings)
    seen = counted(monkeypatch)
    found = answers(chat, [("plain", (), 1.0)])
    assert bool(seen[0]) == some
    monkeypatch.setattr(sampler, "decoding_blocks", as_it_is)
    assert answers(chat, [("plain", (), 1.0)]) == found


def test_rotary_positions_of_part_of_a_head_are_the_blocks_own_business():
    chat = tiny_chat(seed=77)  # no other test has it
    block = chat.anatomy.blocks[0]
    d = block.self_attn.head_dim
    x, cos = torch.ones(2, 1, chat.d_model), torch.ones(2, 1, d // 2)
    with torch.inference_mode(), sampler.slot_attention(chat.model), decoding_blocks(chat, 1) as n:
        assert n == chat.n_layers
        with pytest.raises(RuntimeError):  # as of plain Llama, and not a silent broadcast
            block(x, position_embeddings=(cos, cos), cache=None)


def test_it_holds_with_weights_laid_out_and_within_hooks():
    chat = tiny_chat(seed=77)  # no other test has it
    v = direction_for(chat)
    with torch.inference_mode(), sampler.slot_attention(chat.model), laid_out(chat.model), applied_rows(chat.anatomy, [(Add(v, 1, 2.0),)]):
        assert chat.model.config._attn_implementation == ATTENTION and callable(attention)
        with decoding_blocks(chat, 1) as n:
            assert n == chat.n_layers
