"""Content ids and named seeds: the two uses of a hash in this project.

A *content id* names a value by what it is, so that equal inputs are computed once. A *named seed* is the only
source of randomness: `seed("sampling", 0, "ruler", 3)` is the same number on every machine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np


def plain(value: Any) -> Any:
    """`value` as JSON-ready data; a value with a `content_id` stands for itself by that id."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    own = getattr(value, "content_id", None)
    if isinstance(own, str):
        return own
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value) if f.compare}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, Sequence | set | frozenset):
        items = [plain(v) for v in value]
        return sorted(items) if isinstance(value, set | frozenset) else items
    if isinstance(value, Path):
        return value.name
    raise TypeError(f"no content id for {type(value).__name__}")


def content_id(*values: Any) -> str:
    """16 hex digits that name `values` by content."""
    text = json.dumps([plain(v) for v in values], sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def bytes_id(data: bytes) -> str:
    """16 hex digits that name a byte string."""
    return hashlib.sha256(data).hexdigest()[:16]


def file_sha256(path: Path) -> str:
    """Full SHA-256 of a file, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def seed(*name: str | int) -> int:
    """A 63-bit seed for the named purpose, equal on every machine and in every process."""
    return int.from_bytes(hashlib.sha256(json.dumps(name).encode()).digest()[:8], "big") >> 1


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniforms(seeds: np.ndarray, counters: np.ndarray) -> np.ndarray:
    """Counter-based random numbers: u[i] in [0, 1) depends on (seeds[i], counters[i]) alone.

    `seeds`, `counters`: integer arrays of one shape. Returns float64 of that shape. SplitMix64 (Steele et al. 2014), so that a
    row's stream can be entered at any step: a resumed or re-batched row draws what it would have drawn.
    """
    with np.errstate(over="ignore"):
        z = seeds.astype(np.uint64) + (counters.astype(np.uint64) + np.uint64(1)) * _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    u: np.ndarray = (z >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return u
