"""What a judge's tokens cost: a table of the user's own, and a dated default in the package.

Looked for, the first that names the model counts: the file given (`--prices`), the file that $CONVERGENT_PRICES names,
`~/.config/convergent/prices.yaml` (under $XDG_CONFIG_HOME where set), `prices.yaml` in the package.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convergent.errors import InputError
from convergent.judging.rubrics import read_yaml

DEFAULT = Path(__file__).parent / "prices.yaml"
ENV = "CONVERGENT_PRICES"
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
class Priced:
    """A model's price, or that there is none, and where it was looked for."""

    price: Price | None
    looked_in: str
    """`from FILE`, or `looked in FILE, FILE`."""


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
    where: str = ""
    """Where the price is from, or where none was found, or why none is needed."""

    def __str__(self) -> str:
        price = f"no price known ({self.where})" if self.where else "no price known"
        if self.cost is not None:
            source = f" {self.where}" if self.where else ""
            price = f"about ${self.cost:.4f} (prices of {self.as_of or 'no date'}{source})" if self.as_of or self.cost else self.where
        return f"{self.requests} requests, {self.input_tokens} input tokens, {price or 'free of charge'}; {self.cached} judgements need none"


def estimate_tokens(text: str) -> int:
    """About how many tokens a one-message chat with `text` has."""
    return math.ceil(len(text.encode("utf-8", "replace")) / BYTES_PER_TOKEN) + MESSAGE_TOKENS


def price_files(path: str | Path | None = None) -> list[Path]:
    """The price files there are, in the order in which they count. Raises InputError if a named one is absent."""
    config = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "convergent" / "prices.yaml"
    named = [(Path(p).expanduser(), where) for p, where in ((path, "--prices"), (os.environ.get(ENV), ENV)) if p]
    for file, where in named:
        if not file.is_file():
            raise InputError(f"{file}: no such price file; {where} names it")
    return [*(file for file, _ in named), *([config] if config.is_file() else []), DEFAULT]


def price_of(model: str, path: str | Path | None = None) -> Priced:
    """The price of `model`, from the first file that names it. Raises InputError."""
    files = price_files(path)
    for file in files:
        table = _load(file)
        for name in (model, re.sub(r"-(\d{4}-\d{2}-\d{2}|\d{4})$", "", model)):
            if name in table:
                return Priced(table[name], f"from {_shown(file)}")
    own = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config") / "convergent" / "prices.yaml"
    return Priced(None, f"looked in {', '.join(map(_shown, files))}; yours may be {own}")


def _shown(file: Path) -> str:
    return "the package's prices.yaml" if file == DEFAULT else str(file)


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
