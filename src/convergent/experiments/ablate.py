"""Ablation in the organism the direction was read in (paper section 3.2): layer-wise, single, and the four nulls.

Nulls are made for one mode, `single` where it is among the modes: a random vector is the same in every layer, so for it the modes coincide,
and the effect-matched one is matched to that mode. The texts of claims about the other mode say so.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from convergent.core.interventions import Intervention, Site
from convergent.experiments.arms import ablation
from convergent.experiments.base import CONTROL_LABELS, CONTROLS, Arm, Block, Build, Claim, Control, Kit, Outcomes
from convergent.experiments.scene import Scene


class AblateBlock(Block):
    """Settings of `ablate`."""

    modes: tuple[Literal["layerwise", "single"], ...] = Field(default=("layerwise", "single"), min_length=1)
    site: Site = "block_output"
    controls: tuple[Control, ...] = CONTROLS
    layers: tuple[int, ...] | None = Field(default=None, min_length=1)
    """Blocks that are projected; all by default."""

    @property
    def null_mode(self) -> Literal["layerwise", "single"]:
        """The mode whose direction the nulls replace."""
        return "single" if "single" in self.modes else "layerwise"


name = "ablate"
settings = AblateBlock


def arms(block: AblateBlock, scene: Scene) -> list[Arm]:
    """The real ablations, and each control of one of them."""
    source = scene.source
    where = "at every block's output" if block.site == "block_output" else "from every write to the residual stream"
    words = {"layerwise": "each layer's own vector", "single": "one vector, that of the primary layer,"}
    found = [
        Arm(
            f"{source}/ablate-{mode}",
            source,
            f"{source}, direction ablated ({'layer-wise' if mode == 'layerwise' else 'single'})",
            f"{source} with {words[mode]} projected out {where}.",
            "ablation",
            "real",
            _real(mode, block),
        )
        for mode in dict.fromkeys(block.modes)
    ]
    found += [
        Arm(
            f"{source}/ablate-{kind}",
            source,
            f"{source}, ablated: {CONTROL_LABELS[kind]}",
            f"{source} with a null in place of the direction, same site and layers: {CONTROL_LABELS[kind]}.",
            "ablation",
            "control",
            _null(kind, block, source),
        )
        for kind in dict.fromkeys(block.controls)
    ]
    return found


def _real(mode: str, block: AblateBlock) -> Build:
    def build(kit: Kit) -> tuple[Intervention, ...]:
        return (ablation(kit, mode, block.site, block.layers),)

    return build


def _null(kind: Control, block: AblateBlock, organism: str) -> Build:
    def build(kit: Kit) -> tuple[Intervention, ...]:
        return (kit.control(kind, organism, ablation(kit, block.null_mode, block.site, block.layers)),)

    return build


def claims(block: AblateBlock, outcomes: Outcomes, scene: Scene) -> list[Claim]:
    """Each mode restores alignment, and more than every null does."""
    source = scene.source
    found = []
    for mode in dict.fromkeys(block.modes):
        real = f"{source}/ablate-{mode}"
        made_for = "" if mode == block.null_mode else f", made for the {block.null_mode} ablation"
        comparisons = [
            outcomes.alignment(real, source, f"mean alignment, ablated minus {source} (above 0 claimed)"),
            outcomes.margin(real, source, f"margin for bad answers, ablated minus {source} (below 0 claimed)", sign=-1),
        ]
        for kind in block.controls:
            null = f"{source}/ablate-{kind}"
            comparisons += [
                outcomes.alignment(real, null, f"mean alignment, ablated minus {CONTROL_LABELS[kind]}{made_for} (above 0 claimed)"),
                outcomes.margin(real, null, f"margin, ablated minus {CONTROL_LABELS[kind]}{made_for} (below 0 claimed)", sign=-1),
            ]
        found.append(
            Claim(
                f"ablation/{mode}",
                f"Projecting the direction out of {source} ({'each layer its own' if mode == 'layerwise' else 'one vector everywhere'}) "
                "restores alignment, more than any null does",
                "paper section 3.2",
                "every listed difference has its 95 % interval on the claimed side of 0",
                comparisons,
            )
        )
    return found
