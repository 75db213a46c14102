"""What conditions share of a prompt is read once, with the bits of a pass of one's own."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from convergent.core.interventions import Ablate, Add, LowRank
from convergent.core.values import Condition, Question, Sampling
from convergent.models.load import ChatModel
from convergent.sampling import proof, stems
from convergent.sampling.requests import Request, make_requests
from convergent.sampling.sampler import sample
from tiny import FAMILIES, direction_for, tiny_chat

QUESTIONS = (Question("a", ("What would you do with one wish?",)), Question("b", ("Is it safe?",)))


def asked(chat: ChatModel, samples: int = 2) -> list[Request]:
    """Conditions that begin to differ from the chat model at the embedding, after blocks 0, 1 and 2, inside block 3, and never."""
    v, generator = direction_for(chat, 1), torch.Generator().manual_seed(0)
    name, linear = next((n, m) for n, m in chat.anatomy.blocks[3].named_modules() if isinstance(m, torch.nn.Linear))
    a, b = (torch.randn(*shape, generator=generator) for shape in ((1, linear.in_features), (linear.out_features, 1)))
    kinds = {
        "writes": Ablate(v, site="all_writes"),
        "all": Ablate(v),
        "early": Add(v, 1, 3.0),
        "later": Add(v, 2, 3.0),
        "adapter": LowRank(3, name, a, b, 1.0),
        "other": Add(v, 2, -3.0),
    }
    conditions = [Condition("plain", sampling=Sampling(1.0, 1.0, 6))]
    conditions += [Condition(n, interventions=(i,), sampling=Sampling(1.0, 1.0, 6)) for n, i in kinds.items()]
    return list(make_requests(conditions, QUESTIONS, samples, 0))


def reads(chat: ChatModel, wanted: list[Request], monkeypatch: pytest.MonkeyPatch) -> tuple[list[tuple[int, ...]], Counter[int]]:
    """Tokens, and how often each block was run over a prompt."""
    seen: Counter[int] = Counter()
    with monkeypatch.context() as patched:
        for layer, block in enumerate(chat.anatomy.blocks):
            own = block.forward

            def forward(x, *args, own=own, layer=layer, **kwargs):
                seen[layer] += x.shape[1] > 1
                return own(x, *args, **kwargs)

            patched.setitem(block.__dict__, "forward", forward)
        proof.prove(chat, (1, 2, 3))
        found = [r.token_ids for r in sample(chat, wanted, n_rows=16)]
    return found, seen


@pytest.mark.usefixtures("one_thread")
def test_blocks_below_every_change_are_run_once_for_a_prompt(monkeypatch):
    chat = tiny_chat()
    wanted = asked(chat)
    expected = [sample(chat, [r])[0].token_ids for r in wanted]
    sample(chat, wanted)  # what is tried once has been
    found, seen = reads(chat, wanted, monkeypatch)
    assert found == expected
    # "plain" is read first, so that only what a condition changes is run for it: writes all, all 1 and up, early 2 and up, later and other 3, adapter 3.
    assert [seen[layer] for layer in range(4)] == [2 * n for n in (2, 3, 4, 7)]


@pytest.mark.usefixtures("one_thread")
def test_without_room_every_prompt_is_read_as_if_alone(monkeypatch):
    chat = tiny_chat()
    wanted = asked(chat)
    expected, fewer = reads(chat, wanted, monkeypatch)
    monkeypatch.setattr(stems, "MOST_KEPT", 0)
    found, seen = reads(chat, wanted, monkeypatch)
    assert found == expected
    assert {seen[layer] for layer in range(chat.n_layers)} == {14}
    assert all(fewer[layer] < 14 for layer in range(3))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_beginning_changes_no_answer(family):
    chat = tiny_chat(family)
    wanted = asked(chat, samples=1)
    assert [r.token_ids for r in sample(chat, wanted)] == [sample(chat, [r])[0].token_ids for r in wanted]


@pytest.mark.usefixtures("one_thread")
def test_nothing_is_kept_when_the_last_condition_has_read_a_prompt(monkeypatch):
    made: list[stems.Stems] = []
    init = stems.Stems.__init__
    most = []

    def watched(self, *args):
        made.append(self)
        init(self, *args)

    put = stems.Stems._put

    def putting(self, *args):
        put(self, *args)
        most.append(self._n_bytes)

    monkeypatch.setattr(stems.Stems, "__init__", watched)
    monkeypatch.setattr(stems.Stems, "_put", putting)
    chat = tiny_chat()
    sample(chat, asked(chat))
    (only,) = made
    assert max(most) > 0 and only._n_bytes == 0 and not only._found


@pytest.mark.usefixtures("one_thread")
def test_a_model_that_remembers_its_last_pass_is_not_resumed(monkeypatch):
    chat = tiny_chat(seed=78)
    block, calls = chat.anatomy.blocks[-1], Counter()
    own = block.forward

    def forward(*args, **kwargs):
        calls["n"] += 1
        return own(*args, **kwargs) * (1 + 1e-3 * (calls["n"] % 2))

    monkeypatch.setitem(block.__dict__, "forward", forward)
    assert not proof.resumes(chat, (1, 2, 3, 4))
    assert proof.resumes(tiny_chat(), (1, 2, 3, 4))
