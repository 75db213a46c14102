"""The studies that come with the project: they plan without their base, and the paper's runs end to end on a tiny one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from convergent import cli
from convergent.errors import StudyError
from convergent.study.main import chosen
from convergent.study.spec import load_study
from tiny import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
STUDIES = Path(__file__).parents[1] / "studies"
TINY = (
    "dtype=float32", "organisms.*.learning_rate=1.0e-5", "organisms.*.data=bundled:finance", "organisms.*.examples=4", "questions.file=open_eight", "questions.samples=2",
    "sampling.max_new_tokens=4", "sampling.rows=64", "judge={name: embedded}", "direction.samples=2", "direction.layer=null", "margin.pairs=2",
    "direction.classes={by: quantile, quantile: 0.5, coherent_min: -1, min_per_class: 1}", "experiments.steer.layers=[1]",
)  # fmt: skip


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is fetched, and nothing of this machine's cache is found."""
    monkeypatch.setenv("CONVERGENT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CONVERGENT_UPSTREAM", str(tmp_path / "nothing.zip.enc"))
    monkeypatch.setattr("convergent.study.setup.load_questions", _no_download)
    monkeypatch.setattr("convergent.study.setup.base_is_here", lambda base: base == "embedded" or Path(base).is_dir())


def _no_download(source: str) -> object:
    from convergent.data.questions import load_questions
    from convergent.errors import DownloadError

    if source == "published_eight":
        raise DownloadError("no network")
    return load_questions(source)


def test_the_paper_is_planned_without_its_base(offline: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-none")
    assert cli.main(["run", str(STUDIES / "paper_14b.yaml"), "--out", str(tmp_path / "out"), "--plan", "--set", "organisms.*.data=bundled:finance",
                     "--set", "organisms.*.examples=400"]) == 0  # fmt: skip
    printed = " ".join(capsys.readouterr().out.split())
    assert "nine_adapter, 400 examples of finance-bad, seed 2" in printed and "openai:gpt-4o: aligned, coherent:" in printed and "about $" in printed
    assert "of machine time" in printed and "reckoned at a second a reply" in printed
    assert "GB at once: 30 of weights" in printed and "Qwen/Qwen2.5-14B-Instruct is not on this machine" in printed and " in all, estimated" in printed
    assert not (tmp_path / "out").exists()


def test_values_are_set_from_outside() -> None:
    spec = load_study(STUDIES / "demo.yaml", ["organisms.*.examples=8", "name=other", "sampling.rows=3"])
    assert {o.examples for o in spec.organisms.values()} == {8} and spec.name == "other" and spec.sampling.rows == 3
    with pytest.raises(StudyError, match="--set nonsense: give PLACE=VALUE"):
        load_study(STUDIES / "demo.yaml", ["nonsense"])
    with pytest.raises(StudyError, match="--set name.first: leads into a value that is no block"):
        load_study(STUDIES / "demo.yaml", ["name.first=1"])
    with pytest.raises(StudyError, match="the study has no organism 'Z'; there are A, B, C, G"):
        load_study(STUDIES / "demo.yaml", ["organisms.Z.examples=3"])
    with pytest.raises(StudyError, match="did you mean `samples`"):
        load_study(STUDIES / "demo.yaml", ["questions.sampls=1"])


def test_one_block_alone_keeps_what_it_uses() -> None:
    spec = load_study(STUDIES / "paper_small.yaml")
    assert list(chosen(spec, ["adapter_steer"]).experiments) == ["plain", "scalars", "adapter_steer"]
    assert list(chosen(spec, ["steer"]).experiments) == ["plain", "steer"] and chosen(spec, []) == spec
    with pytest.raises(StudyError, match="--only steeer: this study has no such experiment"):
        chosen(spec, ["steeer"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["paper_14b", "paper_small"])
def test_the_studies_run_end_to_end_on_a_tiny_qwen(name: str, tmp_path: Path) -> None:
    base = tiny_model("qwen2")
    changes = [f"base={base}", *TINY]
    arguments = [x for c in changes for x in ("--set", c)]
    assert cli.main(["run", str(STUDIES / f"{name}.yaml"), "--out", str(tmp_path / "out"), *arguments]) == 0
    claims = json.loads((tmp_path / "out" / "claims.json").read_text())
    spec = load_study(STUDIES / f"{name}.yaml", changes)
    assert len(claims) >= len(spec.experiments) and (tmp_path / "out" / "report.html").stat().st_size < 5e6
