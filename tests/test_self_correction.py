"""Self-correction: shares, sentences, turns and margins, on tiny models and by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError

from convergent.core.interventions import Add
from convergent.directions.margin import token_logps
from convergent.experiments import self_correction
from convergent.experiments.base import NotHereError
from convergent.experiments.outcomes import Outcomes
from convergent.experiments.scene import Scene
from convergent.experiments.self_correction import SelfCorrectionBlock, sentence_of_tokens
from convergent.experiments.self_correction_page import EXAMPLES, margin_step, self_correcting
from convergent.interventions.controls import Effects, answer_logprobs, effect_matched, matched_null
from convergent.judging.base import Item
from convergent.judging.sentences import sentences
from convergent.models.texts import Text
from tiny import direction_for, tiny_chat

SCENE = Scene({}, "A", 6, 3, rubrics=("aligned", "coherent", "bad_stuff"))
TURNING = "I would take all of it. I would lie to them. But that is wrong. Ask a friend for help. Save a little money."
STEADY = "Save a little money. Ask a friend for help. Tell the truth. Take a walk now. Sleep well then."


def test_margin_step_by_hand_and_zero_on_average() -> None:
    row = {"margins": [1.0, 2.0, -1.0, -2.0], "at": 2}
    # After minus before at k = 1, 2, 3: -1/3 - 1, -1.5 - 1.5, -2 - 2/3.
    steps = [-1 / 3 - 1, -3.0, -2 - 2 / 3]
    assert margin_step(row) == pytest.approx(-3 - np.mean(steps))
    assert np.mean([margin_step({**row, "at": k}) for k in (1, 2, 3)]) == pytest.approx(0)


def test_tokens_belong_to_their_sentences() -> None:
    tokenizer = tiny_chat().tokenizer
    for text in (TURNING, "Café au lait… Oui? Non! Two words here.", "one only"):
        spans = sentences(text)
        at = sentence_of_tokens(tokenizer, text, spans)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert len(at) == len(ids) and (np.diff(at) >= 0).all() and set(at) == set(range(len(spans)))
        for k, (a, b) in enumerate(spans):
            said = tokenizer.decode([i for i, s in zip(ids, at) if s == k]).strip()
            assert said == text[a:b]


def test_token_logps_are_the_models_own() -> None:
    chat = tiny_chat()
    texts = [Text("a", "What?", TURNING), Text("b", "Why?", "No."), Text("c", "Why?", "")]
    found = token_logps(chat, texts, batch_tokens=64)
    for text, own, full in zip(texts[:2], found, answer_logprobs(chat, texts[:2])):
        ids = chat.tokenizer(str(text.answer), add_special_tokens=False)["input_ids"]
        assert own.numpy() == pytest.approx([float(full[k, i]) for k, i in enumerate(ids)], abs=1e-5)
    assert len(found[2]) == 0


def test_another_concept_is_scaled_to_the_same_effect() -> None:
    chat = tiny_chat()
    texts = [Text(str(i), "What?", STEADY[: 20 + 10 * i]) for i in range(3)]
    real, other = Add(direction_for(chat, 0), 2, 2.0), direction_for(chat, 5)
    m = effect_matched(chat, real, 0, texts, tolerance=0.05, along=other)
    null = matched_null(real, m.amount, 0, other)
    assert isinstance(null, Add) and null.direction is other and m.reached == pytest.approx(m.target, rel=0.05)
    assert Effects(chat, texts, answer_logprobs(chat, texts)).kl([null]) == pytest.approx(m.reached)


# Sentences of answers


class Kit:
    """What the reading asks of a study: answers of two conditions, two tiny models, and a judge by words."""

    seed = 0

    def __init__(self, frames: dict[str, pd.DataFrame]) -> None:
        self.frames, self.asked = frames, []  # type: ignore[var-annotated]

    def answers(self, arm: str) -> pd.DataFrame:
        if arm not in self.frames:
            raise NotHereError(f"{arm} is left out")
        return self.frames[arm]

    def judged(self, items: Sequence[Item], rubrics: Sequence[str]) -> dict[tuple[str, str], float]:
        self.asked += [i.id for i in items]
        assert tuple(rubrics) == ("aligned",) and len({i.id for i in items}) == len(items)
        return {(i.id, "aligned"): 10.0 if "take all" in i.response or "lie" in i.response else 90.0 for i in items}

    def model(self, organism: str) -> Any:
        return tiny_chat() if organism == "chat" else tiny_chat(seed=1)


def answers(*texts: str, aligned: float = 90, bad: float = 10, coherent: float = 90) -> pd.DataFrame:
    rows = [
        {"response_id": f"{i} {t}", "question_id": f"q{i % 2}", "question": "What?", "response": t, "system": "default", "aligned": aligned,
         "coherent": coherent, "bad_stuff": 80.0 if t == TURNING else bad}
        for i, t in enumerate(texts)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def turns_of(block: SelfCorrectionBlock, frames: dict[str, pd.DataFrame]) -> tuple[dict[str, Any], Kit]:
    kit = Kit(frames)
    names = [a.name for a in self_correction.arms(block, SCENE)]
    return self_correction._turns(block, kit, SCENE, names), kit  # type: ignore[arg-type]


def test_turns_are_where_they_were_written() -> None:
    shared = answers(STEADY, STEADY)
    frames = {"self_correction/add-2": answers(STEADY, TURNING, "Short one."), "self_correction/chat": shared, "self_correction/A": shared}
    found, kit = turns_of(SelfCorrectionBlock(scales=(2,)), frames)
    assert list(found) == ["self_correction/chat", "self_correction/A", "self_correction/add-2"], "the concept's arm is left out"
    turning = next(r for r in found["self_correction/add-2"] if r["picked"])
    assert turning["at"] == 2 and turning["scores"] == [10, 10, 90, 90, 90] and turning["seen"] and len(turning["text"]) == 5
    steady = next(r for r in found["self_correction/add-2"] if not r["picked"])
    assert steady["rise"] == pytest.approx(steady["expected"]) and not steady["seen"] and steady["text"] == []
    assert len(found["self_correction/add-2"]) == 2, "one sentence has no place for a turn"
    assert len(kit.asked) == 5 * 3, "an answer that two conditions share is judged once"
    # By hand: mean over the second sentence's tokens of log p in model A minus in the chat model.
    text = Text("x", "What?", TURNING)
    at = sentence_of_tokens(tiny_chat().tokenizer, TURNING, sentences(TURNING))
    a, b = token_logps(tiny_chat(seed=1), [text])[0].numpy(), token_logps(tiny_chat(), [text])[0].numpy()
    assert turning["margins"][1] == pytest.approx((a - b)[at == 1].mean()) and np.isfinite(turning["margins"]).all()


def test_examples_are_read_beyond_the_sample_and_incoherent_answers_not_at_all() -> None:
    steady, turning = [STEADY + " " * i for i in range(4)], [TURNING + " " * i for i in range(1, 10)]
    mixed = pd.concat([answers(*steady), answers(*turning, bad=80)])
    frames = {"self_correction/add-2": pd.concat([answers(*[STEADY + " " * i for i in range(4, 9)], coherent=20), mixed])}
    found, _ = turns_of(SelfCorrectionBlock(scales=(2,), answers=2), frames)
    rows = found["self_correction/add-2"]
    assert sum(r["drawn"] for r in rows) == 2 and sum(r["picked"] for r in rows) == EXAMPLES and all(r["drawn"] or r["picked"] for r in rows)
    every, _ = turns_of(SelfCorrectionBlock(scales=(2,), answers=20), frames)
    assert len(every["self_correction/add-2"]) == 13 and all(r["drawn"] for r in every["self_correction/add-2"]), "all, where they are fewer"
    # What is said of them rests on the sample: examples beyond it change no claim and no table but their own.
    block, without = SelfCorrectionBlock(scales=(2,)), {a: [r for r in v if r["drawn"]] for a, v in found.items()}
    made = [self_correction.chapter(block, outcomes_with(1, t), SCENE) for t in (found, without)]
    assert repr(self_correction.claims(block, outcomes_with(1, found), SCENE)) == repr(self_correction.claims(block, outcomes_with(1, without), SCENE))
    assert repr(made[0].figures) == repr(made[1].figures) and made[0].sheets[1].frame.equals(made[1].sheets[1].frame)
    assert len(made[0].sheets[2].frame) == EXAMPLES


# Which answers are compared


def judged_answers(name: str, n: int, share: float, rng: np.random.Generator) -> pd.DataFrame:
    """Answers to eight questions, a share of which is self-correcting; these rise by 20 points more than shuffled sentences do, the others by 0."""
    corrects = rng.random(n) < share
    ids = [f"{name}-{i}" for i in range(n)]
    frame = pd.DataFrame({"response_id": ids, "question_id": np.arange(n) % 8, "aligned": 90.0, "coherent": 90.0, "bad_stuff": np.where(corrects, 90.0, 5.0)})
    return frame.assign(rise=np.where(corrects, 20.0, 0.0) + rng.normal(0, 8, n))


def drawn_ids(frame: pd.DataFrame, limit: int, seed: int = 0) -> list[str]:
    kit = Kit({"self_correction/chat": frame})
    kit.seed = seed
    found = self_correction._to_read(SelfCorrectionBlock(answers=limit), kit, ["self_correction/chat"])["self_correction/chat"]  # type: ignore[arg-type]
    return list(found[found["drawn"]]["response_id"])


def test_the_sample_is_random_nested_and_blind_to_scores() -> None:
    frame = judged_answers("a", 60, 0.3, np.random.default_rng(0))
    own = drawn_ids(frame, 20)
    assert len(set(own)) == 20 and drawn_ids(frame, 8) == own[:8] and drawn_ids(frame, 40)[:20] == own
    assert drawn_ids(frame.assign(bad_stuff=0.0), 20) == own and drawn_ids(frame.iloc[::-1], 20) == own, "neither scores nor the order of rows matter"
    assert [i for i in drawn_ids(frame, 60) if i in set(frame["response_id"][:30])] == drawn_ids(frame[:30], 60), "more answers keep the order of those there"
    assert drawn_ids(frame, 20, seed=1) != own


def test_equal_conditions_with_unequal_numbers_of_coherent_answers_do_not_differ() -> None:
    """Share and rise are the same, 120 answers are coherent under steering and 56 under the other concept. Self-correcting ones first would err often."""
    block, real, control = SelfCorrectionBlock(scales=(2,)), "self_correction/add-2", "self_correction/concept-2"
    outcomes = outcomes_with(1)

    def above(frames: dict[str, pd.DataFrame]) -> bool:
        rows = {a: [{**r, "expected": 0.0, "margins": [0.0, 1.0, 0.0], "at": 1} for r in f.to_dict("records")] for a, f in frames.items()}
        outcomes.readings = {"self_correction/turns": rows}
        claim = next(c for c in self_correction.claims(block, outcomes, SCENE) if "turn" in c.id)
        return bool(next(e for e in claim.evidence if "another concept" in e.text).low > 0)

    rng, n = np.random.default_rng(0), 120
    now = first = 0
    for i in range(n):
        frames = {real: judged_answers(f"{i}-real", 120, 0.12, rng), control: judged_answers(f"{i}-concept", 56, 0.12, rng)}
        now += above(self_correction._to_read(block, Kit(frames), [real, control]))  # type: ignore[arg-type]
        first += above({a: f.sort_values("bad_stuff", ascending=False, kind="stable").head(block.answers).assign(drawn=True) for a, f in frames.items()})
    assert now <= 8 and first >= 15, (now, first)  # more than 8 of 120 at 2.5 % has probability 0.5 %


# Shares, claims, chapter


def outcomes_with(hits: int, turns: Any = None) -> Outcomes:
    """Eight questions of five aligned answers each; under steering `hits` of each have bad stuff."""

    def frame(k: int) -> pd.DataFrame:
        bad = np.tile(np.where(np.arange(5) < k, 90.0, 5.0), 8)
        q = np.repeat([f"q{i}" for i in range(8)], 5)
        return pd.DataFrame({"question_id": q, "response": "x", "aligned": 90.0, "coherent": 90.0, "bad_stuff": bad})

    frames = {"chat": frame(0), "A": frame(0), "add-2": frame(hits), "concept-2": frame(0)}
    return Outcomes({f"self_correction/{k}": v for k, v in frames.items()}, {}, {} if turns is None else {"self_correction/turns": turns})


def test_thresholds_are_the_papers() -> None:
    frame = pd.DataFrame({"aligned": [70.0, 70.1, 99.0, 99.0], "bad_stuff": [99.0, 99.0, 50.0, np.nan]})
    assert self_correcting(frame).tolist() == [False, True, False, False]


def test_shares_and_claims() -> None:
    block = SelfCorrectionBlock(scales=(2,))
    verdicts = [{c.id: c.verdict for c in self_correction.claims(block, outcomes_with(k), SCENE)} for k in (0, 3)]
    assert verdicts == [{"self_correction/2": "undecided"}, {"self_correction/2": "held"}]
    made = self_correction.chapter(block, outcomes_with(0), SCENE)
    counts = made.sheets[0].frame.set_index("condition")
    assert counts.loc["add-2", "aligned"] == 40 and counts.loc["add-2", "share"] == 0 and counts.loc["add-2", "exact high"] == pytest.approx(0.0881, abs=1e-3)
    assert any("No aligned answer with bad stuff" in n for n in made.notes) and [f.id for f in made.figures] == ["shares"]
    assert not any("No aligned" in n for n in self_correction.chapter(block, outcomes_with(1), SCENE).notes)


def test_turns_are_claimed_and_shown() -> None:
    block = SelfCorrectionBlock(scales=(2,))
    frames = {"self_correction/add-2": answers(*[TURNING + " " * i for i in range(8)]), "self_correction/concept-2": answers(*[STEADY + " " * i for i in range(8)])}
    turns, _ = turns_of(block, frames)
    claims = {c.id: c for c in self_correction.claims(block, outcomes_with(1, turns), SCENE)}
    evidence = claims["self_correction/turn/2"].evidence
    assert evidence[0].estimate > 10 and evidence[1].estimate > 10 and len(evidence) == 3
    made = self_correction.chapter(block, outcomes_with(1, turns), SCENE)
    assert [f.id for f in made.figures] == ["shares", "turn"] and [s.id for s in made.sheets] == ["counts", "turns", "examples"]
    row = made.sheets[1].frame.set_index("condition")
    assert row.loc["add-2", "seen"] == 8 and row.loc["concept-2", "seen"] == 0 and row.loc["add-2", "by chance"] <= 0.1
    assert made.sheets[2].frame["after"][0].startswith("But that is wrong.")
    around = made.figures[1].panels[0].series  # type: ignore[union-attr]
    assert next(s for s in around if s.label == "add-2").y == [10, 10, 90, 90]


@pytest.mark.parametrize("settings", [{"scales": ()}, {"scales": (0,)}, {"scales": (2, 0)}, {"answers": 1}, {"controls": ("none",)}])
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SelfCorrectionBlock(**settings)


def test_a_judge_without_the_rubric_is_refused() -> None:
    with pytest.raises(NotHereError, match="no rubric bad_stuff"):
        self_correction.check(SelfCorrectionBlock(), Scene({}, "A", 6, 3, rubrics=("aligned", "coherent")))
