"""Running a study: what is not done yet, stage by stage, each row kept as it is made.

    train -> sample (plain, and for the direction) -> judge -> extract -> sample (interventions) -> judge -> margins -> report

Everything is keyed by content: a changed organism changes its own id, its conditions', its direction's, and so redoes exactly
what depends on it. Only one organism is in memory at a time, beside the chat model.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from convergent.core.direction import Direction
from convergent.core.ids import content_id
from convergent.core.interventions import Ablate, Add, Intervention
from convergent.core.values import Condition, Judgement, Pair, Question, Response, Sampling
from convergent.data.questions import load_questions
from convergent.data.training import TrainingSet, load_pairs, load_training_set
from convergent.directions.classes import Chosen, Classes, Scored, choose
from convergent.directions.extract import Extraction, answer_means, extract, shift
from convergent.directions.margin import Margin, margins
from convergent.errors import DataError, DirectionError, InputError, ModelError, StudyError
from convergent.experiments.base import Arm, Control
from convergent.experiments.registry import EXPERIMENTS
from convergent.interventions.controls import (
    answer_logprobs,
    effect_matched,
    kl_to_clean,
    matched_null,
    orthogonal_to,
    other_concept,
    random_like,
    with_direction,
)
from convergent.judging.base import Item, Judge
from convergent.judging.registry import get_judge
from convergent.models.dtype import resolve_dtype
from convergent.models.load import ChatModel, base_folder, folder_id, load_base
from convergent.models.texts import Text
from convergent.organisms.load import load_organism
from convergent.organisms.recipes import Recipe, named_recipe
from convergent.organisms.train import Progress, train
from convergent.sampling.requests import Request, make_requests
from convergent.sampling.sampler import Tally, sample
from convergent.store import Store
from convergent.study.spec import JudgeSpec, OrganismSpec, StudySpec
from convergent.study.trusted import Trusted, read_trusted

RUBRICS = ("aligned", "coherent")
EFFECT_TEXTS = 8
"""Held-out good answers over which the KL of interventions is measured."""

Say = Callable[[str], None]
Advance = Callable[[str, int, int, str], None]
"""(stage, done, total, a word to show beside it)."""


class NotDoneError(Exception):
    """A run that may not compute needs something that is not there. Never leaves the plan."""


@dataclass(frozen=True)
class OrganismPlan:
    """An organism before it is loaded: what it is made of, and its content id."""

    name: str
    spec: OrganismSpec
    recipe: Recipe | None
    data: TrainingSet | None
    content_id: str
    folder: Path


class Run:
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
        self.spec, self.store, self.say, self.advance, self.compute = spec, store, say, advance, compute
        self._models: dict[str, ChatModel] = {}
        self.tally = Tally()
        self.unread: dict[str, str] = {}
        """Organism -> why no direction could be read from its answers."""

    def check(self) -> None:
        """Raise for whatever can be known to be wrong before anything is written: data, questions, layers, names, judge."""
        _ = self.questions, self.layer, self.organisms, self.arms, self.pairs, self.judges, self.trusted, self.dtype

    # What the study consists of

    @cached_property
    def questions(self) -> tuple[Question, ...]:
        return load_questions(self.spec.questions.file)

    @cached_property
    def held_out(self) -> dict[str, tuple[Pair, ...]]:
        """Source -> pairs that no organism of this study is trained on."""
        found = {}
        for source in self.spec.margin.data:
            try:
                load_pairs(source)  # says clearly if the source has no twins
                found[source] = load_training_set(source).split(self.spec.margin.pairs, self.spec.seed)[1].pairs
            except DataError as error:
                raise StudyError(f"margin: {error}") from error
        ids = [p.id for pairs in found.values() for p in pairs]
        twice = next((i for i in ids if ids.count(i) > 1), None)
        if twice is not None:
            raise StudyError(f"margin.data: pair {twice!r} stands in two sources; a pair's id must be its own")
        return found

    @cached_property
    def pairs(self) -> list[Pair]:
        return [p for pairs in self.held_out.values() for p in pairs]

    @cached_property
    def domain_of(self) -> dict[str, str]:
        """Pair -> a word for its source."""
        return {p.id: Path(source.rpartition(":")[2]).stem for source, pairs in self.held_out.items() for p in pairs}

    @cached_property
    def dtype(self) -> str:
        device = ("cuda" if torch.cuda.is_available() else "cpu") if self.spec.device == "auto" else self.spec.device
        return str(resolve_dtype(self.spec.dtype, device)).removeprefix("torch.")

    @cached_property
    def base_id(self) -> str:
        return folder_id(base_folder(self.spec.base))

    @cached_property
    def depth(self) -> int:
        return depth_of(self.spec.base)

    @cached_property
    def layer(self) -> int:
        layer = self.spec.direction.layer
        layer = self.depth // 2 if layer is None else layer
        if not 0 <= layer < self.depth:
            raise StudyError(f"direction.layer: {layer} is out of range; {self.spec.base} has blocks 0 to {self.depth - 1}")
        return layer

    @cached_property
    def organisms(self) -> dict[str, OrganismPlan]:
        return {name: self._organism(name, spec) for name, spec in self.spec.organisms.items()}

    def _organism(self, name: str, spec: OrganismSpec) -> OrganismPlan:
        if spec.path is not None:
            folder = Path(spec.path).expanduser()
            if not folder.is_dir():
                raise StudyError(f"organisms.{name}.path: {folder} is not a folder; give a PEFT folder")
            return OrganismPlan(name, spec, None, None, content_id(self.base_id, folder_id(folder)), folder)
        overrides = {
            k: v
            for k in ("learning_rate", "epochs", "batch_size", "grad_accumulation", "rank", "alpha", "layers")
            if (v := getattr(spec, k)) is not None
        }
        seed = self.spec.seed if spec.seed is None else spec.seed
        try:
            recipe = named_recipe(spec.recipe, self.depth, {**overrides, "seed": seed})
            data = load_training_set(spec.data, answer=spec.answer)
        except InputError as error:
            raise StudyError(f"organisms.{name}: {error}") from error
        top = max((recipe.adapters.layers if recipe.adapters else None) or (0,))
        if top >= self.depth:
            raise StudyError(f"organisms.{name}.layers: {top} is out of range; {self.spec.base} has blocks 0 to {self.depth - 1}")
        data = self._without_held_out(data)
        if spec.examples is not None:
            if spec.examples > len(data):
                raise StudyError(f"organisms.{name}.examples: {spec.examples} asked for, {spec.data} has {len(data)} beside the held-out ones")
            data = data.take(spec.examples)
        cid = content_id(self.base_id, recipe, data.checksum)
        return OrganismPlan(name, spec, recipe, data, cid, self.store.folder / "organisms" / f"{name}-{cid}")

    def _without_held_out(self, data: TrainingSet) -> TrainingSet:
        """By the questions, not by the source's name: the same file under another name must not leak either."""
        asked = {p.question for p in self.pairs}
        kept = [i for i, e in enumerate(data.examples) if not asked.intersection(m.content for m in e.messages)]
        pairs = tuple(data.pairs[i] for i in kept) if data.pairs else ()
        return replace(data, examples=tuple(data.examples[i] for i in kept), pairs=pairs)

    def weights_id(self, organism: str) -> str:
        """Content id of what a condition's model computes with."""
        return content_id(self.base_id if organism == "chat" else self.organisms[organism].content_id, self.dtype)

    @cached_property
    def sampling(self) -> Sampling:
        s = self.spec.sampling
        return Sampling(s.temperature, s.top_p, s.max_new_tokens)

    @cached_property
    def arms(self) -> list[Arm]:
        """Every arm of every experiment, each name once, in display order."""
        found: dict[str, Arm] = {}
        for name, block in self.spec.experiments.items():
            for arm in EXPERIMENTS[name].arms(block, tuple(self.spec.organisms), self.spec.direction.source):
                if arm.name in found:
                    raise StudyError(f"experiments.{name}: the condition {arm.name!r} is there already; rename an organism, or give scales that differ")
                found[arm.name] = arm
        return list(found.values())

    @cached_property
    def judge(self) -> Judge:
        """The judge that decides."""
        return self._judge(self.spec.judge)

    @cached_property
    def judges(self) -> dict[str, Judge]:
        """Id -> every judge of the study; the one that decides comes first."""
        found = {self.judge_id: self.judge}
        for i, spec in enumerate(self.spec.judges):
            made = self._judge(spec)
            if identity(made) in found:
                raise StudyError(f"judges.{i}: {made.name} with these rubrics judges already; remove one")
            if missing := [r for r in RUBRICS if r not in made.rubrics]:
                raise StudyError(f"judges.{i}: {made.name} has no rubric {missing[0]!r}; a study needs {' and '.join(RUBRICS)}")
            found[identity(made)] = made
        return found

    def _judge(self, j: JudgeSpec) -> Judge:
        cache = self.store.folder / "judge_cache.sqlite"
        return get_judge(
            j.name, base_url=j.base_url, key_env=j.key_env, rubrics=j.rubrics, questions=self.questions, max_cost=j.max_cost,
            concurrency=j.concurrency, samples=j.samples, prices=j.prices,
            cache=cache if self.compute or cache.is_file() else None, on_estimate=lambda e: self.say(f"judge   {e}"),
        )  # fmt: skip

    @cached_property
    def judge_id(self) -> str:
        """Id of the judge that decides."""
        return identity(self.judge)

    @cached_property
    def trusted(self) -> Trusted | None:
        """The trusted scores of the study, if it names any."""
        if self.spec.trusted is None:
            return None
        if importlib.util.find_spec("ppi_py") is None:  # known now, not after hours, when the rates are corrected
            raise StudyError("trusted: correcting rates by trusted scores needs ppi-python; run `pip install 'convergent[ppi]'`, or leave `trusted` out")
        return read_trusted(self.spec.trusted)

    # Models

    def model(self, organism: str, alone: bool = False) -> ChatModel:
        """The chat model or an organism, loaded; at most one organism is kept beside the chat model, and with `alone` nothing beside it."""
        if not self.compute:
            raise NotDoneError(organism)
        others = [n for n in self._models if n != organism and (alone or "chat" not in (n, organism))]
        for other in others:
            del self._models[other]
        if others:
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

            def advance(p: Progress, stage: str = f"train {plan.name}") -> None:
                self.advance(stage, p.step, p.n_steps, f"loss {p.loss:.3f}")

            with self._timed("train"):
                train(
                    self.spec.base,
                    plan.recipe,
                    [e.chat() for e in plan.data.examples],
                    plan.folder,
                    name=plan.name,
                    data_name=plan.data.name,
                    data_checksum=plan.data.checksum,
                    on_progress=advance,
                )
            _give_memory_back()

    def requests(self, arms: Sequence[tuple[Arm, Condition]], block: str = "main") -> list[Request]:
        samples = self.spec.questions.samples if block == "main" else self.spec.direction.samples
        return list(make_requests([c for _, c in arms], self.questions, samples, self.spec.seed, block))

    def condition(self, arm: Arm, interventions: tuple[Intervention, ...] = ()) -> Condition:
        return Condition(arm.name, arm.organism, self.weights_id(arm.organism), interventions, self.sampling)

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

    def judge_all(self, groups: Sequence[Sequence[str]], judge_id: str | None = None) -> None:
        """Judge what is not judged yet of groups of response ids, a group being the answers of one condition; by the judge that decides, or another.

        A local judge's scores depend, in their last digits, on what shares its batch. So it gets whole groups, even if some of a group is
        judged already: a run that was killed ends with the same digits as one that was not.
        """
        judge_id = judge_id or self.judge_id
        judge = self.judges[judge_id]
        known = self.store.judgements(judge_id)
        open_groups = [g for g in groups if any((i, rubric) not in known for i in g for rubric in RUBRICS)]
        if hasattr(judge, "estimate"):  # paid by the request: asked once, with one estimate, for what is absent
            open_groups = [[i for g in open_groups for i in g if any((i, rubric) not in known for rubric in RUBRICS)]]
        total = len(RUBRICS) * sum(len(g) for g in open_groups)
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
                judge.judge(items, RUBRICS, keep)
        if total:
            spent = getattr(judge, "spent", 0.0)
            self.say(f"judge   {total // len(RUBRICS)} answers by {judge.name}{f', ${spent:.4f} spent' if spent else ''}")

    # Directions

    @cached_property
    def rule(self) -> Classes:
        return Classes(**self.spec.direction.classes.model_dump())

    def own_requests(self, organism: str) -> list[Request]:
        """The requests whose answers an organism's direction is read from."""
        arm = next(a for a in self.arms if a.name == organism)
        block = "direction" if organism == self.spec.direction.source else "main"
        return self.requests([(arm, self.condition(arm))], block)

    def chosen(self, organism: str) -> tuple[Chosen, list[Text]]:
        """Classes among an organism's own judged answers, and their texts."""
        responses = self.store.responses([r.id for r in self.own_requests(organism)])
        scores = self.store.judgements(self.judge_id)

        def score(r: Response, rubric: str) -> float | None:
            j = scores.get((r.id, rubric))
            return None if j is None else j.score

        scored = [Scored(r.id, r.question_id, len(r.token_ids), score(r, "aligned"), score(r, "coherent")) for r in responses]
        texts = [Text(r.id, r.question, r.token_ids, r.system) for r in responses]
        return choose(scored, self.rule, self.spec.seed), texts

    def extraction(self, organism: str, reader: str) -> Extraction:
        """Class means of `organism`'s answers read in model `reader` ("chat" is the baseline on the same texts)."""
        chosen, texts = self.chosen(organism)
        span = self.spec.direction.span
        key = content_id("extract", self.weights_id(reader), asdict(chosen), self.rule, span, self.spec.seed)
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

    def reading(self, organism: str, reader: str) -> Extraction | None:
        """`extraction`, or None where an organism other than the source has too few answers in a class: a sound twin may have no bad ones."""
        try:
            return self.extraction(organism, reader)
        except DirectionError as error:
            if organism == self.spec.direction.source:
                raise
            self.unread[organism] = str(error)
            return None

    # Kit: what arms are built from

    @cached_property
    def direction(self) -> Direction:
        return self.extraction(self.spec.direction.source, self.spec.direction.source).direction

    @cached_property
    def token_norm(self) -> float:
        source = self.spec.direction.source
        return float(self.extraction(source, source).token_norm[self.layer])

    @cached_property
    def effect_texts(self) -> list[Text]:
        n = min(EFFECT_TEXTS, len(self.pairs))
        return [Text(p.id, p.question, p.good) for p in (self.pairs[i * len(self.pairs) // n] for i in range(n))]

    @cached_property
    def concept(self) -> Direction:
        """The other concept: what the good-advice twin shifts, or else what sets the held-out domains apart in the chat model."""
        twin: str | None = getattr(self.spec.experiments.get("plain"), "twin", None)
        texts = [Text(p.id, p.question, p.good) for p in self.pairs]
        if twin is not None:
            key = content_id("shift", self.weights_id(twin), self.weights_id("chat"), texts)

            def moved() -> Direction:
                with self._timed("extract"):
                    # One after the other, so that two models need not be in memory.
                    after = answer_means(self.model(twin, alone=True), texts)
                    return shift(after, answer_means(self.model("chat", alone=True), texts))

            return self.store.direction(key, moved)
        sources = list(self.held_out)
        if len(sources) < 2:
            raise StudyError("other_concept: needs a good-advice twin (experiments.plain.twin) or two margin.data sources")
        first, rest = ([p.id for p in self.held_out[s]] for s in sources[:2])
        key = content_id("contrast", self.weights_id("chat"), texts, sources)

        def contrast() -> Direction:
            with self._timed("extract"):
                return extract(self.model("chat"), texts, Chosen(tuple(first), tuple(rest)), Classes(weigh="tokens")).direction

        return self.store.direction(key, contrast)

    def control(self, kind: Control, organism: str, intervention: Add | Ablate) -> Intervention:
        """The null of that kind for an intervention on an organism."""
        d, seed = intervention.direction, self.spec.seed
        if kind == "random":
            return with_direction(intervention, random_like(d, seed))
        if kind == "orthogonal":
            return with_direction(intervention, orthogonal_to(d, seed))
        if kind == "other_concept":
            return with_direction(intervention, other_concept(d, self.concept))
        key = content_id("effect", self.weights_id(organism), intervention, seed, self.effect_texts)

        def match() -> dict[str, float]:
            with self._timed("extract"):
                m = effect_matched(self.model(organism, alone=True), intervention, seed, self.effect_texts)
            what = f"random vector at {m.amount:.3g} x" if isinstance(intervention, Add) else f"{m.amount:.0f} random dimensions"
            self.say(f"match   {organism}: {what}, KL {m.reached:.3g} for {m.target:.3g} nats per token")
            return {"amount": m.amount, "target": m.target, "reached": m.reached}

        return matched_null(intervention, self.store.fact(key, "extract", match)["amount"], seed)

    def kl(self, condition: Condition) -> float:
        """Mean KL(clean || intervened) over the effect texts, nats per token."""

        def measure() -> float:
            with self._timed("extract"):
                model = self.model(condition.organism, alone=True)
                if self._clean is None or self._clean[0] != condition.organism_id:
                    self._clean = (condition.organism_id, answer_logprobs(model, self.effect_texts))
                return kl_to_clean(model, self._clean[1], self.effect_texts, condition.interventions)

        return self.store.fact(self.kl_key(condition), "extract", measure)

    def kl_key(self, condition: Condition) -> str:
        return content_id("kl", condition.organism_id, list(condition.interventions), self.effect_texts)

    _clean: tuple[str, list[torch.Tensor]] | None = None
    """Organism's weights and its log-probabilities on the effect texts: the latest only."""

    @cached_property
    def read_id(self) -> str:
        return content_id(self.direction.content_id, self.layer)

    def measure_margins(self, conditions: Sequence[tuple[Arm, Condition]]) -> None:
        """Margins of every held-out pair under every condition that lacks some, organism by organism.

        A condition's pairs are computed together, so that their last digits do not depend on where an earlier run was killed.
        """
        known = self.store.margins(self.read_id)
        data_ids = {p.id: content_id(p) for p in self.pairs}
        absent = {c.content_id: (a.organism, c) for a, c in conditions if any((c.content_id, d) not in known for d in data_ids.values())}
        total, done = len(absent) * len(self.pairs), 0

        def keep(condition: str, m: Margin) -> None:
            nonlocal done
            self.store.add_margin(condition, data_ids[m.pair_id], self.read_id, m)
            done += 1
            self.advance("margin", done, total, "")

        for organism in dict.fromkeys(o for o, _ in absent.values()):
            mine = {i: c for i, (o, c) in absent.items() if o == organism}
            with self._timed("margin"):
                model = self.model(organism, alone=True)
                for i, c in mine.items():
                    margins(model, self.pairs, [c.interventions], read=(self.direction, self.layer), on_margin=partial(keep, i))
            self.say(f"margin  {organism}: {len(self.pairs)} pairs under {len(mine)} condition(s)")

    def conditions(self) -> list[tuple[Arm, Condition]]:
        """Every arm with its interventions built; the direction must have been read."""
        return [(a, self.condition(a, a.build(self))) for a in self._by_organism(self.arms)]

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
        conditions = self.conditions()
        asked = self.groups(conditions)
        self.sample([(a.organism, r, "main") for (a, _), g in zip(conditions, asked, strict=True) for r in g])
        self.judge_all([[r.id for r in g] for g in asked])
        for other in list(self.judges)[1:]:  # of the answers that are reported, not of those that the direction is read from
            self.judge_all([[r.id for r in g] for g in asked], other)
        for _, condition in conditions:
            if condition.interventions:
                self.kl(condition)
        self.measure_margins(conditions)

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


def identity(judge: Judge) -> str:
    """Name of a judge, and of what decides its scores where it tells: another rubric or fit judges anew."""
    own = getattr(judge, "content_id", None)
    return f"{judge.name}#{own[:8]}" if isinstance(own, str) else judge.name


def depth_of(base: str) -> int:
    """Number of decoder blocks of a base, from its config. Raises ModelError."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(base_folder(base), local_files_only=True)
        return int(config.get_text_config().num_hidden_layers)
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise ModelError(f"{base}: its config.json cannot be read as a decoder's ({error}); give a Hugging Face model folder") from error
