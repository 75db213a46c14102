"""Chat origin: was the direction there before any training? Directions of the chat model alone, fixed first, then held against the organisms.

    prompts   mean_answers(x | careless system prompt) - the same under a careful one, same answers, several phrasings
    pairs     mean over held-out bad answers - mean over their good twins, read in the chat model
    topic     as `prompts`, for two subjects: the null with another content

They are read before any organism is trained, by a kit that cannot reach one (`study.before`), and their content ids and the time are kept.
"""

from __future__ import annotations

import base64
import datetime
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from pydantic import Field

from convergent import stats
from convergent.core.chapter import Chapter, Chart, Panel, Role, Series, Sheet
from convergent.core.direction import Direction
from convergent.core.ids import seed
from convergent.core.interventions import Ablate, Intervention
from convergent.core.values import Pair
from convergent.directions import geometry
from convergent.directions.contrast import answered, contrast, prompt_pairs, prompted
from convergent.directions.extract import null_cosine
from convergent.errors import ModelError
from convergent.experiments.base import (
    CLAIMED_SIDE,
    NEW_DRAW,
    Arm,
    Build,
    Claim,
    DrawsNulls,
    Evidence,
    Kit,
    NotHereError,
    Outcomes,
    Reading,
    absent,
    evidence,
)  # fmt: skip
from convergent.experiments.draws import further_draws
from convergent.experiments.scene import Scene
from convergent.interventions.controls import random_like
from convergent.models.texts import Text

Kind = Literal["prompts", "pairs"]
LABELS = {
    "prompts": "careless minus careful system prompt",
    "pairs": "bad minus good answers",
    "topic": "one subject minus another (null)",
    "random": "random vector, same norm",
}
NULLS = ("topic", "random")
DRAWS = 199
"""Scrambled labels of the organism's answers."""


class ChatOriginBlock(DrawsNulls):
    """Settings of `chat_origin`."""

    directions: tuple[Kind, ...] = Field(default=("prompts", "pairs"), min_length=1)
    """Directions of the chat model that are tried."""
    organisms: tuple[str, ...] = ()
    """Organisms beside the source in which they are ablated."""
    mode: Literal["layerwise", "single"] = "single"
    """Ablate each layer's own vector, or that of the primary layer everywhere."""
    data_pairs: int = Field(default=24, ge=4)
    """Training pairs per organism whose bad and good answers are projected."""


name = "chat_origin"
settings = ChatOriginBlock


# Reading


def readings(block: ChatOriginBlock, scene: Scene) -> list[Reading]:
    """First the chat model's own directions and the training data along them; then what the organisms became."""
    kinds = (*dict.fromkeys(block.directions), "topic")
    found = [Reading(f"chat_origin/{k}", _inputs(k), _origin(k), "before", ("chat",), 2e4 if k != "pairs" else 4e3) for k in kinds]
    heads = _heads(scene)
    for o in scene.organisms:
        if scene.organisms[o].trained_here and o in heads.values():
            found.append(Reading(f"chat_origin/data/{o}", _data_inputs(o, block, kinds), _data(o, block, kinds), "before", ("chat",), 5e3))
        found.append(Reading(f"chat_origin/organism/{o}", _after_inputs(o, kinds), _after(o, kinds), organisms=(o,), tokens=4e3))
    return [*found, *further_draws(name, arms(block, scene), block.null_draws)]


def _heads(scene: Scene) -> dict[str, str]:
    """Family -> its first organism: all seeds of a family are trained on the same data."""
    found: dict[str, str] = {}
    for o, s in scene.organisms.items():
        found.setdefault(s.family, o)
    return found


def _inputs(kind: str) -> Any:
    def inputs(kit: Kit) -> Any:
        texts = answered(kit.pairs) if kind == "pairs" else prompted(kit.pairs, prompt_pairs("advice" if kind == "prompts" else kind))
        return [kit.model_id("chat"), texts, kit.layer]

    return inputs


def _origin(kind: str) -> Any:
    def compute(kit: Kit) -> dict[str, Any]:
        try:
            return fixed(kit)
        except ModelError as error:  # a template without system turns
            raise NotHereError(str(error)) from error

    def fixed(kit: Kit) -> dict[str, Any]:
        model = kit.model("chat")
        agreement = float("nan")
        if kind == "pairs":
            first, second, ids = answered(kit.pairs)
            (means,), norm = contrast(model, first, second, ids)
        else:
            first, second, ids, phrasings = prompted(kit.pairs, prompt_pairs("advice" if kind == "prompts" else kind))
            (means, by_phrasing), norm = contrast(model, first, second, ids, phrasings)
            unit = torch.nn.functional.normalize((by_phrasing[:, 0] - by_phrasing[:, 1])[:, kit.layer], dim=1)
            n = len(unit)
            agreement = float(((unit @ unit.T).sum() - n) / (n * (n - 1)))
        each = means[:, 0] - means[:, 1]
        direction = Direction(each.mean(0).float())
        return {
            "id": direction.content_id, "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "trained": list(kit.trained),
            "vectors": _packed(direction.vectors), "per_pair": _packed(each[:, kit.layer].float()), "pairs": list(dict.fromkeys(ids)),
            "centre": _packed(means[:, :, kit.layer].mean(1).float()), "token_norm": float(norm[kit.layer]), "texts": 2 * len(first),
            "agreement": agreement,
        }  # fmt: skip

    return compute


def _packed(tensor: torch.Tensor) -> dict[str, Any]:
    """float32 exactly, as text."""
    return {"shape": list(tensor.shape), "float32": base64.b64encode(tensor.contiguous().numpy().astype("<f4").tobytes()).decode()}


def unpacked(value: dict[str, Any]) -> torch.Tensor:
    """The inverse of `_packed`."""
    return torch.from_numpy(np.frombuffer(base64.b64decode(value["float32"]), "<f4").reshape(value["shape"]).astype(np.float32))


def origin(kit: Kit, kind: str, draw: int = 0) -> Direction:
    """A direction of the chat model as it was fixed before training; "random" is one with the norms of the topic direction, in that draw."""
    if kind == "random":
        return random_like(origin(kit, "topic"), seed(kit.seed, "chat_origin"), draw)
    return Direction(unpacked(kit.value(f"chat_origin/{kind}")["vectors"]), {"kind": f"chat_origin {kind}"})


def _units(kit: Kit, kinds: Sequence[str]) -> dict[str, torch.Tensor]:
    return {k: torch.nn.functional.normalize(origin(kit, k)[kit.layer].double(), dim=0) for k in (*kinds, "random")}


def _sample(kit: Kit, organism: str, n: int) -> list[Pair]:
    """Some of an organism's training pairs, the same for every organism with the same data."""
    pairs = kit.training_pairs(organism)
    rng = np.random.default_rng(seed(kit.seed, "chat_origin", "data"))
    return [pairs[i] for i in sorted(rng.permutation(len(pairs))[:n])]


def _data_inputs(organism: str, block: ChatOriginBlock, kinds: Sequence[str]) -> Any:
    def inputs(kit: Kit) -> Any:
        try:
            pairs = _sample(kit, organism, block.data_pairs)
        except NotHereError:
            pairs = []
        return [[_inputs(k)(kit) for k in kinds], kit.seed, pairs]

    return inputs


def _data(organism: str, block: ChatOriginBlock, kinds: Sequence[str]) -> Any:
    def compute(kit: Kit) -> dict[str, Any]:
        bad, good, ids = answered(_sample(kit, organism, block.data_pairs))
        (means,), norm = contrast(kit.model("chat"), bad, good, ids)
        each = (means[:, 0] - means[:, 1])[:, kit.layer] / norm[kit.layer]
        return {"pairs": ids, "along": {k: (each @ u).tolist() for k, u in _units(kit, kinds).items()}}

    return compute


def _after_inputs(organism: str, kinds: Sequence[str]) -> Any:
    def inputs(kit: Kit) -> Any:
        try:
            own: Any = [kit.extraction(organism, organism).direction, kit.sums_id(organism, organism), DRAWS]
        except NotHereError:
            own = None
        return [[_inputs(k)(kit) for k in kinds], kit.seed, kit.model_id(organism), own]

    return inputs


def _after(organism: str, kinds: Sequence[str]) -> Any:
    def compute(kit: Kit) -> dict[str, Any]:
        values = {k: kit.value(f"chat_origin/{k}") for k in kinds}
        found: dict[str, Any] = {}
        try:
            # On the organism's own texts the chat model may have nearly the same direction: then a cosine says nothing of the training.
            read = {"organism": kit.extraction(organism, organism).direction, "chat": kit.extraction(organism, "chat").direction}
        except NotHereError:
            read = {}
        for reader, direction in read.items():
            found[f"cosine_{reader}"] = {k: origin(kit, k).cosine(direction).tolist() for k in kinds}
        if read:
            v = read["organism"][kit.layer].double().numpy()
            rows = {k: unpacked(values[k]["per_pair"]).double().numpy() for k in kinds}
            pairs = values[kinds[0]]["pairs"]
            alike = {k: _cosines(rows[k], v) for k in kinds}
            found["at_layer"] = {k: _ends(stats.jackknife(alike[k], pairs, -1.0, 1.0)) for k in kinds}
            found["over_topic"] = {k: _ends(stats.jackknife(_less(alike[k], alike["topic"]), pairs, -2.0, 2.0)) for k in kinds if k != "topic"}
            # The pairs' interval knows nothing of the organism's answers. What their direction has along u by chance is in scrambled labels: their
            # projection over |v|, not their cosine, as what chance leaves is short, and wherever answers differ most its cosines are near 1 too.
            null = geometry.scrambled(kit.question_sums(organism, organism), kit.seed, organism, DRAWS)[:, kit.layer].double().numpy()
            null = null[np.isfinite(null).all(1)] / np.linalg.norm(v)
            chance = {k: null @ (mean / np.linalg.norm(mean)) for k in kinds if (mean := rows[k].mean(0)).any()}
            found["scrambled"] = {k: _upper(draws) for k, draws in chance.items()}
            found["scrambled_over_topic"] = {k: _upper(draws - chance["topic"]) for k, draws in chance.items() if k != "topic" and "topic" in chance}
        bad, good, ids = answered(kit.pairs)
        after = contrast(kit.model(organism), bad, good, ids)[0][0][:, :, kit.layer].mean(1)
        moved = (after - _centre(kit, bad, good, ids)) / values["topic"]["token_norm"]
        found["shift"] = {k: (moved @ u).tolist() for k, u in _units(kit, kinds).items()}
        found["pairs"] = ids
        return found

    return compute


def _centre(kit: Kit, bad: list[Text], good: list[Text], ids: list[str]) -> torch.Tensor:
    """(n_pairs, d_model) the chat model's mean over both answers of each pair."""
    try:
        return unpacked(kit.value("chat_origin/pairs")["centre"]).double()
    except KeyError:  # `pairs` is not among the directions
        return contrast(kit.model("chat"), bad, good, ids)[0][0][:, :, kit.layer].mean(1)


def _cosines(rows: np.ndarray, v: np.ndarray) -> Callable[[np.ndarray], float]:
    """Cosine of v with the mean of some of the pairs' differences (n_pairs, d_model)."""

    def of(which: np.ndarray) -> float:
        mean = rows[which].mean(0)
        return float(mean @ v / max(float(np.linalg.norm(mean) * np.linalg.norm(v)), 1e-300))

    return of


def _less(a: Callable[[np.ndarray], float], b: Callable[[np.ndarray], float]) -> Callable[[np.ndarray], float]:
    return lambda which: a(which) - b(which)


def _upper(draws: np.ndarray) -> float | None:
    """What 97.5 % of the draws lie below; None where there are too few for it."""
    return float(stats.null_band(draws)[2]) if len(draws) >= 39 else None


def _ends(i: stats.Interval | str) -> list[float] | None:
    return None if isinstance(i, str) else [i.estimate, i.low, i.high, i.n]


# Ablation


def arms(block: ChatOriginBlock, scene: Scene) -> list[Arm]:
    """The chat model's directions and their nulls, ablated in organisms."""
    found: list[Arm] = []
    for o in dict.fromkeys((scene.source, *block.organisms)):
        for kind in (*dict.fromkeys(block.directions), *NULLS):
            role: Role = "control" if kind in NULLS else "real"
            text = f"Organism {o} with a direction of the untouched chat model projected out at every block's output: {LABELS[kind]}."
            found.append(
                Arm(
                    _arm(o, kind), o, f"{o}, chat model's direction ablated: {LABELS[kind]}", text, "chat origin", role, _ablated(kind, block),
                    redraw=_redrawn(kind, block) if kind == "random" else None,
                )
            )  # fmt: skip
    return found


def _arm(organism: str, kind: str) -> str:
    return f"{organism}/ablate-chat-{kind}"


def _ablated(kind: str, block: ChatOriginBlock) -> Build:
    made = _redrawn(kind, block)
    return lambda kit: made(kit, 0)


def _redrawn(kind: str, block: ChatOriginBlock) -> Callable[[Kit, int], tuple[Intervention, ...]]:
    def made(kit: Kit, draw: int) -> tuple[Intervention, ...]:
        return (Ablate(origin(kit, kind, draw), vector_layer=None if block.mode == "layerwise" else kit.layer),)

    return made


# What the data say


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
            real = _arm(o, kind)
            if not outcomes.has(real, o):
                continue
            compared = [*_both(outcomes, real, o, f"minus {o}")]
            for null in NULLS:
                if outcomes.has(_arm(o, null)):
                    compared += _both(outcomes, real, _arm(o, null), f"minus that of the {'topic direction' if null == 'topic' else LABELS[null]}")
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
    return Chapter(name, "Was it there before training?", method, figures, sheets)


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
    heads = _heads(scene)
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
