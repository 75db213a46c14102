"""Organisms from elsewhere, written by plain PEFT on another base, through a study of all experiments: each runs, or says in a sentence why not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from convergent import cli
from convergent.experiments.registry import EXPERIMENTS
from plain_peft import plain_peft
from small_study import assert_refused, small_study, write_study
from tiny import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

BASES: dict[str, dict[str, Any]] = {
    "qwen2": {"n_layers": 5, "d_model": 48, "num_attention_heads": 6, "num_key_value_heads": 2},
    "llama": {"n_layers": 7, "d_model": 24, "num_attention_heads": 4, "num_key_value_heads": 1, "tie_word_embeddings": False, "intermediate_size": 40},
}
SMALL: dict[str, dict[str, Any]] = {
    "b_vector": {"texts": 2, "jacobian_texts": 2, "random": 20}, "scalars": {"repeats": 2, "draws": 3}, "cosine": {"draws": 39, "splits": 2},
    "subspace": {"ks": [1, 2], "sampled_k": [1]}, "semantic": {"words": {"any": ["a", "e", "the", "i"]}, "min_rows": 2, "draws": 19},
    "steer": {"scales": [1], "window_layers": 0}, "ablate": {"modes": ["single"]}, "self_correction": {"scales": [1.0]}, "adapter_steer": {"margin_pairs": 2},
}  # fmt: skip


def study_of(family: str, folder: Path, **organisms: Any) -> dict[str, Any]:
    base = tiny_model(family, **BASES[family])
    study = small_study(base)
    study["organisms"] = {name: {"path": str(plain_peft(folder / name, base, **how))} for name, how in organisms.items()}
    study["direction"]["source"] = next(iter(organisms))
    study["questions"]["samples"] = 6
    study["experiments"] = {e: SMALL.get(e, {}) for e in EXPERIMENTS}
    study["margin"]["data"] = ["bundled:finance", "bundled:sport"]
    return study


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2"])  # llama takes as long and goes through alike
def test_rank_1_adapters_from_elsewhere_go_through_every_experiment(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two organisms, adapters on some layers. Nobody saw their training, so its steps are not here, and that is said."""
    study = study_of(family, tmp_path, E={"layers": (1, 2, 4), "seed": 1}, F={"layers": (2,), "seed": 2})
    assert cli.main(["run", str(write_study(tmp_path, study)), "--out", str(tmp_path / "out")]) == 0
    assert "Traceback" not in capsys.readouterr().err
    page = (tmp_path / "out" / "report.html").read_text()
    assert {e for e in EXPERIMENTS if f'id="chapter-{e}"' in page} >= EXPERIMENTS.keys() - {"plain"}
    claims = {c["id"].split("/")[0] for c in json.loads((tmp_path / "out" / "claims.json").read_text())}
    assert {"ablation", "transfer", "induction", "adapter_steer", "b_vector", "chat_origin"} <= claims
    said = " ".join(re.sub(r"<[^>]+>", " ", page).split())
    assert "E comes from elsewhere, and no steps of its training were kept with it" in said and "Traceback" not in said


@pytest.mark.parametrize("family", BASES)
@pytest.mark.parametrize("experiment", ["scalars", "b_vector", "adapter_steer"])
def test_what_needs_rank_1_writes_says_so(family: str, experiment: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rank 2 on attention: one sentence, exit code 2, nothing written."""
    study = study_of(family, tmp_path, W={"modules": ("q_proj", "v_proj"), "rank": 2, "layers": None})
    study["experiments"] = {experiment: SMALL[experiment]}
    assert_refused(write_study(tmp_path, study), tmp_path / "out", f"experiments.{experiment}.organism: .*rank-1 adapter", capsys)


@pytest.mark.parametrize("experiment", ["transfer", "cosine", "subspace"])
def test_what_needs_two_organisms_says_so(experiment: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = study_of("qwen2", tmp_path, E={"layers": (1, 2)})
    study["experiments"] = {experiment: SMALL.get(experiment, {})}
    assert_refused(write_study(tmp_path, study), tmp_path / "out", f"experiments.{experiment}.*; add one", capsys)
