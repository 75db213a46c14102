"""Dynamics: what happens during training, in the weights and in what the model does (companion paper arXiv 2506.11613, on phase transitions).

At each kept step the adapters' A and B are put into the chat model as they were then. The good-advice twin is trained on the same questions with the same
recipe and seed, so whatever it shows too is training, not misalignment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pandas as pd
from pydantic import Field, field_validator

from convergent import stats
from convergent.core.chapter import Chapter, Chart, Panel, Role, Series, Sheet
from convergent.core.interventions import Intervention
from convergent.directions.margin import margins
from convergent.experiments.base import Arm, Block, Build, Kit, NotHereError, Reading
from convergent.experiments.outcomes import Claim, Evidence, Outcomes, evidence
from convergent.experiments.scene import Scene
from convergent.organisms.steps import KeptSteps, Spacing

ALARM = 0.05
"""Rate of false alarms at which a change counts as found."""
CURVES = {"margin": "Margin", "matched": "Margin, length-matched", "projection": "Projection on the final direction"}


class DynamicsBlock(Block):
    """Settings of `dynamics`."""

    organism: str | None = None
    """The organism whose training is followed; the source of the direction by default."""
    twin: str | None = None
    """Its good-advice twin; that of `plain` by default."""
    points: int = Field(default=16, ge=4, le=200)
    """Training is kept at its start and after so many equal parts."""
    every: int | None = Field(default=None, ge=1)
    """Every so many optimizer steps instead."""
    window: int = Field(default=2, ge=1)
    """Kept steps on either side of a point whose ways are compared by the local cosine."""
    sampled: tuple[float, ...] = (0.25, 0.5)
    """Shares of training at which answers are sampled and judged; the end is the organism itself."""
    sample_twin: bool = False
    """Sample the twin at these shares too."""

    @field_validator("sampled")
    @classmethod
    def _inside(cls, shares: tuple[float, ...]) -> tuple[float, ...]:
        wrong = next((i for i, s in enumerate(shares) if not 0 < s < 1), None)
        if wrong is not None:
            raise ValueError(f"{wrong}: {shares[wrong]:g} is no share of the training before its end; give numbers between 0 and 1")
        return tuple(dict.fromkeys(shares))

    @property
    def spacing(self) -> Spacing:
        """Which steps are kept."""
        return Spacing(self.points, self.every)


name = "dynamics"
settings = DynamicsBlock


def _followed(block: DynamicsBlock, scene: Scene) -> tuple[str, ...]:
    """The organism, and its twin if there is one."""
    organism, twin = block.organism or scene.source, block.twin or scene.twin
    return (organism,) if twin is None else (organism, twin)


def check(block: DynamicsBlock, scene: Scene) -> None:
    """The chat model has not been trained; an organism is not its own twin."""
    followed = _followed(block, scene)
    if "chat" in followed:
        raise NotHereError("organism: the chat model was not trained here, so there is no training to follow; name an organism")
    if len(set(followed)) < len(followed):
        raise NotHereError(f"twin: {followed[0]} is the organism itself; name its good-advice twin")


def keeps(block: DynamicsBlock, scene: Scene) -> dict[str, Spacing]:
    """Both trainings keep their steps."""
    return dict.fromkeys(_followed(block, scene), block.spacing)


def arms(block: DynamicsBlock, scene: Scene) -> list[Arm]:
    """The chat model with the adapters of some steps."""
    followed = _followed(block, scene)
    found: list[Arm] = []
    for o in followed if block.sample_twin else followed[:1]:
        role: Role = "real" if o == followed[0] else "control"
        for share in block.sampled:
            label, text = f"{o} at {share:.0%} of its training", f"The chat model with the adapters of {o} as they were after {share:.0%} of its training."
            found.append(Arm(_arm(o, share), "chat", label, text, "dynamics", role, _at(o, share, block.spacing)))
    return found


def _arm(organism: str, share: float) -> str:
    return f"{organism}/at-{100 * share:g}%"


def _at(organism: str, share: float, spacing: Spacing) -> Build:
    def build(kit: Kit) -> tuple[Intervention, ...]:
        return tuple(a.low_rank() for a in kit.steps(organism, spacing).at(share))

    return build


def readings(block: DynamicsBlock, scene: Scene) -> list[Reading]:
    """Per training: the weights at the kept steps, and what a model with them does."""
    followed = _followed(block, scene)
    found = []
    for o in followed:
        found += [
            Reading(f"dynamics/weights/{o}", _weights_inputs(o, block), _weights(o, block)),
            Reading(
                f"dynamics/curves/{o}", _curves_inputs(o, followed[0], block), _curves(o, followed[0], block), organisms=("chat",),
                tokens=(block.points + 1) * 16 * 2 * 110.0,
            ),
        ]  # fmt: skip
    return found


def _weights_inputs(organism: str, block: DynamicsBlock) -> Any:
    return lambda kit: [kit.model_id(organism), block.spacing, block.window]


def _weights(organism: str, block: DynamicsBlock) -> Any:
    def compute(kit: Kit) -> dict[str, Any]:
        kept = kit.steps(organism, block.spacing)
        return {"steps": kept.steps, "time": kept.time, **weights_read(kept, block.window, organism)}

    return compute


def weights_read(kept: KeptSteps, window: int, organism: str) -> dict[str, Any]:
    """Norms of A and B per adapter and step, their local cosines, and where their paths change direction. JSON-ready."""
    found: dict[str, Any] = {"adapters": [f"{a.layer} {a.module}" for a in kept.adapters[0]]}
    time, moves = _moving(kept.time)
    for side in ("a", "b"):
        # (n_adapters) paths of shape (n_steps, n_numbers).
        paths = [np.stack([getattr(step[i], side).double().numpy().ravel() for step in kept.adapters]) for i in range(len(found["adapters"]))]
        found[f"norm_{side}"] = [np.linalg.norm(p, axis=1).tolist() for p in paths]
        found[f"cosine_{side}"] = [stats.local_cosine(p, window).tolist() for p in paths]
        together = (np.concatenate(paths, axis=1), *paths)
        changes = [stats.change_point(time[moves], p[moves], f"{organism} {side} {i}") for i, p in enumerate(together)]
        found[f"change_{side}"] = [None if c is None else {**asdict(c), "index": int(moves[c.index])} for c in changes]
    return found


def _moving(time: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """(times, points to use): where the rate is 0, as in the first step of a warm-up, time stands still, and the second point of the two is left out."""
    t = np.array(time)
    return t, np.flatnonzero(np.diff(t, prepend=-1.0) > 0)


def _curves_inputs(organism: str, final: str, block: DynamicsBlock) -> Any:
    def inputs(kit: Kit) -> Any:
        direction = kit.extraction(final, final).direction
        return [kit.model_id("chat"), kit.model_id(organism), block.spacing, direction, kit.layer, kit.pairs]

    return inputs


def _curves(organism: str, final: str, block: DynamicsBlock) -> Any:
    def compute(kit: Kit) -> dict[str, Any]:
        kept, own = kit.steps(organism, block.spacing), kit.extraction(final, final)
        chat, unit = kit.model("chat"), float(own.token_norm[kit.layer])
        found: dict[str, Any] = {"steps": kept.steps, "time": kept.time, "pairs": [p.id for p in kit.pairs], **{c: [] for c in CURVES}}
        for adapters in kept.adapters:
            rows = margins(chat, kit.pairs, [[a.low_rank() for a in adapters]], read=(own.direction, kit.layer))
            found["margin"].append([m.margin for m in rows])
            found["matched"].append([m.margin_matched for m in rows])
            found["projection"].append([float(m.projection or 0.0) / unit for m in rows])
        # The shift: at step 0 every B is zero, and the model is the chat model.
        found["projection"] = [[x - y for x, y in zip(row, found["projection"][0], strict=True)] for row in found["projection"]]
        return found

    return compute


def _change(curves: dict[str, Any], what: str, organism: str) -> stats.ChangePoint | None:
    """Change of the mean curve over training time."""
    (time, moves), mean = _moving(curves["time"]), np.array(curves[what]).mean(1)
    found = stats.change_point(time[moves], mean[moves], f"{organism} {what}")
    return None if found is None else replace(found, index=int(moves[found.index]))


def claims(block: DynamicsBlock, outcomes: Outcomes, scene: Scene) -> list[Claim]:
    """What is learned is bad advice and not training; it comes suddenly; the B vectors turn."""
    organism, *twins = _followed(block, scene)
    curves = {o: c for o in (organism, *twins) if (c := outcomes.readings.get(f"dynamics/curves/{o}")) is not None}
    found = []
    if organism in curves:
        comparisons = [
            evidence(f"{CURVES[what].lower()}, {organism} at the end minus at the start (above 0 claimed)", _rise(curves[organism], what), unit)
            for what, unit in (("margin", "nats per token"), ("matched", "nats per token"), ("projection", "token norms"))
        ]
        comparisons += [
            evidence(f"the same less that of its twin {t}: {CURVES[what].lower()} (above 0 claimed)", _rise(curves[organism], what, curves[t]), unit)
            for t in twins if t in curves
            for what, unit in (("margin", "nats per token"), ("matched", "nats per token"), ("projection", "token norms"))
        ]  # fmt: skip
        found.append(
            Claim(
                "dynamics/learned",
                f"Training of {organism} moves the model towards bad answers and along its final direction, more than that of a good-advice twin does",
                "paper section 2 and companion paper",
                "every listed difference has its 95 % interval (over held-out pairs) above 0",
                comparisons,
            )
        )
        comparisons = []
        for o in curves:
            change = _change(curves[o], "matched", o)
            if change is not None:
                text = f"curves without a change that look as split as that of {o} (change at step {curves[o]['steps'][change.index]}): share"
                comparisons.append(_alarm(text, change.false_alarm, o == organism, change.after > change.before))
        found.append(
            Claim(
                "dynamics/sudden",
                f"Misalignment comes suddenly: the length-matched margin of {organism} changes its rate, beyond what the learning rate's schedule makes, and "
                "that of its twin does not (published for 14B, nine adapters: no misaligned answer before step 100 of 396, the end value after 250 to 350)",
                "companion paper; released checkpoints",
                f"held: under {ALARM:.0%} of curves without a change look as split and the rate rises, not so for the twin; undecided where no such change is "
                "found; did not hold if the twin shows one too",
                comparisons,
            )
        )
    turns = {o: c for o in (organism, *twins) if (c := (outcomes.readings.get(f"dynamics/weights/{o}") or {}).get("change_b", [None])[0]) is not None}
    if organism in turns:
        shown = []
        for o, c in turns.items():
            share = max((stats.Interval(**c[null]) for null in ("shuffled", "correlated")), key=lambda i: i.estimate)
            text = f"paths without a turn that look as split as the B vectors of {o} (turn of cosine {c['cosine']:.2f}): share"
            shown.append(_alarm(text, share, o == organism))
        found.append(
            Claim(
                "dynamics/turn",
                f"The B vectors of {organism} change their direction during training (published as a rotation), and those of its twin do not",
                "companion paper",
                f"held: under {ALARM:.0%} of paths without a turn look as split, more for the twin; undecided where none is found; "
                "did not hold if the twin turns too",
                shown,
            )
        )
    return found


def _rise(curves: dict[str, Any], what: str, less: dict[str, Any] | None = None) -> stats.Interval:
    """End minus start per pair, with an interval over pairs; less that of another training."""
    first, last = (np.array(curves[what][i]) for i in (0, -1))
    if less is not None:
        first, last = np.array(less[what][-1]) - np.array(less[what][0]), last - first
    return stats.paired_difference(last, first, curves["pairs"], curves["pairs"])


def _alarm(text: str, share: stats.Interval, claimed: bool, right_way: bool = True) -> Evidence:
    """A change is found where the share is under ALARM and it goes the `right_way`: one that slows down, or turns to good answers, is no sudden
    misalignment. Where none is found nothing is shown: for the organism that is undecided."""
    seen, unseen = share.high < ALARM and right_way, share.low > ALARM or (share.high < ALARM and not right_way)
    vote = ("held" if seen else "undecided") if claimed else ("did not hold" if seen else "held" if unseen else "undecided")
    if not right_way:
        text += " (its rate falls)"
    return Evidence(text, share.estimate, share.low, share.high, share.n, "random draws", vote)  # type: ignore[arg-type]


def chapter(block: DynamicsBlock, outcomes: Outcomes, scene: Scene) -> Chapter:
    """Outcomes and weights over the steps, with the changes found."""
    followed = _followed(block, scene)
    organism = followed[0]
    read = outcomes.readings
    curves = {o: read[f"dynamics/curves/{o}"] for o in followed if f"dynamics/curves/{o}" in read}
    weights = {o: read[f"dynamics/weights/{o}"] for o in followed if f"dynamics/weights/{o}" in read}
    roles: dict[str, Role] = {o: "real" if o == organism else "control" for o in followed}
    method = [
        f"When does {organism} become misaligned, and what do its weights do then? A and B of every adapter were kept at {_spacing(block)}. At each of these "
        "steps y = W h + scale · B_s (A_s h) was put into the chat model, which is then the organism of that moment, and read by teacher forcing: the margin "
        "for bad answers on held-out pairs, the same over equally many tokens of both answers, and the shift of the mean answer activation along the final "
        f"direction v of {organism} at layer {scene.layer}, (mean x_s − mean x_0) · v / |v|, in mean token norms.",
        f"Rotation: cos(B_s − B_s−k, B_s+k − B_s) with k = {block.window} kept steps. 1 is a straight path, a dip is a turn, 0 is what steps without any "
        "common direction give.",
        "Change-point: the split of a curve's rates, or of the updates of B, that best separates two means, time counted in learning rates, so that warm-up "
        "and decay make no change. Its false-alarm rate is the larger of two: among random orders of the same increments, and among surrogates whose "
        "neighbouring increments are as alike. The good-advice twin, trained on the same questions, shows what training alone does.",
    ]
    figures = []
    if curves:
        figures.append(_outcomes_chart(block, curves, roles, outcomes, scene))
    if weights:
        figures += [_norms_chart(weights, roles), _turns_chart(weights)]
    notes = [] if len(followed) > 1 else [f"This study names no good-advice twin of {organism}, so nothing here tells bad advice from training as such."]
    return Chapter(name, "During training", method, figures, (_changes_sheet(curves), _turns_sheet(weights)), notes)


def _spacing(block: DynamicsBlock) -> str:
    return f"every {block.every} optimizer steps" if block.every else f"{block.points + 1} evenly spaced optimizer steps"


def _outcomes_chart(block: DynamicsBlock, curves: dict[str, Any], roles: dict[str, Role], outcomes: Outcomes, scene: Scene) -> Chart:
    panels = []
    units = {"margin": "nats per token", "matched": "nats per token", "projection": "token norms"}
    organism = next(iter(roles))
    change = _change(curves[organism], "matched", organism) if organism in curves else None
    mark = None if change is None or change.false_alarm.high >= ALARM else float(curves[organism]["steps"][change.index])
    for what, title in CURVES.items():
        series = []
        for o, c in curves.items():
            made = [stats.clustered_mean(row, c["pairs"]) for row in c[what]]
            series.append(Series(o, c["steps"], [m.estimate for m in made], roles[o], [m.low for m in made], [m.high for m in made]))
        panels.append(Panel(f"{title} ({units[what]})", "Optimizer step", tuple(series), mark_x=mark))
    rows = {r["name"]: r for r in outcomes.conditions.to_dict("records")}
    series = []
    for o, c in curves.items():
        known = [(s, n) for s, n in ((0.0, "chat"), *((s, _arm(o, s)) for s in sorted(block.sampled)), (1.0, o)) if n in rows]
        x = [s * c["steps"][-1] for s, _ in known]
        y, low, high = ([float(rows[n][k]) for _, n in known] for k in ("mean_aligned", "mean_aligned_low", "mean_aligned_high"))
        series.append(Series(o, x, y, roles[o], low, high))
    panels.append(Panel("Mean alignment (0 to 100)", "Optimizer step", tuple(series)))
    n = len(curves[organism]["pairs"]) if organism in curves else 0
    return Chart(
        "outcomes", "What the model does at each kept step",
        f"Margin and projection: means over {n} held-out pairs, 95 % intervals over pairs. Mean alignment: judged answers to the study's questions at the "
        "start (chat model), at the sampled shares and at the end, intervals over questions. "
        + ("Dashed: the change-point of the organism's length-matched margin." if mark is not None else "No change-point was found in the organism's curve."),
        tuple(panels),
    )  # fmt: skip


def _norms_chart(weights: dict[str, Any], roles: dict[str, Role]) -> Chart:
    panels = []
    for side in ("b", "a"):
        series = [
            Series(f"{o}, block {adapter}", w["steps"], norms, roles[o])
            for o, w in weights.items()
            for adapter, norms in zip(w["adapters"], w[f"norm_{side}"], strict=True)
            if roles[o] == "real"
        ]
        series += [Series(f"{o}, mean", w["steps"], np.mean(w[f"norm_{side}"], 0).tolist(), roles[o]) for o, w in weights.items() if roles[o] != "real"]
        panels.append(Panel(f"|{side.upper()}|", "Optimizer step", tuple(series)))
    return Chart("norms", "Norms of the adapters", "One line per adapter of the organism; of the twin the mean over its adapters.", tuple(panels))


def _turns_chart(weights: dict[str, Any]) -> Chart:
    panels = []
    for o, w in weights.items():
        for side in ("b", "a"):
            rows = np.array(w[f"cosine_{side}"])
            inside = np.flatnonzero(~np.isnan(rows).any(0))
            if not len(inside):
                continue
            x, rows = [w["steps"][i] for i in inside], rows[:, inside]
            lines = [Series("mean over adapters", x, rows.mean(0).tolist())]
            if len(rows) > 1:
                lines += [Series("lowest adapter", x, rows.min(0).tolist(), "baseline"), Series("highest adapter", x, rows.max(0).tolist(), "baseline")]
            panels.append(Panel(f"Local cosine of {side.upper()}, {o}", "Optimizer step", tuple(lines)))
    return Chart(
        "turns", "How the adapters turn", "Cosine between the way into a kept step and the way out of it. Whether there is a turn is decided in the table.",
        tuple(panels),
    )  # fmt: skip


def _changes_sheet(curves: dict[str, Any]) -> Sheet:
    rows = []
    for o, c in curves.items():
        for what, title in CURVES.items():
            change = _change(c, what, o)
            if change is not None:
                rows.append({"training": o, "curve": title, **_columns(asdict(change), c["steps"])})
    note = "Rates are per step at the full learning rate. False alarms: share of 2,000 random curves without a change whose best split is as good."
    return Sheet("changes", "Change-points of the curves", note, pd.DataFrame(rows).drop(columns="cosine", errors="ignore"), 3)


def _turns_sheet(weights: dict[str, Any]) -> Sheet:
    rows = [
        {"training": o, "matrix": side.upper(), "adapter (block, layer)": adapter, **_columns(change, w["steps"])}
        for o, w in weights.items()
        for side in ("b", "a")
        for adapter, change in zip(("all together", *w["adapters"]), w[f"change_{side}"], strict=True)
        if change is not None
    ]
    note = "Cosine: between the mean updates before and after. Rates: length of the mean update. False alarms of one adapter are not adjusted for their number."
    return Sheet("turns", "Change-points of the adapters' paths", note, pd.DataFrame(rows), 3)


def _columns(change: dict[str, Any], steps: Sequence[int]) -> dict[str, Any]:
    return {
        "change at step": steps[change["index"]], "of": steps[-1], "cosine": change["cosine"], "rate before": change["before"],
        "rate after": change["after"], "t": change["statistic"], "t that 5 % exceed": change["threshold"],
        "false alarms, random order": change["shuffled"]["estimate"], "false alarms, alike neighbours": change["correlated"]["estimate"],
        "likeness of neighbours": change["alike"],
    }  # fmt: skip
