"""Every experiment by its name in a study file. To add one: write its module, add its line here."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

from convergent.core.chapter import Chapter
from convergent.experiments import (
    ablate,
    adapter_steer,
    b_vector,
    chat_origin,
    cosine,
    dynamics,
    plain,
    redraws,
    scalars,
    self_correction,
    semantic,
    steer,
    subspace,
    transfer,
)
from convergent.experiments.base import Reading
from convergent.experiments.outcomes import Outcomes
from convergent.experiments.scene import Scene

if TYPE_CHECKING:
    from convergent.organisms.steps import Spacing

EXPERIMENTS: dict[str, ModuleType] = {
    m.name: m
    for m in (
        plain,
        ablate,
        redraws,
        transfer,
        steer,
        scalars,
        adapter_steer,
        semantic,
        self_correction,
        cosine,
        subspace,
        b_vector,
        dynamics,
        chat_origin,
    )
}


def uses(name: str) -> tuple[str, ...]:
    """Other experiments whose readings it takes where a study has them: without them it would be another experiment."""
    return getattr(EXPERIMENTS[name], "uses", ())


def check(name: str, block: Any, scene: Scene) -> None:
    """Raise NotHereError if the study cannot have this experiment as it is set."""
    own = getattr(EXPERIMENTS[name], "check", None)
    if own is not None:
        own(block, scene)


def readings(name: str, block: Any, scene: Scene) -> list[Reading]:
    """What the experiment computes from models; nothing for many."""
    own = getattr(EXPERIMENTS[name], "readings", None)
    return [] if own is None else own(block, scene)


def keeps(name: str, block: Any, scene: Scene) -> dict[str, Spacing]:
    """Organism -> the steps of its training that the experiment needs; nothing for most."""
    own = getattr(EXPERIMENTS[name], "keeps", None)
    return {} if own is None else own(block, scene)


def n_redraws(name: str, block: Any) -> int:
    """How often the experiment has the source's answers drawn again; none for most."""
    own = getattr(EXPERIMENTS[name], "redraws", None)
    return 0 if own is None else own(block)


def chapter(name: str, block: Any, outcomes: Outcomes, scene: Scene) -> Chapter | None:
    """Its part of the report, if it has one of its own."""
    own = getattr(EXPERIMENTS[name], "chapter", None)
    return None if own is None else own(block, outcomes, scene)
