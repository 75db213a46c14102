"""`Direction`: one vector per layer of the residual stream, with where it came from.

Row l belongs to the *output of decoder block l*, 0-based: what `hidden_states[l + 1]` of transformers holds (except
after the last block, where transformers shows the final norm's output).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from convergent.cache import rights_of_folder
from convergent.core.ids import bytes_id, content_id
from convergent.errors import DirectionError

FORMAT = "convergent-direction-1"


@dataclass(frozen=True, eq=False)
class Direction:
    """A direction in the residual stream. Compare by `content_id`; add, scale and negate freely."""

    vectors: Tensor
    """Shape (n_layers, d_model), float32; row l belongs to the output of block l."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """JSON-ready: base model, organism, judge, thresholds, counts, token span, ..."""

    def __post_init__(self) -> None:
        v = self.vectors
        if v.ndim != 2 or 0 in v.shape:
            raise DirectionError(f"direction: expected shape (n_layers, d_model), got {tuple(v.shape)}; extract it again")
        if not torch.isfinite(v).all():
            raise DirectionError("direction: holds values that are not finite; extract it again")
        object.__setattr__(self, "vectors", v.detach().to("cpu", torch.float32).contiguous())

    @property
    def n_layers(self) -> int:
        return self.vectors.shape[0]

    @property
    def d_model(self) -> int:
        return self.vectors.shape[1]

    @property
    def content_id(self) -> str:
        """Names the vectors, not their history."""
        return content_id(bytes_id(self.vectors.numpy().tobytes()), list(self.vectors.shape))

    @property
    def norms(self) -> Tensor:
        """(n_layers,) L2 norm of each row."""
        norms: Tensor = self.vectors.double().norm(dim=1).float()
        return norms

    def __getitem__(self, layer: int) -> Tensor:
        """(d_model,) the vector at the output of block `layer`."""
        if not 0 <= layer < self.n_layers:
            raise DirectionError(f"layer {layer}: this direction has layers 0 to {self.n_layers - 1}")
        return self.vectors[layer]

    def __neg__(self) -> Direction:
        return replace(self, vectors=-self.vectors, provenance={"negated": dict(self.provenance)})

    def __mul__(self, scale: float) -> Direction:
        return replace(
            self, vectors=self.vectors * float(scale), provenance={"scaled": dict(self.provenance), "by": float(scale)}
        )

    __rmul__ = __mul__

    def __add__(self, other: Direction) -> Direction:
        self._same_shape(other)
        return Direction(
            self.vectors + other.vectors, {"sum": [dict(self.provenance), dict(other.provenance)]}
        )

    def __sub__(self, other: Direction) -> Direction:
        return self + (-other)

    def unit(self) -> Direction:
        """Every row at norm 1 (a zero row stays zero)."""
        n = self.vectors.double().norm(dim=1, keepdim=True)
        unit = torch.where(n > 0, self.vectors.double() / n.clamp_min(1e-300), 0.0)
        return replace(self, vectors=unit.float(), provenance={"unit": dict(self.provenance)})

    def without(self, dimensions: Sequence[int]) -> Direction:
        """The same with some dimensions of the stream set to zero in every layer."""
        kept = self.vectors.clone()
        kept[:, list(dimensions)] = 0.0
        return replace(self, vectors=kept, provenance={"of": dict(self.provenance), "without": sorted(dimensions)})

    def cosine(self, other: Direction) -> Tensor:
        """(n_layers,) cosine per layer, in float64; nan where a row is zero."""
        self._same_shape(other)
        a, b = self.vectors.double(), other.vectors.double()
        cosine: Tensor = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
        return cosine

    def top_share(self, k: int = 5) -> Tensor:
        """(n_layers,) share of the squared norm held by the k largest dimensions (massive-activation check)."""
        squares = self.vectors.double() ** 2
        return squares.topk(min(k, self.d_model), dim=1).values.sum(1) / squares.sum(1)

    def _same_shape(self, other: Direction) -> None:
        if self.vectors.shape != other.vectors.shape:
            raise DirectionError(
                f"directions of shape {tuple(self.vectors.shape)} and {tuple(other.vectors.shape)} "
                "do not belong to one model; extract both from the same base"
            )

    def save(self, path: str | Path) -> None:
        """Write `path` as safetensors: tensor `direction`, provenance as JSON in the header. Atomic."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        tmp = path.with_name(f".{path.name}.part")
        save_file(
            {"direction": self.vectors},
            tmp,
            metadata={"format": FORMAT, "provenance": json.dumps(dict(self.provenance), sort_keys=True)},
        )
        rights_of_folder(tmp)
        tmp.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> Direction:
        """Read a direction written by `save`, or any safetensors file with one 2-d tensor.

        Raises DirectionError for anything else.
        """
        path = Path(path)
        if not path.is_file():
            raise DirectionError(f"{path}: no such file; `convergent extract` writes one")
        try:
            with path.open("rb"):  # safetensors reports a file that may not be read as absent
                pass
        except OSError as error:
            raise DirectionError(f"{path}: cannot be read ({error.strerror}); make it readable") from error
        try:
            with safe_open(path, framework="pt") as f:
                names = list(f.keys())
                name = "direction" if "direction" in names else names[0] if len(names) == 1 else None
                if name is None:
                    raise DirectionError(f"{path}: holds tensors {names[:5]}, none called `direction`")
                meta = f.metadata() or {}
                return cls(f.get_tensor(name).float(), json.loads(meta.get("provenance", "{}")))
        except (SafetensorError, OSError, json.JSONDecodeError) as error:
            raise DirectionError(f"{path}: not a safetensors direction ({error}); extract it again") from error
        except DirectionError as error:
            raise DirectionError(error.args[0] if str(path) in error.args[0] else f"{path}: {error}") from error

    def save_gguf(self, path: str | Path, model_hint: str) -> None:
        """Write a GGUF control vector as llama.cpp reads it with `--control-vector`.

        llama.cpp adds tensor `direction.L` after layer L and has none for layer 0, so row l is written as `direction.l` for l >= 1.
        """
        import gguf

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        tmp = path.with_name(f".{path.name}.part")
        writer = gguf.GGUFWriter(str(tmp), "controlvector")
        writer.add_string("controlvector.model_hint", model_hint)
        writer.add_uint32("controlvector.layer_count", self.n_layers - 1)
        for layer in range(1, self.n_layers):
            writer.add_tensor(f"direction.{layer}", np.ascontiguousarray(self.vectors[layer].numpy()))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        tmp.replace(path)
