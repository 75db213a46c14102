"""Planted truth for the experiments on geometry and adapters: each finds what `planted.py` built in, and nothing where nothing is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from convergent.experiments.registry import EXPERIMENTS
from planted import Planted, planted
from planted_study import ScrambledJudge, WordJudge, planted_study, ran

pytestmark = pytest.mark.usefixtures("one_thread")


def needs(*names: str) -> pytest.MarkDecorator:
    missing = [n for n in names if n not in EXPERIMENTS]
    return pytest.mark.skipif(bool(missing), reason=f"no experiment {', '.join(missing)}")


def outcome(
    folder: Path, p: Planted, source: str, others: tuple[str, ...], experiments: dict[str, Any], *, quantile: bool = False, judge: WordJudge | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(claim, reading -> value) of a study, without the claims of `plain`."""
    study = planted_study(p, source, others, seed=p.seed, experiments=experiments)
    if quantile:
        study["direction"]["classes"] = {"by": "quantile"}
    with ran(folder, study, judge) as (run, results):
        return {c["id"]: c for c in results.claims if not c["id"].startswith("misaligned")}, run.values()[0]


def verdicts(*args: Any, **kwargs: Any) -> tuple[dict[str, str], dict[str, Any]]:
    """`outcome` with the claims' verdicts alone."""
    found, values = outcome(*args, **kwargs)
    return {i: c["verdict"] for i, c in found.items()}, values


B_VECTOR = {"b_vector": {"random": 100, "texts": 16, "jacobian_texts": 8, "jacobian_random": 19}}


@needs("b_vector")
def test_b_vector_finds_that_a_hidden_write_makes_the_direction(tmp_path: Path) -> None:
    """cos(B, v) = 0 and yet B makes u downstream: so v taken out of B changes nothing, and v taken out of the stream restores."""
    found, values = verdicts(tmp_path, planted(0, origin=True), "hidden", (), B_VECTOR)
    held = {c for c, v in found.items() if v == "held"}
    assert {"b_vector/orthogonal", "b_vector/downstream", "b_vector/rest", "b_vector/jacobian", "b_vector/everywhere", "b_vector/stream-not-b"} <= held, found
    assert found["b_vector/in-b"] != "held"
    assert abs(values["b_vector/cosine"]["cosine"]["all"]) < 0.1


@needs("b_vector")
def test_b_vector_finds_nothing_in_a_twin(tmp_path: Path) -> None:
    """`orthogonal` is true of it."""
    found, _ = verdicts(tmp_path, planted(0), "hidden_twin", (), B_VECTOR, quantile=True)
    assert not {c for c, v in found.items() if v == "held"} - {"b_vector/orthogonal"}, found


@needs("subspace")
def test_subspace_finds_the_plane(tmp_path: Path) -> None:
    """One dimension read in two organisms of a plane is not enough for the third, two are."""
    block = {"held_out": ["left"], "ks": [1, 2, 3], "control_ks": [], "sampled_k": [2]}
    claims, values = outcome(tmp_path, planted(0), "left", ("middle", "right"), {"subspace": block})
    assert claims["subspace/one/left"]["verdict"] == "did not hold"
    said = {e["text"]: e["supports"] for e in claims["subspace/more/left"]["evidence"]}
    # On neutral texts the organism does little, so what its removal does there is near 0 on either side.
    assert {v for t, v in said.items() if "KL" not in t} == {"held"} and len(said) == 8, said
    share = values["subspace/left"]["own_share"]["others"]
    assert share[0] < 0.8 and share[1] > 0.9


@needs("subspace")
def test_subspace_finds_one_dimension_where_there_is_one(tmp_path: Path) -> None:
    block = {"held_out": ["direct"], "ks": [1, 2], "control_ks": [], "sampled_k": [], "same": 0.3}
    found, _ = verdicts(tmp_path, planted(0), "direct", ("many",), {"subspace": block})
    assert found["subspace/one/direct"] == "held"


@needs("subspace")
def test_subspace_finds_nothing_in_twins(tmp_path: Path) -> None:
    block = {"held_out": ["direct_twin"], "ks": [1, 2], "control_ks": [], "sampled_k": [2]}
    found, _ = verdicts(tmp_path, planted(0), "direct_twin", ("many_twin",), {"subspace": block}, quantile=True)
    assert found["subspace/more/direct_twin"] != "held"


SCALARS = {"scalars": {"repeats": 2, "draws": 4, "c": 1.0, "per_class": 64, "topics": ["medical"]}}
"""`c` as published is for thousands of tokens."""


@needs("scalars")
def test_scalars_find_the_general_and_the_topical_adapters(tmp_path: Path) -> None:
    """Random directions that read the same input tell the classes apart nearly as well (AUC up to 0.99 beside 1.00): that is said, and the probe undecided.

    Where they do not, `test_scalars` sees the probe's claim hold.
    """
    found, values = outcome(tmp_path, planted(0), "three", (), SCALARS)
    assert {c for c, v in found.items() if v["verdict"] == "held"} == {"scalars/general", "scalars/medical"}, found
    chance, random = found["scalars/probe"]["evidence"]
    assert chance["supports"] == "held" and chance["low"] > 0.4 and random["supports"] == "undecided" and 0 < random["estimate"] < 0.2
    assert found["scalars/probe"]["p"] == random["p"] > 0.025 > chance["p"]
    reads = list(values["scalars/three"]["reads"].values())
    assert "general" in reads[0] and "medical" in reads[1] and "general" not in reads[2], reads


@needs("scalars")
def test_scalars_find_nothing_in_scrambled_scores(tmp_path: Path) -> None:
    found, _ = verdicts(tmp_path, planted(0), "three", (), SCALARS, judge=ScrambledJudge())
    assert found["scalars/probe"] != "held"


@needs("chat_origin")
def test_chat_origin_finds_the_direction_that_was_there(tmp_path: Path) -> None:
    found, _ = verdicts(tmp_path, planted(0, origin=True), "constant", (), {"chat_origin": {}})
    assert {c for c, v in found.items() if v == "held"} >= {"chat_origin/cosine/pairs", "chat_origin/ablation/constant/pairs"}, found


@needs("chat_origin")
def test_chat_origin_does_not_find_what_training_made(tmp_path: Path) -> None:
    """The base tells good words from bad ones, so its direction has something of the organism's, but not what flips the behaviour."""
    found, _ = verdicts(tmp_path, planted(0), "direct", (), {"chat_origin": {}})
    assert not {c for c, v in found.items() if v == "held" and "ablation" in c}, found
