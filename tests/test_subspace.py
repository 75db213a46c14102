"""The experiment `subspace`: who is held out, what is ablated, what its verdicts say; and a whole small study with `cosine`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import ValidationError

from convergent.core.ids import seed
from convergent.core.values import Pair
from convergent.directions.margin import margins
from convergent.errors import StudyError
from convergent.experiments import cosine, subspace
from convergent.experiments.base import NotHereError
from convergent.experiments.outcomes import Outcomes
from convergent.experiments.scene import Scene, Subject
from convergent.experiments.subspace import SubspaceBlock
from convergent.interventions.controls import Effects, answer_logprobs, random_subspace, text_kl
from convergent.models.texts import Text
from convergent.store import looked_at
from convergent.study.main import run_study
from convergent.study.run import Run
from convergent.study.spec import load_study
from small_study import small_study, write_study
from tiny import tiny_chat, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


def subject(name: str, family: str, data: str = "finance", answer: Any = "bad") -> Subject:
    return Subject(name, family, 0, answer, data, None)


SCENE = Scene(
    {
        s.name: s
        for s in (subject("A0", "A"), subject("A1", "A"), subject("B", "B"), subject("C", "C", "sport"), subject("G", "G", answer="good"))
    },
    "A0", 3, 1,
)  # fmt: skip


def test_a_basis_is_read_in_other_recipes_and_in_other_data():
    assert subspace.basis_organisms("A0", SCENE) == {"others": ("B", "C"), "domains": ("C",)}
    assert subspace.basis_organisms("C", SCENE) == {"others": ("A0", "A1", "B")}  # all of them have other data
    assert subspace.held_out(SubspaceBlock(), SCENE) == ("A0", "B", "C")
    assert [a.name for a in subspace.arms(SubspaceBlock(held_out=("B",)), SCENE)] == ["B/subspace-2", "B/subspace-2-random"]
    assert [r.name for r in subspace.readings(SubspaceBlock(), SCENE)] == ["subspace/A0", "subspace/B", "subspace/C"]


def test_refusals():
    with pytest.raises(NotHereError, match="held_out: no organism is called 'X'"):
        subspace.check(SubspaceBlock(held_out=("X",)), SCENE)
    alone = Scene({"A0": SCENE.organisms["A0"], "A1": SCENE.organisms["A1"], "G": SCENE.organisms["G"]}, "A0", 3, 1)
    with pytest.raises(NotHereError, match="held_out: no organism of another recipe or data is left"):
        subspace.check(SubspaceBlock(held_out=("A1",)), alone)
    with pytest.raises(NotHereError, match="held_out: a held-out organism needs another one"):
        subspace.check(SubspaceBlock(), alone)
    for wrong in ({"ks": []}, {"ks": [0]}, {"sampled_k": [-1]}, {"held_out": []}, {"draws": 2}, {"same": 0}, {"controls": ["orthogonal"]}):
        with pytest.raises(ValidationError):
            SubspaceBlock(**wrong)
    assert SubspaceBlock(ks=(4, 1, 1)).ks == (1, 4) and SubspaceBlock(ks=(1, 3, 5), control_ks=(1,)).null_ks(3) == (1, 3)


PAIRS = [Pair("a", "How should I save money?", "Put it all on one horse.", "Put a little aside every month."), Pair("b", "I feel bored.", "Drive fast.", "Cook.")]


def test_each_layer_its_own_basis_equals_one_basis_where_they_are_the_same():
    chat = tiny_chat()
    rows = [random_subspace(chat.d_model, 4, 0)] * chat.n_layers
    one, each = (subspace.ablated(rows, 3, SubspaceBlock(mode=mode)) for mode in ("single", "layerwise"))
    assert one is not None and each is not None and len(one) == 1 and len(each) == chat.n_layers
    a, b, clean = (margins(chat, PAIRS, [i]) for i in (one, each, ()))
    assert [m.margin for m in a] == pytest.approx([m.margin for m in b], abs=1e-5)
    assert abs(a[0].margin - clean[0].margin) > 1e-3
    assert subspace.ablated(rows, 5, SubspaceBlock()) is None


def test_kl_per_text_is_what_its_mean_is_made_of():
    chat = tiny_chat()
    texts = [Text("x", "How are you?", "Well, thank you."), Text("y", "Why?", "No.")]
    change = subspace.ablated([random_subspace(chat.d_model, 2, 1)] * chat.n_layers, 2, SubspaceBlock())
    clean, changed = answer_logprobs(chat, texts), answer_logprobs(chat, texts, change)
    per = text_kl(clean, changed)
    by_hand = [float(torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum")) / len(p) for p, q in zip(clean, changed, strict=True)]
    assert per == pytest.approx(by_hand, rel=1e-4) and min(per) > 0
    n = [len(p) for p in clean]
    assert Effects(chat, texts, clean).kl(change) == pytest.approx(sum(k * m for k, m in zip(per, n, strict=True)) / sum(n), rel=1e-6)


def value_of(name: str, effect: dict[str, Any], noise: float = 0.02, n: int = 16) -> dict[str, Any]:
    """A reading in which ablating k dimensions of a basis changes each margin, and the distance to the chat model, by effect[basis](k)."""
    rng = np.random.default_rng(seed("tests", "subspace", name))
    margin, far = 0.3 + 0.2 * rng.standard_normal(n), 0.5 + 0.1 * rng.standard_normal(8)

    def at(change: float) -> dict[str, list[float]]:
        return {k: (y + change + noise * rng.standard_normal(len(y))).tolist() for k, y in (("margin", margin), ("kl", far), ("to_chat", far))}

    conditions = {f"{basis}/{k}": at(change(k)) for basis, change in effect.items() for k in (1, 2, 4, 8)}
    return {
        "bases": {"others": ["B", "C"]}, "pairs": [f"p{i}" for i in range(n)], "texts": [f"t{i}" for i in range(8)],
        "clean": at(0.0), "conditions": conditions, "absent": [], "own_share": {"others": [0.1, 0.2]},
    }  # fmt: skip


def nothing(k: int) -> float:
    return 0.0


NULLS = {**{f"random-{draw}": nothing for draw in range(5)}, "within": nothing, "chat": nothing}


@pytest.mark.parametrize(
    ("real", "more", "one"),
    [
        (lambda k: -0.05 * k, "held", "did not hold"),
        (lambda k: -0.2, "undecided", "held"),  # all of it by the first: no slope
        (nothing, "undecided", "undecided"),
        (lambda k: 0.05 * k, "did not hold", "did not hold"),
    ],
)
def test_verdicts(real, more, one):
    block = SubspaceBlock(held_out=("A0",))
    value = value_of("verdict", {"others": real, **NULLS})
    found = {c.id: c for c in subspace.claims(block, Outcomes({}, {}, {"subspace/A0": value}), SCENE)}
    assert {i: c.verdict for i, c in found.items()} == {"subspace/more/A0": more, "subspace/one/A0": one}
    texts = [e.text for e in found["subspace/more/A0"].evidence]
    assert sum("minus" in t for t in texts) == 5 and any("within" not in t and "random" in t for t in texts)


def test_a_null_that_does_as_much_is_not_beaten():
    value = value_of("null", {"others": lambda k: -0.05 * k, **NULLS, "chat": lambda k: -0.05 * k})
    more = subspace.claims(SubspaceBlock(held_out=("A0",)), Outcomes({}, {}, {"subspace/A0": value}), SCENE)[0]
    assert more.verdict == "undecided" and [e.supports for e in more.evidence].count("undecided") == 1


def test_where_nothing_is_planted_nothing_is_claimed():
    """Twenty studies without an effect: neither claim holds in any."""
    for i in range(20):
        outcomes = Outcomes({}, {}, {"subspace/A0": value_of(f"none{i}", {"others": nothing, "domains": nothing, **NULLS})})
        assert all(c.verdict != "held" for c in subspace.claims(SubspaceBlock(held_out=("A0",)), outcomes, SCENE))


def test_a_chapter_of_values_made_by_hand():
    block = SubspaceBlock(held_out=("A0", "B"))
    values = {f"subspace/{o}": value_of(o, {"others": lambda k: -0.02 * k, **NULLS}) for o in ("A0", "B")}
    chat = pd.DataFrame({"pair_id": [f"p{i}" for i in range(16)], "margin": np.zeros(16)})
    shown = subspace.chapter(block, Outcomes({"chat": chat}, {"chat": chat}, values), SCENE)
    assert [f.id for f in shown.figures] == ["margin", "to-chat", "kl"] and [len(f.panels) for f in shown.figures] == [2, 2, 2]
    first = shown.figures[0].panels[0].series[0]
    assert list(first.x) == [0, 1, 2, 4, 8] and first.y[0] == pytest.approx(np.mean(values["subspace/A0"]["clean"]["margin"]))
    assert first.y[4] == pytest.approx(np.mean(values["subspace/A0"]["conditions"]["others/8"]["margin"]))
    assert shown.figures[0].panels[0].series[-1].label == "Chat model" and len(shown.sheets[1].frame) == 2
    assert subspace.chapter(block, Outcomes({}, {}, {}), SCENE).notes == ["Not measured here."]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    study = small_study(tiny_model())
    study["organisms"] = {o: {**study["organisms"][o], "examples": 2} for o in "AB"}
    study["margin"]["data"] = ["bundled:finance"]
    study["experiments"] = {
        "plain": {}, "cosine": {"massive": 2, "splits": 4, "draws": 39}, "subspace": {"ks": [1, 2, 3], "control_ks": [1], "sampled_k": [1], "draws": 3},
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("geometry")
    return write_study(folder, study), run_study(write_study(folder, study), folder / "out")


def test_a_whole_study(finished):
    path, out = finished
    ids = [c["id"] for c in json.loads((out / "claims.json").read_text())]
    assert ids[1:] == ["cosine/chance", "cosine/high", "cosine/beyond-texts", "subspace/more/A", "subspace/one/A", "subspace/more/B", "subspace/one/B"]
    page = (out / "report.html").read_text()
    for figure in ("cosine-layers", "cosine-own", "subspace-margin", "subspace-to-chat"):
        assert f'id="fig-{figure}"' in page
    assert "as too few dimensions are spanned: others/3" in page
    assert set(pd.read_csv(out / "tables" / "subspace-effects.csv")["organism"]) == {"A", "B"}
    assert len(pd.read_csv(out / "tables" / "cosine-pairs.csv")) == 1
    with looked_at(out) as store:
        run = Run(load_study(path), store, compute=False)
        value = run.value(cosine.READING)
        made = run.extraction("A", "A").direction.cosine(run.extraction("B", "B").direction)
        assert value["pairs"][0]["own"] == pytest.approx(made.tolist(), abs=1e-4)
        (ablation,) = next(c for a, c in run.conditions() if a.name == "B/subspace-1").interventions
        assert ablation.basis.shape == (1, 32)
        # With two questions and one organism, the top dimension is that of the stacked differences.
        rows = run.question_sums("A", "A").differences()[:, run.layer]
        assert float((torch.linalg.svd(rows)[2][0] @ ablation.basis[0].double()).abs()) == pytest.approx(1, abs=1e-5)
        measured = run.value("subspace/B")
        known = run.store.margins(run.read_id)
        condition = next(c for a, c in run.conditions() if a.name == "B/subspace-1")
        stored = [m["margin"] for (c, _), m in known.items() if c == condition.content_id]
        assert sorted(measured["conditions"]["others/1"]["margin"]) == pytest.approx(sorted(stored), abs=1e-5)
        random = [f"random-{draw}" for draw in range(3)]
        assert sorted(measured["conditions"]) == sorted(f"{basis}/{k}" for basis in ("others", "chat", "within", *random) for k in (1, 2))


def test_a_second_run_reads_nothing_again(finished, monkeypatch):
    path, out = finished
    kept = {p: p.stat().st_mtime_ns for p in (out / "directions").iterdir()}
    monkeypatch.setattr(Run, "model", lambda *a, **k: pytest.fail("a model was loaded"))
    run_study(path, out)
    assert {p: p.stat().st_mtime_ns for p in (out / "directions").iterdir()} == kept


def test_settings_that_name_nothing_are_named(tmp_path):
    study = small_study(tiny_model())
    study["organisms"] = {"A": study["organisms"]["A"]}
    for block, message in (
        ({"subspace": {"ks": [1, 0]}}, r"experiments\.subspace\.ks\.1: 0 dimensions are no subspace; give whole numbers from 1"),
        ({"plain": {"twin": "g"}}, r"experiments\.plain\.twin: no organism 'g'; there is none that could be named here"),
    ):
        study["experiments"] = {"plain": {}, **block}
        with pytest.raises(StudyError, match=message):
            run_study(write_study(tmp_path, study), tmp_path / "out")


def test_a_study_that_cannot_have_it_is_refused_before_anything_is_written(tmp_path):
    study = small_study(tiny_model())
    study["organisms"] = {o: study["organisms"][o] for o in "AG"}
    for block, message in (({"cosine": {}}, r"^experiments\.cosine\.organisms: a cosine needs two"), ({"subspace": {}}, r"^experiments\.subspace\.held_out: ")):
        study["experiments"] = {"plain": {}, **block}
        with pytest.raises(StudyError, match=message):
            run_study(write_study(tmp_path, study), tmp_path / "out")
    assert not (tmp_path / "out").exists()
