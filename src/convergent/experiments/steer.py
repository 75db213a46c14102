"""The direction added at one layer (paper section 3.2): induction in the chat model, suppression in the organism, and the window of lambda.

    x' = x + lambda v_L        at the output of block L, every position; lambda multiplies the raw vector

Nulls are added at `control_scale`. A fall of alignment that is only a fall of coherence is no induction: the claim asks for less alignment than
nulls of the same norm and of the same effect, and for the same among answers of like coherence. The window over layers x lambda is read from
margin and KL alone, which need no sampling.
"""

from __future__ import annotations

from pydantic import Field, model_validator

from convergent.core.chapter import Chapter, Chart, Grid, Sheet
from convergent.core.ids import content_id
from convergent.core.interventions import Add
from convergent.experiments.arms import addition, coherence_matched, kl_under, margins_under, null, one, spread_layers
from convergent.experiments.base import CONTROL_LABELS, CONTROLS, Arm, Control, DrawsNulls, Kit, NotHereError, Reading
from convergent.experiments.draws import further_draws, redraw
from convergent.experiments.outcomes import CLAIMED_SIDE, NEW_DRAW, Claim, Outcomes
from convergent.experiments.scene import Scene

SUPPRESSION_CONTROLS: tuple[Control, ...] = ("random", "effect_matched")


class SteerBlock(DrawsNulls):
    """Settings of `steer`."""

    scales: tuple[float, ...] = Field(default=(1.0, 2.0, 4.0), min_length=1)
    """Steering coefficients lambda."""
    control_scale: float | None = None
    """Where the nulls are added and the claim is decided; the middle scale by default."""
    controls: tuple[Control, ...] = CONTROLS
    organism: str = "chat"
    layers: tuple[int, ...] = ()
    """Further layers at which every scale is sampled; the primary one always is."""
    negative: bool = True
    """Whether the direction is also subtracted, at the control scale: from `organism`, and from the organism it was read in (suppression)."""
    window_layers: int = Field(default=5, ge=0)
    """Number of layers of the window that margin and KL draw over layers and scales; 0 leaves it out."""
    coherence_margin: float = Field(default=5.0, gt=0)
    """Points of mean coherence that would be no change."""

    @model_validator(mode="after")
    def _some_dose(self) -> SteerBlock:
        if self.controls and self.at == 0:
            raise ValueError("control_scale: 0 adds nothing, and no null can be matched to it; give another scale")
        return self

    @property
    def at(self) -> float:
        return self.scales[len(self.scales) // 2] if self.control_scale is None else self.control_scale

    @property
    def all_scales(self) -> tuple[float, ...]:
        """The scales and the one of the nulls, each once."""
        return tuple(dict.fromkeys((*self.scales, self.at)))


name = "steer"
settings = SteerBlock


def check(block: SteerBlock, scene: Scene) -> None:
    """Layers within the depth."""
    for layer in block.layers:
        if not 0 <= layer < scene.depth:
            raise NotHereError(f"layers: {layer} is out of range; this base has blocks 0 to {scene.depth - 1}")


def arms(block: SteerBlock, scene: Scene) -> list[Arm]:
    """One arm per coefficient and layer, the nulls at the control scale, the direction subtracted."""
    source, base = scene.source, block.organism
    who = "Chat model" if base == "chat" else base
    found = [
        Arm(
            f"{base}/add-{scale:g}", base, f"{who} + direction of {source}, λ = {scale:g}",
            f"{who} with {scale:g} times the direction of {source} added at the primary layer.", "induction", "real", one(addition(scale)), scale,
        )
        for scale in block.all_scales
    ]  # fmt: skip
    found += [
        Arm(
            f"{base}/add-{kind}", base, f"{who} + {CONTROL_LABELS[kind]}, λ = {block.at:g}",
            f"{who} with a null added in place of the direction: {CONTROL_LABELS[kind]}.", "induction", "control",
            null(kind, base, addition(block.at)), block.at, redraw=redraw(kind, base, addition(block.at)),
        )
        for kind in dict.fromkeys(block.controls)
    ]  # fmt: skip
    found += [
        Arm(
            f"{base}/add-{scale:g}-L{layer}", base, f"{who} + direction of {source} at layer {layer}, λ = {scale:g}",
            f"{who} with {scale:g} times the direction of {source} at block {layer} added there.", "steering at other layers", "real",
            one(addition(scale, layer)), scale,
        )
        for layer in dict.fromkeys(block.layers)
        if layer != scene.layer
        for scale in block.all_scales
    ]  # fmt: skip
    if block.negative:
        found.append(
            Arm(
                f"{base}/subtract", base, f"{who} − direction of {source}, λ = {-block.at:g}",
                f"{who} with {block.at:g} times the direction of {source} subtracted at the primary layer.", "induction", "real",
                one(addition(-block.at)), -block.at,
            )
        )  # fmt: skip
        found.append(
            Arm(
                f"{source}/subtract", source, f"{source} − its direction, λ = {-block.at:g}",
                f"{source} with {block.at:g} times its direction subtracted at the primary layer.", "suppression", "real",
                one(addition(-block.at)), -block.at,
            )
        )  # fmt: skip
        found += [
            Arm(
                f"{source}/subtract-{kind}", source, f"{source} − {CONTROL_LABELS[kind]}, λ = {-block.at:g}",
                f"{source} with a null subtracted in place of the direction: {CONTROL_LABELS[kind]}.", "suppression", "control",
                null(kind, source, addition(-block.at)), -block.at, redraw=redraw(kind, source, addition(-block.at)),
            )
            for kind in SUPPRESSION_CONTROLS
            if kind in block.controls
        ]  # fmt: skip
    return found


def readings(block: SteerBlock, scene: Scene) -> list[Reading]:
    """The window: margin and KL of the steered model over layers x scales; and the margin under further draws of the nulls."""
    drawn = further_draws(name, arms(block, scene), block.null_draws)
    if not block.window_layers:
        return drawn
    layers = spread_layers(scene, block.window_layers)
    cells = [(layer, scale) for layer in layers for scale in block.all_scales]

    def inputs(kit: Kit) -> str:
        return content_id(kit.model_id(block.organism), kit.direction.content_id, cells, kit.pairs, kit.effect_texts)

    def compute(kit: Kit) -> list[dict[str, float]]:
        under = [(), *[(Add(kit.direction, layer, scale),) for layer, scale in cells]]
        clean, *steered = margins_under(kit, block.organism, under)
        kls = kl_under(kit, block.organism, under[1:])
        return [
            {"layer": layer, "scale": scale, "kl": kl, "shift": sum(m) / len(m) - sum(clean) / len(clean), "n": len(m)}
            for (layer, scale), m, kl in zip(cells, steered, kls, strict=True)
        ]

    return [Reading("steer/window", inputs, compute, organisms=(block.organism,), tokens=len(cells) * 8000), *drawn]


def claims(block: SteerBlock, outcomes: Outcomes, scene: Scene) -> list[Claim]:
    """Adding the direction at the control scale lowers alignment, more than every null does; subtracting it from the organism raises it."""
    source, base = scene.source, block.organism
    who = "the chat model" if base == "chat" else base
    real = f"{base}/add-{block.at:g}"
    comparisons = [
        outcomes.alignment(real, base, f"mean alignment, steered minus {who.removeprefix('the ')} (below 0 claimed)", sign=-1),
        outcomes.margin(real, base, f"margin for bad answers, steered minus {who.removeprefix('the ')} (above 0 claimed)"),
    ]
    for kind in block.controls:
        other = f"{base}/add-{kind}"
        text = f"mean alignment, steered minus {CONTROL_LABELS[kind]} (below 0 claimed)"
        comparisons += [
            outcomes.alignment(real, other, text, sign=-1),
            outcomes.margin(real, other, f"margin, steered minus {CONTROL_LABELS[kind]} (above 0 claimed)"),
        ]
        if kind == "effect_matched":
            comparisons.append(coherence_matched(outcomes, real, other, text, sign=-1))
    margin = block.coherence_margin
    words = f"mean coherence, steered minus {who.removeprefix('the ')} (no change: within {margin:g})"
    comparisons.append(outcomes.unchanged(real, base, words, margin, decides=False))
    found = [
        Claim(
            "induction",
            f"Adding {block.at:g} times the direction of {source} to {who} lowers its alignment, more than any null does",
            "paper section 3.2",
            f"{CLAIMED_SIDE}; coherence is shown beside them and does not decide{NEW_DRAW}",
            comparisons,
            paper="induction" if base == "chat" else "",
        )
    ]
    if block.negative:
        found.append(_suppression(block, outcomes, source))
    return found


def _suppression(block: SteerBlock, outcomes: Outcomes, source: str) -> Claim:
    real = f"{source}/subtract"
    comparisons = []
    for other, words in ((source, source), *((f"{source}/subtract-{k}", CONTROL_LABELS[k]) for k in SUPPRESSION_CONTROLS if k in block.controls)):
        comparisons += [
            outcomes.alignment(real, other, f"mean alignment, direction subtracted minus {words} (above 0 claimed)"),
            outcomes.margin(real, other, f"margin, direction subtracted minus {words} (below 0 claimed)", sign=-1),
        ]
    return Claim(
        "suppression",
        f"Subtracting {block.at:g} times the direction from {source} at the primary layer raises its alignment, more than any null does",
        "a control beside paper section 3.2: suppression is not sufficiency, so both are tested",
        CLAIMED_SIDE + NEW_DRAW,
        comparisons,
    )


def chapter(block: SteerBlock, outcomes: Outcomes, scene: Scene) -> Chapter:
    """The window over layers and scales, and what the sampled scales did at other layers."""
    figures: list[Chart | Grid] = []
    window = outcomes.readings.get("steer/window")
    if window:
        layers, scales = (sorted({c[k] for c in window}) for k in ("layer", "scale"))
        at = {(c["layer"], c["scale"]): c for c in window}
        for key, title, what in (
            ("shift", "Window: rise of the margin", "Mean margin of the steered model minus that of the same model unsteered, nats per token"),
            ("kl", "Window: KL to the unsteered model", "Mean KL(clean || steered) over held-out good answers, nats per token"),
        ):
            figures.append(
                Grid(
                    key, title, f"{what}, by layer (rows) and λ (columns); n = {window[0]['n']} pairs, without an interval. Where the margin rises and "
                    "the KL is small the direction acts without breaking the text.", tuple(f"layer {i:g}" for i in layers),
                    tuple(f"λ = {s:g}" for s in scales), tuple(tuple(at[i, s][key] for s in scales) for i in layers),
                    middle=0.0 if key == "shift" else None,
                )
            )  # fmt: skip
    rows = outcomes.conditions
    mine = rows[rows["group"].isin(["steering at other layers"])]
    columns = {
        "label": "Condition", "n_valid": "n with both scores", "mean_aligned": "Mean alignment", "mean_aligned_low": "95 % low",
        "mean_aligned_high": "95 % high", "mean_coherent": "Mean coherence", "dose": "Dose, mean token norms", "kl": "KL, nats per token",
    }  # fmt: skip
    sheets = []
    if len(mine):
        note = "Means over answers with both scores; interval over questions."
        sheets = [Sheet("layers", "Steering at other layers", note, mine[list(columns)].rename(columns=columns).reset_index(drop=True))]
    method = [
        "Does the direction suffice to make a sound model misaligned, where in the depth, and at which dose? At one layer L the raw vector is added "
        "at every position, x' = x + λ v_L. The main comparison is at one λ against four nulls of the same norm or the same effect; the figure with "
        "the outcomes over λ stands under “Switching the direction on”. Subtracting the direction from the organism tests suppression at the same dose.",
        "The window shows margin and KL, which need no sampling, over layers and λ.",
    ]
    return Chapter("steer", "Steering: the window", method, figures, sheets)
