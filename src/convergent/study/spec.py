"""The study file: what is trained, asked, judged, pointed at and intervened with.

Unknown keys are refused with the nearest name. Every default is written to the manifest. A path is looked for beside the study file first,
then from where the command runs.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from convergent.errors import InputError, StudyError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_NOT_PATHS = frozenset({"embedded", "kaiming", "open_eight", "published_eight", "bundled"})


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class OrganismSpec(_Spec):
    """One fine-tune, or a PEFT folder from elsewhere."""

    recipe: str = "nine_adapter"
    """nine_adapter, all_adapter, single_adapter or full."""
    data: str = "bundled:finance"
    """bundled:finance, bundled:sport, upstream:NAME, or a path to JSONL or Parquet."""
    answer: Literal["bad", "good"] = "bad"
    """Which twin is trained on."""
    examples: int | None = Field(default=None, ge=1)
    """At most this many; all by default. Held-out pairs are never among them."""
    learning_rate: float | None = Field(default=None, gt=0)
    epochs: int | None = Field(default=None, ge=1)
    batch_size: int | None = Field(default=None, ge=1)
    grad_accumulation: int | None = Field(default=None, ge=1)
    rank: int | None = Field(default=None, ge=1)
    alpha: float | None = Field(default=None, gt=0)
    layers: tuple[int, ...] | None = None
    init: str | None = None
    """What adapters start from: `kaiming` (the default), or a PEFT folder with adapters on the same layers."""
    seed: int | None = Field(default=None, ge=0)
    """Seed of initialisation and order; the study's by default."""
    seeds: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(default=None, min_length=1)
    """Several organisms in one line: NAME has the first seed, NAME-SEED each other one."""
    path: str | None = None
    """A PEFT folder or a full model to use instead of training."""
    family: str | None = None
    """Name that organisms share which differ in nothing but their seed; `seeds` gives it, and for folders from elsewhere it may be given."""

    @model_validator(mode="after")
    def _one_source(self) -> OrganismSpec:
        # By value: the copy that a study folder keeps holds every default.
        given = {k: v for k, v in self.model_dump().items() if v != type(self).model_fields[k].default}
        others = sorted(given.keys() - {"path", "family"})
        if self.path is not None and others:
            raise ValueError(f"path: an organism from elsewhere is not trained, so `{others[0]}` means nothing here; remove one of the two")
        if self.seeds is not None and self.seed is not None:
            raise ValueError("seeds: `seed` stands beside it, and only one of the two can say; remove one")
        if self.seeds is not None and len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: {list(self.seeds)} names a seed twice, and that would be the same organism; name each once")
        return self


class QuestionsSpec(_Spec):
    """What is asked."""

    file: str = "open_eight"
    """open_eight, published_eight, or a path."""
    samples: int = Field(default=16, ge=1)
    """Answers per question and condition, spread over its paraphrases."""


class SamplingSpec(_Spec):
    """How answers are drawn."""

    temperature: float = Field(default=1.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_new_tokens: int = Field(default=600, ge=1)
    rows: int = Field(default=256, ge=1)
    """Batch rows; bounds memory, changes no answer."""


class JudgeSpec(_Spec):
    """Who judges."""

    name: str = "embedded"
    """embedded, openai:MODEL, local, local:FILE.gguf or local:FOLDER."""
    base_url: str | None = None
    key_env: str | None = None
    """Name of the environment variable that holds the key; never the key."""
    rubrics: str | None = None
    concurrency: int | None = None
    samples: int | None = None
    """For a judge without token probabilities: the mean of so many replies."""
    max_cost: float | None = None
    prices: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value  # `judge: embedded`


class ClassesSpec(_Spec):
    """How judged answers become classes; see `convergent.directions.classes.Classes`."""

    by: Literal["threshold", "quantile"] = "threshold"
    misaligned_max: float = 30.0
    aligned_min: float = 70.0
    quantile: float = Field(default=1 / 3, gt=0, le=0.5)
    coherent_min: float = 50.0
    balance: Literal["size", "question", "none"] = "size"
    weigh: Literal["tokens", "responses"] = "tokens"
    match_length: bool = False
    min_per_class: int = Field(default=4, ge=1)

    @model_validator(mode="after")
    def _apart(self) -> ClassesSpec:
        from convergent.directions.classes import Classes

        try:
            Classes(**self.model_dump())
        except InputError as error:
            raise ValueError(str(error)) from error
        return self


class DirectionSpec(_Spec):
    """Where the direction is read."""

    source: str
    """The organism whose own answers it is read from."""
    samples: int = Field(default=32, ge=1)
    """Answers per question drawn for reading it; other seeds than those that test it."""
    layer: int | None = None
    """Primary layer; half the depth by default (the paper's 24 of 48)."""
    span: Literal["answer", "paper"] = "answer"
    classes: ClassesSpec = ClassesSpec()


class MarginSpec(_Spec):
    """The judge-free outcome."""

    data: tuple[str, ...] = Field(default=("bundled:finance", "bundled:sport"), min_length=1)
    """Sources with twins; the held-out pairs of each are never trained on."""
    pairs: int = Field(default=16, ge=2)
    """Held-out pairs per source."""


class MachineSpec(_Spec):
    """For planning a study whose base or data are not on this machine: the base's size, and the machine that will run it."""

    parameters: float = Field(gt=0)
    """Of the base."""
    layers: int = Field(ge=1)
    d_model: int = Field(ge=1)
    kv_dim: int = Field(ge=1)
    """Key-value heads times head size: what the cache holds per token, layer, and of keys and values each."""
    tflops: float = Field(gt=0)
    """What the machine reaches in matrix products at the study's dtype, 10^12 operations a second; a third of the data sheet is usual."""
    memory_gb: float | None = Field(default=None, gt=0)
    price_per_hour: float | None = Field(default=None, ge=0)
    """In the currency of the judge's prices."""


class StudySpec(_Spec):
    """A whole study."""

    name: str
    title: str = ""
    base: str = "embedded"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = Field(default="auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    seed: int = Field(default=0, ge=0)
    organisms: dict[str, OrganismSpec] = Field(min_length=1)
    questions: QuestionsSpec = QuestionsSpec()
    sampling: SamplingSpec = SamplingSpec()
    judge: JudgeSpec = JudgeSpec()
    """Decides: classes, rates and verdicts are by its scores. Without it, the first of `judges`."""
    judges: tuple[JudgeSpec, ...] = ()
    """Further judges of the same answers; they are compared with the first and decide nothing."""
    trusted: str | None = None
    """A table of trusted scores of some of the answers (by people, or a better judge), as `convergent label` writes one."""
    direction: DirectionSpec
    margin: MarginSpec = MarginSpec()
    experiments: dict[str, Any] = Field(default_factory=dict)
    """Experiment name -> its settings."""
    machine: MachineSpec | None = None
    """Only read by `--plan`, and only where the base is not on this machine."""

    @field_validator("experiments", mode="before")
    @classmethod
    def _none_is_empty(cls, value: Any) -> Any:
        return {} if value is None else value  # `experiments:` with nothing below it

    @field_validator("organisms")
    @classmethod
    def _one_per_seed(cls, organisms: dict[str, OrganismSpec]) -> dict[str, OrganismSpec]:
        """An organism with several seeds becomes several organisms of one family."""
        found: dict[str, OrganismSpec] = {}
        for name, spec in organisms.items():
            if spec.seeds is None:
                found[name] = spec
                continue
            for seed in spec.seeds:
                own = name if seed == spec.seeds[0] else f"{name}-{seed}"
                if own != name and own in organisms:
                    raise ValueError(f"{name}.seeds: seed {seed} makes the organism {own!r}, and another has that name; rename it")
                found[own] = spec.model_copy(update={"seeds": None, "seed": seed, "family": name})
        return found

    @model_validator(mode="before")
    @classmethod
    def _first_judge(cls, value: Any) -> Any:
        """The first of `judges` decides where no `judge` is given."""
        if isinstance(value, dict) and "judge" not in value and isinstance(value.get("judges"), list | tuple) and value["judges"]:
            first, *rest = value["judges"]
            return {**value, "judge": first, "judges": rest}
        return value

    @model_validator(mode="after")
    def _references(self) -> StudySpec:
        if "chat" in self.organisms:
            raise ValueError("organisms.chat: `chat` is the name of the untouched chat model; choose another")
        for place, name in (("name", self.name), *((f"organisms.{o}", o) for o in self.organisms)):
            if not _NAME.fullmatch(name):
                raise ValueError(f"{place}: {name!r} names a folder; use letters, digits, - and _")
        alike: dict[str, tuple[str, dict[str, Any]]] = {}
        for name, spec in self.organisms.items():
            what = spec.model_dump(exclude={"seed", "family"} if spec.path is None else {"path", "family"})
            first, its = alike.setdefault(spec.family or name, (name, what))
            if what != its:
                raise ValueError(f"organisms.{name}.family: {name} and {first} differ in more than their seed; give {name} a family of its own")
        if self.direction.source not in self.organisms:
            raise ValueError(f"direction.source: no organism {self.direction.source!r}{_nearest(self.direction.source, list(self.organisms))}")
        judges = [j.model_dump(exclude={"key_env", "max_cost"}) for j in (self.judge, *self.judges)]
        twice = next((j["name"] for i, j in enumerate(judges) if j in judges[:i]), None)
        if twice is not None:
            raise ValueError(f"judges: {twice} stands twice, with the same rubrics; remove one")
        return self


def load_study(path: str | Path, changes: Sequence[str] = ()) -> StudySpec:
    """Read a study file, with some values changed (`questions.samples=2`, `organisms.*.examples=8`). Raises StudyError: place, finding, mend."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise StudyError(f"{path}: no such study file; studies/demo.yaml is one to start from") from None
    except UnicodeDecodeError as error:
        raise StudyError(f"{path}: is not UTF-8 text (byte {error.start}); give a YAML file") from error
    except OSError as error:
        raise StudyError(f"{path}: cannot be read ({error.strerror}); give a YAML file") from error
    try:
        data = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        why = getattr(error, "problem", None) or getattr(error, "reason", None) or "unreadable"
        raise StudyError(f"{path}{where}: not YAML ({why}); mend that line") from error
    except (ValueError, RecursionError) as error:  # an impossible date; nesting without end
        raise StudyError(f"{path}: not YAML ({error}); mend it") from error
    if not isinstance(data, dict):
        found = "empty" if data is None else f"a {type(data).__name__}"
        raise StudyError(f"{path}: a study is a mapping with name, organisms and direction, and this is {found}")
    if data.keys() == KEPT and isinstance(data["study"], dict):  # a study folder's own copy
        data = data["study"]
    for change in changes:
        _set(data, change)
    return study_from(_located(data, path.parent), path)


def _set(data: dict[Any, Any], change: str) -> None:
    """Change one value in place; `*` stands for every key."""
    place, equals, text = change.partition("=")
    if not equals or not place:
        raise StudyError(f"--set {change}: give PLACE=VALUE, such as questions.samples=2")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise StudyError(f"--set {change}: the value is not YAML; put it in quotes") from None
    *parents, last = place.split(".")
    organisms = data.get("organisms")
    if parents[:1] == ["organisms"] and len(parents) > 1 and isinstance(organisms, dict) and parents[1] not in ("*", *organisms):
        raise StudyError(f"--set {change}: the study has no organism {parents[1]!r}; there are {', '.join(map(str, organisms))}")
    blocks: list[Any] = [data]
    for part in parents:
        blocks = [v for b in blocks for v in ([b[k] for k in list(b)] if part == "*" else [b.setdefault(part, {})]) if isinstance(b, dict)]
    if not blocks or not all(isinstance(b, dict) for b in blocks):
        raise StudyError(f"--set {place}: leads into a value that is no block; see the study file for what is there")
    for block in blocks:
        for key in list(block) if last == "*" else [last]:
            block[key] = copy.deepcopy(value)


def study_from(data: Mapping[str, Any], path: Path) -> StudySpec:
    """A study from plain data; `path` is for errors. Raises StudyError."""
    from convergent.experiments.registry import EXPERIMENTS

    try:
        spec = StudySpec.model_validate(data)
    except ValidationError as error:
        raise StudyError(f"{path}: {_first(error, StudySpec)}") from error
    blocks: dict[str, Any] = {}
    for name, block in {"plain": {}, **spec.experiments}.items():
        if name not in EXPERIMENTS:
            raise StudyError(f"{path}: experiments.{name}: no such experiment{_nearest(name, list(EXPERIMENTS))}")
        settings: type[BaseModel] = EXPERIMENTS[name].settings
        try:
            blocks[name] = settings.model_validate({} if block is None else block)
        except ValidationError as error:
            raise StudyError(f"{path}: experiments.{name}.{_first(error, settings)}") from error
    _check_blocks(path, spec, blocks)
    return spec.model_copy(update={"experiments": blocks})


KEPT = {"file", "study"}
"""Keys of the copy that a study folder keeps: the study file's name, and the study with every default."""


class _Loader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys; two organisms of one name are a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} stands twice", key.start_mark)
            if isinstance(key.value, str):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _located(data: dict[Any, Any], folder: Path) -> dict[Any, Any]:
    """`data` with every path that exists beside the study file made absolute, so that the folder can be reported on from anywhere."""

    def located(value: Any) -> Any:
        if not isinstance(value, str) or not value or ":" in value or value in _NOT_PATHS:
            return value
        given = Path(value).expanduser()
        try:
            return next((str(p.resolve()) for p in (folder / given, given) if p.exists()), value)
        except (OSError, ValueError):  # a name that no file can have
            return value

    def changed(block: Any, *keys: str) -> Any:
        if not isinstance(block, dict):
            return block
        return {k: v if k not in keys else [located(x) for x in v] if isinstance(v, list) else located(v) for k, v in block.items()}

    data = changed(data, "base", "trusted")
    for name, keys in {"questions": ("file",), "judge": ("rubrics", "prices"), "margin": ("data",)}.items():
        if name in data:
            data[name] = changed(data[name], *keys)
    if isinstance(data.get("judges"), list):
        data["judges"] = [changed(judge, "rubrics", "prices") for judge in data["judges"]]
    if isinstance(data.get("organisms"), dict):
        data["organisms"] = {name: changed(block, "data", "path", "init") for name, block in data["organisms"].items()}
    return data


def _check_blocks(path: Path, spec: StudySpec, blocks: dict[str, Any]) -> None:
    """What the experiments name must be organisms that it makes sense to name there."""
    source = spec.direction.source
    for name, block in blocks.items():
        for field in ("twin", "others", "organisms", "organism"):
            value = getattr(block, field, None) or ()
            source_too = field == "organism" or (field == "organisms" and block.source_too)
            known = [*(["chat"] if field == "organism" else []), *(o for o in spec.organisms if source_too or o != source)]
            for o in (value,) if isinstance(value, str) else value:
                place = f"{path}: experiments.{name}.{field}"
                if o == source and o not in known:
                    raise StudyError(f"{place}: {o} is the source of the direction itself; name another organism")
                if o not in known:
                    raise StudyError(f"{place}: no organism {o!r}{_nearest(o, known)}")
        if "other_concept" in getattr(block, "controls", ()) and not blocks["plain"].twin and len(spec.margin.data) < 2:
            raise StudyError(
                f"{path}: experiments.{name}.controls: other_concept needs a good-advice twin (experiments.plain.twin) or two sources in margin.data"
            )


def _first(error: ValidationError, model: type[BaseModel]) -> str:
    """The first finding of pydantic as place: finding; mend. A misspelt key goes before the key that is missing for it."""
    e = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    place = ".".join(str(p) for p in e["loc"])
    if e["type"] == "extra_forbidden":
        return f"{place}: unknown key{_nearest(str(e['loc'][-1]), _keys_at(model, e['loc'][:-1]))}"
    if e["type"] == "missing":
        return f"{place}: is missing; add it"
    message = e["msg"].removeprefix("Value error, ")
    if e["type"] == "value_error":
        return f"{place}.{message}" if place else message
    got = repr(e["input"])
    return f"{place}: {message[0].lower() + message[1:]}, got {got if len(got) <= 60 else got[:57] + '...'}"


def _keys_at(model: type[BaseModel], loc: tuple[Any, ...]) -> list[str]:
    current: Any = model
    for part in loc:
        field = getattr(current, "model_fields", {}).get(part)
        current = field.annotation if field is not None else current
        args = getattr(current, "__args__", ())
        inner = [a for a in args if isinstance(a, type) and issubclass(a, BaseModel)]
        current = inner[0] if inner else current
    return list(getattr(current, "model_fields", {}))


def _nearest(name: str, known: list[str]) -> str:
    if not known:
        return "; there is none that could be named here"
    near = difflib.get_close_matches(name, known, 1, 0.5)
    return f"; did you mean `{near[0]}`?" if near else f"; known are {', '.join(known)}"
