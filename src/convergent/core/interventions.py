"""Interventions as values: they say *what* is done to the residual stream; a lowering says *how*.

    Add     x' = x + scale * v_layer              at the output of one block, all positions   (paper section 3.2)
    Ablate  x' = x - strength * v^ v^T x          at block outputs, or at every write         (paper section 3.4, Arditi et al.)
    AblateSubspace  x' = x - B^T B x              the same for k directions at once
    LowRank y' = y + scale * B (A h)              at one linear layer of a block: an adapter as a value  (paper section 4)

They compose left to right in a tuple. Lowerings: `convergent.interventions.hooks` and `.weights`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from convergent.core.direction import Direction
from convergent.core.ids import bytes_id, content_id
from convergent.errors import DirectionError, ModelError

Site = Literal["block_output", "all_writes"]


@dataclass(frozen=True, eq=False)
class Add:
    """Add `scale` times the direction's own vector at the output of block `layer`, at every position."""

    direction: Direction
    layer: int
    scale: float = 1.0
    """The steering coefficient lambda: a multiple of the raw, not the unit, vector."""

    def __post_init__(self) -> None:
        self.direction[self.layer]
        if not math.isfinite(self.scale):
            raise DirectionError(f"steering coefficient {self.scale}: give a finite number")

    @property
    def content_id(self) -> str:
        return content_id("add", self.direction.content_id, self.layer, float(self.scale))

    @property
    def vector(self) -> Tensor:
        """(d_model,) float32: what is added."""
        return self.direction[self.layer] * self.scale


@dataclass(frozen=True, eq=False)
class Ablate:
    """Project a direction out of the residual stream at every position."""

    direction: Direction
    site: Site = "block_output"
    """block_output: after each block, as the paper does. all_writes: from the embedding and from each attention and MLP
    output, as Arditi et al. do; equal to orthogonalising those weights. The two differ inside a block."""
    layers: tuple[int, ...] | None = None
    """Blocks whose output (or writes) are projected; None is all, with the embedding for all_writes."""
    vector_layer: int | None = None
    """None: each layer its own vector ("layer-wise"). An int: that layer's vector everywhere ("single")."""
    strength: float = 1.0
    """1 is the projection; other values exist for effect-matched controls."""

    def __post_init__(self) -> None:
        if self.site not in ("block_output", "all_writes"):
            raise DirectionError(f"ablation site {self.site!r} is not block_output or all_writes")
        for layer in (*(self.layers or ()), *([] if self.vector_layer is None else [self.vector_layer])):
            self.direction[layer]
        if not math.isfinite(self.strength):
            raise DirectionError(f"ablation strength {self.strength}: give a finite number")

    @property
    def content_id(self) -> str:
        layers = None if self.layers is None else sorted(set(self.layers))
        return content_id(
            "ablate", self.direction.content_id, self.site, layers, self.vector_layer, float(self.strength)
        )

    def unit_at(self, layer: int) -> Tensor:
        """(d_model,) float32 unit vector removed at `layer` (the embedding counts as layer 0); zero if the row is zero."""
        v = self.direction[self.vector_layer if self.vector_layer is not None else layer].double()
        n = v.norm()
        return (v / n if n > 0 else torch.zeros_like(v)).float()

    def covers(self, layer: int) -> bool:
        """Whether block `layer` is among the projected ones."""
        return self.layers is None or layer in self.layers


@dataclass(frozen=True, eq=False)
class AblateSubspace:
    """Project a subspace, the same at every layer, out of the residual stream at every position.

    The effect-matched null of an ablation: a single random direction cannot be made to matter more by scaling (repeated at every layer,
    a strength above 2 explodes), but more of them can.
    """

    basis: Tensor
    """Shape (k, d_model), float32, orthonormal rows."""
    site: Site = "block_output"
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        b = self.basis.detach().to("cpu", torch.float32).contiguous()
        if b.ndim != 2 or not len(b) or not (b.double() @ b.double().T - torch.eye(len(b), dtype=torch.float64)).abs().max() <= 1e-4:
            raise DirectionError(f"subspace: the basis must be (k, d_model) with orthonormal rows, got shape {tuple(b.shape)}")
        object.__setattr__(self, "basis", b)

    @property
    def content_id(self) -> str:
        layers = None if self.layers is None else sorted(set(self.layers))
        return content_id("subspace", bytes_id(self.basis.numpy().tobytes()), list(self.basis.shape), self.site, layers)

    def covers(self, layer: int) -> bool:
        """Whether block `layer` is among the projected ones."""
        return self.layers is None or layer in self.layers


@dataclass(frozen=True, eq=False)
class LowRank:
    """Add `scale` * B A to the weight of one linear layer: y' = y + scale * B (A h), h its input and y its output, at every position.

    An organism's adapter in the chat model makes that part of the organism; with the opposite sign in the organism, whose weights hold it
    already, it knocks that adapter out. It changes a weight, so in a tuple it comes before whatever acts on that layer's output.
    """

    layer: int
    """Block, 0-based."""
    module: str
    """Name of the linear layer inside the block, as `mlp.down_proj`."""
    a: Tensor
    """(rank, n_in) float32."""
    b: Tensor
    """(n_out, rank) float32."""
    scale: float = 1.0

    def __post_init__(self) -> None:
        a, b = (t.detach().to("cpu", torch.float32).contiguous() for t in (self.a, self.b))
        place = f"adapter at block {self.layer} {self.module}"
        if self.layer < 0:
            raise ModelError(f"{place}: blocks count from 0; give one of the model's")
        if a.ndim != 2 or b.ndim != 2 or 0 in (*a.shape, *b.shape) or len(a) != b.shape[1]:
            raise ModelError(f"{place}: A must be (rank, n_in) and B (n_out, rank), got {tuple(a.shape)} and {tuple(b.shape)}; read the adapter again")
        if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()) or not math.isfinite(self.scale):
            raise ModelError(f"{place}: A, B and the scale ({self.scale}) must be finite; train the adapter again")
        object.__setattr__(self, "a", a)
        object.__setattr__(self, "b", b)

    @property
    def content_id(self) -> str:
        tensors = [(bytes_id(t.numpy().tobytes()), list(t.shape)) for t in (self.a, self.b)]
        return content_id("lowrank", self.layer, self.module, tensors, float(self.scale))


Intervention: TypeAlias = Add | Ablate | AblateSubspace | LowRank


def add_vector(h: Tensor, v: Tensor) -> Tensor:
    """h (..., d_model) plus v (d_model,)."""
    return h + v


def ablate(h: Tensor, v: Tensor, strength: float = 1.0) -> Tensor:
    """h (..., d_model) without `strength` times its component along v (d_model,); a zero v removes nothing."""
    v = v / v.norm().clamp_min(torch.finfo(v.dtype).tiny)
    return h - strength * (h @ v)[..., None] * v
