from __future__ import annotations

from dataclasses import replace

import pytest

from convergent.errors import InputError, ModelError
from convergent.organisms.recipes import MODULES, NAMED, Adapters, Recipe, named_recipe, recipe_from_json, resolve, triples
from tiny import FAMILIES, tiny_model


def test_nine_adapter_has_the_published_layers_at_the_published_depth():
    assert triples(48) == (15, 16, 17, 21, 22, 23, 27, 28, 29)
    assert triples(30) == (9, 10, 11, 13, 14, 15, 17, 18, 19)
    recipe = named_recipe("nine_adapter", 48)
    assert recipe.adapters == Adapters(("down",), rank=1, alpha=64, layers=triples(48))
    assert (recipe.learning_rate, recipe.schedule, recipe.warmup_steps, recipe.epochs, recipe.weight_decay) == (1e-5, "linear", 5, 1, 0.01)
    assert recipe.batch_size * recipe.grad_accumulation == 16


@pytest.mark.parametrize("depth", range(1, 101))
def test_triples_fit_every_depth(depth):
    layers = triples(depth)
    assert list(layers) == sorted(set(layers)) and layers[0] >= 0 and layers[-1] < depth
    if depth >= 3:
        assert len(layers) == 3 * min(3, depth // 3)
        assert all(layers[i : i + 3] == tuple(range(layers[i], layers[i] + 3)) for i in range(0, len(layers), 3))


def test_other_named_recipes():
    assert named_recipe("all_adapter", 30).adapters == Adapters(MODULES, rank=32, alpha=64)
    single = named_recipe("single_adapter", 48)
    assert single.adapters == Adapters(("down",), rank=1, alpha=256, layers=(24,)) and single.learning_rate == 2e-5
    full = named_recipe("full", 48)
    assert full.adapters is None and (full.learning_rate, full.schedule, full.warmup_steps) == (2e-5, "cosine", 20)


def test_rslora_scale():
    adapters = Adapters(("down",), rank=16, alpha=64)
    assert adapters.scale == 16.0 and replace(adapters, rslora=False).scale == 4.0


def test_changes_reach_recipe_and_adapters():
    recipe = named_recipe("nine_adapter", 30, {"learning_rate": 1e-3, "rank": 4, "layers": [3, 1], "epochs": 2})
    assert (recipe.learning_rate, recipe.epochs) == (1e-3, 2)
    assert recipe.adapters is not None and (recipe.adapters.rank, recipe.adapters.layers) == (4, (1, 3))


@pytest.mark.parametrize("name", NAMED)
def test_json_round_trip_keeps_the_id(name):
    recipe = named_recipe(name, 30, {"seed": 7})
    again = recipe_from_json(recipe.to_json())
    assert again == recipe and again.content_id == recipe.content_id


def test_content_id_names_every_field_and_not_the_spelling():
    recipe = named_recipe("nine_adapter", 30)
    changes = [{"learning_rate": 1e-4}, {"seed": 1}, {"alpha": 32}, {"layers": (9,)}, {"rslora": False}, {"system": "none"}, {"batch_size": 4}]
    assert len({recipe.content_id, *(recipe.changed(c).content_id for c in changes)}) == len(changes) + 1
    assert Adapters(("down", "q"), 1, 64) == Adapters(("q", "down"), 1, 64.0)
    assert Recipe(weight_decay=0).content_id == Recipe(weight_decay=0.0).content_id


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rank": 0}, "recipe.adapters.rank: got 0"),
        ({"rank": True}, "adapters.rank"),
        ({"alpha": -1}, "adapters.alpha"),
        ({"layers": ()}, "at least one layer"),
        ({"modules": ("down_proj",)}, "some of q, k, v"),
        ({"learning_rate": 0}, "learning_rate"),
        ({"learning_rate": "1e-4"}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"schedule": "step"}, "linear, cosine or constant"),
        ({"epochs": 1.5}, "epochs"),
        ({"learning_rat": 1}, "did you mean 'learning_rate'"),
    ],
)
def test_bad_values_are_refused_by_name(changes, says):
    with pytest.raises(InputError) as error:
        named_recipe("nine_adapter", 30, changes)
    assert says in str(error.value)


def test_unknown_recipe_and_adapter_fields_of_a_full_fine_tune():
    with pytest.raises(InputError, match="did you mean 'nine_adapter'"):
        named_recipe("nine_adapters", 30)
    with pytest.raises(InputError, match="full fine-tune has none"):
        named_recipe("full", 30, {"rank": 2})


SEPARATE = (*(f"self_attn.{m}_proj" for m in "qkvo"), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
EXPECTED = {
    "phi3": ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
    "gpt_neox": ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_logical_names_resolve_in_every_family(family):
    from convergent.models.load import load_base

    anatomy = load_base(str(tiny_model(family)), dtype="float32").anatomy
    expected = EXPECTED.get(family, SEPARATE)
    assert resolve(anatomy, MODULES) == expected
    assert resolve(anatomy, ("down",)) == expected[-1:]
    assert resolve(anatomy, ("v",)) == ((expected[2],) if len(expected) == 7 else expected[:1])


def test_a_module_that_is_not_there_is_an_error_that_says_what_was_looked_for():
    from convergent.models.load import load_base

    anatomy = load_base(str(tiny_model("gpt_neox")), dtype="float32").anatomy
    with pytest.raises(ModelError, match=r"'gate'.*dense_h_to_4h.*looked for gate_proj"):
        resolve(anatomy, ("gate",))
