"""How long a text may be before a model's positions run out, or change with the texts beside it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

from convergent.models.load import ChatModel


def most_positions(model: ChatModel) -> int | None:
    """Tokens of the longest text that the base was made for, if its config says so."""
    found = getattr(model.model.config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def has_table(model: ChatModel) -> bool:
    """Whether positions are rows of a table (learned, or sines computed once) that ends with `most_positions`, as in GPT-2 and GPT-J."""
    most, body = most_positions(model), model.anatomy.body
    tables = chain(body.named_parameters(), body.named_buffers())
    # OPT and BioGPT have two rows more than positions.
    return most is not None and any(t.ndim == 2 and 0 <= len(t) - most <= 2 and ("pos" in name or "wpe" in name) for name, t in tables)


def rescaled_from(model: ChatModel) -> int | None:
    """With rotary positions of the types dynamic and longrope: the most tokens up to which they are the plain ones.

    Beyond, transformers chooses the rotary frequencies of a whole batch by its longest text, so that a row depends on its neighbours.
    """
    text = model.model.config.get_text_config()
    found = []
    for rope in _ropes(text):
        kind = str(rope.get("rope_type", rope.get("type", "default")))
        if "dynamic" in kind:
            found.append(most_positions(model))
        elif kind == "longrope":
            found.append(rope.get("original_max_position_embeddings") or getattr(text, "original_max_position_embeddings", None) or most_positions(model))
    return min((n for n in found if n is not None), default=None)


def _ropes(config: Any) -> Iterator[dict[str, Any]]:
    """Its rotary parameters: one set, or one per type of layer."""
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    yield from (given, *(one for one in given.values() if isinstance(one, dict)))
