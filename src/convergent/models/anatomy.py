"""Where the residual stream is read and written in a decoder, found by inspecting the module tree.

No file per architecture. The decoder blocks are the `ModuleList` of one class as long as the config says; the *writes* of a block are
the two submodules whose outputs, added to the block's input, give the block's output. That identity is checked by running
each block once, so a family whose names mislead (a `post_attention_layernorm` that in one family follows the attention and
in another precedes the MLP) is read correctly, and one that does not add its writes to a stream is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from convergent.errors import ModelError


@dataclass(frozen=True, eq=False)
class Anatomy:
    """The parts of a decoder that this project touches."""

    body: nn.Module
    """The decoder without its language-model head: token ids -> final hidden states."""
    embedding: nn.Module
    blocks: tuple[nn.Module, ...]
    attention_writes: tuple[nn.Module, ...]
    """Per block, the module whose output is added to the stream for attention."""
    mlp_writes: tuple[nn.Module, ...]
    attention_linears: tuple[nn.Linear | None, ...]
    """Per block, the linear layer whose output is that write, seen to be equal; None where a norm follows it."""
    mlp_linears: tuple[nn.Linear | None, ...]
    final_norm: nn.Module | None
    head: nn.Module | None
    d_model: int

    @property
    def n_layers(self) -> int:
        return len(self.blocks)


def stream(output: Any) -> Tensor:
    """The hidden states (batch, n_tokens, d_model) in a module's output, be it a tensor or a tuple."""
    tensor = output[0] if isinstance(output, tuple) else output
    if not isinstance(tensor, Tensor):
        raise ModelError(f"a block returned {type(output).__name__}, neither a tensor nor a tuple that starts with one")
    return tensor


def with_stream(output: Any, hidden: Tensor) -> Any:
    """`output` with its hidden states replaced, in the container it came in."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def inspect_model(model: nn.Module) -> Anatomy:
    """Find the parts of a decoder-only model. Raises ModelError that says what was looked for.

    Runs one forward pass over four tokens; hooks are gone afterwards.
    """
    name = type(model).__name__
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name}: looked for a decoder alone and found an encoder with one; give a decoder-only chat model")
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    n_layers, d_model = getattr(text, "num_hidden_layers", None), getattr(text, "hidden_size", None)
    if not isinstance(n_layers, int) or not isinstance(d_model, int):
        raise ModelError(f"{name}: looked for num_hidden_layers and hidden_size in its config and did not find both; not a decoder we can read")
    parent, blocks = _find_blocks(model, n_layers)
    if parent is None:
        raise ModelError(
            f"{name}: looked for a ModuleList of {n_layers} blocks of one class (as in model.layers or gpt_neox.layers) and "
            "found none; this architecture is not a plain decoder"
        )
    # Looked up on the object: a module's attributes are Tensor or Module to the type checker.
    find: Any = model
    embedding = find.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if not isinstance(embedding, nn.Module):
        raise ModelError(f"{name}: looked for get_input_embeddings() and found none; load it through transformers")
    head = find.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    attention, mlp = _find_writes(name, parent, blocks, d_model)
    return Anatomy(
        body=parent,
        embedding=embedding,
        blocks=tuple(blocks),
        attention_writes=tuple(write for write, _ in attention),
        mlp_writes=tuple(write for write, _ in mlp),
        attention_linears=tuple(linear for _, linear in attention),
        mlp_linears=tuple(linear for _, linear in mlp),
        final_norm=_final_norm(parent, blocks),
        head=head,
        d_model=d_model,
    )


def _find_blocks(model: nn.Module, n_layers: int) -> tuple[nn.Module | None, list[nn.Module]]:
    """The first ModuleList of `n_layers` modules of one class, and the module that holds it."""
    for module in model.modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) == n_layers and len({type(b) for b in child}) == 1:
                return module, list(child)
    return None, []


def _final_norm(body: nn.Module, blocks: list[nn.Module]) -> nn.Module | None:
    norms = [m for n, m in body.named_children() if "norm" in n.lower() and not isinstance(m, nn.ModuleList)]
    return norms[-1] if norms else None


_Write: TypeAlias = tuple[nn.Module, nn.Linear | None]


@torch.no_grad()
def _find_writes(name: str, body: nn.Module, blocks: list[nn.Module], d_model: int) -> tuple[list[_Write], list[_Write]]:
    """For every block the two submodules with block(x) = x + attention + mlp, outermost first, each with its linear layer."""
    seen: dict[nn.Module, list[Tensor]] = {}
    inputs: dict[nn.Module, Tensor] = {}
    was_training = body.training
    body.eval()
    device = next(body.parameters()).device
    try:
        with ExitStack() as stack:
            for block in blocks:
                for module in block.modules():
                    stack.callback(module.register_forward_hook(_recorder(seen, d_model)).remove)
                stack.callback(block.register_forward_pre_hook(_input_recorder(inputs), with_kwargs=True).remove)
            body(input_ids=torch.arange(1, 5, device=device)[None], use_cache=False)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ModelError(f"{name}: looked for {type(body).__name__}(input_ids=..., use_cache=False), but it failed ({error})") from error
    finally:
        body.train(was_training)
    attention, mlp = [], []
    for index, block in enumerate(blocks):
        pair = _writes_of_block(block, inputs.get(block), seen)
        if pair is None:
            parts = sorted(n for n, _ in block.named_children())
            raise ModelError(
                f"{name}: looked in block {index} ({type(block).__name__} with {', '.join(parts)}) for two submodules whose outputs "
                "add up to what the block adds to the residual stream, and found none; interventions are not defined here"
            )
        attention.append((pair[0], _writing_linear(pair[0], seen)))
        mlp.append((pair[1], _writing_linear(pair[1], seen)))
    return attention, mlp


def _recorder(seen: dict[nn.Module, list[Tensor]], d_model: int) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) and output else output
        if isinstance(tensor, Tensor) and tensor.ndim == 3 and tensor.shape[-1] == d_model:
            seen.setdefault(module, []).append(tensor.detach().clone())  # some blocks go on in place

    return hook


def _input_recorder(inputs: dict[nn.Module, Tensor]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if isinstance(hidden, Tensor):
            inputs[module] = hidden.detach().clone()

    return hook


def _writes_of_block(
    block: nn.Module, block_input: Tensor | None, seen: dict[nn.Module, list[Tensor]]
) -> tuple[nn.Module, nn.Module] | None:
    if block_input is None or block not in seen or seen[block][0].shape != block_input.shape:
        return None
    after, before = seen[block][0].double(), block_input.double()
    change = after - before
    # A dropout passes its input on: the module before it is the write.
    passing = (nn.Dropout, nn.Identity)
    once = [m for m in block.modules() if m is not block and len(seen.get(m, [])) == 1 and not isinstance(m, passing)]
    parts = [m for m in once if seen[m][0].shape == change.shape]  # experts see other shapes
    wrote = {m: seen[m][0].double() for m in parts}
    # In bfloat16 the stream itself is rounded: where it is large (massive activations), its last bits exceed any write. It is so between the two writes
    # too, where it can be larger than before and after both.
    eps = 2 * torch.finfo(block_input.dtype).eps
    ends = torch.maximum(after.abs(), before.abs())
    # Outermost modules come first in `modules()`; attention precedes the MLP in every family seen.
    for i, first in enumerate(parts):
        for second in parts[i + 1 :]:
            between = torch.maximum((before + wrote[first]).abs(), (before + wrote[second]).abs())
            allowed = eps * torch.maximum(ends, between) + 1e-3 * torch.maximum(wrote[first].abs().max(), wrote[second].abs().max())
            if bool(((wrote[first] + wrote[second] - change).abs() <= allowed).all()) and not _is_inside(second, first):
                return (first, second) if not _looks_like_mlp(block, first) else (second, first)
    return None


def _writing_linear(write: nn.Module, seen: dict[nn.Module, list[Tensor]]) -> nn.Linear | None:
    """The linear layer inside `write` whose output was `write`'s, or None (a norm follows it, or several make the output)."""
    for module in write.modules():
        outputs = seen.get(module, [])
        if isinstance(module, nn.Linear) and len(outputs) == 1 and torch.equal(outputs[0], seen[write][0]):
            return module
    return None


def _is_inside(inner: nn.Module, outer: nn.Module) -> bool:
    return any(m is inner for m in outer.modules())


def _looks_like_mlp(block: nn.Module, module: nn.Module) -> bool:
    return any(m is module and ("mlp" in n or "feed_forward" in n or "feedforward" in n) for n, m in block.named_modules())


def named_targets(anatomy: Anatomy) -> Iterator[tuple[str, nn.Linear]]:
    """Every linear layer inside the blocks with its name relative to the body: what adapters may attach to."""
    inside = {id(m) for block in anatomy.blocks for m in block.modules()}
    for name, module in anatomy.body.named_modules():
        if isinstance(module, nn.Linear) and id(module) in inside:
            yield name, module
