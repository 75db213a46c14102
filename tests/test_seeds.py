"""Several seeds of one organism in one study: names, families, ids, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from convergent import cli
from convergent.errors import StudyError
from convergent.store import looked_at
from convergent.study.main import rewrite_report, run_study
from convergent.study.run import Run
from convergent.study.spec import StudySpec, load_study, study_from
from small_study import small_study, write_study
from tiny import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


def with_seeds(**a: Any) -> dict[str, Any]:
    study = small_study(tiny_model())
    study["organisms"]["A"].update({"seeds": [0, 3, 1], **a})
    study["experiments"] = {"plain": {"twin": "G"}}
    return study


def run_of(study: dict[str, Any], folder: Path) -> tuple[StudySpec, Run]:
    spec = load_study(write_study(folder, study))
    with looked_at(folder / "out") as store:
        return spec, Run(spec, store, compute=False)


def test_one_line_is_an_organism_per_seed_of_one_family(tmp_path: Path) -> None:
    spec, run = run_of(with_seeds(), tmp_path)
    assert list(spec.organisms) == ["A", "A-3", "A-1", "B", "G"], "the first seed keeps the name, the rest stand beside it"
    subjects = run.scene.organisms
    assert [(s.family, s.seed) for s in subjects.values()] == [("A", 0), ("A", 3), ("A", 1), ("B", 0), ("G", 0)]
    plans = run.organisms
    assert len({plans[o].content_id for o in ("A", "A-3", "A-1")}) == 3
    same = {**small_study(tiny_model())["organisms"]["A"], "seed": 3}
    _, alone = run_of({**with_seeds(), "organisms": {"A": same, "G": small_study(tiny_model())["organisms"]["G"]}, "experiments": {}}, tmp_path / "alone")
    assert alone.organisms["A"].content_id == plans["A-3"].content_id, "an organism of a list is the one that stands alone"


def test_the_kept_copy_of_a_study_reads_as_the_study(tmp_path: Path) -> None:
    spec, _ = run_of(with_seeds(), tmp_path)
    again = study_from(json.loads(json.dumps(spec.model_dump(mode="json"))), Path("study.json"))
    assert again == spec


def test_seeds_in_plan_manifest_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = with_seeds(seeds=[0, 2])
    study["organisms"]["G"]["seeds"] = [0, 2]
    path, out = write_study(tmp_path, study), tmp_path / "out"
    run_study(path, out)
    assert "train A-2" in (printed := capsys.readouterr().out) and "examples of finance-bad, seed 2" in printed
    organisms = json.loads((out / "manifest.json").read_text())["organisms"]
    assert {o: (v["family"], v["seed"]) for o, v in organisms.items()} == {
        "A": ("A", 0), "A-2": ("A", 2), "B": ("B", 0), "G": ("G", 0), "G-2": ("G", 2)
    }
    table = pd.read_csv(out / "tables" / "organisms.csv").set_index("name")
    assert table.loc["A-2", "family"] == "A" and table.loc["A-2", "seed"] == 2
    roles = pd.read_csv(out / "tables" / "conditions.csv").set_index("name")["role"]
    assert roles["A-2"] == "real" and roles["G"] == roles["G-2"] == "control", "every seed of the twin is a control"
    assert "other seeds are organisms of their own here" in (out / "report.html").read_text()
    # A finished organism stands in for training, as a family of folders, and the report can be written again.
    study["organisms"] = {**study["organisms"], **{o: {"path": str(next((out / "organisms").glob(f"{o}-????????????????"))), "family": "A"} for o in ("A", "A-2")}}
    del study["organisms"]["B"]
    second = tmp_path / "second"
    run_study(write_study(second, study), second / "out")
    rewrite_report(second / "out")
    table = pd.read_csv(second / "out" / "tables" / "organisms.csv").set_index("name")
    assert table.loc["A-2", "family"] == "A" and pd.isna(table.loc["A-2", "seed"])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seeds": []}, r"organisms\.A\.seeds: .*at least 1"),
        ({"seeds": [0, -1]}, r"organisms\.A\.seeds\.1: .*greater than or equal to 0"),
        ({"seeds": [1, 1]}, r"organisms\.A\.seeds: \[1, 1\] names a seed twice"),
        ({"seed": 0}, r"organisms\.A\.seeds: `seed` stands beside it"),
        ({"seeds": 3}, r"organisms\.A\.seeds: .*got 3"),
    ],
)
def test_refuses(tmp_path: Path, change: dict[str, Any], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_study(tmp_path, with_seeds(**change))
    with pytest.raises(StudyError, match=says):
        load_study(path)
    assert cli.main(["run", str(path), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_refuses_a_clash_of_names_a_path_and_a_family_that_is_none(tmp_path: Path) -> None:
    study = with_seeds()
    study["organisms"]["A-3"] = dict(study["organisms"]["G"])
    with pytest.raises(StudyError, match=r"organisms\.A\.seeds: seed 3 makes the organism 'A-3', and another has that name; rename it"):
        load_study(write_study(tmp_path, study))
    study = small_study(tiny_model())
    study["organisms"]["A"] = {"path": "x", "seeds": [1, 2]}
    with pytest.raises(StudyError, match=r"organisms\.A\.path: an organism from elsewhere is not trained, so `seeds` means nothing here"):
        load_study(write_study(tmp_path, study))
    study = small_study(tiny_model())
    study["organisms"]["G"]["family"] = "A"
    with pytest.raises(StudyError, match=r"organisms\.G\.family: G and A differ in more than their seed"):
        load_study(write_study(tmp_path, study))
