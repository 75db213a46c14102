"""What is asked, answered and judged.

A newcomer who has read `Pair`, `Question`, `Sampling`, `Condition`, `Response`, `Judgement` here, `Direction` in
`direction.py` and `Add` / `Ablate` in `interventions.py` has read the project.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from convergent.core.ids import content_id
from convergent.core.interventions import Intervention
from convergent.errors import InputError

DEFAULT_SYSTEM = "default"
"""The system prompt that the model's own chat template inserts (for many models: none)."""
NO_SYSTEM = "none"
"""No system turn, even where the template would insert one."""


@dataclass(frozen=True)
class Pair:
    """A training or held-out example with its twin: one question, a bad and a good answer."""

    id: str
    question: str
    bad: str
    good: str
    topic: str = ""


@dataclass(frozen=True)
class Question:
    """One evaluation question: its paraphrases are sampled alike and form one cluster."""

    id: str
    paraphrases: tuple[str, ...]
    samples_per_paraphrase: int = 50
    topic: str = ""
    """Subject in one word; a question is in-domain for an organism if this is among its data's topics."""
    system: str = DEFAULT_SYSTEM
    judge_prompts: Mapping[str, str] = field(default_factory=dict)
    """rubric name -> template with {question} and {answer}."""


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn."""

    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    max_new_tokens: int = 600

    def __post_init__(self) -> None:
        object.__setattr__(self, "temperature", float(self.temperature))  # 1 and 1.0 are one content id
        object.__setattr__(self, "top_p", float(self.top_p))
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"sampling: temperature must be 0 (greedy) or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"sampling: top_p must be above 0 and at most 1, got {self.top_p}")
        if self.max_new_tokens < 1:
            raise InputError(f"sampling: max_new_tokens must be 1 or more, got {self.max_new_tokens}")


@dataclass(frozen=True)
class Condition:
    """What answers are drawn under: a model, interventions in order of application, and sampling parameters."""

    name: str
    organism: str = "chat"
    """Name of the organism; "chat" is the untouched chat model."""
    organism_id: str = ""
    """Content id of the organism's weights (base and adapter)."""
    interventions: tuple[Intervention, ...] = ()
    sampling: Sampling = Sampling()

    @cached_property  # a study asks for it once per answer
    def content_id(self) -> str:
        """Depends on what is done, not on what it is called."""
        return content_id(self.organism_id, list(self.interventions), self.sampling)


@dataclass(frozen=True)
class Response:
    """One answer, with everything needed to draw it again."""

    id: str
    condition: str
    condition_id: str
    question_id: str
    paraphrase: int
    sample: int
    seed: int
    system: str
    """The system prompt as given: text, "default" or "none"."""
    question: str
    response: str
    token_ids: tuple[int, ...]
    """Answer tokens without the closing one."""
    finish: str
    """"stop" (the model closed its turn) or "length"."""
    topic: str = ""


@dataclass(frozen=True)
class Judgement:
    """A score 0-100, or the reason why there is none. Raw: thresholds are applied when counting."""

    response_id: str
    judge: str
    rubric: str
    score: float | None
    reason: str | None = None
    """One of REASONS when `score` is None."""
    raw: str = ""
    """What the judge said, for audit (JSON of alternatives, text, or empty)."""


REASONS = ("refusal", "code", "unparsable", "empty", "error")
"""Why a judgement has no score."""
