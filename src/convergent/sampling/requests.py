"""What is to be answered: one request per condition, question, paraphrase and sample index."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from convergent.core.ids import content_id, seed
from convergent.core.values import Condition, Question


@dataclass(frozen=True)
class Request:
    """One answer to draw. `id` names it by content: the same request is never drawn twice."""

    condition: Condition
    question_id: str
    paraphrase: int
    sample: int
    question: str
    system: str
    topic: str
    seed: int

    @cached_property
    def id(self) -> str:
        return content_id(
            self.condition.content_id, self.question_id, self.paraphrase, self.question, self.system, self.sample, self.seed
        )


def make_requests(
    conditions: Iterable[Condition], questions: Iterable[Question], samples: int, root_seed: int, block: str = "main"
) -> Iterator[Request]:
    """All requests of `samples` answers per question and condition, spread evenly over the question's paraphrases.

    The seed of an answer is named by (root seed, block, question, paraphrase, sample), not by the condition: conditions share random
    numbers, which makes their differences paired. `block` separates draws for different purposes (reading a direction, testing it).
    """
    questions = tuple(questions)
    for condition in conditions:
        for q in questions:
            for i in range(samples):
                paraphrase, sample = i % len(q.paraphrases), i // len(q.paraphrases)
                yield Request(
                    condition,
                    q.id,
                    paraphrase,
                    sample,
                    q.paraphrases[paraphrase],
                    q.system,
                    q.topic,
                    seed(root_seed, "sampling", block, q.id, paraphrase, sample),
                )
