"""Running a study: what is not done yet, stage by stage, each row kept as it is made.

    train -> sample (plain, and for the direction) -> judge -> extract -> sample (interventions) -> judge -> margins -> report

Everything is keyed by content: a changed organism changes its own id, its conditions', its direction's, and so redoes exactly
what depends on it. `Run` is built up in the order of its needs: `Setup` (the study file), `Models`, `Answers`, `Measures`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any, cast

import pandas as pd

from convergent.core.ids import content_id
from convergent.core.values import Condition, Pair
from convergent.experiments.base import Arm, Kit, NotHereError, Reading, When
from convergent.study.answers import own_block
from convergent.study.before import Before
from convergent.study.measures import Measures
from convergent.study.models import NotDoneError


class Run(Measures):
    """One study in one folder. Lazily computed parts are pure functions of the spec and the store."""

    @cached_property
    def left_out(self) -> dict[str, str]:
        """Arm -> why it cannot be in this study."""
        return {}

    @property
    def seed(self) -> int:
        """The study's seed."""
        return self.spec.seed

    def training_pairs(self, organism: str) -> tuple[Pair, ...]:
        """The pairs that an organism was trained on one side of. Raises NotHereError."""
        data = self.organisms[organism].data
        if data is None:
            raise NotHereError(f"{organism} comes from elsewhere, so its training data are not known")
        if not data.pairs:
            raise NotHereError(f"the data of {organism} have no twins")
        return data.pairs

    def answers(self, arm: str) -> pd.DataFrame:
        """The judged answers of an arm, with scores by the judge that decides."""
        found = next((a for a in self.arms if a.name == arm), None)
        if found is None:
            raise NotHereError(f"the condition {arm} is left out (no experiment has it)")
        try:
            condition = self.built(found)
        except NotHereError as error:
            raise NotHereError(f"the condition {arm} is left out ({error})") from error
        return self._table(self.stored(self.requests([(found, condition)])), found.rubrics)

    # Conditions

    def conditions(self) -> list[tuple[Arm, Condition]]:
        """Every arm with its interventions built, but for those that cannot be in this study; the direction must have been read."""
        found = []
        for arm in self._by_organism(self.arms):
            with suppress(NotHereError):
                found.append((arm, self.built(arm)))
        return found

    def built(self, arm: Arm) -> Condition:
        """The condition of one arm, built once. Raises NotHereError for one that cannot be in this study, NotDoneError for one that waits."""
        if arm.name in self.left_out:
            raise NotHereError(self.left_out[arm.name])
        if arm.name not in self._built:
            try:
                self._built[arm.name] = self.condition(arm, arm.build(self))
            except NotHereError as error:
                self.left_out[arm.name] = str(error)
                raise
        return self._built[arm.name]

    @cached_property
    def _built(self) -> dict[str, Condition]:
        return {}

    def _by_organism(self, arms: Sequence[Arm]) -> list[Arm]:
        """Built organism by organism, so that effect matching loads each model once; the order of display is kept elsewhere."""
        order = list(dict.fromkeys(a.organism for a in arms))
        return sorted(arms, key=lambda a: order.index(a.organism))

    # Readings

    def value(self, reading: str) -> Any:
        """The value of a reading. Raises NotHereError if it cannot be made in this study, NotDoneError if it has not been made yet."""
        asked = self.readings[reading]

        def make() -> dict[str, Any]:
            if not self.compute:
                raise NotDoneError(reading)
            with self.timed(reading.partition("/")[0]):
                try:
                    made = {"value": asked.compute(self._kit(asked))}
                except NotHereError as error:
                    made = {"absent": str(error)}
            self.say(f"read    {reading}")
            return made

        kept = self.store.fact(self.reading_key(reading), "extract", make)
        if "absent" in kept:
            raise NotHereError(kept["absent"])
        return kept["value"]

    def reading_key(self, reading: str) -> str:
        """Content id of a reading and its inputs."""
        asked = self.readings[reading]
        return content_id("reading", reading, asked.inputs(self._kit(asked)))

    def _kit(self, reading: Reading) -> Kit:
        return cast(Kit, Before(self)) if reading.when == "before" else self

    def read_all(self, when: When) -> None:
        """Make the readings of one moment, those of the same models together."""
        for reading in sorted((r for r in self.readings.values() if r.when == when), key=lambda r: r.organisms):
            with suppress(NotHereError):
                self.value(reading.name)

    def values(self) -> tuple[dict[str, Any], dict[str, str]]:
        """(reading -> value, reading -> why it could not be made)."""
        found, absent = {}, {}
        for name in self.readings:
            try:
                found[name] = self.value(name)
            except NotHereError as error:
                absent[name] = str(error)
        return found, absent

    def go(self) -> None:
        """Do everything that is not done yet."""
        self.read_all("before")
        self.train_all()
        source = self.spec.direction.source
        plain = self.groups(self.plain)
        own = {own_block(draw): self.own_requests(source, draw) for draw in range(self.n_redraws + 1)}
        first = [(a.organism, r, "main") for (a, _), g in zip(self.plain, plain, strict=True) for r in g]
        at = next(i for i, (o, _, _) in enumerate(first) if o == source)
        first[at:at] = [(source, r, block) for block, requests in own.items() for r in requests]
        self.sample(first)
        self.judge_all([[r.id for r in g] for g in (*plain, *own.values())])
        organisms = dict.fromkeys((source, *self.spec.organisms))
        for organism, reader in (*((o, "chat") for o in organisms), *((o, o) for o in organisms)):  # each model is loaded once
            self.reading(organism, reader)
        for draw in range(1, self.n_redraws + 1):
            with suppress(NotHereError):
                self.redrawn(draw)
        for organism, why in self.unread.items():
            self.say(f"extract {organism}: no direction of its own ({why})")
        self.read_all("directions")
        conditions = self.conditions()
        asked = self.groups(conditions)
        self.sample([(a.organism, r, "main") for (a, _), g in zip(conditions, asked, strict=True) for r in g])
        self.judge_all([[r.id for r in g] for g in asked])
        for (arm, _), group in zip(conditions, asked, strict=True):
            if arm.rubrics:
                self.judge_all([[r.id for r in group]], rubrics=arm.rubrics)
        for other in list(self.judges)[1:]:  # of the answers that are reported, not of those that the direction is read from
            self.judge_all([[r.id for r in g] for g in asked], other)
        for _, condition in conditions:
            if condition.interventions:
                self.kl(condition)
        self.measure_margins(conditions)
        self.read_all("answers")
