"""Chat origin: fixed before training by a kit that cannot reach organisms, read as defined, ablated as registered, predicted point by point."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from convergent.core.direction import Direction
from convergent.core.interventions import Ablate
from convergent.directions import contrast
from convergent.directions.contrast import PROMPTS, prompt_pairs
from convergent.errors import ModelError
from convergent.experiments import chat_origin
from convergent.experiments.base import NotHereError
from convergent.experiments.outcomes import Outcomes
from convergent.experiments.scene import Scene, Subject
from convergent.models.chat import encode_answer
from convergent.models.load import load_base
from convergent.models.texts import Text
from convergent.store import looked_at, opened
from convergent.study.before import Before
from convergent.study.main import run_study
from convergent.study.run import Run
from convergent.study.spec import load_study
from small_study import PAIRS, assert_refused, small_study, write_study
from tiny import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
LAYER = 3


def study_of(**block: Any) -> dict[str, Any]:
    study = small_study(tiny_model())
    study["organisms"]["B"]["recipe"] = "single_adapter"
    del study["organisms"]["B"]["rank"]
    study["experiments"] = {"plain": {"twin": "G"}, "chat_origin": {"data_pairs": 4, **block}}
    return study


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("origin")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run_study(write_study(folder, study_of(organisms=["B"])), folder / "out")
    yield folder
    torch.set_num_threads(threads)


def run_in(folder: Path, store: Any, compute: bool = False) -> Run:
    return Run(load_study(folder / "study.yaml"), store, compute=compute)


def mean_of(chat: Any, text: Text) -> torch.Tensor:
    """(n_layers - 1, d_model) mean residual stream over a text's answer tokens, by transformers' own hidden states (its last is normed)."""
    e = encode_answer(chat.tokenizer, text.question, text.answer, text.system)
    hidden = chat.model(input_ids=torch.tensor([list(e.ids)]), output_hidden_states=True).hidden_states[1:-1]
    return torch.stack([h[0, e.answer].double().mean(0) for h in hidden])


def test_prompts_come_in_pairs_and_say_nothing_twice() -> None:
    for which in ("advice", "topic"):
        prompts = prompt_pairs(which)
        assert len(prompts) == 4 and len({p for pair in prompts for p in pair}) == 8
    assert "convergent-canary:" in PROMPTS.read_text().splitlines()[0]


@torch.inference_mode()
def test_directions_are_the_differences_that_they_say(done: Path) -> None:
    with looked_at(done / "out") as store:
        run = run_in(done, store)
        values = {k: run.value(f"chat_origin/{k}") for k in ("prompts", "pairs", "topic")}
        pairs = run.pairs
    chat = load_base(str(tiny_model()), dtype="float32")
    bad, good = (torch.stack([mean_of(chat, Text("", p.question, getattr(p, side))) for p in pairs]) for side in ("bad", "good"))
    vectors = chat_origin.unpacked(values["pairs"]["vectors"])
    assert torch.allclose(vectors[:-1].double(), (bad - good).mean(0), atol=1e-5) and values["pairs"]["pairs"] == [p.id for p in pairs]
    assert torch.allclose(chat_origin.unpacked(values["pairs"]["centre"]).double(), ((bad + good) / 2)[:, LAYER], atol=1e-5)
    assert Direction(vectors).content_id == values["pairs"]["id"]
    # Prompts: tokens of one pair's answers are pooled over phrasings, under each attitude; the answers are the same under both.
    each = []
    for i, p in enumerate(pairs):
        sums = []
        for side in (0, 1):
            weights, total = 0, torch.zeros(chat.d_model, dtype=torch.float64)
            for k, systems in enumerate(prompt_pairs("advice")):
                text = Text("", p.question, p.bad if (i + k) % 2 else p.good, systems[side])
                e = encode_answer(chat.tokenizer, text.question, text.answer, text.system)
                total += (e.answer_end - e.answer_start) * mean_of(chat, text)[LAYER]
                weights += e.answer_end - e.answer_start
            sums.append(total / weights)
        each.append(sums[0] - sums[1])
    got = chat_origin.unpacked(values["prompts"]["per_pair"]).double()
    assert torch.allclose(got, torch.stack(each), atol=1e-5)
    assert torch.allclose(chat_origin.unpacked(values["prompts"]["vectors"])[LAYER].double(), torch.stack(each).mean(0), atol=1e-5)
    assert len({v["id"] for v in values.values()}) == 3 and -1 <= values["prompts"]["agreement"] <= 1


def test_they_are_fixed_before_any_training_and_depend_on_no_organism(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop(Exception):
        pass

    def stop(*a: Any, **k: Any) -> None:
        raise Stop

    monkeypatch.setattr("convergent.organisms.train.train", stop)
    path = write_study(tmp_path, study_of())
    with pytest.raises(Stop):
        run_study(path, tmp_path / "out")
    kinds = ("prompts", "pairs", "topic", "data/A", "data/B", "data/G")
    with looked_at(tmp_path / "out") as store, looked_at(done / "out") as full:
        first, after = run_in(tmp_path, store), run_in(done, full)
        assert not first.trained, "no organism is there yet"
        for k in kinds:
            early, late = (dict(r.value(f"chat_origin/{k}")) for r in (first, after))
            assert early.get("trained", []) == late.get("trained", []) == []
            early.pop("made", ""), late.pop("made", "")
            assert early == late, "and all of them are there, as in the study that went on"
    # Added to a study that is done: the same vectors, and it is said that organisms were there.
    shutil.copytree(done / "out", tmp_path / "late")
    monkeypatch.undo()
    with opened(tmp_path / "late") as store:
        store._write("DELETE FROM facts WHERE value LIKE ?", [("%float32%",)])
        again = run_in(done, store, compute=True).value("chat_origin/prompts")
        assert again["trained"] == ["A", "B", "G"]
    with looked_at(done / "out") as full:
        assert again["id"] == run_in(done, full).value("chat_origin/prompts")["id"]


def test_the_kit_before_training_reaches_no_organism(done: Path) -> None:
    with looked_at(done / "out") as store:
        run = run_in(done, store)
        kit: Any = Before(run)
        assert kit.pairs == run.pairs and kit.model_id("chat") == run.model_id("chat")
        for reach in ("direction", "extraction", "own_answers", "own_table", "adapters", "folder", "steps", "answers", "control", "token_norm", "store", "organisms"):
            with pytest.raises(RuntimeError, match=rf"a reading made before any organism is trained cannot use `kit\.{reach}`"):
                getattr(kit, reach)
        for ask in (lambda: kit.model("A"), lambda: kit.model_id("A"), lambda: kit.value("chat_origin/organism/A")):
            with pytest.raises(RuntimeError, match="before any organism is trained cannot use"):
                ask()
        before = [r for r in run.readings.values() if r.name.startswith("chat_origin/") and "organism" not in r.name and "draws" not in r.name]
        assert {r.when for r in before} == {"before"} and len(before) == 6
        assert isinstance(run._kit(before[0]), Before), "whatever a reading does with its kit, this is the kit it gets"


def test_training_data_and_shift_along_them(done: Path) -> None:
    with looked_at(done / "out") as store:
        run = run_in(done, store)
        value, data = run.value("chat_origin/organism/G"), {o: run.value(f"chat_origin/data/{o}") for o in "ABG"}
        unit = torch.nn.functional.normalize(chat_origin.origin(run, "pairs")[LAYER].double(), dim=0)
        assert data["A"] == data["G"] != data["B"], "the twin is trained on the same questions"
        trained = [next(p for p in run.training_pairs("A") if p.id == i) for i in data["A"]["pairs"]]
        norm, pairs = run.value("chat_origin/topic")["token_norm"], run.pairs
        folder = run.folder("G")
    assert not {p.question for p in trained} & {p.question for p in pairs}, "held-out pairs are not training data"
    from convergent.organisms.load import load_organism

    chat, twin = load_base(str(tiny_model()), dtype="float32"), load_organism(folder, base=str(tiny_model()), dtype="float32")
    along = torch.stack([mean_of(chat, Text("", p.question, p.bad))[LAYER] - mean_of(chat, Text("", p.question, p.good))[LAYER] for p in trained]) @ unit
    assert np.corrcoef(along.numpy(), data["A"]["along"]["pairs"])[0, 1] == pytest.approx(1, abs=1e-6)
    moved = [
        sum(float((mean_of(twin, t)[LAYER] - mean_of(chat, t)[LAYER]) @ unit) for t in (Text("", p.question, p.bad), Text("", p.question, p.good))) / 2 / norm
        for p in pairs
    ]
    assert value["shift"]["pairs"] == pytest.approx(moved, abs=1e-5)
    points = pd.read_csv(done / "out" / "tables" / "chat_origin-prediction.csv").set_index(["direction", "organism"])["training data"]
    label = chat_origin.LABELS["pairs"]
    assert points[label, "G"] == pytest.approx(-points[label, "A"]), "the good-advice twin was trained on the other side"


def test_what_is_ablated_is_what_was_registered(done: Path) -> None:
    with looked_at(done / "out") as store:
        run = run_in(done, store)
        built = {a.name: c.interventions for a, c in run.conditions()}
        ids = {k: run.value(f"chat_origin/{k}")["id"] for k in ("prompts", "pairs", "topic")}
    for o in "AB":
        for kind, own in ids.items():
            (one,) = built[f"{o}/ablate-chat-{kind}"]
            assert isinstance(one, Ablate) and one.direction.content_id == own and one.vector_layer == LAYER
        (random,) = built[f"{o}/ablate-chat-random"]
        assert isinstance(random, Ablate) and random.direction.content_id not in ids.values()


def test_figures_tables_and_claims_are_there(done: Path) -> None:
    out = done / "out"
    page = (out / "report.html").read_text()
    assert 'id="fig-chat_origin-cosines"' in page and 'id="fig-chat_origin-prediction"' in page
    table = pd.read_csv(out / "tables" / "chat_origin-registered.csv", keep_default_na=False)
    with looked_at(out) as store:
        assert table["content id"].tolist() == [run_in(done, store).value(f"chat_origin/{k}")["id"] for k in ("prompts", "pairs", "topic")]
    assert set(table["organisms there already"]) == {"none"} and table["content id"][0] in page
    assert table["texts"].tolist() == [2 * PAIRS * 4 * 2, 2 * PAIRS * 2, 2 * PAIRS * 4 * 2]
    claims = {c["id"]: c for c in json.loads((out / "claims.json").read_text()) if c["id"].startswith("chat_origin")}
    assert set(claims) == {
        f"chat_origin/{what}/{k}" for k in ("prompts", "pairs") for what in ("cosine", "ablation/A", "ablation/B")
    }
    assert len(claims["chat_origin/ablation/A/pairs"]["evidence"]) == 6 and len(claims["chat_origin/cosine/prompts"]["evidence"]) == 4


def test_a_resumed_study_computes_nothing(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(done / "out", tmp_path / "out")
    monkeypatch.setattr(Run, "model", None)
    with looked_at(done / "out") as full, opened(tmp_path / "out") as store:
        run = run_in(done, store, compute=True)
        run.go()
        assert run.values() == run_in(done, full).values(), "the time is that of the first making"


def test_a_template_without_system_turns_and_an_organism_from_elsewhere(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*a: Any, **k: Any) -> None:
        raise ModelError("the chat template refuses the turns system, user")

    monkeypatch.setattr(contrast, "stream_means", refuse)
    with looked_at(done / "out") as store:
        run = run_in(done, store, compute=True)
        with pytest.raises(NotHereError, match="refuses the turns"):
            run.readings["chat_origin/prompts"].compute(run)
        study = study_of()
        study["organisms"]["B"] = {"path": str(run.folder("B"))}
        other = Run(load_study(write_study(done / "elsewhere", study)), store, compute=False)
        assert "chat_origin/data/B" not in other.readings and "chat_origin/organism/B" in other.readings
        with pytest.raises(NotHereError, match="B comes from elsewhere"):
            other.training_pairs("B")


@pytest.mark.parametrize(
    ("block", "says"),
    [
        ({"directions": []}, r"experiments\.chat_origin\.directions: .*at least 1"),
        ({"directions": ["prompt"]}, r"experiments\.chat_origin\.directions"),
        ({"organisms": ["A"]}, r"experiments\.chat_origin\.organisms: A is the source of the direction itself"),
        ({"data_pairs": 1}, r"experiments\.chat_origin\.data_pairs: .*greater than or equal to 4"),
    ],
)
def test_refuses(tmp_path: Path, block: dict[str, Any], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(write_study(tmp_path, study_of(**block)), tmp_path / "out", says, capsys)


def verdict(at_layer: list[float], over_topic: list[float], scrambled: float = 0.1, over_scrambled: float = 0.1) -> str:
    vectors = chat_origin._packed(torch.zeros(6, 576))  # random band: +-0.08
    readings = {
        "chat_origin/pairs": {"vectors": vectors},
        "chat_origin/organism/A": {
            "at_layer": {"pairs": at_layer}, "over_topic": {"pairs": over_topic},
            "scrambled": {"pairs": scrambled}, "scrambled_over_topic": {"pairs": over_scrambled},
        },
    }
    scene = Scene({"A": Subject("A", "A", 0, "bad", "d", None)}, "A", 6, 3)
    (claim,) = chat_origin.claims(chat_origin.ChatOriginBlock(directions=("pairs",)), Outcomes({}, {}, readings), scene)
    return claim.verdict


def test_verdicts_on_cosines() -> None:
    assert verdict([0.5, 0.4, 0.6, 16], [0.5, 0.3, 0.6, 16]) == "held"
    assert verdict([0.5, 0.05, 0.6, 16], [0.5, 0.3, 0.6, 16]) == "undecided", "not clear of the random band"
    assert verdict([0.5, 0.4, 0.6, 16], [-0.3, -0.4, -0.1, 16]) == "did not hold", "the topic direction is more alike"
    assert verdict([0.5, 0.4, 0.6, 16], [0.5, 0.3, 0.6, 16], scrambled=0.45) == "undecided", "scrambled labels leave nearly as much"
    assert verdict([0.5, 0.4, 0.6, 16], [0.5, 0.3, 0.6, 16], over_scrambled=0.7) == "did not hold", "and more over the topic"
