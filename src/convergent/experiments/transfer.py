"""The direction of one organism, ablated in others (paper section 3.3)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from convergent.core.interventions import Intervention, Site
from convergent.experiments.arms import ablation
from convergent.experiments.base import CONTROL_LABELS, Arm, Block, Build, Claim, Control, Kit, Outcomes
from convergent.experiments.scene import Scene


class TransferBlock(Block):
    """Settings of `transfer`."""

    organisms: tuple[str, ...] = Field(min_length=1)
    mode: Literal["layerwise", "single"] = "single"
    site: Site = "block_output"
    controls: tuple[Control, ...] = ("random",)


name = "transfer"
settings = TransferBlock


def arms(block: TransferBlock, scene: Scene) -> list[Arm]:
    """The source's direction ablated in each other organism, and the nulls."""
    source = scene.source
    found = []
    for o in dict.fromkeys(block.organisms):
        found.append(
            Arm(
                f"{o}/ablate-{source}",
                o,
                f"{o}, direction of {source} ablated",
                f"Organism {o} with the direction read in {source} projected out.",
                "transfer",
                "real",
                _real(block),
            )
        )
        found += [
            Arm(
                f"{o}/ablate-{kind}",
                o,
                f"{o}, ablated: {CONTROL_LABELS[kind]}",
                f"Organism {o} with a null in place of the direction: {CONTROL_LABELS[kind]}.",
                "transfer",
                "control",
                _null(kind, block, o),
            )
            for kind in dict.fromkeys(block.controls)
        ]
    return found


def _real(block: TransferBlock) -> Build:
    def build(kit: Kit) -> tuple[Intervention, ...]:
        return (ablation(kit, block.mode, block.site),)

    return build


def _null(kind: Control, block: TransferBlock, organism: str) -> Build:
    def build(kit: Kit) -> tuple[Intervention, ...]:
        return (kit.control(kind, organism, ablation(kit, block.mode, block.site)),)

    return build


def claims(block: TransferBlock, outcomes: Outcomes, scene: Scene) -> list[Claim]:
    """The transferred ablation restores alignment in each organism, more than the nulls do."""
    source = scene.source
    found = []
    for o in dict.fromkeys(block.organisms):
        real = f"{o}/ablate-{source}"
        comparisons = [
            outcomes.alignment(real, o, f"mean alignment, ablated minus {o} (above 0 claimed)"),
            outcomes.margin(real, o, f"margin for bad answers, ablated minus {o} (below 0 claimed)", sign=-1),
        ]
        for kind in block.controls:
            null = f"{o}/ablate-{kind}"
            comparisons += [
                outcomes.alignment(real, null, f"mean alignment, ablated minus {CONTROL_LABELS[kind]} (above 0 claimed)"),
                outcomes.margin(real, null, f"margin, ablated minus {CONTROL_LABELS[kind]} (below 0 claimed)", sign=-1),
            ]
        found.append(
            Claim(
                f"transfer/{o}",
                f"The direction read in {source}, projected out of {o}, restores its alignment, more than a null does",
                "paper section 3.3",
                "every listed difference has its 95 % interval on the claimed side of 0",
                comparisons,
            )
        )
    return found
