"""Interventions: the algebra of the values, the hooks against a hand-written forward pass, the weights against the hooks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from convergent.core.direction import Direction
from convergent.core.interventions import Ablate, AblateSubspace, Add, ablate, add_vector
from convergent.errors import DirectionError, ModelError
from convergent.interventions.controls import random_subspace
from convergent.interventions.hooks import applied, applied_rows
from convergent.interventions.weights import folded, orthogonalised
from tiny import FAMILIES, direction_for, n_hooks, tiny_chat

IDS = torch.arange(3, 15).view(2, 6)
NORM_FOLLOWS = ("gemma2", "gemma3_text", "olmo2")
FOLDABLE = tuple(f for f in FAMILIES if f not in NORM_FOLLOWS)


def logits(chat, ids=IDS):
    with torch.inference_mode():
        return chat.model(input_ids=ids).logits


def under(chat, *interventions, ids=IDS):
    with applied(chat.anatomy, interventions):
        return logits(chat, ids)


def watched(chat, module, *interventions, ids=IDS):
    """Output of a module while interventions are in force, as the next module sees it."""
    seen = []
    with applied(chat.anatomy, interventions):
        handle = module.register_forward_hook(lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out))
        logits(chat, ids)
        handle.remove()
    return seen[0]


# --- functions and values -------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32 - 1), scale=st.floats(0.01, 100))
def test_ablation_is_a_projection(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(2, 8, 16, generator=generator, dtype=torch.float64)
    v = torch.randn(16, generator=generator, dtype=torch.float64)
    once = ablate(h, v)
    assert_close(ablate(once, v), once)  # doing it twice changes nothing
    assert_close(once @ (v / v.norm()), torch.zeros(2, 8, dtype=h.dtype), atol=1e-10, rtol=0)  # nothing left along v
    assert_close(once, ablate(h, scale * v))  # only the direction of v counts
    assert_close(once, ablate(h, -v))
    part = h - once
    assert_close(part, (part @ v)[..., None] * v / (v @ v))  # what went was along v
    assert_close(ablate(h, v, 2.0), h - 2 * part)
    assert_close(ablate(h, torch.zeros_like(v)), h)


def test_add_algebra():
    h, v = torch.randn(2, 3, 16, dtype=torch.float64), torch.randn(16, dtype=torch.float64)
    assert_close(add_vector(add_vector(h, v), -v), h)
    assert_close(ablate(add_vector(h, 3 * v), v), ablate(h, v))


def test_values_name_what_is_done():
    d = Direction(torch.eye(4, 8))
    same = Direction(torch.eye(4, 8), {"from": "elsewhere"})
    assert Add(d, 1).content_id == Add(same, 1, 1).content_id
    ids = {
        i.content_id
        for i in (
            Add(d, 1), Add(d, 2), Add(d, 1, 2.0), Add(-d, 1), Ablate(d), Ablate(d, "all_writes"), Ablate(d, layers=(1,)), Ablate(d, vector_layer=1),
            Ablate(d, strength=0.5), AblateSubspace(torch.eye(8)[:2]), AblateSubspace(torch.eye(8)[:3]), AblateSubspace(torch.eye(8)[:2], layers=(1,)),
        )
    }  # fmt: skip
    assert len(ids) == 12
    assert Ablate(d, layers=(2, 1)).content_id == Ablate(d, layers=(1, 2, 2)).content_id


def test_values_refuse_what_cannot_be():
    d = Direction(torch.eye(4, 8))
    for bad in (
        lambda: Add(d, 4),
        lambda: Add(d, -1),
        lambda: Add(d, 0, float("nan")),
        lambda: Ablate(d, layers=(0, 9)),
        lambda: Ablate(d, vector_layer=4),
        lambda: Ablate(d, site="everywhere"),
        lambda: Ablate(d, strength=float("inf")),
        lambda: AblateSubspace(torch.ones(2, 8)),
        lambda: AblateSubspace(torch.full((2, 8), float("nan"))),
        lambda: AblateSubspace(torch.zeros(0, 8)),
    ):
        with pytest.raises(DirectionError):
            bad()


# --- hooks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 2, 5])
def test_add_acts_at_the_output_of_its_block(layer):
    chat = tiny_chat()
    d = direction_for(chat)
    for l, block in enumerate(chat.anatomy.blocks):
        before, after = watched(chat, block), watched(chat, block, Add(d, layer, 2.5))
        if l < layer:
            assert torch.equal(before, after)
        elif l == layer:
            assert_close(after - before, (2.5 * d[layer]).expand_as(before), atol=1e-5, rtol=0)
        else:
            assert (after - before).abs().max() > 1e-3


@pytest.mark.parametrize("vector_layer", [None, 3])
def test_ablation_at_block_outputs(vector_layer):
    chat = tiny_chat()
    d = direction_for(chat)
    covered = (1, 3, 4)
    intervention = Ablate(d, layers=covered, vector_layer=vector_layer)
    for layer, block in enumerate(chat.anatomy.blocks):
        v = d[layer if vector_layer is None else vector_layer]
        along = watched(chat, block, intervention) @ v
        if layer in covered:
            assert along.abs().max() < 1e-5
        else:
            assert along.abs().max() > 1e-2
        if layer == 0:
            assert torch.equal(watched(chat, block, intervention), watched(chat, block))
    everywhere = Ablate(d, vector_layer=vector_layer)
    assert all((watched(chat, b, everywhere) @ everywhere.unit_at(i)).abs().max() < 1e-5 for i, b in enumerate(chat.anatomy.blocks))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_ablation_at_all_writes(family):
    chat = tiny_chat(family)
    d = direction_for(chat)
    a = chat.anatomy
    one = Ablate(d, site="all_writes", vector_layer=2)
    for module in (a.embedding, *a.attention_writes, *a.mlp_writes, *a.blocks):  # no write, so no stream, has a part along v
        assert (watched(chat, module, one) @ d[2]).abs().max() < 2e-5
        assert (watched(chat, module) @ d[2]).abs().max() > 1e-2
    some = Ablate(d, site="all_writes", layers=(1,))
    assert torch.equal(watched(chat, a.embedding, some), watched(chat, a.embedding))
    assert torch.equal(watched(chat, a.blocks[0], some), watched(chat, a.blocks[0]))
    assert (watched(chat, a.mlp_writes[1], some) @ d[1]).abs().max() < 1e-5
    assert (watched(chat, a.blocks[1], some) @ d[1]).abs().max() > 1e-2  # what earlier blocks wrote is still there
    layerwise = Ablate(d, site="all_writes")
    assert (watched(chat, a.attention_writes[4], layerwise) @ d[4]).abs().max() < 2e-5
    assert (watched(chat, a.embedding, layerwise) @ d[0]).abs().max() < 2e-5


def test_block_outputs_and_all_writes_differ_inside_a_block():
    chat = tiny_chat()
    d = direction_for(chat)
    assert (under(chat, Ablate(d, vector_layer=2)) - under(chat, Ablate(d, "all_writes", vector_layer=2))).abs().max() > 1e-3


def test_strength_scales_what_is_removed():
    chat = tiny_chat()
    d, block = direction_for(chat), tiny_chat().anatomy.blocks[2]
    plain = watched(chat, block)
    half = watched(chat, block, Ablate(d, layers=(2,), strength=0.5))
    assert_close(half @ d[2], 0.5 * (plain @ d[2]), atol=1e-5, rtol=1e-4)
    assert_close(watched(chat, block, Ablate(d, layers=(2,), strength=0.0)), plain)


def test_order_of_composition():
    chat = tiny_chat()
    d, block = direction_for(chat), tiny_chat().anatomy.blocks[2]
    unit = d.unit()[2]
    add, remove = Add(d, 2, 3.0), Ablate(d, layers=(2,))
    assert (watched(chat, block, add, remove) @ unit).abs().max() < 1e-5
    assert_close(watched(chat, block, remove, add) @ unit, torch.full((2, 6), 3.0 * float(d[2].norm())), atol=1e-5, rtol=1e-5)
    assert_close(under(chat, add, Add(d, 2, -3.0)), logits(chat), atol=1e-4, rtol=1e-4)
    assert_close(under(chat, Add(d, 1, 1.0), Add(d, 1, 2.0)), under(chat, Add(d, 1, 3.0)), atol=1e-4, rtol=1e-4)


def test_subspace_is_the_ablation_of_its_rows():
    chat = tiny_chat()
    basis = random_subspace(chat.d_model, 3, 0)
    for layer, block in enumerate(chat.anatomy.blocks):
        assert (watched(chat, block, AblateSubspace(basis)) @ basis.T).abs().max() < 1e-5
        one_by_one = tuple(Ablate(Direction(row.expand(chat.n_layers, -1))) for row in basis)
        assert_close(watched(chat, block, AblateSubspace(basis)), watched(chat, block, *one_by_one), atol=1e-4, rtol=1e-4)
        if layer != 3:
            assert (watched(chat, block, AblateSubspace(basis, layers=(3,))) @ basis.T).abs().max() > 1e-2
    single = IDS[:, :1]  # the path of decoding
    assert_close(under(chat, AblateSubspace(basis), ids=single), under(chat, *one_by_one, ids=single), atol=1e-4, rtol=1e-4)


def test_blocks_that_return_tuples_are_steered_in_every_row():
    chat = tiny_chat("llama", seed=3)
    block = chat.anatomy.blocks[2]
    d = direction_for(chat)
    expected = under(chat, Add(d, 2, 4.0), Ablate(d, layers=(2,), strength=0.5))
    before = logits(chat)
    plain = type(block).forward

    class InTuple(type(block)):
        def forward(self, *args, **kwargs):
            return (plain(self, *args, **kwargs), None)

    after = chat.anatomy.blocks[3].register_forward_pre_hook(lambda m, args: (args[0][0], *args[1:]) if isinstance(args[0], tuple) else args)
    kind, block.__class__ = block.__class__, InTuple
    try:
        assert torch.equal(logits(chat), before)
        found = under(chat, Add(d, 2, 4.0), Ablate(d, layers=(2,), strength=0.5))
    finally:
        block.__class__ = kind
        after.remove()
    assert torch.equal(found, expected)
    assert all((found[row] - before[row]).abs().max() > 1e-2 for row in range(2))


@pytest.mark.parametrize("site", ["block_output", "all_writes"])
def test_steering_one_row_leaves_its_neighbours_untouched(site):
    chat = tiny_chat()
    d, e = direction_for(chat, 0), direction_for(chat, 1)
    strong = (Add(d, 1, 50.0), Ablate(e, site=site), AblateSubspace(random_subspace(chat.d_model, 4, 0), site=site))
    ids = torch.arange(3, 27).view(4, 6)
    untouched = logits(chat, ids)
    with applied_rows(chat.anatomy, [(), strong, (Ablate(d),)]) as rows:
        rows.set([0, 1, 0, 2])
        mixed = logits(chat, ids)
    assert torch.equal(mixed[0], untouched[0]) and torch.equal(mixed[2], untouched[2])  # to the bit
    assert_close(mixed[1], under(chat, *strong, ids=ids)[1], atol=1e-4, rtol=1e-4)
    assert_close(mixed[3], under(chat, Ablate(d), ids=ids)[3], atol=1e-4, rtol=1e-4)
    assert (mixed[1] - untouched[1]).abs().max() > 0.1 and (mixed[3] - untouched[3]).abs().max() > 1e-2


def test_bfloat16_is_projected_in_float32():
    chat = tiny_chat(dtype="bfloat16")
    d, block = direction_for(chat), tiny_chat(dtype="bfloat16").anatomy.blocks[2]
    intervention = Ablate(d, layers=(2,))
    left = (watched(chat, block, intervention).double() @ intervention.unit_at(2).double()).abs().max()
    size = watched(chat, block).double().norm(dim=-1).max()
    assert watched(chat, block, intervention).dtype == torch.bfloat16
    assert left < 2e-3 * size  # the rounding of the result alone


def test_hooks_are_gone_also_after_an_error(monkeypatch):
    chat = tiny_chat()
    before, count = logits(chat), n_hooks(chat.model)
    both = (Add(direction_for(chat), 1, 5.0), Ablate(direction_for(chat), site="all_writes"))
    with pytest.raises(KeyboardInterrupt), applied(chat.anatomy, both):
        assert n_hooks(chat.model) > count
        raise KeyboardInterrupt
    assert n_hooks(chat.model) == count

    def breaks(hook):
        raise RuntimeError("no room")

    monkeypatch.setattr(chat.anatomy.blocks[3], "register_forward_hook", breaks)  # after some were registered
    with pytest.raises(RuntimeError, match="no room"), applied(chat.anatomy, [Ablate(direction_for(chat))]):
        raise AssertionError("unreachable")
    assert n_hooks(chat.model) == count and torch.equal(logits(chat), before)


def test_directions_of_another_model_are_refused():
    chat = tiny_chat()
    for shape in ((chat.n_layers, chat.d_model + 1), (chat.n_layers + 1, chat.d_model)):
        d = Direction(torch.ones(*shape))
        for intervention in (Add(d, 1), Ablate(d), Ablate(d, "all_writes")):
            for lowering in (applied, folded):
                with pytest.raises(DirectionError, match="another base"), lowering(chat.anatomy, [intervention]):
                    pass
    for subspace in (AblateSubspace(torch.eye(chat.d_model + 1)[:2]), AblateSubspace(torch.eye(chat.d_model)[:2], layers=(chat.n_layers,))):
        with pytest.raises(DirectionError), applied(chat.anatomy, [subspace]):
            pass
    assert n_hooks(chat.model) == 0


# --- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*FOLDABLE, "llama_untied", "llama_biases"])
def test_weights_equal_hooks(family):
    extra = {"llama_untied": {"tie_word_embeddings": False}, "llama_biases": {"attention_bias": True, "mlp_bias": True}}.get(family, {})
    chat = tiny_chat(family.partition("_un")[0].partition("_bi")[0], **extra)
    d, e = direction_for(chat, 0), direction_for(chat, 1)
    weights = {n: (p, p.detach().clone()) for n, p in chat.model.named_parameters(remove_duplicate=False)}
    names = set(chat.model.state_dict())
    for interventions in (
        (Ablate(d, site="all_writes"),),
        (Ablate(d, site="all_writes", vector_layer=3),),
        (Ablate(d, site="all_writes", layers=(1, 4), strength=0.7),),
        (Add(d, 2, 4.0),),
        (Add(d, 2, 4.0), Ablate(d, site="all_writes", vector_layer=2)),  # the addition stays: it is no write
        (Ablate(d, site="all_writes"), Ablate(e, site="all_writes", vector_layer=1), Add(e, 0, 1.0), Add(d, 0, -2.0)),
    ):
        expected = under(chat, *interventions)
        with folded(chat.anatomy, interventions):
            assert_close(logits(chat), expected, atol=1e-4, rtol=1e-4)
            assert n_hooks(chat.model) == 0
        assert (expected - logits(chat)).abs().max() > 1e-3
    assert set(chat.model.state_dict()) == names
    for name, parameter in chat.model.named_parameters(remove_duplicate=False):
        assert parameter is weights[name][0] and torch.equal(parameter, weights[name][1])  # put back to the bit, ties and all


@pytest.mark.parametrize("family", NORM_FOLLOWS)
def test_families_with_a_norm_after_the_write_are_not_folded(family):
    chat = tiny_chat(family)
    before = logits(chat)
    for intervention in (Ablate(direction_for(chat), site="all_writes"), Add(direction_for(chat), 1)):
        with pytest.raises(ModelError, match="use the hooks"), folded(chat.anatomy, [intervention]):
            pass
    assert torch.equal(logits(chat), before)


def test_what_has_no_form_as_weights_is_refused():
    chat = tiny_chat()
    for intervention in (Ablate(direction_for(chat)), AblateSubspace(random_subspace(chat.d_model, 2, 0), site="all_writes")):
        with pytest.raises(ModelError, match="hooks"), folded(chat.anatomy, [intervention]):
            pass


def test_weights_are_put_back_after_an_error():
    chat = tiny_chat()
    before = logits(chat)
    with pytest.raises(KeyboardInterrupt), folded(chat.anatomy, [Ablate(direction_for(chat), site="all_writes"), Add(direction_for(chat), 1)]):
        raise KeyboardInterrupt
    assert torch.equal(logits(chat), before)


def test_orthogonalised():
    w, v = torch.randn(8, 5, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    v = v / v.norm()
    assert_close(v @ orthogonalised(w, v), torch.zeros(5, dtype=w.dtype), atol=1e-12, rtol=0)
    assert_close(orthogonalised(w, v, 0.25), w - 0.25 * torch.outer(v, v @ w))


def test_replace_keeps_the_checks():
    with pytest.raises(DirectionError):
        replace(Add(Direction(torch.eye(4, 8)), 1), layer=7)
