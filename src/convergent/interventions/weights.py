"""Lowering to weights: an intervention that runs at no cost in any engine.

    Ablate(site="all_writes")  ->  W' = (I - s v^ v^T) W  for the embedding and for every weight that writes to the stream
    Add                        ->  a bias on the MLP's writing weight of that block
    LowRank                    ->  W' = W + scale B A  for the linear layer it names
    Ablate(site="block_output") has no such form: a block's output also holds what earlier blocks wrote.

Equal to the hooks within float error (tested). Only for families whose writes are linear layers; where a norm follows the
linear layer (Gemma 2 and 3, OLMo 2) the error says so and the hooks remain.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from convergent.core.interventions import Ablate, AblateSubspace, Add, Intervention, LowRank
from convergent.errors import ModelError
from convergent.interventions.hooks import check_fits, linear_of
from convergent.models.anatomy import Anatomy


@contextmanager
def folded(anatomy: Anatomy, interventions: Sequence[Intervention]) -> Iterator[None]:
    """Run the body with `interventions` folded into the weights; the weights are put back, to the bit, afterwards.

    Raises ModelError if one of them cannot be folded here.
    """
    for intervention in interventions:
        check_fits(intervention, anatomy)
    with ExitStack() as stack:
        # Adapters first, as they are part of the weight that is projected. Additions last: they act at block outputs, which no ablation of
        # writes touches, so their bias must not be projected.
        for intervention in sorted(interventions, key=lambda i: isinstance(i, Add) - isinstance(i, LowRank)):
            if isinstance(intervention, LowRank):
                linear = linear_of(intervention, anatomy)
                weight, a, b = linear.weight.double(), intervention.a.to(linear.weight.device), intervention.b.to(linear.weight.device)
                _replace(stack, linear, "weight", (weight + intervention.scale * (b.double() @ a.double())).to(linear.weight.dtype))
            elif isinstance(intervention, Add):
                _add_bias(stack, anatomy, intervention)
            elif isinstance(intervention, AblateSubspace):
                raise ModelError("a subspace is not folded into weights; use the hooks")
            elif intervention.site == "all_writes":
                _orthogonalise(stack, anatomy, intervention)
            else:
                raise ModelError("an ablation at block_output cannot be folded into weights; use site all_writes, or hooks")
        yield


def orthogonalised(weight: Tensor, v: Tensor, strength: float = 1.0) -> Tensor:
    """(I - strength v v^T) W for W (d_model, n_in) and a unit vector v (d_model,), computed in float64."""
    w, u = weight.double(), v.double().to(weight.device)
    return (w - strength * torch.outer(u, u @ w)).to(weight.dtype)


def _orthogonalise(stack: ExitStack, anatomy: Anatomy, ablation: Ablate) -> None:
    if ablation.layers is None:
        # A tied head keeps the weight it has: it reads the stream, it does not write to it.
        embedding = _weight(anatomy.embedding)
        _replace(stack, anatomy.embedding, "weight", orthogonalised(embedding.T, ablation.unit_at(0), ablation.strength).T)
    for layer in range(anatomy.n_layers):
        if not ablation.covers(layer):
            continue
        v = ablation.unit_at(layer)
        for linear in _linears(anatomy, layer):
            _replace(stack, linear, "weight", orthogonalised(linear.weight, v, ablation.strength))
            if linear.bias is not None:
                _replace(stack, linear, "bias", orthogonalised(linear.bias[:, None], v, ablation.strength)[:, 0])


def _add_bias(stack: ExitStack, anatomy: Anatomy, add: Add) -> None:
    linear = _linears(anatomy, add.layer)[1]
    vector = add.vector.to(linear.weight)
    _replace(stack, linear, "bias", vector if linear.bias is None else linear.bias + vector)


def _linears(anatomy: Anatomy, layer: int) -> tuple[nn.Linear, nn.Linear]:
    found = []
    places = (
        (anatomy.attention_writes[layer], anatomy.attention_linears[layer]),
        (anatomy.mlp_writes[layer], anatomy.mlp_linears[layer]),
    )
    for write, linear in places:
        if linear is None:
            raise ModelError(
                f"block {layer}: what {type(write).__name__} writes to the stream is not the output of a linear layer (a norm follows it), so the "
                "intervention cannot be folded into a weight; use the hooks"
            )
        found.append(linear)
    return found[0], found[1]


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _replace(stack: ExitStack, module: nn.Module, name: str, value: Tensor) -> None:
    before = module._parameters[name]
    module._parameters[name] = nn.Parameter(value.contiguous(), requires_grad=False)
    stack.callback(module._parameters.__setitem__, name, before)
