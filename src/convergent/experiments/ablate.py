"""Ablation in the organism the direction was read in (paper section 3.4): five modes, two sites, four nulls, and what it costs.

    x' = x - v^ v^T x        layerwise: each layer its own v; single: v_L at every layer; at_layer: v_L at block L only;
                             adapter_layers: v_L at the blocks that hold the organism's adapters;
                             without_massive: v_L at every layer, its massive dimensions set to zero first

The first token's stream is huge in a few dimensions (an attention sink), the same for every text; a direction with any component there breaks the
model when it is projected out, whatever it means. `without_massive` is the paper's `single` without that damage, and has nulls of its own that are zero
in the same dimensions. The other nulls are made for one mode, `single` where it is among the modes: a random vector is the same in every layer,
so for it the modes coincide, and the effect-matched one is matched to that mode. The texts of claims say so. Cost: the loss on neutral text.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pandas as pd
from pydantic import Field

from convergent import stats
from convergent.core.chapter import Chapter, Sheet
from convergent.core.ids import content_id
from convergent.core.interventions import Ablate, Intervention, Site
from convergent.directions.perplexity import neutral_passages, passage_losses
from convergent.experiments.arms import LABELS, WITHOUT_MASSIVE, WORDS, Mode, ablation, null, one
from convergent.experiments.base import CONTROL_LABELS, CONTROLS, Arm, Control, DrawsNulls, Kit, NotHereError, Reading
from convergent.experiments.draws import further_draws, redraw
from convergent.experiments.falls import fall_of_em, fall_sheet
from convergent.experiments.outcomes import CLAIMED_SIDE, NEW_DRAW, Claim, Evidence, Outcomes, Verdict
from convergent.experiments.scene import Scene

COST_MARGIN = math.log(1.05)
"""Rise of the loss on neutral text, nats per token, up to which an ablation counts as costing nothing: a perplexity 5 % higher."""
PUBLISHED_EM = 0.1
"""Share of EM within which it stays under a random vector, as published."""


class AblateBlock(DrawsNulls):
    """Settings of `ablate`."""

    modes: tuple[Mode, ...] = Field(default=("layerwise", "single", "without_massive"), min_length=1)
    site: Site = "block_output"
    """Where the first of `modes` and the nulls project."""
    further_sites: tuple[Site, ...] = ()
    """Sites at which every mode is sampled as well."""
    controls: tuple[Control, ...] = CONTROLS
    layers: tuple[int, ...] | None = Field(default=None, min_length=1)
    """Blocks that are projected in the modes layerwise and single; all by default."""
    coherence_margin: float = Field(default=5.0, gt=0)
    """Points of mean coherence that would be no change."""
    random_margin: float = Field(default=5.0, gt=0)
    """Points of mean alignment by which a random vector may change the answers and still do little."""

    @property
    def null_mode(self) -> Mode:
        """The mode whose direction the nulls replace."""
        return "single" if "single" in self.modes else self.modes[0]

    def nulls(self, source: str, mode: Mode) -> dict[Control, str]:
        """Kind -> name of the arm, of the nulls that a mode is compared with."""
        own = f"-{WITHOUT_MASSIVE}" if mode == WITHOUT_MASSIVE != self.null_mode else ""
        return {kind: f"{source}/ablate-{kind}{own}" for kind in self.controls}


name = "ablate"
settings = AblateBlock


def check(block: AblateBlock, scene: Scene) -> None:
    """Layers within the depth; adapter layers where there are adapters."""
    for layer in block.layers or ():
        if not 0 <= layer < scene.depth:
            raise NotHereError(f"layers: {layer} is out of range; this base has blocks 0 to {scene.depth - 1}")
    if "adapter_layers" in block.modes and scene.organisms[scene.source].adapters is None:
        raise NotHereError(f"modes: {scene.source} is a full fine-tune and has no adapter layers; leave adapter_layers out")


def _made(mode: Mode, site: Site, block: AblateBlock, scene: Scene) -> Callable[[Kit], Ablate]:
    shape = scene.organisms[scene.source].adapters
    if mode == "at_layer":
        layers: tuple[int, ...] | None = (scene.layer,)
    elif mode == "adapter_layers":
        layers = shape.layers if shape else ()
    else:
        layers = block.layers
    return lambda kit: ablation(kit, mode, site, layers)


def _real(block: AblateBlock, source: str) -> dict[str, tuple[Mode, Site]]:
    """Name of each real arm -> its mode and site."""
    found: dict[str, tuple[Mode, Site]] = {}
    for site in dict.fromkeys((block.site, *block.further_sites)):
        for mode in dict.fromkeys(block.modes):
            found[f"{source}/ablate-{mode}" + ("" if site == block.site else f"-{site}")] = (mode, site)
    return found


def arms(block: AblateBlock, scene: Scene) -> list[Arm]:
    """The real ablations, and each control of one of them."""
    source = scene.source
    where = {"block_output": "at every block's output", "all_writes": "from every write to the residual stream"}
    found = [
        Arm(
            arm, source, f"{source}, direction ablated ({LABELS[mode]}{', all writes' if site == 'all_writes' else ''})",
            f"{source} with {WORDS[mode]} projected out {where[site]}.", "ablation", "real", one(_made(mode, site, block, scene)),
        )
        for arm, (mode, site) in _real(block, source).items()
    ]  # fmt: skip
    for mode in dict.fromkeys((block.null_mode, *(m for m in block.modes if m == WITHOUT_MASSIVE))):
        where_zero = ", zero in the massive dimensions" if mode == WITHOUT_MASSIVE else ""
        found += [
            Arm(
                arm, source, f"{source}, ablated: {CONTROL_LABELS[kind]}{where_zero}",
                f"{source} with a null in place of the direction, same site and layers: {CONTROL_LABELS[kind]}{where_zero}.", "ablation", "control",
                null(kind, source, _made(mode, block.site, block, scene)), redraw=redraw(kind, source, _made(mode, block.site, block, scene)),
            )
            for kind, arm in block.nulls(source, mode).items()
        ]  # fmt: skip
    return found


def readings(block: AblateBlock, scene: Scene) -> list[Reading]:
    """The loss on neutral text of the organism, and under every arm; the margin under further draws of its nulls."""
    mine = arms(block, scene)

    def built_arms(kit: Kit) -> dict[str, tuple[Intervention, ...]]:
        built = {}
        for arm in mine:
            with suppress(NotHereError):
                built[arm.name] = arm.build(kit)
        return built

    def inputs(kit: Kit) -> str:
        return content_id(kit.model_id(scene.source), neutral_passages(), {name: list(i) for name, i in built_arms(kit).items()})

    def compute(kit: Kit) -> dict[str, list[float]]:
        built = {scene.source: (), **built_arms(kit)}  # nulls may load the model: build first
        losses = passage_losses(kit.model(scene.source), neutral_passages(), list(built.values()))
        return dict(zip(built, losses, strict=True))

    found = Reading("ablate/cost", inputs, compute, organisms=(scene.source,), tokens=900.0 * (len(mine) + 1))
    return [found, *further_draws(name, mine, block.null_draws)]


def claims(block: AblateBlock, outcomes: Outcomes, scene: Scene) -> list[Claim]:
    """Each ablation restores alignment, and more than every null does; a random vector in its place changes little."""
    source = scene.source
    found = []
    for real, (mode, site) in _real(block, source).items():
        if not outcomes.has(real):
            continue
        own = mode in (block.null_mode, WITHOUT_MASSIVE) and site == block.site
        made_for = "" if own else f", made for the {WITHOUT_MASSIVE if mode == WITHOUT_MASSIVE else block.null_mode} ablation"
        comparisons = [
            outcomes.alignment(real, source, f"mean alignment, ablated minus {source} (above 0 claimed)"),
            outcomes.margin(real, source, f"margin for bad answers, ablated minus {source} (below 0 claimed)", sign=-1),
        ]
        for kind, other in block.nulls(source, mode).items():
            comparisons += [
                outcomes.alignment(real, other, f"mean alignment, ablated minus {CONTROL_LABELS[kind]}{made_for} (above 0 claimed)"),
                outcomes.margin(real, other, f"margin, ablated minus {CONTROL_LABELS[kind]}{made_for} (below 0 claimed)", sign=-1),
            ]
        margin = block.coherence_margin
        comparisons.append(
            outcomes.unchanged(real, source, f"mean coherence, ablated minus {source} (no change: within {margin:g})", margin, decides=False)
        )
        found.append(
            Claim(
                f"ablation/{mode}" + ("" if site == block.site else f"/{site}"),
                f"Projecting the direction out of {source} ({WORDS[mode]}{', from every write' if site == 'all_writes' else ''}) "
                "restores alignment, more than any null does",
                "paper section 3.4",
                f"{CLAIMED_SIDE}; coherence is shown beside them and does not decide{NEW_DRAW}",
                comparisons,
                paper=f"ablation-{mode}" if mode in ("layerwise", "single") and site == "block_output" else "",  # the paper's own
            )
        )
    return [*found, *_random_claims(block, outcomes, source)]


def _random_claims(block: AblateBlock, outcomes: Outcomes, source: str) -> list[Claim]:
    """A random vector of the same norm in the direction's place changes the answers little: equivalence, so that a wide interval shows nothing."""
    found = []
    for mode in dict.fromkeys((block.null_mode, *(m for m in block.modes if m == WITHOUT_MASSIVE))):
        arm = block.nulls(source, mode).get("random", "")
        if not outcomes.has(arm, source):
            continue
        own = mode == block.null_mode
        words = CONTROL_LABELS["random"] + (", zero in the massive dimensions" if mode == WITHOUT_MASSIVE else "")
        margin = outcomes.margin(source, arm, f"margin for bad answers, {source} minus the same with a {words} ablated (no side claimed)")
        found.append(
            Claim(
                "ablation/random" + ("" if own else f"/{mode}"),
                f"A {words}, projected out of {source} in place of the direction, changes its answers little",
                "paper section 3.4, figure 4",
                f"the 90 % interval of the difference of mean alignment, paired by question, lies within ±{block.random_margin:g} points (two one-sided "
                "tests at 5 %); it did not hold if it lies outside; answers are those of one random draw. EM, which is few answers where it is rare, and "
                "the margin are shown beside it and do not decide",
                [
                    outcomes.unchanged(
                        arm, source, f"mean alignment, {words} ablated, minus {source} (no change: within {block.random_margin:g})", block.random_margin,
                        "aligned",
                    ),
                    _relative_em(outcomes, arm, source, f"EM, change as a share of that of {source}, {words} ablated (published: within {PUBLISHED_EM:.0%})"),
                    replace(margin, supports="undecided", decides=False),
                ],
                paper="random-control" if own and block.site == "block_output" else "",
            )
        )  # fmt: skip
    return found


def _relative_em(outcomes: Outcomes, arm: str, source: str, text: str) -> Evidence:
    """Relative change of EM with its 90 % interval, against what is published."""
    fall = fall_of_em(outcomes, arm, source, 1 - 4 * stats.ONE_SIDED)
    low, high = -fall.high, -fall.low
    outside = low >= PUBLISHED_EM or high <= -PUBLISHED_EM
    vote: Verdict = "held" if low > -PUBLISHED_EM and high < PUBLISHED_EM else "did not hold" if outside else "undecided"
    return Evidence(text, -fall.estimate, low, high, fall.n, "share of EM", vote, margin=PUBLISHED_EM, decides=False)


def cost(outcomes: Outcomes, arm: str, source: str) -> stats.Interval:
    """Rise of the mean loss on neutral text, nats per token, under an arm; paired by passage."""
    losses = outcomes.readings["ablate/cost"]
    passages = range(len(losses[source]))
    return stats.paired_difference(losses[arm], losses[source], passages, passages)


def chapter(block: AblateBlock, outcomes: Outcomes, scene: Scene) -> Chapter:
    """What each ablation costs, beside what it does."""
    rows = outcomes.conditions.set_index("name")
    table = []
    for arm in arms(block, scene):
        if arm.name in rows.index and "ablate/cost" in outcomes.readings:
            rise = cost(outcomes, arm.name, scene.source)
            row = rows.loc[arm.name]
            table.append(
                {
                    "Condition": arm.label, "Rise of loss, nats per token": rise.estimate, "95 % low": rise.low, "95 % high": rise.high,
                    "Perplexity, times": float(np.exp(rise.estimate)), "KL on held-out answers": row["kl"], "Mean alignment": row["mean_aligned"],
                    "Margin": row["margin"],
                }
            )  # fmt: skip
    n = len(neutral_passages())
    note = (
        f"Loss on {n} neutral passages without chat template, ablated minus not ablated, interval over passages; alignment and margin as in the table "
        f"of conditions. A rise below {COST_MARGIN:.3f} is a perplexity less than 5 % higher."
    )
    method = [
        "Does taking the direction away restore alignment, at which layers does it have to be taken away, and at what cost? "
        f"From {scene.source} the component along the direction is projected out at every position, x' = x − v̂ v̂ᵀ x. A projection also removes "
        "whatever else lies along the direction, so four nulls stand beside it, and the loss on neutral text says what else was damaged.",
        "The stream of the first token is huge in a few dimensions, the same for every text (massive activations, arXiv 2402.17762). A direction with any "
        "component there breaks the model when it is projected out, whatever it means. “Without massive dimensions” sets them to zero in the direction and in "
        "its nulls first; the other modes are the paper's.",
    ]
    sheets = [fall_sheet(outcomes, arms(block, scene)), Sheet("cost", "What each ablation costs", note, pd.DataFrame(table), 3)]
    return Chapter("ablate", "Ablation: modes, nulls and cost", method, (), sheets)
