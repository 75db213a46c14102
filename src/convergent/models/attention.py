"""Attention functions of our own in a model of transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


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
