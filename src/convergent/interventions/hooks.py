"""The reference lowering: forward hooks, with one condition per row of a batch.

This is the only module that registers hooks for interventions. A batch may mix conditions: `Rows.index` says which condition each
row belongs to, and every hook looks up what to add and what to project out for that row. A row without an operation at
a site gets zero vectors there, and h + 0 - (h . 0) 0 is h to the bit, so neighbours are untouched. An adapter (`LowRank`) is
computed for its own rows alone, at its linear layer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from convergent.core.interventions import Ablate, AblateSubspace, Add, Intervention, LowRank
from convergent.errors import DirectionError, ModelError
from convergent.models.anatomy import Anatomy, stream, with_stream


@dataclass(eq=False)
class _Slot:
    """One step of the interventions at one site, for all conditions at once."""

    add: Tensor | None
    """(n_conditions, d_model) or None if no condition adds here."""
    unit: Tensor | None
    """(n_conditions, d_model) unit vectors, zero where nothing is projected, or None."""
    strength: Tensor | None
    """(n_conditions, 1)."""
    bases: tuple[tuple[int, Tensor], ...] = ()
    """(condition, (k, d_model) orthonormal rows): each at its own width, so that a row does not depend on other conditions' bases."""

    def apply(self, h: Tensor, index: Tensor) -> Tensor:
        """h (rows, n_tokens, d_model), float32 or wider; index (rows,)."""
        if self.add is not None:
            h = h + self.add[index][:, None].to(h.dtype)
        if self.unit is not None and self.strength is not None:
            v = self.unit[index][:, None].to(h.dtype)
            # A sum of products per row, not a batched matmul: its rounding must not depend on the number of rows.
            along = (h * v).sum(-1, keepdim=True)
            h = h - self.strength[index][:, None].to(h.dtype) * along * v
        for condition, basis in self.bases:
            h = _changed(h, index == condition, partial(_without, basis=basis.to(h.dtype)), h)
        return h


def _changed(y: Tensor, mine: Tensor, change: Callable[..., Tensor], *given: Tensor) -> Tensor:
    """y (rows, n_tokens, ...), in the rows that `mine` says, (rows,) or one for all, replaced by `change` of these rows of `given`.

    A GPU computes it for all rows and chooses: to learn which they are, the host would wait for it.
    """
    if y.device.type != "cpu":
        return torch.where(mine[:, None, None], change(*given), y)
    rows = mine.expand(len(y))
    if bool(rows.any()):
        y = y.clone()
        y[rows] = change(*(x[rows] for x in given))
    return y


def _without(h: Tensor, basis: Tensor) -> Tensor:
    """h (rows, n_tokens, d_model) without its components in basis (k, d_model)."""
    if h.shape[1] > 1:
        return h - (h @ basis.T) @ basis
    # Decoding: again no matmul over rows, whose number changes.
    return h - ((h * basis).sum(-1, keepdim=True) * basis).sum(1, keepdim=True)


def _adapted(y: Tensor, h: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """y + B A h for h (rows, n_tokens, n_in), a (rank, n_in), b (n_out, rank)."""
    if h.shape[1] > 1:
        return y + (h @ a.T) @ b.T
    # Decoding: again no matmul over rows, whose number changes.
    inner = (h * a).sum(-1)[:, None]
    return y + (inner * b).sum(-1)[:, None]


class Rows:
    """Interventions in force, with the condition of each row of the next forward pass; every thread has its own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._first = torch.zeros(1, dtype=torch.long, device=device)
        self._mine = threading.local()

    @property
    def index(self) -> Tensor:
        """(rows,) condition of each row; a single entry serves all rows."""
        found: Tensor = getattr(self._mine, "index", self._first)
        return found

    def set(self, conditions: Sequence[int] | Tensor) -> None:
        """Say which condition each row of this thread's next forward passes belongs to."""
        self._mine.index = torch.as_tensor(conditions, dtype=torch.long, device=self.device)


@contextmanager
def applied_rows(anatomy: Anatomy, conditions: Sequence[Sequence[Intervention]]) -> Iterator[Rows]:
    """Run the body with one tuple of interventions per condition; set `Rows.index` before each forward pass.

    The model is as before afterwards, also if a registration fails. Raises DirectionError if a direction does not fit the model, ModelError if an
    adapter does not.
    """
    rows = Rows(next(anatomy.embedding.parameters()).device)
    for interventions in conditions:
        for intervention in interventions:
            check_fits(intervention, anatomy)
    with ExitStack() as stack:
        # Adapters first: they belong to the weights, and a linear layer may itself be the write that others act on.
        for linear, adapters in _adapters(anatomy, conditions, rows.device):
            stack.callback(linear.register_forward_hook(_adapter_hook(adapters, rows)).remove)
        for module, slots in _lower(anatomy, conditions, rows.device):
            stack.callback(module.register_forward_hook(_hook(slots, rows)).remove)
        yield rows


@contextmanager
def applied(anatomy: Anatomy, interventions: Sequence[Intervention]) -> Iterator[None]:
    """Run the body with the same interventions on every row."""
    with applied_rows(anatomy, [interventions]):
        yield


def check_fits(intervention: Intervention, anatomy: Anatomy) -> None:
    """Raise DirectionError if a direction belongs to a model of another shape, ModelError if an adapter does."""
    if isinstance(intervention, LowRank):
        linear = linear_of(intervention, anatomy)
        shape, needs = (linear.out_features, linear.in_features), (len(intervention.b), intervention.a.shape[1])
        if shape != needs:
            raise ModelError(
                f"adapter at block {intervention.layer} {intervention.module}: made for a weight of shape {needs}, the model's is {shape}: "
                "it was trained on another base; train one on this model"
            )
        return
    if isinstance(intervention, AblateSubspace):
        if intervention.basis.shape[1] != anatomy.d_model:
            raise DirectionError(f"subspace has d_model {intervention.basis.shape[1]}, the model {anatomy.d_model}; build it for this model")
        if any(not 0 <= layer < anatomy.n_layers for layer in intervention.layers or ()):
            raise DirectionError(f"subspace: layers {intervention.layers}, but the model has layers 0 to {anatomy.n_layers - 1}")
        return
    d = intervention.direction
    if (d.n_layers, d.d_model) != (anatomy.n_layers, anatomy.d_model):
        raise DirectionError(
            f"direction has shape ({d.n_layers}, {d.d_model}), the model ({anatomy.n_layers}, {anatomy.d_model}): "
            "it was extracted from another base; extract one from this model"
        )


def linear_of(adapter: LowRank, anatomy: Anatomy) -> nn.Linear:
    """The linear layer that an adapter changes. Raises ModelError if the model has none of that name."""
    place = f"adapter at block {adapter.layer} {adapter.module}"
    if adapter.layer >= anatomy.n_layers:
        raise ModelError(f"{place}: the model has blocks 0 to {anatomy.n_layers - 1}; train an adapter on this model")
    found = dict(anatomy.blocks[adapter.layer].named_modules())
    linear = found.get(adapter.module)
    if not isinstance(linear, nn.Linear):
        known = ", ".join(n for n, m in found.items() if isinstance(m, nn.Linear)) or "none"
        raise ModelError(f"{place}: the block has no linear layer of that name; it has {known}")
    return linear


_Adapters: TypeAlias = list[tuple[int, Tensor, Tensor]]
"""(condition, A, scale * B), in order."""


def _adapter_hook(adapters: _Adapters, rows: Rows) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        # In bfloat16 a small write would be rounded before it is added.
        wide = torch.promote_types(output.dtype, torch.float32)
        h, y = args[0].to(wide), output.to(wide)
        if h.ndim != 3:
            raise ModelError(f"an adapter's linear layer was given {tuple(h.shape)}, not (rows, tokens, features); interventions are not defined on experts")
        for condition, a, b in adapters:
            y = _changed(y, rows.index == condition, partial(_adapted, a=a.to(wide), b=b.to(wide)), y, h)
        return y.to(output.dtype)

    return hook


def _adapters(anatomy: Anatomy, conditions: Sequence[Sequence[Intervention]], device: torch.device) -> Iterator[tuple[nn.Linear, _Adapters]]:
    """Every linear layer that some condition changes, and by what."""
    found: dict[nn.Linear, _Adapters] = {}
    for i, interventions in enumerate(conditions):
        for one in interventions:
            if isinstance(one, LowRank):
                found.setdefault(linear_of(one, anatomy), []).append((i, one.a.to(device), (one.scale * one.b).to(device)))
    yield from found.items()


def _hook(slots: list[_Slot], rows: Rows) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        before = stream(output)
        # In bfloat16 the unit vector is not one, and a projection would leave a hundredth of what it removes.
        h = before.to(torch.promote_types(before.dtype, torch.float32))
        for slot in slots:
            h = slot.apply(h, rows.index)
        return with_stream(output, h.to(before.dtype))

    return hook


def sites(anatomy: Anatomy) -> dict[str, tuple[nn.Module, int]]:
    """Every place an intervention can act: name -> (module, layer whose vector applies)."""
    places: dict[str, tuple[nn.Module, int]] = {"embed": (anatomy.embedding, 0)}
    for layer in range(anatomy.n_layers):
        places[f"attention.{layer}"] = (anatomy.attention_writes[layer], layer)
        places[f"mlp.{layer}"] = (anatomy.mlp_writes[layer], layer)
        places[f"block.{layer}"] = (anatomy.blocks[layer], layer)
    return places


def acts_at(intervention: Intervention, site: str, layer: int) -> bool:
    """Whether an intervention does something at a site."""
    kind = site.partition(".")[0]
    if isinstance(intervention, LowRank):
        return False  # inside a block, at a layer of its own
    if isinstance(intervention, Add):
        return kind == "block" and intervention.layer == layer
    if intervention.site == "block_output":
        return kind == "block" and intervention.covers(layer)
    return (kind == "embed" and intervention.layers is None) or (kind in ("attention", "mlp") and intervention.covers(layer))


def n_clean(interventions: Sequence[Intervention], anatomy: Anatomy) -> int:
    """How many blocks from the first on compute, before anything is done to their output, what they compute in the clean model."""
    adapted = min((one.layer for one in interventions if isinstance(one, LowRank)), default=anatomy.n_layers)
    for site, (_, layer) in sites(anatomy).items():
        if any(acts_at(one, site, layer) for one in interventions):
            kind = site.partition(".")[0]
            return min(adapted, {"embed": 0, "block": layer + 1}.get(kind, layer))
    return adapted


def _lower(
    anatomy: Anatomy, conditions: Sequence[Sequence[Intervention]], device: torch.device
) -> Iterator[tuple[nn.Module, list[_Slot]]]:
    depth = max((len(c) for c in conditions), default=0)
    for site, (module, layer) in sites(anatomy).items():
        slots = [
            slot
            for k in range(depth)
            if (slot := _slot([c[k] if k < len(c) else None for c in conditions], site, layer, anatomy.d_model, device))
        ]
        if slots:
            yield module, slots


def _slot(
    steps: Sequence[Intervention | None], site: str, layer: int, d_model: int, device: torch.device
) -> _Slot | None:
    active = [s if s is not None and acts_at(s, site, layer) else None for s in steps]
    adds, ablations = any(isinstance(s, Add) for s in active), any(isinstance(s, Ablate) for s in active)
    bases = tuple((i, s.basis.to(device)) for i, s in enumerate(active) if isinstance(s, AblateSubspace))
    if not adds and not ablations and not bases:
        return None
    zero = torch.zeros(d_model)
    add = torch.stack([s.vector if isinstance(s, Add) else zero for s in active]) if adds else None
    unit = torch.stack([s.unit_at(layer) if isinstance(s, Ablate) else zero for s in active]) if ablations else None
    strength = torch.tensor([[s.strength if isinstance(s, Ablate) else 0.0] for s in active]) if ablations else None
    add, unit, strength = (None if t is None else t.to(device) for t in (add, unit, strength))
    return _Slot(add, unit, strength, bases)
