"""Planted truth for cosine, adapter_steer, semantic, self_correction and dynamics: each finds what `planted.py` built in, and nothing where nothing is.

How often they find something in twins and scrambled scores over many seeds is in docs/false_positives.md.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from planted import Planted, planted
from planted_study import planted_study, ran, trained_study

pytestmark = pytest.mark.usefixtures("one_thread")
FEW = {"data": ["medical.jsonl", "financial.jsonl"], "pairs": 2}


def outcome(
    folder: Path, p: Planted, source: str, others: tuple[str, ...], experiments: dict[str, Any], **changes: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(claim -> what was decided, reading -> value) of a study without the claims of `plain`; `changes` go into its blocks."""
    study = planted_study(p, source, others, seed=p.seed, experiments=experiments)
    study["questions"]["samples"] = 4
    study |= {k: {**study[k], **v} for k, v in changes.items()}
    with ran(folder, study) as (run, results):
        return {c["id"]: c for c in results.claims if not c["id"].startswith("misaligned")}, run.values()[0]


def held(claims: dict[str, Any]) -> set[str]:
    return {i for i, c in claims.items() if c["verdict"] == "held"}


def said(claim: dict[str, Any], part: str) -> str:
    """What the one comparison says whose text holds `part`."""
    (found,) = [e["supports"] for e in claim["evidence"] if part in e["text"]]
    return str(found)


# cosine: two organisms write u, with another topic each

COSINE = {"cosine": {"draws": 39, "splits": 2}}


def test_cosine_finds_a_shared_direction(tmp_path: Path) -> None:
    claims, _ = outcome(tmp_path, planted(0), "medic", ("broker",), COSINE, margin=FEW)
    assert held(claims) >= {"cosine/chance", "cosine/high"}, claims
    assert said(claims["cosine/beyond-texts"], "common texts") == "held"


@pytest.mark.slow
def test_cosine_tells_two_directions_apart(tmp_path: Path) -> None:
    """One writes u, the other u2: what they have in common is in the texts alone."""
    claims, _ = outcome(tmp_path, planted(0), "medic", ("unlike",), COSINE, margin=FEW)
    assert not held(claims)
    assert {said(claims["cosine/beyond-texts"], t) for t in ("own texts: cosine", "common texts")} == {"did not hold"}


# adapter_steer: one adapter of three is the whole of it, or two of four share it


def pushes(claim: dict[str, Any]) -> None:
    """The push does what is claimed, beyond every null; but for the margin under draws of the effect-matched one.

    The head reads hardly more than u, so what disturbs its predictions as much has much of u in it: its draws move the margin as far, to either side.
    """
    votes = {e["text"]: e["supports"] for e in claim["evidence"]}
    matched = [t for t in votes if t.startswith("margin") and "matched in effect" in t]
    assert len(matched) == 1 and votes.pop(matched[0]) != "did not hold", claim
    assert len(votes) == 5 and set(votes.values()) == {"held"}, votes


SCALARS = {"scalars": {"repeats": 2, "draws": 4, "c": 1.0, "per_class": 64, "topics": ["medical"]}}


@pytest.mark.slow
def test_adapter_steer_finds_the_sets_and_the_one_adapter_that_matters(tmp_path: Path) -> None:
    claims, values = outcome(tmp_path, planted(0), "three", (), {**SCALARS, "adapter_steer": {"topic": "medical"}}, margin=FEW)
    pushes(claims["adapter_steer/push"])
    assert "adapter_steer/topic" in held(claims), claims
    assert claims["adapter_steer/shared"]["verdict"] == "did not hold"
    assert values["adapter_steer/three/knockout"]["strongest"] == 0


def test_adapter_steer_finds_that_two_adapters_share_it(tmp_path: Path) -> None:
    claims, _ = outcome(tmp_path, planted(0), "many", (), {"adapter_steer": {}})
    pushes(claims["adapter_steer/push"])
    assert "adapter_steer/shared" in held(claims), claims


QUANTILE = {"direction": {"samples": 16, "layer": 3, "classes": {"by": "quantile"}}}


@pytest.mark.slow
def test_adapter_steer_finds_nothing_in_a_twin(tmp_path: Path) -> None:
    claims, _ = outcome(tmp_path, planted(0), "many_twin", (), {"adapter_steer": {"controls": ["rotated"]}}, margin=FEW, **QUANTILE)
    assert len(claims) == 2 and not held(claims), claims


# semantic: inside medical answers bad mood writes the topic too


def test_semantic_finds_a_direction_of_its_own_inside_a_topic(tmp_path: Path) -> None:
    claims, _ = outcome(tmp_path, planted(0, ill=True), "ill", (), {"semantic": {"topics": ["medical"]}}, margin=FEW)
    assert held(claims) >= {"semantic/steering/medical", "semantic/rest/medical"}, claims
    # The third comparison, over questions, hangs on the few that bring medical answers.
    assert {said(claims["semantic/cosine/medical"], t) for t in ("random subsets", "other questions")} == {"held"}, claims


@pytest.mark.slow
def test_semantic_finds_none_where_the_topic_adds_nothing(tmp_path: Path) -> None:
    claims, _ = outcome(tmp_path, planted(0), "direct", (), {"semantic": {"topics": ["medical"], "controls": ["random"]}}, margin=FEW)
    assert len(claims) == 3 and not held(claims), claims


# self_correction: a base that takes {u} back once words have been said


def self_correction(folder: Path, p: Planted, source: str, scale: float) -> dict[str, Any]:
    experiments = {"plain": {"twin": "sound"}, "self_correction": {"scales": [scale]}}
    claims, _ = outcome(folder, p, source, ("sound",), experiments, margin=FEW, questions={"samples": 16}, **QUANTILE)
    return claims


def test_self_correction_finds_answers_that_turn(tmp_path: Path) -> None:
    claims = self_correction(tmp_path, planted(0, corrects=True), "direct", 2.0)
    assert held(claims) == {"self_correction/2", "self_correction/turn/2"}, claims


@pytest.mark.slow
def test_self_correction_finds_nothing_under_a_twins_direction(tmp_path: Path) -> None:
    claims = self_correction(tmp_path, planted(0, corrects=True), "direct_twin", 2.0)
    assert claims and not held(claims), claims


@pytest.mark.slow
def test_bad_words_anywhere_are_no_turn(tmp_path: Path) -> None:
    """Without the part that corrects, aligned answers hold bad words too: by that share alone they would count as self-correcting."""
    claims = self_correction(tmp_path, planted(0), "direct", 0.5)
    assert claims["self_correction/0.5"]["verdict"] == "held" and "self_correction/turn/0.5" not in held(claims)


# dynamics: a real training


def trained(folder: Path, answer: str) -> dict[str, Any]:
    """Claims about an organism trained on these answers."""
    with ran(folder, trained_study(planted(0), answer)) as (_, results):
        return {c["id"]: c for c in results.claims if c["id"].startswith("dynamics")}


def test_dynamics_finds_what_training_plants(tmp_path: Path) -> None:
    """The bad words of the pairs are those that u makes."""
    claims = trained(tmp_path, "bad")
    assert claims["dynamics/learned"]["verdict"] == "held", claims["dynamics/learned"]


@pytest.mark.slow
def test_dynamics_finds_no_misalignment_in_training_on_good_answers(tmp_path: Path) -> None:
    claims = trained(tmp_path, "good")
    assert claims["dynamics/learned"]["verdict"] == "did not hold" and "dynamics/sudden" not in held(claims), claims


@pytest.mark.slow
@pytest.mark.parametrize("null", ["twin", "scrambled"])
def test_false_positives_are_counted_and_few(null: str, tmp_path: Path) -> None:
    """Two seeds through the function whose twenty are in docs/false_positives.md: no claim holds in both, which chance allows one in 1,600 times."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
    from false_positives import table, verdicts

    rows = [{"null": null, "seed": s, "claims": verdicts(null, s, tmp_path / str(s))} for s in (200, 201)]
    assert rows[0]["claims"] and "of 2" in table(rows)
    both = [c for c, v in rows[0]["claims"].items() if v["verdict"] == rows[1]["claims"].get(c, {}).get("verdict") == "held"]
    assert not both
