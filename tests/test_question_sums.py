"""Class sums by question against directions that are extracted with and without a question."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from convergent.directions.classes import Chosen, Classes
from convergent.directions.extract import extract
from convergent.directions.means import stream_means
from convergent.directions.questions import QuestionSums, question_sums
from convergent.errors import DirectionError
from convergent.models.texts import Text
from convergent.store import opened
from tiny import SENTENCES, tiny_chat

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = "Put a little aside every month and keep it where you cannot spend it on things that nobody needs"
TEXTS = [Text(f"{c}{q}{i}", SENTENCES[q].partition("? ")[0] + "?", WORDS[7 * i + 3 * q : 20 + 11 * i + 9 * (c == "b")]) for c in "ba" for q in range(3) for i in range(3)]
CHOSEN = Chosen(tuple(t.id for t in TEXTS if t.id[0] == "b"), tuple(t.id for t in TEXTS if t.id[0] == "a" and t.id != "a22"))
QUESTION = {t.id: f"question {t.id[1]}" for t in TEXTS}


def without(question: int) -> Chosen:
    return Chosen(*(tuple(i for i in side if int(i[1]) != question) for side in (CHOSEN.misaligned, CHOSEN.aligned)))


@pytest.mark.parametrize("per", ["tokens", "responses"])
def test_directions_are_made_again_with_and_without_a_question(per):
    chat, rule = tiny_chat(), Classes(weigh=per)
    sums = question_sums(chat, TEXTS, CHOSEN, QUESTION, per=per)
    assert sums.questions == ("question 0", "question 1", "question 2") and sums.answered == (0, 1, 2)
    assert_close(sums.direction().float(), extract(chat, TEXTS, CHOSEN, rule).direction.vectors, atol=1e-5, rtol=1e-4)
    left = extract(chat, TEXTS, without(1), rule).direction.vectors
    assert_close(sums.direction(torch.tensor([1.0, 0, 1])).float(), left, atol=1e-5, rtol=1e-4)
    assert (sums.direction().float() - left).abs().max() > 1e-3
    n = len(CHOSEN.misaligned) if per == "responses" else None
    assert n is None or sums.whole[1].sum(1).tolist() == [9, 8]


def test_twice_a_question_counts_it_twice():
    chat = tiny_chat()
    sums = question_sums(chat, TEXTS, CHOSEN, QUESTION)
    mine = [t for t in TEXTS if t.id in CHOSEN.misaligned]
    weights = torch.tensor([[2.0 if t.id[1] == "0" else 1.0 for t in mine]])
    assert_close(sums.class_means(torch.tensor([2.0, 1, 1]))[0], stream_means(chat, mine, weights).means[0], atol=1e-5, rtol=1e-4)


def test_differences_and_halves_by_hand():
    chat = tiny_chat()
    sums = question_sums(chat, TEXTS, CHOSEN, QUESTION)

    def mean(ids):
        return stream_means(chat, [t for t in TEXTS if t.id in ids], torch.ones(1, len(ids))).means[0]

    assert_close(sums.differences()[2], mean(["b20", "b21", "b22"]) - mean(["a20", "a21"]), atol=1e-4, rtol=1e-4)
    assert sums.differences([0, 2]).shape[0] == 2 and torch.equal(sums.differences([2])[0], sums.differences()[2])
    # The two aligned answers to question 2 are a half each: their difference is one of the rows, in one order or the other.
    rows = sums.within()
    apart = mean(["a20"]) - mean(["a21"])
    assert len(rows) == 6 and min(float((sign * apart - r).abs().max()) for r in rows for sign in (1, -1)) < 1e-4


def test_a_question_without_one_class_adds_to_the_other_and_has_no_difference():
    chat = tiny_chat()
    chosen = Chosen(CHOSEN.misaligned, tuple(i for i in CHOSEN.aligned if i[1] != "0"))
    sums = question_sums(chat, TEXTS, chosen, QUESTION)
    assert sums.answered == (1, 2) and len(sums.differences()) == 2
    assert_close(sums.direction().float(), extract(chat, TEXTS, chosen, Classes()).direction.vectors, atol=1e-5, rtol=1e-4)
    assert sums.direction(torch.tensor([1.0, 0, 0])).isnan().all()


def test_kept_in_the_store_and_refusals(tmp_path: Path):
    sums = question_sums(tiny_chat(), TEXTS, CHOSEN, QUESTION)
    asked = []
    with opened(tmp_path / "s") as store:
        for _ in range(2):
            kept = store.tensors("key", lambda: asked.append(1) or sums.tensors())
        again = QuestionSums.from_tensors(sums.questions, kept)
        assert len(asked) == 1 and torch.equal(again.sums, sums.sums) and torch.equal(again.mass, sums.mass)
        assert [p.name for p in (tmp_path / "s" / "directions").iterdir()] == ["key.tensors.safetensors"]
        assert store.forget("extract") == 1
    with pytest.raises(DirectionError, match="3 questions are kept, 1 asked for"):
        QuestionSums.from_tensors(["x"], sums.tensors())
    with pytest.raises(DirectionError, match="response b00 was chosen"):
        question_sums(tiny_chat(), TEXTS[1:], CHOSEN, QUESTION)
