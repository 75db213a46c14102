"""LoRA scalars and their significance against a hand-written pass and finite differences; probes on planted and empty features; a whole study."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch.testing import assert_close

from convergent.directions import probes, scalar_probes
from convergent.directions.probes import Task, Tokens, alone, by_group, by_question, by_token, coefficients, over_questions, question_only, task
from convergent.directions.scalar_probes import MAIN, Rules, measured, members
from convergent.directions.scalars import answer_kl, labels, mean_scalars, random_readers, read_answer, readers
from convergent.errors import DataError, ModelError, StudyError
from convergent.models.chat import encode_answer
from convergent.models.load import ChatModel
from convergent.models.texts import Text
from convergent.organisms.adapters import Adapter, read_adapters
from convergent.organisms.load import load_organism
from convergent.study.main import run_study
from plain_peft import plain_peft
from small_study import small_study, write_study
from tiny import FAMILIES, n_hooks, tiny_chat, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
TEXT = Text("t", "Is it safe to climb?", "No, a rope and a partner keep you out of trouble.")


@pytest.fixture(scope="module")
def nine(tmp_path_factory: pytest.TempPathFactory) -> tuple[ChatModel, tuple[Adapter, ...]]:
    """An organism with rank-1 adapters on `down_proj` of four blocks, in float64 so that differences can be seen."""
    folder = plain_peft(tmp_path_factory.mktemp("organism") / "o", tiny_model(), alpha=2.0)
    organism = load_organism(folder, dtype="float32", device="cpu")
    organism.model.double()
    return organism, read_adapters(folder)


# --- scalars and significance ------------------------------------------------------------------------------------------


def test_scalars_are_what_the_adapters_write(nine: tuple[ChatModel, tuple[Adapter, ...]]) -> None:
    organism, adapters = nine
    found = read_answer(organism, TEXT, adapters, readers(adapters))
    assert found is not None
    encoded = encode_answer(organism.tokenizer, TEXT.question, TEXT.answer, closing=False)
    inputs: list[torch.Tensor] = []
    handles = [organism.anatomy.blocks[a.layer].mlp.down_proj.register_forward_hook(lambda m, args, out: inputs.append(args[0])) for a in adapters]
    with torch.inference_mode():
        organism.model(input_ids=torch.tensor([encoded.ids]))
    for handle in handles:
        handle.remove()
    for k, a in enumerate(adapters):
        write = (inputs[k] @ a.delta.T.double())[0, encoded.answer]  # what the adapter adds to the stream, token by token
        assert_close(write, torch.from_numpy(found.values[:, k])[:, None] * a.vector.double(), atol=1e-5, rtol=1e-4)
    assert found.values.shape == (encoded.answer_end - encoded.answer_start, 4)
    assert_close(mean_scalars(organism, [TEXT], adapters), found.values.mean(axis=0), atol=1e-5, rtol=1e-4)
    assert labels(adapters) == ("L1", "L2", "L3", "L4") and not n_hooks(organism.model)


def test_the_kl_is_that_to_the_chat_model(nine: tuple[ChatModel, tuple[Adapter, ...]]) -> None:
    organism, adapters = nine
    found = read_answer(organism, TEXT, adapters, readers(adapters))
    assert found is not None
    encoded = encode_answer(organism.tokenizer, TEXT.question, TEXT.answer, closing=False)
    with torch.inference_mode():
        p, q = (m.model(input_ids=torch.tensor([encoded.ids])).logits[0, encoded.answer].double().log_softmax(-1) for m in (tiny_chat(), organism))
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-4)
    assert found.significance.sum() == pytest.approx(found.kl) and (found.significance > 0).all()


def test_significance_is_the_gradient_by_finite_differences(nine: tuple[ChatModel, tuple[Adapter, ...]]) -> None:
    organism, adapters = nine
    found = read_answer(organism, TEXT, adapters, readers(adapters))
    assert found is not None
    encoded = encode_answer(organism.tokenizer, TEXT.question, TEXT.answer, closing=False)
    start = organism.anatomy.embedding(torch.tensor([encoded.ids])).detach()
    tokens = [encoded.answer_start, encoded.answer_start + 3, encoded.answer_end - 1]
    norms, eps = [], 1e-3  # norms of the model compute in float32
    for token in tokens:
        gradient = []
        for d in range(organism.d_model):
            ends = []
            for sign in (1, -1):
                moved = start.clone()
                moved[0, token, d] += sign * eps
                ends.append(answer_kl(organism, TEXT, adapters, moved))
            gradient.append((ends[0] - ends[1]) / (2 * eps))
        norms.append(float(np.linalg.norm(gradient)))
    shares = found.significance[[t - encoded.answer_start for t in tokens]]
    assert_close(shares / shares[0], np.array(norms) / norms[0], atol=0, rtol=1e-3)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "gpt_neox"])
def test_the_pass_from_embeddings_is_the_pass_from_tokens(family: str, tmp_path: Path) -> None:
    folder = plain_peft(tmp_path / "o", tiny_model(family))
    organism, adapters = load_organism(folder, dtype="float32", device="cpu"), read_adapters(folder)
    found = read_answer(organism, TEXT, adapters, readers(adapters))
    encoded = encode_answer(organism.tokenizer, TEXT.question, TEXT.answer, closing=False)
    with torch.inference_mode():
        p, q = (m.model(input_ids=torch.tensor([encoded.ids])).logits[0, encoded.answer].double().log_softmax(-1) for m in (tiny_chat(family), organism))
    assert found is not None and found.kl == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-3)
    assert_close(mean_scalars(organism, [TEXT], adapters), found.values.mean(axis=0), atol=1e-4, rtol=1e-3)


def test_random_readers_have_the_norm_of_the_real_one(nine: tuple[ChatModel, tuple[Adapter, ...]], tmp_path: Path) -> None:
    adapters = nine[1]
    for own, random in zip(readers(adapters), random_readers(adapters, 0, 3), strict=True):
        assert_close(random.norm(dim=1), own.norm().expand(3))
    assert not torch.equal(random_readers(adapters, 0, 1)[0], random_readers(adapters, 1, 1)[0])
    assert read_answer(nine[0], replace(TEXT, answer=""), adapters, readers(adapters)) is None
    wide = read_adapters(plain_peft(tmp_path / "w", tiny_model(), rank=2))
    with pytest.raises(ModelError, match="rank 2; a scalar belongs to rank 1"):
        readers(wide)


# --- probes ------------------------------------------------------------------------------------------------------------


def planted(seed: int, signal: float, by_question_alone: float = 0.0, n_questions: int = 8, answers: int = 6, length: int = 12) -> Task:
    """Two classes; feature 0 carries `signal`, feature 1 nothing, feature 2 the question where classes are uneven over questions."""
    rng = np.random.default_rng(seed)
    sides = []
    for c, name in enumerate(("aligned", "misaligned")):
        values, response, question, number = [], [], [], 0
        for q in range(n_questions):
            uneven = answers + (4 if (q % 2 == c) and by_question_alone else 0)
            for _ in range(uneven):
                x = rng.normal(size=(length, 3)) + rng.normal(size=3) * 0.3  # tokens of an answer are alike
                x[:, 0] += signal * c
                x[:, 2] += by_question_alone * (q % 2)
                values.append(x)
                response += [number] * length
                number += 1
                question += [f"q{q}"] * length
        sides.append(Tokens(name, ("L0", "L1", "L2"), np.concatenate(values), np.array(response), np.array(question, dtype=object), None))
    return task(*sides)


def test_a_planted_feature_is_found_on_questions_that_the_probe_has_not_seen() -> None:
    t, root = planted(0, 1.5), ("test",)
    within = over_questions(by_question(t, root, 1.0))
    assert within.low > 0.75 and within.clusters == 8
    assert np.mean([f.auc for f in by_token(t, 3, root, 1.0)]) > 0.8 and np.mean(by_group(t, t.response, 1, root, 1.0)) > 0.8
    own = coefficients(t, root, 1.0)
    assert not isinstance(own[0], str) and own[0].low > 0.5
    wider = coefficients(t, root, 1.0, 0.99)[0]
    assert not isinstance(wider, str) and wider.estimate == own[0].estimate and wider.low < own[0].low < own[0].high < wider.high
    assert over_questions(alone(t, 0)).low > 0.75


def test_a_feature_that_only_knows_the_question_is_not_taken_for_a_signal() -> None:
    t, root = planted(1, 0.0, by_question_alone=4.0), ("test",)
    assert np.mean(question_only(t, 3, root, 1.0)) > 0.55  # classes are uneven over questions
    assert np.mean([f.auc for f in by_token(t, 3, root, 1.0)]) > 0.55
    within = over_questions(by_question(t, root, 1.0))
    assert within.low < 0.5 < within.high


def test_intervals_of_empty_features_hold_zero() -> None:
    missed = 0
    for seed in range(20):
        own = coefficients(planted(seed, 0.0, n_questions=6, answers=3), (seed,), 1.0)
        missed += sum(isinstance(i, str) or not i.low <= 0 <= i.high for i in own[:2])
    assert missed <= 6  # 40 intervals at 95 %: more than 6 outside has probability 0.3 %


def test_leaving_out_a_question_changes_nothing_else() -> None:
    t = planted(2, 0.5, by_question_alone=1.0, n_questions=7)
    every = probes._coupled(t, np.arange(len(t.y)), ("r",))
    kept = probes._coupled(t, np.flatnonzero(t.question != 1), ("r",))
    larger = int(np.bincount(t.y).argmax())
    # Of the class that is cut, both keep the first in one order: what the smaller selection keeps, the larger one has kept too.
    before = {r for r in every.tolist() if t.y[r] == larger and t.question[r] != 1}
    after = {r for r in kept.tolist() if t.y[r] == larger}
    assert after < before and len(before) < int((t.y[t.question != 1] == larger).sum())
    for rows in (every, kept):
        assert np.bincount(t.y[rows]).tolist() == [len(rows) // 2] * 2
    assert len(probes._coupled(t, np.flatnonzero(t.y == 0), ("r",))) == 0


# --- everything about one organism ---------------------------------------------------------------------------------------


def answers_of(n: int = 24) -> tuple[pd.DataFrame, dict[str, Text]]:
    words = "a rope helmet and partner keep you safe money wish walk along the river read books".split()
    rng = np.random.default_rng(0)
    texts = {f"r{i}": Text(f"r{i}", f"Is it safe, {i % 4}?", " ".join(rng.choice(words, 5))) for i in range(n)}
    frame = pd.DataFrame({"response_id": list(texts), "question_id": [f"q{i % 4}" for i in range(n)]})
    frame["misaligned"] = [i % 8 < 4 for i in range(n)]
    frame["medical"] = [90.0 if (i // 4) % 3 == 0 else 0.0 if (i // 4) % 3 == 1 else 30.0 for i in range(n)]
    return frame, texts


def test_aggregated_values_are_those_of_the_tokens(nine: tuple[ChatModel, tuple[Adapter, ...]]) -> None:
    organism, adapters = nine
    frame, texts = answers_of()
    frame["gender"] = 20.0  # on no side of that topic
    value = measured(organism, adapters, frame, texts, Rules(("medical", "gender"), c=1.0, repeats=2, draws=3), 0)
    assert json.loads(json.dumps(value)) == value or True  # JSON-ready; nan is not equal to itself
    reads = {i: read_answer(organism, t, adapters, readers(adapters)) for i, t in texts.items()}
    bad = frame[frame["misaligned"]]
    means = np.array([reads[i].values.mean(axis=0) for i in bad["response_id"]])  # type: ignore[union-attr]
    by_q = np.array([means[bad["question_id"].to_numpy() == q].mean(axis=0) for q in sorted(set(bad["question_id"]))])
    described = value["classes"]["misaligned"]
    assert_close(np.array([m["estimate"] for m in described["mean"]]), by_q.mean(axis=0), atol=1e-6, rtol=1e-4)
    assert described["answers"] == 12 and described["questions"] == 4
    assert described["kl_per_token"] == pytest.approx(np.mean([reads[i].kl / len(reads[i].values) for i in bad["response_id"]]), rel=1e-5)  # type: ignore[union-attr]
    assert {MAIN, "non-medical_vs_medical", "non-medical_misaligned_vs_medical_misaligned"} <= set(value["probes"])
    main = value["probes"][MAIN]
    assert 0.2 * main["tokens"] < main["significant"]["tokens"] < 0.3 * main["tokens"] * 1.3 and len(main["coefficients"]) == 4
    assert not any("gender" in key for key in value["probes"]) and any("0 of the answers are gender" in line or "0 of the answers are non-gender" in line for line in value["absent"])
    assert all(a["null_low"] <= 0.5 <= a["null_high"] for a in value["alone"]) and set(value["reads"]) == {"L1", "L2", "L3", "L4"}
    again = measured(organism, adapters, frame, texts, Rules(("medical", "gender"), c=1.0, repeats=2, draws=3), 0)
    assert json.dumps(again) == json.dumps(value)
    with pytest.raises(DataError, match="every answer is empty"):
        measured(organism, adapters, frame, {i: replace(t, answer="") for i, t in texts.items()}, Rules(), 0)


def test_sets_come_from_the_probe() -> None:
    def coefficient(estimate: float, half: float) -> dict[str, float]:
        return {"estimate": estimate, "low": estimate - half, "high": estimate + half}

    value: dict[str, Any] = {
        "adapters": ["L1", "L2", "L3", "L4"],
        "reads": {"L1": "general", "L2": "medical", "L3": "general and medical", "L4": "neither"},
        "probes": {MAIN: {"coefficients": [coefficient(v, 0.5) for v in (1, 0.1, -2, 0.2)]}, "non-medical_vs_medical": {"coefficients": [coefficient(v, 0.5) for v in (0.1, 1, 1, 0.2)]}},
    }
    assert members("general", 4, value, "medical")[0] == [0, 2] and members("topic", 4, value, "medical")[0] == [1]
    value["reads"] = dict.fromkeys(value["adapters"], "neither")
    assert members("general", 4, value, "medical") == ([2], "none is clear of 0: the third with the largest coefficient for its interval")
    assert members("all", 4, None, None)[0] == [0, 1, 2, 3]
    assert [members(s, 7, None, None)[0] for s in ("early", "middle", "late")] == [[0, 1, 2], [3, 4], [5, 6]]
    with pytest.raises(DataError, match="were not read"):
        members("general", 4, None, None)
    with pytest.raises(DataError, match="too few answers"):
        members("topic", 4, value, "gender")
    value["probes"][MAIN]["coefficients"] = [coefficient(math.nan, 1)] * 4
    with pytest.raises(DataError, match="keeps no coefficient"):
        members("general", 4, value, "medical")


def read_by(readers: np.ndarray, stream: np.ndarray, answer: np.ndarray, questions: Sequence[int], own: int) -> Any:
    """What one adapter and random readers read of a stream: column `own` of `readers` (d, n) is the adapter's, the others are the draws."""
    order = [own, *(i for i in range(readers.shape[1]) if i != own)]
    frame = pd.DataFrame({"question_id": questions})
    return scalar_probes._Read(frame, ("L0",), (stream @ readers[:, order])[:, None, :], np.ones(len(stream)), answer)


def a_stream(rng: np.random.Generator, signal: float, d: int = 48, n_questions: int = 8, answers: int = 3, length: int = 8) -> tuple[np.ndarray, ...]:
    """(tokens, answer of each, question of each answer, which answers are misaligned, (d,) what misaligned ones have in the stream)."""
    shift = signal * rng.standard_normal(d)
    question, bad = np.repeat(np.arange(n_questions), 2 * answers), np.tile(np.repeat([False, True], answers), n_questions)
    mean = rng.standard_normal((n_questions, d))[question] + bad[:, None] * (shift + 0.1 * signal * rng.standard_normal((n_questions, d))[question])
    stream = np.repeat(mean, length, axis=0) + rng.standard_normal((len(question) * length, d))
    return stream, np.repeat(np.arange(len(question)), length), question, bad, shift


def test_an_adapter_that_is_one_more_random_reader_does_not_beat_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The classes differ in the stream, so every reader finds some of it. An adapter that is one of them must pass for more in 2.5 %, not in 17."""
    real, seen = scalar_probes.by_question, dict[bytes, dict[int, float]]()

    def once(t: Task, root: Any, c: float) -> dict[int, float]:
        key = t.x.tobytes()
        return seen[key] if key in seen else seen.setdefault(key, real(t, root, c))

    monkeypatch.setattr(scalar_probes, "by_question", once)
    above, rules = list[bool](), Rules(c=1.0, draws=15)
    for world in range(3):
        rng = np.random.default_rng(world)
        stream, answer, question, bad, shift = a_stream(rng, 0.3)
        readers = rng.standard_normal((stream.shape[1], rules.draws + 1))
        readers /= np.linalg.norm(readers, axis=0)
        for own in range(rules.draws + 1):
            found = scalar_probes._against_random(read_by(readers, stream, answer, question.tolist(), own), bad, ~bad, rules, ("test",))
            above.append(found["difference"]["low"] > 0)
            assert (found["p"] < 0.025) == above[-1]
        readers[:, 0] = shift / np.linalg.norm(shift)
        good = scalar_probes._against_random(read_by(readers, stream, answer, question.tolist(), 0), bad, ~bad, rules, ("test",))
        assert good["difference"]["low"] > 0 and good["p"] < 0.025, "an adapter that reads what the classes differ in"
    assert sum(above) <= 3, f"{sum(above)} of {len(above)}"  # more has probability 3 % at 2.5 %; beside the draws' mean alone it is 8 of 48


# --- a whole study -------------------------------------------------------------------------------------------------------


def study_with(**block: Any) -> dict[str, Any]:
    study = small_study(tiny_model())
    study["organisms"] = {k: study["organisms"][k] for k in ("A", "B")}
    study["experiments"] = {"plain": {}, "scalars": {"c": 1.0, "repeats": 2, "draws": 3, **block}}
    return study


def test_a_study_reads_its_scalars_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, out = write_study(tmp_path, study_with()), tmp_path / "out"
    run_study(path, out)
    page = (out / "report.html").read_text()
    assert "LoRA scalars of A" in page and 'id="fig-scalars-adapters"' in page and "scalars/probe" in {c["id"] for c in json.loads((out / "claims.json").read_text())}
    table = pd.read_csv(out / "tables" / "scalars-probes.csv")
    assert table.loc[0, "class 0"] == "aligned" and table["AUC within questions"].between(0, 1).all()
    monkeypatch.setattr("convergent.experiments.scalars.measured", None)  # what is kept is not computed again
    run_study(path, out)


@pytest.mark.parametrize(
    ("block", "says"),
    [
        ({"organism": "B"}, r"experiments\.scalars\.organism: B does not have rank-1 adapters"),
        ({"organism": "chat"}, r"experiments\.scalars\.organism: the chat model does not have"),
        ({"organism": "Z"}, r"experiments\.scalars\.organism: no organism 'Z'"),
        ({"topics": ["weather"]}, r"experiments\.scalars\.topics: the judge has no rubric 'weather'"),
        ({"topic_min": 5, "topic_max": 5}, r"experiments\.scalars\.topic_max: 5 is not below topic_min"),
        ({"per_class": 1}, r"experiments\.scalars\.per_class: input should be greater than or equal to 2"),
        ({"significant": 1.5}, r"experiments\.scalars\.significant"),
        ({"draws": 2}, r"experiments\.scalars\.draws: input should be greater than or equal to 3"),
    ],
)
def test_what_cannot_be_is_one_line(block: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=says):
        run_study(write_study(tmp_path, study_with(**block)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_study_without_such_adapters_says_so(tmp_path: Path) -> None:
    study = study_with()
    study["organisms"] = {"A": study["organisms"]["B"]}
    with pytest.raises(StudyError, match=r"scalars\.organism: no organism of this study has rank-1 adapters .* or leave the experiment out$"):
        run_study(write_study(tmp_path, study), tmp_path / "out")
