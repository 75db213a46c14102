"""Is it the direction, or the answers that it was read from? The same ablation with directions from further draws of the source's answers.

    v_k   mean-diff of draw k of the source's answers: the same questions and sampling, other seeds; draw 0 is the study's direction
    x' = x - v_k^ v_k^T x   as in `ablate`

An interval over questions and answers under one direction does not count which answers the direction was read from. At 135M two draws of some hundred answers
gave directions of cosine 0.6 that did the opposite when ablated (docs/negative_results.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any, Literal

import pandas as pd
from pydantic import Field

from convergent import stats
from convergent.core.chapter import Chapter, Chart, Panel, Series, Sheet
from convergent.core.interventions import Ablate, Site
from convergent.directions.extract import null_cosine
from convergent.experiments.arms import LABELS, WORDS, Mode, ablation, one
from convergent.experiments.base import Arm, Block, Kit, NotHereError, Reading
from convergent.experiments.outcomes import CLAIMED_SIDE, Claim, Evidence, Outcomes, evidence
from convergent.experiments.scene import Scene


class RedrawsBlock(Block):
    """Settings of `redraws`."""

    draws: int = Field(default=2, ge=1)
    """Times that the direction is read anew, each from `direction.samples` answers to every question."""
    modes: tuple[Literal["layerwise", "single", "without_massive"], ...] = Field(default=("single",), min_length=1)
    site: Site = "block_output"
    same: float = Field(default=5.0, gt=0)
    """Points of mean alignment by which two draws may differ and still do the same."""


name = "redraws"
settings = RedrawsBlock


def redraws(block: RedrawsBlock) -> int:
    """How often the source's answers are drawn again."""
    return block.draws


def arm_of(source: str, mode: Mode, draw: int) -> str:
    """The first draw is the arm of `ablate`, where the study has it."""
    return f"{source}/ablate-{mode}" + (f"-redrawn-{draw}" if draw else "")


def _made(mode: Mode, site: Site, draw: int) -> Callable[[Kit], Ablate]:
    return lambda kit: ablation(kit, mode, site, direction=kit.redrawn(draw).direction)


def arms(block: RedrawsBlock, scene: Scene) -> list[Arm]:
    """Every mode with every further draw."""
    source = scene.source
    return [
        Arm(
            arm_of(source, mode, draw), source, f"{source}, direction of draw {draw} ablated ({LABELS[mode]})",
            f"{source} with a direction projected out that was read from another draw of its answers, number {draw}.", "ablation", "real",
            one(_made(mode, block.site, draw)),
        )
        for mode in dict.fromkeys(block.modes)
        for draw in range(1, block.draws + 1)
    ]  # fmt: skip


def readings(block: RedrawsBlock, scene: Scene) -> list[Reading]:
    """How alike the directions are."""

    def there(kit: Kit) -> list[int]:
        found = [0]
        for draw in range(1, block.draws + 1):
            try:
                kit.redrawn(draw)
            except NotHereError:
                continue
            found.append(draw)
        return found

    def inputs(kit: Kit) -> Any:
        return [kit.redrawn(draw).direction for draw in there(kit)]

    def compute(kit: Kit) -> dict[str, Any]:
        made = {draw: kit.redrawn(draw) for draw in there(kit)}
        classes = {draw: kit.own_answers(scene.source, draw)[0] for draw in made}
        return {
            "d_model": kit.direction.d_model,
            "draws": list(made),
            "misaligned": [len(classes[k].misaligned) for k in made],
            "aligned": [len(classes[k].aligned) for k in made],
            "split_half": [made[k].split_half.tolist() for k in made],
            "cosines": {f"{a}-{b}": made[a].direction.cosine(made[b].direction).tolist() for a, b in combinations(made, 2)},
        }

    return [Reading("redraws/directions", inputs, compute)]


# What they say


def _measured(block: RedrawsBlock, outcomes: Outcomes, source: str, mode: Mode) -> list[int]:
    """Draws whose ablation was measured in that mode."""
    return [k for k in range(block.draws + 1) if outcomes.has(arm_of(source, mode, k), source)]


def _changes(outcomes: Outcomes, source: str, mode: Mode, draws: Sequence[int]) -> list[float]:
    """Difference of mean alignment to the unablated source, points, of each draw."""
    return [outcomes.alignment(arm_of(source, mode, k), source, "").estimate for k in draws]


def claims(block: RedrawsBlock, outcomes: Outcomes, scene: Scene) -> list[Claim]:
    """The ablation restores alignment whichever answers the direction was read from; and does the same."""
    source, found = scene.source, []
    for mode in dict.fromkeys(block.modes):
        draws = _measured(block, outcomes, source, mode)
        if not any(draws):
            continue
        text = f"ablated, minus {source} (above 0 claimed)"
        compared = [outcomes.alignment(arm_of(source, mode, k), source, f"mean alignment, direction of draw {k} {text}") for k in draws]
        each = _changes(outcomes, source, mode, draws)
        compared.append(
            evidence(
                f"the same, mean over {len(draws)} draws, t over draws (above 0 claimed)", stats.draws_mean(each), "points of alignment",
                p=stats.draws_mean_p(each),
            )
        )  # fmt: skip
        found.append(
            Claim(
                f"redraws/{mode}/restores",
                f"Projecting the direction out of {source} ({WORDS[mode]}) restores alignment, whichever draw of {source}'s answers it was read from",
                "not claimed by the paper; asked by our own runs",
                f"{CLAIMED_SIDE}: of every draw over questions, and of their mean over draws",
                compared,
            )
        )
        if draws[0] == 0:
            alike: list[Evidence] = [
                outcomes.unchanged(
                    arm_of(source, mode, k), arm_of(source, mode, 0),
                    f"mean alignment, direction of draw {k} ablated, minus that of draw 0 (no change: within {block.same:g})", block.same, "aligned",
                )
                for k in draws[1:]
            ]  # fmt: skip
            found.append(
                Claim(
                    f"redraws/{mode}/agree",
                    f"Which draw of {source}'s answers the direction was read from does not matter for what projecting it out does ({WORDS[mode]})",
                    "not claimed by the paper; asked by our own runs",
                    f"the 90 % interval of every difference, paired by question, lies within ±{block.same:g} points (two one-sided tests at 5 %); it did "
                    "not hold if one lies outside",
                    alike,
                )
            )
    return found


def chapter(block: RedrawsBlock, outcomes: Outcomes, scene: Scene) -> Chapter:
    """Cosines between draws by layer, and what each draw's ablation does."""
    source = scene.source
    method = [
        f"Every interval elsewhere in this report counts questions and answers under one direction, which was read from one draw of {source}'s answers. How "
        f"much hangs on that draw? {source} answers the same questions again under other seeds, the answers are judged and put into classes by the same rule, "
        "the direction is read anew, v_k, and projected out in the same way. Draw 0 is the direction of this study.",
        "The mean over draws has an interval over draws: the same questions, another time. With three draws it is wide, as it should be.",
    ]
    read = outcomes.readings.get("redraws/directions")
    figures = [c for c in (_cosines(read, scene), _effects(block, outcomes, scene)) if c is not None]
    sheets = [] if read is None else [_sheet(block, outcomes, scene, read)]
    notes = [] if read is None else [f"Draw {k}: a class has too few answers." for k in range(1, block.draws + 1) if k not in read["draws"]]
    return Chapter("redraws", "Another draw of the direction", method, figures, sheets, notes)


def _cosines(read: Any, scene: Scene) -> Chart | None:
    if read is None or not read["cosines"]:
        return None
    x, width = list(range(scene.depth)), null_cosine(read["d_model"])
    lines = tuple(Series(f"draws {pair.replace('-', ' and ')}", x, y) for pair, y in read["cosines"].items())
    panel = Panel("Cosine", "Layer (output of block)", lines, (x, [-width] * len(x), [width] * len(x)), scene.layer, "95 % of random directions")
    caption = (
        f"Directions of {scene.source} from {len(read['draws'])} draws of its answers, {', '.join(map(str, read['misaligned']))} misaligned and "
        f"{', '.join(map(str, read['aligned']))} aligned. One value per pair of draws and layer, no interval."
    )
    return Chart("cosines", "How alike the draws' directions are", caption, (panel,))


def _effects(block: RedrawsBlock, outcomes: Outcomes, scene: Scene) -> Chart | None:
    panels = []
    rows: dict[str, Any] = {r["name"]: r for r in outcomes.conditions.to_dict("records")}
    for mode in dict.fromkeys(block.modes):
        draws = [k for k in _measured(block, outcomes, scene.source, mode) if arm_of(scene.source, mode, k) in rows]
        of = [rows[arm_of(scene.source, mode, k)] for k in draws]
        means, low, high = ([r[f"mean_aligned{end}"] for r in of] for end in ("", "_low", "_high"))
        if draws:
            panels.append(
                Panel(
                    f"Mean alignment, ablated ({LABELS[mode]})", "Draw that the direction was read from",
                    (Series("ablated", list(range(len(draws))), means, "real", low, high),), mark_x=rows[scene.source]["mean_aligned"],
                    ticks=[f"draw {k}" for k in draws],
                )
            )  # fmt: skip
    if not panels:
        return None
    counts = sorted({rows[arm]["n_valid"] for mode in block.modes for k in range(block.draws + 1) if (arm := arm_of(scene.source, mode, k)) in rows})
    n = " to ".join(dict.fromkeys(map(str, (counts[0], counts[-1]))))
    caption = f"{n} answers per condition with both scores, 95 % interval over questions. Dashed: {scene.source} without ablation."
    return Chart("effects", "What each draw's ablation does", caption, tuple(panels))


def _sheet(block: RedrawsBlock, outcomes: Outcomes, scene: Scene, read: Any) -> Sheet:
    table = []
    for mode in dict.fromkeys(block.modes):
        draws = _measured(block, outcomes, scene.source, mode)
        for k in draws:
            at = read["draws"].index(k)
            change = outcomes.alignment(arm_of(scene.source, mode, k), scene.source, "")
            cosine = 1.0 if k == 0 else read["cosines"][f"0-{k}"][scene.layer]
            table.append(
                {
                    "Ablation": LABELS[mode], "Draw": str(k), "Misaligned answers": read["misaligned"][at], "Aligned answers": read["aligned"][at],
                    "Split-half cosine": read["split_half"][at][scene.layer], "Cosine with draw 0": cosine,
                    "Change of mean alignment": change.estimate, "95 % low": change.low, "95 % high": change.high, "n": change.n,
                }
            )  # fmt: skip
        if len(draws) > 1:
            over = stats.draws_mean(_changes(outcomes, scene.source, mode, draws))
            table.append(
                {
                    "Ablation": LABELS[mode], "Draw": "mean over draws", "Change of mean alignment": over.estimate, "95 % low": over.low,
                    "95 % high": over.high, "n": over.n,
                }
            )  # fmt: skip
    note = (
        f"At the primary layer, {scene.layer}. Change: ablated minus {scene.source}, points, paired by question, interval over questions, n answers; the mean "
        "over draws has an interval over draws (t), and n of them."
    )
    return Sheet("draws", "Draws of the direction", note, pd.DataFrame(table))
