"""Base models from folders: what loads, what it is called, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from convergent.errors import DownloadError, InputError, ModelError
from convergent.models.dtype import resolve_dtype
from convergent.models.load import base_folder, folder_id, load_base
from tiny import tiny_model


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(tiny_model(), tmp_path / "base")


def test_loads_for_inference(folder):
    chat = load_base(str(folder), dtype="float32", device="cpu", name="tiny")
    assert (chat.name, chat.base, chat.n_layers, chat.d_model, chat.device) == ("tiny", str(folder), 6, 32, torch.device("cpu"))
    assert not chat.model.training and not any(p.requires_grad for p in chat.model.parameters())
    assert chat.content_id == folder_id(folder)
    assert next(load_base(str(folder), dtype="bfloat16", device="cpu").model.parameters()).dtype == torch.bfloat16


def test_a_folder_is_named_by_its_content(folder, tmp_path):
    before = folder_id(folder)
    shutil.copytree(folder, tmp_path / "moved")
    (folder / "notes.txt").write_text("not part of the model")
    assert folder_id(tmp_path / "moved") == before == folder_id(folder)
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    assert folder_id(folder) != before


@pytest.mark.parametrize("damage", ["no weights", "cut weights", "other shapes", "broken config", "unknown type", "no tokenizer", "no template"])
def test_damaged_folders_are_refused_in_one_line(folder, damage):
    config = folder / "config.json"
    settings = json.loads(config.read_text())
    weights = folder / "model.safetensors"
    if damage == "no weights":
        weights.unlink()
    elif damage == "cut weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "other shapes":
        config.write_text(json.dumps({**settings, "intermediate_size": 48}))
    elif damage == "broken config":
        config.write_text("{")
    elif damage == "unknown type":
        config.write_text(json.dumps({**settings, "model_type": "nonesuch", "architectures": ["Nonesuch"]}))
    elif damage == "no tokenizer":
        for file in folder.glob("tok*"):
            file.unlink()
    else:
        for file in folder.glob("*.jinja"):
            file.unlink()
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "chat_template"}))
    with pytest.raises(ModelError) as caught:
        load_base(str(folder), dtype="float32", device="cpu")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_names_that_are_no_base(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="no config.json"):
        base_folder(str(tmp_path))
    for name in (str(tmp_path / "missing"), "./missing", "a/b/c"):
        with pytest.raises(ModelError, match="no such model folder"):
            base_folder(name)
    with pytest.raises(DownloadError, match="cannot be downloaded"):
        base_folder("nobody/no-such-model-here")


def test_settings_that_are_refused(folder):
    with pytest.raises(InputError, match="float16"):
        resolve_dtype("float16")
    assert resolve_dtype("bfloat16") == torch.bfloat16 and resolve_dtype("float32") == torch.float32
    with pytest.raises(ModelError, match="device"):
        load_base(str(folder), dtype="float32", device="nonesuch")


def test_a_converted_base_is_known_by_what_it_was_made_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other versions of the libraries convert to other bytes; a study goes on all the same, and folders of two machines merge."""
    monkeypatch.setenv("CONVERGENT_CACHE", str(tmp_path / "cache"))
    ids = []
    for name, source in (("one", "{1}"), ("same", "{1}"), ("other", "{2}")):
        folder = tmp_path / "cache" / "models" / name
        shutil.copytree(tiny_model(), folder)
        (folder / "tokenizer_config.json").write_text(name)
        (folder / "source.json").write_text(source)
        ids.append(folder_id(folder))
    assert ids[0] == ids[1] != ids[2]
    shutil.copytree(tmp_path / "cache" / "models" / "one", tmp_path / "copy")
    assert folder_id(tmp_path / "copy") != ids[0]  # a copy is a folder like any other


def test_who_wrote_a_config_is_no_part_of_its_id(tmp_path: Path) -> None:
    """A base converted anew by another version of transformers is the same base: studies keep their rows."""
    shutil.copytree(tiny_model(), tmp_path / "again")
    config = tmp_path / "again" / "config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps({**settings, "transformers_version": "99.0", "_name_or_path": "elsewhere"}))
    assert folder_id(tmp_path / "again") == folder_id(tiny_model())
    config.write_text(json.dumps({**settings, "hidden_act": "gelu"}))
    assert folder_id(tmp_path / "again") != folder_id(tiny_model())
