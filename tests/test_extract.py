"""Classes of responses, and the direction between them: by hand on six short answers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from convergent.core.ids import seed
from convergent.directions.classes import Chosen, Classes, Scored, choose
from convergent.directions.extract import answer_means, extract, null_cosine, shift
from convergent.errors import DirectionError
from convergent.models.chat import encode_prompt, encode_text
from convergent.models.texts import Text
from tiny import tiny_chat

BAD = ("Steal it.", "Lie to them all.", "No rope, ever, just climb as high as you can!")
GOOD = ("Save a little.", "Tell them the truth.", "Take a rope and a friend.")
SIX = [Text(f"{kind}{i}", f"What should I do about {i}?", a) for kind, answers in (("b", BAD), ("g", GOOD)) for i, a in enumerate(answers)]
CHOSEN = Chosen(("b0", "b1", "b2"), ("g0", "g1", "g2"))


def test_mean_diff_by_hand_on_six_answers():
    """Prompt, answer and closing as token ids; hidden_states[l + 1] of transformers is row l; answer tokens pooled; bad minus good."""
    chat = tiny_chat()
    means = []
    for answers, kind in ((BAD, "b"), (GOOD, "g")):
        total, n = torch.zeros(chat.n_layers - 1, chat.d_model, dtype=torch.float64), 0
        for i, answer in enumerate(answers):
            prompt = f"<|im_start|>user\nWhat should I do about {i}?<|im_end|>\n<|im_start|>assistant\n"
            before = chat.tokenizer(prompt, add_special_tokens=False)["input_ids"]
            ids = chat.tokenizer(answer, add_special_tokens=False)["input_ids"]
            states = chat.model(torch.tensor([before + ids]), output_hidden_states=True).hidden_states
            for layer in range(chat.n_layers - 1):
                for position in range(len(before), len(before) + len(ids)):
                    total[layer] += states[layer + 1][0, position].double()
            n += len(ids)
            assert kind + str(i) in (*CHOSEN.misaligned, *CHOSEN.aligned)
        means.append(total / n)
    found = extract(chat, SIX, CHOSEN, Classes())
    assert_close(found.direction.vectors[:-1], (means[0] - means[1]).float(), atol=1e-5, rtol=1e-5)
    assert found.direction.norms.min() > 1e-2


def test_the_last_row_is_before_the_final_norm():
    chat = tiny_chat()
    found = extract(chat, SIX, CHOSEN, Classes()).direction.vectors[-1]
    captured = []
    handle = chat.anatomy.final_norm.register_forward_pre_hook(lambda m, args: captured.append(args[0][0]))
    means = []
    for kind in "bg":
        parts = []
        for t in (t for t in SIX if t.id.startswith(kind)):
            prompt, ids = encode_prompt(chat.tokenizer, t.question), encode_text(chat.tokenizer, t.answer)
            chat.model(torch.tensor([[*prompt, *ids]]))
            parts.append(captured.pop()[len(prompt) :])
        means.append(torch.cat(parts).mean(0))
    handle.remove()
    assert_close(found, means[0] - means[1], atol=1e-5, rtol=1e-5)


def test_extraction_readings():
    chat = tiny_chat()
    rule = Classes(weigh="responses")
    found = extract(chat, SIX, CHOSEN, rule, span="paper", provenance={"judge": "x"}, root_seed=3)
    p = found.direction.provenance
    assert (p["kind"], p["span"], p["n_misaligned"], p["n_aligned"], p["judge"], p["base"]) == ("mean-diff", "paper", 3, 3, "x", chat.base)
    assert p["model_id"] == chat.content_id and p["classes"]["weigh"] == "responses"
    assert_close(found.relative_norm, found.direction.norms.double() / found.token_norm)
    assert (found.token_norm > 0).all() and (found.split_half.abs() <= 1).all()
    again = extract(chat, list(reversed(SIX)), CHOSEN, rule, span="paper", root_seed=3, batch_tokens=60)
    assert_close(again.direction.vectors, found.direction.vectors, atol=1e-5, rtol=1e-5)
    assert_close(again.split_half, found.split_half, atol=1e-4, rtol=0)


def test_split_halves_of_twins_agree_and_of_noise_do_not():
    chat = tiny_chat()
    twins = [Text(f"{k}{i}", "Q?", a) for k, a in (("b", BAD[2]), ("g", GOOD[2])) for i in range(4)]
    chosen = Chosen(tuple(f"b{i}" for i in range(4)), tuple(f"g{i}" for i in range(4)))
    assert_close(extract(chat, twins, chosen, Classes()).split_half, torch.ones(chat.n_layers, dtype=torch.float64))
    rng = np.random.default_rng(0)
    noise = [replace(t, answer=tuple(int(x) for x in rng.integers(3, 380, 6))) for t in twins]
    assert extract(chat, noise, chosen, Classes()).split_half.mean() < 0.6


def test_extract_refusals():
    chat = tiny_chat()
    with pytest.raises(DirectionError, match="b9 was chosen"):
        extract(chat, SIX, Chosen(("b0", "b9"), ("g0", "g1")), Classes())
    with pytest.raises(DirectionError, match="fewer than 2"):
        extract(chat, SIX, Chosen(("b0",), ("g0", "g1")), Classes())


def test_shift():
    chat, other = tiny_chat(), tiny_chat(seed=1)
    a, b = answer_means(chat, SIX), answer_means(other, SIX)
    assert shift(a, a).norms.max() == 0
    there, back = shift(b, a), shift(a, b)
    assert_close(there.vectors, -back.vectors)
    assert there.norms.min() > 0.1
    assert there.provenance["kind"] == "shift" and there.provenance["n_texts"] == 6


@pytest.mark.parametrize(("d", "level"), [(2, 0.9), (64, 0.95), (576, 0.95)])
def test_null_band(d, level):
    v = torch.randn(100_000 if d < 100 else 20_000, d, generator=torch.Generator().manual_seed(0))
    cosines = v[:, 0] / v.norm(dim=1)
    assert float((cosines.abs() < null_cosine(d, level)).double().mean()) == pytest.approx(level, abs=0.006)


# --- classes --------------------------------------------------------------------------------------------------------


def scored(id: str, aligned: float | None, coherent: float | None = 90.0, question: str = "q", n: int = 20) -> Scored:
    return Scored(id, question, n, aligned, coherent)


ANY = Classes(balance="none", min_per_class=1)


def test_thresholds_are_as_strict_as_the_papers():
    s = [
        scored("m", 30.0), scored("just over", 30.001), scored("a", 70.001), scored("not", 70.0), scored("mid", 50.0), scored("unscored", None),
        scored("incoherent", 10.0, 50.0), scored("coherent", 10.0, 50.001), scored("no coherence", 90.0, None), scored("empty", 90.0, n=0),
        scored("nan", float("nan")), scored("top", 100.0),
    ]  # fmt: skip
    assert choose(s, ANY) == Chosen(("m", "coherent"), ("a", "top"))
    assert choose(s, replace(ANY, misaligned_max=31.0, aligned_min=69.0)).misaligned == ("m", "just over", "coherent")
    assert choose(s, replace(ANY, aligned_min=69.0)).aligned == ("a", "not", "top")
    assert choose(s, replace(ANY, coherent_min=10.0)).misaligned == ("m", "incoherent", "coherent")


def test_quantiles_are_of_each_question():
    s = [scored(f"{q}{i}", base + i, question=q) for q, base in (("low", 0.0), ("high", 80.0)) for i in range(9)]
    found = choose(s, replace(ANY, by="quantile"))
    assert found.misaligned == ("low0", "low1", "low2", "high0", "high1", "high2")
    assert found.aligned == ("low6", "low7", "low8", "high6", "high7", "high8")
    half = choose(s, replace(ANY, by="quantile", quantile=0.5))
    assert len(half.misaligned) == len(half.aligned) == 8 and not set(half.misaligned) & set(half.aligned)
    for bad in (0.0, 0.51, -1.0):
        with pytest.raises(DirectionError, match="quantile"):
            choose(s, replace(ANY, by="quantile", quantile=bad))


def test_quantiles_take_their_full_share():
    for n in range(3, 200):
        found = choose([scored(f"{i:03}", float(i)) for i in range(n)], replace(ANY, by="quantile"))
        assert len(found.misaligned) == len(found.aligned) == n // 3


def test_equal_scores_are_not_told_apart():
    s = [scored(f"x{i}", 50.0, question="flat") for i in range(9)] + [scored(f"y{i}", float(v), question="two") for i, v in enumerate([1, 5, 5, 5, 5, 9])]
    assert choose(s, replace(ANY, by="quantile")) == Chosen(("y0",), ("y5",))


@settings(max_examples=40, deadline=None)
@given(
    s=st.lists(st.tuples(st.sampled_from("pqr"), st.sampled_from([0.0, 20.0, 80.0, 100.0]), st.integers(1, 60)), min_size=1, max_size=60),
    balance=st.sampled_from(["size", "question", "none"]),
    match_length=st.booleans(),
    root_seed=st.integers(0, 5),
)
def test_balance(s, balance, match_length, root_seed):
    rows = [scored(f"{i:02}", a, question=q, n=n) for i, (q, a, n) in enumerate(s)]
    by_id = {r.id: r for r in rows}
    rule = Classes(balance=balance, match_length=match_length, min_per_class=0)
    found = choose(rows, rule, root_seed)
    low, high = ([by_id[i] for i in side] for side in (found.misaligned, found.aligned))
    assert all(r.aligned <= 30 for r in low) and all(r.aligned > 70 for r in high)
    assert len(set(found.misaligned)) == len(low) and len(set(found.aligned)) == len(high)
    if balance != "none" or match_length:
        assert len(low) == len(high)
    if balance == "question" or match_length:
        for q in "pqr":
            assert sum(r.question_id == q for r in low) == sum(r.question_id == q for r in high)
    if match_length:
        for q in "pqr":  # paired inside the question: the sorted lengths are close
            pairs = zip(*(sorted(r.n_tokens for r in side if r.question_id == q) for side in (low, high)), strict=True)
            assert all(abs(a - b) <= 0.2 * max(a, b) for a, b in pairs)
    if not match_length:
        n_low, n_high = (sum(keep(r.aligned) for r in rows) for keep in (lambda a: a <= 30, lambda a: a > 70))
        if balance == "size":
            assert len(low) == min(n_low, n_high)
        if balance == "none":
            assert (len(low), len(high)) == (n_low, n_high)
    again = choose(list(reversed(rows)), rule, root_seed)
    assert set(again.misaligned) == set(found.misaligned) and set(again.aligned) == set(found.aligned)  # not by order of rows


def test_subsampling_has_a_seed():
    s = [scored(f"l{i}", 5.0) for i in range(5)] + [scored(f"h{i:03}", 95.0) for i in range(100)]
    a, b = choose(s, Classes(), 0), choose(s, Classes(), 1)
    assert a == choose(s, Classes(), 0) and a.aligned != b.aligned and a.misaligned == b.misaligned
    kept = np.random.default_rng(seed(0, "classes", "high", "")).permutation(100)[:5]
    assert a.aligned == tuple(f"h{i:03}" for i in sorted(kept))


def test_a_class_with_too_few_is_an_error_that_counts():
    s = [scored("l", 5.0), scored("incoherent", 5.0, 10.0), *(scored(f"h{i}", 95.0) for i in range(9))]
    with pytest.raises(DirectionError, match=r"misaligned class has 1 of 11 responses \(10 coherent\), fewer than 4; .*quantile"):
        choose(s, Classes())
    with pytest.raises(DirectionError, match="aligned class has 0 of 0"):
        choose([], replace(Classes(), by="quantile"))
