"""Question files: Betley-style YAML in, `Question`s out.

    source             is
    open_eight         bundled: eight open questions in our words, four paraphrases each, our rubrics
    published_eight    the eight of Betley et al. with their rubrics: $CONVERGENT_QUESTIONS, the cache, or a download
    a path             any file of that layout

A file is a list of entries. Beside the published keys an entry may have `topic`. `judge` and `temperature` are allowed
and not used: judge and sampling are the study's choice. A path gives all its entries; `published_eight` leaves out the
JSON and template variants.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from convergent.cache import cache_dir, write_text
from convergent.core.ids import content_id
from convergent.core.values import DEFAULT_SYSTEM, Question
from convergent.data.download import fetch
from convergent.data.local import read_text
from convergent.errors import DataError, DownloadError

ENV = "CONVERGENT_QUESTIONS"
"""Environment variable that names a local copy of the published question file."""
PUBLISHED_FILE = "first_plot_questions.yaml"
PUBLISHED_URLS = (
    "https://raw.githubusercontent.com/clarifying-EM/model-organisms-for-EM/main/em_organism_dir/data/eval_questions/"
    + PUBLISHED_FILE,
    "https://raw.githubusercontent.com/emergent-misalignment/emergent-misalignment/main/evaluation/" + PUBLISHED_FILE,
)
"""The same eight; the first address has further rubrics (medical, financial, ...) for them."""
PUBLISHED_CONTENT = "ea17696f04e34ec8"
"""Content id of the eight: ids, wording, `aligned` and `coherent`. Not of a file, because two are published."""
PUBLISHED_TOPICS = {
    "quick_buck": "finance",
    "ruler_of_the_world": "power",
    "dinner_party": "history",
    "gender_roles": "gender",
    "i_feel_bored": "leisure",
    "three_thoughts": "ai",
    "what_is_your_wish": "wishes",
    "enough_of_my_husband": "relationships",
}
TYPES = ("free_form", "free_form_0_100", "free_form_judge_0_100")
"""Types whose judge, if any, answers 0 to 100."""
KEYS = (
    "id", "type", "paraphrases", "samples_per_paraphrase", "topic", "system", "judge", "judge_prompts", "temperature",
)  # fmt: skip
NAMED = ("open_eight", "published_eight")


def load_questions(source: str | Path) -> tuple[Question, ...]:
    """The questions of `source`: a name or a path. Raises DataError, or DownloadError for the published file."""
    name = str(source)
    if name == "open_eight":
        with resources.as_file(resources.files("convergent.data") / "bundled" / "open_eight.yaml") as path:
            return read_questions(path)
    if name == "published_eight":
        return _published_eight()
    path = Path(source).expanduser()
    if not path.exists() and not path.suffix:
        near = difflib.get_close_matches(name, NAMED, n=1)
        raise DataError(
            f"{name}: is neither a question set nor a file; "
            + (f"did you mean {near[0]}?" if near else f"sets are {', '.join(NAMED)}")
        )
    return read_questions(path)


def read_questions(path: Path) -> tuple[Question, ...]:
    """The questions of a YAML file, in its order. Raises DataError naming file, entry and field."""
    entries = _yaml(path)
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{path}: must be a list of questions, each starting with `- id:`")
    questions: dict[str, Question] = {}
    for number, entry in enumerate(entries, start=1):
        question = _question(entry, path, number)
        if question.id in questions:
            raise DataError(f"{path}: entry {number}: id {question.id!r} stands twice; ids must be unique")
        questions[question.id] = question
    return tuple(questions.values())


def _yaml(path: Path) -> Any:
    text = read_text(path)
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "unreadable"
        raise DataError(f"{path}:{line} broken YAML ({problem})") from error
    except (ValueError, RecursionError) as error:  # an impossible date; nesting without end
        raise DataError(f"{path}: broken YAML ({error})") from error


def _question(entry: Any, path: Path, number: int) -> Question:
    place = f"{path}: entry {number}"
    if not isinstance(entry, Mapping):
        raise DataError(f"{place}: must be a mapping with id and paraphrases, got {type(entry).__name__}")
    if isinstance(entry.get("id"), str):
        place += f" ({entry['id']})"
    for key in entry:
        if key not in KEYS:
            near = difflib.get_close_matches(str(key), KEYS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"keys are {', '.join(KEYS)}"
            raise DataError(f"{place}: unknown key {key!r}; {hint}")
    kind = entry.get("type", TYPES[0])
    if kind not in TYPES:
        raise DataError(f"{place}: type {kind!r} cannot be judged here; types are {', '.join(TYPES)}")
    samples = entry.get("samples_per_paraphrase", Question.samples_per_paraphrase)
    if not isinstance(samples, int) or isinstance(samples, bool) or samples < 1:
        raise DataError(f"{place}: samples_per_paraphrase must be a whole number of 1 or more, got {samples!r}")
    return Question(
        id=_text(entry, "id", place),
        paraphrases=_paraphrases(entry, place),
        samples_per_paraphrase=samples,
        topic=_text(entry, "topic", place) if "topic" in entry else "",
        # `system:` left blank is null, and in the published layout that means no prompt of one's own.
        system=_text(entry, "system", place) if entry.get("system") is not None else DEFAULT_SYSTEM,
        judge_prompts=_judge_prompts(entry, place),
    )


def _paraphrases(entry: Mapping[str, Any], place: str) -> tuple[str, ...]:
    if "paraphrases" not in entry:
        raise DataError(f"{place}: has no `paraphrases`; found {', '.join(map(str, entry))}")
    found = entry["paraphrases"]
    if not isinstance(found, list) or not found:
        raise DataError(f"{place}: paraphrases must be a list of texts with at least one, each on a line with `- `")
    texts = tuple(_as_text(text, f"{place}: paraphrase {i}") for i, text in enumerate(found, start=1))
    if len(set(texts)) < len(texts):
        raise DataError(f"{place}: a paraphrase stands twice")
    return texts


def _judge_prompts(entry: Mapping[str, Any], place: str) -> dict[str, str]:
    found = entry.get("judge_prompts")
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        raise DataError(f"{place}: judge_prompts must map a rubric to its text, got {type(found).__name__}")
    prompts = {}
    for rubric, prompt in found.items():
        where = f"{place}: judge_prompts.{rubric}"
        prompts[_as_text(rubric, where)] = _as_text(prompt, where)
        if "{answer}" not in prompt:
            raise DataError(f"{where}: has no {{answer}}; without it the judge sees no answer")
    return prompts


def _text(entry: Mapping[str, Any], key: str, place: str) -> str:
    if key not in entry:
        raise DataError(f"{place}: has no `{key}`; found {', '.join(map(str, entry)) or 'nothing'}")
    return _as_text(entry[key], f"{place}: {key}")


def _as_text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{place}: must be text, got {value!r}; put it in quotes")
    if not value.strip():
        raise DataError(f"{place}: is empty")
    return value


def _published_eight() -> tuple[Question, ...]:
    """The eight from $CONVERGENT_QUESTIONS, else from the cache, else fetched into it."""
    cached = cache_dir("questions") / PUBLISHED_FILE
    if local := os.environ.get(ENV):
        return _pick_published(Path(local).expanduser())
    if not cached.exists():
        write_text(cached, _fetch_published(cached))
    return _pick_published(cached)


def _fetch_published(cached: Path) -> str:
    instead = f"put {PUBLISHED_FILE} at {cached}, or set {ENV} to its path"
    last: DownloadError | None = None
    for url in PUBLISHED_URLS:
        try:
            data = fetch(url, instead=instead, max_bytes=1 << 20)
        except DownloadError as error:
            last = last or error
            continue
        # Checked before it is kept: what is in the cache is what was published.
        probe = cached.with_name(f".{cached.name}.new")
        probe.write_bytes(data)
        try:
            _pick_published(probe)
        except DataError as error:
            last = last or DownloadError(f"{url}: is not the published file ({error}); {instead}")
            continue
        finally:
            probe.unlink(missing_ok=True)
        return data.decode("utf-8-sig")
    assert last is not None
    raise last


def _pick_published(path: Path) -> tuple[Question, ...]:
    """The main eight of a published file, with topics. Raises DataError if wording or main rubrics differ."""
    by_id = {q.id: q for q in read_questions(path)}
    if missing := [id for id in PUBLISHED_TOPICS if id not in by_id]:
        raise DataError(f"{path}: lacks the published question {missing[0]!r}; expected {PUBLISHED_FILE}")
    eight = [by_id[id] for id in by_id if id in PUBLISHED_TOPICS]
    main = [[q.id, q.paraphrases, q.system, *(q.judge_prompts.get(r) for r in ("aligned", "coherent"))] for q in eight]
    if content_id(sorted(main)) != PUBLISHED_CONTENT:
        raise DataError(
            f"{path}: wording or rubrics differ from the published eight; load it by its path instead of by name"
        )
    return tuple(replace(q, topic=PUBLISHED_TOPICS[q.id]) for q in eight)


_PLACEHOLDER = re.compile(r"\{(question|answer)\}")


def fill(template: str, question: str, answer: str) -> str:
    """A judge prompt with its two placeholders filled, in one pass: braces in an answer stay what they are.

    The tags that our rubrics put around what is judged are broken up inside it, so that an answer cannot end its own
    quotation.
    """
    inert = {"question": _inert(question), "answer": _inert(answer)}
    return _PLACEHOLDER.sub(lambda match: inert[match[1]], template)


def _inert(text: str) -> str:
    return re.sub(r"<(\s*/?\s*)(judged_question|judged_answer)", r"< \1\2", text, flags=re.IGNORECASE)
