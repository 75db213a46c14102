"""What a study consists of, known before anything is computed: questions, held-out pairs, organisms, arms, readings, judges.

Every id that names stored rows begins here. Pure functions of the study file and the folders of models.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from convergent.core.ids import content_id
from convergent.core.values import Pair, Question, Sampling
from convergent.data.questions import load_questions
from convergent.data.training import Example, Message, TrainingSet, load_pairs, load_training_set
from convergent.errors import DataError, DownloadError, InputError, ModelError, StudyError
from convergent.experiments import registry
from convergent.experiments.base import Arm, NotHereError, Reading
from convergent.experiments.registry import EXPERIMENTS
from convergent.experiments.scene import Scene, Subject
from convergent.judging.base import Judge
from convergent.judging.registry import get_judge
from convergent.models.dtype import resolve_dtype
from convergent.models.load import base_folder, base_is_here, folder_id
from convergent.models.texts import Text
from convergent.organisms.adapters import shape_of_folder, shape_of_recipe
from convergent.organisms.manifest import adapter_id
from convergent.organisms.recipes import Recipe, named_recipe
from convergent.organisms.steps import Spacing
from convergent.store import Store
from convergent.study.spec import JudgeSpec, MachineSpec, OrganismSpec, StudySpec
from convergent.study.trusted import Trusted, read_trusted

RUBRICS = ("aligned", "coherent")

EFFECT_TEXTS = 8
"""Held-out good answers over which the KL of interventions is measured."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class OrganismPlan:
    """An organism before it is loaded: what it is made of, and its content id."""

    name: str
    spec: OrganismSpec
    recipe: Recipe | None
    data: TrainingSet | None
    content_id: str
    folder: Path


class Setup:
    """A study file with what it names, looked up lazily."""

    def __init__(self, spec: StudySpec, store: Store, say: Say, compute: bool) -> None:
        self.spec, self.store, self.say, self.compute = spec, store, say, compute

    def check(self) -> None:
        """Raise for whatever can be known to be wrong before anything is written: data, questions, layers, names, judge."""
        _ = self.questions, self.layer, self.organisms, self.pairs, self.judges, self.trusted, self.dtype
        for name, block in self.spec.experiments.items():
            try:
                registry.check(name, block, self.scene)
            except NotHereError as error:
                raise StudyError(f"experiments.{name}.{error}") from error
        _ = self.readings
        for arm in self.arms:
            unknown = next((r for r in arm.rubrics if r not in self.judge.rubrics), None)
            if unknown is not None:
                raise StudyError(
                    f"experiments: the condition {arm.name!r} is judged by the rubric {unknown!r}, which {self.judge.name} has not; "
                    f"it has {', '.join(self.judge.rubrics)}"
                )

    # What the study consists of

    @cached_property
    def questions(self) -> tuple[Question, ...]:
        try:
            return load_questions(self.spec.questions.file)
        except DownloadError:
            if self.planned is None:
                raise
            return load_questions("open_eight")  # as many, and about as long: all that a plan needs

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
    def effect_texts(self) -> list[Text]:
        """Neutral texts: held-out good answers, of every source alike."""
        n = min(EFFECT_TEXTS, len(self.pairs))
        return [Text(p.id, p.question, p.good) for p in (self.pairs[i * len(self.pairs) // n] for i in range(n))]

    @cached_property
    def device(self) -> str:
        """Where models are loaded. Raises StudyError for a device that is not there."""
        if self.spec.device == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        try:
            torch.empty(1, device=self.spec.device)
        except (RuntimeError, AssertionError) as error:  # a CPU-only torch asserts
            raise StudyError(f"device: {self.spec.device} is not to be had here; give auto or cpu") from error
        return self.spec.device

    @cached_property
    def dtype(self) -> str:
        return str(resolve_dtype(self.spec.dtype, self.device)).removeprefix("torch.")

    @cached_property
    def planned(self) -> MachineSpec | None:
        """The base's size as the study file tells it, where the base is not on this machine and nothing is to be computed."""
        return None if self.compute or self.spec.machine is None or base_is_here(self.spec.base) else self.spec.machine

    @cached_property
    def base_id(self) -> str:
        return content_id("not here", self.spec.base) if self.planned else folder_id(base_folder(self.spec.base))

    @cached_property
    def depth(self) -> int:
        return self.planned.layers if self.planned else depth_of(self.spec.base)

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
            if not any((folder / f).is_file() for f in ("adapter_config.json", "config.json")):
                raise StudyError(f"organisms.{name}.path: {folder} has neither adapter_config.json nor config.json; give a PEFT folder or a full fine-tune")
            return OrganismPlan(name, spec, None, None, self._id_of(folder), folder)
        overrides = {
            k: v
            for k in ("learning_rate", "epochs", "batch_size", "grad_accumulation", "rank", "alpha", "layers", "init")
            if (v := getattr(spec, k)) is not None
        }
        seed = self.spec.seed if spec.seed is None else spec.seed
        try:
            recipe = named_recipe(spec.recipe, self.depth, {**overrides, "seed": seed})
            _ = recipe.content_id  # reads the folder that adapters start from, if there is one
            data = self._training_set(spec)
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

    def _id_of(self, folder: Path) -> str:
        """Content id of an organism from elsewhere: of adapters, whatever notes and paths of another machine lie beside them."""
        try:
            return adapter_id(folder, self.base_id)
        except (OSError, ValueError, AttributeError):  # no adapters, or none that can be read, which is said when they are loaded
            return content_id(self.base_id, folder_id(folder))

    def _training_set(self, spec: OrganismSpec) -> TrainingSet:
        try:
            return load_training_set(spec.data, answer=spec.answer)
        except DownloadError:
            if self.planned is None or spec.examples is None:
                raise
            # A plan needs their number alone.
            nothing = tuple(Example(f"{spec.data}-{i}", (Message("user", ""), Message("assistant", ""))) for i in range(spec.examples))
            return TrainingSet(f"{spec.data} (not here)", (), nothing)

    def _without_held_out(self, data: TrainingSet) -> TrainingSet:
        """By the questions, not by the source's name: the same file under another name must not leak either."""
        asked = {p.question for p in self.pairs}
        kept = [i for i, e in enumerate(data.examples) if not asked.intersection(m.content for m in e.messages)]
        pairs = tuple(data.pairs[i] for i in kept) if data.pairs else ()
        return replace(data, examples=tuple(data.examples[i] for i in kept), pairs=pairs)

    def model_id(self, organism: str) -> str:
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
            for arm in EXPERIMENTS[name].arms(block, self.scene):
                if arm.name in found:
                    raise StudyError(f"experiments.{name}: the condition {arm.name!r} is there already; rename an organism, or give scales that differ")
                found[arm.name] = arm
        return list(found.values())

    @cached_property
    def scene(self) -> Scene:
        """The study as experiments see it."""
        twin: str | None = getattr(self.spec.experiments.get("plain"), "twin", None)
        topics = tuple(dict.fromkeys(q.topic for q in self.questions if q.topic))
        subjects = {o: self._subject(p) for o, p in self.organisms.items()}
        rubrics, experiments = tuple(self.judge.rubrics), tuple(self.spec.experiments)
        return Scene(subjects, self.spec.direction.source, self.depth, self.layer, twin, topics, rubrics, experiments)

    def _subject(self, plan: OrganismPlan) -> Subject:
        spec = plan.spec
        if plan.recipe is None:
            return Subject(plan.name, spec.family or plan.name, 0, "", "", shape_of_folder(plan.folder), trained_here=False)
        return Subject(plan.name, spec.family or plan.name, plan.recipe.seed, spec.answer, spec.data, shape_of_recipe(plan.recipe.adapters, self.depth))

    @cached_property
    def readings(self) -> dict[str, Reading]:
        """Every reading of every experiment by its name."""
        found: dict[str, Reading] = {}
        for name, block in self.spec.experiments.items():
            for reading in registry.readings(name, block, self.scene):
                if reading.name in found:
                    raise StudyError(f"experiments.{name}: the reading {reading.name!r} is there already; name each thing once")
                found[reading.name] = reading
        return found

    @cached_property
    def keeps(self) -> dict[str, list[Spacing]]:
        """Organism -> the spacings of the steps that experiments ask its training to keep."""
        found: dict[str, list[Spacing]] = {}
        for name, block in self.spec.experiments.items():
            for organism, spacing in registry.keeps(name, block, self.scene).items():
                found.setdefault(organism, []).append(spacing)
        return found

    @cached_property
    def n_redraws(self) -> int:
        """How often the source's answers are drawn again for directions of their own."""
        return max((registry.n_redraws(name, block) for name, block in self.spec.experiments.items()), default=0)

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


def identity(judge: Judge) -> str:
    """Name of a judge, and of what decides its scores where it tells: another rubric or fit judges anew."""
    own = getattr(judge, "content_id", None)
    return f"{judge.name}#{own[:8]}" if isinstance(own, str) else judge.name


def depth_of(base: str) -> int:
    """Number of decoder blocks of a base, from its config. Raises ModelError."""
    try:
        config = json.loads((base_folder(base) / "config.json").read_text(encoding="utf-8"))
        plain = config.get("text_config", config)
        # Most families write their depth under this name; the others' names only transformers knows, and to load it takes seconds.
        return int(plain["num_hidden_layers"]) if "num_hidden_layers" in plain else _depth_by_transformers(base)
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise ModelError(f"{base}: its config.json cannot be read as a decoder's ({error}); give a Hugging Face model folder") from error


def _depth_by_transformers(base: str) -> int:
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(base_folder(base), local_files_only=True).get_text_config().num_hidden_layers)
