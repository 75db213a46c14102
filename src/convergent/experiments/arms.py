"""Interventions that several experiments use."""

from __future__ import annotations

from convergent.core.interventions import Ablate, Site
from convergent.experiments.base import Kit


def ablation(kit: Kit, mode: str, site: Site, layers: tuple[int, ...] | None = None) -> Ablate:
    """The real ablation of a mode."""
    return Ablate(kit.direction, site=site, layers=layers, vector_layer=None if mode == "layerwise" else kit.layer)
