"""What a model calls its key-value cache: `cache` from transformers 5.24 on, `past_key_values` before, and in code that a checkpoint brings."""

from __future__ import annotations

import inspect
from typing import Any


def cache_name(model: Any) -> str:
    """Name of the argument of `model.forward`, and of the part of its output, that hold the cache."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
