"""Steps kept during training: which, the same weights with them and without, whole after a kill, and the time they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from convergent.core.ids import file_sha256
from convergent.errors import ModelError
from convergent.organisms.adapters import read_adapters
from convergent.organisms.recipes import Recipe, named_recipe
from convergent.organisms.steps import STEPS, Spacing, kept_name, read_steps, training_time
from convergent.organisms.train import train
from convergent.organisms.watch import Progress
from tiny import CHATS, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
FAST = {"learning_rate": 0.01, "batch_size": 1, "grad_accumulation": 1, "epochs": 2, "warmup_steps": 2}
"""5 chats, 2 epochs, 1 chat a step: 10 steps."""
SPACING = Spacing(points=5)


def trained(out: Path, keep: Any = SPACING.of, recipe: str = "nine_adapter", **more: Any) -> Path:
    train(str(tiny_model()), named_recipe(recipe, 6, FAST), CHATS, out, name="a", keep=keep, **{"on_progress": lambda p: None, **more})
    return out


def test_spacing() -> None:
    assert Spacing(points=4).of(10) == (0, 3, 5, 8, 10)
    assert Spacing(every=4).of(10) == (0, 4, 8, 10)
    assert Spacing(points=16).of(3) == (0, 1, 2, 3), "no more than there are"


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_time_is_the_sum_of_the_learning_rates(schedule: Any) -> None:
    recipe = Recipe(named_recipe("nine_adapter", 6).adapters, schedule=schedule, warmup_steps=3, learning_rate=2e-3)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=recipe.learning_rate)
    name = {"constant": "constant_with_warmup"}.get(schedule, schedule)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=3, num_training_steps=9)
    total, want = 0.0, [0.0]
    for _ in range(9):
        total += optimizer.param_groups[0]["lr"] / recipe.learning_rate
        want.append(total)
        optimizer.step()
        scheduler.step()
    assert training_time(recipe, 9) == pytest.approx(want)
    assert want[1] == 0.0 and want[2] == pytest.approx(1 / 3), "a warm-up starts at nothing"


def test_keeping_changes_nothing_of_the_organism(tmp_path: Path) -> None:
    with_steps, without = trained(tmp_path / "a"), trained(tmp_path / "b", keep=None)
    assert file_sha256(with_steps / "adapter_model.safetensors") == file_sha256(without / "adapter_model.safetensors")
    from convergent.models.load import folder_id
    from convergent.organisms.manifest import read_organism

    assert read_organism(with_steps).content_id == read_organism(without).content_id and folder_id(with_steps) == folder_id(without)
    kept = read_steps(with_steps, SPACING)
    assert kept is not None and kept.steps == (0, 2, 4, 6, 8, 10) and kept.time[0] == 0 and kept.time[-1] == training_time(named_recipe("nine_adapter", 6, FAST), 10)[-1]
    for a, b in zip(kept.adapters[-1], read_adapters(with_steps), strict=True):
        assert (a.layer, a.module, a.scale) == (b.layer, b.module, b.scale) and torch.equal(a.a, b.a) and torch.equal(a.b, b.b)
    assert all(not a.b.any() and a.a.any() for a in kept.adapters[0]), "before the first update B is zero"
    moved = [float((kept.adapters[i + 1][0].b - kept.adapters[i][0].b).norm()) for i in range(5)]
    assert all(m > 0 for m in moved)
    assert kept.at(0.45) is kept.adapters[2] and kept.at(1.0) is kept.adapters[-1]
    assert read_steps(without, SPACING) is None and read_steps(with_steps, Spacing(points=10)) is None, "steps that were not kept are not made up"


def test_a_run_that_was_killed_ends_with_the_same_steps(tmp_path: Path) -> None:
    whole = trained(tmp_path / "a")

    def stop(p: Progress) -> None:
        if p.step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "b", on_progress=stop, checkpoint_every=3)
    again = trained(tmp_path / "b", checkpoint_every=3)
    for file in (*(f"{STEPS}/{kept_name(s)}" for s in SPACING.of(10)), "adapter_model.safetensors"):
        assert file_sha256(whole / file) == file_sha256(again / file), file
    assert not list((again / STEPS).glob(".*"))


def test_a_full_fine_tune_keeps_none_and_a_damaged_step_is_said(tmp_path: Path) -> None:
    assert not (trained(tmp_path / "f", recipe="full") / STEPS).exists()
    folder = trained(tmp_path / "a")
    (folder / STEPS / kept_name(4)).write_bytes(b"x")
    with pytest.raises(ModelError, match="a kept step cannot be read"):
        read_steps(folder, SPACING)
