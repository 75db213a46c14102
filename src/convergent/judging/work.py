"""What is to be judged and which requests that takes: equal texts are asked once, and what is known is not asked.

Shared by the judges that ask a language model, over HTTP or in this process. Used by one thread.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from convergent.core.ids import content_id
from convergent.core.values import Judgement
from convergent.judging.base import Item
from convergent.judging.replies import Replies, Reply
from convergent.judging.rubrics import Rubrics
from convergent.judging.score import parse_samples, parse_score

PARAMETERS: Mapping[str, Any] = {"max_tokens": 1, "temperature": 0, "seed": 0, "logprobs": True, "top_logprobs": 20}
"""One token, and the probabilities of its alternatives."""
SAMPLE_TOKENS = 8
"""Longest sampled reply, in tokens: room for `100` or `REFUSAL` in any vocabulary."""


GRAMMAR = 'root ::= "100" | [1-9] [0-9]? | "0" | "REFUSAL" | "CODE"'
"""What a sampled reply may be, for servers of ours: a small model talks about the answer instead of rating it."""


def parameters_of(sample: int | None, held: bool = False) -> Mapping[str, Any]:
    """The request's parameters: of the one reading (None), or of the sample with that number; `held` to GRAMMAR."""
    if sample is None:
        return PARAMETERS
    extra = {"extra_body": {"grammar": GRAMMAR}} if held else {}
    return {"max_tokens": SAMPLE_TOKENS, "temperature": 1, "seed": sample, **extra}


@dataclass
class _Open:
    """A request that has no reply yet."""

    sample: int | None
    jobs: list[int] = field(default_factory=list)
    """The jobs that it serves."""


class Work:
    """The judgements that are wanted, and the requests still open."""

    def __init__(
        self,
        judge: str,
        rubrics: Rubrics,
        asked: Mapping[str, str],
        samples: int | None,
        held: bool,
        items: Sequence[Item],
        wanted: Sequence[str],
        on_result: Callable[[Judgement], None] | None,
    ) -> None:
        """asked: what stands in a request's key beside prompt and parameters, e.g. model and address.

        samples: so many sampled replies a judgement; None is one reading of probabilities. held: samples, to GRAMMAR.
        """
        self._judge, self._rubrics, self._held, self._on_result = judge, rubrics, held, on_result
        self.jobs = [(item, rubric) for item in items for rubric in wanted]
        self._results: list[Judgement | None] = [None] * len(self.jobs)
        self._replies: list[dict[int | None, Reply]] = [{} for _ in self.jobs]
        self._samples: tuple[int | None, ...] = (None,) if samples is None else tuple(range(samples))
        self.open: dict[str, _Open] = {}
        """Content key of a request -> what it is for."""
        self.digits = self.numbers = 0
        """Replies whose alternatives hold digits but no number of two digits, and those that hold one. A model with numbers
        as single tokens always lists some. Rubrics that do not speak of 100 are left out: they may want a digit."""
        for i, (item, rubric) in enumerate(self.jobs):
            text = rubrics.prompt(rubric, item)
            if item.response.strip():
                for sample in self._samples:
                    key = content_id({**asked, "prompt": text, **parameters_of(sample, held)})
                    self.open.setdefault(key, _Open(sample)).jobs.append(i)
        for i, (item, _) in enumerate(self.jobs):
            if not item.response.strip():
                self._set(i, None, "empty", "")

    def prompt(self, key: str) -> str:
        """Made again when needed: a large file's prompts would fill the memory."""
        item, rubric = self.jobs[self.open[key].jobs[0]]
        return self._rubrics.prompt(rubric, item)

    def parameters(self, key: str) -> Mapping[str, Any]:
        return parameters_of(self.open[key].sample, self._held)

    def settle(self, replies: Replies) -> None:
        """Finish what the cache can answer."""
        for key, reply in replies.get(list(self.open)).items():
            self.finish(key, reply)

    def finish(self, key: str, reply: Reply) -> None:
        """Score every job that has all its replies now."""
        prompt = self.prompt(key)
        done = self.open.pop(key)
        if done.sample is None and "100" in prompt:
            lengths = {len(t) for token, _ in reply.alternatives if (t := token.strip()).isdecimal()}
            self.numbers += any(n > 1 for n in lengths)
            self.digits += lengths == {1}
        for i in done.jobs:
            self._replies[i][done.sample] = reply
            if len(self._replies[i]) == len(self._samples) and self._results[i] is None:
                self._set(i, *self._score([self._replies[i][s] for s in self._samples]))

    def fail(self, key: str, message: str) -> None:
        """Give up a request for this run; what else belongs to its jobs is still asked, and kept."""
        for i in self.open.pop(key).jobs:
            if self._results[i] is None:
                self._set(i, None, "error", message)

    def results(self) -> list[Judgement]:
        done = [judgement for judgement in self._results if judgement is not None]
        assert len(done) == len(self.jobs), "every job ends with a judgement or with an error that was raised"
        return done

    def _score(self, replies: Sequence[Reply]) -> tuple[float | None, str | None, str]:
        """(score, reason, what was said, for audit)."""
        first = replies[0]
        if self._samples == (None,):
            raw: dict[str, Any] = {"text": first.text, "top": first.alternatives, "model": first.served_by}
            pairs = ((token, math.exp(min(p, 0.0))) for token, p in first.alternatives)
            return *parse_score(pairs), json.dumps(raw, ensure_ascii=False)
        texts = [reply.text for reply in replies]
        return *parse_samples(texts), json.dumps({"samples": texts, "model": first.served_by}, ensure_ascii=False)

    def _set(self, i: int, score: float | None, reason: str | None, raw: str) -> None:
        item, rubric = self.jobs[i]
        judgement = Judgement(item.id, self._judge, rubric, score, reason, raw)
        self._results[i] = judgement
        if self._on_result is not None:
            self._on_result(judgement)
