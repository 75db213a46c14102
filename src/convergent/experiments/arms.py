"""Interventions, controls and measures that several experiments use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from convergent.core.direction import Direction
from convergent.core.interventions import Ablate, Add, Intervention, Site
from convergent.experiments.base import Build, Control, Kit, NotHereError
from convergent.experiments.outcomes import Evidence, Outcomes, absent, evidence
from convergent.experiments.scene import Scene
from convergent.stats import one_sided_p, paired_difference

if TYPE_CHECKING:
    import pandas as pd

Mode = Literal["layerwise", "single", "at_layer", "adapter_layers", "without_massive"]
WORDS: dict[Mode, str] = {
    "layerwise": "each layer its own vector",
    "single": "the primary layer's vector everywhere",
    "at_layer": "the primary layer's vector at that layer only",
    "adapter_layers": "the primary layer's vector at the adapters' layers only",
    "without_massive": "the primary layer's vector without its massive dimensions, everywhere",
}
"""What each mode of ablation projects out, in words."""
LABELS: dict[Mode, str] = {
    "layerwise": "layer-wise",
    "single": "single",
    "at_layer": "at its layer only",
    "adapter_layers": "at the adapters' layers",
    "without_massive": "single, without massive dimensions",
}
"""The same in a condition's name."""
WITHOUT_MASSIVE = "without_massive"
"""Mode of ablation: the primary layer's vector everywhere, its massive dimensions set to zero."""
COHERENCE_BAND = 5.0
"""Points of coherence by which two answers may differ and still be a pair."""


def ablation(kit: Kit, mode: str, site: Site, layers: tuple[int, ...] | None = None, direction: Direction | None = None) -> Ablate:
    """The real ablation of a mode, of the study's direction by default. Raises NotHereError for `without_massive` where the model has no massive dimensions."""
    direction = kit.direction if direction is None else direction
    if mode == WITHOUT_MASSIVE:
        if not kit.massive:
            raise NotHereError("no dimension of this model has massive activations, so there is nothing to take out of the direction")
        return Ablate(direction.without(list(kit.massive)), site=site, layers=layers, vector_layer=kit.layer)
    return Ablate(direction, site=site, layers=layers, vector_layer=None if mode == "layerwise" else kit.layer)


def addition(scale: float, layer: int | None = None) -> Callable[[Kit], Add]:
    """`scale` times the direction, added at `layer`, the primary one by default."""
    return lambda kit: Add(kit.direction, kit.layer if layer is None else layer, scale)


def null(kind: Control, organism: str, make: Callable[[Kit], Add | Ablate]) -> Build:
    """The control of that kind in place of what `make` makes, on `organism`."""

    def build(kit: Kit) -> tuple[Intervention, ...]:
        return (kit.control(kind, organism, make(kit)),)

    return build


def one(make: Callable[[Kit], Intervention]) -> Build:
    """A single intervention."""
    return lambda kit: (make(kit),)


def spread_layers(scene: Scene, n: int) -> tuple[int, ...]:
    """`n` layers over the depth, the primary one among them; fewer in a shallow model."""
    even = {round(i * (scene.depth - 1) / max(1, n - 1)) for i in range(n)}
    near = min(even, key=lambda layer: abs(layer - scene.layer))
    return tuple(sorted((even - {near}) | {scene.layer}))


def margins_under(kit: Kit, organism: str, conditions: Sequence[Sequence[Intervention]]) -> list[list[float]]:
    """Margins of the held-out pairs (inner list, in the kit's order) under each condition (outer list), nats per token."""
    from convergent.directions.margin import margins

    found: list[list[float]] = [[] for _ in conditions]
    for m in margins(kit.model(organism), kit.pairs, conditions):
        found[m.condition].append(m.margin)
    return found


def kl_under(kit: Kit, organism: str, conditions: Sequence[Sequence[Intervention]]) -> list[float]:
    """Mean KL(clean || intervened) over the effect texts under each condition, nats per token."""
    from convergent.interventions.controls import Effects

    effects = Effects(kit.model(organism), kit.effect_texts)
    return [effects.kl(c) for c in conditions]


def coherence_matched(outcomes: Outcomes, a: str, b: str, text: str, sign: int = 1) -> Evidence:
    """Mean alignment of condition a minus b among answers of like coherence, paired by question.

    Inside each question answers of the two are paired one to one, nearest in coherence first and at most `COHERENCE_BAND` apart; the rest is
    left out. So a fall of alignment that is only a fall of coherence does not count.
    """
    if not outcomes.has(a, b):
        return absent(text, "points of alignment")
    x, y = _matched(outcomes.answers(a), outcomes.answers(b))
    columns = x["aligned"].to_numpy(), y["aligned"].to_numpy(), x["question_id"].to_numpy(), y["question_id"].to_numpy()
    d, p = paired_difference(*columns), one_sided_p(*columns, sign)
    return evidence(f"{text}, answers of like coherence only", d, "points of alignment", sign, p)


def _matched(x: pd.DataFrame, y: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    kept: tuple[list[int], list[int]] = ([], [])
    for question in sorted(set(x["question_id"]) & set(y["question_id"])):
        rows, columns = (np.flatnonzero(frame["question_id"].to_numpy() == question) for frame in (x, y))
        apart = np.abs(x["coherent"].to_numpy()[rows][:, None] - y["coherent"].to_numpy()[columns][None])
        for i, j in zip(*np.unravel_index(np.argsort(apart, axis=None, kind="stable"), apart.shape), strict=True):
            if apart[i, j] <= COHERENCE_BAND and rows[i] not in kept[0] and columns[j] not in kept[1]:
                kept[0].append(int(rows[i]))
                kept[1].append(int(columns[j]))
    return x.iloc[kept[0]], y.iloc[kept[1]]


def write_organism(scene: Scene, asked: str | None) -> str:
    """The organism whose adapters each write one vector to the stream: the one asked for, or the source, or else the first that has such adapters.

    Raises NotHereError where there is none.
    """
    names = (asked,) if asked else (scene.source, *scene.organisms)
    for name in names:
        shape = scene.organisms[name].adapters if name in scene.organisms else None
        if shape is not None and shape.writes_alone:
            return name
    who = "no organism of this study has" if asked is None else "the chat model does not have" if asked == "chat" else f"{asked} does not have"
    raise NotHereError(
        f"organism: {who} rank-1 adapters on the MLP's writing layer and nowhere else; name one that has "
        "(recipe nine_adapter or single_adapter), or leave the experiment out"
    )
