"""Power: how many questions and answers it takes to see a difference between two conditions on the same questions.

The planned test is `paired_difference` (t over per-question differences). Its variance has two parts: how much the
*difference* itself varies between questions, which only more questions reduce, and the scatter of answers within a question, which
more answers reduce too. Power by the noncentral t (scipy).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from convergent.errors import InputError
from convergent.stats.values import LEVEL, Labels, Values, counts_by_label, grouped, t_quantile

POWER = 0.8
ASSUMED_CORRELATION = 0.5
"""Correlation over questions of two conditions' means, where only one was measured: then the difference varies as much as the means do.
Between pairs of 16 released organisms: median 0.53, quartiles 0.35 and 0.67."""
MAX_QUESTIONS, MAX_ANSWERS = 400, 1000
"""Where the search for a design ends."""


@dataclass(frozen=True)
class Clustering:
    """Spread of an outcome: points of a score, nats, or rates between 0 and 1."""

    within: float
    """Standard deviation of answers to one question under one condition (root mean square of both)."""
    between: float
    """Standard deviation between questions of the *difference* of two conditions' true means."""
    source: str
    """Where the figures are from, and what was assumed."""
    questions: int = 0
    """Questions that they were measured on; 0 if assumed."""

    def error(self, questions: int, answers: int) -> float:
        """Standard error of the mean difference with so many questions and answers per question and condition."""
        return math.sqrt((self.between**2 + 2 * self.within**2 / answers) / questions)


ALIGNMENT = Clustering(18.6, 12.7, "medians of the released answers of 16 organisms and their 120 pairs, scores of GPT-4o")
"""Points of alignment. A default for plans that have measured nothing yet."""


def measured(values: Values, questions: Labels, against: tuple[Values, Labels] | None = None) -> Clustering:
    """Clustering in judged answers (or 0/1 hits) of one condition, or of two on the same questions.

    With one condition the spread of differences is unknown; it is taken from the spread of question means at ASSUMED_CORRELATION.
    Raises InputError for fewer than two questions (in common), or no question with two answers.
    """
    a = grouped(values, questions)
    if against is None:
        within, n = _within([a])
        means = np.array([np.mean(x) for x in a.values()])
        if len(a) < 2:
            raise InputError(f"power: {len(a)} question; two or more are needed to see how they differ")
        spread = max(float(means.var(ddof=1)) - within * _inverse(a, list(a)), 0.0)
        between = math.sqrt(2 * (1 - ASSUMED_CORRELATION) * spread)
        source = f"{n} answers of one condition; the spread of differences is assumed (correlation {ASSUMED_CORRELATION:g} over questions)"
        return Clustering(math.sqrt(within), between, source, len(a))
    b = grouped(*against)
    shared = sorted(a.keys() & b.keys(), key=repr)
    if len(shared) < 2:
        raise InputError(f"power: the two conditions share {len(shared)} questions; two or more are needed")
    within, n = _within([{q: side[q] for q in shared} for side in (a, b)])
    d = np.array([np.mean(a[q]) - np.mean(b[q]) for q in shared])
    spread = max(float(d.var(ddof=1)) - within * (_inverse(a, shared) + _inverse(b, shared)), 0.0)
    return Clustering(math.sqrt(within), math.sqrt(spread), f"{n} answers of two conditions", len(shared))


def of_rate(rate: float, icc: float, difference: float, source: str = "assumed") -> Clustering:
    """Clustering of hits at a rate that changes by `difference`, with correlation `icc` within questions.

    `rate` is the first condition's, the second's is rate + difference. Raises InputError if one is outside 0..1.
    """
    other = rate + difference
    if not (0 <= rate <= 1 and 0 <= other <= 1):
        raise InputError(f"power: rates {rate:g} and {other:g}; both must lie within 0 to 1")
    variance = (rate * (1 - rate) + other * (1 - other)) / 2
    return Clustering(math.sqrt(variance * (1 - icc)), math.sqrt(2 * (1 - ASSUMED_CORRELATION) * icc * variance), source)


def intraclass(hits: Values, questions: Labels) -> float:
    """Correlation of hits within a question, by analysis of variance, at least 0; nan without hits or misses."""
    cells = np.array(list(counts_by_label(hits, questions).values()), dtype=float).reshape(-1, 2)
    k, n = cells[:, 0], cells[:, 1]
    total, g = n.sum(), len(n)
    if g < 2 or total <= g or k.sum() in (0, total):
        return math.nan
    p = k.sum() / total
    between = float((n * (k / n - p) ** 2).sum() / (g - 1))
    within = float((k * (1 - k / n)).sum() / (total - g))
    size = (total - (n**2).sum() / total) / (g - 1)
    return float(max((between - within) / (between + (size - 1) * within), 0.0))


def power(clustering: Clustering, difference: float, questions: int, answers: int, level: float = LEVEL) -> float:
    """Chance that the `level` interval of the paired difference lies on the right side of 0, if the true one is `difference`."""
    from scipy.stats import nct

    _check(difference)
    if questions < 2 or answers < 1:
        return 0.0
    error = clustering.error(questions, answers)
    if error == 0:
        return 1.0
    # Not statsmodels' TTestPower: it gives nan for effects that are seen almost surely, from the tail that hardly matters.
    return float(nct.sf(t_quantile(questions - 1, level), questions - 1, min(abs(difference) / error, 1e3)))


@lru_cache(maxsize=4096)
def _needed(questions: int, target: float, level: float) -> float:
    """Difference over its standard error that is seen with power `target`."""
    from scipy.optimize import brentq
    from scipy.stats import nct

    limit = t_quantile(questions - 1, level)
    return float(brentq(lambda x: nct.sf(limit, questions - 1, x) - target, 0, 1e3))


def detectable(clustering: Clustering, questions: int, answers: int, target: float = POWER, level: float = LEVEL) -> float:
    """Smallest difference that is seen with power `target`; inf below two questions."""
    return _needed(questions, target, level) * clustering.error(questions, answers) if questions > 1 else math.inf


@dataclass(frozen=True)
class Design:
    """So many questions, and answers per question and condition."""

    questions: int
    answers: int
    power: float

    @property
    def total(self) -> int:
        """Answers of both conditions."""
        return 2 * self.questions * self.answers


def answers_needed(clustering: Clustering, difference: float, questions: int, target: float = POWER, level: float = LEVEL) -> Design | None:
    """Fewest answers per question that reach `target` with so many questions; None if not even MAX_ANSWERS do: more questions are needed."""
    _check(difference)
    if questions < 2:
        return None
    # The paired difference of a question may have this variance; what its own spread leaves is for the scatter of answers.
    left = questions * (difference / _needed(questions, target, level)) ** 2 - clustering.between**2
    if left <= 0 or 2 * clustering.within**2 > MAX_ANSWERS * left:
        return None
    answers = max(math.ceil(2 * clustering.within**2 / left - 1e-9), 1)
    return Design(questions, answers, power(clustering, difference, questions, answers, level))


def smallest_design(clustering: Clustering, difference: float, target: float = POWER, level: float = LEVEL) -> Design | None:
    """Design with the fewest answers in total (then the fewest questions) that reaches `target`; None beyond MAX_QUESTIONS and MAX_ANSWERS."""
    best: Design | None = None
    for questions in range(3, MAX_QUESTIONS + 1):
        if best is not None and 2 * questions >= best.total:  # one answer each would cost as much
            break
        found = answers_needed(clustering, difference, questions, target, level)
        if found is not None and (best is None or found.total < best.total):
            best = found
    return best


def power_table(
    clustering: Clustering, difference: float, questions: Sequence[int] = (4, 8, 16, 32, 64), answers: Sequence[int] = (4, 8, 16, 32, 64, 128),
    level: float = LEVEL,
) -> list[dict[str, Any]]:  # fmt: skip
    """One dict per design: questions, answers (per question and condition), total, power."""
    return [
        {"questions": g, "answers": m, "total": 2 * g * m, "power": power(clustering, difference, g, m, level)} for g in questions for m in answers
    ]


def underpowered(
    questions: int, answers: int, difference: float, clustering: Clustering = ALIGNMENT, target: float = POWER, level: float = LEVEL, unit: str = "points"
) -> str | None:
    """A plan's warning in one sentence, or None if the design has power `target` for `difference`.

    questions: asked of both conditions; answers: per question and condition (samples times paraphrases).
    """
    have = power(clustering, difference, questions, answers, level)
    if have >= target:
        return None
    seen = detectable(clustering, questions, answers, target, level)
    least = answers_needed(clustering, difference, questions, target, level)
    if least is not None:
        mend = f"take {least.answers} answers per question"
    else:
        design = smallest_design(clustering, difference, target, level)
        each = "one answer" if design and design.answers == 1 else f"{design.answers} answers" if design else ""
        mend = f"take {design.questions} questions with {each} each" if design else "no design of reasonable size sees it"
    return (
        f"under-powered: {questions} questions x {answers} answers see a difference of {difference:g} {unit} with power {have:.2f} "
        f"(80 % from {seen:.3g} {unit} on); {mend}"
    ).replace("80 %", f"{100 * target:.0f} %")


def _check(difference: float) -> None:
    if not math.isfinite(difference) or difference == 0:
        raise InputError(f"power: a difference of {difference:g} cannot be looked for; name one that is not 0")


def _within(sides: Sequence[dict[Any, list[float]]]) -> tuple[float, int]:
    """Pooled variance of answers within question and condition, and the number of answers."""
    cells = [np.array(x) for side in sides for x in side.values()]
    n, df = sum(map(len, cells)), sum(len(x) - 1 for x in cells)
    if df < 1:
        raise InputError("power: no question has two answers; how answers to one question differ cannot be seen")
    return sum(float(((x - x.mean()) ** 2).sum()) for x in cells) / df, n


def _inverse(side: dict[Any, list[float]], names: Sequence[Any]) -> float:
    """Mean of 1 / answers over questions."""
    return float(np.mean([1 / len(side[q]) for q in names]))
