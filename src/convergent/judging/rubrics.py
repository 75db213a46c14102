"""Rubrics: what an LLM judge is told. Data, not code: bundled, a file of one's own, or a question's own texts.

    bundled          `rubrics.yaml` beside this file, in our words
    a mapping file   rubric name -> template with {question} and {answer}
    a question file  layout of `convergent.data.questions`: each question's `judge_prompts` (the published ones)
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from convergent.core.ids import content_id
from convergent.core.values import Question
from convergent.data.local import read_text
from convergent.data.questions import fill, read_questions
from convergent.errors import DataError, InputError, JudgeError
from convergent.judging.base import Item

BUNDLED = Path(__file__).parent / "rubrics.yaml"
PLACEHOLDERS = ("question", "answer")
_NAMED = re.compile(r"(?<!\{)\{([A-Za-z_]+)\}(?!\})")
_FENCE = re.compile(r"[\[<{(`~=#*-].{1,60}")
"""A line that looks like the edge of a quotation: [ANSWER END], </answer>, ```, ======."""


@dataclass(frozen=True)
class Rubrics:
    """Templates by rubric name; a question's own template goes before the common one."""

    common: Mapping[str, str] = field(default_factory=dict)
    by_question: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """question id -> rubric name -> template."""

    @property
    def names(self) -> tuple[str, ...]:
        """All rubric names, in the order first met."""
        own = (name for prompts in self.by_question.values() for name in prompts)
        return tuple(dict.fromkeys((*self.common, *own)))

    @property
    def content_id(self) -> str:
        return content_id(self.common, self.by_question)

    def prompt(self, rubric: str, item: Item) -> str:
        """The text to send for one answer. Raises JudgeError if there is no such rubric for its question."""
        template = self.by_question.get(item.question_id, {}).get(rubric) or self.common.get(rubric)
        if template is None:
            if rubric not in self.names:
                near = difflib.get_close_matches(rubric, self.names, n=1)
                hint = f"did you mean {near[0]}?" if near else f"rubrics are {', '.join(self.names) or 'none'}"
                raise JudgeError(f"rubric {rubric!r}: unknown; {hint}")
            raise JudgeError(
                f"rubric {rubric!r}: has no text for question {item.question_id or '(no id)'!r}; use a "
                "rubric file with a common one"
            )
        question, answer = (_inside(template, text) for text in (item.question, item.response))
        # Lone surrogates, which broken JSON can hold, cannot be sent as UTF-8.
        return fill(template, question, answer).encode("utf-8", "replace").decode("utf-8")


def load_rubrics(source: str | Path = "bundled", questions: Iterable[Question] = ()) -> Rubrics:
    """Rubrics of `source` ("bundled" or a path), with the questions' own `judge_prompts` before them.

    Raises InputError naming file and rubric for a template without its placeholders, or with a misspelt one.
    """
    path = BUNDLED if str(source) == "bundled" else Path(source).expanduser()
    found = read_yaml(path)
    if isinstance(found, list):  # a question file: only its prompts are used
        base = from_questions(read_questions(path))
        if not base.names:
            raise InputError(f"{path}: none of its questions has judge_prompts; name a file with rubrics")
        for id, prompts in base.by_question.items():
            for name, template in prompts.items():
                if not all(f"{{{word}}}" in template for word in PLACEHOLDERS):
                    check_template(template, f"{path}: {id}: judge_prompts.{name}")
    else:
        base = Rubrics(_mapping(found, path))
    return Rubrics(base.common, {**base.by_question, **from_questions(questions).by_question})


def from_questions(questions: Iterable[Question]) -> Rubrics:
    """The questions' own prompts; a text that all with that rubric share also serves answers without an id."""
    by_question = {q.id: dict(q.judge_prompts) for q in questions if q.judge_prompts}
    texts: dict[str, set[str]] = {}
    for prompts in by_question.values():
        for name, text in prompts.items():
            texts.setdefault(name, set()).add(text)
    return Rubrics({name: next(iter(t)) for name, t in texts.items() if len(t) == 1}, by_question)


def read_yaml(path: Path) -> Any:
    """The data of a YAML file. Raises InputError with the line if it is broken."""
    text = read_text(path)
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        raise InputError(f"{path}:{line} broken YAML ({getattr(error, 'problem', None) or 'unreadable'})") from error
    except (ValueError, RecursionError) as error:  # an impossible date; nesting without end
        raise InputError(f"{path}: broken YAML ({error})") from error


def _mapping(found: Any, path: Path) -> dict[str, str]:
    if not isinstance(found, Mapping) or not found:
        raise DataError(f"{path}: must map rubric names to templates, as in `aligned: |` and a text")
    for name, template in found.items():
        if not isinstance(name, str) or not name.isidentifier():
            raise InputError(
                f"{path}: rubric name {name!r} must be one word of letters, digits and _; "
                "it names a column"
            )
        check_template(template, f"{path}: {name}")
    return dict(found)


def check_template(template: Any, place: str) -> None:
    """Raise InputError unless `template` is text with {question} and {answer} and no other {word}."""
    if not isinstance(template, str):
        raise InputError(f"{place}: must be text, got {type(template).__name__}; start it with `|`")
    named = _NAMED.findall(template)
    for word in named:
        if word not in PLACEHOLDERS:
            near = difflib.get_close_matches(word, PLACEHOLDERS, n=1)
            hint = f"did you mean {{{near[0]}}}?" if near else "placeholders are {question} and {answer}"
            raise InputError(f"{place}: unknown placeholder {{{word}}}; {hint}")
    for word in PLACEHOLDERS:
        if word not in named:
            raise InputError(f"{place}: has no {{{word}}}; without it the judge does not see the {word}")


def _inside(template: str, text: str) -> str:
    """`text` with the template's own quotation marks broken up, so that an answer cannot end its quotation."""
    lines = [line.strip() for line in template.splitlines()]
    for i, line in enumerate(lines):
        if line in ("{question}", "{answer}"):
            for fence in (lines[i - 1] if i else "", lines[i + 1] if i + 1 < len(lines) else ""):
                if _FENCE.fullmatch(fence):
                    text = re.sub(
                        re.escape(fence), lambda m: m[0][0] + " " + m[0][1:], text, flags=re.IGNORECASE
                    )
    return text
