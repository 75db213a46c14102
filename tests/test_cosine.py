"""The experiment `cosine`: which pairs are compared, what is refused, and what its verdicts say of values made by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from convergent.directions.compare import DIFFERENCES, MEASURES, compare, wanted
from convergent.experiments import cosine
from convergent.experiments.base import NotHereError
from convergent.experiments.cosine import CosineBlock
from convergent.experiments.outcomes import Outcomes
from convergent.experiments.scene import Scene, Subject
from synthetic_sums import drawn_sums, unit

DEPTH = 3


def subject(name: str, family: str, data: str = "finance", answer: Any = "bad") -> Subject:
    return Subject(name, family, 0, answer, data, None)


SCENE = Scene(
    {
        s.name: s
        for s in (subject("A0", "A"), subject("A1", "A"), subject("B", "B"), subject("C", "C", "sport"), subject("G", "G", answer="good"),
                  subject("H", "H", answer="good"))
    },
    "A0", DEPTH, 1,
)  # fmt: skip


def test_pairs_and_their_groups():
    groups = {p: cosine.groups_of(*p, SCENE) for p in (("A0", "A1"), ("A0", "B"), ("A0", "C"), ("B", "G"), ("G", "H"))}
    assert groups == {("A0", "A1"): ("seeds",), ("A0", "B"): ("families",), ("A0", "C"): ("families", "data"), ("B", "G"): ("twin",), ("G", "H"): ()}
    assert (cosine.exceptions(48), cosine.exceptions(30), cosine.exceptions(6)) == (4, 2, 0)


def test_refusals():
    with pytest.raises(NotHereError, match="organisms: no organism is called 'X'; there are A0, A1, B, C, G, H"):
        cosine.check(CosineBlock(organisms=("A0", "X")), SCENE)
    with pytest.raises(NotHereError, match="organisms: a cosine needs two organisms that were not trained on good advice"):
        cosine.check(CosineBlock(organisms=("A0", "G")), SCENE)
    cosine.check(CosineBlock(), SCENE)
    for wrong in ({"organisms": ["A0"]}, {"organisms": []}, {"massive": 0}, {"draws": 1}, {"layer": 3}):
        with pytest.raises(ValidationError):
            CosineBlock(**wrong)


def value_of(own: float, lowest: float, ceiling: float, excess: float, half: float = 0.05) -> dict[str, Any]:
    """A reading with intervals of +-half."""

    def column(y: float) -> dict[str, list[float]]:
        return {"y": [y] * DEPTH, "low": [y - half] * DEPTH, "high": [y + half] * DEPTH}

    def one(y: float) -> dict[str, float]:
        return {"y": y, "low": y - half, "high": y + half}

    measures = {m: column(own) for m in MEASURES} | {d: column(excess) for d in DIFFERENCES}
    group = {"n_pairs": 2, "measures": measures, "lowest": {"own": one(lowest), "ceiling": one(ceiling)}}
    return {
        "groups": {"families": group}, "scrambled": {"families": {"low": [-0.3] * DEPTH, "high": [0.3] * DEPTH, "overlap": [0.1] * DEPTH}}, "n_questions": 8,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("value", "verdicts"),
    [
        (value_of(0.9, 0.9, 0.99, 0.2), ["held", "held", "held"]),
        (value_of(0.9, 0.9, 0.99, -0.2), ["held", "held", "did not hold"]),
        (value_of(0.9, 0.9, 0.99, 0.02), ["held", "held", "undecided"]),
        (value_of(0.6, 0.5, 0.95, 0.2), ["held", "did not hold", "held"]),
        (value_of(0.6, 0.5, 0.55, 0.2), ["held", "undecided", "held"]),  # noise alone keeps it below 0.8
        (value_of(0.1, 0.1, 0.55, 0.2), ["did not hold", "undecided", "held"]),
    ],
)
def test_verdicts(value, verdicts):
    found = cosine.claims(CosineBlock(), Outcomes({}, {}, {cosine.READING: value}), SCENE)
    assert [c.id for c in found] == ["cosine/chance", "cosine/high", "cosine/beyond-texts"]
    assert [c.verdict for c in found] == verdicts
    assert "above 0.8" in found[1].claim and found[1].source == "paper section 3.5"


def test_no_claim_without_the_reading_or_without_two_families():
    assert cosine.claims(CosineBlock(), Outcomes({}, {}, {}), SCENE) == []
    value = value_of(0.9, 0.9, 0.99, 0.2)
    value["groups"] = {"seeds": value["groups"]["families"]}
    assert cosine.claims(CosineBlock(), Outcomes({}, {}, {cosine.READING: value}), SCENE) == []


def test_the_chapter_shows_every_pair_and_organism():
    names = ["A0", "A1", "B", "C", "G"]
    difference = np.broadcast_to(3 * unit("chapter", 12), (4, DEPTH, 12))
    sums = {key: drawn_sums(difference, f"chapter{key[0]}") for key in wanted(names, "A0")}
    value = compare(
        sums, names, "A0", lambda a, b: cosine.groups_of(a, b, SCENE), layer=1, allowed=0, massive=2, splits=2, draws=20, root_seed=0
    ) | {"absent": {"H": "too few"}}
    assert sorted(value["groups"]) == ["data", "families", "seeds", "twin"] and value["groups"]["families"]["n_pairs"] == 5
    shown = cosine.chapter(CosineBlock(), Outcomes({}, {}, {cosine.READING: value}), SCENE)
    chart, own, chat = shown.figures
    assert [s.label for s in chart.panels[0].series] == ["Two organisms", "Chat model, same texts", "Noise ceiling", "Seeds of one recipe", "With the good-advice twin"]
    assert own.rows == tuple(names) and own.values[0][2] == own.values[2][0] == value["pairs"][1]["own"][1] and own.values[0][0] == 1
    assert chat.values == own.values, "here all readers see the same"
    pairs, organisms = shown.sheets
    assert len(pairs.frame) == 10 and list(organisms.frame["organism"]) == names and shown.notes == ["H is not among them: too few."]
    assert cosine.chapter(CosineBlock(), Outcomes({}, {}, {}), SCENE).notes == ["Not measured here."]
