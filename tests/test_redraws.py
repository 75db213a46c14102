"""`redraws`: directions of further draws of the source's answers, what is asked for them, and what their ablations say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from convergent.core.chapter import Chart
from convergent.experiments import redraws
from convergent.experiments.base import NotHereError
from convergent.experiments.outcomes import Outcomes
from convergent.experiments.redraws import RedrawsBlock
from convergent.experiments.scene import Scene, Subject
from convergent.store import looked_at
from convergent.study.main import run_study
from convergent.study.plan import make_plan
from convergent.study.run import Run
from convergent.study.spec import load_study
from planted import planted
from planted_study import ScrambledJudge, planted_study, ran
from small_study import small_study, write_study
from tiny import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
EXPERIMENTS = {"ablate": {"modes": ["single"], "controls": []}, "redraws": {"draws": 2}}


def claims_of(results: Any) -> dict[str, Any]:
    return {c["id"]: c for c in results.claims if c["id"].startswith("redraws")}


def test_a_planted_direction_is_found_again_and_does_the_same(tmp_path: Path) -> None:
    study = planted_study(planted(0), experiments=EXPERIMENTS)
    with ran(tmp_path, study) as (run, results):
        claims = claims_of(results)
        assert {i: c["verdict"] for i, c in claims.items()} == {"redraws/single/restores": "held", "redraws/single/agree": "held"}, claims
        assert len(claims["redraws/single/restores"]["evidence"]) == 4 and len(claims["redraws/single/agree"]["evidence"]) == 2
        read = run.values()[0]["redraws/directions"]
        assert read["draws"] == [0, 1, 2] and set(read["cosines"]) == {"0-1", "0-2", "1-2"}
        assert min(line[3] for line in read["cosines"].values()) > 0.9

        # Other seeds, so other answers; the same questions, equally often.
        asked = [run.own_requests("direct", draw) for draw in range(3)]
        assert len({r.id for requests in asked for r in requests}) == 3 * len(asked[0])
        assert {tuple((r.question_id, r.paraphrase, r.sample) for r in requests) for requests in asked} == {tuple((r.question_id, r.paraphrase, r.sample) for r in asked[0])}
        assert run.redrawn(0).direction.content_id == run.direction.content_id
        assert len({run.redrawn(draw).direction.content_id for draw in range(3)}) == 3

        # Nothing is left to do, and the plan knows.
        assert all(stage.done == stage.total for stage in make_plan(Run(run.spec, run.store, compute=False)))


def test_directions_from_scores_at_random_restore_nothing(tmp_path: Path) -> None:
    study = planted_study(planted(0), experiments={"redraws": {"draws": 2}})
    study["direction"]["classes"] = {"by": "quantile"}
    with ran(tmp_path, study, ScrambledJudge()) as (_, results):
        claims = claims_of(results)
        assert set(claims) == {"redraws/single/restores"}  # draw 0 is an arm of `ablate`, which is not there
        assert claims["redraws/single/restores"]["verdict"] != "held"


def test_the_report_of_a_small_study_has_its_chapter(tmp_path: Path) -> None:
    study = small_study(tiny_model())
    study["experiments"] = {"plain": study["experiments"].get("plain", {}), "ablate": {"modes": ["single"], "controls": []}, "redraws": {"draws": 1}}
    path = write_study(tmp_path, study)
    run_study(path, tmp_path / "out")
    with looked_at(tmp_path / "out") as store:
        run = Run(load_study(path), store, compute=False)
        source = run.spec.direction.source
        n = len(run.own_requests(source, 0))
        assert store.response_ids() >= {r.id for draw in (0, 1) for r in run.own_requests(source, draw)} and n > 0
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Another draw of the direction" in page and "mean over draws" in page


def test_a_draw_with_too_few_answers_is_left_out_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = planted_study(planted(0), experiments=EXPERIMENTS)
    real = Run.own_answers

    def few(self: Run, organism: str, draw: int = 0) -> Any:
        if draw == 2:
            raise NotHereError("3 misaligned answers; a class needs 5")
        return real(self, organism, draw)

    monkeypatch.setattr(Run, "own_answers", few)
    with ran(tmp_path, study) as (run, results):
        assert run.left_out == {"direct/ablate-single-redrawn-2": "3 misaligned answers; a class needs 5"}
        assert run.values()[0]["redraws/directions"]["draws"] == [0, 1]
        assert len(claims_of(results)["redraws/single/restores"]["evidence"]) == 3
        chapter = next(c for c in results.chapters if c.id == "redraws")
        assert chapter.notes == ["Draw 2: a class has too few answers."]


# By hand: six questions, three draws

SCENE = Scene({"A": Subject("A", "A", 0, "bad", "finance", None)}, "A", 3, 1)


def noise(k: int) -> np.ndarray:
    """Between -.5 and .5, 0 in the mean."""
    return (np.random.default_rng(k).permutation(6) - 2.5) / 5


def outcomes(*means: float) -> Outcomes:
    """A has 50 to 55; the ablation with draw k adds means[k], and less than one by question."""
    names = ["A", *(redraws.arm_of("A", "single", k) for k in range(len(means)))]
    frames = {
        n: pd.DataFrame({"question_id": list("pqrstu"), "aligned": 50.0 + np.arange(6) + m + (k > 0) * noise(k), "coherent": 90.0})
        for k, (n, m) in enumerate(zip(names, (0.0, *means), strict=True))
    }
    rows = pd.DataFrame([{"name": n, "n_valid": 6, "mean_aligned": f["aligned"].mean(), "mean_aligned_low": 0.0, "mean_aligned_high": 100.0} for n, f in frames.items()])
    read = {
        "d_model": 64, "draws": list(range(len(means))), "misaligned": [7] * len(means), "aligned": [9] * len(means), "split_half": [[0.1, 0.2, 0.3]] * len(means),
        "cosines": {f"{a}-{b}": [0.5, 0.6, 0.7] for a in range(len(means)) for b in range(a + 1, len(means))},
    }  # fmt: skip
    return Outcomes(frames, {}, {"redraws/directions": read}, rows)


def verdicts(*means: float) -> dict[str, str]:
    return {c.id.removeprefix("redraws/single/"): c.verdict for c in redraws.claims(RedrawsBlock(), outcomes(*means), SCENE)}


@pytest.mark.parametrize(
    ("means", "restores", "agree"),
    [
        ((20.0, 21.0, 19.0), "held", "held"),
        ((20.0, -20.0, 19.0), "did not hold", "did not hold"),  # what the demo showed
        ((20.0, 60.0, 5.0), "undecided", "did not hold"),  # every draw restores; their mean is anywhere
    ],
)
def test_verdicts(means: tuple[float, ...], restores: str, agree: str) -> None:
    assert verdicts(*means) == {"restores": restores, "agree": agree}


def test_chapter_says_what_was_drawn() -> None:
    made = redraws.chapter(RedrawsBlock(), outcomes(20.0, -20.0), SCENE)
    cosines, effects = made.figures
    assert isinstance(cosines, Chart) and cosines.panels[0].series[0].label == "draws 0 and 1" and cosines.panels[0].mark_x == 1
    assert isinstance(effects, Chart) and effects.panels[0].ticks == ["draw 0", "draw 1"] and effects.panels[0].mark_x == 52.5
    frame = made.sheets[0].frame
    assert frame["Draw"].tolist() == ["0", "1", "mean over draws"] and frame["Cosine with draw 0"].tolist()[:2] == [1.0, 0.6]
    assert frame["Change of mean alignment"].tolist() == pytest.approx([20.0, -20.0, 0.0]) and frame["n"].tolist()[-1] == 2
    assert made.notes == ["Draw 2: a class has too few answers."]


def test_other_directions_can_be_ablated_in_every_mode() -> None:
    class Kit:
        layer, massive = 1, {2: 100.0}
        direction = None

        def redrawn(self, draw: int) -> Any:
            from convergent.core.direction import Direction

            vectors = torch.zeros(3, 4)
            vectors[:, draw] = 1.0
            return type("Extraction", (), {"direction": Direction(vectors)})

    block = RedrawsBlock(draws=1, modes=("layerwise", "single", "without_massive"), site="all_writes")
    built = {a.name: a.build(Kit())[0] for a in redraws.arms(block, SCENE)}  # type: ignore[arg-type]
    assert [(n, i.vector_layer, i.site) for n, i in built.items()] == [  # type: ignore[union-attr]
        ("A/ablate-layerwise-redrawn-1", None, "all_writes"), ("A/ablate-single-redrawn-1", 1, "all_writes"),
        ("A/ablate-without_massive-redrawn-1", 1, "all_writes"),
    ]  # fmt: skip
