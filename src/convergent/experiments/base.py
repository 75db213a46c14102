"""What an experiment is: arms to sample and claims to decide.

An `Arm` is a condition before its vectors exist: it names its organism, and builds its interventions when the direction has been read.
A `Claim` is decided from intervals, never by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
from pydantic import BaseModel, ConfigDict

from convergent import stats
from convergent.core.direction import Direction
from convergent.core.interventions import Ablate, Add, Intervention

Control = Literal["random", "orthogonal", "other_concept", "effect_matched"]
CONTROLS: tuple[Control, ...] = ("random", "orthogonal", "other_concept", "effect_matched")
CONTROL_LABELS = {
    "random": "random vector, same norm",
    "orthogonal": "orthogonal vector, same norm",
    "other_concept": "another concept (what good advice shifts)",
    "effect_matched": "random, matched in effect (KL)",
}
Verdict = Literal["held", "did not hold", "undecided"]


class Kit(Protocol):
    """What arms are built from, once the direction has been read."""

    @property
    def direction(self) -> Direction:
        """The direction of the study's source organism."""

    @property
    def layer(self) -> int:
        """The primary layer."""

    @property
    def token_norm(self) -> float:
        """Mean token norm at `layer`, the unit of doses."""

    def control(self, kind: Control, organism: str, intervention: Add | Ablate) -> Intervention:
        """The null of that kind for an intervention on an organism ("chat" for the chat model)."""


Build: TypeAlias = Callable[[Kit], tuple[Intervention, ...]]


@dataclass(frozen=True)
class Arm:
    """A condition of an experiment."""

    name: str
    organism: str
    label: str
    description: str
    group: str
    role: Literal["baseline", "real", "control"]
    build: Build = lambda kit: ()
    scale: float = float("nan")
    needs_direction: bool = True


@dataclass(frozen=True)
class Evidence:
    """One comparison behind a verdict."""

    text: str
    estimate: float
    low: float
    high: float
    n: int
    unit: str
    supports: Verdict
    p: float = float("nan")
    """One-sided, of what would speak against the claim; nan where it cannot be said."""
    margin: float = float("nan")
    """For "nothing changes": the difference that would not matter. `low` and `high` are then of the tests' level, 90 %."""
    decides: bool = True
    """Whether the verdict takes it into account; else it is only shown."""


@dataclass(frozen=True)
class Claim:
    """A statement and what the data say of it."""

    id: str
    claim: str
    source: str
    rule: str
    evidence: Sequence[Evidence] = field(default=())

    @property
    def verdict(self) -> Verdict:
        """Held if every comparison supports it; did not hold if one contradicts it; else undecided. By intervals: p and Holm change nothing."""
        votes = {e.supports for e in self.evidence if e.decides}
        if "did not hold" in votes:
            return "did not hold"
        return "held" if votes == {"held"} else "undecided"

    @property
    def p(self) -> float:
        """Of "one of the comparisons is not so", the largest of theirs; below stats.ONE_SIDED where the claim held. nan where one has none."""
        return stats.all_of_them([e.p for e in self.evidence if e.decides])


POINTS = {"aligned": "points of alignment", "coherent": "points of coherence"}


class Outcomes:
    """Judged answers and margins of a study, by condition name: what claims are decided from."""

    def __init__(self, aligned: Mapping[str, Any], margins: Mapping[str, Any]) -> None:
        self._aligned = aligned
        """name -> frame with columns question_id, aligned, coherent, of the answers that have both scores."""
        self._margins = margins
        """name -> frame with columns pair_id, domain, margin."""

    def has(self, *names: str) -> bool:
        return all(n in self._aligned for n in names)

    def alignment(self, a: str, b: str, text: str, sign: int = 1, what: Literal["aligned", "coherent"] = "aligned") -> Evidence:
        """Mean alignment of condition a minus b, paired by question; `sign` -1 if it is claimed to be below 0."""
        columns = _columns(self._aligned[a], self._aligned[b], what, "question_id")
        return evidence(text, stats.paired_difference(*columns), POINTS[what], sign, stats.one_sided_p(*columns, sign))

    def unchanged(
        self, a: str, b: str, text: str, margin: float, what: Literal["aligned", "coherent"] = "coherent", decides: bool = True
    ) -> Evidence:
        """Mean coherence (or alignment) of condition a is that of b within +-`margin` points: two one-sided tests at 5 %, paired by question.

        Held if the 90 % interval lies within the margin, did not hold if it lies outside it; a wide one decides nothing.
        """
        columns = _columns(self._aligned[a], self._aligned[b], what, "question_id")
        found = stats.equivalence(*columns, margin)
        vote: Verdict = "held" if found.equivalent else "did not hold" if found.different else "undecided"
        d = found.difference
        return Evidence(text, d.estimate, d.low, d.high, d.n, POINTS[what], vote, stats.tost_p(*columns, margin), margin, decides)

    def margin(self, a: str, b: str, text: str, sign: int = 1, domain: str | None = None) -> Evidence:
        """Mean margin of condition a minus b, paired by held-out pair; `sign` -1 if claimed to be below 0."""
        x, y = self._margins[a], self._margins[b]
        if domain is not None:
            x, y = x[x["domain"] == domain], y[y["domain"] == domain]
        # Pairs are the clusters: the interval is over held-out questions like these.
        columns = _columns(x, y, "margin", "pair_id")
        return evidence(text, stats.paired_difference(*columns), "nats per token", sign, stats.one_sided_p(*columns, sign))


def _columns(x: Any, y: Any, values: str, clusters: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Values of two frames, then the clusters of both."""
    return x[values].to_numpy(), y[values].to_numpy(), x[clusters].to_numpy(), y[clusters].to_numpy()


def evidence(text: str, d: stats.Interval, unit: str, sign: int = 1, p: float = float("nan")) -> Evidence:
    """Evidence from the interval of a difference that is claimed to be above 0 (sign 1) or below it (-1); `p` is one-sided."""
    low, high = (d.low, d.high) if sign > 0 else (-d.high, -d.low)
    if np.isnan(low) or np.isnan(high):
        vote: Verdict = "undecided"
    else:
        vote = "held" if low > 0 else "did not hold" if high < 0 else "undecided"
    return Evidence(text, d.estimate, d.low, d.high, d.n, unit, vote, p)


class Block(BaseModel):
    """Base of every experiment's settings: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Experiment(Protocol):
    """One experiment module: a `Settings` class, its arms and its claims."""

    name: str
    settings: type[Block]

    def arms(self, block: Any, organisms: Sequence[str], source: str) -> list[Arm]:
        """Arms to sample. `organisms` are the study's, `source` the one the direction is read in."""

    def claims(self, block: Any, outcomes: Outcomes, source: str) -> list[Claim]:
        """Claims that this experiment decides."""
