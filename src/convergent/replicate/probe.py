"""Probes on LoRA scalars: can a token's scalars tell two classes of answers apart?

As published: L1 logistic regression (liblinear, C = 0.01) on z-scored scalars of answer tokens, classes balanced by undersampling,
80/20 split by token, many repeats. Tokens of one answer are alike, and so are answers to one question, so the same probe is also
tested on answers and on questions that it has not seen, and beside a probe that knows the question and nothing else. There is no
interval: repeats show the spread of the split, not of other data.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import numpy as np

from convergent.core.ids import seed
from convergent.replicate.claims import Claim, Only, counted, not_found
from convergent.replicate.folder import Folder
from convergent.replicate.scalars import Tokens, class_names, classes

SOURCE = "section 4.1, table 1"
COEFFICIENTS = "section 4.2, figure 6"
C = 0.01
"""As published: strong, for some ten thousand tokens."""
C_ANSWERS = 1.0
"""For means over answers: there are a hundred times fewer rows, and at 0.01 no coefficient is left."""
TEST = 0.2
FOLDS = 5
REPEATS = 20
LOG_SIGNIFICANCE = 0.5
"""Natural logarithm."""
SMALLEST = 10
"""Tokens per class that a probe needs."""
CLAIMS = {
    "accuracy": "accuracy, split by token (as published)",
    "auc": "AUC, split by token (as published)",
    "auc_by_response": "AUC on answers that the probe has not seen",
    "auc_by_question": "AUC on questions that the probe has not seen",
    "auc_question_only": "AUC of a probe that knows the question alone, split by token",
    "auc_response_means_by_question": "AUC of a probe on answer means, on questions that it has not seen",
}


def probes(folder: Folder, only: Only, repeats: int = REPEATS) -> Iterator[Claim]:
    """`probe/<class0>_vs_<class1>/...` for every pair of classes, and `/significant/...` on significant tokens alone."""
    names = class_names(folder)
    claim = "probe on LoRA scalars"
    if len(names) < 2:
        yield not_found("probe", claim, SOURCE, "two classes of scalars/*.pt")
        return
    if not any(only.may_want(f"probe/{a}_vs_{b}/") for a, b in combinations(names, 2)):
        return
    try:
        import sklearn  # noqa: F401
    except ImportError:
        yield not_found("probe", claim, SOURCE, "scikit-learn; pip install 'convergent[replicate]'")
        return
    found, lost = classes(folder)
    for name, what in lost:
        yield not_found(f"probe/{name}", claim, SOURCE, what)
    for a, b in combinations(found.values(), 2):
        stem = f"probe/{a.name}_vs_{b.name}"
        if not only.may_want(f"{stem}/"):
            continue
        if a.adapters != b.adapters:
            yield not_found(stem, claim, SOURCE, f"the same adapters in both classes; {', '.join(a.adapters)} against {', '.join(b.adapters)}")
            continue
        yield from _variant(stem, a, b, only, repeats)
        if a.significance is None or b.significance is None:
            which = a.name if a.significance is None else b.name
            yield not_found(f"{stem}/significant", f"{claim}, significant tokens", COEFFICIENTS, f"column `answer_kl_div_gradients` for {which}")
        else:
            yield from _variant(f"{stem}/significant", _significant(a), _significant(b), only, repeats)


def _significant(tokens: Tokens) -> Tokens:
    assert tokens.significance is not None
    with np.errstate(divide="ignore", invalid="ignore"):
        keep = np.log(tokens.significance) >= LOG_SIGNIFICANCE
    return Tokens(tokens.name, tokens.adapters, tokens.values[keep], tokens.response[keep], tokens.question[keep], tokens.significance[keep], tokens.note)


def _variant(stem: str, a: Tokens, b: Tokens, only: Only, repeats: int) -> Iterator[Claim]:
    """All claims on one set of tokens; only those that are asked for are computed."""
    per_class = min(len(a.values), len(b.values))
    coefficients = [f"coef_{adapter}" for adapter in a.adapters]
    wanted = {name for name in (*CLAIMS, *coefficients) if only.wants(f"{stem}/{name}")}
    if not wanted:
        return
    if per_class < SMALLEST:
        yield not_found(stem, "probe on LoRA scalars", SOURCE, f"{SMALLEST} answer tokens of each class; the smaller has {per_class}")
        return
    x, y = np.concatenate([a.values, b.values]), np.repeat([0, 1], [len(a.values), len(b.values)])
    question = np.unique(np.concatenate([a.question, b.question]).astype(str), return_inverse=True)[1]
    answer = np.concatenate([a.response, b.response + a.response.max() + 1])
    named = f"{a.name} (0, {len(a.values)} tokens) against {b.name} (1, {len(b.values)}), balanced to {per_class} each"

    draws = [_balanced(y, stem, i) for i in range(repeats)]
    if wanted & {"accuracy", "auc", *coefficients}:
        fits = [_split_by_token(_z(x[rows]), y[rows], stem, i) for i, rows in enumerate(draws)]
        if empty := sum(not f[2].any() for f in fits):
            named += f"; {empty} of {repeats} fits keep no coefficient: too few tokens for C = {C:g}"
        for name, values in (("accuracy", [f[0] for f in fits]), ("auc", [f[1] for f in fits])):
            if name in wanted:
                yield _mean(f"{stem}/{name}", CLAIMS[name], SOURCE, values, per_class, named)
        weights = np.array([f[2] for f in fits])
        for column, name in enumerate(coefficients):
            if name in wanted:
                claim = f"coefficient of the z-scored scalar at {name.removeprefix('coef_')}; above 0 speaks for {b.name}"
                yield _mean(f"{stem}/{name}", claim, COEFFICIENTS, weights[:, column].tolist(), per_class, "")
    few = max(1, repeats // FOLDS)
    for name, groups in (("auc_by_response", answer), ("auc_by_question", question)):
        if name in wanted:
            values = [v for i, rows in enumerate(draws[:few]) for v in _folds(_z(x[rows]), y[rows], groups[rows], stem, i, C)]
            yield _grouped(f"{stem}/{name}", name, values, per_class, len(np.unique(groups)), few)
    if "auc_question_only" in wanted:
        known = np.eye(question.max() + 1)[question]
        values = [_split_by_token(_z(known[rows]), y[rows], stem, i)[1] for i, rows in enumerate(draws[: max(few, 5)])]
        note = f"{question.max() + 1} questions; what an AUC by token can reach without any scalar"
        yield _mean(f"{stem}/auc_question_only", CLAIMS["auc_question_only"], SOURCE, values, per_class, note)
    if "auc_response_means_by_question" in wanted:
        answers, first = np.unique(answer, return_index=True)
        means = _z(np.array([x[answer == r].mean(axis=0) for r in answers]))
        values = [v for i in range(few) for v in _folds(means, y[first], question[first], stem, i, C_ANSWERS)]
        name = "auc_response_means_by_question"
        yield _grouped(f"{stem}/{name}", name, values, len(answers), len(np.unique(question)), few, f"{len(answers)} answers, C = {C_ANSWERS:g}")


def _mean(id_: str, claim: str, source: str, values: list[float], n: int, note: str) -> Claim:
    spread = f"mean of {len(values)} repeats, standard deviation {np.std(values):.3f}"
    return counted(id_, claim, source, float(np.mean(values)), n, note="; ".join(t for t in (spread, note) if t))


def _grouped(id_: str, name: str, values: list[float], n: int, groups: int, repeats: int, note: str = "") -> Claim:
    if not values:
        what = f"two {'answers' if name == 'auc_by_response' else 'questions'} of each class, so that one can be held out"
        return not_found(id_, CLAIMS[name], SOURCE, what)
    text = f"mean of {len(values)} folds over {groups} groups ({repeats} x {FOLDS}-fold; folds of one class left out), standard deviation {np.std(values):.3f}"
    return counted(id_, CLAIMS[name], SOURCE, float(np.mean(values)), n, note="; ".join(t for t in (text, note) if t))


def _random_state(*name: str | int) -> int:
    return seed("replicate", "probe", *name) % 2**32


def _balanced(y: np.ndarray, stem: str, repeat: int) -> np.ndarray:
    """Rows of both classes in equal number, in random order."""
    rng = np.random.default_rng(_random_state(stem, "balance", repeat))
    n = int(np.bincount(y).min())
    return rng.permutation(np.concatenate([rng.choice(np.flatnonzero(y == c), n, replace=False) for c in (0, 1)]))


def _z(x: np.ndarray) -> np.ndarray:
    """Columns at mean 0 and standard deviation 1, over all rows (as published); a constant one becomes 0."""
    spread = x.std(axis=0, ddof=1)
    scaled: np.ndarray = (x - x.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    return scaled


def _fit(x: np.ndarray, y: np.ndarray, c: float, random_state: int) -> Any:
    from sklearn.linear_model import LogisticRegression

    # From 1.8 on `l1_ratio` says what `penalty` said before, and the old default of `l1_ratio` contradicts the old name.
    l1 = {"penalty": "l1"} if getattr(LogisticRegression(), "penalty", "deprecated") != "deprecated" else {"l1_ratio": 1.0}
    return LogisticRegression(**l1, solver="liblinear", C=c, max_iter=1000, random_state=random_state).fit(x, y)


def _auc(y: np.ndarray, score: np.ndarray) -> float:
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(y, score))


def _split_by_token(x: np.ndarray, y: np.ndarray, stem: str, repeat: int) -> tuple[float, float, np.ndarray]:
    """Accuracy, AUC and coefficients (n_features,) on one random 80/20 split."""
    from sklearn.model_selection import train_test_split

    state = _random_state(stem, "split", repeat)
    train, test = train_test_split(np.arange(len(y)), test_size=TEST, stratify=y, random_state=state)
    model = _fit(x[train], y[train], C, state)
    return float(model.score(x[test], y[test])), _auc(y[test], model.decision_function(x[test])), model.coef_[0]


def _folds(x: np.ndarray, y: np.ndarray, groups: np.ndarray, stem: str, repeat: int, c: float) -> list[float]:
    """AUC on each fold of whole groups, where the fold and the rest hold both classes."""
    from sklearn.model_selection import StratifiedGroupKFold

    # Folds need as many groups as there are, in the class that has fewest.
    folds = min(FOLDS, *(len(np.unique(groups[y == k])) for k in (0, 1)))
    if folds < 2:
        return []
    state = _random_state(stem, "folds", repeat)
    values = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        parts = list(StratifiedGroupKFold(folds, shuffle=True, random_state=state).split(x, y, groups))
    for train, test in parts:
        if len(set(y[train])) == 2 and len(set(y[test])) == 2:
            values.append(_auc(y[test], _fit(x[train], y[train], c, state).decision_function(x[test])))
    return values
