"""The kit of readings that are made before any organism is trained: nothing in it can reach an organism, whenever the study is run.

So a value that is computed "before" cannot depend on what training made, also where an organism is there already.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convergent.models.load import ChatModel
    from convergent.study.run import Run

OPEN = frozenset({"scene", "seed", "layer", "pairs", "domain_of", "effect_texts", "training_pairs", "trained"})
"""What of a kit is known without any organism's weights."""


class Before:
    """A `Kit` for readings with `when="before"`."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def __getattr__(self, name: str) -> Any:
        if name not in OPEN:
            raise RuntimeError(f"a reading made before any organism is trained cannot use `kit.{name}`")
        return getattr(self._run, name)

    def model(self, organism: str) -> ChatModel:
        """The chat model, and no other."""
        return self._run.model(_chat(organism))

    def model_id(self, organism: str) -> str:
        """The chat model's."""
        return self._run.model_id(_chat(organism))

    def value(self, reading: str) -> Any:
        """The value of another reading of this kind."""
        if self._run.readings[reading].when != "before":
            raise RuntimeError(f"a reading made before any organism is trained cannot use the reading {reading}, which is made after")
        return self._run.value(reading)


def _chat(organism: str) -> str:
    if organism != "chat":
        raise RuntimeError(f"a reading made before any organism is trained cannot use the organism {organism}")
    return organism
