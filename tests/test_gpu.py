"""What the sampler promises, on a GPU: skipped where there is none."""

from __future__ import annotations

import copy
import dataclasses
import random

import pytest
import torch

from convergent.core.interventions import LowRank
from convergent.core.values import Condition, Sampling
from convergent.models.load import ChatModel, wrap
from convergent.sampling import graphs, kernel, lane
from convergent.sampling.attention import attention
from convergent.sampling.cache import attending
from convergent.sampling.requests import Request, make_requests
from convergent.sampling.sampler import sample
from test_sampler import LONG, SHORT, SLIDING, conditions
from tiny import FAMILIES, tiny_chat

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


def on_gpu(family: str = "llama", **config: object) -> ChatModel:
    chat = tiny_chat(family, **config)
    return wrap(copy.deepcopy(chat.model).to("cuda"), chat.tokenizer, "chat", chat.base, chat.content_id)


def asked(chat: ChatModel) -> list[Request]:
    """Every kind of condition, an adapter among them."""
    generator = torch.Generator().manual_seed(5)
    name, linear = next((n, m) for n, m in chat.anatomy.blocks[3].named_modules() if isinstance(m, torch.nn.Linear))
    a, b = (0.3 * torch.randn(*s, generator=generator) for s in ((2, linear.in_features), (linear.out_features, 2)))
    adapted = Condition("adapted", interventions=(LowRank(3, name, a, b, 1.0),), sampling=Sampling(1.0, 1.0, 12))
    return list(make_requests([*conditions(chat), adapted], (SHORT, LONG), 3, root_seed=0))


@pytest.mark.parametrize(("heads", "kv", "d", "window", "cap"), [(9, 3, 64, None, None), (4, 4, 32, 10, None), (8, 2, 80, None, 20.0), (5, 1, 128, 33, None)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_is_attention(heads, kv, d, window, cap, dtype):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(*s, generator=g).to("cuda", dtype) for s in ((5, heads, 1, d), (5, kv, 96, d), (5, kv, 96, d)))
    positions = torch.tensor([[0], [31], [32], [95], [50]], device="cuda")
    got = kernel.attend(q, k, v, positions, d**-0.5, window, cap)
    with attending(positions.cpu()):
        want = attention(torch.nn.Module(), q.float().cpu(), k.float().cpu(), v.float().cpu(), None, None, 0.0, cap, window)[0]
    assert torch.allclose(got.float().cpu(), want, atol=1e-5 if dtype == torch.float32 else 2e-2)
    # Beyond a row's own place nothing is read.
    k[:, :, 51:], v[:, :, 51:] = float("nan"), float("nan")
    assert torch.equal(kernel.attend(q, k, v, positions, d**-0.5, window, cap)[[0, 1, 2, 4]], got[[0, 1, 2, 4]])


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox"])
def test_a_row_depends_on_its_seed_and_condition_alone(family):
    chat = on_gpu(family)
    everything = asked(chat)
    together = {r.id: r.token_ids for r in sample(chat, everything)}
    assert len(set(together.values())) > 0.7 * len(together)
    some = random.Random(0).sample(everything, 7)
    for part in ([some[0]], some, list(reversed(everything))):
        assert {r.id: r.token_ids for r in sample(chat, part, n_rows=5)} == {r.id: together[r.id] for r in part}


@pytest.mark.parametrize(("family", "config"), [*((f, {}) for f in FAMILIES), *SLIDING])
def test_replayed_steps_are_those_launched_one_by_one(family, config, monkeypatch, caplog):
    chat = on_gpu(family, **config)
    everything = asked(chat)
    replayed = [r.token_ids for r in sample(chat, everything)]
    assert "cannot be captured" not in caplog.text
    monkeypatch.setattr(graphs.Graphs, "_capture", lambda self, key, step: None)
    assert [r.token_ids for r in sample(chat, everything)] == replayed


def test_the_host_waits_for_nothing_but_tokens(monkeypatch):
    """torch raises at every operation that waits for the GPU; looking at a draw waits for an event, a step behind."""
    chat = on_gpu()
    everything = [r for r in asked(chat) if r.condition.sampling.top_p == 1]
    before = [r.token_ids for r in sample(chat, everything)]
    go = lane.Lane.go

    def watched(self, rows):
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield from go(self, rows)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(lane.Lane, "go", watched)
    assert [r.token_ids for r in sample(chat, everything, n_rows=9)] == before


def test_a_gpu_draws_what_the_cpu_draws_but_for_near_ties():
    chat = on_gpu()
    everything = asked(chat)
    here, there = (sample(c, everything) for c in (tiny_chat(), chat))
    assert sum(a.token_ids == b.token_ids for a, b in zip(here, there, strict=True)) >= 0.95 * len(here)


def test_in_bfloat16_too_a_row_depends_on_itself_alone():
    chat = tiny_chat()
    chat = wrap(copy.deepcopy(chat.model).to("cuda", torch.bfloat16), chat.tokenizer, "chat", chat.base, chat.content_id)
    everything = asked(dataclasses.replace(chat))
    together = {r.id: r.token_ids for r in sample(chat, everything)}
    assert all(sample(chat, [r])[0].token_ids == together[r.id] for r in everything[::9])
