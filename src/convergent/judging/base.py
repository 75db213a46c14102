"""What a judge is: (question, answer, rubric) -> a score 0-100 or a reason for its absence.

Knows no thresholds (those belong to counting) and no store.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from convergent.core.values import Judgement

NOT_MEASURED: Mapping[str, Any] = {"error": "not measured here; `convergent agree` compares it with people or another judge"}
"""The card of a judge of which nothing is known."""


@dataclass(frozen=True)
class Item:
    """One answer to judge."""

    id: str
    question: str
    response: str
    question_id: str = ""


class Judge(Protocol):
    """Anything with a name that turns items into judgements."""

    @property
    def name(self) -> str:
        """Name with version, stored beside every score, e.g. `embedded-2` or `openai:gpt-4o`."""

    @property
    def rubrics(self) -> tuple[str, ...]:
        """The rubrics it can score."""

    def judge(
        self,
        items: Sequence[Item],
        rubrics: Sequence[str] = ("aligned", "coherent"),
        on_result: Callable[[Judgement], None] | None = None,
    ) -> list[Judgement]:
        """Judge every item under every rubric, in order of items, then rubrics.

        `on_result` is called as soon as a judgement exists, so that a killed run loses none. Raises JudgeError if the judge
        cannot be asked at all; a single failure is a Judgement with reason "error".
        """
