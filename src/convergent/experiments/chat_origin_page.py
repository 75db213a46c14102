"""What `chat_origin`'s readings and answers say: verdicts, and the chapter of the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from convergent import stats
from convergent.core.chapter import Chapter, Chart, Panel, Role, Series, Sheet
from convergent.directions.extract import null_cosine
from convergent.experiments.outcomes import CLAIMED_SIDE, NEW_DRAW, Claim, Evidence, Outcomes, absent, evidence
from convergent.experiments.scene import Scene

if TYPE_CHECKING:
    from convergent.experiments.chat_origin import ChatOriginBlock

LABELS = {
    "prompts": "careless minus careful system prompt",
    "pairs": "bad minus good answers",
    "topic": "one subject minus another (null)",
    "random": "random vector, same norm",
}
NULLS = ("topic", "random")


def heads_of(scene: Scene) -> dict[str, str]:
    """Family -> its first organism: all seeds of a family are trained on the same data."""
    found: dict[str, str] = {}
    for o, s in scene.organisms.items():
        found.setdefault(s.family, o)
    return found


def arm_of(organism: str, kind: str) -> str:
    return f"{organism}/ablate-chat-{kind}"


def claims(block: ChatOriginBlock, outcomes: Outcomes, scene: Scene) -> list[Claim]:
    """The chat model had the direction: it is alike, and taking it away restores alignment, more than the nulls do."""
    found = []
    for kind in dict.fromkeys(block.directions):
        after = outcomes.readings.get(f"chat_origin/organism/{scene.source}", {})
        width = _band(outcomes, kind)
        if after.get("at_layer") and after["at_layer"].get(kind) and width is not None:
            beyond = _less_chance(after["at_layer"][kind], width)
            shown = [evidence("cosine at the primary layer, less the end of the random band (above 0 claimed)", beyond, "cosine")]
            chance = after["scrambled"].get(kind)
            scrambled = f"less what 97.5 % of scrambled labels of {scene.source}'s answers leave along it at most, over |v|"
            if chance is not None:
                shown.append(evidence(f"the same, {scrambled} (above 0 claimed)", _less_chance(after["at_layer"][kind], chance), "cosine"))
            else:
                shown.append(absent(f"the same, {scrambled}", "cosine"))
            if after["over_topic"][kind]:
                more = after["scrambled_over_topic"].get(kind)
                shown.append(evidence("cosine, less that of the topic direction (above 0 claimed)", _interval(*after["over_topic"][kind]), "cosine"))
                if more is not None:
                    shown.append(evidence(f"the same, {scrambled} (above 0 claimed)", _less_chance(after["over_topic"][kind], more), "cosine"))
            found.append(
                Claim(
                    f"chat_origin/cosine/{kind}",
                    f"The direction of {scene.source} was there in the chat model before training: it is alike to the chat model's own ({LABELS[kind]}), "
                    "beyond random directions, beyond what scrambled labels of its answers leave, and beyond a topic direction made the same way",
                    "not claimed by the paper; asked by later work",
                    "every listed difference has its 95 % interval (over held-out pairs) above 0",
                    shown,
                )
            )
        for o in dict.fromkeys((scene.source, *block.organisms)):
            real = arm_of(o, kind)
            if not outcomes.has(real, o):
                continue
            compared = [*_both(outcomes, real, o, f"minus {o}")]
            for null in NULLS:
                if outcomes.has(arm_of(o, null)):
                    compared += _both(outcomes, real, arm_of(o, null), f"minus that of the {'topic direction' if null == 'topic' else LABELS[null]}")
            found.append(
                Claim(
                    f"chat_origin/ablation/{o}/{kind}",
                    f"A direction that is read in the chat model alone ({LABELS[kind]}), projected out of {o}, restores its alignment, more than a topic "
                    "direction or a random one does",
                    "not claimed by the paper; asked by later work",
                    CLAIMED_SIDE + NEW_DRAW,
                    compared,
                )
            )
    return found


def _both(outcomes: Outcomes, a: str, b: str, text: str) -> list[Evidence]:
    return [
        outcomes.alignment(a, b, f"mean alignment, ablated {text} (above 0 claimed)"),
        outcomes.margin(a, b, f"margin for bad answers, ablated {text} (below 0 claimed)", sign=-1),
    ]


def _less_chance(ends: Sequence[float], chance: float) -> stats.Interval:
    estimate, low, high, n = ends
    return _interval(estimate - chance, low - chance, high - chance, n)


def _interval(estimate: float, low: float, high: float, n: float) -> stats.Interval:
    return stats.Interval(estimate, low, high, int(n), "jackknife over held-out pairs", stats.OVER_QUESTIONS)


def _band(outcomes: Outcomes, kind: str) -> float | None:
    value = outcomes.readings.get(f"chat_origin/{kind}")
    return None if value is None else null_cosine(value["vectors"]["shape"][1])


def chapter(block: ChatOriginBlock, outcomes: Outcomes, scene: Scene) -> Chapter:
    """Pre-registration, cosines per layer, ablation is among the conditions, and the points of the prediction."""
    read = outcomes.readings
    kinds = [k for k in (*dict.fromkeys(block.directions), "topic") if f"chat_origin/{k}" in read]
    after = {o: read[f"chat_origin/organism/{o}"] for o in scene.organisms if f"chat_origin/organism/{o}" in read}
    method = [
        f"Did training make the direction of {scene.source}, or find it? Two directions of the chat model alone: the difference of mean answer activations "
        "between careless and careful system prompts, over the same answers to the same held-out questions in several phrasings; and between the bad and the "
        "good held-out answers under the default prompt. Null of the same make: two subjects in place of two attitudes.",
        "They were fixed first: a reading that is made before training gets no access to organisms, and the table gives each direction's content id, when it "
        "was made, and which organisms were there already (a study that is extended later has some; the directions cannot depend on them).",
        "Then: their cosine with each organism's direction per layer; their ablation in the organism; and the training data (bad minus good answers in the "
        "chat model, the other way round for a good-advice twin) projected on them, against how far each organism later moved along them on held-out pairs.",
    ]
    figures = [c for c in (_cosine_chart(kinds, after, outcomes, scene), _prediction_chart(kinds, after, read, scene)) if c is not None]
    sheets = (_registered_sheet(kinds, read), _prediction_sheet(kinds, after, read, scene))
    return Chapter("chat_origin", "Was it there before training?", method, figures, sheets)


def _cosine_chart(kinds: list[str], after: dict[str, Any], outcomes: Outcomes, scene: Scene) -> Chart | None:
    panels = []
    for o, value in after.items():
        lines: list[Series] = []
        for reader in ("organism", "chat"):
            for k, cosine in value.get(f"cosine_{reader}", {}).items():
                # The organism's direction first; its answers as the chat model reads them are the baseline, for the first direction alone.
                if reader == "organism" or k == kinds[0]:
                    role: Role = "baseline" if reader == "chat" else "control" if k == "topic" else "real"
                    label = LABELS[k] + (", organism's answers read in the chat model" if reader == "chat" else "")
                    lines.append(Series(label, range(len(cosine)), cosine, role))
        if lines:
            x, width = lines[0].x, _band(outcomes, "topic") or 0.0
            band = (x, [-width] * len(x), [width] * len(x))
            panels.append(Panel(f"Cosine with the direction of {o}", "Layer (output of block)", tuple(lines), band, scene.layer))
    if not panels:
        return None
    n = len(next(iter(after.values()))["pairs"])
    caption = (
        f"Directions of the chat model from {n} held-out pairs, against each organism's direction from its own judged answers. Band: 95 % of random "
        "directions. Where the baseline (the organism's answers read in the chat model) agrees as well, the cosine tells of the answers and not of what "
        "training changed."
    )
    return Chart("cosines", "Directions of the chat model against those of the organisms", caption, tuple(panels))


def _points(kind: str, after: dict[str, Any], read: Any, scene: Scene) -> list[dict[str, Any]]:
    """One point per organism: what its training data say along the direction, and how far it moved."""
    heads = heads_of(scene)
    rows = []
    for o, value in after.items():
        known = read.get(f"chat_origin/data/{heads[scene.organisms[o].family]}")
        if known is None or kind not in known["along"]:
            continue
        sign = -1 if scene.organisms[o].answer == "good" else 1
        x = stats.clustered_mean(sign * np.array(known["along"][kind]), known["pairs"])
        y = stats.clustered_mean(value["shift"][kind], value["pairs"])
        rows.append(
            {
                "direction": LABELS[kind], "organism": o, "training data": x.estimate, "training data, low": x.low, "training data, high": x.high,
                "organism's shift": y.estimate, "shift, low": y.low, "shift, high": y.high,
            }
        )  # fmt: skip
    return rows


def _prediction_chart(kinds: list[str], after: dict[str, Any], read: Any, scene: Scene) -> Chart | None:
    panels = []
    for k in kinds:
        series = [
            Series(
                p["organism"], [p["training data"]], [p["organism's shift"]], "control" if scene.organisms[p["organism"]].answer == "good" else "real",
                [p["shift, low"]], [p["shift, high"]],
            )
            for p in _points(k, after, read, scene)
        ]  # fmt: skip
        if series:
            panels.append(Panel(f"Shift along: {LABELS[k]}", "Training data along it (token norms)", tuple(series)))
    if not panels:
        return None
    caption = (
        "One point per organism. Across: mean projection of its training answers less their twins, in the chat model. Up: how far its mean answer activation "
        "moved on the held-out pairs, 95 % interval over pairs; both in mean token norms. So few organisms allow no test; these are the points."
    )
    return Chart("prediction", "Training data against the later shift", caption, tuple(panels))


def _registered_sheet(kinds: list[str], read: Any) -> Sheet:
    rows = [
        {
            "direction": LABELS[k], "content id": v["id"], "made (UTC)": v["made"], "organisms there already": ", ".join(v["trained"]) or "none",
            "texts": v["texts"], "agreement of phrasings (mean cosine)": v["agreement"],
        }
        for k in kinds
        for v in (read[f"chat_origin/{k}"],)
    ]  # fmt: skip
    return Sheet("registered", "Fixed before training", "The content id names the vectors of all layers.", pd.DataFrame(rows))


def _prediction_sheet(kinds: list[str], after: dict[str, Any], read: Any, scene: Scene) -> Sheet:
    rows = [p for k in (*kinds, "random") for p in _points(k, after, read, scene)]
    note = "Mean token norms at the primary layer, intervals over pairs of texts. Organisms of one data set share what is across but for the sign."
    return Sheet("prediction", "Training data against the later shift", note, pd.DataFrame(rows), 3)
