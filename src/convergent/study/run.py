"""Running a study: what is not done yet, stage by stage, each row kept as it is made.

    train -> sample (plain, and for the direction) -> judge -> extract -> sample (interventions) -> judge -> margins -> report

Everything is keyed by content: a changed organism changes its own id, its conditions', its direction's, and so redoes exactly
what depends on it. Only one organism is in memory at a time, beside the chat model.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from convergent.core.direction import Direction
from convergent.core.ids import content_id
from convergent.core.interventions import Add, Intervention
from convergent.core.values import Condition, Pair, Question, Response, Sampling
from convergent.data.questions import load_questions
from convergent.data.training import TrainingSet, load_pairs, load_training_set
from convergent.directions.classes import Chosen, Classes, Scored, choose
from convergent.directions.extract import Extraction, extract, shift
from convergent.directions.margin import margins
from convergent.errors import StudyError
from convergent.experiments.base import Arm, Control
from convergent.experiments.registry import EXPERIMENTS
from convergent.interventions.controls import (
    answer_logprobs,
    effect_matched,
    kl_to_clean,
    orthogonal_to,
    other_concept,
    random_like,
    scaled,
    with_direction,
)
from convergent.judging.base import Item, Judge
from convergent.judging.registry import get_judge
from convergent.models.dtype import resolve_dtype
from convergent.models.load import ChatModel, base_folder, folder_id, load_base
from convergent.models.texts import Text
from convergent.organisms.load import load_organism
from convergent.organisms.recipes import Recipe, named_recipe
from convergent.organisms.train import train
from convergent.sampling.requests import Request, make_requests
from convergent.sampling.sampler import Tally, sample
from convergent.store import Store
from convergent.study.spec import OrganismSpec, StudySpec

RUBRICS = ("aligned", "coherent")
EFFECT_TEXTS = 8
"""Held-out good answers over which the KL of interventions is measured."""

Say = Callable[[str], None]
Advance = Callable[[str, int, int], None]
"""(stage, done, total)."""


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

    def __init__(self, spec: StudySpec, store: Store, say: Say = lambda line: None, advance: Advance = lambda *a: None) -> None:
        self.spec, self.store, self.say, self.advance = spec, store, say, advance
        self._models: dict[str, ChatModel] = {}
        self.tally = Tally()
        self.seconds: dict[str, float] = {}

    # What the study consists of

    @cached_property
    def questions(self) -> tuple[Question, ...]:
        return load_questions(self.spec.questions.file)

    @cached_property
    def held_out(self) -> dict[str, tuple[Pair, ...]]:
        """Source -> pairs that no organism of this study is trained on."""
        found = {}
        for source in self.spec.margin.data:
            load_pairs(source)  # says clearly if the source has no twins
            found[source] = load_training_set(source).split(self.spec.margin.pairs, self.spec.seed)[1].pairs
        return found

    @cached_property
    def pairs(self) -> list[Pair]:
        return [p for pairs in self.held_out.values() for p in pairs]

    @cached_property
    def domain_of(self) -> dict[str, str]:
        return {p.id: source.rpartition(":")[2] for source, pairs in self.held_out.items() for p in pairs}

    @cached_property
    def dtype(self) -> str:
        device = ("cuda" if torch.cuda.is_available() else "cpu") if self.spec.device == "auto" else self.spec.device
        return str(resolve_dtype(self.spec.dtype, device)).removeprefix("torch.")

    @cached_property
    def base_id(self) -> str:
        return folder_id(base_folder(self.spec.base))

    @cached_property
    def depth(self) -> int:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(base_folder(self.spec.base), local_files_only=True)
        return int(config.get_text_config().num_hidden_layers)

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
        recipe = named_recipe(spec.recipe, self.depth, {**overrides, "seed": seed})
        data = load_training_set(spec.data, answer=spec.answer)
        if spec.data in self.held_out:
            data = data.split(self.spec.margin.pairs, self.spec.seed)[0]
        if spec.examples is not None:
            if spec.examples > len(data):
                raise StudyError(f"organisms.{name}.examples: {spec.examples} asked for, {spec.data} has {len(data)} beside the held-out ones")
            data = data.take(spec.examples)
        cid = content_id(self.base_id, recipe, data.checksum)
        return OrganismPlan(name, spec, recipe, data, cid, self.store.folder / "organisms" / f"{name}-{cid}")

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
                found.setdefault(arm.name, arm)
        return list(found.values())

    @cached_property
    def judge(self) -> Judge:
        j = self.spec.judge
        return get_judge(
            j.name, base_url=j.base_url, key_env=j.key_env, rubrics=j.rubrics, questions=self.questions, max_cost=j.max_cost,
            cache=None if j.name == "embedded" else self.store.folder / "judge_cache.sqlite",
            on_estimate=None if j.name == "embedded" else lambda e: self.say(f"judge   {e}"),
        )  # fmt: skip

    # Models

    def model(self, organism: str) -> ChatModel:
        """The chat model or an organism, loaded; at most one organism is kept beside the chat model."""
        if organism not in self._models:
            if organism != "chat":
                for other in [n for n in self._models if n != "chat"]:
                    del self._models[other]
                gc.collect()
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
            with self._timed("train"):
                train(
                    self.spec.base,
                    plan.recipe,
                    [e.chat() for e in plan.data.examples],
                    plan.folder,
                    name=plan.name,
                    data_name=plan.data.name,
                    data_checksum=plan.data.checksum,
                )

    def requests(self, arms: Sequence[tuple[Arm, Condition]], block: str = "main") -> list[Request]:
        samples = self.spec.questions.samples if block == "main" else self.spec.direction.samples
        return list(make_requests([c for _, c in arms], self.questions, samples, self.spec.seed, block))

    def condition(self, arm: Arm, interventions: tuple[Intervention, ...] = ()) -> Condition:
        return Condition(arm.name, arm.organism, self.weights_id(arm.organism), interventions, self.sampling)

    def sample(self, wanted: Sequence[tuple[str, Request, str]]) -> None:
        """Draw what is absent of (organism, request, block), organism by organism."""
        have = self.store.response_ids()
        absent = [w for w in wanted if w[1].id not in have]
        done = len(wanted) - len(absent)
        for organism in dict.fromkeys(o for o, _, _ in absent):
            mine = [(r, block) for o, r, block in absent if o == organism]
            blocks = {r.id: block for r, block in mine}
            with self._timed("sample"):
                model = self.model(organism)

                def keep(response: Response, organism: str = organism, blocks: dict[str, str] = blocks) -> None:
                    nonlocal done
                    self.store.add_response(response, organism, blocks[response.id])
                    done += 1
                    self.advance("sample", done, len(wanted))

                before, start = self.tally.tokens, time.perf_counter()
                sample(model, [r for r, _ in mine], keep, self.spec.sampling.rows, self.tally)
                speed = (self.tally.tokens - before) / (time.perf_counter() - start)
            n_conditions = len({r.condition.content_id for r, _ in mine})
            self.say(f"sample  {organism}: {len(mine)} answers under {n_conditions} condition(s), {speed:.0f} tokens/s")

    def judge_all(self, ids: Sequence[str]) -> None:
        """Judge what is not judged yet."""
        known = self.store.judgements(self.judge.name)
        absent = [r for r in self.store.responses(ids) if any((r.id, rubric) not in known for rubric in RUBRICS)]
        if not absent:
            return
        done = 0

        def keep(j: Any) -> None:
            nonlocal done
            self.store.add_judgement(j)
            done += 1
            self.advance("judge", done, len(absent) * len(RUBRICS))

        with self._timed("judge"):
            items = [Item(r.id, r.question, r.response, r.question_id) for r in absent]
            self.judge.judge(items, RUBRICS, keep)
        self.say(f"judge   {len(absent)} answers by {self.judge.name}")

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
        scores = self.store.judgements(self.judge.name)

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
                self.say(f"extract {len(chosen.misaligned)} + {len(chosen.aligned)} answers of {organism}, read in {reader}")
                with self._timed("extract"):
                    provenance = {"organism": organism, "judge": self.judge.name, "seed": self.spec.seed}
                    made.append(
                        extract(self.model(reader), texts, chosen, self.rule, span=span, root_seed=self.spec.seed, provenance=provenance)
                    )
            return made[0]

        direction = self.store.direction(key, lambda: make().direction)
        readings = self.store.fact(
            key, "extract", lambda: {"token_norm": make().token_norm.tolist(), "split_half": make().split_half.tolist()}
        )
        as_tensor = {k: torch.tensor(v, dtype=torch.float64) for k, v in readings.items()}
        return Extraction(direction, as_tensor["token_norm"], as_tensor["split_half"])

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
        return [Text(p.id, p.question, p.good) for p in self.pairs[:: max(1, len(self.pairs) // EFFECT_TEXTS)][:EFFECT_TEXTS]]

    @cached_property
    def concept(self) -> Direction:
        """The other concept: what the good-advice twin shifts, or else what sets the held-out domains apart in the chat model."""
        twin = getattr(self.spec.experiments["plain"], "twin", None)
        texts = [Text(p.id, p.question, p.good) for p in self.pairs]
        if twin is not None:
            key = content_id("shift", self.weights_id(twin), self.weights_id("chat"), texts)
            return self.store.direction(key, lambda: shift(self.model(twin), self.model("chat"), texts))
        sources = list(self.held_out)
        if len(sources) < 2:
            raise StudyError("other_concept: needs a good-advice twin (experiments.plain.twin) or two margin.data sources")
        first, rest = ([p.id for p in self.held_out[s]] for s in sources[:2])
        key = content_id("contrast", self.weights_id("chat"), texts, sources)
        rule = Classes(weigh="tokens")
        return self.store.direction(key, lambda: extract(self.model("chat"), texts, Chosen(tuple(first), tuple(rest)), rule).direction)

    def control(self, kind: Control, organism: str, intervention: Intervention) -> Intervention:
        """The null of that kind for an intervention on an organism."""
        d, seed = intervention.direction, self.spec.seed
        if kind == "random":
            return with_direction(intervention, random_like(d, seed))
        if kind == "orthogonal":
            return with_direction(intervention, orthogonal_to(d, seed))
        if kind == "other_concept":
            return with_direction(intervention, other_concept(d, self.concept))
        null = random_like(d, seed, draw=1)
        key = content_id("effect", self.weights_id(organism), intervention, null.content_id, self.effect_texts)

        def match() -> dict[str, float]:
            with self._timed("extract"):
                found, target, reached = effect_matched(self.model(organism), intervention, null, self.effect_texts)
            amount = found.scale if isinstance(found, Add) else found.strength
            own = intervention.scale if isinstance(intervention, Add) else intervention.strength
            self.say(f"match   {organism}: random vector at {amount / own:.3g} x, KL {reached:.3g} for {target:.3g} nats per token")
            return {"factor": amount / own, "target": target, "reached": reached}

        return scaled(with_direction(intervention, null), self.store.fact(key, "extract", match)["factor"])

    def kl(self, condition: Condition) -> float:
        """Mean KL(clean || intervened) over the effect texts, nats per token."""
        key = content_id("kl", condition.organism_id, list(condition.interventions), self.effect_texts)

        def measure() -> float:
            with self._timed("extract"):
                model = self.model(condition.organism)
                if self._clean is None or self._clean[0] != condition.organism_id:
                    self._clean = (condition.organism_id, answer_logprobs(model, self.effect_texts))
                return kl_to_clean(model, self._clean[1], self.effect_texts, condition.interventions)

        return self.store.fact(key, "extract", measure)

    _clean: tuple[str, list[torch.Tensor]] | None = None

    @cached_property
    def read_id(self) -> str:
        return content_id(self.direction.content_id, self.layer)

    def measure_margins(self, conditions: Sequence[tuple[Arm, Condition]]) -> None:
        """Margins of every held-out pair under every condition that lacks them, organism by organism."""
        known = self.store.margins(self.read_id)
        data_ids = [content_id(p) for p in self.pairs]
        total = len(conditions) * len(self.pairs)
        done = sum((c.content_id, d) in known for _, c in conditions for d in data_ids)
        for organism in dict.fromkeys(a.organism for a, _ in conditions):
            mine = [c for a, c in conditions if a.organism == organism]
            absent = {(i, j) for i, c in enumerate(mine) for j, d in enumerate(data_ids) if (c.content_id, d) not in known}
            if not absent:
                continue

            def keep(m: Any, mine: list[Condition] = mine) -> None:
                nonlocal done
                self.store.add_margin(mine[m.condition].content_id, by_pair[m.pair_id], self.read_id, m)
                done += 1
                self.advance("margin", done, total)

            by_pair = {p.id: d for p, d in zip(self.pairs, data_ids, strict=True)}
            with self._timed("margin"):
                read = (self.direction, self.layer)
                margins(self.model(organism), self.pairs, [c.interventions for c in mine], read=read, only=absent, on_margin=keep)
            self.say(f"margin  {organism}: {len(absent)} margins")

    def conditions(self) -> list[tuple[Arm, Condition]]:
        """Every arm with its interventions built; the direction must have been read."""
        return [(a, self.condition(a, a.build(self))) for a in self._by_organism(self.arms)]

    def _by_organism(self, arms: Sequence[Arm]) -> list[Arm]:
        """Built organism by organism, so that effect matching loads each model once; the order of display is kept elsewhere."""
        order = list(dict.fromkeys(a.organism for a in arms))
        return sorted(arms, key=lambda a: order.index(a.organism))

    def go(self) -> None:
        """Do everything that is not done yet."""
        start = time.perf_counter()
        self.train_all()
        plain = [(a, self.condition(a)) for a in self.arms if not a.needs_direction]
        source = self.spec.direction.source
        first = [(c.organism, r, "main") for a, c in plain for r in self.requests([(a, c)])]
        first += [(source, r, "direction") for r in self.own_requests(source)]
        self.sample(sorted(first, key=lambda w: [c.organism for _, c in plain].index(w[0])))
        self.judge_all([r.id for _, r, _ in first])
        for organism in self.spec.organisms:
            for reader in dict.fromkeys((organism, "chat")):
                self.extraction(organism, reader)
        conditions = self.conditions()
        self.sample([(a.organism, r, "main") for a, c in conditions for r in self.requests([(a, c)])])
        self.judge_all([r.id for a, c in conditions for r in self.requests([(a, c)])])
        for _, condition in conditions:
            if condition.interventions:
                self.kl(condition)
        self.measure_margins(conditions)
        self.seconds["all"] = time.perf_counter() - start

    def _timed(self, stage: str) -> _Timer:
        return _Timer(self.seconds, stage)


class _Timer:
    def __init__(self, seconds: dict[str, float], stage: str) -> None:
        self.seconds, self.stage = seconds, stage

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *exc: object) -> None:
        self.seconds[self.stage] = self.seconds.get(self.stage, 0.0) + time.perf_counter() - self.start


