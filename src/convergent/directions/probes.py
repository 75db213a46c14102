"""Probes on numbers per token: do they tell two classes of answers apart, and what does that rest on?

As published (paper section 4.1): L1 logistic regression (liblinear, C = 0.01) on z-scored values of answer tokens, classes balanced by
undersampling, 80/20 split by token, many repeats. Tokens of one answer are alike, and so are answers to one question, so the same probe is
also tested on answers and on questions that it has not seen, and beside a probe that knows the question and nothing else. Repeats show the
spread of the split, not of other data; intervals are over questions, each left out in turn.

Every function takes `root`, the name that its random draws are seeded by.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from convergent.core.ids import seed
from convergent.stats import LEVEL, Interval, clustered_mean, jackknife

C = 0.01
"""As published: strong, for some ten thousand tokens."""
TOKENS = 8122
"""Tokens per class of the published probe."""
C_ANSWERS = 1.0
"""For means over answers: there are a hundred times fewer rows, and at 0.01 no coefficient is left."""
TEST = 0.2
FOLDS = 5
SMALLEST = 10
"""Tokens per class that a probe needs."""
LOG_SIGNIFICANCE = 0.5
"""Natural logarithm, as published."""

Root: TypeAlias = tuple[str | int, ...]
Array: TypeAlias = NDArray[np.float64]
Rows: TypeAlias = NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class Tokens:
    """The answer tokens of one class."""

    name: str
    adapters: tuple[str, ...]
    """ "L15", ...: the layer of each column; with its module where a layer has two."""
    values: np.ndarray
    """(n_tokens, n_adapters), float64."""
    response: np.ndarray
    """(n_tokens,) number of the response that the token stands in."""
    question: np.ndarray
    """(n_tokens,) text or name of its question."""
    significance: np.ndarray | None
    """(n_tokens,) norm of the gradient share of the answer's KL; None if it is not known."""
    note: str = ""

    def where(self, keep: np.ndarray) -> Tokens:
        """Some of the tokens; `keep` (n_tokens,) is true for them."""
        weights = None if self.significance is None else self.significance[keep]
        return replace(self, values=self.values[keep], response=self.response[keep], question=self.question[keep], significance=weights)


@dataclass(frozen=True, eq=False)
class Task:
    """Two classes of tokens side by side."""

    x: Array
    """(n_tokens, n_features)."""
    y: NDArray[np.intp]
    """(n_tokens,) 0 or 1."""
    response: NDArray[np.intp]
    """(n_tokens,) number of the answer; no answer is in both classes."""
    question: NDArray[np.intp]
    """(n_tokens,) number of the question."""

    @property
    def c(self) -> float:
        """C at which each token is weighed against the penalty as in the published probe: with fewer tokens, 0.01 leaves no coefficient."""
        return C * TOKENS / max(self.per_class, 1)

    @property
    def per_class(self) -> int:
        """Tokens of each class once they are balanced."""
        return int(np.bincount(self.y, minlength=2).min())

    def balanced(self, root: Root, repeat: int) -> Rows:
        """Rows of both classes in equal number, in random order."""
        rng = np.random.default_rng(_state(*root, "balance", repeat))
        n = self.per_class
        return rng.permutation(np.concatenate([rng.choice(np.flatnonzero(self.y == c), n, replace=False) for c in (0, 1)]))

    def answer_means(self) -> Task:
        """One row per answer."""
        answers, first = np.unique(self.response, return_index=True)
        means = np.array([self.x[self.response == r].mean(axis=0) for r in answers])
        return Task(means, self.y[first], self.response[first], self.question[first])


class Fit(NamedTuple):
    """A probe on one random split by token."""

    accuracy: float
    auc: float
    coefficients: Array
    """(n_features,) on z-scored features."""


def task(a: Tokens, b: Tokens) -> Task:
    """Class `a` as 0 and class `b` as 1."""
    question = np.unique(np.concatenate([a.question, b.question]).astype(str), return_inverse=True)[1]
    response = np.concatenate([a.response, b.response + (a.response.max() + 1 if len(a.response) else 0)])
    y = np.repeat([0, 1], [len(a.values), len(b.values)])
    return Task(np.concatenate([a.values, b.values]), y, response, question.astype(np.intp))


def by_token(t: Task, repeats: int, root: Root, c: float = C) -> list[Fit]:
    """The published probe, once per repeat: a balanced draw, split 80/20 by token."""
    return [_split_by_token(z_scored(t.x[rows]), t.y[rows], root, i, c) for i in range(repeats) for rows in [t.balanced(root, i)]]


def by_group(t: Task, groups: np.ndarray, repeats: int, root: Root, c: float = C) -> list[float]:
    """AUC on each fold of whole groups that the probe has not seen; groups (n_tokens,). Folds of one class are left out."""
    return [v for i in range(repeats) for rows in [t.balanced(root, i)] for v in folds(z_scored(t.x[rows]), t.y[rows], groups[rows], root, i, c)]


def question_only(t: Task, repeats: int, root: Root, c: float = C) -> list[float]:
    """AUC, split by token, of a probe that knows the question alone: what can be reached without any feature."""
    known = replace(t, x=np.eye(int(t.question.max()) + 1)[t.question])
    return [f.auc for f in by_token(known, repeats, root, c)]


def by_question(t: Task, root: Root, c: float = C) -> dict[int, float]:
    """Question -> AUC among its tokens, of a probe fitted on all the other questions. Questions that lack a class are left out.

    Within one question its identity cannot help; the mean over questions has a plain interval.
    """
    found = {}
    x = z_scored(t.x)
    for q in np.unique(t.question):
        test = np.flatnonzero(t.question == q)
        train = _coupled(t, np.flatnonzero(t.question != q), root)
        if len(set(t.y[test].tolist())) == 2 and len(train):
            model = _fit(x[train], t.y[train], c, _state(*root, "question", int(q)))
            found[int(q)] = auc(t.y[test], model.decision_function(x[test]))
    return found


def alone(t: Task, feature: int) -> dict[int, float]:
    """Question -> AUC of one feature among its tokens, without any fit; questions that lack a class are left out."""
    found = {}
    for q in np.unique(t.question):
        rows = t.question == q
        if len(set(t.y[rows].tolist())) == 2:
            found[int(q)] = auc(t.y[rows], t.x[rows, feature])
    return found


def over_questions(values: dict[int, float]) -> Interval:
    """Mean over questions of one value each, such as an AUC, with its interval over questions like these."""
    return clustered_mean(list(values.values()), list(values), bounds=(0.0, 1.0))


def coefficients(t: Task, root: Root, c: float = C, level: float = LEVEL) -> list[Interval | str]:
    """Coefficient of each z-scored feature in a probe on all tokens, with its interval over questions (delete-one jackknife), or why it has none.

    Which tokens of the larger class are left out is decided token by token once, so that leaving out a question changes nothing else.
    """
    made: dict[bytes, Array] = {}

    def weights(rows: Rows) -> Array:
        if rows.tobytes() not in made:
            kept = _coupled(t, rows, root)
            made[rows.tobytes()] = np.full(t.x.shape[1], np.nan)
            if len(kept):
                made[rows.tobytes()] = _fit(z_scored(t.x[kept]), t.y[kept], c, _state(*root, "coefficients")).coef_[0]
        return made[rows.tobytes()]

    def one(feature: int, rows: Rows) -> float | str:
        value = float(weights(rows)[feature])
        return value if np.isfinite(value) else "a class is empty"

    return [jackknife(partial(one, k), t.question.tolist(), -np.inf, np.inf, level) for k in range(t.x.shape[1])]


def _coupled(t: Task, rows: Rows, root: Root) -> Rows:
    """Some rows, balanced: of each class those that come first in one random order of all tokens; none if a class is empty."""
    order = np.random.default_rng(_state(*root, "order")).permutation(len(t.y))
    place = np.empty(len(order), dtype=np.intp)
    place[order] = np.arange(len(order))
    n = int(np.bincount(t.y[rows], minlength=2).min())
    return np.sort(np.concatenate([own[np.argsort(place[own])[:n]] for c in (0, 1) for own in [rows[t.y[rows] == c]]]))


def folds(x: Array, y: np.ndarray, groups: np.ndarray, root: Root, repeat: int, c: float) -> list[float]:
    """AUC on each fold of whole groups, where the fold and the rest hold both classes; none where a class has one group only."""
    from sklearn.model_selection import StratifiedGroupKFold

    # Folds need as many groups as there are, in the class that has fewest.
    n = min(FOLDS, *(len(np.unique(groups[y == k])) for k in (0, 1)))
    if n < 2:
        return []
    state = _state(*root, "folds", repeat)
    values = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        parts = list(StratifiedGroupKFold(n, shuffle=True, random_state=state).split(x, y, groups))
    for train, test in parts:
        if len(set(y[train])) == 2 and len(set(y[test])) == 2:
            values.append(auc(y[test], _fit(x[train], y[train], c, state).decision_function(x[test])))
    return values


def z_scored(x: Array) -> Array:
    """Columns at mean 0 and standard deviation 1, over all rows (as published); a constant one becomes 0."""
    spread = x.std(axis=0, ddof=1)
    scaled: Array = (x - x.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    return scaled


def auc(y: np.ndarray, score: Sequence[float] | np.ndarray) -> float:
    """Probability that a row of class 1 has the higher score, ties counting half."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(y, score))


def _state(*name: str | int) -> int:
    return seed(*name) % 2**32


def _fit(x: Array, y: np.ndarray, c: float, random_state: int) -> Any:
    from sklearn.linear_model import LogisticRegression

    # From 1.8 on `l1_ratio` says what `penalty` said before, and the old default of `l1_ratio` contradicts the old name.
    l1 = {"penalty": "l1"} if getattr(LogisticRegression(), "penalty", "deprecated") != "deprecated" else {"l1_ratio": 1.0}
    return LogisticRegression(**l1, solver="liblinear", C=c, max_iter=1000, random_state=random_state).fit(x, y)


def _split_by_token(x: Array, y: np.ndarray, root: Root, repeat: int, c: float) -> Fit:
    from sklearn.model_selection import train_test_split

    state = _state(*root, "split", repeat)
    train, test = train_test_split(np.arange(len(y)), test_size=TEST, stratify=y, random_state=state)
    model = _fit(x[train], y[train], c, state)
    return Fit(float(model.score(x[test], y[test])), auc(y[test], model.decision_function(x[test])), model.coef_[0])
