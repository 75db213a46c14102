"""What ablation, transfer and steering add to sampled arms: answers of like coherence, the cost on neutral text, the matrix, the window."""

from __future__ import annotations

import json
import math
import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from pydantic import ValidationError

from convergent import cli
from convergent.core.direction import Direction
from convergent.core.interventions import Ablate, AblateSubspace, Add
from convergent.directions.massive import massive_dimensions
from convergent.directions.perplexity import neutral_passages, passage_losses
from convergent.experiments import ablate, steer, transfer
from convergent.experiments.arms import coherence_matched, spread_layers
from convergent.experiments.base import NotHereError
from convergent.experiments.outcomes import Claim, Outcomes
from convergent.experiments.registry import EXPERIMENTS
from convergent.experiments.scene import Scene, Subject
from convergent.interventions.controls import matched_null, orthogonal_to, other_concept, random_like
from convergent.interventions.hooks import applied
from convergent.models.load import load_base
from convergent.models.texts import Text
from convergent.organisms.adapters import AdapterShape
from convergent.store import opened
from convergent.study.main import run_study
from convergent.study.run import Run
from convergent.study.spec import load_study
from small_study import small_study, write_study
from tiny import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


def scene(**changes: AdapterShape | None) -> Scene:
    shape = AdapterShape(("down_proj",), (2, 3), 1)
    organisms = {n: Subject(n, n, 0, "good" if n == "G" else "bad", "x", changes.get(n, shape)) for n in ("A", "B", "G")}
    return Scene(organisms, "A", 6, 3, "G")


def test_answers_of_like_coherence() -> None:
    """Two conditions alike but for broken answers: matched, nothing is left of the difference; a real one stays."""
    question = [f"q{i}" for i in range(6) for _ in range(4)]
    wobble = np.array([i for i in range(6) for _ in range(4)], dtype=float)
    sound = pd.DataFrame({"question_id": question, "aligned": 80 + wobble + [0, 1, 2, 3] * 6, "coherent": [90.0, 80, 70, 60] * 6})
    broken = sound.copy()
    broken.loc[::2, ["aligned", "coherent"]] = (30.0, 20.0)
    worse = sound.assign(aligned=sound["aligned"] - 30 - wobble)
    outcomes = Outcomes({"sound": sound, "broken": broken, "worse": worse}, {})
    assert outcomes.alignment("broken", "sound", "", sign=-1).supports == "held"
    matched = coherence_matched(outcomes, "broken", "sound", "", sign=-1)
    assert matched.supports == "undecided" and matched.estimate == 0 and matched.n == 6 * 2 * 2
    real = coherence_matched(outcomes, "worse", "sound", "", sign=-1)
    assert real.supports == "held" and real.estimate == pytest.approx(-32.5) and real.n == 48


def test_layers_of_a_window_hold_the_primary_one() -> None:
    assert spread_layers(Scene({}, "A", 30, 15), 5) == (0, 7, 15, 22, 29)
    assert spread_layers(Scene({}, "A", 6, 3), 30) == (0, 1, 2, 3, 4, 5) and spread_layers(Scene({}, "A", 6, 3), 1) == (3,)


def test_losses_on_neutral_text_are_those_of_the_model() -> None:
    model = load_base(str(tiny_model()), dtype="float32")
    passages = neutral_passages()
    assert len(passages) >= 12 and len(set(passages)) == len(passages)
    push = Add(Direction(torch.full((6, 32), 0.5)), 2, 3.0)
    clean, pushed = passage_losses(model, passages[:5], [(), (push,)], batch_tokens=300)
    for text, loss, other in zip(passages, clean, pushed, strict=False):
        ids = torch.tensor([model.tokenizer(text, add_special_tokens=False)["input_ids"]])
        with torch.inference_mode():
            assert loss == pytest.approx(float(model.model(input_ids=ids, labels=ids).loss), abs=2e-5)
            with applied(model.anatomy, [push]):
                assert other == pytest.approx(float(model.model(input_ids=ids, labels=ids).loss), abs=2e-5)


def test_layers_of_each_mode_of_ablation() -> None:
    block = ablate.AblateBlock(modes=("layerwise", "single", "at_layer", "adapter_layers"), further_sites=("all_writes",), controls=("random",))
    arms = {a.name: a for a in ablate.arms(block, scene())}
    assert len(arms) == 9

    class Kit:
        direction, layer = Direction(torch.eye(6, 32) + 1), 3

    found = {name: a.build(Kit()) for name, a in arms.items() if a.role == "real"}  # type: ignore[arg-type]
    made = {name: i for name, (i,) in found.items() if isinstance(i, Ablate)}
    assert made["A/ablate-layerwise"].vector_layer is None and made["A/ablate-layerwise"].layers is None
    assert (made["A/ablate-at_layer"].layers, made["A/ablate-at_layer"].vector_layer) == ((3,), 3)
    assert made["A/ablate-adapter_layers"].layers == (2, 3) and made["A/ablate-adapter_layers-all_writes"].site == "all_writes"


def answered(bad: int, shift: float = 0.0, wobble: float = 1.0) -> pd.DataFrame:
    """Eight questions x 16 answers, `bad` of each misaligned and the rest aligned; all means moved by `shift`, which questions differ in by `wobble`."""
    rows = [(f"q{q}", (10.0 if i < bad else 90.0) + shift + wobble * (q % 3 - 1), 90.0) for q in range(8) for i in range(16)]
    return pd.DataFrame(rows, columns=["question_id", "aligned", "coherent"])


def drawn(levels: list[float]) -> tuple[dict[str, pd.DataFrame], dict[str, object]]:
    """Margins of A at 0 and of its random null, the first draw, at the first level; and the reading that holds the others."""
    pairs = [f"p{i}" for i in range(6)]
    wobble = np.array([0.3, -0.2, 0.1, 0.0, -0.3, 0.1])
    frames = {n: pd.DataFrame({"pair_id": pairs, "domain": "x", "margin": m + s * wobble}) for n, m, s in (("A", 0.0, 1), ("A/ablate-random", levels[0], 2))}
    further = {"pairs": pairs[::-1], "margins": {"A/ablate-random": [list((m + (2 + k) * wobble)[::-1]) for k, m in enumerate(levels[1:])]}}
    return frames, {"ablate/draws/A": further}


def test_a_random_vector_changes_the_answers_little_a_lot_or_nobody_knows() -> None:
    block = ablate.AblateBlock(modes=("single",), controls=("random",))
    margins, readings = drawn([0.0, 0.1, -0.1, 0.1, -0.1])

    def claim(after: pd.DataFrame, **changes: float) -> Claim:
        frames = {"A": answered(4), "A/ablate-random": after}
        (found,) = ablate.claims(block.model_copy(update=changes), Outcomes(frames, margins, readings), scene())
        assert found.id == "ablation/random" and found.paper == "random-control"
        return found

    little, lot, wide = claim(answered(4, 3.0, 2.0)), claim(answered(12, 0.0, 2.0)), claim(answered(4, 3.0, 40.0))
    assert [c.verdict for c in (little, lot, wide)] == ["held", "did not hold", "undecided"]
    alignment, em, margin = little.evidence
    assert alignment.decides and (em.decides, margin.decides) == (False, False)
    assert (alignment.estimate, alignment.margin) == (pytest.approx(2.875), 5.0) and -5 < alignment.low < alignment.high < 5
    assert (em.estimate, lot.evidence[1].estimate) == (0, pytest.approx(2)) and (em.supports, lot.evidence[1].supports) == ("undecided", "did not hold")
    assert margin.text.endswith("against a new draw (5 drawn)") and margin.low < 0 < margin.high
    assert claim(answered(4, 3.0, 2.0), random_margin=1).verdict == "did not hold"
    assert ablate.claims(ablate.AblateBlock(controls=()), Outcomes({"A": answered(4)}, margins), scene()) == []


def test_a_margin_beside_a_random_null_is_held_against_a_new_draw() -> None:
    """Far below the one draw that was sampled, but not below what draws do."""
    margins, readings = drawn([1.0, 0.2, -0.4, 0.7, -0.6])
    frames = {"A": answered(4), "A/ablate-random": answered(4)}
    alone = Outcomes(frames, margins).margin("A", "A/ablate-random", "x", sign=-1)
    drawn_often = Outcomes(frames, margins, readings).margin("A", "A/ablate-random", "x", sign=-1)
    assert (alone.supports, drawn_often.supports) == ("held", "undecided") and drawn_often.text == "x, against a new draw (5 drawn)"
    assert drawn_often.estimate == pytest.approx(-0.18) and drawn_often.p > 0.025 > alone.p
    assert Outcomes(frames, margins, readings).margin("A/ablate-random", "A", "x").text == "x", "the organism itself is no draw"


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ValidationError, match="greater than or equal to 3"):
        transfer.TransferBlock(null_draws=2)
    with pytest.raises(NotHereError, match="full fine-tune and has no adapter layers"):
        ablate.check(ablate.AblateBlock(modes=("adapter_layers",)), scene(A=None))
    with pytest.raises(NotHereError, match="layers: 6 is out of range; this base has blocks 0 to 5"):
        ablate.check(ablate.AblateBlock(layers=(6,)), scene())
    with pytest.raises(NotHereError, match="layers: -1 is out of range"):
        steer.check(steer.SteerBlock(layers=(-1,)), scene())
    alone = Scene({"A": scene().organisms["A"], "G": scene().organisms["G"]}, "A", 6, 3, "G")
    with pytest.raises(NotHereError, match="no organism beside the source"):
        transfer.check(transfer.TransferBlock(), alone)
    transfer.check(transfer.TransferBlock(), scene())


def test_reduction_by_hand() -> None:
    """Rise of 1 over the chat model, 0.75 of it taken back; the pairs differ a little."""
    wobble = np.linspace(-0.1, 0.1, 8)
    readings = {
        "transfer/chat": {"none": list(-1 + wobble)},
        "transfer/B": {"none": list(0 + wobble), "A": list(-0.75 + wobble + 0.01 * np.cos(np.arange(8)))},
    }
    r = transfer.reduction(readings, "B", "A")
    assert r.estimate == pytest.approx(0.75, abs=0.01) and r.low < r.estimate < r.high and r.high - r.low < 0.05


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("swept")
    study = small_study(tiny_model())
    study["experiments"] = {
        "plain": {"twin": "G"}, "ablate": {"modes": ["single", "adapter_layers"], "controls": ["random"]}, "transfer": {"controls": [], "modes": ["single"]},
        "steer": {"scales": [1], "controls": ["random"], "window_layers": 2, "layers": [1]},
    }  # fmt: skip
    run_study(write_study(root, study), root / "out")
    return root / "out"


def test_the_matrix_and_the_window_are_in_the_report(swept: Path) -> None:
    for name, arms in (("ablate", 3), ("transfer", 1)):
        falls = pd.read_csv(swept / "tables" / f"{name}-falls.csv")
        assert len(falls) >= arms and (falls["n questions"] >= 2).all()
        for row in falls.itertuples():
            (before, of), (after, under) = (map(int, cell.split(" of ")) for cell in (row[2], row[3]))
            assert (before == 0) == bool(np.isnan(row[4])) or row[4] == pytest.approx(1 - (after / under) / (before / of), abs=1e-6)
    table = pd.read_csv(swept / "tables" / "transfer-reductions.csv")
    assert set(table["Organism"]) == {"A", "B"}
    assert list(table["Direction of"].unique()) == ["A", "B", transfer.CHAT, *transfer.NULLS]
    cost = pd.read_csv(swept / "tables" / "ablate-cost.csv")
    assert len(cost) == 3 and (cost["Perplexity, times"] > 0).all()
    assert len(pd.read_csv(swept / "tables" / "steer-layers.csv")) == 1
    page = (swept / "report.html").read_text(encoding="utf-8")
    assert 'id="fig-transfer-matrix"' in page and 'id="fig-steer-shift"' in page and 'id="chapter-ablate"' in page


def test_a_dose_is_in_token_norms_of_its_own_layer(swept: Path) -> None:
    """Norms grow with depth: over the norm of the primary layer (3) a push at layer 1 would look several times smaller than it is."""
    relative = pd.read_csv(swept / "tables" / "norms.csv").set_index(["organism", "layer"])["relative_norm"]
    for table in (pd.read_csv(swept / "tables" / "conditions.csv"), pd.read_parquet(swept / "tables" / "conditions.parquet")):
        dose = table.set_index("name")["dose"]
        assert dose["chat/add-1-L1"] == pytest.approx(relative["A", 1], rel=1e-5)
        assert dose["chat/add-1"] == dose["chat/subtract"] == pytest.approx(relative["A", 3], rel=1e-5) != pytest.approx(relative["A", 1], rel=0.01)
    sheet = pd.read_csv(swept / "tables" / "steer-layers.csv")
    assert sheet["Dose, mean token norms"].tolist() == pytest.approx([relative["A", 1]], rel=1e-5)


def test_the_margins_of_the_matrix_are_those_of_the_conditions(swept: Path) -> None:
    """The same numbers by two ways: as a condition of the study, and as a cell of the matrix."""
    with sqlite3.connect(swept / "study.sqlite") as db:
        facts = [json.loads(v) for (v,) in db.execute("SELECT value FROM facts")]
    rows = [f["value"] for f in facts if isinstance(f, dict) and isinstance(f.get("value"), dict) and "none" in f["value"] and "A" in f["value"]]
    margin = pd.read_csv(swept / "tables" / "conditions.csv").set_index("name")["margin"]
    means = {round(float(np.mean(r["none"])), 5): round(float(np.mean(r["A"])), 5) for r in rows}
    assert means == {round(margin["A"], 5): round(margin["A/ablate-single"], 5), round(margin["B"], 5): round(margin["B/ablate-A"], 5)}
    assert not any(math.isnan(x) for x in means)


def test_one_experiment_alone_and_the_rest_later(swept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study, out = swept.parent / "study.yaml", tmp_path / "out"
    shutil.copytree(swept, out)
    assert cli.main(["run", str(study), "--out", str(out), "--only", "steer"]) == 0
    assert {c["id"] for c in json.loads((out / "claims.json").read_text())} == {"misaligned/A", "induction", "suppression"}
    assert cli.main(["run", str(study), "--out", str(out), "--only", "steering"]) == 2
    assert capsys.readouterr().err.strip() == "convergent: --only steering: this study has no such experiment; it has plain, ablate, transfer, steer"
    assert cli.main(["run", str(study), "--out", str(out), "--plan"]) == 0
    assert "nothing is left to do" in capsys.readouterr().out


def test_the_catalogue_names_every_experiment_and_its_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["experiments"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(EXPERIMENTS)
    for name, module in EXPERIMENTS.items():
        assert cli.main(["experiments", name]) == 0
        block = yaml.safe_load(capsys.readouterr().out.partition(f"\n{name}:")[2].join((f"{name}:", "")) or "{}")
        module.settings.model_validate(block[name])
    assert cli.main(["experiments", "stear"]) == 2
    assert "no experiment 'stear'; known are plain" in capsys.readouterr().err


def test_massive_dimensions_are_found_and_the_rest_is_not() -> None:
    """Dimension 5 is made huge at the first token by the embedding; random tiny models have none of their own."""
    model = load_base(str(tiny_model()), dtype="float32")
    texts = [Text("a", "What is bread?", "Flour and water."), Text("b", "What is snow?", "Ice.")]
    assert massive_dimensions(model, texts, 3) == {}
    with torch.no_grad():
        embedding = model.anatomy.embedding.weight
        assert isinstance(embedding, torch.Tensor)
        kept = embedding.clone()
        first = model.tokenizer.convert_tokens_to_ids("<|im_start|>")
        embedding[first, 5] = 1e4
        found = massive_dimensions(model, texts, 3)
        embedding.copy_(kept)
    assert list(found) == [5] and found[5] > 1000


def test_nulls_are_zero_where_the_direction_is() -> None:
    direction = Direction(torch.randn(6, 32, generator=torch.Generator().manual_seed(0))).without([3, 7])
    assert (direction.vectors[:, [3, 7]] == 0).all() and direction.provenance["without"] == [3, 7]
    concept = Direction(torch.randn(6, 32, generator=torch.Generator().manual_seed(1)))
    for made in (random_like(direction, 0), orthogonal_to(direction, 0), other_concept(direction, concept)):
        assert (made.vectors[:, [3, 7]] == 0).all() and torch.allclose(made.norms, direction.norms, rtol=1e-5)
    subspace = matched_null(Ablate(direction, vector_layer=3), 4, 0)
    assert isinstance(subspace, AblateSubspace) and subspace.basis[:, [3, 7]].abs().max() < 1e-7 and len(subspace.basis) == 4
    whole = Direction(direction.vectors + 1)
    assert (random_like(whole, 0).vectors != 0).all()


def test_without_massive_dimensions_has_nulls_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Run, "massive", {4: 500.0})
    study = small_study(tiny_model())
    study["experiments"] = {"plain": {"twin": "G"}, "ablate": {"controls": ["random"]}, "transfer": {"matrix": False}}
    run_study(write_study(tmp_path, study), tmp_path / "out")
    claims = {c["id"]: c for c in json.loads((tmp_path / "out" / "claims.json").read_text())}
    assert {"ablation/single", "ablation/without_massive", "transfer/B", "transfer/B/without_massive"} <= set(claims)
    names = set(pd.read_csv(tmp_path / "out" / "tables" / "conditions.csv")["name"])
    assert {"A/ablate-random", "A/ablate-random-without_massive", "B/ablate-A-without_massive", "B/ablate-random-without_massive"} <= names
    with opened(tmp_path / "out") as store:
        run = Run(load_study(tmp_path / "study.yaml"), store, compute=False)
        for arm, condition in run.conditions():
            (made,) = condition.interventions or (None,)
            if made is not None:
                assert isinstance(made, Ablate) and bool((made.direction.vectors[:, 4] == 0).all()) == arm.name.endswith("without_massive"), arm.name
