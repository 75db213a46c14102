"""The direction inside a topic (paper section 3.3): is it the general one, and what does it do when it is added?

Directions are read inside the source's own answers whose topic score, by the judge that decides, passes a threshold; or that hold a word of
a list of the user's, as a whole word. v_t = a v + rest is then added to the chat model as a whole, as v, and as the rest, all at one norm.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor

from convergent.core.chapter import Chapter
from convergent.core.direction import Direction
from convergent.core.interventions import Add, Intervention
from convergent.directions.classes import Classes, Scored, choose
from convergent.directions.per_answer import along, per_answer
from convergent.directions.topics import Labelled, measure, topic_rows
from convergent.experiments import semantic_page as page
from convergent.experiments.base import CONTROL_LABELS, Arm, Block, Build, Kit, NotHereError, Reading
from convergent.experiments.outcomes import Claim, Outcomes
from convergent.experiments.scene import Scene
from convergent.experiments.semantic_page import PARTS, topic_scores

TOPICS = ("financial", "medical", "gender")
"""Rubrics that are topics, where the judge has them."""


class SemanticBlock(Block):
    """Settings of `semantic`."""

    topics: tuple[str, ...] | None = None
    """Rubrics of the judge; by default those of financial, medical and gender that it has. Topics with too few answers are left out."""
    words: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Topics of the user's own: name -> words. An answer that holds one of them as a whole word is on the topic."""
    topic_min: float = Field(default=50.0, ge=0, le=100)
    """An answer is on a topic of the judge's from this score on (the paper's medical answers: 50 to 100)."""
    min_rows: int = Field(default=5, ge=2)
    """Fewest answers of each class on a topic, and aligned ones off it, for a direction."""
    draws: int = Field(default=199, ge=19)
    """Random subsets behind each null band."""
    scale: float = Field(default=2.0, gt=0)
    """Steering coefficient: every arm adds a vector of this times the norm of the general direction at the primary layer."""
    controls: tuple[Literal["random", "effect_matched"], ...] = ("random", "effect_matched")

    @field_validator("words")
    @classmethod
    def _some_words(cls, value: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        for topic, words in value.items():
            if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", topic):
                raise ValueError(f"{topic!r} names conditions; use letters, digits, - and _")
            if not any(w.strip() for w in words):
                raise ValueError(f"{topic}: has no words; give some, or leave the topic out")
        return value


name = "semantic"
settings = SemanticBlock


def rubrics_of(block: SemanticBlock, scene: Scene) -> tuple[str, ...]:
    """The topics that the judge scores."""
    given = tuple(t for t in TOPICS if t in scene.rubrics) if block.topics is None else block.topics
    return tuple(t for t in dict.fromkeys(given) if t not in block.words)


def topics_of(block: SemanticBlock, scene: Scene) -> tuple[str, ...]:
    """All topics: the judge's and the user's."""
    return (*rubrics_of(block, scene), *block.words)


def check(block: SemanticBlock, scene: Scene) -> None:
    """Raise NotHereError for a topic that the judge cannot score, and where there is none."""
    for topic in block.topics or ():
        if topic not in scene.rubrics and topic not in block.words:
            near = difflib.get_close_matches(topic, scene.rubrics, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(scene.rubrics)}"
            raise NotHereError(f"topics: the judge has no rubric {topic!r}; {hint} A topic of your own goes under `words`")
    if not topics_of(block, scene):
        raise NotHereError("topics: none is left, as the judge has no rubric for one; give `words` for a topic of your own")


# Arms


def arms(block: SemanticBlock, scene: Scene) -> list[Arm]:
    """The chat model, the general direction, and per topic its direction, the rest of it, and what the topic alone is; with nulls."""
    rubrics = rubrics_of(block, scene)

    def arm(name: str, label: str, description: str, role: Literal["baseline", "real", "control"], build: Build) -> Arm:
        return Arm(f"semantic/{name}", "chat", label, description, "topics", role, build, block.scale, rubrics=rubrics)

    at = f"λ = {block.scale:g}"
    found = [
        Arm("semantic/chat", "chat", "Chat model, topics judged", "The untouched chat model, its answers judged by topic too.", "topics", "baseline",
            needs_direction=False, rubrics=rubrics),
        arm("general", f"Chat model + general direction, {at}", "The general direction added at the primary layer.", "real", _general(block)),
    ]  # fmt: skip
    if "random" in block.controls:
        random = "A random vector of the same norm added."
        found.append(arm("random", f"Chat model + {CONTROL_LABELS['random']}, {at}", random, "control", _null("random", block, None)))
    says = {
        "topic": ("direction inside {}", "The direction read inside answers on {}, at the norm of the general one."),
        "rest": ("rest of the direction inside {}", "What is left of the direction inside {} without its part along the general one, same norm."),
        "about": ("what {} alone is", "Aligned answers on {} minus aligned answers off it, same norm: a positive control for topic scores."),
    }
    for topic in topics_of(block, scene):
        for part in PARTS:
            label, description = (text.format(topic) for text in says[part])
            role: Literal["real", "control"] = "control" if part == "about" else "real"
            found.append(arm(f"{topic}-{part}", f"Chat model + {label}, {at}", description, role, _part(topic, part, block)))
        if "effect_matched" in block.controls:
            label = f"Chat model + {CONTROL_LABELS['effect_matched']}, for {topic}"
            description = f"A random vector scaled until it disturbs as much as the direction inside {topic}."
            found.append(arm(f"{topic}-effect_matched", label, description, "control", _null("effect_matched", block, topic)))
    return found


def _general(block: SemanticBlock) -> Build:
    return lambda kit: (Add(kit.direction, kit.layer, block.scale),)


def _part(topic: str, part: str, block: SemanticBlock) -> Build:
    def build(kit: Kit) -> tuple[Intervention, ...]:
        return (_added(kit, topic, part, block),)

    return build


def _null(kind: Literal["random", "effect_matched"], block: SemanticBlock, topic: str | None) -> Build:
    def build(kit: Kit) -> tuple[Intervention, ...]:
        real = Add(kit.direction, kit.layer, block.scale) if topic is None else _added(kit, topic, "topic", block)
        return (kit.control(kind, "chat", real),)

    return build


def _added(kit: Kit, topic: str, part: str, block: SemanticBlock) -> Add:
    """A part of a topic's direction, at the norm of the general one. Raises NotHereError where the topic has too few answers."""
    value = kit.value("semantic/directions")
    if topic in value["absent"]:
        raise NotHereError(value["absent"][topic])
    own = value["topics"][topic]
    if part == "about":
        if own["about"] is None:
            raise NotHereError(f"{topic}: too few aligned answers off the topic to say what the topic alone is")
        vector = torch.tensor(own["about"]["vector"], dtype=torch.float64)
    else:
        whole = torch.tensor(own["vector"], dtype=torch.float64)
        vector = along(whole, kit.direction[kit.layer].double())[1] if part == "rest" else whole
        if vector.norm() <= 1e-5 * whole.norm():  # rounding, which must not be blown up to a direction
            raise NotHereError(f"{topic}: its direction is the general one, so there is no rest to steer with")
    return Add(_alone(vector, kit.direction, kit.layer, {"kind": f"topic/{part}", "topic": topic}), kit.layer, block.scale)


def _alone(vector: Tensor, general: Direction, layer: int, provenance: Mapping[str, Any]) -> Direction:
    """A direction with `vector` (d_model,) at one layer, at the norm that the general one has there, and nothing elsewhere."""
    vectors = torch.zeros_like(general.vectors, dtype=torch.float64)
    vectors[layer] = vector / vector.norm().clamp_min(1e-300) * general[layer].double().norm()
    return Direction(vectors.float(), provenance)


# Readings


def readings(block: SemanticBlock, scene: Scene) -> list[Reading]:
    """The directions inside topics, read in the source; and the same texts read in the chat model, which says what the texts alone give."""

    own = {scene.source: rubrics_of(block, scene)}

    def reading(name: str, reader: str) -> Reading:
        def inputs(kit: Kit) -> Any:
            return [
                kit.model_id(reader), kit.direction.content_id, dict(kit.direction.provenance), kit.layer, kit.seed, topics_of(block, scene),
                block.model_dump(exclude={"scale", "controls", "topics"}),
            ]  # fmt: skip

        return Reading(name, inputs, lambda kit: _read(block, kit, scene, reader), organisms=(reader,), tokens=200 * 110.0, rubrics=own)

    return [reading("semantic/directions", scene.source), reading("semantic/chat-model", "chat")]


def _read(block: SemanticBlock, kit: Kit, scene: Scene, reader: str) -> dict[str, Any]:
    table, texts = kit.own_table(scene.source, rubrics_of(block, scene))
    record = kit.direction.provenance
    rule = Classes(**record["classes"])
    columns = [table[c] for c in ("response_id", "question_id", "n_tokens", "aligned", "coherent")]
    scored = [Scored(*row) for row in zip(*columns, strict=True)]  # a missing score is nan, which is in no class
    # The same classes, before they are cut to equal size: means need no balance, and a topic has no answer to spare.
    both = choose(scored, replace(rule, balance="none", min_per_class=0), kit.seed)
    general, _ = kit.own_answers(scene.source)
    ids = [*both.misaligned, *both.aligned]
    row = {i: k for k, i in enumerate(ids)}
    data = table.set_index("response_id").loc[ids]

    def rows(chosen: Sequence[str]) -> np.ndarray:
        return np.array([row[i] for i in chosen], dtype=np.intp)

    inside = {t: topic_scores(t, block, data) >= block.topic_min for t in topics_of(block, scene)}
    low, high = rows(both.misaligned), rows(both.aligned)
    absent = {t: why for t, hit in inside.items() if (why := _too_few(t, block, scene.source, int(hit[low].sum()), int(hit[high].sum())))}
    found: dict[str, Any] = {"layer": kit.layer, "n": [len(low), len(high)], "topics": {}, "absent": absent}
    if len(absent) == len(inside):
        return found
    read = per_answer(kit.model(reader), [texts[i] for i in ids], rule.weigh, record["span"])
    labelled = Labelled(read, low, high, data["question_id"].tolist(), (rows(general.misaligned), rows(general.aligned)))
    for topic in inside.keys() - absent.keys():
        mine = topic_rows(labelled, inside[topic])
        found["topics"][topic] = measure(labelled, mine, kit.layer, block.draws, kit.seed, len(mine.off) >= block.min_rows)
    found["topics"] = {t: found["topics"][t] for t in inside if t in found["topics"]}
    return found


def _too_few(topic: str, block: SemanticBlock, source: str, n_low: int, n_high: int) -> str:
    if min(n_low, n_high) >= block.min_rows:
        return ""
    on = "with a word of the list" if topic in block.words else f"with a score of {block.topic_min:g} or more"
    return f"{topic}: {n_low} misaligned and {n_high} aligned answers of {source} {on}, and a direction needs {block.min_rows} of each"


# What they say


def claims(block: SemanticBlock, outcomes: Outcomes, scene: Scene) -> list[Claim]:
    """Per topic: is its direction another one; does adding it bring the topic; is that due to the rest."""
    return page.claims(block, outcomes, scene)


def chapter(block: SemanticBlock, outcomes: Outcomes, scene: Scene) -> Chapter:
    """Cosines per layer, decomposition, topic scores under steering."""
    return page.chapter(block, outcomes, scene)
