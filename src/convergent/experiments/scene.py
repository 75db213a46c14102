"""What an experiment may know before anything has been computed: the study's organisms, their shapes, the layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from convergent.organisms.adapters import AdapterShape


@dataclass(frozen=True)
class Subject:
    """An organism before it is loaded."""

    name: str
    family: str
    """Name without its seed: organisms that differ in nothing but their seed share it."""
    seed: int
    answer: Literal["bad", "good", ""]
    """Which twin it was trained on; empty for an organism from elsewhere."""
    data: str
    """Source of its training set; empty for an organism from elsewhere."""
    adapters: AdapterShape | None
    """None for a full fine-tune."""
    trained_here: bool = True


@dataclass(frozen=True)
class Scene:
    """The study as an experiment sees it."""

    organisms: Mapping[str, Subject]
    source: str
    """The organism that the study's direction is read in."""
    depth: int
    """Number of decoder blocks."""
    layer: int
    """The primary layer."""
    twin: str | None = None
    """The organism trained on the good-advice twins of the source's data."""
    topics: tuple[str, ...] = ()
    """Topics of the study's questions."""

    def others(self, *but: str) -> tuple[str, ...]:
        """The organisms trained on bad advice or from elsewhere, in the study's order, without those named."""
        return tuple(n for n, s in self.organisms.items() if s.answer != "good" and n not in but)
