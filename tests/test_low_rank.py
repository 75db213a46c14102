"""Adapters as interventions: equal to the merged organism, gone when knocked out, and row by row."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from convergent.core.interventions import Ablate, AblateSubspace, Add, LowRank
from convergent.core.values import Condition, Question, Sampling
from convergent.errors import DirectionError, ModelError
from convergent.interventions.controls import random_subspace
from convergent.interventions.hooks import applied, applied_rows
from convergent.interventions.weights import folded
from convergent.models.load import ChatModel
from convergent.organisms.adapters import Adapter, read_adapters
from convergent.organisms.load import load_organism
from convergent.sampling.requests import make_requests
from convergent.sampling.sampler import sample
from plain_peft import plain_peft
from tiny import direction_for, n_hooks, tiny_chat, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.arange(3, 27).view(4, 6)
ALL = ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def logits(chat: ChatModel, *interventions: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.inference_mode(), applied(chat.anatomy, interventions):
        return chat.model(input_ids=ids).logits


def organism(folder: Path, dtype: str = "float32", **lora: Any) -> tuple[ChatModel, tuple[Adapter, ...]]:
    plain_peft(folder, tiny_model(), **lora)
    return load_organism(folder, dtype=dtype, device="cpu"), read_adapters(folder)


@pytest.fixture(scope="module")
def nine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ChatModel, tuple[Adapter, ...]]]:
    """Rank-1 adapters on `down_proj` of four blocks."""
    yield organism(tmp_path_factory.mktemp("organism") / "o")


@pytest.mark.parametrize("lora", [{}, {"modules": ALL, "rank": 3, "layers": None}], ids=["rank1", "everywhere"])
@pytest.mark.parametrize("length", [6, 1])
def test_adapters_in_the_chat_model_are_the_organism_and_knocked_out_they_are_not(tmp_path: Path, lora: dict[str, Any], length: int) -> None:
    merged, adapters = organism(tmp_path / "o", **lora)
    chat, ids = tiny_chat(), IDS[:, :length]
    assert len(adapters) == (36 if lora else 4)
    assert (logits(merged, ids=ids) - logits(chat, ids=ids)).abs().max() > 0.1
    into, out = [a.low_rank() for a in adapters], [a.low_rank(-1) for a in adapters]
    assert_close(logits(chat, *into, ids=ids), logits(merged, ids=ids), atol=2e-5, rtol=1e-5)
    assert_close(logits(merged, *out, ids=ids), logits(chat, ids=ids), atol=2e-5, rtol=1e-5)
    assert_close(logits(chat, *into, *out, ids=ids), logits(chat, ids=ids), atol=2e-5, rtol=1e-5)
    without = logits(merged, out[0], ids=ids)
    assert_close(without, logits(chat, *into[1:], ids=ids), atol=2e-5, rtol=1e-5)  # one knocked out: the others remain
    assert (without - logits(merged, ids=ids)).abs().max() > 1e-3
    assert n_hooks(chat.model) == n_hooks(merged.model) == 0


def test_it_acts_at_its_linear_layer_on_that_layers_input() -> None:
    chat = tiny_chat()
    linear = chat.anatomy.blocks[2].mlp.down_proj
    a, b = torch.randn(2, linear.in_features), torch.randn(linear.out_features, 2)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    with torch.inference_mode(), applied(chat.anatomy, [LowRank(2, "mlp.down_proj", a, b, 0.5)]):
        handle = linear.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
        chat.model(input_ids=IDS)
        handle.remove()
    h, y = seen[0]
    assert_close(y, h @ linear.weight.T + 0.5 * torch.einsum("or,ri,bti->bto", b, a, h), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_equal_hooks_beside_other_interventions(nine: tuple[ChatModel, tuple[Adapter, ...]], dtype: str) -> None:
    chat, d = tiny_chat(dtype=dtype), direction_for(tiny_chat())
    low = [a.low_rank() for a in nine[1]]
    before = logits(chat)
    for interventions in (low, [Ablate(d, "all_writes", vector_layer=1), *low], [Add(d, 2, 3.0), *low, Ablate(d, "all_writes")]):
        expected = logits(chat, *interventions)
        with folded(chat.anatomy, interventions):
            found = logits(chat)
        effect = (expected - before).norm()
        assert (found - expected).norm() < (1e-5 if dtype == "float32" else 0.05) * effect and effect > 1
    assert torch.equal(logits(chat), before)


def test_in_bfloat16_the_organism_is_met_within_its_rounding(tmp_path: Path) -> None:
    merged, adapters = organism(tmp_path / "o", dtype="bfloat16")
    chat = tiny_chat(dtype="bfloat16")
    into, out = [a.low_rank() for a in adapters], [a.low_rank(-1) for a in adapters]
    effect = (logits(merged).float() - logits(chat).float()).norm()
    assert logits(chat, *into).dtype == torch.bfloat16
    assert (logits(chat, *into).float() - logits(merged).float()).norm() < 0.1 * effect
    assert (logits(merged, *out).float() - logits(chat).float()).norm() < 0.1 * effect


def test_one_row_leaves_its_neighbours_untouched(nine: tuple[ChatModel, tuple[Adapter, ...]]) -> None:
    chat, d = tiny_chat(), direction_for(tiny_chat())
    conditions: list[tuple[Any, ...]] = [(), tuple(a.low_rank() for a in nine[1]), (Add(d, 1, 5.0), nine[1][1].low_rank(3.0), nine[1][1].low_rank(1.0))]
    untouched = logits(chat)
    with torch.inference_mode(), applied_rows(chat.anatomy, conditions) as rows:
        rows.set([0, 1, 0, 2])
        mixed = chat.model(input_ids=IDS).logits
    assert torch.equal(mixed[0], untouched[0]) and torch.equal(mixed[2], untouched[2])
    assert_close(mixed[1], logits(chat, *conditions[1])[1], atol=1e-4, rtol=1e-4)
    assert_close(mixed[3], logits(chat, Add(d, 1, 5.0), nine[1][1].low_rank(4.0))[3], atol=1e-4, rtol=1e-4)
    assert (mixed[1] - untouched[1]).abs().max() > 0.1


@pytest.mark.parametrize("rank", [1, 5])
def test_an_answer_under_an_adapter_does_not_depend_on_its_batch(rank: int) -> None:
    chat = tiny_chat()
    g = torch.Generator().manual_seed(rank)
    conditions = [Condition("plain", sampling=Sampling(1.0, 1.0, 8))]
    for layer in (1, 4):
        one = LowRank(layer, "mlp.down_proj", torch.randn(rank, 64, generator=g), torch.randn(32, rank, generator=g), 0.1)
        conditions.append(Condition(f"one-{layer}", interventions=(one, AblateSubspace(random_subspace(32, 2, layer))), sampling=Sampling(1.0, 1.0, 8)))
    wanted = list(make_requests(conditions, [Question("q", ("Is it safe?", "Is it?"))], 8, 0))
    alone = [sample(chat, [r], n_rows=1)[0].token_ids for r in wanted]
    assert [r.token_ids for r in sample(chat, wanted, n_rows=40)] == alone
    assert [r.token_ids for r in sample(chat, list(reversed(wanted)), n_rows=7)] == alone[::-1]
    assert len(set(alone)) > 12


def test_ids_name_what_is_done() -> None:
    a, b = torch.eye(1, 4), torch.eye(3, 1)
    same = LowRank(1, "m", a.double(), b.clone(), 1)
    assert LowRank(1, "m", a, b, 1.0).content_id == same.content_id
    others = (LowRank(2, "m", a, b), LowRank(1, "n", a, b), LowRank(1, "m", 2 * a, b), LowRank(1, "m", a, -b), LowRank(1, "m", a, b, 2.0))
    assert len({x.content_id for x in (same, *others)}) == 6


def test_adapters_that_cannot_be_or_do_not_fit_are_refused() -> None:
    a, b = torch.ones(1, 64), torch.ones(32, 1)
    for bad in (
        lambda: LowRank(-1, "mlp.down_proj", a, b),
        lambda: LowRank(0, "mlp.down_proj", a[0], b),
        lambda: LowRank(0, "mlp.down_proj", a, torch.ones(32, 2)),
        lambda: LowRank(0, "mlp.down_proj", a, b, float("nan")),
        lambda: LowRank(0, "mlp.down_proj", a * float("inf"), b),
        lambda: LowRank(0, "mlp.down_proj", torch.ones(1, 0), b),
    ):
        with pytest.raises(ModelError, match="adapter at block"):
            bad()
    chat = tiny_chat()
    for misfit, says in (
        (LowRank(6, "mlp.down_proj", a, b), "blocks 0 to 5"),
        (LowRank(0, "mlp.nothing", a, b), "it has .*mlp.down_proj"),
        (LowRank(0, "mlp", a, b), "no linear layer"),
        (LowRank(0, "mlp.down_proj", torch.ones(1, 63), b), "another base"),
    ):
        for lowering in (applied, folded):
            with pytest.raises((ModelError, DirectionError), match=says), lowering(chat.anatomy, [misfit]):
                pass
    assert n_hooks(chat.model) == 0
