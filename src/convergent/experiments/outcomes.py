"""What was measured, and what is said of it: outcomes by condition, the comparisons made of them, and the claims that these decide.

A `Claim` is decided from intervals, never by hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from convergent import stats

if TYPE_CHECKING:
    import pandas as pd

CLAIMED_SIDE = "every listed difference has its 95 % interval on the claimed side of 0"
NEW_DRAW = (
    "; a margin beside a random null is held against one more draw of it (the interval over pairs and the prediction from k draws, t with k - 1 degrees of "
    "freedom, half widths added in squares), while sampled answers stand beside one draw"
)
"""For the rule of claims whose margins `Outcomes.margin` compares with random nulls; see `stats.nulls`."""
Verdict = Literal["held", "did not hold", "undecided"]


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
    paper: str = ""
    """Id of the paper's claim that it is about (report/paper_claims.yaml); empty for what the paper does not say."""
    opposes: bool = False
    """Whether it states the opposite of that claim: where it held, the paper's did not."""

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


DRAWS = "/draws/"
"""In the name of a reading of further draws: the experiment's name before it, the organism's after it."""
POINTS = {"aligned": "points of alignment", "coherent": "points of coherence"}


class Outcomes:
    """Judged answers and margins of a study, by condition name: what claims are decided from."""

    def __init__(
        self,
        aligned: Mapping[str, Any],
        margins: Mapping[str, Any],
        readings: Mapping[str, Any] | None = None,
        conditions: pd.DataFrame | None = None,
    ) -> None:
        self.readings: Mapping[str, Any] = readings or {}
        """Name of a reading -> its value; one that could not be made here is absent."""
        self._conditions = conditions
        self._aligned = aligned
        """name -> frame with columns question_id, aligned, coherent, of the answers that have both scores."""
        self._margins = margins
        """name -> frame with columns pair_id, domain, margin."""

    def has(self, *names: str) -> bool:
        """Whether all these conditions were measured."""
        return all(n in self._aligned for n in names)

    @property
    def conditions(self) -> pd.DataFrame:
        """One row per condition, as `Results.conditions`: rates, means, margins, each with its interval. For chapters."""
        assert self._conditions is not None, "claims are decided before the rows are there"
        return self._conditions

    def answers(self, name: str) -> pd.DataFrame:
        """The answers of a condition that have both scores: question_id, response, aligned, coherent and further rubrics."""
        frame: pd.DataFrame = self._aligned[name]
        return frame

    def margins_of(self, name: str) -> pd.DataFrame:
        """pair_id, domain, margin, projection of a condition."""
        frame: pd.DataFrame = self._margins[name]
        return frame

    def alignment(self, a: str, b: str, text: str, sign: int = 1, what: Literal["aligned", "coherent"] = "aligned") -> Evidence:
        """Mean alignment of condition a minus b, paired by question; `sign` -1 if it is claimed to be below 0."""
        if not self.has(a, b):
            return absent(text, POINTS[what])
        columns = _columns(self._aligned[a], self._aligned[b], what, "question_id")
        return evidence(text, stats.paired_difference(*columns), POINTS[what], sign, stats.one_sided_p(*columns, sign))

    def unchanged(
        self, a: str, b: str, text: str, margin: float, what: Literal["aligned", "coherent"] = "coherent", decides: bool = True
    ) -> Evidence:
        """Mean coherence (or alignment) of condition a is that of b within +-`margin` points: two one-sided tests at 5 %, paired by question.

        Held if the 90 % interval lies within the margin, did not hold if it lies outside it; a wide one decides nothing.
        """
        if not self.has(a, b):
            return absent(text, POINTS[what], decides)
        columns = _columns(self._aligned[a], self._aligned[b], what, "question_id")
        found = stats.equivalence(*columns, margin)
        vote: Verdict = "held" if found.equivalent else "did not hold" if found.different else "undecided"
        d = found.difference
        return Evidence(text, d.estimate, d.low, d.high, d.n, POINTS[what], vote, stats.tost_p(*columns, margin), margin, decides)

    def margin(self, a: str, b: str, text: str, sign: int = 1, domain: str | None = None) -> Evidence:
        """Mean margin of condition a minus b, paired by held-out pair; `sign` -1 if claimed to be below 0.

        Where b is a random null that was drawn several times, the interval holds against one more draw: see `stats.nulls`.
        """
        if not self.has(a, b):
            return absent(text, "nats per token")
        x, y = self._margins[a], self._margins[b]
        if domain is not None:
            x, y = x[x["domain"] == domain], y[y["domain"] == domain]
        # Pairs are the clusters: the interval is over held-out questions like these.
        of_a, of_b, pairs_a, pairs_b = _columns(x, y, "margin", "pair_id")
        further = self._further_draws(b)
        if not further:
            d, p = stats.paired_difference(of_a, of_b, pairs_a, pairs_b), stats.one_sided_p(of_a, of_b, pairs_a, pairs_b, sign)
            return evidence(text, d, "nats per token", sign, p)
        draws: list[stats.Values] = [of_b, *([draw[pair] for pair in pairs_b] for draw in further)]
        d, p = stats.draws_difference(of_a, draws, pairs_a, pairs_b), stats.draws_p(of_a, draws, pairs_a, pairs_b, sign)
        return evidence(f"{text}, against a new draw ({len(draws)} drawn)", d, "nats per token", sign, p)

    def _further_draws(self, name: str) -> list[dict[str, float]]:
        """Pair id -> margin, of each draw of a random null but the sampled one; see `experiments.draws`."""
        for reading, value in self.readings.items():
            if DRAWS in reading and name in value["margins"]:
                return [dict(zip(value["pairs"], margins, strict=True)) for margins in value["margins"][name]]
        return []


def _columns(x: Any, y: Any, values: str, clusters: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Values of two frames, then the clusters of both."""
    return x[values].to_numpy(), y[values].to_numpy(), x[clusters].to_numpy(), y[clusters].to_numpy()


def absent(text: str, unit: str, decides: bool = True) -> Evidence:
    """A comparison with a condition that this study could not have: it decides nothing, and says so."""
    nan = float("nan")
    return Evidence(f"{text}: not measured in this study", nan, nan, nan, 0, unit, "undecided", decides=decides)


def evidence(text: str, d: stats.Interval, unit: str, sign: int = 1, p: float = float("nan")) -> Evidence:
    """Evidence from the interval of a difference that is claimed to be above 0 (sign 1) or below it (-1); `p` is one-sided."""
    low, high = (d.low, d.high) if sign > 0 else (-d.high, -d.low)
    if np.isnan(low) or np.isnan(high):
        vote: Verdict = "undecided"
    else:
        vote = "held" if low > 0 else "did not hold" if high < 0 else "undecided"
    return Evidence(text, d.estimate, d.low, d.high, d.n, unit, vote, p)
