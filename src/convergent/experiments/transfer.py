"""The direction of one organism, ablated in others (paper section 3.4): sampled for the study's source, and as a full matrix by the margin.

    reduction of i in j = 1 - (m_j without v_i - m_chat) / (m_j - m_chat)        m: margin of a held-out pair, paired by pair

The matrix has every organism as source and as target, the good-advice twin's shift and the chat model's own direction on the source's texts as
further sources, and random directions as the null, several draws of them. If the diagonal is no better than the rest, the directions are one.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from itertools import product
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from convergent import stats
from convergent.core.chapter import Chapter, Grid, Sheet
from convergent.core.direction import Direction
from convergent.core.ids import content_id
from convergent.core.interventions import Ablate, Site
from convergent.experiments.arms import WITHOUT_MASSIVE, ablation, margins_under, null, one
from convergent.experiments.base import CONTROL_LABELS, Arm, Control, DrawsNulls, Kit, NotHereError, Reading
from convergent.experiments.draws import further_draws, redraw
from convergent.experiments.falls import fall_sheet
from convergent.experiments.outcomes import CLAIMED_SIDE, NEW_DRAW, Claim, Evidence, Outcomes, evidence
from convergent.experiments.scene import Scene

CHAT = "chat model on the source's texts"
NULLS: dict[str, Control] = {"random": "random", "another concept": "other_concept"}
DRAW = ", draw "
"""Between the name of a random null and the number of a further draw of it, from 2 on."""


class TransferBlock(DrawsNulls):
    """Settings of `transfer`."""

    organisms: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Organisms that the source's direction is ablated in and sampled from; every other one not trained on good advice by default."""
    modes: tuple[Literal["layerwise", "single", "without_massive"], ...] = Field(default=("single", "without_massive"), min_length=1)
    """As in `ablate`; the matrix is made in the last of them that this model has."""
    site: Site = "block_output"
    controls: tuple[Control, ...] = ("random",)
    matrix: bool = True
    """Whether the margin of every organism is measured under every organism's direction."""
    coherence_margin: float = Field(default=5.0, gt=0)
    """Points of mean coherence that would be no change."""


name = "transfer"
settings = TransferBlock


def targets(block: TransferBlock, scene: Scene) -> tuple[str, ...]:
    """The organisms that are sampled."""
    return tuple(dict.fromkeys(scene.others(scene.source) if block.organisms is None else block.organisms))


def check(block: TransferBlock, scene: Scene) -> None:
    """There must be another organism."""
    if not targets(block, scene):
        raise NotHereError("organisms: this study has no organism beside the source that could be transferred to; add one")


def arms(block: TransferBlock, scene: Scene) -> list[Arm]:
    """The source's direction ablated in each other organism, and the nulls."""
    source = scene.source

    found = []
    for o in targets(block, scene):
        for mode, end in _ends(block).items():
            how = "" if not end else f" ({mode.replace('_', ' ')})"
            make = _made(mode, block.site)
            found.append(
                Arm(
                    f"{o}/ablate-{source}{end}", o, f"{o}, direction of {source} ablated{how}",
                    f"Organism {o} with the direction read in {source} projected out{how}.", "transfer", "real", one(make),
                )
            )  # fmt: skip
            found += [
                Arm(
                    f"{o}/ablate-{kind}{end}", o, f"{o}, ablated: {CONTROL_LABELS[kind]}{how}",
                    f"Organism {o} with a null in place of the direction: {CONTROL_LABELS[kind]}{how}.", "transfer", "control", null(kind, o, make),
                    redraw=redraw(kind, o, make),
                )
                for kind in dict.fromkeys(block.controls)
            ]  # fmt: skip
    return found


def _ends(block: TransferBlock) -> dict[str, str]:
    """Mode -> what the names of its arms end in."""
    return {mode: f"-{mode}" if k else "" for k, mode in enumerate(dict.fromkeys(block.modes))}


def _made(mode: str, site: Site) -> Callable[[Kit], Ablate]:
    return lambda kit: ablation(kit, mode, site)


def readings(block: TransferBlock, scene: Scene) -> list[Reading]:
    """Margins under further draws of the nulls; of each organism under each direction, and of the chat model."""
    drawn = further_draws(name, arms(block, scene), block.null_draws)
    if not block.matrix:
        return drawn
    rows = (scene.source, *scene.others(scene.source))
    return [*drawn, *(_matrix_row(block, scene, o) for o in ("chat", *rows))]


def _sources(block: TransferBlock, scene: Scene, kit: Kit) -> dict[str, Ablate]:
    """Source -> its direction's ablation; organisms that have no direction of their own are left out."""
    found: dict[str, Direction] = {}
    for o in (scene.source, *scene.others(scene.source)):
        try:
            found[o] = kit.extraction(o, o).direction
        except NotHereError:
            continue
    found[CHAT] = kit.extraction(scene.source, "chat").direction
    mode = block.modes[-1]
    if mode == WITHOUT_MASSIVE:
        found = {o: d.without(list(kit.massive)) for o, d in found.items()}
    made = {o: Ablate(d, block.site, vector_layer=None if mode == "layerwise" else kit.layer) for o, d in found.items()}
    for label, kind in NULLS.items():
        for draw in range(block.null_draws if kind == "random" else 1):
            with suppress(NotHereError):  # no twin and no second domain: no other concept
                control = kit.control(kind, scene.source, made[scene.source], draw)
                assert isinstance(control, Ablate)
                made[f"{label}{DRAW}{draw + 1}" if draw else label] = control
    return made


def _matrix_row(block: TransferBlock, scene: Scene, target: str) -> Reading:
    def inputs(kit: Kit) -> str:
        return content_id(kit.model_id(target), kit.pairs, {} if target == "chat" else _sources(block, scene, kit))

    def compute(kit: Kit) -> dict[str, list[float]]:
        ablations = {} if target == "chat" else _sources(block, scene, kit)
        made = margins_under(kit, target, [(), *((a,) for a in ablations.values())])
        return dict(zip(("none", *ablations), made, strict=True))

    return Reading(f"transfer/{target}", inputs, compute, organisms=(target,), tokens=5000.0 * (3 + block.null_draws + len(scene.organisms)))


def reduction(readings: Any, target: str, source: str) -> stats.Interval:
    """Share of the target's rise of margin over the chat model that ablating the source's direction takes back; over held-out pairs."""
    own, chat = readings[f"transfer/{target}"], np.array(readings["transfer/chat"]["none"])
    pairs = range(len(chat))
    return stats.relative_reduction(np.array(own["none"]) - chat, _draws(own, source).mean(0) - chat, pairs, pairs)


def _draws(own: dict[str, list[float]], source: str) -> np.ndarray:
    """(n_draws, n_pairs) margins under a source's direction; a random one was drawn more than once."""
    return np.array([margins for s, margins in own.items() if s.partition(DRAW)[0] == source])


def _drops(readings: Any, target: str, source: str) -> np.ndarray:
    """(n_draws, n_pairs) how far ablating the source's direction lowers the target's margin, nats per token."""
    own = readings[f"transfer/{target}"]
    fall: np.ndarray = np.array(own["none"]) - _draws(own, source)
    return fall


def claims(block: TransferBlock, outcomes: Outcomes, scene: Scene) -> list[Claim]:
    """The transferred ablation restores alignment in each organism, more than the nulls do; and one's own direction does no better than another's."""
    source = scene.source
    found = []
    for o, (mode, end) in product(targets(block, scene), _ends(block).items()):
        real = f"{o}/ablate-{source}{end}"
        if not outcomes.has(real):
            continue
        comparisons = [
            outcomes.alignment(real, o, f"mean alignment, ablated minus {o} (above 0 claimed)"),
            outcomes.margin(real, o, f"margin for bad answers, ablated minus {o} (below 0 claimed)", sign=-1),
        ]
        for kind in block.controls:
            other = f"{o}/ablate-{kind}{end}"
            comparisons += [
                outcomes.alignment(real, other, f"mean alignment, ablated minus {CONTROL_LABELS[kind]} (above 0 claimed)"),
                outcomes.margin(real, other, f"margin, ablated minus {CONTROL_LABELS[kind]} (below 0 claimed)", sign=-1),
            ]
        margin = block.coherence_margin
        comparisons.append(outcomes.unchanged(real, o, f"mean coherence, ablated minus {o} (no change: within {margin:g})", margin, decides=False))
        found.append(
            Claim(
                f"transfer/{o}" + (f"/{mode}" if end else ""),
                f"The direction read in {source}{' without its massive dimensions' if mode == WITHOUT_MASSIVE else ''}, projected out of {o}, restores its "
                "alignment, more than a null does",
                "paper section 3.4",
                f"{CLAIMED_SIDE}; coherence is shown beside them and does not decide{NEW_DRAW}",
                comparisons,
                paper="" if mode == WITHOUT_MASSIVE else "transfer",
            )
        )
    return found + _matrix_claim(outcomes, scene)


def _matrix_claim(outcomes: Outcomes, scene: Scene) -> list[Claim]:
    """Off the diagonal the margin falls more than under random directions."""
    values = outcomes.readings
    rows = [o for o in (scene.source, *scene.others(scene.source)) if f"transfer/{o}" in values]
    crossed = [(o, s) for o in rows for s in rows if s != o and s in values[f"transfer/{o}"]]
    if not crossed:
        return []
    pairs = range(len(values[f"transfer/{rows[0]}"]["none"]))

    def mean(cells: list[tuple[str, str]]) -> np.ndarray:
        """(n_draws, n_pairs) mean over cells."""
        found: np.ndarray = np.mean([_drops(values, o, s) for o, s in cells], axis=0)
        return found

    away, unit = mean(crossed)[0], "nats per token"
    controls = {label: mean([(o, label) for o in rows]) for label in (*NULLS, CHAT) if all(label in values[f"transfer/{o}"] for o in rows)}
    own = [(o, o) for o in rows if o in values[f"transfer/{o}"]]
    comparisons: list[Evidence] = [
        evidence(
            "fall of the margin under the directions of other organisms (above 0 claimed)", stats.clustered_mean(away, pairs), unit,
            p=stats.one_sided_p(away, 0 * away, pairs, pairs, 1),
        )
    ]
    for label, draws in controls.items():
        text = f"the same, minus under {label} (above 0 claimed)"
        if len(draws) > 1:
            d, p = stats.draws_difference(away, list(draws), pairs, pairs), stats.draws_p(away, list(draws), pairs, pairs)
            comparisons.append(evidence(f"{text}, against a new draw ({len(draws)} drawn)", d, unit, p=p))
        else:
            d, p = stats.paired_difference(away, draws[0], pairs, pairs), stats.one_sided_p(away, draws[0], pairs, pairs)
            comparisons.append(evidence(text, d, unit, p=p))
    if own:
        gap = stats.paired_difference(mean(own)[0], away, pairs, pairs)
        words = ", ".join(f"{o}: {reduction(values, o, o).estimate:.0%}" for o, _ in own)
        comparisons.append(
            Evidence(
                f"own direction minus others' (no side claimed; reductions by the own one {words})", gap.estimate, gap.low, gap.high, gap.n, unit,
                "undecided", decides=False,
            )
        )
    return [
        Claim(
            "transfer/matrix",
            f"Any organism's direction, projected out of any other of the {len(rows)}, lowers its margin for bad answers, more than a random direction, "
            "another concept and the chat model's own direction do",
            "paper section 3.4, as a full matrix with the controls that it lacks",
            f"every listed difference for which a side is claimed has its 95 % interval on the claimed side of 0{NEW_DRAW}",
            comparisons,
        )
    ]


def chapter(block: TransferBlock, outcomes: Outcomes, scene: Scene) -> Chapter:
    """The matrix."""
    values = outcomes.readings
    rows = [o for o in (scene.source, *scene.others(scene.source)) if f"transfer/{o}" in values]
    figures, sheets = [], [fall_sheet(outcomes, arms(block, scene))]
    if rows and "transfer/chat" in values:
        columns = [s for s in values[f"transfer/{rows[0]}"] if s != "none" and DRAW not in s]
        n = len(values["transfer/chat"]["none"])
        how = block.modes[-1].replace("_", " ")
        cells = tuple(tuple(float(_drops(values, o, s).mean()) for s in columns) for o in rows)
        figures.append(
            Grid(
                "matrix", "Fall of the margin, by organism and by ablated direction",
                f"Rows: organism; columns: whose direction is projected out ({how}). Mean over n = {n} held-out pairs, nats per token; above 0 the organism "
                f"prefers bad answers less. The last columns are controls; random: mean of {block.null_draws} draws.", tuple(rows), tuple(columns), cells,
            )
        )  # fmt: skip
        table = []
        for o in rows:
            for s in columns:
                r = reduction(values, o, s)
                table.append({"Organism": o, "Direction of": s, "Relative reduction": r.estimate, "95 % low": r.low, "95 % high": r.high, "n pairs": n})
        note = (
            "Share of the organism's rise of margin over the chat model that the ablation takes back (1 is all of it), by Fieller's theorem over held-out "
            "pairs; not measured where the rise itself is not clear of zero. Published: 90 % (all-adapter medical) and 78 % (all-adapter sport) of EM."
        )
        sheets.append(Sheet("reductions", "Relative reductions", note, pd.DataFrame(table)))
    method = [
        "Is it one direction? The direction read in one organism is projected out of another, trained with other adapters or on other data. The main "
        "comparison samples answers; the matrix uses the margin, which needs none, for every pair of organisms, and has as controls a random direction, "
        "what good advice shifts, and the same mean-diff read in the chat model on the source's texts.",
    ]
    return Chapter("transfer", "Transfer between organisms", method, figures, sheets)
