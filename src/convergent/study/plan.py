"""What a run would do, with an estimate of time and cost: printed before it starts, and by `--plan` alone.

Rows are named by content, so what is there can be looked up, and nothing is computed for it. Counts are exact as far as they can be known without a
model: a condition whose vectors wait for something counts as not done, the others by their rows. Seconds are estimates.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from convergent.core.ids import content_id
from convergent.core.values import Condition
from convergent.errors import DirectionError
from convergent.experiments.base import Arm, NotHereError, Reading
from convergent.judging.base import Item, Judge
from convergent.models.load import base_folder
from convergent.study.memory import TEXT_TOKENS
from convergent.study.models import NotDoneError
from convergent.study.run import Run
from convergent.study.setup import EFFECT_TEXTS, RUBRICS
from convergent.study.speed import Speed, measure, parameters

EFFICIENCY = {"sample": 0.47, "read": 0.85, "train": 0.45}
"""Tokens per second of each kind of work, as a share of what the GEMM rate allows for one forward pass: what one run of studies/demo.yaml took (135M, two
cores, alone on the machine, 2026-11), namely 907 s to sample, 501 s to train, 246 s to extract and match effects, 216 s for margins and 207 s for further
draws of nulls and the ablations' cost. `read` is near 1, as what texts begin with is read once and not for each."""
TOKENS = {"answer": 75, "text": TEXT_TOKENS}
"""Typical tokens of a sampled answer (bounded by max_new_tokens), and of a question with its answer."""
JUDGE_SECONDS = 0.005
"""Of the embedded judge, per answer and rubric (40 s for the demo's 8,320), and of one that does not say its own."""
MATCH_PASSES = 6
"""Typical passes over the effect texts until a null is matched."""


@dataclass(frozen=True)
class Stage:
    """A line of the plan."""

    name: str
    what: str
    total: int
    done: int
    seconds: float
    """Estimate for what is not done."""
    note: str = ""
    judge: str = ""
    """Id of the judge that it asks, if it asks one."""


def make_plan(run: Run, speed: Speed | None = None) -> list[Stage]:
    """Stages with what is done and what is not. `run` must be one that may not compute; `speed`: of the machine, probed if None."""
    return _Plan(run, speed or speed_of(run)).stages()


class _Plan:
    def __init__(self, run: Run, speed: Speed) -> None:
        self.run = run
        line = line_tokens_per_second(run, speed)
        self.reading, self.sampling = (line * EFFICIENCY[k] for k in ("read", "sample"))
        self.training = line * EFFICIENCY["train"] * (speed.training or speed.flops) / speed.flops
        self.have = run.store.response_ids()
        self.judged = run.store.judgements(run.judge_id)
        self.n_each = run.spec.questions.samples * len(run.questions)
        self.answer_tokens = min(TOKENS["answer"], run.sampling.max_new_tokens)

    def stages(self) -> list[Stage]:
        return [*self.train(), *self.sample(), *self.judge(), self.extract(), *self.read(), self.effects(), self.margin()]

    # What is known

    @cached_property
    def own(self) -> set[str]:
        """Ids of the answers that the direction is read from, in all draws."""
        return {r.id for draw in range(self.run.n_redraws + 1) for r in self.run.own_requests(self.run.spec.direction.source, draw)}

    @cached_property
    def first(self) -> set[str]:
        """Ids of all answers that exist before it has been read."""
        return self.own | self.ids(self.run.plain)

    @cached_property
    def final(self) -> bool:
        """Whether what cannot be read or built stays out: all is judged that it hangs on, or a run has gone on without (a score may fail for good)."""
        return bool(self.margins) or all((i, rubric) in self.judged for i in self.first for rubric in RUBRICS)

    @cached_property
    def margins(self) -> set[tuple[str, str]]:
        """(condition id, pair's content id) of the margins that are there."""
        try:
            return set(self.run.store.margins(self.run.read_id))
        except (NotDoneError, DirectionError):
            return set()

    @cached_property
    def conditions(self) -> tuple[list[tuple[Arm, Condition]], list[Arm]]:
        """Conditions whose interventions are known, and arms that wait for something; what cannot be in the study is in neither."""
        known, waiting = [], []
        for arm in self.run.arms:
            try:
                known.append((arm, self.run.built(arm)))
            except NotHereError:
                if not self.final:
                    waiting.append(arm)
            except (NotDoneError, DirectionError):  # a class is too small as long as judgements are missing
                waiting.append(arm)
        return known, waiting

    def ids(self, conditions: Sequence[tuple[Arm, Condition]]) -> set[str]:
        return {r.id for g in self.run.groups(conditions) for r in g}

    # Stages, in the order of a run

    def train(self) -> list[Stage]:
        found = []
        for plan in self.run.organisms.values():
            if plan.recipe is not None and plan.data is not None:
                tokens = len(plan.data) * plan.recipe.epochs * TOKENS["text"]
                what = f"{plan.spec.recipe}, {len(plan.data)} examples of {plan.data.name}, seed {plan.recipe.seed}"
                found.append(_stage(f"train {plan.name}", what, 1, int(plan.folder.is_dir()), tokens / self.training))
        return found

    @cached_property
    def rest(self) -> set[str]:
        """Ids of the answers under interventions that are known."""
        return self.ids(self.conditions[0]) - self.first

    @property
    def n_rest(self) -> int:
        """Number of answers under interventions, of arms that wait too."""
        return len(self.rest) + self.n_each * len(self.conditions[1])

    @property
    def n_arms(self) -> int:
        known, waiting = self.conditions
        return len(known) + len(waiting)

    def sample(self) -> list[Stage]:
        each, n_plain = self.answer_tokens / self.sampling, len(self.run.plain)
        return [
            _stage("sample plain", f"{n_plain} conditions, and answers to read the direction from", len(self.first), len(self.first & self.have), each),
            _stage("sample interventions", f"{self.n_arms - n_plain} conditions", self.n_rest, len(self.rest & self.have), each),
        ]

    def judge(self) -> list[Stage]:
        run = self.run
        both = (len(self.first) + self.n_rest) * len(RUBRICS)
        found = [self.judging("judge", run.judge_id, both, self.first | self.rest)]
        for rubric in dict.fromkeys([x for a in run.arms for x in a.rubrics] + [x for r in run.readings.values() for x in _own_rubrics(r)]):
            ids, n_waiting = self.asked_for(rubric)
            found.append(self.judging(f"judge {rubric}", run.judge_id, len(ids) + n_waiting, ids, (rubric,)))
        reported = self.ids(self.conditions[0])
        n_reported = len(reported) + self.n_each * len(self.conditions[1])
        for other in list(run.judges)[1:]:
            found.append(self.judging("judge (to compare)", other, n_reported * len(RUBRICS), reported))
        return found

    def asked_for(self, rubric: str) -> tuple[set[str], int]:
        """Ids of the answers to be judged by a further rubric, and the number of those whose ids are not known yet."""
        known, waiting = self.conditions
        ids = self.ids([(a, c) for a, c in known if rubric in a.rubrics])
        for reading in self.run.readings.values():
            for organism, rubrics in reading.rubrics.items():
                if rubric in rubrics:
                    own = {r.id for r in self.run.own_requests(organism)}
                    # A reading that is made asks nobody again.
                    ids |= {i for i in own if (i, rubric) in self.judged} if self.is_made(reading.name) else own
        return ids, self.n_each * sum(rubric in a.rubrics for a in waiting)

    def judging(self, name: str, judge_id: str, total: int, ids: Collection[str], rubrics: Sequence[str] = RUBRICS) -> Stage:
        judge = self.run.judges[judge_id]
        scores = self.judged if judge_id == self.run.judge_id else self.run.store.judgements(judge_id)
        done = sum((i, rubric) in scores for i in ids for rubric in rubrics)
        cost = self.cost((total - done) // len(rubrics), judge, rubrics)
        return _stage(name, f"{judge.name}: {', '.join(rubrics)}", total, done, _seconds_of(judge), cost, judge_id)

    def extract(self) -> Stage:
        readings = [(o, reader, 0) for o in self.run.spec.organisms for reader in (o, "chat")]
        source, n_redraws = self.run.spec.direction.source, self.run.n_redraws
        readings += [(source, source, draw) for draw in range(1, n_redraws + 1)]
        n_read = sum(self.is_read(*reading) for reading in readings)
        tokens = sum(len(self.run.own_requests(o, draw)) for o, _, draw in readings) * self.answer_tokens / len(readings)
        what = "class means of each organism, read in it and in the chat model" + (f", and of {n_redraws} further draw(s) of {source}" if n_redraws else "")
        return _stage("extract", what, len(readings), n_read, tokens / self.reading)

    def read(self) -> list[Stage]:
        found = []
        for experiment in dict.fromkeys(name.partition("/")[0] for name in self.run.readings):
            mine = [r for r in self.run.readings.values() if r.name.partition("/")[0] == experiment]
            todo = [r for r in mine if not self.is_made(r.name)]
            n_judged = round(sum(r.judged for r in todo))
            seconds = sum(r.tokens for r in todo) / self.reading + n_judged * _seconds_of(self.run.judge)
            what, asks = f"{len(mine)} value(s) computed from the models", any(r.judged for r in mine)
            if asks:
                what += f", about {round(sum(r.judged for r in mine))} parts of answers judged"
            note = self.cost(n_judged, self.run.judge, RUBRICS[:1])
            made = len(mine) - len(todo)
            found.append(_stage(f"read {experiment}", what, len(mine), made, seconds / max(1, len(todo)), note, self.run.judge_id if asks else ""))
        return found

    def effects(self) -> Stage:
        known, waiting = self.conditions
        n = self.n_arms - len(self.run.plain)
        measured = sum(self.run.store.has_fact(self.run.kl_key(c)) for a, c in known if a.needs_direction)
        # Nulls that wait are still to be matched.
        matching = sum(a.name.endswith("effect_matched") for a in waiting) * MATCH_PASSES / max(1, n - measured)
        return _stage("effects", "KL of each intervention, nulls matched to it", n, measured, (1 + matching) * EFFECT_TEXTS * TOKENS["text"] / self.reading)

    def margin(self) -> Stage:
        pairs = [content_id(p) for p in self.run.pairs]
        done = sum((condition.content_id, p) in self.margins for _, condition in self.conditions[0] for p in pairs)
        what = f"{len(pairs)} held-out pairs x {self.n_arms} conditions"
        return _stage("margin", what, self.n_arms * len(pairs), done, 2 * TOKENS["text"] / self.reading)

    def is_read(self, organism: str, reader: str, draw: int) -> bool:
        try:
            if draw:
                return self.run.redrawn(draw) is not None
            return self.run.reading(organism, reader) is not None or self.final
        except NotHereError:
            return self.final
        except (NotDoneError, DirectionError):
            return False

    def is_made(self, reading: str) -> bool:
        try:
            return self.run.store.has_fact(self.run.reading_key(reading))
        except NotHereError:  # nor will it be
            return self.final
        except (NotDoneError, DirectionError):  # its inputs are not there yet
            return False

    def cost(self, n_answers: int, judge: Judge, rubrics: Sequence[str]) -> str:
        """What a paid judge would cost for so many answers of typical length; empty for a judge that is free."""
        estimate = getattr(judge, "estimate", None)
        if estimate is None or not n_answers:
            return ""
        words = " word" * self.answer_tokens
        questions = [q.paraphrases[0] for q in self.run.questions]
        items = [Item(str(i), questions[i % len(questions)], f"{i}{words}") for i in range(n_answers)]
        return f"for answers of typical length: {estimate(items, rubrics)}"


def _own_rubrics(reading: Reading) -> list[str]:
    return [rubric for rubrics in reading.rubrics.values() for rubric in rubrics]


def _seconds_of(judge: Judge) -> float:
    """Per judgement."""
    return float(getattr(judge, "seconds_each", JUDGE_SECONDS))


def _stage(name: str, what: str, total: int, done: int, seconds_each: float, note: str = "", judge: str = "") -> Stage:
    return Stage(name, what, total, done, (total - done) * seconds_each, note, judge)


def speed_of(run: Run) -> Speed:
    """Of this machine, probed; or what the study file tells of another, for a base that is not here."""
    if run.planned:
        return Speed(run.planned.tflops * 1e12)
    speed = measure(run.device, run.dtype)
    return speed if run.dtype == "float32" else replace(speed, training=measure(run.device, "float32").flops)


def line_tokens_per_second(run: Run, speed: Speed) -> float:
    """What the machine's GEMM rate allows for one forward pass of the base."""
    n = run.planned.parameters if run.planned else parameters(base_folder(run.spec.base))
    return speed.flops / (2 * n)
