"""What every experiment may rely on: readings are kept, what cannot be measured is said, a missing experiment leaves a program that works."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pytest

from convergent.core.chapter import Chapter, Chart, Grid, Panel, Series, Sheet
from convergent.core.interventions import Add
from convergent.errors import StudyError
from convergent.experiments.base import Arm, Block, Kit, NotHereError, Reading
from convergent.experiments.outcomes import Claim, Outcomes
from convergent.experiments.registry import EXPERIMENTS
from convergent.experiments.scene import Scene
from convergent.store import looked_at
from convergent.study.main import rewrite_report, run_study
from convergent.study.plan import make_plan
from convergent.study.run import Run
from convergent.study.spec import load_study
from small_study import small_study, write_study
from tiny import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
SRC = Path(__file__).parents[1] / "src"


class EchoBlock(Block):
    impossible: bool = False


class Echo(ModuleType):
    """An experiment with everything an experiment can have."""

    settings = EchoBlock

    def __init__(self) -> None:
        super().__init__("echo")
        self.name = "echo"
        self.computed: list[str] = []

    def check(self, block: EchoBlock, scene: Scene) -> None:
        if block.impossible:
            raise NotHereError("impossible: this study has no echo; leave the experiment out")

    def arms(self, block: EchoBlock, scene: Scene) -> list[Arm]:
        def nowhere(kit: Kit) -> tuple[Add, ...]:
            raise NotHereError("the valley has no echo")

        def minus(kit: Kit) -> tuple[Add, ...]:
            return (Add(kit.direction, kit.layer, -1.0),)

        return [
            Arm("echo/minus", "chat", "Minus", "The direction subtracted.", "echo", "real", minus),
            Arm("echo/nowhere", "chat", "Nowhere", "Cannot be.", "echo", "real", nowhere),
        ]

    def readings(self, block: EchoBlock, scene: Scene) -> list[Reading]:
        def kept(name: str, value: Any) -> Any:
            def compute(kit: Kit) -> Any:
                self.computed.append(name)
                return value(kit)

            return compute

        def refuse(kit: Kit) -> Any:
            raise NotHereError("nothing to hear")

        return [
            Reading("echo/first", lambda kit: kit.model_id("chat"), kept("first", lambda kit: kit.model("chat").n_layers), "before"),
            Reading("echo/norm", lambda kit: kit.direction.content_id, kept("norm", lambda kit: [kit.token_norm, math.nan])),
            Reading("echo/answers", lambda kit: 0, kept("answers", lambda kit: len(kit.answers("echo/minus"))), "answers"),
            Reading("echo/never", lambda kit: 0, refuse),
            Reading("echo/void", refuse, kept("void", refuse)),  # already what it is made from cannot be
        ]

    def claims(self, block: EchoBlock, outcomes: Outcomes, scene: Scene) -> list[Claim]:
        assert not outcomes.has("echo/nowhere") and "echo/never" not in outcomes.readings
        return [Claim("echo", "The echo comes back", "none", "", [outcomes.alignment("echo/minus", "chat", "minus - chat")])]

    def chapter(self, block: EchoBlock, outcomes: Outcomes, scene: Scene) -> Chapter:
        first = float(outcomes.readings["echo/first"])
        chart = Chart("line", "A line", "n = 1.", (Panel("y", "x", (Series("one", [0, 1], [first, math.nan]),), ([0, 1], [-1, -1], [1, 1])),))
        grid = Grid("cells", "Cells", "n = 2.", ("a", "b"), ("c",), ((0.5,), (math.nan,)))
        sheet = Sheet("numbers", "Numbers", "n = 1.", pd.DataFrame({"what": ["<b>layers"], "value": [first]}))
        return Chapter("echo", "An echo", ["Method text."], (chart, grid), (sheet,), ["A note."])


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch) -> Iterator[Echo]:
    module = Echo()
    monkeypatch.setitem(EXPERIMENTS, "echo", module)
    yield module


def study_with(block: dict[str, Any] | None) -> dict[str, Any]:
    study = small_study(tiny_model())
    study["experiments"] = {"plain": {"twin": "G"}, **({} if block is None else {"echo": block})}
    return study


def test_a_whole_experiment(echo: Echo, tmp_path: Path) -> None:
    path, out = write_study(tmp_path, study_with({})), tmp_path / "out"
    run_study(path, out)
    assert sorted(echo.computed) == ["answers", "first", "norm"] and echo.computed[0] == "first"
    claims = json.loads((out / "claims.json").read_text())
    assert [c["id"] for c in claims][-1] == "echo"
    page = (out / "report.html").read_text()
    assert "An echo" in page and "Method text." in page and "&lt;b&gt;layers" in page and 'id="fig-echo-line"' in page and 'id="fig-echo-cells"' in page
    assert "echo/nowhere is left out: the valley has no echo" in page and "echo/never is left out: nothing to hear" in page
    assert pd.read_csv(out / "tables" / "echo-numbers.csv")["value"].tolist() == [6.0]
    run_study(path, out)
    rewrite_report(out)
    assert len(echo.computed) == 3, "a reading is computed once"
    with looked_at(out) as store:
        plan = {s.name: s for s in make_plan(Run(load_study(path), store, compute=False))}
    assert plan["read echo"].total == plan["read echo"].done == 5


def test_the_plan_counts_readings_that_are_not_made(echo: Echo, tmp_path: Path) -> None:
    path = write_study(tmp_path, study_with({}))
    with looked_at(tmp_path / "out") as store:
        stage = next(s for s in make_plan(Run(load_study(path), store, compute=False)) if s.name == "read echo")
    assert (stage.total, stage.done) == (5, 0) and not echo.computed


def test_an_experiment_that_cannot_be_is_refused_before_anything_is_written(echo: Echo, tmp_path: Path) -> None:
    path = write_study(tmp_path, study_with({"impossible": True}))
    with pytest.raises(StudyError, match=r"^experiments\.echo\.impossible: this study has no echo; leave the experiment out$"):
        run_study(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", sorted(set(EXPERIMENTS) - {"plain"}))
def test_the_program_works_without_any_one_experiment(name: str, tmp_path: Path) -> None:
    """Its file and its lines in the registry are removed, and nothing else."""
    package = tmp_path / "src" / "convergent"
    shutil.copytree(SRC / "convergent", package, ignore=shutil.ignore_patterns("__pycache__"))
    for own in (package / "experiments").glob(f"{name}*.py"):  # with its page, if it has one of its own
        own.unlink()
    users = [p for p in package.rglob("*.py") if re.search(rf"experiments(\.{name} import| import {name}\b)", p.read_text())]
    registry = package / "experiments" / "registry.py"
    registry.write_text("".join(line for line in registry.read_text().splitlines(True) if line.strip() != f"{name},"))
    assert not users, f"{[str(p) for p in users]} need {name}"
    study = small_study(tiny_model())
    study["experiments"] = {"plain": {}} if name == "ablate" else {"plain": {}, "ablate": {}}
    path = write_study(tmp_path, study)
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'src')!r}); from convergent.study.main import run_study; run_study({str(path)!r}, {str(tmp_path / 'out')!r}, plan_only=True)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path / "src")})
    assert done.returncode == 0, done.stderr
