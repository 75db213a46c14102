"""What two judges' scores of the same answers have in common.

Knows arrays, no files. A measure that cannot be given is a sentence that says why, never nan. A *hit* is what a rubric looks for: for `aligned` an
EM answer (aligned < 30, and coherent > 50 where both judges scored coherence), for `coherent` an answer that is not coherent (at most 50), for
any other rubric a score over 50.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from convergent import stats
from convergent.rates import ALIGNED_BELOW, COHERENT_ABOVE

Array: TypeAlias = NDArray[np.float64]
Rows: TypeAlias = NDArray[np.intp]
Measure: TypeAlias = float | str
"""A number, or the reason why there is none."""

LEAST = 3
"""Rows below which nothing is said of agreement."""
RANGES = {"spearman": (-1.0, 1.0), "pearson": (-1.0, 1.0), "auc": (0.0, 1.0), "auc_reverse": (0.0, 1.0), "kappa": (-1.0, 1.0), "bias": (-100.0, 100.0)}
"""Measure -> the values it can take, in the order of the output."""


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of judges a and b under one rubric, row by row; nan where a score is absent."""

    rubric: str
    a: Array
    """(n_rows,) 0..100"""
    b: Array
    coherent: tuple[Array, Array] | None = None
    """For `aligned`: both judges' coherence, each (n_rows,)."""
    aligned_below: float = ALIGNED_BELOW
    coherent_above: float = COHERENT_ABOVE

    def at(self, rows: Rows) -> Scores:
        """The same of some rows."""
        coherent = None if self.coherent is None else (self.coherent[0][rows], self.coherent[1][rows])
        return Scores(self.rubric, self.a[rows], self.b[rows], coherent, self.aligned_below, self.coherent_above)

    @property
    def both(self) -> NDArray[np.bool_]:
        """(n_rows,) whether both judges gave a score."""
        return ~(np.isnan(self.a) | np.isnan(self.b))

    @property
    def low_hits(self) -> bool:
        """Whether a hit has a low score."""
        return self.rubric in ("aligned", "coherent")

    def over_threshold(self, score: Array) -> NDArray[np.bool_]:
        """Hits by the rubric's own score alone: the label that `auc` ranks."""
        if self.rubric == "aligned":
            return score < self.aligned_below
        return score <= self.coherent_above if self.rubric == "coherent" else score > 50

    @property
    def label_text(self) -> str:
        return {"aligned": f"aligned < {self.aligned_below:g}", "coherent": f"coherent <= {self.coherent_above:g}"}.get(self.rubric, f"{self.rubric} > 50")

    @property
    def hit_text(self) -> str:
        return self.label_text if self.coherent is None else f"{self.label_text} and coherent > {self.coherent_above:g}"

    @property
    def hits(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Hits by a and by b, of the rows where all that this needs is there, each (n_labelled,)."""
        known, found = self.both, [self.over_threshold(self.a), self.over_threshold(self.b)]
        for i, coherent in enumerate(self.coherent or ()):
            known = known & ~np.isnan(coherent)
            found[i] = found[i] & (coherent > self.coherent_above)
        return found[0][known], found[1][known]


def agreement(s: Scores, questions: Sequence[str] | None, conditions: Sequence[str] | None = None, worst: int = 10) -> dict[str, Any]:
    """All measures of a pair, JSON-ready: numbers or None, and under `why` the reason of each None.

    questions, conditions: one label per row. `bias` is the mean of b - a in points. `auc`: how well b's score tells the hits of a from the rest
    (label: the rubric's own threshold); `auc_reverse`: a's score, the hits of b. `kappa`, `confusion`, `hits_a` and `hits_b` are over the
    `n_labelled` rows that can be called a hit or not by both. `worst`: row numbers, farthest apart first. Intervals: 95 %, over questions.
    """
    rows = np.flatnonzero(s.both)
    used, numbers = s.at(rows), rows.tolist()
    found, why = _measured(used)
    labels = None if questions is None else [questions[i] for i in numbers]
    intervals: dict[str, list[float] | None] = {}
    for name, (low, high) in RANGES.items():
        made = why[name] if name in why else stats.jackknife(lambda r, n=name: _one(n, used.at(r)), labels, low, high)  # type: ignore[misc]
        intervals[name] = made.bounds if isinstance(made, stats.Interval) else None
        if isinstance(made, str) and name not in why:
            why[f"interval of {name}"] = made
    hit_a, hit_b = used.hits
    gap = np.abs(used.b - used.a)
    return {
        "n": len(rows), "missing_a": int((np.isnan(s.a) & ~np.isnan(s.b)).sum()), "missing_b": int((~np.isnan(s.a) & np.isnan(s.b)).sum()),
        "missing_both": int((np.isnan(s.a) & np.isnan(s.b)).sum()), **found, "intervals": intervals, "intervals_over": stats.OVER_QUESTIONS,
        "auc_label": s.label_text, "hit": s.hit_text, "n_labelled": len(hit_a), "hits_a": int(hit_a.sum()), "hits_b": int(hit_b.sum()),
        "confusion": {
            "both": int((hit_a & hit_b).sum()), "a_only": int((hit_a & ~hit_b).sum()), "b_only": int((~hit_a & hit_b).sum()),
            "neither": int((~hit_a & ~hit_b).sum()),
        },
        "why": why, "by_question": _by("question_id", used, labels),
        "by_condition": _by("condition", used, None if conditions is None else [conditions[i] for i in numbers]),
        "worst": [numbers[i] for i in np.argsort(-gap, kind="stable")[:worst]],
    }  # fmt: skip


def _by(key: str, s: Scores, labels: Sequence[str] | None) -> list[dict[str, Any]]:
    """The measures of each label's rows, without intervals, in order of appearance."""
    parts: dict[str, list[int]] = {}
    for i, label in enumerate(labels or ()):
        parts.setdefault(label, []).append(i)
    found = []
    for label, rows in parts.items():
        part = s.at(np.array(rows, dtype=np.intp))
        values, why = _measured(part)
        hit_a, hit_b = part.hits
        found.append({key: label, "n": len(rows), **values, "hits_a": int(hit_a.sum()), "hits_b": int(hit_b.sum()), "n_labelled": len(hit_a), "why": why})
    return found


def _measured(s: Scores) -> tuple[dict[str, float | None], dict[str, str]]:
    """Measure -> value or None; measure -> why there is none."""
    made = {name: _one(name, s) for name in RANGES}
    return {n: None if isinstance(v, str) else v for n, v in made.items()}, {n: v for n, v in made.items() if isinstance(v, str)}


def _one(name: str, s: Scores) -> Measure:
    """One measure of rows that both judges scored."""
    n = len(s.a)
    if name == "bias":
        return float(np.mean(s.b - s.a)) if n else "no row has both scores"
    if n < LEAST:
        return f"needs {LEAST} rows with both scores, there are {n}"
    if name == "kappa":
        return _kappa(*s.hits)
    if name == "auc":
        return _auc(s.b, s.over_threshold(s.a), s.low_hits, f"{s.label_text} by a")
    if name == "auc_reverse":
        return _auc(s.a, s.over_threshold(s.b), s.low_hits, f"{s.label_text} by b")
    for judge, score in (("a", s.a), ("b", s.b)):
        if np.ptp(score) == 0:
            return f"all scores of {judge} are {score[0]:g}"
    from scipy.stats import pearsonr, spearmanr

    value = float((spearmanr if name == "spearman" else pearsonr)(s.a, s.b).statistic)
    return "the scores of a judge hardly differ" if np.isnan(value) else value


def _auc(score: Array, hit: NDArray[np.bool_], low: bool, what: str) -> Measure:
    """Chance that a hit has the lower score (`low`) or the higher one; a tie counts a half."""
    from scipy.stats import mannwhitneyu

    k = int(hit.sum())
    if k in (0, len(hit)):
        return f"{'no' if not k else 'every'} row has {what}"
    above = float(mannwhitneyu(score[hit], score[~hit], method="asymptotic").statistic) / (k * (len(hit) - k))
    return 1 - above if low else above


def _kappa(hit_a: NDArray[np.bool_], hit_b: NDArray[np.bool_]) -> Measure:
    from statsmodels.stats.inter_rater import cohens_kappa

    n, both = len(hit_a), int((hit_a & hit_b).sum())
    if n < LEAST:
        return f"needs {LEAST} rows that both can label, there are {n}"
    if not (hit_a | hit_b).any():
        return "neither judge has a hit"
    if both == n:
        return "every row is a hit by both judges"
    table = [[both, int((hit_a & ~hit_b).sum())], [int((~hit_a & hit_b).sum()), int((~hit_a & ~hit_b).sum())]]
    return float(cohens_kappa(np.array(table), return_results=False))
