"""Answers and their scores: what is asked under each condition, what is sampled and judged of it, and the table of it."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import cached_property

import pandas as pd

from convergent.core.interventions import Intervention
from convergent.core.values import Condition, Judgement, Response
from convergent.directions.classes import Chosen, Classes, Scored, choose
from convergent.errors import DirectionError
from convergent.experiments.base import Arm, NotHereError
from convergent.judging.base import Item
from convergent.models.texts import Text
from convergent.sampling.lane import Tally
from convergent.sampling.requests import Request, make_requests
from convergent.sampling.sampler import sample
from convergent.study.models import Models, NotDoneError
from convergent.study.setup import RUBRICS


def own_block(draw: int) -> str:
    """Name of the seeds of the source's answers that directions are read from."""
    return f"direction-{draw}" if draw else "direction"


class Answers(Models):
    """What models say. Rows are named by content, so only what is absent is done."""

    @cached_property
    def tally(self) -> Tally:
        """What the sampler did in this run."""
        return Tally()

    def requests(self, arms: Sequence[tuple[Arm, Condition]], block: str = "main") -> list[Request]:
        """What is asked under each condition, one after the other."""
        return [r for _, condition in arms for r in self._asked(condition, block)]

    def _asked(self, condition: Condition, block: str) -> list[Request]:
        key = condition.name, condition.content_id, block
        if key not in self._requests:
            samples = self.spec.questions.samples if block == "main" else self.spec.direction.samples
            self._requests[key] = list(make_requests([condition], self.questions, samples, self.spec.seed, block))
        return self._requests[key]

    @cached_property
    def _requests(self) -> dict[tuple[str, str, str], list[Request]]:
        """Plan, stages and report ask for the same ones, and each has an id to hash."""
        return {}

    def condition(self, arm: Arm, interventions: tuple[Intervention, ...] = ()) -> Condition:
        return Condition(arm.name, arm.organism, self.model_id(arm.organism), interventions, self.sampling)

    @property
    def plain(self) -> list[tuple[Arm, Condition]]:
        """The arms that exist before the direction has been read."""
        return [(a, self.condition(a)) for a in self.arms if not a.needs_direction]

    def groups(self, conditions: Sequence[tuple[Arm, Condition]]) -> list[list[Request]]:
        """What is asked under each condition."""
        return [self.requests([pair]) for pair in conditions]

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
            with self.timed("sample"):
                self.model(organism, alone=True)  # not bound here: it would stay while the next one is loaded

                def keep(response: Response, organism: str = organism, blocks: dict[str, str] = blocks) -> None:
                    nonlocal done
                    self.store.add_response(response, organism, blocks[response.id])
                    done += 1
                    self.advance("sample", done, len(by_id), organism)

                before, start = self.tally.tokens, time.perf_counter()
                sample(self.model(organism), [r for r, _ in mine], keep, self.spec.sampling.rows, self.tally)
                speed = (self.tally.tokens - before) / (time.perf_counter() - start)
            n_conditions = len({r.condition.content_id for r, _ in mine})
            self.say(f"sample  {organism}: {len(mine)} answers under {n_conditions} condition(s), {speed:.0f} tokens/s")

    def judge_all(self, groups: Sequence[Sequence[str]], judge_id: str | None = None, rubrics: Sequence[str] = RUBRICS) -> None:
        """Judge what is not judged yet of groups of response ids, a group being the answers of one condition; by the judge that decides, or another.

        A local judge's scores depend, in their last digits, on what shares its batch. So it gets whole groups, even if some of a group is
        judged already: a run that was killed ends with the same digits as one that was not.
        """
        judge_id = judge_id or self.judge_id
        judge = self.judges[judge_id]
        known = self.store.judgements(judge_id)
        open_groups = [g for g in groups if any((i, rubric) not in known for i in g for rubric in rubrics)]
        if hasattr(judge, "estimate"):  # paid by the request: asked once, with one estimate, for what is absent
            open_groups = [[i for g in open_groups for i in g if any((i, rubric) not in known for rubric in rubrics)]]
        total = len(rubrics) * sum(len(g) for g in open_groups)
        done = 0
        if total:
            self.unload()

        def keep(j: Judgement) -> None:
            nonlocal done
            self.store.add_judgement(j, judge_id)
            done += 1
            self.advance("judge" if judge is self.judge else f"judge {judge.name}", done, total, "")

        for group in filter(None, open_groups):
            with self.timed("judge"):
                items = [Item(r.id, r.question, r.response, r.question_id) for r in self.store.responses(dict.fromkeys(group))]
                judge.judge(items, rubrics, keep)
        if total:
            spent = getattr(judge, "spent", 0.0)
            what = "" if tuple(rubrics) == RUBRICS else f" for {', '.join(rubrics)}"
            self.say(f"judge   {total // len(rubrics)} answers by {judge.name}{what}{f', ${spent:.4f} spent' if spent else ''}")

    def judged(self, items: Sequence[Item], rubrics: Sequence[str]) -> dict[tuple[str, str], float]:
        """(item id, rubric) -> score of texts that are no stored answers, as parts of one; nan where there is none."""
        if not self.compute:
            raise NotDoneError("judge")
        with self.timed("judge"):
            found = self.judge.judge(list(items), tuple(rubrics))
        return {(j.response_id, j.rubric): math.nan if j.score is None else j.score for j in found}

    # What directions are read from

    @cached_property
    def rule(self) -> Classes:
        return Classes(**self.spec.direction.classes.model_dump())

    @cached_property
    def _own_answers(self) -> dict[tuple[str, int], tuple[int, tuple[Chosen, list[Text]]]]:
        """(organism, draw) -> how many judgements there were, and what `own_answers` found."""
        return {}

    def own_requests(self, organism: str, draw: int = 0) -> list[Request]:
        """The requests whose answers an organism's direction is read from; further draws are of the source alone."""
        arm = next(a for a in self.arms if a.name == organism)
        return self.requests([(arm, self.condition(arm))], own_block(draw) if organism == self.spec.direction.source else "main")

    def own_answers(self, organism: str, draw: int = 0) -> tuple[Chosen, list[Text]]:
        """Classes among an organism's own judged answers, and their texts. Raises NotHereError where a class has too few."""
        # Every reading asks for them to know its inputs. They stay as they are once all answers are there, until something is judged.
        judged = len(self.store.judgements(self.judge_id))
        known = self._own_answers.get((organism, draw))
        if known is not None and known[0] == judged:
            return known[1]
        table, texts = self._own_table(organism, draw)
        found = self._choose(table), list(texts.values())
        if len(texts) == len(self.own_requests(organism, draw)):
            self._own_answers[organism, draw] = judged, found
        return found

    def _choose(self, table: pd.DataFrame) -> Chosen:
        """The two classes among judged answers."""

        def known(score: float) -> float | None:
            return None if math.isnan(score) else score

        scored = [
            Scored(r["response_id"], r["question_id"], r["n_tokens"], known(r["aligned"]), known(r["coherent"])) for r in table.to_dict("records")
        ]
        try:
            return choose(scored, self.rule, self.spec.seed)
        except DirectionError as error:
            raise NotHereError(str(error)) from error

    def stored(self, requests: Sequence[Request]) -> list[Response]:
        """The answers to `requests`. Raises NotDoneError in a run that may not compute and lacks some: what hangs on them will be another."""
        found = self.store.responses([r.id for r in requests])
        if not self.compute and len(found) < len(requests):
            raise NotDoneError("answers")
        return found

    def own_table(self, organism: str, rubrics: Sequence[str] = ()) -> tuple[pd.DataFrame, dict[str, Text]]:
        """An organism's own answers with their scores, and id -> text; judged by `rubrics` too if they are not yet."""
        return self._own_table(organism, 0, rubrics)

    def _own_table(self, organism: str, draw: int, rubrics: Sequence[str] = ()) -> tuple[pd.DataFrame, dict[str, Text]]:
        responses = self.stored(self.own_requests(organism, draw))
        if rubrics and self.compute:
            self.judge_all([[r.id for r in responses]], rubrics=rubrics)
        return self._table(responses, rubrics), {r.id: Text(r.id, r.question, r.token_ids, r.system) for r in responses}

    def _table(self, responses: Sequence[Response], rubrics: Sequence[str]) -> pd.DataFrame:
        scores = self.store.judgements(self.judge_id)

        def score(r: Response, rubric: str) -> float:
            j = scores.get((r.id, rubric))
            return math.nan if j is None or j.score is None else j.score

        columns = ("response_id", "question_id", "topic", "question", "response", "system", "sample", "n_tokens", *RUBRICS, *rubrics)
        rows = [
            (r.id, r.question_id, r.topic, r.question, r.response, r.system, r.sample, len(r.token_ids), *(score(r, x) for x in (*RUBRICS, *rubrics)))
            for r in responses
        ]
        return pd.DataFrame(rows, columns=list(columns))
