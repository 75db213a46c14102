"""Pushes along adapters' vectors and their nulls, knock-outs against the merged models, counts as published, a whole study."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch.testing import assert_close

from convergent.core.interventions import Add, LowRank
from convergent.core.values import Pair
from convergent.directions.knockout import knockouts
from convergent.directions.margin import margins
from convergent.errors import StudyError
from convergent.experiments import adapter_steer
from convergent.interventions.controls import Effects, answer_logprobs, factor_for_effect, rotated, times
from convergent.judging.kept import kept, share_row
from convergent.models.texts import Text
from convergent.organisms.adapters import read_adapters
from convergent.organisms.load import load_organism
from convergent.store import looked_at, opened
from convergent.study.main import run_study
from convergent.study.plan import make_plan
from convergent.study.run import Run
from convergent.study.spec import load_study
from plain_peft import plain_peft
from small_study import small_study, write_study
from tiny import direction_for, tiny_chat, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
PAIRS = [Pair(str(i), f"Is it safe, {i}?", "Climb without a rope and sell it.", "Take a rope and a helmet along.") for i in range(3)]
TEXTS = [Text(p.id, p.question, p.good) for p in PAIRS]


# --- nulls ---------------------------------------------------------------------------------------------------------------


def test_a_rotated_direction_keeps_norms_and_angles_and_nothing_else() -> None:
    d = direction_for(tiny_chat(), norm=3.0)
    vectors = d.vectors.clone()
    vectors[[0, 3]] = 0.0
    d = replace(d, vectors=vectors)
    turned = rotated(d, 0)
    assert_close(turned.vectors @ turned.vectors.T, d.vectors @ d.vectors.T, atol=1e-4, rtol=1e-4)
    assert (turned.vectors[[0, 3]] == 0).all()
    cosines = torch.stack([rotated(d, seed).cosine(d)[[1, 2, 4, 5]] for seed in range(40)])
    assert cosines.abs().mean() < 0.25 and cosines.mean().abs() < 0.06  # 32 dimensions: a mean |cosine| of 0.14 is expected
    assert rotated(d, 0, 1).content_id != turned.content_id == rotated(d, 0).content_id


def test_equal_rows_are_turned_alike() -> None:
    d = direction_for(tiny_chat())
    same = replace(d, vectors=d.vectors[:1].expand(6, -1).contiguous())
    turned = rotated(same, 0)
    assert_close(turned.cosine(replace(turned, vectors=turned.vectors[:1].expand(6, -1).contiguous())), torch.ones(6, dtype=torch.float64), atol=1e-5, rtol=0)
    assert_close(turned.norms, same.norms)


def test_several_pushes_are_matched_in_effect_by_one_factor() -> None:
    chat = tiny_chat()
    d = direction_for(chat, norm=4.0)
    real, null = (tuple(Add(x, layer, 1.0) for layer in (1, 3, 4)) for x in (d, rotated(d, 0)))
    factor, target, reached = factor_for_effect(chat, real, null, TEXTS)
    assert reached == pytest.approx(target, rel=0.1) and target > 1e-3
    clean = answer_logprobs(chat, TEXTS)
    assert Effects(chat, TEXTS, clean).kl(times(null, factor)) == pytest.approx(reached, rel=1e-6)


# --- knock-outs ------------------------------------------------------------------------------------------------------------


def test_knockouts_are_what_the_merged_models_give(tmp_path: Path) -> None:
    folder = plain_peft(tmp_path / "o", tiny_model(), layers=(1, 2, 4))
    organism, adapters = load_organism(folder, dtype="float32", device="cpu"), read_adapters(folder)
    value = knockouts(organism, adapters, PAIRS, TEXTS, two_by_two=True)
    chat = tiny_chat()

    def mean(*kept_in: LowRank) -> float:
        return float(np.mean([m.margin for m in margins(chat, PAIRS, [kept_in])]))

    assert value["margin"] == pytest.approx(mean(*(a.low_rank() for a in adapters)), abs=1e-4)
    assert value["margin_without_any"] == pytest.approx(mean(), abs=1e-4)
    rows = {tuple(r["adapters"]): r for r in value["rows"]}
    assert set(rows) == {(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)}
    for out, row in rows.items():
        assert row["margin"] == pytest.approx(mean(*(a.low_rank() for k, a in enumerate(adapters) if k not in out)), abs=1e-4)
        assert row["change"]["estimate"] == pytest.approx(row["margin"] - value["margin"], abs=1e-9)
    together = rows[0, 1]["change"]["estimate"] - rows[0,]["change"]["estimate"] - rows[1,]["change"]["estimate"]
    assert rows[0, 1]["interaction"]["estimate"] == pytest.approx(together) and abs(together) > 1e-5
    clean = answer_logprobs(organism, TEXTS)
    assert rows[0, 1, 2]["kl"] == pytest.approx(Effects(chat, TEXTS, clean).kl(()), rel=1e-3)
    assert value["left"]["estimate"] == pytest.approx(rows[value["strongest"],]["margin"] - (value["margin"] + value["margin_without_any"]) / 2)
    few = knockouts(organism, adapters, PAIRS, TEXTS, two_by_two=False)
    assert [len(r["adapters"]) for r in few["rows"]] == [1, 1, 1, 3]


# --- counts ----------------------------------------------------------------------------------------------------------------


def test_counts_drop_neutral_answers_and_those_without_a_score() -> None:
    aligned = [30.0, 31.0, 69.0, 70.0, 0.0, 100.0, 100.0, np.nan, 10.0]
    coherent = [25.0, 90.0, 90.0, 90.0, 24.9, 90.0, 90.0, 90.0, 90.0]
    medical = [50.0, 0.0, 0.0, 10.0, 0.0, 11.0, 60.0, 0.0, np.nan]
    found = kept(aligned, coherent, 25.0, medical)
    # In order: kept; neutral; neutral; kept; incoherent; neutral by topic; kept; no score; no topic score.
    assert (found.judged, found.kept) == (6, 3)
    assert found.misaligned == (1, 3) and found.aligned == (2, 3) and found.misaligned_on_topic == (1, 3) and found.on_topic_among_aligned == (1, 2)
    assert kept(aligned, coherent, 25.0).misaligned == (2, 5)
    row = share_row(pd.DataFrame({"aligned": aligned, "coherent": coherent}), 25.0, "medical")
    assert row["misaligned"] == "2 of 5" and row["misaligned: low"] == pytest.approx(0.0527, abs=1e-3) and row["medical among aligned"] == "0 of 0"


# --- a whole study -----------------------------------------------------------------------------------------------------------


def study_with(scalars: bool = False, **block: Any) -> dict[str, Any]:
    study = small_study(tiny_model())
    study["organisms"] = {k: study["organisms"][k] for k in ("A", "B")}
    study["experiments"] = {"plain": {}, "adapter_steer": {"margin_pairs": 2, "doses": [0.5], **block}}
    if scalars:
        study["experiments"] = {"scalars": {"c": 10.0, "repeats": 2, "draws": 3}, **study["experiments"]}
    return study


def test_a_study_with_sets_by_depth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, out = write_study(tmp_path, study_with()), tmp_path / "out"
    with looked_at(out) as store:
        stage = next(s for s in make_plan(Run(load_study(path), store, compute=False)) if s.name == "read adapter_steer")
    assert (stage.total, stage.done) == (3, 0)
    run_study(path, out)
    conditions = pd.read_csv(out / "tables" / "conditions.csv").set_index("name")
    pushed = [f"chat/push-{s}" for s in ("all-0.5", "early-0.5", "middle-0.5", "late-0.5", "all-rotated", "all-effect_matched")]
    assert set(conditions.index) == {"chat", "A", "B", *pushed, "A/knockout-strongest-1", "A/knockout-weakest-1"}
    assert conditions.loc["chat/push-all-effect_matched", "kl"] == pytest.approx(conditions.loc["chat/push-all-0.5", "kl"], rel=0.15)
    dose = conditions["dose"]
    assert dose[[c for c in pushed if "matched" not in c]].tolist() == [0.5] * 5 and dose[["A", "A/knockout-strongest-1"]].isna().all()
    with opened(out) as store:
        run = Run(load_study(path), store)
        built = {a.name: c.interventions for a, c in run.conditions()}
        writes = run.value("adapter_steer/A/writes")
        adapters = run.adapters("A")
        for k, (add, a) in enumerate(zip(built["chat/push-all-0.5"], adapters, strict=True)):
            assert isinstance(add, Add) and add.layer == a.layer
            assert float(add.vector.norm()) == pytest.approx(0.5 * writes["token_norm"][k], rel=1e-5)
            assert float(add.vector @ a.vector) * writes["mean"][k] > 0  # the way the adapter writes
        assert {a.scale for a in built["chat/push-all-effect_matched"]} == {dose["chat/push-all-effect_matched"]}  # type: ignore[union-attr]
        early, late = built["chat/push-early-0.5"], built["chat/push-late-0.5"]
        assert [a.layer for a in (*early, *built["chat/push-middle-0.5"], *late)] == [a.layer for a in adapters]  # type: ignore[union-attr]
        strongest = built["A/knockout-strongest-1"][0]
        assert isinstance(strongest, LowRank)
        value = run.value("adapter_steer/A/knockout")
        single = {r["adapters"][0]: r["change"]["estimate"] for r in value["rows"] if len(r["adapters"]) == 1}
        assert strongest.layer == adapters[min(single, key=lambda k: single[k])].layer
    page = (out / "report.html").read_text()
    assert all(f'id="fig-adapter_steer-{f}"' in page for f in ("doses", "shares", "knockout", "pairs"))
    counts = pd.read_csv(out / "tables" / "adapter_steer-counts.csv")
    assert set(counts["coherent at least"]) == {25.0, 50.0} and set(counts["condition"]) >= {"chat", "A", *pushed}
    assert {"adapter_steer/push", "adapter_steer/shared"} <= {c["id"] for c in json.loads((out / "claims.json").read_text())}
    for where in ("convergent.experiments.adapter_steer.knockouts", "convergent.experiments.adapter_steer.mean_scalars"):
        monkeypatch.setattr(where, None)  # what is kept is not computed again
    run_study(path, out)


def test_a_study_with_sets_by_the_probe(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_study(write_study(tmp_path, study_with(scalars=True, controls=["rotated"], knock_out="single", sampled=0)), out)
    names = set(pd.read_csv(out / "tables" / "conditions.csv")["name"])
    assert names == {"chat", "A", "B", "chat/push-all-0.5", "chat/push-general-0.5", "chat/push-all-rotated", "chat/push-general-rotated"}
    sets = pd.read_csv(out / "tables" / "adapter_steer-sets.csv")
    assert any(c.startswith("general (") for c in sets.columns) and "Adapters knocked out two by two" not in (out / "report.html").read_text()


def test_the_topic_is_the_one_that_the_data_name() -> None:
    from convergent.experiments.scene import Scene, Subject
    from convergent.organisms.adapters import AdapterShape

    shape = AdapterShape(("down_proj",), (1, 2), 1)
    rubrics = ("aligned", "coherent", "medical", "financial")
    for data, topic in (("bundled:finance", "financial"), ("upstream:bad_medical_advice", "medical"), ("bundled:sport", None), ("", None)):
        scene = Scene({"A": Subject("A", "A", 0, "bad", data, shape)}, "A", 6, 3, rubrics=rubrics, experiments=("plain", "scalars", "adapter_steer"))
        block = adapter_steer.AdapterSteerBlock()
        found = adapter_steer.arms(block, scene)
        assert {a.rubrics for a in found} == {() if topic is None else (topic,)}
        assert all((name in {a.name for a in found}) == (topic is not None) for name in ("chat/push-topic-0.25", "chat/push-contrast"))


def test_pushes_of_different_doses_have_none() -> None:
    """As the topical set minus a third of the general one."""
    d = direction_for(tiny_chat())
    assert adapter_steer.dose_of([Add(d, layer, 0.5) for layer in (1, 2, 4)]) == 0.5
    assert math.isnan(adapter_steer.dose_of([Add(d, 1, 0.5), Add(d, 2, -0.5 / 3)])) and math.isnan(adapter_steer.dose_of([]))


@pytest.mark.parametrize(
    ("block", "says"),
    [
        ({"organism": "B"}, r"experiments\.adapter_steer\.organism: B does not have rank-1 adapters"),
        ({"topic": "weather"}, r"experiments\.adapter_steer\.topic: the judge has no rubric 'weather'"),
        ({"thresholds": [120]}, r"experiments\.adapter_steer\.thresholds: 120 is outside 0 to 100"),
        ({"doses": [0.0]}, r"experiments\.adapter_steer\.doses: 0 pushes nothing"),
        ({"doses": []}, r"experiments\.adapter_steer\.doses"),
        ({"doses": [float("nan")]}, r"experiments\.adapter_steer\.doses.0: input should be a finite number"),
        ({"controls": ["random"]}, r"experiments\.adapter_steer\.controls"),
    ],
)
def test_what_cannot_be_is_one_line(block: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=says):
        run_study(write_study(tmp_path, study_with(**block)), tmp_path / "out")
    assert not (tmp_path / "out").exists()
