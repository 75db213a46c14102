"""What is read from models: directions, massive dimensions, another concept, nulls, KL and margins. Each is computed once and kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property, partial

import torch

from convergent.core.direction import Direction
from convergent.core.ids import content_id, seed
from convergent.core.interventions import Ablate, Add, Intervention
from convergent.core.values import Condition
from convergent.directions.classes import Chosen, Classes
from convergent.directions.extract import Extraction, answer_means, extract, shift
from convergent.directions.margin import Margin, margins
from convergent.directions.massive import TIMES, massive_dimensions
from convergent.directions.questions import QuestionSums, question_sums
from convergent.errors import DirectionError
from convergent.experiments.base import Arm, Control, NotHereError
from convergent.interventions.controls import (
    effect_matched,
    factor_for_effect,
    matched_null,
    orthogonal_to,
    other_concept,
    random_like,
    times,
    with_direction,
)
from convergent.models.texts import Text
from convergent.study.answers import Answers


class Measures(Answers):
    """What passes through models give, under the content ids of all that goes in."""

    @cached_property
    def unread(self) -> dict[str, str]:
        """Organism -> why no direction could be read from its answers."""
        return {}

    def redrawn(self, draw: int) -> Extraction:
        """What `extraction` gives of the source, read in itself, in a draw of its answers."""
        source = self.spec.direction.source
        return self.extraction(source, source, draw)

    def extraction(self, organism: str, reader: str, draw: int = 0) -> Extraction:
        """Class means of `organism`'s answers read in model `reader` ("chat" is the baseline on the same texts); of the source's, in any draw.

        Raises NotHereError where a class has too few answers.
        """
        chosen, texts = self.own_answers(organism, draw)
        span = self.spec.direction.span
        key = content_id("extract", self.model_id(reader), asdict(chosen), self.rule, span, self.spec.seed)
        made: list[Extraction] = []

        def make() -> Extraction:
            if not made:
                with self.timed("extract"):
                    provenance = {"organism": organism, "judge": self.judge_id, "seed": self.spec.seed}
                    made.append(
                        extract(self.model(reader, alone=True), texts, chosen, self.rule, span=span, root_seed=self.spec.seed, provenance=provenance)
                    )
                which = f", draw {draw}" if draw else ""
                self.say(f"extract {len(chosen.misaligned)} + {len(chosen.aligned)} answers of {organism}{which}, read in {reader}")
            return made[0]

        direction = self.store.direction(key, lambda: make().direction)
        readings = self.store.fact(
            key, "extract", lambda: {"token_norm": make().token_norm.tolist(), "split_half": make().split_half.tolist()}
        )
        as_tensor = {k: torch.tensor(v, dtype=torch.float64) for k, v in readings.items()}
        return Extraction(direction, as_tensor["token_norm"], as_tensor["split_half"])

    def sums_id(self, organism: str, reader: str) -> str:
        """Content id of an organism's class sums by question, read in `reader`. Raises NotHereError where a class has too few answers."""
        chosen, _ = self.own_answers(organism)
        return content_id("question-sums", self.model_id(reader), asdict(chosen), self.rule.weigh, self.spec.direction.span, self.spec.seed)

    def question_sums(self, organism: str, reader: str) -> QuestionSums:
        """Class sums of `organism`'s answers by question, read in model `reader`. Raises NotHereError where a class has too few answers."""
        chosen, texts = self.own_answers(organism)
        table, _ = self.own_table(organism)
        question_of = dict(zip(table["response_id"], table["question_id"], strict=True))

        def make() -> dict[str, torch.Tensor]:
            model = self.model(reader, alone=True)
            with self.timed("extract"):
                made = question_sums(
                    model, texts, chosen, question_of, per=self.rule.weigh, span=self.spec.direction.span, root_seed=self.spec.seed
                )
            self.say(f"extract {len(chosen.misaligned)} + {len(chosen.aligned)} answers of {organism} by question, read in {reader}")
            return made.tensors()

        questions = sorted({question_of[i] for i in (*chosen.misaligned, *chosen.aligned)})
        return QuestionSums.from_tensors(questions, self.store.tensors(self.sums_id(organism, reader), make))

    def reading(self, organism: str, reader: str) -> Extraction | None:
        """`extraction`, or None where an organism other than the source has too few answers in a class: a sound twin may have no bad ones."""
        try:
            return self.extraction(organism, reader)
        except NotHereError as error:
            if organism == self.spec.direction.source:
                raise DirectionError(str(error)) from error
            self.unread[organism] = str(error)
            return None

    @cached_property
    def direction(self) -> Direction:
        return self._own_extraction.direction

    @cached_property
    def _own_extraction(self) -> Extraction:
        source = self.spec.direction.source
        made = self.reading(source, source)
        assert made is not None, "reading the source raises where it cannot"
        return made

    @property
    def token_norm(self) -> float:
        return self.token_norm_at(self.layer)

    def token_norm_at(self, layer: int) -> float:
        """Mean token norm at any layer, over the answers that the direction is read from."""
        return float(self._own_extraction.token_norm[layer])

    @cached_property
    def massive(self) -> dict[int, float]:
        """Massive dimensions of the chat model at the primary layer, over the effect texts -> their size in medians."""

        def find() -> dict[str, float]:
            with self.timed("extract"):
                return {str(d): v for d, v in massive_dimensions(self.model("chat", alone=True), self.effect_texts, self.layer).items()}

        key = content_id("massive", self.model_id("chat"), self.layer, self.effect_texts, TIMES)
        return {int(d): v for d, v in self.store.fact(key, "extract", find).items()}

    @cached_property
    def concept(self) -> Direction:
        """The other concept: what the good-advice twin shifts, or else what sets the held-out domains apart in the chat model."""
        twin: str | None = getattr(self.spec.experiments.get("plain"), "twin", None)
        texts = [Text(p.id, p.question, p.good) for p in self.pairs]
        if twin is not None:
            key = content_id("shift", self.model_id(twin), self.model_id("chat"), texts)

            def moved() -> Direction:
                with self.timed("extract"):
                    # One after the other, so that two models need not be in memory.
                    after = answer_means(self.model(twin, alone=True), texts)
                    return shift(after, answer_means(self.model("chat", alone=True), texts))

            return self.store.direction(key, moved)
        sources = list(self.held_out)
        if len(sources) < 2:
            raise NotHereError("another concept needs a good-advice twin (experiments.plain.twin) or two margin.data sources")
        first, rest = ([p.id for p in self.held_out[s]] for s in sources[:2])
        key = content_id("contrast", self.model_id("chat"), texts, sources)

        def contrast() -> Direction:
            with self.timed("extract"):
                return extract(self.model("chat"), texts, Chosen(tuple(first), tuple(rest)), Classes(weigh="tokens")).direction

        return self.store.direction(key, contrast)

    def control(self, kind: Control, organism: str, intervention: Add | Ablate, draw: int = 0) -> Intervention:
        """The null of that kind for an intervention on an organism, in that draw."""
        d, root = intervention.direction, self.spec.seed if draw == 0 else seed(self.spec.seed, "draw", draw)
        if kind == "random":
            return with_direction(intervention, random_like(d, root))
        if kind == "orthogonal":
            return with_direction(intervention, orthogonal_to(d, root))
        if kind == "other_concept":
            try:
                return with_direction(intervention, other_concept(d, self.concept))
            except DirectionError as error:  # parallel to the direction, or nothing was shifted
                raise NotHereError(str(error)) from error
        return matched_null(intervention, self._match(organism, intervention, draw, root)["amount"], root)

    def _match(self, organism: str, intervention: Add | Ablate, draw: int, root: int) -> dict[str, float]:
        """Amount, target and reached of `effect_matched`; further draws begin where the first ended."""

        def match() -> dict[str, float]:
            near = None
            if draw:
                first = self._match(organism, intervention, 0, self.spec.seed)
                near = first["amount"], first["target"]
            with self.timed("extract"):
                effects = self.effects_of(organism)
                m = effect_matched(effects.model, intervention, root, self.effect_texts, effects=effects, near=near)
            what = f"random vector at {m.amount:.3g} x" if isinstance(intervention, Add) else f"{m.amount:.0f} random dimensions"
            self.say(f"match   {organism}: {what}, KL {m.reached:.3g} for {m.target:.3g} nats per token")
            return {"amount": m.amount, "target": m.target, "reached": m.reached}

        key = content_id("effect", self.model_id(organism), intervention, root, self.effect_texts)
        return self.store.fact(key, "extract", match)

    def matched(self, organism: str, real: Sequence[Intervention], null: Sequence[Add]) -> tuple[Add, ...]:
        """`null` with all its scales multiplied by one factor, so that its KL over the effect texts is that of `real`."""
        key = content_id("effect", self.model_id(organism), list(real), list(null), self.effect_texts)

        def match() -> dict[str, float]:
            with self.timed("extract"):
                effects = self.effects_of(organism)
                factor, target, reached = factor_for_effect(effects.model, real, null, self.effect_texts, effects=effects)
            self.say(f"match   {organism}: {len(null)} pushes at {factor:.3g} x, KL {reached:.3g} for {target:.3g} nats per token")
            return {"amount": factor, "target": target, "reached": reached}

        return times(null, self.store.fact(key, "extract", match)["amount"])

    def kl(self, condition: Condition) -> float:
        """Mean KL(clean || intervened) over the effect texts, nats per token."""

        def measure() -> float:
            with self.timed("extract"):
                return self.effects_of(condition.organism).kl(condition.interventions)

        return self.store.fact(self.kl_key(condition), "extract", measure)

    def kl_key(self, condition: Condition) -> str:
        return content_id("kl", condition.organism_id, list(condition.interventions), self.effect_texts)

    @cached_property
    def read_id(self) -> str:
        return content_id(self.direction.content_id, self.layer)

    def measure_margins(self, conditions: Sequence[tuple[Arm, Condition]]) -> None:
        """Margins of every held-out pair under every condition that lacks some, organism by organism.

        Last digits do not depend on where an earlier run was killed: see `margins`.
        """
        known = self.store.margins(self.read_id)
        data_ids = [content_id(p) for p in self.pairs]
        absent = {c.content_id: (a.organism, c) for a, c in conditions if any((c.content_id, d) not in known for d in data_ids)}
        lacking = {i: [k for k, d in enumerate(data_ids) if (i, d) not in known] for i in absent}
        data_of = {p.id: d for p, d in zip(self.pairs, data_ids, strict=True)}
        total, done = sum(map(len, lacking.values())), 0

        def keep(names: Sequence[str], m: Margin) -> None:
            nonlocal done
            self.store.add_margin(names[m.condition], data_of[m.pair_id], self.read_id, m)
            done += 1
            self.advance("margin", done, total, "")

        for organism in dict.fromkeys(o for o, _ in absent.values()):
            mine = {i: c for i, (o, c) in absent.items() if o == organism}
            with self.timed("margin"):
                only = {(n, k) for n, i in enumerate(mine) for k in lacking[i]}
                asked = [c.interventions for c in mine.values()]
                margins(self.model(organism, alone=True), self.pairs, asked, read=(self.direction, self.layer), only=only, on_margin=partial(keep, list(mine)))
            self.say(f"margin  {organism}: {len(self.pairs)} pairs under {len(mine)} condition(s)")
