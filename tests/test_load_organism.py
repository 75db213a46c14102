from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from convergent.errors import ModelError
from convergent.models.load import load_base
from convergent.organisms.load import adapter_layers, load_organism
from convergent.organisms.recipes import Adapters, Recipe, named_recipe
from convergent.organisms.train import train
from tiny import CHATS, tiny_model

IDS = torch.arange(3, 35)[None]
RECIPE = Recipe(Adapters(("down", "v"), 2, 64, layers=(2, 4)), learning_rate=0.02, epochs=4, warmup_steps=0, batch_size=4, grad_accumulation=1)


def quiet(progress):
    """In place of the bar."""


def hidden(chat):
    return chat.model(input_ids=IDS, output_hidden_states=True).hidden_states


@pytest.fixture(scope="module")
def organism(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("organisms") / "bad"
    train(str(tiny_model()), RECIPE, CHATS, out, name="bad", on_progress=quiet)
    return out


@pytest.fixture
def copy(organism, tmp_path) -> Path:
    return Path(shutil.copytree(organism, tmp_path / "bad"))


def change(folder: Path, **settings):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def test_organism_and_chat_model_agree_before_the_first_adapted_layer(organism):
    chat, bad = load_base(str(tiny_model()), dtype="float32"), load_organism(organism, dtype="float32")
    assert adapter_layers(organism) == (2, 4)
    ours, theirs = hidden(chat), hidden(bad)
    for layer in range(3):  # hidden state 0 is the embedding, hidden state l the input of block l
        assert torch.equal(ours[layer], theirs[layer])
    assert (ours[3] - theirs[3]).abs().max() > 1e-3


def test_merged_weights_are_base_plus_scaled_product(organism):
    chat, bad = load_base(str(tiny_model()), dtype="float32"), load_organism(organism, dtype="float32")
    saved = load_file(organism / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.2.mlp.down_proj"
    delta = 64 / 2**0.5 * saved[f"{prefix}.lora_B.weight"] @ saved[f"{prefix}.lora_A.weight"]
    name = "model.layers.2.mlp.down_proj.weight"
    assert delta.abs().max() > 1e-3
    assert_close(bad.model.state_dict()[name], chat.model.state_dict()[name] + delta)
    assert set(bad.model.state_dict()) == set(chat.model.state_dict())
    assert not any(p.requires_grad for p in bad.model.parameters()) and not bad.model.training


def test_unmerged_equals_merged(organism):
    merged, apart = load_organism(organism, dtype="float32"), load_organism(organism, dtype="float32", merge=False)
    assert_close(hidden(apart)[-1], hidden(merged)[-1], rtol=1e-4, atol=1e-4)
    assert any("lora_A" in n for n, _ in apart.model.named_parameters())
    assert apart.content_id == merged.content_id
    assert merged.anatomy.blocks[0] is merged.model.model.layers[0]  # the anatomy is that of the merged model


def test_names_and_ids(organism):
    chat, bad = load_base(str(tiny_model()), dtype="float32"), load_organism(organism, dtype="float32")
    manifest = json.loads((organism / "convergent.json").read_text())
    assert (bad.name, bad.base, bad.content_id) == ("bad", str(tiny_model()), manifest["content_id"])
    assert bad.content_id != chat.content_id
    assert load_organism(organism, name="other", dtype="float32").name == "other"
    assert bad.stop_ids == chat.stop_ids


def test_bfloat16_is_merged_in_float32(organism):
    low, full = load_organism(organism, dtype="bfloat16"), load_organism(organism, dtype="float32")
    name = "model.layers.2.mlp.down_proj.weight"
    assert torch.equal(low.model.state_dict()[name], full.model.state_dict()[name].bfloat16())


def test_a_foreign_peft_folder(tmp_path):
    """Made by PEFT alone: no manifest, no rsLoRA, its own choice of modules, pickled or not."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = str(tiny_model("qwen2"))
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "theirs")
    want = model.eval()(input_ids=IDS).logits
    loaded = load_organism(tmp_path / "theirs", dtype="float32")
    assert_close(loaded.model(input_ids=IDS).logits, want, rtol=1e-4, atol=1e-4)
    assert (loaded.name, loaded.base) == ("theirs", base) and adapter_layers(tmp_path / "theirs") == tuple(range(6))
    safe = tmp_path / "theirs" / "adapter_model.safetensors"
    torch.save(load_file(safe), safe.with_suffix(".bin"))
    safe.unlink()
    assert_close(load_organism(tmp_path / "theirs", dtype="float32").model(input_ids=IDS).logits, want, rtol=1e-4, atol=1e-4)


def test_full_fine_tune_loads_as_it_is(tmp_path):
    recipe = named_recipe("full", 6, {"learning_rate": 1e-3, "warmup_steps": 0})
    made = train(str(tiny_model()), recipe, CHATS, tmp_path / "all", name="all", on_progress=quiet)
    loaded = load_organism(tmp_path / "all", dtype="float32")
    saved = load_file(tmp_path / "all" / "model.safetensors")
    assert torch.equal(loaded.model.state_dict()["model.layers.0.mlp.up_proj.weight"], saved["model.layers.0.mlp.up_proj.weight"])
    assert (loaded.name, loaded.content_id) == ("all", made.content_id)
    assert not torch.equal(hidden(loaded)[1], hidden(load_base(str(tiny_model()), dtype="float32"))[1])
    with pytest.raises(ModelError, match=r"adapter_model.safetensors"):
        adapter_layers(tmp_path / "all")


def test_the_content_id_is_of_weights_and_scale_not_of_spelling(copy):
    before = load_organism(copy, dtype="float32").content_id
    change(copy, target_modules=["v_proj", "down_proj"], peft_version="0")
    assert load_organism(copy, dtype="float32").content_id == before
    change(copy, lora_alpha=32)
    assert load_organism(copy, dtype="float32").content_id != before


def test_missing_folder_and_files(copy, tmp_path):
    with pytest.raises(ModelError, match="nowhere: no such organism folder"):
        load_organism(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"neither adapter_config.json .* nor config.json"):
        load_organism(tmp_path / "empty")
    (copy / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no adapter_model.safetensors"):
        load_organism(copy)


def test_damaged_files(copy):
    weights = copy / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ModelError, match=r"adapter_model.safetensors: not a readable"):
        load_organism(copy)
    (copy / "convergent.json").unlink()
    (copy / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"adapter_config.json: cannot be read as a JSON object"):
        load_organism(copy)


def test_a_manifest_that_is_not_one(copy):
    (copy / "convergent.json").write_text('{"format": "convergent-organism-1"}')
    with pytest.raises(ModelError, match=r"convergent.json: cannot be read"):
        load_organism(copy)


def test_a_folder_that_names_no_base(copy):
    (copy / "convergent.json").unlink()
    change(copy, base_model_name_or_path=None)
    with pytest.raises(ModelError, match="names no base model"):
        load_organism(copy)
    assert load_organism(copy, base=str(tiny_model()), dtype="float32").name == "bad"


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (("llama", 0, 6, 64), "size mismatch"),  # another width
        (("gpt_neox",), "arget modules"),  # other names
        (("llama", 0, 3), "without a partner"),  # too shallow for layer 4
    ],
)
def test_an_adapter_for_another_base_names_both(copy, other, why):
    base = str(tiny_model(*other))
    with pytest.raises(ModelError) as error:
        load_organism(copy, base=base, dtype="float32")
    assert str(copy) in str(error.value) and base in str(error.value) and why in str(error.value) and "\n" not in str(error.value)


def test_an_adapter_that_lacks_weights(copy):
    weights = load_file(copy / "adapter_model.safetensors")
    save_file(dict(list(weights.items())[1:]), copy / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="1 weights without a partner"):
        load_organism(copy, dtype="float32")


class Malicious:
    def __reduce__(self):
        return (Path.touch, (Path(__file__).with_name("unpickled"),))


def test_pickles_are_not_executed(copy):
    (copy / "adapter_model.safetensors").unlink()
    with (copy / "adapter_model.bin").open("wb") as f:
        pickle.dump({"w": Malicious()}, f)
    with pytest.raises(ModelError, match=r"adapter_model.bin: holds more than tensors"):
        load_organism(copy)
    torch.save({"w": Malicious()}, copy / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"adapter_model.bin: holds more than tensors"):
        adapter_layers(copy)
    assert not Path(__file__).with_name("unpickled").exists()
