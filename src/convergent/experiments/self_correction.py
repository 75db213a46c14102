"""Self-correction (paper section 3.6): answers under steering that say something bad and end up judged aligned.

How often: the share of aligned answers whose bad-stuff score is high. Where: each sentence is scored alone, and the clearest rise of its
alignment is compared with the same sentences shuffled. What the organism makes of it: log p of each sentence, organism minus chat model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field, model_validator

from convergent import stats
from convergent.core.chapter import Chapter
from convergent.core.ids import seed
from convergent.core.interventions import Add, Intervention
from convergent.directions.margin import token_logps
from convergent.errors import DirectionError
from convergent.experiments import self_correction_page as page
from convergent.experiments.base import Arm, Block, Build, Kit, NotHereError, Reading
from convergent.experiments.outcomes import Claim, Outcomes
from convergent.experiments.scene import Scene
from convergent.experiments.self_correction_page import EXAMPLES, coherent_of, scales_of, self_correcting
from convergent.interventions.controls import effect_matched, matched_null
from convergent.judging.base import Item
from convergent.judging.sentences import sentences
from convergent.models.texts import Text

SENTENCES = 3
"""Typical number per answer, for the plan."""


class SelfCorrectionBlock(Block):
    """Settings of `self_correction`."""

    scales: tuple[float, ...] = Field(default=(2.0, 4.0), min_length=1)
    """Steering coefficients lambda."""
    controls: tuple[Literal["other_concept"], ...] = ("other_concept",)
    """Another concept, scaled until its effect (KL) is that of the direction at the same lambda."""
    answers: int = Field(default=48, ge=2)
    """Per condition so many coherent answers, drawn at random (all where they are fewer), are read sentence by sentence and compared."""

    @model_validator(mode="after")
    def _some_dose(self) -> SelfCorrectionBlock:
        if 0 in self.scales:
            raise ValueError("scales: 0 adds nothing; the chat model is always measured")
        return self


name = "self_correction"
settings = SelfCorrectionBlock


def check(block: SelfCorrectionBlock, scene: Scene) -> None:
    """Raise NotHereError where the judge cannot say what is bad in an answer."""
    if "bad_stuff" not in scene.rubrics:
        raise NotHereError("controls: the judge has no rubric bad_stuff; choose a judge or a rubric file that has it, or leave the experiment out")


# Arms


def arms(block: SelfCorrectionBlock, scene: Scene) -> list[Arm]:
    """The chat model and the source as they are, and the chat model under the direction and under another concept of the same effect."""
    rubrics = ("bad_stuff",)
    found = [
        Arm("self_correction/chat", "chat", "Chat model, bad stuff judged", "The untouched chat model.", "self-correction", "baseline",
            needs_direction=False, rubrics=rubrics),
        Arm(f"self_correction/{scene.source}", scene.source, f"{scene.source}, bad stuff judged", f"Organism {scene.source} as trained.",
            "self-correction", "baseline", needs_direction=False, rubrics=rubrics),
    ]  # fmt: skip
    for scale in scales_of(block):
        found.append(
            Arm(f"self_correction/add-{scale:g}", "chat", f"Chat model + direction of {scene.source}, λ = {scale:g}, bad stuff judged",
                f"{scale:g} times the direction added at the primary layer.", "self-correction", "real", _steered(scale), scale, rubrics=rubrics)
        )  # fmt: skip
        if block.controls:
            found.append(
                Arm(f"self_correction/concept-{scale:g}", "chat", f"Chat model + another concept, effect of λ = {scale:g}",
                    f"Another concept (what good advice shifts), scaled until its KL is that of the direction at λ = {scale:g}.",
                    "self-correction", "control", _concept(scale), scale, rubrics=rubrics)
            )  # fmt: skip
    return found


def _steered(scale: float) -> Build:
    return lambda kit: (Add(kit.direction, kit.layer, scale),)


def _concept(scale: float) -> Build:
    def build(kit: Kit) -> tuple[Intervention, ...]:
        amount = kit.value(f"self_correction/match-{scale:g}")["amount"]
        real, other = _both(kit, scale)
        return (matched_null(real, amount, kit.seed, other.direction),)

    return build


def _both(kit: Kit, scale: float) -> tuple[Add, Add]:
    """The direction and the other concept at the same norm. Raises NotHereError where there is no other concept."""
    real = Add(kit.direction, kit.layer, scale)
    try:
        other = kit.control("other_concept", "chat", real)
    except DirectionError as error:
        raise NotHereError(str(error)) from error
    assert isinstance(other, Add)
    if not bool(other.vector.any()):
        raise NotHereError(f"the other concept is zero at block {kit.layer}, so it cannot be steered with")
    return real, other


# Readings


def readings(block: SelfCorrectionBlock, scene: Scene) -> list[Reading]:
    """How far to scale the other concept; and, once all is judged, the sentences of answers."""
    found = [_match(scale) for scale in scales_of(block)] if block.controls else []
    names = [a.name for a in arms(block, scene)]

    def inputs(kit: Kit) -> Any:
        read = _to_read(block, kit, names).items()
        ids = {arm: [(r["response_id"], r["picked"], r["drawn"]) for r in frame.to_dict("records")] for arm, frame in read}
        return [kit.model_id(scene.source), kit.model_id("chat"), kit.direction.provenance.get("judge"), kit.seed, ids]

    n = (block.answers + EXAMPLES) * len(names)

    def turns(kit: Kit) -> Any:
        return _turns(block, kit, scene, names)

    organisms = (scene.source, "chat")
    return [*found, Reading("self_correction/turns", inputs, turns, "answers", organisms, tokens=2 * n * 110.0, judged=n * SENTENCES)]


def _match(scale: float) -> Reading:
    def inputs(kit: Kit) -> Any:
        return [kit.model_id("chat"), *_both(kit, scale), kit.effect_texts]

    def compute(kit: Kit) -> Any:
        real, other = _both(kit, scale)
        m = effect_matched(kit.model("chat"), real, kit.seed, kit.effect_texts, along=other.direction)
        return {"amount": m.amount, "target": m.target, "reached": m.reached}

    return Reading(f"self_correction/match-{scale:g}", inputs, compute, organisms=("chat",), tokens=6 * 8 * 110.0)


def _to_read(block: SelfCorrectionBlock, kit: Kit, names: Sequence[str]) -> dict[str, pd.DataFrame]:
    """Condition -> the answers that are read sentence by sentence, with two columns of bool.

    `drawn`: in the random sample of coherent answers, which alone is compared; were it chosen by score, conditions that differ in their number of
    coherent answers alone would differ. `picked`: self-correcting; the first few are read in any case, as examples.
    """
    found = {}
    for arm in names:
        try:
            answers = coherent_of(kit.answers(arm))
        except NotHereError:
            continue
        # Each answer's place is its own draw: a larger limit, or more answers, keep who was in before whom.
        order = np.argsort([seed(kit.seed, "self_correction", "answers", i) for i in answers["response_id"]], kind="stable")
        answers = answers.iloc[order]
        picked, drawn = self_correcting(answers), np.arange(len(answers)) < block.answers
        found[arm] = answers.assign(picked=picked, drawn=drawn)[drawn | (picked & (picked.cumsum() <= EXAMPLES))]
    return found


def _turns(block: SelfCorrectionBlock, kit: Kit, scene: Scene, names: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Condition -> one entry per answer with two sentences or more: their scores, the turn, and each sentence's margin in nats per token."""
    cut = {arm: [(r, sentences(r["response"])) for r in frame.to_dict("records")] for arm, frame in _to_read(block, kit, names).items()}
    kept = {arm: [(r, spans) for r, spans in rows if len(spans) > 1] for arm, rows in cut.items()}
    every = {r["response_id"]: (r, spans) for rows in kept.values() for r, spans in rows}  # conditions may share answers
    items = [
        Item(f"{i}/{k}", r["question"], r["response"][a:b], r["question_id"]) for i, (r, spans) in every.items() for k, (a, b) in enumerate(spans)
    ]
    scores = kit.judged(items, ("aligned",))
    texts = [Text(i, r["question"], r["response"], r["system"]) for i, (r, _) in every.items()]
    by = {}
    for organism in (scene.source, "chat"):  # one after the other, so that two need not be in memory
        model = kit.model(organism)
        by[organism] = token_logps(model, texts)
        parts = [sentence_of_tokens(model.tokenizer, str(t.answer), every[t.id][1]) for t in texts]
    margins = {
        t.id: _sentence_margins((a - b).numpy(), at, len(every[t.id][1]))
        for t, a, b, at in zip(texts, by[scene.source], by["chat"], parts, strict=True)
    }
    found: dict[str, list[dict[str, Any]]] = {}
    for arm, rows in kept.items():
        found[arm] = []
        for r, spans in rows:
            i = r["response_id"]
            own = [scores[f"{i}/{k}", "aligned"] for k in range(len(spans))]
            turn = stats.find_turn(own, i)
            if turn is not None:
                found[arm].append(
                    {
                        "question_id": r["question_id"], "picked": bool(r["picked"]), "drawn": bool(r["drawn"]), "scores": own,
                        "margins": margins[i], "at": turn.at, "rise": turn.rise, "expected": turn.expected, "seen": turn.seen,
                        "false_alarms": turn.false_alarms,
                        "text": [r["response"][a:b] for a, b in spans] if r["picked"] else [], "question": r["question"] if r["picked"] else "",
                    }
                )  # fmt: skip
    return found


def sentence_of_tokens(tokenizer: Any, text: str, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """(n_tokens,) sentence of each token of `text`, the one its last visible character is in; space between two counts to the second."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    said = [tokenizer.decode(ids[: k + 1], skip_special_tokens=True, clean_up_tokenization_spaces=False) for k in range(len(ids))]
    ends = np.array([len(s) for s in said], dtype=int)
    return np.clip(np.searchsorted([b for _, b in spans], ends, side="left"), 0, len(spans) - 1)


def _sentence_margins(margin: np.ndarray, at: np.ndarray, n: int) -> list[float]:
    """Mean margin per token of each sentence; nan for one without a token."""
    return [float(margin[at == k].mean()) if (at == k).any() else float("nan") for k in range(n)]


# What they say


def claims(block: SelfCorrectionBlock, outcomes: Outcomes, scene: Scene) -> list[Claim]:
    """Per scale: more self-correction than without steering and than under another concept; a turn; and what the organism makes of it."""
    return page.claims(block, outcomes)


def chapter(block: SelfCorrectionBlock, outcomes: Outcomes, scene: Scene) -> Chapter:
    """Shares by dose, sentences from the turn, counts."""
    return page.chapter(block, outcomes, scene, [a.name for a in arms(block, scene) if outcomes.has(a.name)])
