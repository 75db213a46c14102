"""Dynamics: a whole tiny study with kept steps, the same numbers by another way, a second training that ends in the same weights, and verdicts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from convergent.directions.margin import margins
from convergent.experiments import dynamics
from convergent.experiments.base import NotHereError
from convergent.experiments.outcomes import Outcomes
from convergent.experiments.scene import Scene, Subject
from convergent.organisms.adapters import AdapterShape
from convergent.organisms.load import load_organism
from convergent.organisms.steps import STEPS, KeptSteps, Spacing
from convergent.store import looked_at, opened
from convergent.study.main import run_study
from convergent.study.run import Run
from convergent.study.spec import load_study
from small_study import assert_refused, small_study, write_study
from tiny import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
SPACING = Spacing(points=10)


def study_of(**block: Any) -> dict[str, Any]:
    study = small_study(tiny_model())
    del study["organisms"]["B"]
    for spec in study["organisms"].values():
        spec |= {"epochs": 3, "learning_rate": 0.01}  # 12 steps
    study["experiments"] = {"plain": {"twin": "G"}, "dynamics": {"points": 10, "sampled": [0.5], **block}}
    return study


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("dynamics")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run_study(write_study(folder, study_of()), folder / "out")
    yield folder
    torch.set_num_threads(threads)


def run_in(folder: Path, store: Any, compute: bool = True) -> Run:
    return Run(load_study(folder / "study.yaml"), store, compute=compute)


def test_figures_claims_and_tables_are_there(done: Path) -> None:
    out = done / "out"
    page = (out / "report.html").read_text()
    for figure in ("outcomes", "norms", "turns"):
        assert f'id="fig-dynamics-{figure}"' in page
    assert [c["id"] for c in json.loads((out / "claims.json").read_text()) if c["id"].startswith("dynamics")] == [
        "dynamics/learned", "dynamics/sudden", "dynamics/turn"
    ]  # fmt: skip
    table = pd.read_csv(out / "tables" / "dynamics-changes.csv")
    assert set(table["training"]) == {"A", "G"} and len(table) == 6 and (table["of"] == 12).all()
    turns = pd.read_csv(out / "tables" / "dynamics-turns.csv")
    assert len(turns) == 2 * 2 * 7, "both trainings, A and B, all together and each of six adapters"
    assert "A/at-50%" in set(pd.read_csv(out / "tables" / "conditions.csv")["name"])


def test_a_kept_step_is_the_organism_of_that_step(done: Path) -> None:
    """The last one against the merged organism, the first against the chat model; and the sampled condition holds the adapters of the middle."""
    with looked_at(done / "out") as store:
        looked, run = run_in(done, store, compute=False), run_in(done, store)
        value = looked.value("dynamics/curves/A")
        assert value["steps"] == [0, 1, 2, 4, 5, 6, 7, 8, 10, 11, 12]
        read = (looked.direction, looked.layer)
        merged = margins(load_organism(looked.folder("A"), base=str(tiny_model()), dtype="float32"), looked.pairs, read=read)
        chat = margins(run.model("chat"), looked.pairs, read=read)
    assert value["margin"][-1] == pytest.approx([m.margin for m in merged], abs=1e-4)
    assert value["matched"][0] == pytest.approx([m.margin_matched for m in chat], abs=1e-6)
    assert value["projection"][0] == [0.0] * len(chat)
    moved = [(a.projection - b.projection) / looked.token_norm for a, b in zip(merged, chat, strict=True)]
    assert value["projection"][-1] == pytest.approx(moved, abs=1e-4) and np.abs(moved).max() > 1e-3
    kept = looked.steps("A", SPACING)
    condition = next(c for a, c in looked.conditions() if a.name == "A/at-50%")
    assert [i.content_id for i in condition.interventions] == [a.low_rank().content_id for a in kept.adapters[5]] and kept.steps[5] == 6


def test_weights_are_read_as_they_are(done: Path) -> None:
    with looked_at(done / "out") as store:
        run = run_in(done, store, compute=False)
        value, kept = run.value("dynamics/weights/A"), run.steps("A", SPACING)
    for i, adapter in enumerate(kept.adapters[4]):
        assert value["norm_a"][i][4] == pytest.approx(float(adapter.a.norm())) and value["norm_b"][i][4] == pytest.approx(float(adapter.b.norm()))
    into, out = (kept.adapters[a][0].b - kept.adapters[b][0].b for a, b in ((4, 2), (6, 4)))
    assert value["cosine_b"][0][4] == pytest.approx(float(torch.nn.functional.cosine_similarity(into.ravel(), out.ravel(), dim=0)), abs=1e-5)


def test_steps_that_were_not_kept_are_made_by_the_same_training_again(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    shutil.copytree(done / "out", out)
    with looked_at(out) as store:
        own = run_in(done, store, compute=False)
        want = own.steps("A", SPACING)
        folder = own.folder("A")
        assert len(list((folder / STEPS).iterdir())) == 11
        shutil.rmtree(folder / STEPS)
        before = {p: p.read_bytes() for p in folder.iterdir()}
    with opened(out) as store:
        run = run_in(done, store)
        got = run.steps("A", SPACING)
        assert {p: p.read_bytes() for p in folder.iterdir()} == before, "the organism itself is left as it is"
        assert got.steps == want.steps
        for x, y in zip(got.adapters, want.adapters, strict=True):
            assert all(torch.equal(a.a, b.a) and torch.equal(a.b, b.b) for a, b in zip(x, y, strict=True))
        monkeypatch.setattr("convergent.organisms.train.train", None)  # the second time nothing is trained
        assert run.steps("A", SPACING).steps == want.steps
        # A training that ends elsewhere is not passed off as that of the organism.
        weights = load_file(folder / "adapter_model.safetensors")
        save_file({k: v + 1e-3 for k, v in weights.items()}, folder / "adapter_model.safetensors")
        with pytest.raises(NotHereError, match=r"A trained again ended in other weights \(largest difference 0.001\)"):
            run.steps("A", SPACING)
        with pytest.raises(TypeError):  # another spacing is trained for again
            run.steps("A", Spacing(every=1))


def test_a_resumed_study_computes_nothing_and_elsewhere_is_said(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    shutil.copytree(done / "out", out)
    for name in ("model", "_train"):
        monkeypatch.setattr(Run, name, None)
    with opened(out) as store:
        run = run_in(done, store)
        run.go()
        assert len(run.values()[0]) == 4 and not run.left_out
        folder = run.folder("A")
    # From elsewhere: with its steps it is as good as one of ours, without them the study goes on and says so.
    study = study_of()
    study["organisms"]["A"] = {"path": str(folder)}
    with looked_at(tmp_path / "none") as store:
        elsewhere = Run(load_study(write_study(tmp_path / "b", study)), store, compute=False)
        assert elsewhere.steps("A", SPACING).steps[-1] == 12
        shutil.rmtree(folder / STEPS)
        with pytest.raises(NotHereError, match="A comes from elsewhere, and no steps of its training were kept with it"):
            elsewhere.steps("A", SPACING)


@pytest.mark.parametrize(
    ("block", "says"),
    [
        ({"sampled": [1.0]}, r"experiments\.dynamics\.sampled\.0: 1 is no share of the training before its end"),
        ({"points": 3}, r"experiments\.dynamics\.points: .*greater than or equal to 4"),
        ({"every": 0}, r"experiments\.dynamics\.every: "),
        ({"organism": "chat"}, r"experiments\.dynamics\.organism: the chat model was not trained here"),
        ({"organism": "Z"}, r"experiments\.dynamics\.organism: no organism 'Z'"),
        ({"organism": "G"}, r"experiments\.dynamics\.twin: G is the organism itself"),
        ({"window": 0}, r"experiments\.dynamics\.window: "),
    ],
)
def test_refuses(tmp_path: Path, block: dict[str, Any], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(write_study(tmp_path, study_of(**block)), tmp_path / "out", says, capsys)


# Verdicts from planted curves


def curves(rise: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Eight pairs that follow `rise` (n_steps,) with their own size."""
    rng = np.random.default_rng(seed)
    size = 1 + 0.1 * rng.standard_normal(8)
    rows = (rise[:, None] * size).tolist()
    steps = list(range(len(rise)))
    return {"steps": steps, "time": [float(s) for s in steps], "pairs": [str(i) for i in range(8)], "margin": rows, "matched": rows, "projection": rows}


def weights(turn: bool, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    updates = rng.standard_normal((20, 30)) * 0.1
    updates[:8, 0] += 1
    updates[8:, 1 if turn else 0] += 1
    points = np.vstack([np.zeros(30), updates.cumsum(0)])
    from convergent.organisms.adapters import Adapter

    adapters = tuple((Adapter(0, "mlp.down_proj", torch.ones(1, 4), torch.from_numpy(p)[:, None].float(), 1.0),) for p in points)
    return dynamics.weights_read(KeptSteps(tuple(range(21)), tuple(map(float, range(21))), adapters), 2, "A")


def scene() -> Scene:
    shape = AdapterShape(("down_proj",), (0,), 1)
    return Scene({o: Subject(o, o, 0, "bad" if o == "A" else "good", "d", shape) for o in "AG"}, "A", 6, 3, "G")


def verdicts(**readings: Any) -> dict[str, str]:
    found = dynamics.claims(dynamics.DynamicsBlock(), Outcomes({}, {}, {f"dynamics/{k.replace('_', '/')}": v for k, v in readings.items()}), scene())
    return {c.id: c.verdict for c in found}


def test_verdicts_follow_what_is_planted() -> None:
    rng = np.random.default_rng(0)
    jitter = lambda: 0.02 * rng.standard_normal(21).cumsum()  # noqa: E731
    late, even = np.where(np.arange(21) < 9, 0, np.arange(21) - 8) * 0.3 + jitter(), np.arange(21) * 0.2 + jitter()
    flat = jitter()
    planted = verdicts(curves_A=curves(late), curves_G=curves(flat, 1), weights_A=weights(True, 0), weights_G=weights(False, 1))
    assert planted == {"dynamics/learned": "held", "dynamics/sudden": "held", "dynamics/turn": "held"}
    nothing = verdicts(curves_A=curves(even), curves_G=curves(even, 1), weights_A=weights(False, 2), weights_G=weights(False, 3))
    assert nothing["dynamics/sudden"] == nothing["dynamics/turn"] == "undecided" and nothing["dynamics/learned"] == "undecided"
    both = verdicts(curves_A=curves(late), curves_G=curves(late, 1), weights_A=weights(True, 4), weights_G=weights(True, 5))
    assert both["dynamics/sudden"] == both["dynamics/turn"] == "did not hold", "the twin shows it too"
    assert verdicts() == {}, "nothing read, nothing claimed"


def test_a_change_in_the_learning_rate_is_no_change() -> None:
    """A curve that follows the sum of learning rates: in steps it bends, in training time it is even."""
    time = np.concatenate([[0, 0, 0.5], 0.5 + np.cumsum(np.linspace(1, 0.05, 18))])
    made = curves(time + 0.01 * np.random.default_rng(0).standard_normal(21).cumsum())
    assert dynamics._change(made, "matched", "A").shuffled.high < 0.05, "by steps"
    assert dynamics._change({**made, "time": time.tolist()}, "matched", "A").shuffled.low > 0.05, "by training time"


def test_a_pair_is_what_intervals_are_over() -> None:
    rise = dynamics._rise(curves(np.array([0.0, 1.0])), "margin", curves(np.array([0.0, 0.4])))
    assert rise.clusters == 8 and rise.estimate == pytest.approx(0.6, abs=0.05)
