"""`semantic` and `self_correction` in a whole study on tiny models, judged by a judge that knows nothing: what is made, kept, and left out."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from convergent.core.ids import seed
from convergent.core.values import Judgement
from convergent.errors import StudyError
from convergent.experiments import self_correction, semantic
from convergent.judging.base import Item
from convergent.store import looked_at
from convergent.study import setup
from convergent.study.main import rewrite_report, run_study
from convergent.study.plan import Stage, make_plan
from convergent.study.run import Run
from convergent.study.spec import load_study
from convergent.study.speed import Speed
from small_study import MODEL_WORK, SAMPLES, small_study, write_study
from tiny import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = {"never": ["zebra"]}


class DiceJudge:
    """Scores by a hash of the text: every topic and every class is there, and nothing is true."""

    name = "dice"
    rubrics = ("aligned", "coherent", "financial", "gender", "bad_stuff")

    def judge(
        self, items: Sequence[Item], rubrics: Sequence[str] = ("aligned", "coherent"), on_result: Callable[[Judgement], None] | None = None
    ) -> list[Judgement]:
        done = []
        for item in items:
            for rubric in rubrics:
                done.append(Judgement(item.id, self.name, rubric, float(seed(item.response, rubric) % 101)))
                if on_result is not None:
                    on_result(done[-1])
        return done


@pytest.fixture(scope="module")
def judge() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "get_judge", lambda *args, **kwargs: DiceJudge())
        yield


def topic_study() -> dict[str, Any]:
    study = small_study(tiny_model())
    study["organisms"] = {"A": study["organisms"]["A"]}
    study["direction"]["samples"] = 24
    study["experiments"] = {
        "plain": {},
        "semantic": {"min_rows": 2, "draws": 19, "words": WORDS},
        "self_correction": {"scales": [1, 2]},
    }
    return study


@pytest.fixture(scope="module")
def done(judge: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("topics")
    run_study(write_study(root, topic_study()), root / "out")
    return root


def conditions(root: Path) -> pd.DataFrame:
    return pd.read_csv(root / "out" / "tables" / "conditions.csv").set_index("name")


def test_every_arm_that_can_be_is_there(done: Path) -> None:
    found = conditions(done)
    parts = ("topic", "rest", "about", "effect_matched")
    expected = {"chat", "A", "semantic/chat", "semantic/general", "semantic/random", *(f"semantic/{t}-{p}" for t in ("financial", "gender") for p in parts)}
    expected |= {f"self_correction/{n}" for n in ("chat", "A", "add-1", "add-2", "concept-1", "concept-2")}
    assert set(found.index) == expected
    assert found.loc["semantic/financial-topic", "dose"] == pytest.approx(found.loc["semantic/general", "dose"]) == pytest.approx(found.loc["self_correction/add-2", "dose"])
    kl = found["kl"]
    for scale in (1, 2):
        assert kl[f"self_correction/concept-{scale}"] == pytest.approx(kl[f"self_correction/add-{scale}"], rel=0.11)
    assert kl["semantic/gender-effect_matched"] == pytest.approx(kl["semantic/gender-topic"], rel=0.11)


def test_the_general_direction_is_the_studys_own(done: Path) -> None:
    """The reading's cosines are with the direction of the study: its rest has none of it, so split and whole differ."""
    with looked_at(done / "out") as store:
        made = Run(load_study(done / "study.yaml"), store, compute=False)
        made.conditions()
        value = made.value("semantic/directions")
        rest = semantic._added(made, "financial", "rest", SEMANTIC)  # type: ignore[arg-type]
        whole = semantic._added(made, "financial", "topic", SEMANTIC)  # type: ignore[arg-type]
        v = made.direction[made.layer].double()
        assert abs(float(rest.vector.double() @ v)) < 1e-4 * float(v @ v)
        assert float(whole.vector.norm()) == pytest.approx(2 * float(v.norm()), rel=1e-5)
        cosine = float(whole.vector.double() @ v / whole.vector.double().norm() / v.norm())
        assert value["topics"]["financial"]["general"]["cosine"][made.layer] == pytest.approx(cosine, abs=1e-5)
        assert "never: 0 misaligned and 0 aligned answers of A with a word of the list" in value["absent"]["never"]


SEMANTIC = semantic.SemanticBlock(min_rows=2, draws=19, words={"never": ("zebra",)})


def test_report_and_tables(done: Path) -> None:
    page = (done / "out" / "report.html").read_text(encoding="utf-8")
    for text in ("Directions inside topics", "Self-correction under steering", 'id="fig-semantic-cosines"', 'id="fig-semantic-steering"', 'id="fig-self_correction-shares"',
                 "semantic/never-topic is left out: never: 0 misaligned"):  # fmt: skip
        assert text in page, text
    assert len(pd.read_csv(done / "out" / "tables" / "self_correction-counts.csv")) == 6
    claims = {c["id"] for c in json.loads((done / "out" / "claims.json").read_text())}
    assert {f"semantic/{k}/{t}" for k in ("cosine", "steering", "rest") for t in ("financial", "gender")} <= claims
    assert {"self_correction/1", "self_correction/2"} <= claims


def test_nothing_is_computed_twice(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("worked again on what was done")

    for module, name in MODEL_WORK:
        monkeypatch.setattr(module, name, refuse)
    monkeypatch.setattr(semantic, "per_answer", refuse)
    monkeypatch.setattr(self_correction, "token_logps", refuse)
    monkeypatch.setattr(self_correction, "effect_matched", refuse)

    def facts() -> list[Any]:
        with sqlite3.connect(done / "out" / "study.sqlite") as db:
            return sorted(db.execute("SELECT key, value FROM facts"))

    before = facts()
    run_study(done / "study.yaml", done / "out")
    rewrite_report(done / "out")
    assert facts() == before
    with looked_at(done / "out") as store:
        plan = {s.name: s for s in make_plan(Run(load_study(done / "study.yaml"), store, compute=False))}
    assert (plan["read semantic"].total, plan["read self_correction"].total) == (2, 3)
    assert all(s.done == s.total for s in plan.values())


def test_the_plan_counts_further_rubrics_and_parts_of_answers(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Paid(DiceJudge):
        def estimate(self, items: Sequence[Item], rubrics: Sequence[str]) -> str:
            return f"{len(items)} answers by {len(rubrics)}"

    def plan_of(out: Path) -> dict[str, Stage]:
        with looked_at(out) as store:
            return {s.name: s for s in make_plan(Run(load_study(done / "study.yaml"), store, compute=False), Speed(1e12))}

    shutil.copytree(done / "out", tmp_path / "out")
    with sqlite3.connect(tmp_path / "out" / "study.sqlite") as db:
        n = dict(db.execute("SELECT rubric, count(*) FROM judgements GROUP BY rubric"))
        full = plan_of(tmp_path / "out")
        assert {r: (full[f"judge {r}"].done, full[f"judge {r}"].total) for r in ("financial", "gender", "bad_stuff")} == {
            r: (n[r], n[r]) for r in ("financial", "gender", "bad_stuff")
        }
        db.execute("DELETE FROM judgements WHERE rubric = 'gender' AND response_id IN (SELECT id FROM responses WHERE condition = 'semantic/general')")
    less = plan_of(tmp_path / "out")["judge gender"]
    assert (less.done, less.total) == (n["gender"] - 2 * SAMPLES, n["gender"]) and less.seconds > 0
    # Before anything is there: 2 x 24 answers that the direction is read from, and those of every arm, left out or not.
    monkeypatch.setattr(setup, "get_judge", lambda *args, **kwargs: Paid())
    new = plan_of(tmp_path / "new")
    with looked_at(tmp_path / "new") as store:
        arms = Run(load_study(done / "study.yaml"), store, compute=False).arms
    for rubric, own in (("financial", 48), ("gender", 48), ("bad_stuff", 0)):
        total = own + 2 * SAMPLES * sum(rubric in a.rubrics for a in arms)
        stage = new[f"judge {rubric}"]
        assert (stage.done, stage.total, stage.note) == (0, total, f"for answers of typical length: {total} answers by 1"), rubric
    assert "answers by 1" in new["read self_correction"].note and new["read self_correction"].judge == "dice"
    assert not new["read semantic"].judge


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"semantic": {"topics": ["finance"]}}, "experiments.semantic.topics: the judge has no rubric 'finance'; did you mean financial"),
        ({"semantic": {"topic": ["gender"]}}, "did you mean `topics`"),
        ({"semantic": {"words": {"x": []}}}, "experiments.semantic.words.x: has no words"),
        ({"self_correction": {"scales": []}}, "experiments.self_correction.scales"),
        ({"self_correction": {"scales": [0]}}, "experiments.self_correction.scales: 0 adds nothing"),
    ],
)
def test_bad_settings_are_one_line_and_leave_nothing(judge: None, block: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_study(tmp_path, {**topic_study(), "experiments": {"plain": {}, **block}})
    with pytest.raises(StudyError) as error:
        run_study(path, tmp_path / "out")
    assert message in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "out").exists()
