"""Streaming means against whole-data ones from transformers' own hidden states, and the batches they run in."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from convergent.core.interventions import Add
from convergent.directions.means import block_outputs, span_of, stream_means
from convergent.errors import InputError
from convergent.interventions.hooks import applied
from convergent.models.chat import encode_answer
from convergent.models.texts import Text, batches, padded
from tiny import FAMILIES, SENTENCES, direction_for, n_hooks, tiny_chat

TEXTS = [Text(str(i), s.partition("? ")[0] + "?", (s.partition("? ")[2] or "A walk.")[: 9 + 13 * i]) for i, s in enumerate(SENTENCES)]


def hidden_of(chat, text: Text, span: str = "answer") -> torch.Tensor:
    """(n_layers, n_tokens of the span, d_model) at the output of every block, from a pass over one text alone."""
    e = encode_answer(chat.tokenizer, text.question, text.answer, text.system)
    last = []
    handle = chat.anatomy.final_norm.register_forward_pre_hook(lambda m, args: last.append(args[0]))
    with torch.inference_mode():
        states = chat.model(torch.tensor([e.ids]), output_hidden_states=True).hidden_states
    handle.remove()
    # Row l is hidden_states[l + 1]; after the last block transformers shows the norm's output, so that row is the norm's input.
    return torch.stack([*states[1:-1], last[0]])[:, 0, span_of(e, span)].double()


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_equals_whole_data(family):
    chat = tiny_chat(family)
    weights = torch.tensor([[1.0, 1, 1, 1, 1], [1, 0, 0, 0.5, 0], [0, 1, 0, 0, 1]])
    found = stream_means(chat, TEXTS, weights, batch_tokens=150)
    each = [hidden_of(chat, t) for t in TEXTS]
    for k, w in enumerate(weights):
        sums = sum(float(w[i]) * h.sum(1) for i, h in enumerate(each))
        mass = sum(float(w[i]) * h.shape[1] for i, h in enumerate(each))
        assert_close(found.means[k], sums / mass, atol=1e-4, rtol=1e-4)
    tokens = torch.cat(each, dim=1)
    assert_close(found.token_norm, tokens.norm(dim=2).mean(1), atol=1e-4, rtol=1e-4)
    assert found.n_tokens == tokens.shape[1]
    assert found.means.dtype == torch.float64 and found.means.shape == (3, chat.n_layers, chat.d_model)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("span", ["answer", "paper"])
def test_a_question_with_many_answers_is_read_once(family, span):
    """Same means as from passes over each text alone, under an intervention too, from fewer tokens."""
    chat = tiny_chat(family)
    texts = [Text(f"{q}{i}", f"{'A longer ' * q}question?", "word " * (1 + 3 * i)) for q in range(2) for i in range(5)]
    interventions = [Add(direction_for(chat), 1, 2.0)]
    tokens = []
    handle = chat.anatomy.blocks[0].register_forward_pre_hook(lambda m, args, kwargs: tokens.append((args[0] if args else kwargs["hidden_states"]).shape), with_kwargs=True)
    found = stream_means(chat, texts, torch.ones(1, len(texts)), span=span, interventions=interventions, batch_tokens=150)
    handle.remove()
    alone = [stream_means(chat, [t], torch.ones(1, 1), span=span, interventions=interventions) for t in texts]
    total = sum(m.means[0] * m.n_tokens for m in alone) / sum(m.n_tokens for m in alone)
    assert_close(found.means[0], total, atol=1e-4, rtol=1e-4)
    assert found.n_tokens == sum(m.n_tokens for m in alone)
    encoded = [encode_answer(chat.tokenizer, t.question, t.answer) for t in texts]
    read = [e.ids[: span_of(e, span).stop] for e in encoded]
    # A batch boundary splits a question at most.
    assert len({r[: k + 1] for r in read for k in range(len(r))}) <= sum(n for _, n, _ in tokens) < 0.6 * sum(map(len, read)) and all(rows == 1 for rows, _, _ in tokens)


def test_layer_numbering():
    """Row l is the output of block l: an addition at block l is seen from row l on, and no row before."""
    chat = tiny_chat()
    ones, d = torch.ones(1, len(TEXTS)), direction_for(chat)
    plain = stream_means(chat, TEXTS, ones).means[0]
    for layer in (0, 3, 5):
        steered = stream_means(chat, TEXTS, ones, interventions=[Add(d, layer, 2.0)]).means[0]
        assert torch.equal(steered[:layer], plain[:layer])
        assert_close(steered[layer] - plain[layer], 2.0 * d[layer].double(), atol=1e-5, rtol=0)
        assert (steered[layer + 1 :] - plain[layer + 1 :]).norm(dim=1).min() > 1e-2 if layer < 5 else True


@pytest.mark.parametrize("span", ["answer", "paper"])
@pytest.mark.parametrize("per", ["tokens", "responses"])
def test_pooling_and_spans(span, per):
    chat = tiny_chat()
    each = [hidden_of(chat, t, span) for t in TEXTS]
    found = stream_means(chat, TEXTS, torch.ones(1, len(TEXTS)), per=per, span=span).means[0]
    expected = torch.cat(each, 1).mean(1) if per == "tokens" else torch.stack([h.mean(1) for h in each]).mean(0)
    assert_close(found, expected, atol=1e-5, rtol=1e-5)
    others = {"tokens": torch.stack([h.mean(1) for h in each]).mean(0), "responses": torch.cat(each, 1).mean(1)}
    assert (found - others[per]).abs().max() > 1e-3  # the two ways differ on texts of unequal length


def test_the_paper_span_has_header_and_closing():
    chat = tiny_chat()
    e = encode_answer(chat.tokenizer, "Q?", "An answer.")
    assert chat.tokenizer.decode(e.ids[span_of(e, "answer")]) == "An answer."
    assert chat.tokenizer.decode(e.ids[span_of(e, "paper")]) == "<|im_start|>assistant\nAn answer.<|im_end|>\n"


@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(len(TEXTS))), batch_tokens=st.sampled_from([1, 60, 130, 10_000]))
def test_batch_size_and_order_do_not_matter(order, batch_tokens):
    chat = tiny_chat()
    weights = torch.tensor([[1.0, 2, 3, 4, 5]])
    a = stream_means(chat, TEXTS, weights, batch_tokens=10_000)
    b = stream_means(chat, [TEXTS[i] for i in order], weights[:, list(order)], batch_tokens=batch_tokens)
    assert_close(a.means, b.means, atol=1e-5, rtol=1e-5)
    assert_close(a.token_norm, b.token_norm, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_batch_equals_single_rows(family):
    chat = tiny_chat(family)
    sequences = [encode_answer(chat.tokenizer, t.question, t.answer).ids for t in TEXTS]
    ids, mask = padded(sequences, torch.device("cpu"))
    with torch.inference_mode():
        together = chat.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        for row, s in enumerate(sequences):
            alone = chat.model(input_ids=torch.tensor([s])).logits[0]
            assert_close(together[row, : len(s)], alone, atol=1e-4, rtol=0)


def test_padding_is_on_the_right():
    ids, mask = padded([(5, 6, 7), (8,)], torch.device("cpu"))
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]] and mask.tolist() == [[1, 1, 1], [1, 0, 0]]


@given(lengths=st.lists(st.integers(1, 300), max_size=40), batch_tokens=st.integers(1, 2000))
def test_batches(lengths, batch_tokens):
    found = list(batches(lengths, batch_tokens))
    assert sorted(i for b in found for i in b) == list(range(len(lengths)))
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= batch_tokens for b in found)


def test_block_outputs_see_what_the_next_block_sees():
    chat = tiny_chat()
    seen = {}
    intervention = Add(direction_for(chat), 2, 100.0)
    with torch.inference_mode(), applied(chat.anatomy, [intervention]), block_outputs(chat.anatomy, lambda layer, h: seen.setdefault(layer, h)):
        inputs = []
        handle = chat.anatomy.blocks[3].register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
        chat.model(torch.arange(3, 9)[None])
        handle.remove()
    assert torch.equal(seen[2], inputs[0]) and sorted(seen) == list(range(chat.n_layers))
    assert not n_hooks(chat.model)


def test_empty_accumulators_are_refused_and_empty_answers_weigh_nothing():
    chat = tiny_chat()
    with pytest.raises(InputError, match="no answer tokens"):
        stream_means(chat, TEXTS, torch.zeros(1, len(TEXTS)))
    with pytest.raises(InputError, match="no answer tokens"):
        stream_means(chat, [Text("a", "Q?", "")], torch.ones(1, 1))
    for per in ("tokens", "responses"):
        with_empty = stream_means(chat, [*TEXTS, Text("e", "Q?", "")], torch.ones(1, len(TEXTS) + 1), per=per)
        assert_close(with_empty.means, stream_means(chat, TEXTS, torch.ones(1, len(TEXTS)), per=per).means, atol=1e-5, rtol=1e-5)


def test_progress():
    done = []
    stream_means(tiny_chat(), TEXTS, torch.ones(1, len(TEXTS)), batch_tokens=100, on_batch=done.append)
    assert sum(done) == len(TEXTS) and len(done) > 1
