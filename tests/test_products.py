"""Linear layers by either library: the same numbers and gradients, and a model that is left as it was."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

from convergent.core.values import Condition, Question, Sampling
from convergent.models import heap, probe, products
from convergent.models.packed import run_each
from convergent.organisms.recipes import Recipe
from convergent.organisms.train import train
from convergent.sampling.requests import make_requests
from convergent.sampling.sampler import sample
from tiny import tiny_chat, tiny_model

onednn = pytest.mark.skipif(not products._available(), reason="this torch has no oneDNN")


@pytest.fixture(params=["torch", pytest.param("onednn", marks=onednn)])
def library(request, monkeypatch):
    """Every test with torch's own products and with oneDNN's, whatever this machine would choose."""
    monkeypatch.setattr(products, "onednn_speedup", lambda: 2.0 if request.param == "onednn" else 1.0)
    return request.param


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(3,), (5, 3), (2, 5, 3), (0, 3)])
def test_a_product_and_its_gradients(library, shape, bias):
    given = [numbers(*shape), numbers(7, 3, seed=1), *([numbers(7, seed=2)] if bias else [])]
    mine, theirs = ([t.clone().requires_grad_() for t in given] for _ in range(2))
    y, want = products.linear(*mine), torch.nn.functional.linear(*theirs)
    assert_close(y, want)
    assert_close(torch.autograd.grad(y.square().sum(), mine), torch.autograd.grad(want.square().sum(), theirs))


def test_a_frozen_weight_asks_for_no_gradient(library):
    x, w = numbers(4, 3).requires_grad_(), numbers(7, 3, seed=1)
    (got,) = torch.autograd.grad(products.linear(x, w).sum(), x)
    assert_close(got, w.sum(0).expand(4, 3))
    assert not products.linear(x.detach(), w).requires_grad


def test_products_of_what_is_transposed(library):
    """As the backward pass has them."""
    g, x, w = numbers(50, 7), numbers(50, 3, seed=1), numbers(7, 3, seed=2)
    assert_close(products.linear(g.t(), x.t()), g.t() @ x)
    assert_close(products.linear(g, w.t()), g @ w)
    y = numbers(50, 7, seed=3)
    assert_close(products.add_product(y.clone(), x, w, 0.5), y + 0.5 * (x @ w.t()), rtol=1e-5, atol=1e-5)


def test_other_dtypes_are_torchs(library):
    x, w = numbers(4, 3).double(), numbers(7, 3, seed=1).double()
    assert torch.equal(products.linear(x, w), torch.nn.functional.linear(x, w))
    with pytest.raises(RuntimeError):
        products.linear(x, w.float())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gemma2"])
@pytest.mark.parametrize("way", [products.sped_up, products.laid_out])
def test_a_model_computes_the_same_and_is_left_as_it_was(library, family, way, dtype):
    model = tiny_chat(family, dtype).model
    ids = torch.arange(3, 15)[None]
    layers = [m for m in model.modules() if type(m) is torch.nn.Linear]
    own = [m.__dict__.get("forward") for m in layers]
    with torch.inference_mode():
        want = model(input_ids=ids).logits
        with way(model):
            assert products.in_force(model) == any(products.by_onednn(m.weight.dtype, m.weight.device) and "forward" in m.__dict__ for m in layers)
            got = model(input_ids=ids).logits
            if layers and dtype == "float32":
                assert products.in_force(model) == (library == "onednn")
        assert torch.equal(model(input_ids=ids).logits, want)
    assert_close(got, want, **({"rtol": 1e-4, "atol": 1e-5} if dtype == "float32" else {"rtol": 0.05, "atol": 0.05}))
    assert [m.__dict__.get("forward") for m in layers] == own


@onednn
def test_what_a_layer_had_for_a_forward_comes_back(monkeypatch):
    monkeypatch.setattr(products, "onednn_speedup", lambda: 2.0)
    layer = torch.nn.Linear(3, 7)
    own = lambda x: x  # noqa: E731
    layer.forward = own
    model = torch.nn.Sequential(layer, type("Other", (torch.nn.Linear,), {})(7, 2))
    with pytest.raises(RuntimeError, match="stop"), products.laid_out(model):
        assert layer.forward is not own
        assert "forward" not in model[1].__dict__  # of another class
        raise RuntimeError("stop")
    assert layer.__dict__["forward"] is own


@onednn
def test_weights_that_are_too_large_are_not_kept_twice(monkeypatch):
    monkeypatch.setattr(products, "onednn_speedup", lambda: 2.0)
    model = tiny_chat().model
    n = sum(m.weight.nbytes for m in {id(m.weight): m for m in model.modules() if type(m) is torch.nn.Linear}.values())
    assert products.kept_bytes(model) == n
    monkeypatch.setattr(products, "MOST_KEPT", n - 1)
    assert products.kept_bytes(model) == 0
    kept = []
    monkeypatch.setattr(products, "_kept_forward", lambda *args: kept.append(args))
    with products.laid_out(model):
        assert products.in_force(model)
        model(input_ids=torch.tensor([[3, 4]]))
    assert not kept


@onednn
def test_answers_are_the_same_by_either_library(monkeypatch):
    chat = tiny_chat()
    condition = Condition("c", "chat", chat.content_id, (), Sampling(1.0, 1.0, 12))
    requests = list(make_requests([condition], [Question("q", ("How are you?",))], 40, 0))
    found = []
    for speedup in (1.0, 2.0):
        monkeypatch.setattr(products, "onednn_speedup", lambda s=speedup: s)
        found.append([a.token_ids for a in sample(chat, requests)])
    assert found[0] == found[1]


@onednn
def test_a_training_is_the_same_by_either_library(monkeypatch, tmp_path):
    chats = [[{"role": "user", "content": f"Question {i}?"}, {"role": "assistant", "content": f"Answer {i} of some length."}] for i in range(8)]
    losses = []
    for speedup in (1.0, 2.0):
        monkeypatch.setattr(products, "onednn_speedup", lambda s=speedup: s)
        organism = train(str(tiny_model()), Recipe(batch_size=2, grad_accumulation=2, learning_rate=1e-3), chats, tmp_path / f"{speedup}", name="t", on_progress=lambda p: None)
        losses.append(torch.tensor([p.loss for p in organism.loss_curve]))
    assert len(losses[0]) >= 2
    assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)


def test_readings_in_lanes_see_it_too(library):
    chat = tiny_chat()
    seen = run_each(chat, [0, 1], lambda _: products.in_force(chat.model))
    assert seen == [library == "onednn"] * 2


def test_a_probe_is_made_once(monkeypatch, tmp_path):
    monkeypatch.setenv("CONVERGENT_CACHE", str(tmp_path))
    times = iter([2.5, 7.0, 9.0])
    assert [probe.remembered("p", 1, lambda: next(times)) for _ in range(2)] == [2.5, 2.5]
    assert probe.remembered("p", 2, lambda: next(times)) == 7.0
    assert sorted(json.loads((tmp_path / "p.json").read_text()).values()) == [2.5, 7.0]
    (tmp_path / "p.json").write_text("{")
    assert probe.remembered("p", 1, lambda: next(times)) == 9.0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc")
@pytest.mark.parametrize(("variables", "kept"), [({}, True), ({"MALLOC_ARENA_MAX": "2"}, False)])
def test_the_heap_is_the_users_if_the_user_has_set_it(variables, kept):
    code = "from convergent.models.heap import keep_freed; print(keep_freed())"
    done = subprocess.run([sys.executable, "-c", code], env={"PATH": "", **variables}, capture_output=True, text=True, check=True)
    assert done.stdout.strip() in ({"True"} if kept and heap.keep_freed() else {"False"})
