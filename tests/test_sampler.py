"""The sampler's promise: a row's tokens depend on its own seed and condition alone; and its draws follow the model."""

from __future__ import annotations

import inspect
import random
import threading
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

import convergent.sampling.lane as lane
import convergent.sampling.prefill as prefill
import convergent.sampling.sampler as sampler
from convergent.core.ids import seed, uniforms
from convergent.core.interventions import Ablate, AblateSubspace, Add
from convergent.core.values import NO_SYSTEM, Condition, Question, Sampling
from convergent.errors import InputError, ModelError
from convergent.interventions.controls import random_subspace
from convergent.interventions.hooks import applied
from convergent.models.anatomy import inspect_model
from convergent.models.cached import cache_name
from convergent.models.chat import encode_prompt
from convergent.models.load import ChatModel, load_base
from convergent.sampling import invariance
from convergent.sampling.attention import attention
from convergent.sampling.cache import SHARED_FROM
from convergent.sampling.draw import draw
from convergent.sampling.lane import Tally
from convergent.sampling.requests import Request, make_requests
from convergent.sampling.sampler import sample
from tiny import FAMILIES, direction_for, n_hooks, tiny_chat, tiny_model

SHORT = Question("short", ("What would you do with one wish?", "Is it safe?"))
LONG = Question("long", ("Tell me three thoughts about people and machines, how they work together and how they differ. " * 3,))
"""Its prompt is stored once for all rows that share it (SHARED_FROM); those of SHORT are copied."""
LONGROPE = ("phi3", {
    "original_max_position_embeddings": 64,
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64,
        "long_factor": [3.0, 5.0, 9.0, 12.0], "short_factor": [1.0, 1.0, 1.2, 1.3],
    }
})  # fmt: skip
DYNAMIC = ("llama", {"max_position_embeddings": 64, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}})
SLIDING = (
    ("mistral", {"sliding_window": 8}),
    ("gemma2", {"sliding_window": 8}),
    ("gemma3_text", {"sliding_window": 8}),
    ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2}),
    ("phi3", {"sliding_window": 8}),
    ("exaone4", {"sliding_window": 8, "sliding_window_pattern": 4}),
)
"""In exaone4 global layers are handed None, and have the window as an attribute."""


def conditions(chat: ChatModel, max_new_tokens: int = 10) -> list[Condition]:
    """One of every kind, with different sampling parameters."""
    v, w = direction_for(chat, 1), direction_for(chat, 2)
    basis = random_subspace(chat.d_model, 5, 0)
    kinds = {
        "plain": ((), Sampling(1.0, 1.0, max_new_tokens)),
        "steered": ((Add(v, 2, 3.0),), Sampling(1.0, 1.0, max_new_tokens)),
        "steered_hair_more": ((Add(v, 2, 3.0001),), Sampling(1.0, 1.0, max_new_tokens)),
        "ablated": ((Ablate(v),), Sampling(0.7, 0.9, max_new_tokens + 7)),
        "ablated_writes": ((Ablate(w, site="all_writes", vector_layer=1), Add(v, 4, -2.0)), Sampling(1.3, 0.5, max_new_tokens)),
        "subspace": ((Add(w, 0, 1.0), AblateSubspace(basis)), Sampling(1.0, 1.0, max_new_tokens)),
        "narrow_subspace": ((AblateSubspace(basis[:2], layers=(1, 3)),), Sampling(1.0, 1.0, max_new_tokens)),
        "greedy": ((), Sampling(0.0, 1.0, max_new_tokens)),
    }
    return [Condition(name, interventions=what, sampling=how) for name, (what, how) in kinds.items()]


def requests(chat: ChatModel, samples: int = 2, max_new_tokens: int = 10) -> list[Request]:
    return list(make_requests(conditions(chat, max_new_tokens), (SHORT, LONG), samples, root_seed=0))


def tokens(chat: ChatModel, wanted: list[Request], n_rows: int) -> list[tuple[int, ...]]:
    return [r.token_ids for r in sample(chat, wanted, n_rows=n_rows)]


def uncached(family: str, **config: object) -> ChatModel:
    """A tiny model whose config has values that cannot be hashed."""
    return load_base(str(tiny_model.__wrapped__(family, **config)), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def reference() -> dict[str, tuple[int, ...]]:
    """Token ids of every request, each drawn in a call of its own."""
    chat = tiny_chat()
    return {r.id: tokens(chat, [r], 1)[0] for r in requests(chat)}


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_row_depends_on_its_seed_and_condition_alone(reference, data):
    chat = tiny_chat()
    everything = requests(chat)
    some = data.draw(st.lists(st.sampled_from(everything), min_size=1, max_size=len(everything), unique_by=lambda r: r.id))
    n_rows = data.draw(st.integers(1, len(some) + 3) if len(some) < 12 else st.integers(4, 40))
    assert tokens(chat, some, n_rows) == [reference[r.id] for r in some]


@pytest.mark.parametrize("n_rows", [5, 200])
def test_all_rows_together_equal_each_alone(reference, n_rows):
    chat = tiny_chat()
    everything = requests(chat)
    assert len(set(reference.values())) > 0.8 * len(reference)  # rows differ, or the test shows nothing
    assert tokens(chat, everything, n_rows) == [reference[r.id] for r in everything]


@pytest.mark.parametrize("lag", [1, 2])
@pytest.mark.parametrize("n_rows", [1, 7, 200])
def test_looking_at_a_draw_later_changes_no_answer(reference, monkeypatch, lag, n_rows):
    """As on a GPU, where the host looks at a token while the next step is under way."""
    chat = tiny_chat()
    chat = replace(chat, stop_ids=frozenset(range(0, chat.model.config.vocab_size, 9)))
    everything = requests(chat)
    at_once = sample(chat, everything, n_rows=n_rows)
    assert {r.finish for r in at_once} == {"stop", "length"}
    monkeypatch.setattr(lane, "lag_on", lambda device: lag)
    tally, arrived = Tally(), []
    assert sample(chat, everything, arrived.append, n_rows=n_rows, tally=tally) == at_once
    assert sorted(r.id for r in arrived) == sorted(reference) and tally.tokens == sum(len(r.token_ids) for r in at_once)
    one = list(make_requests([Condition("one", sampling=Sampling(1.0, 1.0, 1))], (SHORT,), 12, 0))
    assert all(len(r.token_ids) <= 1 for r in sample(chat, one, n_rows=5))  # rows that leave with their first token


@pytest.fixture
def filled_up(monkeypatch):
    """Prompts are filled up to a multiple of SPAN tokens, as on a GPU."""
    init = prefill.Reader.__init__

    def fills_up(self, *args):
        init(self, *args)
        self.fills_up = True

    monkeypatch.setattr(prefill.Reader, "__init__", fills_up)


@pytest.mark.usefixtures("filled_up")
def test_a_prompt_that_is_filled_up_gives_the_same_answers(reference):
    """What is filled in is not looked at, and the prompt still depends on nothing but itself."""
    chat = tiny_chat()
    everything = requests(chat)
    filled = tokens(chat, everything, 16)
    assert sum(t == reference[r.id] for r, t in zip(everything, filled, strict=True)) >= len(filled) - 1  # another rounding, which a near tie may show
    assert [tokens(chat, [r], 1)[0] for r in everything] == filled


@pytest.mark.parametrize("panel", ["panel", "alone"])
def test_fallbacks_give_valid_and_order_independent_answers(reference, monkeypatch, panel):
    monkeypatch.setattr(invariance, "_known", {})
    monkeypatch.setattr(invariance, "rows_are_invariant", lambda *args: False)
    if panel == "alone":
        monkeypatch.setattr(invariance, "_linears_are_invariant", lambda *args: False)
    monkeypatch.setattr(invariance, "sharing_is_invariant", lambda *args: False)
    expected = invariance.Shape(32, 32) if panel == "panel" else invariance.Shape(1, 1)
    assert invariance.shape_of(tiny_chat(), 40) == expected
    chat = tiny_chat()
    everything = requests(chat)[:: 1 if panel == "panel" else 5]
    shuffled = random.Random(0).sample(everything, len(everything))
    first = dict(zip([r.id for r in everything], tokens(chat, everything, 40), strict=True))
    assert tokens(chat, shuffled, 7) == [first[r.id] for r in shuffled]
    greedy = [r for r in everything if r.condition.name == "greedy"]
    assert [first[r.id] for r in greedy] == [reference[r.id] for r in greedy]  # another rounding, the same answer


@pytest.mark.usefixtures("one_thread")
def test_probe_finds_a_product_that_depends_on_the_number_of_rows(monkeypatch):
    chat = tiny_chat()
    assert invariance.rows_are_invariant(chat, 64, 16)
    linear = torch.nn.functional.linear

    def rounding_by_size(x, w, *args):
        return linear(x, w, *args) + (1e-6 if len(x) == 17 else 0.0)

    monkeypatch.setattr(torch.nn.functional, "linear", rounding_by_size)
    assert not invariance.rows_are_invariant(chat, 64, 16)
    found = invariance._probe(chat, 64)  # with fewer at least, it never sees so many
    assert found.least <= 4
    assert found.panel is None


@pytest.mark.usefixtures("one_thread")
def test_probe_finds_a_shared_prompt_whose_sums_depend_on_who_shares_it(monkeypatch):
    chat = tiny_chat()
    assert invariance.sharing_is_invariant(chat)
    matmul = torch.matmul
    monkeypatch.setattr(torch, "matmul", lambda a, b: matmul(a, b) + (1e-6 if a.ndim == 3 and a.shape[1] % 5 == 0 else 0.0))
    assert not invariance.sharing_is_invariant(chat)


@pytest.mark.parametrize("shares", [True, False])
def test_a_long_prompt_is_stored_once(monkeypatch, shares):
    chat = tiny_chat()
    n_short, n_long = (len(encode_prompt(chat.tokenizer, q.paraphrases[0])) for q in (SHORT, LONG))
    assert n_short < SHARED_FROM <= n_long
    monkeypatch.setattr(invariance, "_known", {})
    monkeypatch.setattr(invariance, "sharing_is_invariant", lambda *args: shares)
    made, lengths = lane.SlotCache, []

    class Watched(made):
        def __init__(self, n_rows, length):
            super().__init__(n_rows, length)
            lengths.append((n_rows, self.length))

    for module in (lane, prefill):
        monkeypatch.setattr(module, "SlotCache", Watched)
    wanted = list(make_requests([Condition("plain", sampling=Sampling(1.0, 1.0, 20))], (LONG,), 12, 0))
    sample(chat, wanted)
    assert lengths[-2:] == [(12, 32 if shares else 192), (1, 160)]  # rows with their answers alone, or with the prompt


def test_a_long_prompt_stored_once_or_copied_gives_the_same_answers(reference, monkeypatch):
    monkeypatch.setattr(invariance, "_known", {})
    monkeypatch.setattr(invariance, "sharing_is_invariant", lambda *args: False)
    chat = tiny_chat()
    everything = requests(chat)
    copied = tokens(chat, everything, 16)
    alike = [t == reference[r.id] for r, t in zip(everything, copied, strict=True)]
    assert sum(alike) >= len(alike) - 1  # another rounding, which a near tie may show


@pytest.mark.parametrize(("family", "config"), [(f, {}) for f in FAMILIES] + list(SLIDING))
def test_greedy_equals_generate(family, config):
    chat = tiny_chat(family, **config)
    wanted = list(make_requests([Condition("greedy", sampling=Sampling(0.0, 1.0, 12))], (SHORT, LONG), 1, 0))
    for request, found in zip(wanted, sample(chat, wanted), strict=True):
        prompt = torch.tensor([encode_prompt(chat.tokenizer, request.question)])
        whole = chat.model.generate(prompt, do_sample=False, max_new_tokens=12, attention_mask=torch.ones_like(prompt))
        expected = whole[0, prompt.shape[1] :].tolist()
        stop = next((i for i, t in enumerate(expected) if t in chat.stop_ids), None)
        assert list(found.token_ids) == expected[:stop]
        assert found.finish == ("length" if stop is None else "stop")


@pytest.mark.usefixtures("filled_up")
@pytest.mark.parametrize(("family", "config"), [(f, {}) for f in FAMILIES] + list(SLIDING))
def test_greedy_equals_generate_where_prompts_are_filled_up(family, config):
    test_greedy_equals_generate(family, config)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_keeps_the_promise(family):
    chat = tiny_chat(family, **dict(SLIDING).get(family, {}))
    everything = requests(chat, samples=1, max_new_tokens=6)
    alone = [tokens(chat, [r], 1)[0] for r in everything]
    assert tokens(chat, everything, 9) == alone


@pytest.mark.parametrize(("n_cores", "n_lanes"), [(2, 2), (3, 3), (16, 8)])
def test_lanes_give_what_one_gives(reference, cores, n_cores, n_lanes):
    """Lanes share a queue and the prompts that were read; each has its own cache, rows and thread."""
    cores(n_cores)
    chat = tiny_chat()
    everything = requests(chat, samples=12)
    assert sampler.lanes_for(chat, len(everything)) == (n_lanes, 2 if n_cores > 8 else 1)
    tally = Tally()
    found = sample(chat, everything, n_rows=200, tally=tally)
    assert torch.get_num_threads() == n_cores
    assert [r.id for r in found] == [r.id for r in everything]
    assert {r.id: r.token_ids for r in found if r.id in reference} == reference
    assert (tally.answers, tally.tokens) == (len(everything), sum(len(r.token_ids) for r in found))
    shared = {(r.condition.content_id, r.question) for r in everything}
    assert tally.prefilled == sum(len(encode_prompt(chat.tokenizer, q)) for _, q in shared)


def test_an_error_in_one_lane_ends_all(cores, monkeypatch):
    cores(2)
    chat = tiny_chat()
    arrived = []
    decode = lane.Lane._decode

    def fails(self, rows):
        if len(arrived) > 3:
            raise ModelError("broken")
        return decode(self, rows)

    monkeypatch.setattr(lane.Lane, "_decode", fails)
    with pytest.raises(ModelError, match="broken"):
        sample(chat, requests(chat, samples=12), arrived.append, n_rows=64)
    assert not [t for t in threading.enumerate() if t.name == "sampler-lane"] and torch.get_num_threads() == 2


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to")])
def test_out_of_memory_halves_the_batch_and_loses_nothing(reference, monkeypatch, error, lag):
    chat = tiny_chat()
    monkeypatch.setattr(lane, "lag_on", lambda device: lag)
    decode = lane.Lane._decode

    def fails(self, rows):
        if len(self.active) > 9:
            raise error
        return decode(self, rows)

    monkeypatch.setattr(lane.Lane, "_decode", fails)
    tally = Tally()
    found = sample(chat, requests(chat), n_rows=32, tally=tally)
    assert {r.id: r.token_ids for r in found} == reference and tally.halved == 2
    monkeypatch.setattr(lane.Lane, "_decode", lambda self, rows: (_ for _ in ()).throw(error))
    with pytest.raises(ModelError, match="out of memory with a single row"):
        sample(chat, requests(chat)[:3], n_rows=2)


@pytest.mark.parametrize(("room", "left"), [(100, 64), (5, 4), (1, 1)])
def test_out_of_memory_halves_the_panel_too(reference, monkeypatch, room, left):
    """A machine with room for so many rows: a lane that goes on with a whole panel would never fit."""
    chat, held = tiny_chat(), []
    forward, halve = lane.Lane._forward, lane.Lane._halve

    def fails(self, ids, positions, cache, **more):
        if cache.n_rows > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, ids, positions, cache, **more)

    def halves(self, error):
        halve(self, error)
        held.append((self.limit, self.cache.n_rows))

    monkeypatch.setattr(sampler, "shape_of", lambda model, n_rows: invariance.Shape(512, 512))
    monkeypatch.setattr(sampler, "lanes_for", lambda model, n_rows: (1, 1))
    monkeypatch.setattr(invariance, "_linears_are_invariant", lambda *args: True)
    monkeypatch.setattr(lane.Lane, "_forward", fails)
    monkeypatch.setattr(lane.Lane, "_halve", halves)
    tally, everything = Tally(), requests(chat)[::3]
    found = sample(chat, everything * 60, n_rows=600, tally=tally)
    # 600 rows hold two panels, 300 one; from there on panels are halved and rows fill them.
    assert held[:3] == [(300, 512), (256, 256), (128, 128)] and held[-1] == (left, left) and len(found) == 60 * len(everything)
    assert tally.halved == len(held) == tally.panels + 1
    greedy = [(r.token_ids, reference[r.id]) for r in found if r.condition == "greedy"]
    assert greedy and all(a == b for a, b in greedy)  # another rounding, the same answer
    monkeypatch.setattr(lane.Lane, "_forward", lambda self, *args, **more: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(ModelError, match="out of memory with a single row"):
        sample(chat, everything[:3], n_rows=2)


def test_a_smaller_panel_is_one_in_which_a_place_does_not_matter(monkeypatch):
    chat = tiny_chat()
    monkeypatch.setattr(invariance, "_linears_are_invariant", lambda model, n, sizes: n != 16)
    assert invariance.smaller(chat, invariance.Shape(32, 32, True)) == invariance.Shape(8, 8, True)
    monkeypatch.setattr(invariance, "_linears_are_invariant", lambda *args: False)
    assert invariance.smaller(chat, invariance.Shape(32, 32)) == invariance.Shape(1, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_step_by_hand(family):
    """Token t is drawn with number t of the row's own stream from the logits of a whole forward pass, without cache or batch."""
    chat = tiny_chat(family)
    wanted = [r for r in requests(chat, samples=1) if r.condition.name != "greedy"]
    for request, found in zip(wanted, sample(chat, wanted), strict=True):
        s = request.condition.sampling
        ids, answer = list(encode_prompt(chat.tokenizer, request.question)), []
        while len(answer) < s.max_new_tokens:
            with torch.inference_mode(), applied(chat.anatomy, request.condition.interventions):
                logits = chat.model(torch.tensor([ids + answer])).logits[:, -1]
            u = uniforms(np.array([request.seed]), np.array([len(answer)]))
            token = drawn(logits, torch.from_numpy(u), s.temperature, s.top_p)[0]
            if token in chat.stop_ids:
                break
            answer.append(token)
        assert list(found.token_ids) == answer


def test_sampled_tokens_follow_the_model():
    chat = tiny_chat()
    n = 600
    wanted = list(make_requests([Condition("one", sampling=Sampling(0.8, 1.0, 1))], [Question("q", ("Is it safe?",))], n, 0))
    drawn = [(r.token_ids or (next(iter(chat.stop_ids)),))[0] for r in sample(chat, wanted, n_rows=64)]
    prompt = torch.tensor([encode_prompt(chat.tokenizer, "Is it safe?")])
    p = (chat.model(prompt).logits[0, -1].double() / 0.8).softmax(-1).numpy()
    likely = np.flatnonzero(p * n >= 5)
    counts = [drawn.count(int(t)) for t in likely]
    assert len(likely) >= 5
    assert chisquare([*counts, n - sum(counts)], [*(p[likely] * n), n * (1 - p[likely].sum())]).pvalue > 0.001


def test_places_are_refilled_and_answers_arrive_once():
    chat = tiny_chat()
    chat = replace(chat, stop_ids=frozenset(range(0, 384, 5)))  # most answers end early, at different lengths
    wanted = requests(chat, samples=4)
    arrived, tally = [], Tally()
    found = sample(chat, wanted, arrived.append, n_rows=6, tally=tally)
    assert sorted(r.id for r in arrived) == sorted(r.id for r in wanted)
    assert [r.id for r in found] == [r.id for r in wanted] and [r.id for r in arrived] != [r.id for r in wanted]
    assert {r.finish for r in found} == {"stop", "length"}
    limits = {r.id: r.condition.sampling.max_new_tokens for r in wanted}
    for r in found:
        assert not set(r.token_ids) & chat.stop_ids
        assert len(r.token_ids) == limits[r.id] if r.finish == "length" else len(r.token_ids) < limits[r.id]
    assert (tally.answers, tally.tokens) == (len(wanted), sum(len(r.token_ids) for r in found))
    shared = {(r.condition.content_id, r.question) for r in wanted}
    assert tally.prefilled == sum(len(encode_prompt(chat.tokenizer, q)) for _, q in shared)  # once per condition and prompt


def test_responses_say_what_was_asked():
    chat = tiny_chat(default_system="You are Tiny.")
    asked = [replace(SHORT, id=s, paraphrases=("Is it safe?",), system=s) for s in ("default", NO_SYSTEM, "Be brief.")]
    wanted = list(make_requests([Condition("greedy", sampling=Sampling(0.0, 1.0, 16))], asked, 1, 7))
    found = sample(chat, wanted)
    assert [r.system for r in found] == ["default", NO_SYSTEM, "Be brief."]
    assert len({r.token_ids for r in found}) == 3  # three prompts, three answers
    assert found[0].seed == seed(7, "sampling", "main", "default", 0, 0)
    assert found[0].response == chat.tokenizer.decode(found[0].token_ids, skip_special_tokens=True)


def test_conditions_share_random_numbers_and_names_do_not_matter():
    a, b = Condition("a"), Condition("b")
    of_a, of_b = (list(make_requests([c], [SHORT], 4, 0)) for c in (a, b))
    assert [r.seed for r in of_a] == [r.seed for r in of_b] and len({r.seed for r in of_a}) == 4
    assert [r.id for r in of_a] == [r.id for r in of_b]
    assert [(r.paraphrase, r.sample) for r in of_a] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    others = [list(make_requests([a], [SHORT], 4, 0, "reading")), list(make_requests([a], [SHORT], 4, 1))]
    assert not {r.seed for r in of_a} & {r.seed for other in others for r in other}


@pytest.mark.parametrize("fails", [False, True])
def test_model_is_as_before_afterwards(fails):
    chat = tiny_chat()
    ids = torch.arange(3, 20)[None]
    before = chat.model(ids).logits
    attention = chat.model.config._attn_implementation

    def stop(response):
        raise KeyboardInterrupt

    if fails:
        with pytest.raises(KeyboardInterrupt):
            sample(chat, requests(chat), stop, n_rows=4)
    else:
        sample(chat, requests(chat)[:3])
    assert chat.model.config._attn_implementation == attention != sampler.ATTENTION
    assert torch.equal(chat.model(ids).logits, before)
    assert not n_hooks(chat.model)


def test_refusals():
    chat = tiny_chat()
    with pytest.raises(InputError, match="n_rows"):
        sample(chat, [], n_rows=0)
    assert sample(chat, []) == []
    for values, name in (((-1.0, 1.0, 5), "temperature"), ((1.0, 0.0, 5), "top_p"), ((1.0, 1.5, 5), "top_p"), ((1.0, 1.0, 0), "max_new_tokens")):
        with pytest.raises(InputError, match=name):
            Sampling(*values)


def test_a_model_with_its_own_attention_is_refused():
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    chat = tiny_chat()
    size = {"max_position_embeddings": 128, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]}
    own = GPTNeoForCausalLM(GPTNeoConfig(vocab_size=len(chat.tokenizer), pad_token_id=0, **size)).eval()
    other = replace(chat, model=own, anatomy=inspect_model(own))
    with pytest.raises(ModelError, match="GPTNeoForCausalLM: its attention"):
        sample(other, make_requests([Condition("plain")], [SHORT], 1, 0))


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("recurrent_gemma", {"attention_window_size": 8, "lru_width": 32}),  # was sampled, with other tokens than the model's
        ("lfm2", {"layer_types": ["conv", "full_attention"] * 3, "block_auto_adjust_ff_dim": False}),
        ("jetmoe", {"kv_channels": 8, "num_local_experts": 4}),
        (
            "deepseek_v3",
            {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4}
            | {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 6},
        ),
    ],
)
def test_models_that_do_not_keep_and_read_keys_and_values_in_every_layer_are_refused(family, config):
    with pytest.raises(ModelError, match="ForCausalLM: its attention does not go .* choose another base"):
        tokens(uncached(family, **config), requests(tiny_chat())[:1], 1)


def test_a_prompt_is_not_shared_where_a_layer_attends_to_other_keys_than_it_stored(monkeypatch):
    chat = load_base(str(tiny_model()), dtype="float32", device="cpu")
    update = lane.SlotCache.update
    monkeypatch.setattr(lane.SlotCache, "update", lambda self, *a, **k: tuple(2 * t for t in update(self, *a, **k)))
    with pytest.raises(ModelError, match="its attention"):
        tokens(chat, requests(chat)[:1], 1)


def test_values_may_be_wider_than_keys():
    """One product serves rows that share a prompt, and rows may have their own."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(*s, generator=g) for s in ((3, 4, 1, 8), (3, 2, 1, 8), (3, 2, 1, 12)))
    prompt = lane.SlotCache(1, 40)
    prompt.begin(slice(0, 1), torch.arange(40)[None], 40)
    before = torch.randn(1, 2, 40, 8, generator=g), torch.randn(1, 2, 40, 12, generator=g)
    prompt.update(*before, 0)
    found = []
    for put in ("share_row", "copy_row"):
        cache = lane.SlotCache(3, 64)
        for row in range(3):
            getattr(cache, put)(prompt, row, 40)
        cache.begin(slice(0, 3), torch.full((3, 1), 40), 41 if put == "copy_row" else 1)
        found.append(attention(torch.nn.Module(), q, *cache.update(k, v, 0), None)[0])
    keys, values = (torch.cat([b.expand(3, -1, -1, -1), new], 2) for b, new in zip(before, (k, v), strict=True))
    want = torch.nn.functional.scaled_dot_product_attention(q, keys, values, enable_gqa=True).transpose(1, 2)
    assert want.shape == (3, 1, 4, 12)
    for out in found:
        torch.testing.assert_close(out, want)


@pytest.mark.parametrize(("family", "config"), [LONGROPE, DYNAMIC])
def test_rotary_positions_that_depend_on_the_longest_row_are_refused_beyond_their_length(family, config):
    chat = uncached(family, **config)
    n = len(encode_prompt(chat.tokenizer, SHORT.paraphrases[1]))
    asked = [Question("short", SHORT.paraphrases[1:])]
    for new in (64 - n, 65 - n):
        wanted = list(make_requests([Condition("plain", sampling=Sampling(1.0, 1.0, new))], asked, 2, 0))
        if n + new <= 64:
            sample(chat, wanted)
            continue
        message = f"a prompt of {n} tokens with {new} new ones makes 65, and beyond 64 .* set max_new_tokens to {64 - n} or less, or shorten the prompt"
        with pytest.raises(InputError, match=message):
            sample(chat, wanted)
    with pytest.raises(InputError, match="longest row of a batch; shorten the prompt"):
        sample(chat, make_requests([Condition("plain")], [LONG], 1, 0))


@pytest.mark.parametrize(("family", "size"), [("gpt2", "n_positions"), ("gpt_bigcode", "n_positions"), ("gptj", "n_positions"), ("biogpt", "max_position_embeddings")])
def test_answers_beyond_a_table_of_positions_are_refused_before_the_first(family, size):
    layers = {} if family == "biogpt" else {"n_embd": 32, "n_layer": 6, "n_head": 4} | ({"rotary_dim": 8} if family == "gptj" else {})
    chat = tiny_chat(family, **layers, **{"max_position_embeddings": 64, size: 64})
    n = len(encode_prompt(chat.tokenizer, SHORT.paraphrases[1]))
    asked = [Question("short", SHORT.paraphrases[1:])]
    sample(chat, make_requests([Condition("plain", sampling=Sampling(1.0, 1.0, 64 - n))], asked, 2, 0))
    arrived = []
    wanted = [Condition("plain", sampling=Sampling(1.0, 1.0, k)) for k in (1, 65 - n)]
    with pytest.raises(InputError, match=f"a prompt of {n} tokens with {65 - n} new ones makes 65, and .* has 64 positions; set max_new_tokens to {64 - n} or less"):
        sample(chat, make_requests(wanted, asked, 2, 0), arrived.append)
    assert not arrived


def test_answers_beyond_what_a_base_was_trained_on_are_said_to_be_once(caplog):
    chat = uncached("llama", max_position_embeddings=64)
    n = len(encode_prompt(chat.tokenizer, SHORT.paraphrases[1]))
    for new, times in ((64 - n, 0), (65 - n, 1), (70 - n, 1)):
        wanted = make_requests([Condition("plain", sampling=Sampling(1.0, 1.0, new))], [Question("short", SHORT.paraphrases[1:])], 1, 0)
        assert sample(chat, wanted) and caplog.text.count("was trained on 64 positions") == times


# --- draw -----------------------------------------------------------------------------------------------------------


def drawn(logits: torch.Tensor, u: float | torch.Tensor, temperature: float = 1.0, top_p: float = 1.0) -> list[int]:
    rows = len(logits)
    u = torch.full((rows,), u, dtype=torch.float64) if isinstance(u, float) else u
    return draw(logits, [temperature] * rows, [top_p] * rows, u)


@pytest.mark.parametrize(("vocabulary", "temperature"), [(3, 1.0), (256, 0.5), (777, 1.0), (5000, 2.0)])
def test_draw_is_the_inverse_cdf(vocabulary, temperature):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(50, vocabulary, generator=generator)
    u = torch.rand(50, dtype=torch.float64, generator=generator)
    cdf = (logits.double() / temperature).softmax(-1).cumsum(-1)
    for row, token in enumerate(drawn(logits, u, temperature)):
        assert (0.0 if token == 0 else cdf[row, token - 1]) - 1e-6 <= u[row] <= cdf[row, token] + 1e-6


def test_draw_has_the_right_frequencies():
    n, logits = 20_000, torch.linspace(-2, 2, 300)
    u = torch.from_numpy(uniforms(np.full(n, 5, dtype=np.uint64), np.arange(n)))
    found = np.bincount(drawn(logits.expand(n, -1), u), minlength=300)
    assert chisquare(found, logits.double().softmax(-1).numpy() * n).pvalue > 0.001


def test_draw_top_p():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()[None]
    grid = [i / 100 + 0.001 for i in range(100)]

    def reachable(top_p):
        return {drawn(logits, u, top_p=top_p)[0] for u in grid}

    assert [reachable(p) for p in (1e-9, 0.49, 0.51, 0.79, 0.81, 0.96, 1.0)] == [{0}, {0}, {0, 1}, {0, 1}, {0, 1, 2}, {0, 1, 2, 3}, {0, 1, 2, 3}]
    inside = [drawn(logits, u, top_p=0.51)[0] for u in grid]
    assert abs(inside.count(0) / 100 - 0.5 / 0.8) < 0.02  # what is kept is rescaled
    ties = torch.zeros(1, 4)
    assert {drawn(ties, u, top_p=0.3)[0] for u in grid} == {0, 1, 2, 3}  # equals are not told apart by their number
    rows = torch.cat([logits, logits])
    assert draw(rows, [1.0, 1.0], [0.1, 1.0], torch.tensor([0.97, 0.97], dtype=torch.float64)) == [0, 3]


def test_draw_finds_a_nucleus_wider_than_its_first_look():
    logits = torch.cat([torch.zeros(3000), torch.full((2000,), -0.01)])[None]  # 2,990 or so of the first make 0.6
    found = {drawn(logits, i / 2000, top_p=0.6)[0] for i in range(2000)}
    assert max(found) < 3000 and len(found) > 1900


@settings(max_examples=100, deadline=None)
@given(
    seed_=st.integers(0, 2**32 - 1),
    u=st.one_of(st.floats(0, 1, exclude_max=True), st.sampled_from([0.0, 5e-324, 0.25, 0.5, 1 - 2.0**-53])),
    vocabulary=st.sampled_from([1, 2, 255, 256, 257, 600]),
    top_p=st.sampled_from([1.0, 0.999999, 0.5]),
)
def test_a_token_of_no_weight_is_never_drawn(seed_, u, vocabulary, top_p):
    generator = torch.Generator().manual_seed(seed_)
    logits = torch.randn(3, vocabulary, generator=generator) * 4
    masked = torch.rand(3, vocabulary, generator=generator) < 0.9
    masked[:, int(torch.randint(vocabulary, (1,), generator=generator))] = False
    logits[masked] = float("-inf")
    for row, token in enumerate(drawn(logits, u, top_p=top_p)):
        assert not masked[row, token]


def test_draw_at_the_ends_and_greedy():
    logits = torch.full((1, 600), float("-inf"))
    logits[0, [7, 300, 511]] = 0.0
    assert drawn(logits, 0.0) == [7] and drawn(logits, 1 - 2.0**-53) == [511]
    logits[0, 300] = 1.0
    assert drawn(logits, 0.99, temperature=0.0) == [300]
    assert draw(logits.expand(2, -1), [0.0, 1.0], [1.0, 1.0], torch.full((2,), 0.99, dtype=torch.float64)) == [300, 511]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_an_error(bad):
    logits = torch.zeros(2, 10)
    logits[1, 3] = bad
    with pytest.raises(ModelError, match="not finite"):
        drawn(logits, 0.5)


# --- random numbers -------------------------------------------------------------------------------------------------


def splitmix(state: int, n: int) -> float:
    """Number n of SplitMix64 from `state`, in plain integers."""
    z = (state + (n + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return ((z ^ (z >> 31)) >> 11) / 2**53


def test_uniforms_golden():
    # SplitMix64 from state 1234567 gives 6457827717110365317 first (the reference implementation's test vector).
    assert uniforms(np.array([1234567]), np.array([0]))[0] == (6457827717110365317 >> 11) / 2**53
    seeds, counters = np.array([0, 1, 2**62 + 3, 2**63 - 1], dtype=np.uint64), np.array([0, 5, 599, 3])
    assert uniforms(seeds, counters).tolist() == [splitmix(int(s), int(c)) for s, c in zip(seeds, counters, strict=True)]


def test_named_seeds():
    assert seed("sampling", 0, "ruler", 3) == 8076209735164660671  # sha256 of ["sampling", 0, "ruler", 3]
    names = {seed("sampling", block, q, s) for block in ("main", "reading") for q in "abc" for s in range(50)}
    assert len(names) == 300 and all(0 <= s < 2**63 for s in names)
    assert seed(1) != seed("1")


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_goes_by_the_name_that_the_model_has(name, monkeypatch):
    """transformers renames it: the old name warns from 5.24 on and is gone later."""
    chat = tiny_chat()
    whole, called = chat.model.forward, []

    def forward(*args, **kwargs):
        called.append(name in kwargs)
        held = kwargs.pop(name)
        return whole(*args, **kwargs, **{cache_name(type(chat.model)): held})

    names = ["input_ids", "position_ids", name, "use_cache", "logits_to_keep"]
    forward.__signature__ = inspect.Signature([inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in names])
    everything = requests(chat, samples=1)
    expected = [r.token_ids for r in sample(chat, everything)]
    monkeypatch.setitem(chat.model.__dict__, "forward", forward)  # not setattr, which would leave the method behind
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        assert [r.token_ids for r in sample(chat, everything)] == expected
    assert called and all(called)


def test_a_question_may_be_its_text() -> None:
    import convergent as cv

    chat, few = tiny_chat(), Sampling(max_new_tokens=4)
    asked = [Question(SHORT.paraphrases[0], SHORT.paraphrases[:1])]
    by_text = cv.answer(chat, [SHORT.paraphrases[0]], samples=2, sampling=few)
    assert [r.token_ids for r in by_text] == [r.token_ids for r in cv.answer(chat, asked, samples=2, sampling=few)] and len(by_text) == 2
