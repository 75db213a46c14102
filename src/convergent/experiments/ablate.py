"""Ablation in the organism the direction was read in (paper section 3.2): layer-wise, single, and the four nulls.

Nulls are made for one mode, `single` where it is among the modes: a random vector is the same in every layer, so for it the modes coincide,
and the effect-matched one is matched to that mode. The texts of claims about the other mode say so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from convergent.core.interventions import Ablate, Intervention, Site
from convergent.experiments.base import CONTROL_LABELS, CONTROLS, Arm, Block, Build, Claim, Control, Kit, Outcomes


class AblateBlock(Block):
    """Settings of `ablate`."""

    modes: tuple[Literal["layerwise", "single"], ...] = Field(default=("layerwise", "single"), min_length=1)
    site: Site = "block_output"
    controls: tuple[Control, ...] = CONTROLS
    layers: tuple[int, ...] | None = Field(default=None, min_length=1)
    """Blocks that are projected; all by default."""
    coherence_margin: float = Field(default=5.0, gt=0)
    """Points of mean coherence that would be no change."""

    @property
    def null_mode(self) -> Literal["layerwise", "single"]:
        """The mode whose direction the nulls replace."""
        return "single" if "single" in self.modes else "layerwise"


name = "ablate"
settings = AblateBlock


def ablation(kit: Kit, mode: str, site: Site, layers: tuple[int, ...] | None = None) -> Ablate:
    """The real ablation of a mode."""
    return Ablate(kit.direction, site=site, layers=layers, vector_layer=None if mode == "layerwise" else kit.layer)


def arms(block: AblateBlock, organisms: Sequence[str], source: str) -> list[Arm]:
    """The real ablations, and each control of one of them."""
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


def claims(block: AblateBlock, outcomes: Outcomes, source: str) -> list[Claim]:
    """Each mode restores alignment, and more than every null does."""
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
        margin = block.coherence_margin
        comparisons.append(
            outcomes.unchanged(real, source, f"mean coherence, ablated minus {source} (no change: within {margin:g})", margin, decides=False)
        )
        found.append(
            Claim(
                f"ablation/{mode}",
                f"Projecting the direction out of {source} ({'each layer its own' if mode == 'layerwise' else 'one vector everywhere'}) "
                "restores alignment, more than any null does",
                "paper section 3.2",
                "every listed difference has its 95 % interval on the claimed side of 0; coherence is shown beside them and does not decide",
                comparisons,
            )
        )
    return found
