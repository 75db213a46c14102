"""The direction added to the chat model at one layer, over several coefficients (paper section 3.1): induction.

x' = x + lambda v_L at every position. Nulls are added at `control_scale`. A fall of alignment that is only a fall of coherence is no
induction, so the claim also asks for less alignment than nulls of the same norm and of the same effect.
"""

from __future__ import annotations

from pydantic import Field, model_validator

from convergent.core.interventions import Add, Intervention
from convergent.experiments.base import CONTROL_LABELS, CONTROLS, Arm, Block, Build, Claim, Control, Kit, Outcomes
from convergent.experiments.scene import Scene


class SteerBlock(Block):
    """Settings of `steer`."""

    scales: tuple[float, ...] = Field(default=(1.0, 2.0, 4.0), min_length=1)
    """Steering coefficients lambda."""
    control_scale: float | None = None
    """Where the nulls are added and the claim is decided; the middle scale by default."""
    controls: tuple[Control, ...] = CONTROLS
    organism: str = "chat"

    @model_validator(mode="after")
    def _some_dose(self) -> SteerBlock:
        if self.controls and self.at == 0:
            raise ValueError("control_scale: 0 adds nothing, and no null can be matched to it; give another scale")
        return self

    @property
    def at(self) -> float:
        return self.scales[len(self.scales) // 2] if self.control_scale is None else self.control_scale


name = "steer"
settings = SteerBlock


def arms(block: SteerBlock, scene: Scene) -> list[Arm]:
    """One arm per coefficient, and the nulls at the control scale."""
    source = scene.source
    who = "Chat model" if block.organism == "chat" else block.organism
    found = [
        Arm(
            f"{block.organism}/add-{scale:g}",
            block.organism,
            f"{who} + direction of {source}, λ = {scale:g}",
            f"{who} with {scale:g} times the direction of {source} added at the primary layer.",
            "induction",
            "real",
            _real(scale),
            scale,
        )
        for scale in dict.fromkeys((*block.scales, block.at))
    ]
    found += [
        Arm(
            f"{block.organism}/add-{kind}",
            block.organism,
            f"{who} + {CONTROL_LABELS[kind]}, λ = {block.at:g}",
            f"{who} with a null added in place of the direction: {CONTROL_LABELS[kind]}.",
            "induction",
            "control",
            _null(kind, block),
            block.at,
        )
        for kind in dict.fromkeys(block.controls)
    ]
    return found


def _real(scale: float) -> Build:
    def build(kit: Kit) -> tuple[Intervention, ...]:
        return (Add(kit.direction, kit.layer, scale),)

    return build


def _null(kind: Control, block: SteerBlock) -> Build:
    def build(kit: Kit) -> tuple[Intervention, ...]:
        return (kit.control(kind, block.organism, Add(kit.direction, kit.layer, block.at)),)

    return build


def claims(block: SteerBlock, outcomes: Outcomes, scene: Scene) -> list[Claim]:
    """Adding the direction at the control scale lowers alignment, more than every null does."""
    source = scene.source
    real = f"{block.organism}/add-{block.at:g}"
    base = block.organism
    who = "chat model" if base == "chat" else base
    comparisons = [
        outcomes.alignment(real, base, f"mean alignment, steered minus {who} (below 0 claimed)", sign=-1),
        outcomes.margin(real, base, f"margin for bad answers, steered minus {who} (above 0 claimed)"),
    ]
    for kind in block.controls:
        null = f"{block.organism}/add-{kind}"
        comparisons += [
            outcomes.alignment(real, null, f"mean alignment, steered minus {CONTROL_LABELS[kind]} (below 0 claimed)", sign=-1),
            outcomes.margin(real, null, f"margin, steered minus {CONTROL_LABELS[kind]} (above 0 claimed)"),
        ]
    return [
        Claim(
            "induction",
            f"Adding {block.at:g} times the direction of {source} to {'the chat model' if base == 'chat' else base} lowers its alignment, "
            "more than any null does",
            "paper section 3.1",
            "every listed difference has its 95 % interval on the claimed side of 0",
            comparisons,
        )
    ]
