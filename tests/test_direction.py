"""`Direction`: algebra, files, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.testing import assert_close

from convergent.core.direction import Direction
from convergent.core.ids import bytes_id, content_id
from convergent.core.values import Condition, Sampling
from convergent.errors import DirectionError


def some(seed: int = 0, n_layers: int = 3, d_model: int = 8) -> Direction:
    return Direction(torch.randn(n_layers, d_model, generator=torch.Generator().manual_seed(seed)), {"kind": "test", "seed": seed})


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), scale=st.floats(-10, 10))
def test_algebra(seed, scale):
    a, b = some(seed), some(seed + 1)
    assert_close((a + b).vectors, a.vectors + b.vectors)
    assert_close((a - b).vectors, a.vectors - b.vectors)
    assert_close((-a).vectors, -a.vectors)
    assert_close((scale * a).vectors, (a * scale).vectors)
    assert_close((a * scale).vectors, a.vectors * scale)
    assert_close((a - a).norms, torch.zeros(3))
    assert_close(a.unit().norms, torch.ones(3))
    assert_close(a.cosine(a), torch.ones(3, dtype=torch.float64))
    assert_close(a.cosine(-a), -torch.ones(3, dtype=torch.float64))
    assert_close(a.cosine(b), a.unit().cosine(3.0 * b), atol=1e-6, rtol=0)
    assert_close(a.cosine(b), torch.cosine_similarity(a.vectors.double(), b.vectors.double(), dim=1))


def test_provenance_follows_the_algebra():
    a, b = some(0), some(1)
    assert (a - b).provenance["sum"] == [dict(a.provenance), {"negated": dict(b.provenance)}]
    assert (2 * a).provenance == {"scaled": {"kind": "test", "seed": 0}, "by": 2.0}


def test_rows_norms_and_shares():
    d = Direction(torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 0.0]]))
    assert_close(d.norms, torch.tensor([5.0, 0.0]))
    assert_close(d.unit().vectors, torch.tensor([[0.6, 0.8, 0.0], [0.0, 0.0, 0.0]]))
    assert_close(d.top_share(1)[0], torch.tensor(16 / 25, dtype=torch.float64))
    assert d.top_share(99)[0] == 1
    assert torch.isnan(d.cosine(d)[1])
    assert torch.equal(d[0], d.vectors[0])
    for layer in (-1, 2):
        with pytest.raises(DirectionError, match="layers 0 to 1"):
            d[layer]


def test_geometry_of_long_vectors_is_exact():
    d = Direction(torch.full((1, 100_000), 1e-3))
    assert float(d.norms[0]) == pytest.approx(1e-3 * math.sqrt(1e5), rel=1e-7)


def test_vectors_are_float32_on_the_cpu_and_named_by_content():
    v = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    d = Direction(v)
    assert d.vectors.dtype == torch.float32 and not d.vectors.requires_grad
    assert Direction(v, {"other": "history"}).content_id == d.content_id != Direction(2 * v).content_id
    assert Direction(torch.ones(2, 6)).content_id != Direction(torch.ones(3, 4)).content_id
    assert d.content_id == content_id(bytes_id(d.vectors.numpy().tobytes()), [2, 4])


@pytest.mark.parametrize(
    "vectors", [torch.ones(4), torch.ones(2, 3, 4), torch.ones(0, 4), torch.tensor([[1.0, math.nan]]), torch.tensor([[1.0, math.inf]])]
)
def test_what_is_no_direction(vectors):
    with pytest.raises(DirectionError):
        Direction(vectors)


def test_shapes_must_agree():
    for operation in (Direction.__add__, Direction.__sub__, Direction.cosine):
        with pytest.raises(DirectionError, match="one model"):
            operation(some(), some(n_layers=4))


def test_safetensors_round_trip(tmp_path):
    d = some()
    d.save(tmp_path / "new" / "d.safetensors")
    back = Direction.load(tmp_path / "new" / "d.safetensors")
    assert torch.equal(back.vectors, d.vectors) and back.provenance == dict(d.provenance) and back.content_id == d.content_id
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["d.safetensors"]  # nothing half written beside it


def test_a_foreign_file_with_one_tensor_loads(tmp_path):
    save_file({"v": torch.ones(2, 4, dtype=torch.bfloat16)}, tmp_path / "v.safetensors")
    assert torch.equal(Direction.load(tmp_path / "v.safetensors").vectors, torch.ones(2, 4))


def test_files_that_are_refused(tmp_path):
    text, several, flat, broken = (tmp_path / f"{n}.safetensors" for n in ("text", "several", "flat", "broken"))
    text.write_text("not a tensor")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    save_file({"a": torch.ones(2, 4), "b": torch.ones(2, 4)}, several)
    save_file({"direction": torch.ones(4)}, flat)
    save_file({"direction": torch.tensor([[math.nan]])}, tmp_path / "nan.safetensors")
    some().save(broken)
    broken.write_bytes(broken.read_bytes()[:-7])
    for name, finding in (
        ("missing", "no such file"), ("text", "not a safetensors"), ("empty", "not a safetensors"), ("several", "'a', 'b'"),
        ("flat", r"\(n_layers, d_model\), got \(4,\)"), ("nan", "not finite"), ("broken", "not a safetensors"),
    ):  # fmt: skip
        with pytest.raises(DirectionError, match=finding) as caught:
            Direction.load(tmp_path / f"{name}.safetensors")
        assert str(caught.value).count(str(tmp_path)) == 1 and "\n" not in str(caught.value)
    with pytest.raises(DirectionError):
        Direction.load(tmp_path)


def test_gguf_holds_the_rows_that_llama_cpp_can_use(tmp_path):
    import gguf

    d = some(n_layers=5)
    d.save_gguf(tmp_path / "d.gguf", "llama")
    reader = gguf.GGUFReader(str(tmp_path / "d.gguf"))
    fields = {name: reader.fields[name] for name in ("general.architecture", "controlvector.model_hint", "controlvector.layer_count")}
    assert fields["general.architecture"].contents() == "controlvector"
    assert fields["controlvector.model_hint"].contents() == "llama"
    assert fields["controlvector.layer_count"].contents() == 4
    assert [t.name for t in reader.tensors] == [f"direction.{layer}" for layer in range(1, 5)]
    for tensor in reader.tensors:
        layer = int(tensor.name.rpartition(".")[2])
        assert tensor.data.dtype == np.float32 and np.array_equal(tensor.data, d[layer].numpy())
    assert [p.name for p in tmp_path.iterdir()] == ["d.gguf"]


def test_content_ids_of_conditions():
    one, same = Condition("a", "x", "w1", sampling=Sampling(1)), Condition("b", "y", "w1", sampling=Sampling(1.0))
    assert one.content_id == same.content_id != Condition("a", "x", "w2", sampling=Sampling(1)).content_id
    assert content_id({"a": 1, "b": [2, {3}]}) == content_id({"b": (2, frozenset([3])), "a": 1}) != content_id({"a": 1})
    with pytest.raises(TypeError):
        content_id(object())
