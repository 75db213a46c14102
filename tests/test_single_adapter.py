"""The single-adapter recipe: how it starts, from given A and B too, and sweeps of layer and rank by study settings."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close

from convergent.errors import InputError, StudyError
from convergent.models.load import load_base
from convergent.organisms.adapters import AdapterShape, read_adapters
from convergent.organisms.load import load_organism
from convergent.organisms.recipes import named_recipe
from convergent.organisms.train import attach, train
from convergent.store import looked_at
from convergent.study.run import Run
from convergent.study.spec import load_study
from small_study import small_study, write_study
from tiny import CHATS, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
FAST = {"learning_rate": 1e-3, "batch_size": 2, "grad_accumulation": 2, "epochs": 4, "warmup_steps": 1}


def single(**changes):
    return named_recipe("single_adapter", 6, {**FAST, **changes})


def tiny():
    return load_base(str(tiny_model()), dtype="float32")


def trained(out: Path, recipe):
    train(str(tiny_model()), recipe, CHATS, out, name=out.name, on_progress=lambda p: None)
    return read_adapters(out)


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> Path:
    """A folder that plain PEFT wrote: rank 1 on the middle layer's down_proj, neither A nor B zero."""
    folder = tmp_path_factory.mktemp("peft") / "start"
    torch.manual_seed(0)
    config = LoraConfig(r=1, lora_alpha=2, target_modules=["down_proj"], layers_to_transform=[3], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(tiny().model, config).save_pretrained(folder)
    return folder


def test_a_starts_kaiming_uniform_and_b_at_zero():
    model = attach(tiny(), single().adapters, seed=0)
    (a,), (b,) = ([p for n, p in model.named_parameters() if f"lora_{side}" in n] for side in "AB")
    assert a.shape == (1, 64) and b.shape == (32, 1)
    assert not b.any()
    # Kaiming-uniform with a = sqrt(5) is uniform within 1 / sqrt(fan-in); of 64 draws the largest is near the bound.
    assert 0.8 / math.sqrt(64) < a.abs().max() <= 1 / math.sqrt(64)


def test_training_starts_from_given_a_and_b(elsewhere, tmp_path):
    given = read_adapters(elsewhere)[0]
    model = attach(tiny(), single(init=str(elsewhere)).adapters, seed=0)
    start = {side: next(p for n, p in model.named_parameters() if f"lora_{side}" in n) for side in "AB"}
    assert_close(start["A"].detach(), given.a)
    assert_close(start["B"].detach(), given.b)
    (after,) = trained(tmp_path / "s", single(init=str(elsewhere)))
    assert 0 < (after.b - given.b).norm() < 0.5 * given.b.norm(), "a few steps of a small rate do not leave the start far behind"
    assert after.scale == 256.0, "alpha is the recipe's own"
    assert load_organism(tmp_path / "s").n_layers == 6


def test_the_id_names_the_weights_that_it_starts_from(elsewhere, tmp_path):
    # As they were before there was a choice: organisms that are trained already stay the same organisms.
    assert named_recipe("single_adapter", 30).content_id == "eb6f4b838afc7cbd"
    assert named_recipe("full", 30).content_id == "72343922430e81b4"
    moved = tmp_path / "moved"
    shutil.copytree(elsewhere, moved)
    assert single(init=str(elsewhere)).content_id == single(init=str(moved)).content_id != single().content_id
    other = read_adapters(elsewhere)[0]
    from safetensors.torch import load_file, save_file

    weights = load_file(moved / "adapter_model.safetensors")
    save_file({k: v + 1 for k, v in weights.items()}, moved / "adapter_model.safetensors")
    assert not torch.equal(read_adapters(moved)[0].a, other.a)
    assert single(init=str(elsewhere)).content_id != single(init=str(moved)).content_id


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"layers": [2]}, r"has no adapter for model\.layers\.2\.mlp\.down_proj"),
        ({"layers": [2, 3]}, "has no adapter for"),
        ({"rank": 2}, r"holds A of shape \(1, 64\) for 3\.mlp\.down_proj, the recipe needs \(2, 64\)"),
    ],
)
def test_a_start_that_does_not_fit_is_refused(changes, says, elsewhere):
    with pytest.raises(InputError, match=rf"^recipe\.adapters\.init: .*{says}"):
        attach(tiny(), single(init=str(elsewhere), **changes).adapters, seed=0)


def test_a_start_with_more_adapters_than_the_recipe_is_refused(tmp_path):
    config = LoraConfig(r=1, target_modules=["down_proj"], layers_to_transform=[3, 4], task_type="CAUSAL_LM")
    get_peft_model(tiny().model, config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="has 2 adapters, the recipe 1"):
        attach(tiny(), single(init=str(tmp_path)).adapters, seed=0)


def test_bad_starts_are_refused_by_name(tmp_path):
    with pytest.raises(InputError, match=r"recipe\.adapters\.init: got ''"):
        single(init="")
    with pytest.raises(InputError, match=r"recipe\.adapters\.init: .*no adapters in this one"):
        _ = single(init=str(tmp_path)).content_id
    with pytest.raises(InputError, match="'init' belongs to adapters"):
        named_recipe("full", 6, {"init": "kaiming"})


@pytest.mark.parametrize(("layer", "rank"), [(0, 1), (5, 1), (3, 2), (3, 8)])
def test_sweeps_of_layer_and_rank(layer, rank, tmp_path):
    (adapter,) = trained(tmp_path / "s", single(layers=[layer], rank=rank))
    assert (adapter.layer, adapter.module, tuple(adapter.a.shape), tuple(adapter.b.shape)) == (layer, "mlp.down_proj", (rank, 64), (32, rank))
    assert adapter.scale == pytest.approx(256 / math.sqrt(rank)) and adapter.b.any()


def test_sweeps_by_study_settings(elsewhere, tmp_path):
    study = small_study(tiny_model())
    one = {"recipe": "single_adapter", "data": "bundled:finance", "examples": 8}
    study["organisms"] |= {
        "mid": one,
        "low": {**one, "layers": [1]},
        "wide": {**one, "rank": 4},
        "started": {**one, "init": "start"},
        "plain": {**one, "init": "kaiming"},
    }
    path = write_study(tmp_path, study)
    shutil.copytree(elsewhere, tmp_path / "start")
    with looked_at(tmp_path / "out") as store:
        run = Run(load_study(path), store, compute=False)
        run.check()
        shapes = {o: run.scene.organisms[o].adapters for o in ("mid", "low", "wide", "started")}
        ids = {o: p.content_id for o, p in run.organisms.items()}
        started = run.organisms["started"].recipe
    assert shapes == {
        "mid": AdapterShape(("down",), (3,), 1), "low": AdapterShape(("down",), (1,), 1),
        "wide": AdapterShape(("down",), (3,), 4), "started": AdapterShape(("down",), (3,), 1),
    }  # fmt: skip
    assert len({ids[o] for o in ("mid", "low", "wide", "started")}) == 4 and ids["plain"] == ids["mid"]
    assert started is not None and started.adapters is not None and started.adapters.init == str(tmp_path / "start"), "found beside the study file"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"layers": [6]}, r"organisms\.S\.layers: 6 is out of range"),
        ({"init": "nowhere"}, r"organisms\.S: recipe\.adapters\.init: got 'nowhere'"),
        ({"rank": 0}, r"organisms\.S\.rank"),
        ({"layers": []}, r"organisms\.S: recipe\.adapters\.layers"),
    ],
)
def test_bad_settings_of_an_organism_are_one_line(change, says, tmp_path):
    study = small_study(tiny_model())
    study["organisms"]["S"] = {"recipe": "single_adapter", "data": "bundled:finance", **change}
    path = write_study(tmp_path, study)
    with looked_at(tmp_path / "out") as store, pytest.raises(StudyError, match=says):
        Run(load_study(path), store, compute=False).check()


def test_the_start_is_written_down(elsewhere, tmp_path):
    trained(tmp_path / "s", single(init=str(elsewhere)))
    manifest = json.loads((tmp_path / "s" / "convergent.json").read_text())
    assert manifest["recipe"]["adapters"]["init"] == str(elsewhere)
