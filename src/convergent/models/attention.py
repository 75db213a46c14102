"""Attention functions of our own in a model of transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

ABSENT: Any = object()
"""What an attention function takes for an argument that was not given; None is given on purpose."""


def window_of(module: nn.Module, given: Any) -> int | None:
    """How many tokens back a layer sees, from the `sliding_window` its attention function was given.

    Some families hand over None in their global layers, whose modules have a window as an attribute all the same; others hand over nothing.
    """
    return getattr(module, "sliding_window", None) if given is ABSENT else given


def plain_layers(model: Any) -> bool:
    """Whether its config names, if it names any, layers of full and sliding attention alone: no chunks, no state of another kind."""
    layers = getattr(model.config.get_text_config(), "layer_types", None) or ()
    return set(layers) <= {"full_attention", "sliding_attention"}


@contextmanager
def attending_by(model: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Run the body with `function` as the model's attention, known to transformers under `name`; the model's own is restored afterwards.

    A family whose attention does not go through the interface of transformers keeps its own: whoever must know compares
    `model.config._attn_implementation` with `name`, or sees whether `function` is called.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(name, function)
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(name)
        yield
    finally:
        model.set_attn_implementation(before)
