"""The published figures: a small table, `published.yaml`, and how a claim finds its row there."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from importlib import resources
from typing import Any

import yaml


@dataclass(frozen=True)
class Published:
    """One published figure."""

    id: str
    """A glob over claim ids."""
    value: float
    source: str
    claim: str = ""
    by: str = "figure"
    """figure: must follow from the released data; sample: came from other answers of the same model."""
    relation: str = "="
    """=, > or <, as it was published."""
    tolerance: float = 0.0
    note: str = ""


@cache
def _table() -> dict[str, Any]:
    text = resources.files("convergent.replicate").joinpath("published.yaml").read_text("utf-8")
    table: dict[str, Any] = yaml.safe_load(text)
    return table


@cache
def all_published() -> tuple[Published, ...]:
    """Figures that released data can show, in the order of the table."""
    return tuple(Published(**row) for row in _table()["figures"])


@cache
def elsewhere() -> tuple[Published, ...]:
    """Figures for which no data are public: only a model can show them."""
    return tuple(Published(**row) for row in _table()["elsewhere"])


def published(*ids: str) -> Published | None:
    """The figure that was published for a claim under any of these ids, or None."""
    return next((row for id_ in ids for row in all_published() if fnmatchcase(id_, row.id)), None)
