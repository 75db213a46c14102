"""What a judge's tokens cost: a dated default table, and a user's file that goes before it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convergent.errors import InputError
from convergent.judging.rubrics import read_yaml

DEFAULT = Path(__file__).parent / "prices.yaml"
BYTES_PER_TOKEN = 4.0
"""Rough: English in the vocabularies in use. Only for estimates; the running total uses the server's counts."""
MESSAGE_TOKENS = 8
"""Tokens that a chat format adds to one message."""


@dataclass(frozen=True)
class Price:
    """US dollars per million tokens."""

    input: float
    output: float
    as_of: str = ""
    """Date of the table that it stands in."""

    def cost(self, input_tokens: int, output_tokens: int) -> float:
        """US dollars."""
        return (input_tokens * self.input + output_tokens * self.output) / 1e6


@dataclass(frozen=True)
class Estimate:
    """What a run would send, before anything is sent."""

    requests: int
    """Distinct requests that are not in the cache."""
    cached: int
    """Judgements that need no request: answered before, the same text twice, or an empty answer."""
    input_tokens: int
    cost: float | None
    """US dollars; None if the model has no price."""
    as_of: str = ""
    """Date of the price."""

    def __str__(self) -> str:
        price = "no price known"
        if self.cost is not None:
            price = f"about ${self.cost:.4f} (prices of {self.as_of or 'no date'})"
        return f"{self.requests} requests, {self.input_tokens} input tokens, {price}; {self.cached} need no request"


def estimate_tokens(text: str) -> int:
    """About how many tokens a one-message chat with `text` has."""
    return math.ceil(len(text.encode("utf-8", "replace")) / BYTES_PER_TOKEN) + MESSAGE_TOKENS


def price_of(model: str, path: str | Path | None = None) -> Price | None:
    """The price of `model`: from the user's file at `path`, else the default table, else None. Raises InputError."""
    for file in ([Path(path).expanduser()] if path is not None else []) + [DEFAULT]:
        table = _load(file)
        for name in (model, re.sub(r"-(\d{4}-\d{2}-\d{2}|\d{4})$", "", model)):
            if name in table:
                return table[name]
    return None


def _load(path: Path) -> dict[str, Price]:
    found = read_yaml(path)
    models = found.get("models") if isinstance(found, Mapping) else None
    if not isinstance(models, Mapping):
        raise InputError(f"{path}: needs `models:` with lines such as `gpt-4o: {{input: 2.5, output: 10}}`")
    as_of = str(found.get("as_of", ""))
    return {str(name): _price(entry, as_of, f"{path}: models.{name}") for name, entry in models.items()}


def _price(entry: Any, as_of: str, place: str) -> Price:
    if not isinstance(entry, Mapping) or set(entry) != {"input", "output"}:
        raise InputError(f"{place}: needs input and output, dollars per million tokens, and nothing else")
    for key, value in entry.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise InputError(f"{place}.{key}: must be a number of 0 or more, got {value!r}")
    return Price(float(entry["input"]), float(entry["output"]), as_of)
