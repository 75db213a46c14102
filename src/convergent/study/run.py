"""Running a study: what is not done yet, stage by stage, each row kept as it is made.

    train -> sample (plain, and for the direction) -> judge -> extract -> sample (interventions) -> judge -> margins -> report

Everything is keyed by content: a changed organism changes its own id, its conditions', its direction's, and so redoes exactly
what depends on it. Only one organism is in memory at a time, beside the chat model.
"""

from __future__ import annotations

import ctypes
import gc
import math
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import pandas as pd
import torch

from convergent.core.direction import Direction
from convergent.core.ids import content_id, seed
from convergent.core.interventions import Ablate, Add, Intervention
from convergent.core.values import Condition, Judgement, Pair, Response
from convergent.directions.classes import Chosen, Classes, Scored, choose
from convergent.directions.extract import Extraction, answer_means, extract, shift
from convergent.directions.margin import Margin, margins
from convergent.directions.massive import TIMES, massive_dimensions
from convergent.directions.questions import QuestionSums, question_sums
from convergent.errors import DirectionError, ModelError
from convergent.experiments.base import Arm, Control, Kit, NotHereError, Reading, When
from convergent.interventions.controls import (
    Effects,
    effect_matched,
    factor_for_effect,
    matched_null,
    orthogonal_to,
    other_concept,
    random_like,
    times,
    with_direction,
)
from convergent.judging.base import Item
from convergent.models.load import ChatModel, load_base
from convergent.models.texts import Text
from convergent.organisms.adapters import Adapter, read_adapters
from convergent.organisms.load import load_organism
from convergent.organisms.manifest import MANIFEST
from convergent.organisms.steps import KeptSteps, Spacing, read_steps
from convergent.sampling.lane import Tally
from convergent.sampling.requests import Request, make_requests
from convergent.sampling.sampler import sample
from convergent.store import Store
from convergent.study.before import Before
from convergent.study.setup import RUBRICS, OrganismPlan, Say, Setup
from convergent.study.spec import StudySpec

EFFECT_TEXTS = 8
"""Held-out good answers over which the KL of interventions is measured."""

Advance = Callable[[str, int, int, str], None]
"""(stage, done, total, a word to show beside it)."""


class NotDoneError(Exception):
    """A run that may not compute needs something that is not there. Never leaves the plan."""


class Run(Setup):
    """One study in one folder. Lazily computed parts are pure functions of the spec and the store."""

    def __init__(
        self,
        spec: StudySpec,
        store: Store,
        say: Say = lambda line: None,
        advance: Advance = lambda *a: None,
        compute: bool = True,
    ) -> None:
        """`compute=False`: whatever would load a model raises NotDoneError, so that a plan can ask for what is there."""
        super().__init__(spec, store, say, compute)
        self.advance = advance
        self._models: dict[str, ChatModel] = {}
        self.tally = Tally()
        self.unread: dict[str, str] = {}
        """Organism -> why no direction could be read from its answers."""
        self.left_out: dict[str, str] = {}
        """Arm -> why it cannot be in this study."""

    # Models

    def model(self, organism: str, alone: bool = False) -> ChatModel:
        """The chat model or an organism, loaded; at most one organism is kept beside the chat model, and with `alone` nothing beside it."""
        if not self.compute:
            raise NotDoneError(organism)
        others = [n for n in self._models if n != organism and (alone or "chat" not in (n, organism))]
        for other in others:
            del self._models[other]
        if others:
            if self._effects is not None and self._effects.model not in self._models.values():
                self._effects = None
            _give_memory_back()
        if organism not in self._models:
            if organism == "chat":
                made = load_base(self.spec.base, self.dtype, self.spec.device)
            else:
                made = load_organism(self.organisms[organism].folder, base=self.spec.base, dtype=self.dtype, name=organism)
            self._models[organism] = made
        return self._models[organism]

    # Stages

    def train_all(self) -> None:
        """Train the organisms that are not there yet."""
        for plan in self.organisms.values():
            if plan.recipe is None or plan.data is None or plan.folder.is_dir():
                continue
            self.say(f"train   {plan.name}: {plan.spec.recipe} on {len(plan.data)} examples of {plan.data.name}")
            self._train(plan, plan.folder, self.keeps.get(plan.name, ()))

    def _train(self, plan: OrganismPlan, folder: Path, kept: Sequence[Spacing]) -> None:
        from convergent.organisms.train import Progress, train  # brings transformers' trainer: seconds that a plan or a report need not wait

        assert plan.recipe is not None and plan.data is not None, "organisms from elsewhere are not trained"

        def advance(p: Progress) -> None:
            self.advance(f"train {plan.name}", p.step, p.n_steps, f"loss {p.loss:.3f}")

        with self._timed("train"):
            train(
                self.spec.base,
                plan.recipe,
                [e.chat() for e in plan.data.examples],
                folder,
                name=plan.name,
                data_name=plan.data.name,
                data_checksum=plan.data.checksum,
                keep=(lambda n: {s for spacing in kept for s in spacing.of(n)}) if kept else None,
                on_progress=advance,
            )
        _give_memory_back()

    def requests(self, arms: Sequence[tuple[Arm, Condition]], block: str = "main") -> list[Request]:
        samples = self.spec.questions.samples if block == "main" else self.spec.direction.samples
        return list(make_requests([c for _, c in arms], self.questions, samples, self.spec.seed, block))

    def condition(self, arm: Arm, interventions: tuple[Intervention, ...] = ()) -> Condition:
        return Condition(arm.name, arm.organism, self.model_id(arm.organism), interventions, self.sampling)

    def sample(self, wanted: Sequence[tuple[str, Request, str]]) -> None:
        """Draw what is absent of (organism, request, block), organism by organism."""
        have = self.store.response_ids()
        # Two organisms of equal content ask for the same answers: by id, each is drawn once.
        by_id = {r.id: (organism, r, block) for organism, r, block in reversed(wanted)}
        absent = [w for i, w in reversed(by_id.items()) if i not in have]
        done = len(by_id) - len(absent)
        for organism in dict.fromkeys(o for o, _, _ in absent):
            mine = [(r, block) for o, r, block in absent if o == organism]
            blocks = {r.id: block for r, block in mine}
            with self._timed("sample"):
                model = self.model(organism, alone=True)

                def keep(response: Response, organism: str = organism, blocks: dict[str, str] = blocks) -> None:
                    nonlocal done
                    self.store.add_response(response, organism, blocks[response.id])
                    done += 1
                    self.advance("sample", done, len(by_id), organism)

                before, start = self.tally.tokens, time.perf_counter()
                sample(model, [r for r, _ in mine], keep, self.spec.sampling.rows, self.tally)
                speed = (self.tally.tokens - before) / (time.perf_counter() - start)
            n_conditions = len({r.condition.content_id for r, _ in mine})
            self.say(f"sample  {organism}: {len(mine)} answers under {n_conditions} condition(s), {speed:.0f} tokens/s")

    def judge_all(self, groups: Sequence[Sequence[str]], judge_id: str | None = None, rubrics: Sequence[str] = RUBRICS) -> None:
        """Judge what is not judged yet of groups of response ids, a group being the answers of one condition; by the judge that decides, or another.

        A local judge's scores depend, in their last digits, on what shares its batch. So it gets whole groups, even if some of a group is
        judged already: a run that was killed ends with the same digits as one that was not.
        """
        judge_id = judge_id or self.judge_id
        judge = self.judges[judge_id]
        known = self.store.judgements(judge_id)
        open_groups = [g for g in groups if any((i, rubric) not in known for i in g for rubric in rubrics)]
        if hasattr(judge, "estimate"):  # paid by the request: asked once, with one estimate, for what is absent
            open_groups = [[i for g in open_groups for i in g if any((i, rubric) not in known for rubric in rubrics)]]
        total = len(rubrics) * sum(len(g) for g in open_groups)
        done = 0
        if total:  # a judge on this machine needs the room
            self._models.clear()
            _give_memory_back()

        def keep(j: Judgement) -> None:
            nonlocal done
            self.store.add_judgement(j, judge_id)
            done += 1
            self.advance("judge" if judge is self.judge else f"judge {judge.name}", done, total, "")

        for group in filter(None, open_groups):
            with self._timed("judge"):
                items = [Item(r.id, r.question, r.response, r.question_id) for r in self.store.responses(dict.fromkeys(group))]
                judge.judge(items, rubrics, keep)
        if total:
            spent = getattr(judge, "spent", 0.0)
            what = "" if tuple(rubrics) == RUBRICS else f" for {', '.join(rubrics)}"
            self.say(f"judge   {total // len(rubrics)} answers by {judge.name}{what}{f', ${spent:.4f} spent' if spent else ''}")

    # Directions

    @cached_property
    def rule(self) -> Classes:
        return Classes(**self.spec.direction.classes.model_dump())

    def own_requests(self, organism: str) -> list[Request]:
        """The requests whose answers an organism's direction is read from."""
        arm = next(a for a in self.arms if a.name == organism)
        block = "direction" if organism == self.spec.direction.source else "main"
        return self.requests([(arm, self.condition(arm))], block)

    def own_answers(self, organism: str) -> tuple[Chosen, list[Text]]:
        """Classes among an organism's own judged answers, and their texts. Raises NotHereError where a class has too few."""
        table, texts = self.own_table(organism)

        def known(score: float) -> float | None:
            return None if math.isnan(score) else score

        scored = [
            Scored(r["response_id"], r["question_id"], r["n_tokens"], known(r["aligned"]), known(r["coherent"])) for r in table.to_dict("records")
        ]
        try:
            return choose(scored, self.rule, self.spec.seed), list(texts.values())
        except DirectionError as error:
            raise NotHereError(str(error)) from error

    def own_table(self, organism: str, rubrics: Sequence[str] = ()) -> tuple[pd.DataFrame, dict[str, Text]]:
        """An organism's own answers with their scores, and id -> text; judged by `rubrics` too if they are not yet."""
        responses = self.store.responses([r.id for r in self.own_requests(organism)])
        if rubrics and self.compute:
            self.judge_all([[r.id for r in responses]], rubrics=rubrics)
        return self._table(responses, rubrics), {r.id: Text(r.id, r.question, r.token_ids, r.system) for r in responses}

    def _table(self, responses: Sequence[Response], rubrics: Sequence[str]) -> pd.DataFrame:
        scores = self.store.judgements(self.judge_id)

        def score(r: Response, rubric: str) -> float:
            j = scores.get((r.id, rubric))
            return math.nan if j is None or j.score is None else j.score

        columns = ("response_id", "question_id", "topic", "question", "response", "system", "sample", "n_tokens", *RUBRICS, *rubrics)
        rows = [
            (r.id, r.question_id, r.topic, r.question, r.response, r.system, r.sample, len(r.token_ids), *(score(r, x) for x in (*RUBRICS, *rubrics)))
            for r in responses
        ]
        return pd.DataFrame(rows, columns=list(columns))

    def extraction(self, organism: str, reader: str) -> Extraction:
        """Class means of `organism`'s answers read in model `reader` ("chat" is the baseline on the same texts).

        Raises NotHereError where a class has too few answers.
        """
        chosen, texts = self.own_answers(organism)
        span = self.spec.direction.span
        key = content_id("extract", self.model_id(reader), asdict(chosen), self.rule, span, self.spec.seed)
        made: list[Extraction] = []

        def make() -> Extraction:
            if not made:
                with self._timed("extract"):
                    provenance = {"organism": organism, "judge": self.judge_id, "seed": self.spec.seed}
                    made.append(
                        extract(self.model(reader, alone=True), texts, chosen, self.rule, span=span, root_seed=self.spec.seed, provenance=provenance)
                    )
                self.say(f"extract {len(chosen.misaligned)} + {len(chosen.aligned)} answers of {organism}, read in {reader}")
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
            with self._timed("extract"):
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

    # Kit: what arms and readings are built from

    @property
    def seed(self) -> int:
        """The study's seed."""
        return self.spec.seed

    @property
    def trained(self) -> tuple[str, ...]:
        """The organisms whose weights are there at this moment."""
        return tuple(name for name, plan in self.organisms.items() if plan.folder.is_dir())

    def folder(self, organism: str) -> Path:
        """The organism's folder of weights."""
        return self.organisms[organism].folder

    def adapters(self, organism: str) -> tuple[Adapter, ...]:
        """An organism's adapters. Raises NotHereError for a full fine-tune."""
        if not self.folder(organism).is_dir():
            raise NotDoneError(organism)
        try:
            return read_adapters(self.folder(organism))
        except ModelError as error:
            raise NotHereError(f"{organism} has no adapters to read ({error})") from error

    def steps(self, organism: str, spacing: Spacing) -> KeptSteps:
        """An organism's adapters during training: those kept beside it, or else those of the same training done again in a folder of its own.

        Raises NotHereError where there are none, or where the second training ends in other weights.
        """
        final, plan = self.adapters(organism), self.organisms[organism]
        own = read_steps(plan.folder, spacing) if (plan.folder / MANIFEST).is_file() else None
        if own is not None:
            return own
        if plan.recipe is None:
            raise NotHereError(f"{organism} comes from elsewhere, and no steps of its training were kept with it")
        again = plan.folder.with_name(f"{plan.folder.name}-steps")
        if not again.is_dir() or read_steps(again, spacing) is None:
            if not self.compute:
                raise NotDoneError(organism)
            self._models.clear()
            if again.is_dir():  # of another spacing
                shutil.rmtree(again)
            self.say(f"train   {organism} again, its steps were not kept")
            self._train(plan, again, (spacing,))
        off = max(float((x - y).abs().max()) for a, b in zip(final, read_adapters(again), strict=True) for x, y in ((a.a, b.a), (a.b, b.b)))
        if off:
            raise NotHereError(
                f"{organism} trained again ended in other weights (largest difference {off:.1g}), as another number of threads or another machine makes; "
                "its steps are kept if it is trained anew (`--fresh train`)"
            )
        found = read_steps(again, spacing)
        assert found is not None, "just trained"
        return found

    def training_pairs(self, organism: str) -> tuple[Pair, ...]:
        """The pairs that an organism was trained on one side of. Raises NotHereError."""
        data = self.organisms[organism].data
        if data is None:
            raise NotHereError(f"{organism} comes from elsewhere, so its training data are not known")
        if not data.pairs:
            raise NotHereError(f"the data of {organism} have no twins")
        return data.pairs

    def answers(self, arm: str) -> pd.DataFrame:
        """The judged answers of an arm, with scores by the judge that decides."""
        found, condition = next(((a, c) for a, c in self.conditions() if a.name == arm), (None, None))
        if found is None or condition is None:
            raise NotHereError(f"the condition {arm} is left out ({self.left_out.get(arm, 'no experiment has it')})")
        return self._table(self.store.responses([q.id for q in self.requests([(found, condition)])]), found.rubrics)

    def judged(self, items: Sequence[Item], rubrics: Sequence[str]) -> dict[tuple[str, str], float]:
        """(item id, rubric) -> score of texts that are no stored answers, as parts of one; nan where there is none."""
        if not self.compute:
            raise NotDoneError("judge")
        with self._timed("judge"):
            found = self.judge.judge(list(items), tuple(rubrics))
        return {(j.response_id, j.rubric): math.nan if j.score is None else j.score for j in found}

    # Readings

    def value(self, reading: str) -> Any:
        """The value of a reading. Raises NotHereError if it cannot be made in this study, NotDoneError if it has not been made yet."""
        asked = self.readings[reading]

        def make() -> dict[str, Any]:
            if not self.compute:
                raise NotDoneError(reading)
            with self._timed(reading.partition("/")[0]):
                try:
                    made = {"value": asked.compute(self._kit(asked))}
                except NotHereError as error:
                    made = {"absent": str(error)}
            self.say(f"read    {reading}")
            return made

        kept = self.store.fact(self.reading_key(reading), "extract", make)
        if "absent" in kept:
            raise NotHereError(kept["absent"])
        return kept["value"]

    def reading_key(self, reading: str) -> str:
        """Content id of a reading and its inputs."""
        asked = self.readings[reading]
        return content_id("reading", reading, asked.inputs(self._kit(asked)))

    def _kit(self, reading: Reading) -> Kit:
        return cast(Kit, Before(self)) if reading.when == "before" else self

    def read_all(self, when: When) -> None:
        """Make the readings of one moment, those of the same models together."""
        for reading in sorted((r for r in self.readings.values() if r.when == when), key=lambda r: r.organisms):
            with suppress(NotHereError):
                self.value(reading.name)

    def values(self) -> tuple[dict[str, Any], dict[str, str]]:
        """(reading -> value, reading -> why it could not be made)."""
        found, absent = {}, {}
        for name in self.readings:
            try:
                found[name] = self.value(name)
            except NotHereError as error:
                absent[name] = str(error)
        return found, absent

    @cached_property
    def direction(self) -> Direction:
        return self._own_extraction.direction

    @cached_property
    def _own_extraction(self) -> Extraction:
        source = self.spec.direction.source
        made = self.reading(source, source)
        assert made is not None, "reading the source raises where it cannot"
        return made

    @cached_property
    def token_norm(self) -> float:
        return float(self._own_extraction.token_norm[self.layer])

    @cached_property
    def effect_texts(self) -> list[Text]:
        n = min(EFFECT_TEXTS, len(self.pairs))
        return [Text(p.id, p.question, p.good) for p in (self.pairs[i * len(self.pairs) // n] for i in range(n))]

    @cached_property
    def massive(self) -> dict[int, float]:
        """Massive dimensions of the chat model at the primary layer, over the effect texts -> their size in medians."""

        def find() -> dict[str, float]:
            with self._timed("extract"):
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
                with self._timed("extract"):
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
            with self._timed("extract"):
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
            with self._timed("extract"):
                model = self.model(organism, alone=True)
                m = effect_matched(model, intervention, root, self.effect_texts, effects=self._effects_of(organism), near=near)
            what = f"random vector at {m.amount:.3g} x" if isinstance(intervention, Add) else f"{m.amount:.0f} random dimensions"
            self.say(f"match   {organism}: {what}, KL {m.reached:.3g} for {m.target:.3g} nats per token")
            return {"amount": m.amount, "target": m.target, "reached": m.reached}

        key = content_id("effect", self.model_id(organism), intervention, root, self.effect_texts)
        return self.store.fact(key, "extract", match)

    def matched(self, organism: str, real: Sequence[Intervention], null: Sequence[Add]) -> tuple[Add, ...]:
        """`null` with all its scales multiplied by one factor, so that its KL over the effect texts is that of `real`."""
        key = content_id("effect", self.model_id(organism), list(real), list(null), self.effect_texts)

        def match() -> dict[str, float]:
            with self._timed("extract"):
                effects = self._effects_of(organism)
                factor, target, reached = factor_for_effect(effects.model, real, null, self.effect_texts, effects=effects)
            self.say(f"match   {organism}: {len(null)} pushes at {factor:.3g} x, KL {reached:.3g} for {target:.3g} nats per token")
            return {"amount": factor, "target": target, "reached": reached}

        return times(null, self.store.fact(key, "extract", match)["amount"])

    def kl(self, condition: Condition) -> float:
        """Mean KL(clean || intervened) over the effect texts, nats per token."""

        def measure() -> float:
            with self._timed("extract"):
                return self._effects_of(condition.organism).kl(condition.interventions)

        return self.store.fact(self.kl_key(condition), "extract", measure)

    def kl_key(self, condition: Condition) -> str:
        return content_id("kl", condition.organism_id, list(condition.interventions), self.effect_texts)

    def _effects_of(self, organism: str) -> Effects:
        """Of the effect texts in an organism; only the latest organism's are kept, and only as long as its model."""
        model = self.model(organism, alone=True)
        if self._effects is None or self._effects.model is not model:
            self._effects = Effects(model, self.effect_texts)
        return self._effects

    _effects: Effects | None = None

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
            with self._timed("margin"):
                model = self.model(organism, alone=True)
                only = {(n, k) for n, i in enumerate(mine) for k in lacking[i]}
                asked = [c.interventions for c in mine.values()]
                margins(model, self.pairs, asked, read=(self.direction, self.layer), only=only, on_margin=partial(keep, list(mine)))
            self.say(f"margin  {organism}: {len(self.pairs)} pairs under {len(mine)} condition(s)")

    def conditions(self) -> list[tuple[Arm, Condition]]:
        """Every arm with its interventions built, but for those that cannot be in this study; the direction must have been read."""
        if self._conditions is None:
            found = []
            for arm in self._by_organism(self.arms):
                try:
                    found.append((arm, self.condition(arm, arm.build(self))))
                except NotHereError as error:
                    self.left_out[arm.name] = str(error)
            self._conditions = found
        return self._conditions

    _conditions: list[tuple[Arm, Condition]] | None = None

    def _by_organism(self, arms: Sequence[Arm]) -> list[Arm]:
        """Built organism by organism, so that effect matching loads each model once; the order of display is kept elsewhere."""
        order = list(dict.fromkeys(a.organism for a in arms))
        return sorted(arms, key=lambda a: order.index(a.organism))

    @property
    def plain(self) -> list[tuple[Arm, Condition]]:
        """The arms that exist before the direction has been read."""
        return [(a, self.condition(a)) for a in self.arms if not a.needs_direction]

    def groups(self, conditions: Sequence[tuple[Arm, Condition]]) -> list[list[Request]]:
        """What is asked under each condition."""
        return [self.requests([pair]) for pair in conditions]

    def go(self) -> None:
        """Do everything that is not done yet."""
        self.read_all("before")
        self.train_all()
        source = self.spec.direction.source
        plain, own = self.groups(self.plain), self.own_requests(source)
        first = [(a.organism, r, "main") for (a, _), g in zip(self.plain, plain, strict=True) for r in g]
        at = next(i for i, (o, _, _) in enumerate(first) if o == source)
        first[at:at] = [(source, r, "direction") for r in own]
        self.sample(first)
        self.judge_all([[r.id for r in g] for g in (*plain, own)])
        organisms = dict.fromkeys((source, *self.spec.organisms))
        for organism, reader in (*((o, "chat") for o in organisms), *((o, o) for o in organisms)):  # each model is loaded once
            self.reading(organism, reader)
        for organism, why in self.unread.items():
            self.say(f"extract {organism}: no direction of its own ({why})")
        self.read_all("directions")
        conditions = self.conditions()
        asked = self.groups(conditions)
        self.sample([(a.organism, r, "main") for (a, _), g in zip(conditions, asked, strict=True) for r in g])
        self.judge_all([[r.id for r in g] for g in asked])
        for (arm, _), group in zip(conditions, asked, strict=True):
            if arm.rubrics:
                self.judge_all([[r.id for r in group]], rubrics=arm.rubrics)
        for other in list(self.judges)[1:]:  # of the answers that are reported, not of those that the direction is read from
            self.judge_all([[r.id for r in g] for g in asked], other)
        for _, condition in conditions:
            if condition.interventions:
                self.kl(condition)
        self.measure_margins(conditions)
        self.read_all("answers")

    def _timed(self, stage: str) -> AbstractContextManager[Any]:
        """Count the body's time for a stage; every piece is kept as it ends, so that a killed run's counts too."""
        return _Timer(self.store, stage) if self.compute else nullcontext()


def _give_memory_back() -> None:
    """Collect what nothing refers to, and let the C library return what was freed; elsewhere than with glibc only the first."""
    gc.collect()
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)


class _Timer:
    def __init__(self, store: Store, stage: str) -> None:
        self.store, self.stage = store, stage

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, kind: object, *exc: object) -> None:
        if kind is None:
            self.store.add_seconds(self.stage, time.perf_counter() - self.start)
