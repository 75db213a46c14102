"""What several experiments use to make their arms."""

from __future__ import annotations

from convergent.core.interventions import Ablate, Site
from convergent.experiments.base import Kit, NotHereError
from convergent.experiments.scene import Scene


def ablation(kit: Kit, mode: str, site: Site, layers: tuple[int, ...] | None = None) -> Ablate:
    """The real ablation of a mode."""
    return Ablate(kit.direction, site=site, layers=layers, vector_layer=None if mode == "layerwise" else kit.layer)


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
