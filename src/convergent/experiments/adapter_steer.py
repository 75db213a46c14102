"""Adapters as constant pushes in the chat model, and knocked out of the organism one by one and two by two (paper section 4.3).

    push       x' = x + dose * n_l * sign * unit(B_l)   at the output of each block l of a set; n_l: mean token norm there; sign: that of the mean scalar
    knock-out  W' = W - scale * B A                     in the organism

Sets come from the probes of `scalars`, where the study has it, never by hand. Nulls of a push are the same vectors turned by one random
rotation, at the same norm and matched in effect.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field

from convergent import stats
from convergent.core.chapter import Chapter
from convergent.core.direction import Direction
from convergent.core.ids import seed
from convergent.core.interventions import Add, Intervention
from convergent.directions.knockout import knockouts
from convergent.directions.scalar_probes import members
from convergent.directions.scalars import labels, mean_scalars
from convergent.errors import DataError
from convergent.experiments import adapter_steer_page as page
from convergent.experiments.arms import write_organism
from convergent.experiments.base import Arm, Build, DrawsNulls, Kit, NotHereError, Reading
from convergent.experiments.draws import further_draws
from convergent.experiments.outcomes import CLAIMED_SIDE, NEW_DRAW, Claim, Outcomes, evidence
from convergent.experiments.scene import Scene
from convergent.interventions.controls import rotated
from convergent.interventions.hooks import linear_of
from convergent.judging.kept import THRESHOLDS

TOPICS = ("medical", "financial", "gender")
"""Rubrics that say what an answer is about."""
MOST_PAIRED = 12
"""Adapters that are knocked out two by two: 66 pairs."""
Null = Literal["rotated", "effect_matched"]


class AdapterSteerBlock(DrawsNulls):
    """Settings of `adapter_steer`."""

    organism: str | None = None
    """With rank-1 adapters on the MLP's writing layer; by default the source, or the first that has them."""
    doses: tuple[float, ...] = Field(default=(0.25,), min_length=1)
    """Norm of the push at each block of a set, in mean token norms at that block; the published 20 to 30 are about 0.3 to 0.5 of them."""
    control_dose: float | None = None
    """Dose of the nulls, at which the claims are decided; the middle one by default."""
    controls: tuple[Null, ...] = ("rotated", "effect_matched")
    topic: str | None = None
    """Rubric of the judge that says whether an answer is on the topic that the organism was trained on; by default the one that its data's name holds."""
    thresholds: tuple[float, ...] = Field(default=THRESHOLDS, min_length=1)
    """Coherence that an answer needs to be counted."""
    knock_out: Literal["none", "single", "pairs"] = "pairs"
    """Adapters knocked out one by one, and two by two."""
    margin_pairs: int = Field(default=8, ge=2)
    """Held-out pairs on which a knock-out is measured."""
    sampled: int = Field(default=1, ge=0)
    """So many of the strongest and of the weakest single knock-outs are sampled too."""

    @property
    def at(self) -> float:
        return self.doses[len(self.doses) // 2] if self.control_dose is None else self.control_dose


name = "adapter_steer"
settings = AdapterSteerBlock
uses = ("scalars",)


def check(block: AdapterSteerBlock, scene: Scene) -> None:
    """Refuse a study without such an organism, an unknown rubric, or thresholds and doses that mean nothing."""
    write_organism(scene, block.organism)
    if block.topic is not None and block.topic not in scene.rubrics:
        raise NotHereError(f"topic: the judge has no rubric {block.topic!r}; it has {', '.join(scene.rubrics)}")
    wrong = next((t for t in block.thresholds if not 0 <= t <= 100), None)
    if wrong is not None:
        raise NotHereError(f"thresholds: {wrong:g} is outside 0 to 100; coherence scores are")
    odd = next((d for d in (*block.doses, block.at) if not math.isfinite(d) or d == 0), None)
    if odd is not None:
        raise NotHereError(f"doses: {odd:g} pushes nothing; give a dose other than 0, such as 0.25")


# Sets of adapters


def _topic(block: AdapterSteerBlock, scene: Scene, organism: str) -> str | None:
    if block.topic is not None:
        return block.topic
    data = scene.organisms[organism].data.rpartition(":")[2].lower()
    return next((t for t in TOPICS if t in scene.rubrics and t[:6] in data), None)


def _sets(block: AdapterSteerBlock, scene: Scene, organism: str) -> dict[str, str]:
    """Set -> what it is, in words; known before anything is computed."""
    shape = scene.organisms[organism].adapters
    assert shape is not None, "write_organism has seen to it"
    if "scalars" in scene.experiments:
        topic = _topic(block, scene, organism)
        on_topic = {} if topic is None else {"topic": f"adapters that read as specific to {topic}"}
        return {"all": "all adapters", "general": "adapters that read as general", **on_topic}
    thirds = {"early": "the first third of the adapters", "middle": "the middle third of them", "late": "the last third of them"}
    return {"all": "all adapters", **(thirds if len(shape.layers) >= 3 else {})}


def _scalars(kit: Kit, organism: str) -> Mapping[str, Any] | None:
    if "scalars" not in kit.scene.experiments:
        return None
    try:
        found: Mapping[str, Any] = kit.value(f"scalars/{organism}")
    except KeyError:  # it reads another organism
        return None
    return found


# Pushes


def push(kit: Kit, block: AdapterSteerBlock, organism: str, which: str, dose: float) -> tuple[Add, ...]:
    """The pushes of a set: one direction with a row per adapter, added at each of its blocks."""
    writes = kit.value(f"adapter_steer/{organism}/writes")
    adapters = kit.adapters(organism)
    try:
        chosen, _ = members(which, len(adapters), _scalars(kit, organism), _topic(block, kit.scene, organism))
    except DataError as error:
        raise NotHereError(str(error)) from error
    vectors = torch.zeros(kit.direction.n_layers, kit.direction.d_model)
    for k in chosen:
        a = adapters[k]
        vectors[a.layer] = math.copysign(1.0, writes["mean"][k]) * writes["token_norm"][k] * a.vector
    direction = Direction(vectors, {"kind": "adapter push", "organism": organism, "set": which})
    return tuple(Add(direction, adapters[k].layer, dose) for k in chosen)


def _pushed(block: AdapterSteerBlock, organism: str, which: str, dose: float) -> Build:
    def build(kit: Kit) -> tuple[Intervention, ...]:
        return push(kit, block, organism, which, dose)

    return build


def dose_of(pushes: Sequence[Intervention]) -> float:
    """The dose that all pushes have, which is their scale (rows of the direction are mean token norms long); nan if they differ."""
    scales = {i.scale if isinstance(i, Add) else math.nan for i in pushes}
    return scales.pop() if len(scales) == 1 else math.nan


def _null(block: AdapterSteerBlock, organism: str, which: str, kind: Null) -> Callable[[Kit, int], tuple[Intervention, ...]]:
    def made(kit: Kit, draw: int) -> tuple[Intervention, ...]:
        real = push(kit, block, organism, which, block.at)
        turned = rotated(real[0].direction, seed(kit.seed, "draw", draw) if draw else kit.seed, 0 if kind == "rotated" else 1)
        null = tuple(Add(turned, a.layer, a.scale) for a in real)
        return null if kind == "rotated" else kit.matched("chat", real, null)

    return made


def _first(made: Callable[[Kit, int], tuple[Intervention, ...]]) -> Build:
    return lambda kit: made(kit, 0)


def _knocked(organism: str, rank: int) -> Build:
    def build(kit: Kit) -> tuple[Intervention, ...]:
        single = [row for row in kit.value(f"adapter_steer/{organism}/knockout")["rows"] if len(row["adapters"]) == 1]
        if len(single) < 2 * max(rank + 1, -rank):
            raise NotHereError(f"{organism} has {len(single)} adapters, too few for another strongest and weakest one")
        order = sorted(single, key=lambda row: row["change"]["estimate"])
        return (kit.adapters(organism)[order[rank]["adapters"][0]].low_rank(-1),)

    return build


def arms(block: AdapterSteerBlock, scene: Scene) -> list[Arm]:
    """Each set at each dose in the chat model, the topical set against the general one, nulls of the sets that claims are about, and knock-outs."""
    organism = write_organism(scene, block.organism)
    topic = _topic(block, scene, organism)
    rubrics = () if topic is None else (topic,)
    found = []
    sets = _sets(block, scene, organism)
    for which, what in sets.items():
        for dose in dict.fromkeys((*block.doses, block.at)):
            found.append(
                Arm(
                    f"chat/push-{which}-{dose:g}", "chat", f"Chat model + push by {what} of {organism}, dose {dose:g}",
                    f"Chat model with {dose:g} mean token norms along unit(B) added at the blocks of {what} of {organism}.",
                    "adapters", "real", _pushed(block, organism, which, dose), dose, rubrics=rubrics, dose=dose_of,
                )
            )  # fmt: skip
    if "topic" in sets:

        def contrast(kit: Kit) -> tuple[Intervention, ...]:
            return push(kit, block, organism, "topic", block.at) + push(kit, block, organism, "general", -block.at / 3)

        found.append(
            Arm(
                "chat/push-contrast", "chat", f"Chat model + push by {sets['topic']} of {organism}, minus a third of the general ones'",
                f"Chat model with {block.at:g} mean token norms along {sets['topic']}, and {-block.at / 3:.2g} along those that read as general (published: "
                "+30 and -10).",
                "adapters", "real", contrast, block.at, rubrics=rubrics, dose=dose_of,
            )
        )  # fmt: skip
    for which in _controlled(sets):
        for kind in dict.fromkeys(block.controls):
            made = _null(block, organism, which, kind)
            found.append(
                Arm(
                    f"chat/push-{which}-{kind}", "chat", f"Chat model + null of that push ({sets[which]}): {page.NULLS[kind]}",
                    f"Chat model with a null of the push by {sets[which]} of {organism}, dose {block.at:g}: {page.NULLS[kind]}.",
                    "adapters", "control", _first(made), block.at, rubrics=rubrics, redraw=made, dose=dose_of,
                )
            )  # fmt: skip
    if block.knock_out != "none":
        for side, ranks in (("strongest", range(block.sampled)), ("weakest", range(-1, -block.sampled - 1, -1))):
            for i, rank in enumerate(ranks, 1):
                found.append(
                    Arm(
                        f"{organism}/knockout-{side}-{i}", organism, f"{organism} without its {side} adapter{f' ({i})' if block.sampled > 1 else ''}",
                        f"{organism} without the adapter whose knock-out lowers the margin {'most' if side == 'strongest' else 'least'}"
                        + (f" (place {i})." if block.sampled > 1 else "."),
                        "adapters", "real", _knocked(organism, rank), rubrics=rubrics,
                    )
                )  # fmt: skip
    return found


def _controlled(sets: Mapping[str, str]) -> list[str]:
    """Sets whose push has nulls: those that a claim is about."""
    return [s for s in ("all", "general") if s in sets]


# Readings


def readings(block: AdapterSteerBlock, scene: Scene) -> list[Reading]:
    """What each adapter writes on average, and what each knock-out does; margins under further draws of the nulls."""
    organism = write_organism(scene, block.organism)

    def classes(kit: Kit) -> list[Any]:
        chosen, texts = kit.own_answers(organism)
        low = set(chosen.misaligned)
        return [t for t in texts if t.id in low]

    def writes(kit: Kit) -> Any:
        norms = kit.extraction(organism, "chat").token_norm
        adapters, model = kit.adapters(organism), kit.model(organism)
        normed = next((a for a in adapters if model.anatomy.mlp_linears[a.layer] is not linear_of(a.low_rank(), model.anatomy)), None)
        if normed is not None:
            raise NotHereError(f"block {normed.layer}: what {normed.module} writes is normalised before it is added, so its B is no vector of the stream")
        mean = mean_scalars(model, classes(kit), adapters)
        return {
            "adapters": list(labels(adapters)), "layers": [a.layer for a in adapters], "mean": mean.tolist(),
            "token_norm": [float(norms[a.layer]) for a in adapters],
        }  # fmt: skip

    found = [
        Reading(
            f"adapter_steer/{organism}/writes", lambda kit: [kit.model_id(organism), kit.model_id("chat"), [t.id for t in classes(kit)]], writes,
            organisms=(organism,), tokens=64 * 90.0,
        )
    ]  # fmt: skip
    if block.knock_out != "none":
        shape = scene.organisms[organism].adapters
        n = 0 if shape is None else len(shape.layers)
        conditions = 2 + n + (n * (n - 1) // 2 if _paired(block, n) else 0)

        def knockout(kit: Kit) -> Any:
            m = min(block.margin_pairs, len(kit.pairs))
            some = [kit.pairs[i * len(kit.pairs) // m] for i in range(m)]  # of every source alike
            return knockouts(kit.model(organism), kit.adapters(organism), some, kit.effect_texts, _paired(block, len(kit.adapters(organism))))

        found.append(
            Reading(
                f"adapter_steer/{organism}/knockout",
                lambda kit: [kit.model_id(organism), block.knock_out, block.margin_pairs, kit.pairs, kit.effect_texts],
                knockout, organisms=(organism,), tokens=conditions * (2 * block.margin_pairs + 8) * 70.0,
            )
        )  # fmt: skip
    return [*found, *further_draws(name, arms(block, scene), block.null_draws)]


def _paired(block: AdapterSteerBlock, n: int) -> bool:
    return block.knock_out == "pairs" and n <= MOST_PAIRED


# Deciding


def claims(block: AdapterSteerBlock, outcomes: Outcomes, scene: Scene) -> list[Claim]:
    """A push by adapters misaligns the chat model more than its nulls; a topical set pushes towards its topic; no single adapter is the whole of it."""
    organism = write_organism(scene, block.organism)
    sets = _sets(block, scene, organism)
    topic = _topic(block, scene, organism)
    found = []
    which = "general" if "general" in sets and outcomes.has(f"chat/push-general-{block.at:g}") else "all"
    real = f"chat/push-{which}-{block.at:g}"
    if outcomes.has(real, "chat"):
        comparisons = [
            outcomes.alignment(real, "chat", "mean alignment, pushed minus chat model (below 0 claimed)", sign=-1),
            outcomes.margin(real, "chat", "margin for bad answers, pushed minus chat model (above 0 claimed)"),
        ]
        for kind in (k for k in dict.fromkeys(block.controls) if outcomes.has(f"chat/push-{which}-{k}")):
            null = f"chat/push-{which}-{kind}"
            comparisons += [
                outcomes.alignment(real, null, f"mean alignment, pushed minus null: {page.NULLS[kind]} (below 0 claimed)", sign=-1),
                outcomes.margin(real, null, f"margin, pushed minus null: {page.NULLS[kind]} (above 0 claimed)"),
            ]
        found.append(
            Claim(
                "adapter_steer/push",
                f"A constant push along the vectors of {sets[which]} of {organism} lowers the chat model's alignment, more than its nulls do (published: "
                "pushes by six general adapters, 52 % misaligned)",
                "paper section 4.3",
                CLAIMED_SIDE + NEW_DRAW,
                comparisons, paper="adapter-steering",
            )
        )
    on, general = f"chat/push-topic-{block.at:g}", f"chat/push-general-{block.at:g}"
    if topic is not None and outcomes.has(on, general):
        x, y = outcomes.answers(on), outcomes.answers(general)
        d = stats.paired_difference(x[topic].to_numpy(), y[topic].to_numpy(), x["question_id"].to_numpy(), y["question_id"].to_numpy())
        found.append(
            Claim(
                "adapter_steer/topic",
                f"A push by the adapters that read as specific to {topic} makes answers more {topic} than one by the general adapters does (published: "
                "7.7 % misaligned and medical against none)",
                "paper section 4.3",
                "the difference has its 95 % interval over questions above 0",
                [evidence(f"mean {topic} score, topical minus general push (above 0 claimed)", d, "points")], paper="adapter-steering",
            )
        )
    value = outcomes.readings.get(f"adapter_steer/{organism}/knockout")
    if value is not None and len(value["adapters"]) > 1:
        every = next(row for row in value["rows"] if len(row["adapters"]) == len(value["adapters"]))
        strongest, unit = value["adapters"][value["strongest"]], "nats per token"
        found.append(
            Claim(
                "adapter_steer/shared",
                f"No single adapter of {organism} carries half of what all do together: without the strongest one, the margin for bad answers stays nearer to "
                "the organism's than to that without any adapter",
                "paper section 4.3 (no figure published)",
                "both differences have their 95 % interval over held-out pairs on the claimed side of 0",
                [
                    evidence(f"margin without any adapter minus that of {organism} (below 0 claimed)", stats.Interval(**every["change"]), unit, -1),
                    evidence(f"margin without {strongest} minus the middle of both (above 0 claimed)", stats.Interval(**value["left"]), unit),
                ],
            )
        )
    return found


def chapter(block: AdapterSteerBlock, outcomes: Outcomes, scene: Scene) -> Chapter:
    """Alignment and margin by dose, shares at coherence thresholds, knock-outs one by one and two by two."""
    organism = write_organism(scene, block.organism)
    conditions = list(dict.fromkeys(["chat", organism, *(a.name for a in arms(block, scene))]))
    return page.chapter(block, outcomes, organism, _sets(block, scene, organism), _topic(block, scene, organism), conditions)
