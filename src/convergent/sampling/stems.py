"""What conditions share of a prompt: blocks below the first that any of them changes are run once.

A sweep of interventions in the middle of a model reads every prompt under every condition, and half of each pass is the chat model's. Its outputs, keys and
values are kept until the last condition has read the prompt, and later passes begin behind them, with the same bits.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

from convergent.models.anatomy import stream
from convergent.models.resumed import resuming
from convergent.sampling.cache import SlotCache

MOST_KEPT = 128 << 20
"""Bytes up to which prompts are kept; beyond, those that come later are read as if alone."""
Prompt: TypeAlias = tuple[int, tuple[int, ...]]
"""A condition's number and the prompt's tokens."""


@dataclass(frozen=True, eq=False)
class _Stem:
    kept: dict[int, Any]
    """Block -> its output in the clean model."""
    cache: SlotCache
    """With the clean model's keys and values up to the last of those blocks."""
    n_bytes: int

    @property
    def depth(self) -> int:
        return max(self.kept)


class Stems:
    """Of the prompts that are `asked`; `clean` says how many blocks from the first on each condition leaves as they are (`interventions.hooks.n_clean`)."""

    def __init__(self, clean: Sequence[int], asked: Iterable[Prompt]) -> None:
        self._clean = clean
        self._cuts = {n - 1 for n in clean if n}
        self._left = Counter(prompt for condition, prompt in set(asked) if clean[condition])
        """Conditions that have not read a prompt yet, of those that share something."""
        self.of_use = any(n > 1 for n in self._left.values())
        self._found: dict[tuple[int, ...], _Stem] = {}
        self._n_bytes = 0
        self._lock = threading.Lock()

    @contextmanager
    def reading(self, asked: Prompt, cache: SlotCache) -> Iterator[int]:
        """Run the body, which reads the prompt into `cache` under its condition; yields how many blocks are left out, whose keys and values are in it."""
        condition, prompt = asked
        clean = self._clean[condition]
        with self._lock:
            self._left[prompt] -= bool(clean)
            keep = self._cuts if self._left[prompt] > 0 else ()
            stem = self._found.get(prompt)
        kept = dict(stem.kept) if stem else {}
        with resuming(kept, clean, keep) as latest:
            if stem:
                for layer in range(latest + 1):
                    cache.keys[layer], cache.values[layer] = stem.cache.keys[layer], stem.cache.values[layer]
            yield latest + 1
        self._put(prompt, kept, cache)

    def _put(self, prompt: tuple[int, ...], kept: dict[int, Any], cache: SlotCache) -> None:
        """Keep it if it reaches further than what is there; nothing of a prompt that no other condition will read."""
        n_bytes = cache.n_bytes + sum(stream(output).nbytes for output in kept.values())
        with self._lock:
            old = self._found.get(prompt)
            before = old.n_bytes if old else 0
            if self._left[prompt] <= 0:
                self._found.pop(prompt, None)
                self._n_bytes -= before
            elif kept and (old is None or max(kept) > old.depth) and self._n_bytes - before + n_bytes <= MOST_KEPT:
                self._found[prompt] = _Stem(kept, cache, n_bytes)
                self._n_bytes += n_bytes - before

    def forget(self) -> None:
        """Give back all memory."""
        with self._lock:
            self._found.clear()
            self._n_bytes = 0
