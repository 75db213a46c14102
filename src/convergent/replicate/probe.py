"""Probes on LoRA scalars: can a token's scalars tell two classes of answers apart?

As published: L1 logistic regression (liblinear, C = 0.01) on z-scored scalars of answer tokens, classes balanced by undersampling,
80/20 split by token, many repeats. Tokens of one answer are alike, and so are answers to one question, so the same probe is also
tested on answers and on questions that it has not seen, and beside a probe that knows the question and nothing else. There is no
interval: repeats show the spread of the split, not of other data.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import numpy as np

from convergent.directions.probes import (
    C_ANSWERS,
    FOLDS,
    LOG_SIGNIFICANCE,
    SMALLEST,
    C,
    Tokens,
    by_group,
    by_token,
    folds,
    question_only,
    task,
    z_scored,
)
from convergent.replicate.claims import Claim, Only, counted, not_found
from convergent.replicate.folder import Folder
from convergent.replicate.scalars import class_names, classes

SOURCE = "section 4.1, table 1"
COEFFICIENTS = "section 4.2, figure 6"
REPEATS = 20
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
    found, lost, _ = classes(folder)
    for first, second in combinations(names, 2):
        stem = f"probe/{first}_vs_{second}"
        if not only.may_want(f"{stem}/"):
            continue
        if first in lost or second in lost:
            yield not_found(stem, claim, SOURCE, "; ".join(lost[name] for name in (first, second) if name in lost))
            continue
        a, b = found[first], found[second]
        if a.adapters != b.adapters:
            yield not_found(stem, claim, SOURCE, f"the same adapters in both classes; {', '.join(a.adapters)} against {', '.join(b.adapters)}")
            continue
        yield from _variant(stem, a, b, only, repeats)
        if a.significance is None or b.significance is None:
            without = a if a.significance is None else b
            why = f"column `answer_kl_div_gradients` for {without.name}" + (f" ({without.note})" if without.note else "")
            yield not_found(f"{stem}/significant", f"{claim}, significant tokens", COEFFICIENTS, why)
        else:
            yield from _variant(f"{stem}/significant", _significant(a), _significant(b), only, repeats)


def _significant(tokens: Tokens) -> Tokens:
    assert tokens.significance is not None
    with np.errstate(divide="ignore", invalid="ignore"):
        keep = np.log(tokens.significance) >= LOG_SIGNIFICANCE
    return tokens.where(keep)


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
    both, root = task(a, b), ("replicate", "probe", stem)
    named = f"{a.name} (0, {len(a.values)} tokens) against {b.name} (1, {len(b.values)}), balanced to {per_class} each"

    if wanted & {"accuracy", "auc", *coefficients}:
        fits = by_token(both, repeats, root)
        if empty := sum(not f.coefficients.any() for f in fits):
            named += f"; {empty} of {repeats} fits keep no coefficient: too few tokens for C = {C:g}"
        for name, values in (("accuracy", [f.accuracy for f in fits]), ("auc", [f.auc for f in fits])):
            if name in wanted:
                yield _mean(f"{stem}/{name}", CLAIMS[name], SOURCE, values, per_class, named)
        weights = np.array([f.coefficients for f in fits])
        for column, name in enumerate(coefficients):
            if name in wanted:
                claim = f"coefficient of the z-scored scalar at {name.removeprefix('coef_')}; above 0 speaks for {b.name}"
                yield _mean(f"{stem}/{name}", claim, COEFFICIENTS, weights[:, column].tolist(), per_class, "")
    few = max(1, repeats // FOLDS)
    for name, groups in (("auc_by_response", both.response), ("auc_by_question", both.question)):
        if name in wanted:
            values = by_group(both, groups, few, root)
            yield _grouped(f"{stem}/{name}", name, values, per_class, len(np.unique(groups)), few)
    if "auc_question_only" in wanted:
        values = question_only(both, min(max(few, 5), repeats), root)
        note = f"{both.question.max() + 1} questions; what an AUC by token can reach without any scalar"
        yield _mean(f"{stem}/auc_question_only", CLAIMS["auc_question_only"], SOURCE, values, per_class, note)
    if "auc_response_means_by_question" in wanted:
        means = both.answer_means()
        values = [v for i in range(few) for v in folds(z_scored(means.x), means.y, means.question, root, i, C_ANSWERS)]
        name = "auc_response_means_by_question"
        yield _grouped(f"{stem}/{name}", name, values, len(means.y), len(np.unique(means.question)), few, f"{len(means.y)} answers, C = {C_ANSWERS:g}")


def _mean(id_: str, claim: str, source: str, values: list[float], n: int, note: str) -> Claim:
    spread = f"mean of {len(values)} repeats, standard deviation {np.std(values):.3f}"
    return counted(id_, claim, source, float(np.mean(values)), n, note="; ".join(t for t in (spread, note) if t))


def _grouped(id_: str, name: str, values: list[float], n: int, groups: int, repeats: int, note: str = "") -> Claim:
    if not values:
        what = f"two {'answers' if name == 'auc_by_response' else 'questions'} of each class, so that one can be held out"
        return not_found(id_, CLAIMS[name], SOURCE, what)
    text = f"mean of {len(values)} folds over {groups} groups ({repeats} x {FOLDS}-fold; folds of one class left out), standard deviation {np.std(values):.3f}"
    return counted(id_, CLAIMS[name], SOURCE, float(np.mean(values)), n, note="; ".join(t for t in (text, note) if t))
