"""Blocks of a study that were run elsewhere, merged, are the study run in one go."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from convergent import cli
from convergent.cli import main
from small_study import small_study, write_study
from tiny import tiny_model

SCRIPT = Path(__file__).parents[1] / "scripts" / "parallel_study.py"
pytestmark = pytest.mark.usefixtures("one_thread")


def tables(folder: Path) -> dict[str, str]:
    """All but that of the organisms, which says how long each was trained."""
    return {f.name: f.read_text() for f in sorted((folder / "tables").glob("*.csv")) if f.stem != "organisms"}


def small(experiments: dict[str, Any]) -> dict[str, Any]:
    """One organism, and the experiments given."""
    study = small_study(tiny_model())
    return {**study, "organisms": {"A": study["organisms"]["A"]}, "experiments": {"plain": {}, **experiments}}


TWO = {"ablate": {"modes": ["single"], "controls": ["random"], "null_draws": 3}, "steer": {"scales": [1], "control_scale": 1, "controls": ["random"], "window_layers": 0}}


def test_blocks_run_in_folders_of_their_own_give_what_one_run_gives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = str(write_study(tmp_path, small(TWO)))
    assert main(["run", study, "--out", str(tmp_path / "one")]) == 0
    assert main(["run", study, "--out", str(tmp_path / "a"), "--only", "ablate"]) == 0
    assert main(["run", study, "--out", str(tmp_path / "b"), "--only", "steer", "--no-report"]) == 0
    assert not (tmp_path / "b" / "report.html").exists() and not (tmp_path / "b" / "claims.json").exists()
    assert main(["merge", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert "next: `convergent run STUDY --out " in capsys.readouterr().out
    kept = tmp_path / "b" / "study.json"  # has one block only, and every default
    assert main(["run", str(kept), "--out", str(tmp_path / "b"), "--plan"]) == 0 and "nothing is left to do" in capsys.readouterr().out
    assert main(["run", study, "--out", str(tmp_path / "a")]) == 0
    assert "nothing is left to do but the report" in capsys.readouterr().out
    for made in (*(tmp_path / "a").rglob("*.safetensors"), *(tmp_path / "a" / "organisms").glob("[!.]*")):
        rights = made.stat().st_mode
        assert rights & 0o666 == (tmp_path / "a").stat().st_mode & 0o666, f"{made} is not shared as its folder is"
    assert len(tables(tmp_path / "one")) > 3 and tables(tmp_path / "a") == tables(tmp_path / "one")
    assert (tmp_path / "a" / "claims.json").read_text() == (tmp_path / "one" / "claims.json").read_text()


@pytest.mark.slow
def test_jobs_side_by_side(tmp_path: Path) -> None:
    study = write_study(tmp_path, small(TWO))
    done = subprocess.run([sys.executable, str(SCRIPT), str(study), "--out", str(tmp_path / "many"), "--jobs", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "failed" not in done.stdout and "training 1 organisms" in done.stdout and "merged only-1: 0 rows" not in done.stdout
    assert "nothing is left to do but the report" in done.stdout and not (tmp_path / "many.jobs").exists()


def test_only_folders_of_one_study_are_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        path = write_study(tmp_path / name, {**small({}), "seed": seed})
        assert cli.main(["run", str(path), "--out", str(tmp_path / name / "out")]) == 0
    capsys.readouterr()
    assert cli.main(["merge", str(tmp_path / "a" / "out"), str(tmp_path / "b" / "out")]) == 2
    assert "another study than" in (said := capsys.readouterr().err) and "(seed differs)" in said and said.count("\n") == 1
    assert cli.main(["merge", str(tmp_path / "a" / "out"), str(tmp_path / "c")]) == 2
    assert "not a study folder" in capsys.readouterr().err
    assert cli.main(["merge", str(tmp_path / "new"), str(tmp_path / "a" / "out")]) == 0
    assert cli.main(["run", str(tmp_path / "a" / "study.yaml"), "--out", str(tmp_path / "new")]) == 0
    assert "nothing is left to do but the report" in capsys.readouterr().out
