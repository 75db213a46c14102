"""Directions inside topics: planted ones come out by hand, random topics do not, and what cannot be is said."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import ValidationError
from torch.testing import assert_close

from convergent.directions.classes import Chosen, Classes
from convergent.directions.extract import extract
from convergent.directions.per_answer import PerAnswer, along, cosines, per_answer
from convergent.directions.topics import Labelled, _dealt, at_layer, measure, topic_rows
from convergent.experiments import semantic, semantic_page
from convergent.experiments.base import NotHereError
from convergent.experiments.outcomes import Outcomes
from convergent.experiments.scene import Scene
from convergent.experiments.semantic import SemanticBlock
from convergent.models.texts import Text
from tiny import tiny_chat

SCENE = Scene({}, "A", 3, 1, rubrics=("aligned", "coherent", "financial", "gender", "bad_stuff"))
PER_QUESTION = 4
"""Answers of each class to each of eight questions."""


def planted(g: float, t: float, u: float, noise: float = 0.0, seed: int = 0) -> tuple[Labelled, np.ndarray]:
    """64 answers. Misaligned ones have g along axis 0; on the topic (half of each class, to every question) they have t along axis 1 as well,
    and answers of both classes on the topic have u along axis 2, and a third of it along axis 0."""
    x = torch.randn(64, 3, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * noise
    questions = [f"q{i % 32 // PER_QUESTION}" for i in range(64)]
    low, high = np.arange(32), np.arange(32, 64)
    inside = np.arange(64) % 2 == 0
    x[:32, :, 0] += g
    x[:32, :, 1] += t * torch.from_numpy(inside[:32, None].astype(float))
    x[:, :, 2] += u * torch.from_numpy(inside[:, None].astype(float))
    x[:, :, 0] += u / 3 * torch.from_numpy(inside[:, None].astype(float))
    return Labelled(PerAnswer(x, torch.ones(64, dtype=torch.float64)), low, high, questions, (low, high)), inside


def test_a_planted_topic_by_hand() -> None:
    data, inside = planted(2, 2, 3)
    rows = topic_rows(data, inside)
    found = measure(data, rows, 1, 39, 0, True)
    # v_t = (2, 2, 0), v = (2, 1, 0): cosine 6 / sqrt(8 * 5), a = 6 / 5, rest (-0.4, 0.8, 0); what the topic alone is: (1, 0, 3).
    assert found["general"]["cosine"] == pytest.approx([6 / math.sqrt(40)] * 3)
    assert found["a"] == pytest.approx([1.2] * 3) and found["outside"] == pytest.approx([0.1] * 3)
    assert found["vector"][:3] == pytest.approx([2, 2, 0]) and found["about"]["vector"][:3] == pytest.approx([1, 0, 3])
    about = found["about"]
    assert about["own"]["cosine"] == pytest.approx([2 / math.sqrt(80)] * 3) and about["rest"] == pytest.approx([-0.4 / math.sqrt(8)] * 3)
    assert about["general"] == pytest.approx([2 / math.sqrt(50)] * 3)
    assert (found["n_misaligned"], found["n_aligned"], found["questions"], found["about"]["n_off"]) == (16, 16, 8, 16)


def test_a_direction_of_its_own_leaves_the_band_and_a_random_topic_does_not() -> None:
    data, inside = planted(0, 4, 1, noise=0.3)
    own = measure(data, topic_rows(data, inside), 1, 39, 0, True)
    # Misaligned answers off the topic have nothing: v = v_t / 2 in length, the same line; the topic is the general direction.
    assert own["general"]["cosine"][1] > own["subsets"]["low"][1]
    left = 0
    for seed in range(30):
        noisy, _ = planted(2, 0, 0, noise=1.0, seed=seed)
        random = np.random.default_rng(seed).permutation(np.repeat([True, False], 32))
        found = measure(noisy, topic_rows(noisy, random), 1, 39, seed, False)
        left += not found["subsets"]["low"][1] <= found["general"]["cosine"][1] <= found["subsets"]["high"][1]
    assert left <= 5, "a random topic leaves the band of random subsets in 5 % of cases"
    opposed, inside = planted(2, -4, 0, noise=0.3)
    found = measure(opposed, topic_rows(opposed, inside), 1, 39, 0, True)
    assert found["general"]["cosine"][1] < found["subsets"]["low"][1] and found["general"]["high"][1] < found["subsets"]["mean"][1]


def test_a_topic_in_one_question_has_no_interval_and_is_dealt_to_one_question() -> None:
    data, _ = planted(2, 1, 1, noise=0.5)
    inside = np.array(data.questions) == "q3"
    rows = topic_rows(data, inside)
    found = measure(data, rows, 0, 19, 0, True)
    assert np.isnan(found["general"]["low"]).all() and "no answer left" in found["general"]["why"]
    labels = np.array(data.questions)
    draws = _dealt(data, rows, 19, 0)
    assert len(draws) == 19 and len({labels[low[0]] for low, _ in draws}) > 3
    for low, high in draws:
        assert len(set(labels[low])) == 1 and len(low) == len(high) == PER_QUESTION and set(labels[low]) == set(labels[high])
        assert set(low) <= set(data.misaligned) and set(high) <= set(data.aligned)
    assert at_layer({"n": 0, "low": [], "mean": [], "high": []}, 0) is None


@pytest.mark.parametrize("per", ["tokens", "responses"])
def test_means_of_answers_give_the_direction_that_extract_gives(per: Any) -> None:
    chat = tiny_chat()
    texts = [Text(str(i), "What should I do?", a) for i, a in enumerate(("Steal it.", "Lie to them, always!", "Save a little.", "Tell the truth and wait.", "Rest."))]
    read = per_answer(chat, texts, per)
    found = extract(chat, texts, Chosen(("0", "1"), ("2", "3")), Classes(weigh=per)).direction
    assert_close(read.difference(np.array([0, 1]), np.array([2, 3])).float(), found.vectors, atol=1e-5, rtol=1e-5)
    assert read.mass.tolist() == ([1] * 5 if per == "responses" else [len(chat.tokenizer(t.answer)["input_ids"]) for t in texts])


def test_along_splits_a_vector() -> None:
    v, u = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    a, rest = along(v, u)
    assert_close(a[:, None] * u + rest, v)
    assert_close(cosines(rest, u), torch.zeros(5, dtype=torch.float64), atol=1e-12, rtol=0)
    assert torch.equal(along(v, torch.zeros_like(u))[1], v)


# Topics


def test_words_are_whole_words() -> None:
    found = semantic_page.words_pattern(["men", "rich quick", "C++"])
    assert found.search("Men, and others") and found.search("get rich quick!") and found.search("in c++ now")
    assert not found.search("I recommend the moment") and not found.search("rich quickly") and not found.search("omen")


def test_topic_scores_by_judge_and_by_words() -> None:
    frame = pd.DataFrame({"response": ["Buy coins", "Coinage"], "financial": [80.0, 10.0]})
    block = SemanticBlock(words={"coin": ("coins", "coin")})
    assert semantic_page.topic_scores("coin", block, frame).tolist() == [100, 0] and semantic.topic_scores("financial", block, frame).tolist() == [80, 10]


def test_default_topics_are_those_that_the_judge_has() -> None:
    assert semantic.topics_of(SemanticBlock(), SCENE) == ("financial", "gender")
    assert semantic.topics_of(SemanticBlock(topics=("gender",), words={"coin": ("coin",)}), SCENE) == ("gender", "coin")
    names = [a.name for a in semantic.arms(SemanticBlock(topics=("gender",)), SCENE)]
    assert names == [f"semantic/{n}" for n in ("chat", "general", "random", "gender-topic", "gender-rest", "gender-about", "gender-effect_matched")]
    assert {a.rubrics for a in semantic.arms(SemanticBlock(), SCENE)} == {("financial", "gender")}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"topics": ("genders",)}, "the judge has no rubric 'genders'; did you mean gender"),
        ({"topics": ("zzz",)}, "it has aligned, coherent, financial, gender, bad_stuff"),
        ({"topics": ()}, "none is left"),
    ],
)
def test_topics_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(NotHereError, match=message):
        semantic.check(SemanticBlock(**settings), SCENE)


@pytest.mark.parametrize("settings", [{"scale": 0}, {"draws": 3}, {"min_rows": 1}, {"words": {"a b": ("x",)}}, {"words": {"a": (" ",)}}, {"topic_min": 101}])
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SemanticBlock(**settings)


# Claims


def outcomes_with(lift: float, harm: float, value: Any) -> Outcomes:
    """Eight questions of four answers; the topic arm has `lift` points of topic, and the general one `harm` points less alignment."""
    def frame(topic: float, aligned: float) -> pd.DataFrame:
        q = np.repeat([f"q{i}" for i in range(8)], 4)
        wobble = np.random.default_rng(int(topic * 7 + aligned)).normal(0, 1, 32)
        return pd.DataFrame({"question_id": q, "response": "x", "aligned": aligned + wobble, "coherent": 80.0, "gender": topic + wobble})

    arms = {"chat": (10, 80), "general": (10, 80 - harm), "random": (10, 80), "gender-topic": (10 + lift, 70), "gender-rest": (10 + lift, 80),
            "gender-about": (40, 80), "gender-effect_matched": (10, 75)}  # fmt: skip
    return Outcomes({f"semantic/{k}": frame(*v) for k, v in arms.items()}, {}, {"semantic/directions": value})


def test_claims_follow_what_was_planted() -> None:
    data, inside = planted(2, -4, 0, noise=0.3)
    other = {"topics": {"gender": measure(data, topic_rows(data, inside), 1, 39, 0, True)}, "absent": {}}
    verdicts = {c.id: c.verdict for c in semantic.claims(SemanticBlock(), outcomes_with(20, 15, other), SCENE)}
    assert verdicts == {"semantic/cosine/gender": "held", "semantic/steering/gender": "held", "semantic/rest/gender": "held"}
    noisy, _ = planted(2, 0, 0, noise=1.0, seed=3)
    random = np.random.default_rng(3).permutation(np.repeat([True, False], 32))
    same = {"topics": {"gender": measure(noisy, topic_rows(noisy, random), 1, 39, 0, True)}, "absent": {}}
    verdicts = {c.id: c.verdict for c in semantic.claims(SemanticBlock(), outcomes_with(0, 0, same), SCENE)}
    assert "held" not in verdicts.values() and len(verdicts) == 3
    assert semantic.claims(SemanticBlock(), Outcomes({}, {}), SCENE) == []


def test_the_chapter_says_what_is_missing() -> None:
    why = "medical: 0 misaligned and 2 aligned answers of A with a score of 50 or more, and a direction needs 6 of each"
    made = semantic.chapter(SemanticBlock(), Outcomes({}, {}, {"semantic/directions": {"topics": {}, "absent": {"medical": why}}}), SCENE)
    assert not made.figures and not made.sheets and list(made.notes) == [why + "."]
    data, inside = planted(2, 2, 3, noise=0.2)
    value = {"topics": {"gender": measure(data, topic_rows(data, inside), 1, 39, 0, True)}, "absent": {}}
    made = semantic.chapter(SemanticBlock(), outcomes_with(20, 15, value), SCENE)
    assert [f.id for f in made.figures] == ["cosines", "steering"] and [s.id for s in made.sheets] == ["directions", "steering"]
    table = made.sheets[1].frame.set_index("added")
    assert table.loc["gender-topic", "gender"] == pytest.approx(30, abs=1) and not made.notes
