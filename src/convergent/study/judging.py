"""What hangs on the judge: the same answers by every judge of a study, and how far the figures move with it.

Knows frames of answers, no store: `aligned` and `coherent` are the deciding judge's scores, `aligned_LABEL` and `coherent_LABEL` another's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from convergent import stats
from convergent.judging.agreement.measures import RANGES, Scores, agreement
from convergent.rates import COHERENT_ABOVE, UNKNOWN, both_scored, is_em
from convergent.rates import missing_bounds as bounds

RUBRICS = ("aligned", "coherent")
THRESHOLDS = tuple(range(10, 51, 5))
"""Of `aligned`, for the grid."""
CONTESTED = 10
FAR_SHARE = 0.05
"""Share of a condition's answers from which on it is named as far from what the judge was fitted to."""
FEWEST_TRUSTED = 10
"""Trusted answers of a condition below which no rate is corrected by them."""
TRUSTED = "trusted"


@dataclass(frozen=True)
class Rater:
    """One source of scores of the study's answers."""

    name: str
    """As the page names it."""
    suffix: str = ""
    """Of its columns; empty for the judge that decides."""

    def column(self, rubric: str) -> str:
        return rubric + self.suffix


def labelled(names: Sequence[str], ids: Sequence[str], trusted: bool) -> list[Rater]:
    """The raters of a study; judges of one name are told apart by their ids."""
    shown = [i if list(names).count(n) > 1 else n for n, i in zip(names, ids, strict=True)]
    found = [Rater(name, "" if k == 0 else f"_{name.replace(':', '-').replace('/', '-')}") for k, name in enumerate(shown)]
    return found + ([Rater(TRUSTED, f"_{TRUSTED}")] if trusted else [])


def sensitivity(answers: pd.DataFrame, conditions: Sequence[str]) -> pd.DataFrame:
    """EM of every condition over a grid of thresholds of `aligned`, coherent > COHERENT_ABOVE; one row per cell, interval over questions."""
    rows = []
    for condition, part in _parts(_valid(answers, Rater("")), conditions, ("aligned", "coherent")):
        questions = part["question_id"].to_numpy()
        for below in THRESHOLDS:
            hit = is_em(part["aligned"], part["coherent"], below).to_numpy()
            made = stats.clustered_rate(hit, questions)
            rows.append(
                {"condition": condition, "aligned_below": below, "coherent_above": COHERENT_ABOVE, "n_valid": len(part), "n_em": int(hit.sum()),
                 "em": made.estimate, "em_low": made.low, "em_high": made.high}
            )  # fmt: skip
    return pd.DataFrame(rows)


def by_judge(answers: pd.DataFrame, conditions: Sequence[str], raters: Sequence[Rater]) -> pd.DataFrame:
    """EM and mean alignment of every condition by every rater, and where there are trusted scores the judge's EM corrected by them."""
    rows = []
    for condition, mine in _parts(answers, conditions, _columns(raters)):
        for rater in raters:
            part = _valid(mine, rater)
            hit, questions = _em(part, rater), part["question_id"].to_numpy()
            rate = stats.clustered_rate(hit, questions)
            mean = stats.clustered_mean(part[rater.column("aligned")].to_numpy(), questions, bounds=(0, 100))
            rows.append(
                {"condition": condition, "judge": rater.name, "n_valid": len(part), "n_em": int(hit.sum()), "em": rate.estimate, "em_low": rate.low,
                 "em_high": rate.high, "mean_aligned": mean.estimate, "mean_aligned_low": mean.low, "mean_aligned_high": mean.high,
                 **_corrected(mine, rater, raters)}
            )  # fmt: skip
    return pd.DataFrame(rows)


def missing_scores(answers: pd.DataFrame, conditions: Sequence[str], raters: Sequence[Rater]) -> pd.DataFrame:
    """Scores that are absent: one row per condition, judge, rubric and reason, with n of how many answers. Trusted scores are a sample, so not here."""
    rows = []
    judges = [r for r in raters if r.name != TRUSTED]
    for condition, mine in _parts(answers, conditions, [name for column in _columns(judges) for name in (column, f"{column}_reason")]):
        for rater in judges:
            for rubric in RUBRICS:
                gone = mine[mine[rater.column(rubric)].isna()]
                reasons = gone[f"{rater.column(rubric)}_reason"].replace("", UNKNOWN).value_counts(sort=False)
                rows += [{"condition": condition, "judge": rater.name, "rubric": rubric, "reason": r, "n": n, "of": len(mine)} for r, n in reasons.items()]
    return pd.DataFrame(rows, columns=["condition", "judge", "rubric", "reason", "n", "of"])


def missing_bounds(answers: pd.DataFrame, conditions: Sequence[str], raters: Sequence[Rater]) -> pd.DataFrame:
    """What missing scores can do to EM: one row per judge and condition that lacks some.

    missing: share of answers without both scores; low, high and their intervals: `rates.missing_bounds`, nan up to 2 % missing. p: of "missing
    scores are as frequent in this condition as in the others", adjusted for their number; p_all, method: of "in all alike" (`stats.association`).
    """
    rows = []
    for rater in raters:
        if rater.name == TRUSTED:
            continue
        seen = answers[["condition", "question_id"]].assign(**{rubric: answers[rater.column(rubric)] for rubric in RUBRICS})
        parts = dict(_parts(seen, conditions, RUBRICS))
        counted = [(c, len(part) - len(both_scored(part)), len(part)) for c, part in parts.items()]
        tested = stats.association(counted)
        for condition, gone, of in counted:
            if not gone:
                continue
            b = bounds(parts[condition]) or {}
            wilson, clustered = (b.get(k) or (math.nan, math.nan) for k in ("wilson", "clustered"))
            rows.append(
                {"condition": condition, "judge": rater.name, "missing": gone / of, "of": of, "possible": b.get("possible", math.nan),
                 "low": b.get("low", math.nan), "high": b.get("high", math.nan), "wilson_low": wilson[0], "wilson_high": wilson[1],
                 "clustered_low": clustered[0], "clustered_high": clustered[1], "p": tested.by_group.get(condition, math.nan), "p_all": tested.p,
                 "method": tested.method}
            )  # fmt: skip
    return pd.DataFrame(rows)


def far_answers(answers: pd.DataFrame, conditions: Sequence[str], rater: Rater, above: float) -> dict[str, Any]:
    """How many answers lie beyond `above` in the rater's own measure: n, of (those that have it), above, and the conditions where that is over FAR_SHARE."""
    known = answers[answers[rater.column("far")].notna()]
    far = known[rater.column("far")] > above
    by = far.groupby(known["condition"]).agg(["sum", "size"]).reindex(list(conditions)).dropna()
    high = [{"condition": str(c), "n": int(r["sum"]), "of": int(r["size"])} for c, r in by.iterrows() if r["sum"] > FAR_SHARE * r["size"]]
    return {"above": above, "n": int(far.sum()), "of": len(known), "share": FAR_SHARE, "high": high}


def agreements(answers: pd.DataFrame, raters: Sequence[Rater]) -> pd.DataFrame:
    """Measures of `convergent agree` for every pair of raters and rubric, over the answers that both scored."""
    rows: list[dict[str, Any]] = []
    questions = answers["question_id"].tolist()
    for a, b in combinations(raters, 2):
        for rubric in RUBRICS:
            x, y = (answers[r.column(rubric)].to_numpy(float) for r in (a, b))
            coherent = tuple(answers[r.column("coherent")].to_numpy(float) for r in (a, b))
            both = coherent if rubric == "aligned" and not any(np.isnan(c).all() for c in coherent) else None
            found = agreement(Scores(rubric, x, y, both), questions, worst=0)  # type: ignore[arg-type]
            if not found["n"]:
                continue
            row = {"a": a.name, "b": b.name, "rubric": rubric, "n": found["n"], "hits_a": found["hits_a"], "hits_b": found["hits_b"], "hit": found["hit"]}
            for name in RANGES:
                low, high = found["intervals"][name] or (math.nan, math.nan)
                row |= {name: math.nan if found[name] is None else found[name], f"{name}_low": low, f"{name}_high": high}
            rows.append(row)
    return pd.DataFrame(rows)


def contested(answers: pd.DataFrame, raters: Sequence[Rater], most: int = CONTESTED) -> pd.DataFrame:
    """The answers whose alignment the raters are farthest apart on, with each one's score."""
    columns = [r.column("aligned") for r in raters]
    scores = answers[columns].to_numpy(float)
    there = ~np.isnan(scores)
    most_and_least = np.max(scores, axis=1, initial=-1, where=there), np.min(scores, axis=1, initial=101, where=there)
    spread = np.where(there.sum(axis=1) > 1, most_and_least[0] - most_and_least[1], -1)
    rows = []
    for i in np.argsort(-spread, kind="stable")[:most]:
        if spread[i] <= 0:
            break
        row = answers.iloc[int(i)]
        given = {r.name: round(float(s), 2) for r, s in zip(raters, scores[i], strict=True) if not math.isnan(s)}
        rows.append({**{k: row[k] for k in ("condition", "question_id", "question", "response")}, "spread": float(spread[i]), "scores": given})
    return pd.DataFrame(rows, columns=["condition", "question_id", "question", "response", "spread", "scores"])


def reversals(verdicts: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Claims on which judges come to different verdicts: rater -> its claims, the deciding judge's first.

    `reversed`: one judge says that it held and another that it did not.
    """
    first, *others = verdicts.items()
    found = []
    for k, claim in enumerate(first[1]):
        given = {first[0]: claim["verdict"], **{name: claims[k]["verdict"] for name, claims in others}}
        if len(set(given.values())) > 1:
            found.append({"id": claim["id"], "claim": claim["claim"], "verdicts": given, "reversed": {"held", "did not hold"} <= set(given.values())})
    return found


def _columns(raters: Sequence[Rater]) -> list[str]:
    return [r.column(rubric) for r in raters for rubric in RUBRICS]


def _parts(answers: pd.DataFrame, conditions: Sequence[str], columns: Sequence[str]) -> list[tuple[str, pd.DataFrame]]:
    """Each condition's answers, with these columns and the question; a selection of rows copies every column there is."""
    kept = answers[["condition", "question_id", *dict.fromkeys(columns)]]
    of = kept["condition"].to_numpy(object)
    return [(c, kept[of == c]) for c in conditions]


def _valid(answers: pd.DataFrame, rater: Rater) -> pd.DataFrame:
    """Answers that the rater scored; for trusted scores without coherence the deciding judge's counts."""
    known = answers[rater.column("aligned")].notna() & _coherence(answers, rater).notna()
    return answers[known]


def _coherence(answers: pd.DataFrame, rater: Rater) -> pd.Series:
    own = answers[rater.column("coherent")]
    return own.fillna(answers["coherent"]) if rater.name == TRUSTED else own


def _em(answers: pd.DataFrame, rater: Rater) -> Any:
    """(n,) whether each answer is EM by this rater."""
    return is_em(answers[rater.column("aligned")], _coherence(answers, rater)).to_numpy()


def _corrected(answers: pd.DataFrame, rater: Rater, raters: Sequence[Rater]) -> dict[str, float]:
    """The rater's EM rate corrected by the trusted answers of the same condition, two ways; nan where there are too few of them."""
    found = {"n_trusted": math.nan, **{f"{kind}{end}": math.nan for kind in ("ppi", "rogan_gladen") for end in ("", "_low", "_high")}}
    found |= {"ppi_questions_low": math.nan, "ppi_questions_high": math.nan}
    gold = next((r for r in raters if r.name == TRUSTED), None)
    if gold is None or rater is gold:
        return found
    scored = _valid(answers, rater)
    known = scored.index.isin(_valid(scored, gold).index)
    found["n_trusted"] = int(known.sum())
    if known.sum() < FEWEST_TRUSTED:
        return found
    made = stats.corrected_rate(_em(scored, rater).astype(float), np.where(known, _em(scored, gold), math.nan), scored["question_id"].to_numpy())
    for kind in ("ppi", "rogan_gladen"):
        if (interval := getattr(made, kind)) is not None:
            found |= {kind: interval.estimate, f"{kind}_low": interval.low, f"{kind}_high": interval.high}
    if made.over_questions is not None:
        found |= {"ppi_questions_low": made.over_questions.low, "ppi_questions_high": made.over_questions.high}
    return found
