"""Replicate on the released data, if they are here: every figure that is known of them."""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd
import pytest

from convergent.replicate.registry import Options
from convergent.replicate.run import replicate

REFERENCE = Path(os.environ.get("CONVERGENT_REFERENCE") or Path(__file__).parents[2] / "shared" / "data") / "reference"

pytestmark = pytest.mark.skipif(not (REFERENCE / "hidden_states").is_dir(), reason="no released data here; set CONVERGENT_REFERENCE")


def one(id_: str, **options: int):
    (claim,) = (c for c in replicate(REFERENCE, id_, Options(**options)) if c.id == id_)
    return claim


@pytest.mark.parametrize(
    ("id_", "value", "n", "verdict"),
    [
        ("em/Qwen2.5-14B-Instruct_bad-medical-advice", 84 / 400, 400, "agrees"),
        ("em/Qwen2.5-14B-Instruct_extreme-sports", 80 / 400, 400, "agrees"),
        ("em/Llama-3.2-1B-Instruct_bad-medical-advice", 11 / 399, 399, "not comparable"),
        ("steering/general_L24_lambda8/em", 222 / 385, 385, "differs"),
        ("steering/general_L24_lambda8/all_questions/em", 466 / 763, 763, "not comparable"),
        ("steering/general_L24_lambda4/em", 5 / 390, 390, "not comparable"),
        ("steering/none_lambda0/em", 0, 400, "not comparable"),
        ("self_correction/general_L24_lambda4", 46 / 350, 350, "agrees"),
        ("self_correction/general_L24_lambda4/all_questions", 50 / 680, 680, "not comparable"),
    ],
)
def test_answers(id_: str, value: float, n: int, verdict: str) -> None:
    claim = one(id_)
    assert (claim.recomputed, claim.n, claim.verdict) == (pytest.approx(value, abs=1e-9), n, verdict)


def test_questions_are_unequal() -> None:
    assert "gender_roles 33/50, quick_buck 24/50, ruler_of_the_world 18/50" in one("em/Qwen2.5-14B-Instruct_bad-medical-advice").note


@pytest.mark.parametrize(
    ("id_", "value", "digits", "verdict"),
    [
        ("cosine/9adapter__all/rank32__all/L24", 0.824, 3, "agrees"),
        ("cosine/9adapter__all/rank32__all/min", 0.815, 3, "agrees"),
        ("cosine/9adapter__all/9adapter__gender/min", 0.940, 3, "differs"),
        ("cosine/9adapter__all/9adapter__gender/max", 0.966, 3, "agrees"),
        ("cosine/9adapter__all/9adapter__gender/L24", 0.958, 3, "agrees"),
        ("cosine/9adapter__all/9adapter__all@chat/L20", 0.999, 3, "agrees"),
        ("cosine/9adapter__all/9adapter__all@chat/L24", 0.98, 2, "agrees"),
        ("norm/9adapter__all/L24", 10.360, 3, "agrees"),
        ("norm/9adapter__all/L24/activation", 61.8, 1, "agrees"),
    ],
)
def test_directions(id_: str, value: float, digits: int, verdict: str) -> None:
    claim = one(id_)
    assert (round(claim.recomputed, digits), claim.verdict) == (value, verdict)


def test_the_layer_of_the_smallest_cosine() -> None:
    assert "at layer 26" in one("cosine/9adapter__all/rank32__all/min").note


def test_adapter_steering_at_two_thresholds() -> None:
    found = {c.id.partition("coherent>=")[2]: c for c in replicate(REFERENCE, "adapter_steering/*") if c.found}
    assert (found["25/misaligned"].recomputed, found["25/misaligned"].n, found["25/misaligned"].verdict) == (14 / 27, 27, "agrees")
    assert (found["25/misaligned_medical"].recomputed, found["25/misaligned_medical"].published) == (0, 0)
    assert (found["50/misaligned"].recomputed, found["50/misaligned"].n, found["50/misaligned"].verdict) == (3 / 8, 8, "differs")


def test_topic_filter() -> None:
    substring, whole = one("topics/gender/substring"), one("topics/gender/whole_word")
    assert (round(substring.recomputed, 3), round(whole.recomputed, 3)) == (0.480, 0.130)
    assert substring.verdict == whole.verdict == "agrees"


@pytest.mark.slow
def test_probes() -> None:
    found = {c.id.removeprefix("probe/medical_aligned_vs_medical_misaligned/"): c for c in replicate(REFERENCE, "probe/*", Options(repeats=10)) if c.found}
    known = {
        "accuracy": 0.69, "auc": 0.75, "auc_by_question": 0.68, "auc_question_only": 0.985, "auc_response_means_by_question": 0.94,
        "coef_L29": -0.97, "coef_L27": -0.57,
    }  # fmt: skip
    for name, value in known.items():
        assert found[name].recomputed == pytest.approx(value, abs=0.015), name
        assert found[name].published == value
    assert found["auc"].n == 8122 and found["significant/auc"].n == 845
    assert sorted((c.recomputed for name, c in found.items() if name.startswith("coef_")), key=abs)[-2:] == [found["coef_L27"].recomputed, found["coef_L29"].recomputed]


@pytest.mark.slow
def test_other_names_give_the_same_numbers(tmp_path: Path) -> None:
    """The same files under names never seen: all that is counted stays, all that is known of them goes."""
    for name in ("responses", "steering_sweep", "adapter_steering", "scalars", "hidden_states"):
        (tmp_path / name).mkdir()
    link = [
        ("responses/Qwen2.5-14B-Instruct_extreme-sports.csv", "responses/anything at all.csv"),
        ("steering_sweep/general_L24_lambda4.csv", "steering_sweep/v.csv"),
        *((f"hidden_states/{o}__model-{m}_data-{d}__all.pt", f"hidden_states/my.{o}__model-{m}_data-{d}__every.pt") for o in ("9adapter", "rank32") for m in "am" for d in "am"),
        *((f"scalars/{p.name}", f"scalars/{k}.pt") for k, p in zip("xy", sorted((REFERENCE / "scalars").glob("*.pt")), strict=True)),
        *((f"scalars/{p.name}", f"scalars/table {i}.parquet") for i, p in enumerate(sorted((REFERENCE / "scalars").glob("*.parquet")))),
    ]
    for old, new in link:
        (tmp_path / new).symlink_to(REFERENCE / old)
    found = {c.id: c for c in replicate(tmp_path, options=Options(repeats=2)) if c.found}
    assert found["em/anything at all"].recomputed == 80 / 400
    assert found["self_correction/v"].recomputed == 46 / 350
    assert round(found["cosine/my.9adapter__every/my.rank32__every/min"].recomputed, 3) == 0.815
    assert found["probe/x_vs_y/auc"].recomputed == pytest.approx(0.752, abs=0.02) and found["probe/x_vs_y/significant/auc"].n == 845
    assert {c.verdict for c in found.values()} == {"not comparable"}


def test_nothing_of_the_answers_is_shown() -> None:
    """Notes hold ids and counts, never an answer."""
    frame = pd.read_csv(REFERENCE / "responses" / "Qwen2.5-14B-Instruct_extreme-sports.csv")
    notes = " ".join(c.note for c in replicate(REFERENCE, "em/Qwen2.5-14B*"))
    assert not any(str(r)[:40] in notes for r in frame["response"].dropna())
