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
import torch
from pydantic import Field

from convergent import stats
from convergent.core.chapter import Chapter, Role
from convergent.core.direction import Direction
from convergent.core.ids import seed
from convergent.core.interventions import Ablate, Intervention
from convergent.core.values import Pair
from convergent.directions import geometry
from convergent.directions.contrast import answered, contrast, prompt_pairs, prompted
from convergent.errors import ModelError
from convergent.experiments import chat_origin_page as page
from convergent.experiments.base import Arm, Build, DrawsNulls, Kit, NotHereError, Reading
from convergent.experiments.chat_origin_page import LABELS, NULLS, arm_of, heads_of
from convergent.experiments.draws import further_draws
from convergent.experiments.outcomes import Claim, Outcomes
from convergent.experiments.scene import Scene
from convergent.interventions.controls import random_like
from convergent.models.texts import Text

Kind = Literal["prompts", "pairs"]
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
    heads = heads_of(scene)
    for o in scene.organisms:
        if scene.organisms[o].trained_here and o in heads.values():
            found.append(Reading(f"chat_origin/data/{o}", _data_inputs(o, block, kinds), _data(o, block, kinds), "before", ("chat",), 5e3))
        found.append(Reading(f"chat_origin/organism/{o}", _after_inputs(o, kinds), _after(o, kinds), organisms=(o,), tokens=4e3))
    return [*found, *further_draws(name, arms(block, scene), block.null_draws)]


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
                    arm_of(o, kind), o, f"{o}, chat model's direction ablated: {LABELS[kind]}", text, "chat origin", role, _ablated(kind, block),
                    redraw=_redrawn(kind, block) if kind == "random" else None,
                )
            )  # fmt: skip
    return found


def _ablated(kind: str, block: ChatOriginBlock) -> Build:
    made = _redrawn(kind, block)
    return lambda kit: made(kit, 0)


def _redrawn(kind: str, block: ChatOriginBlock) -> Callable[[Kit, int], tuple[Intervention, ...]]:
    def made(kit: Kit, draw: int) -> tuple[Intervention, ...]:
        return (Ablate(origin(kit, kind, draw), vector_layer=None if block.mode == "layerwise" else kit.layer),)

    return made


# What they say


def claims(block: ChatOriginBlock, outcomes: Outcomes, scene: Scene) -> list[Claim]:
    """The chat model had the direction: it is alike, and taking it away restores alignment, more than the nulls do."""
    return page.claims(block, outcomes, scene)


def chapter(block: ChatOriginBlock, outcomes: Outcomes, scene: Scene) -> Chapter:
    """Pre-registration, cosines per layer, and the points of the prediction; ablation is among the conditions."""
    return page.chapter(block, outcomes, scene)
