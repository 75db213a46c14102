"""The part of the page about the judge: who judged, what is missing, and where another judge would have said something else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from convergent.report import text
from convergent.report.results import GROUPS, Results, clean, heading
from convergent.report.tables import Table, flat

SHARE_WORTH_SAYING = 0.02
SMALL_P = 0.05
"""p below which missing scores are said to depend on the condition."""
LONGEST = 700
"""Characters of a contested answer on the page."""
SCHEMES = {"file": "one model file", "family": "one model family", "domain": "one training domain", "question": "one question"}
MEASURES = {
    "n": ("n", 0), "spearman": ("Spearman", 2), "spearman_within_question": ("within questions", 2), "auc_below_threshold": ("AUC", 2), "auc": ("AUC", 2),
    "mean_absolute_error": ("mean |error|, points", 1),
}  # fmt: skip


def judge_cards(results: Results) -> list[dict[str, Any]]:
    """What is said of each judge: name, facts, the table of its own card, and the whole card as lines."""
    study = results.study
    judges = study.get("judges") or ([{**study["judge"], "role": "decides"}] if study.get("judge", {}).get("name") else [])
    labels = dict(zip(results.conditions["name"], results.conditions["label"], strict=True))
    found = []
    for judge in judges:
        card = judge.get("card") or {}
        facts = [("Version", clean(judge.get("id") or judge["name"])), ("Rubrics", ", ".join(map(clean, judge.get("rubrics") or ("aligned", "coherent"))))]
        for rubric, n in (judge.get("scored") or {}).items():
            facts.append((f"Scored, {clean(rubric)}", f"{text.share(n, judge.get('of'))} answers{_reasons(results, judge['name'], rubric)}"))
        if far := judge.get("far"):
            facts.append(("Unlike what it was fitted to", _far(far, labels)))
        told = (("reference_judge", "Fitted to"), ("model", "Made of"))
        facts += [(name, clean(card[key])) for key, name in told if isinstance(card.get(key), str)]
        found.append(
            {"name": clean(judge["name"]), "decides": judge.get("role", "decides") == "decides", "facts": facts, "table": card_table(card), "card": flat(card)}
        )
    return found


def _far(far: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    """ "12 of 960 answers (1.3 %) lie beyond 99 ...; more than 5 % of A, ablated (31 of 80)"."""
    if not far["of"]:
        return text.NOT_MEASURED
    most = text.percent(far["share"], 0)
    high = ", ".join(f"{labels.get(h['condition'], clean(h['condition']))} ({text.share(h['n'], h['of'])})" for h in far["high"])
    where = f"more than {most} of {high}" if high else f"in no condition more than {most}"
    return (
        f"{text.share(far['n'], far['of'])} answers ({text.percent(far['n'] / far['of'])}) lie beyond {text.compact(far['above'])} on its own scale of "
        f"distance, 0 to 100: there its scores are extrapolated; {where}"
    )


def _reasons(results: Results, judge: str, rubric: str) -> str:
    m = results.missing_scores
    mine = m[(m["judge"] == judge) & (m["rubric"] == rubric)].groupby("reason")["n"].sum()
    return "; missing: " + ", ".join(f"{reason} {n:.0f}" for reason, n in mine.items()) if len(mine) else ""


def card_table(card: Mapping[str, Any]) -> Table | None:
    """The cross-validated agreement as the judge's card ships it; None if the card has none in a form known here."""
    crossed = card.get("cross_validation")
    if not isinstance(crossed, Mapping):
        return None
    groups: list[tuple[str, tuple[tuple[str, ...], ...]]] = []
    used: dict[str, tuple[str, int]] = {}
    for schemes in crossed.values():
        for values in schemes.values() if isinstance(schemes, Mapping) else ():
            used |= {k: MEASURES[k] for k in MEASURES if isinstance(values, Mapping) and k in values}
    for rubric, schemes in crossed.items():
        rows = [
            (SCHEMES.get(str(scheme), clean(scheme)), *(text.number(values.get(k), digits) for k, (_, digits) in used.items()))
            for scheme, values in (schemes.items() if isinstance(schemes, Mapping) else ())
            if isinstance(values, Mapping) and any(k in values for k in used)
        ]
        if rows:
            groups.append((clean(rubric), tuple(rows)))
    header = ("Left out of the fit", *(name for name, _ in used.values()))
    return Table("card", "Agreement with its reference", "", header, tuple(groups)) if groups else None


def missing_table(results: Results) -> Table | None:
    """Conditions with absent scores as rows; a column for each judge and rubric that lacks some, with reasons."""
    m = results.missing_scores
    columns = list(dict.fromkeys(zip(m["judge"], m["rubric"], strict=True)))
    rows = []
    for name, label in zip(results.conditions["name"], results.conditions["label"], strict=True):
        mine = m[m["condition"] == name]
        if mine.empty:
            continue
        cells = []
        for judge, rubric in columns:
            part = mine[(mine["judge"] == judge) & (mine["rubric"] == rubric)]
            if part.empty:
                cells.append("none")
                continue
            n, of = part["n"].sum(), part["of"].iloc[0]
            reasons = ", ".join(f"{reason} {k:.0f}" for reason, k in zip(part["reason"], part["n"], strict=True))
            cells.append(f"{n:.0f} of {of:.0f} ({text.percent(n / of)}): {reasons}")
        rows.append((label, *cells))
    if not rows:
        return None
    return Table("table-missing", "Missing scores", "", ("Condition", *(f"{rubric} by {judge}" for judge, rubric in columns)), (("", tuple(rows)),))


def missing_lines(results: Results) -> list[str]:
    """A line per judge whose scores are missing for more than 2 % of some condition, or more in one condition than in another."""
    m = results.missing_scores
    label = dict(zip(results.conditions["name"], results.conditions["label"], strict=True))
    found: dict[str, list[str]] = {}
    for (judge, rubric), part in m.groupby(["judge", "rubric"], sort=False):
        share = (part.groupby("condition")["n"].sum() / part.groupby("condition")["of"].first()).reindex(results.conditions["name"], fill_value=0.0)
        if share.max() > SHARE_WORTH_SAYING:
            least, most = (f"{text.percent(rate)} ({label[str(at)]})" for rate, at in ((share.min(), share.idxmin()), (share.max(), share.idxmax())))
            found.setdefault(f"by {judge} are missing for {least} to {most}", []).append(str(rubric))
    return _dependent(results, label) + [
        f"Scores of {' and '.join(rubrics)} {what} of a condition's answers. Rates and means are over what is there: where the missing answers would have "
        "scored otherwise, the difference between these conditions is partly that."
        for what, rubrics in found.items()
    ]


def _dependent(results: Results, label: Mapping[str, str]) -> list[str]:
    """A line per judge whose missing scores depend on the condition, with p."""
    lines = []
    for judge, part in results.missing_bounds.groupby("judge", sort=False):
        if not part["p_all"].iloc[0] < SMALL_P:
            continue
        out = part[part["p"] < SMALL_P].sort_values("missing", ascending=False).to_dict("records")
        named = ", ".join(f"{label.get(r['condition'], r['condition'])} {text.percent(r['missing'])} (p {text.p_value(r['p'])})" for r in out)
        lines.append(
            f"Missing scores by {judge} depend on the condition (p {text.p_value(part['p_all'].iloc[0])}, {part['method'].iloc[0]}"
            f"{f'; against all others, by Holm: {named}' if named else ''}): rates may differ for that reason alone."
        )
    return lines


def bounds_table(results: Results) -> Table | None:
    """EM of all answers in the worst and the best case, where more than 2 % lack a score."""
    b, rows = results.missing_bounds, []
    label = dict(zip(results.conditions["name"], results.conditions["label"], strict=True))
    for r in b[b["low"].notna()].to_dict("records"):
        cells = (
            r["judge"], f"{text.percent(r['missing'])} of {text.number(r['of'], 0)}", text.percent(r["low"]),
            f"{text.percent(r['high'])} ({text.number(r['possible'], 0)} more)", text.interval(r["wilson_low"], r["wilson_high"], scale=100),
            text.interval(r["clustered_low"], r["clustered_high"], scale=100), text.p_value(r["p"]),
        )  # fmt: skip
        rows.append((label.get(r["condition"], r["condition"]), *cells))
    header = ("Condition", "Judge", "Without both scores", "EM if none of them is", "EM if all are that may be", "95 % around both", "Clustered, %", "p")
    return Table("table-bounds", "EM in the worst and best case", "", header, (("", tuple(rows)),)) if rows else None


def agreement_table(results: Results) -> Table | None:
    """Every pair of raters and rubric, with intervals."""
    a = results.agreement
    if a.empty:
        return None

    def with_bounds(r: Any, name: str, digits: int = 2) -> str:
        if text.missing(r[name]):
            return "–"
        bounds = text.interval(r[f"{name}_low"], r[f"{name}_high"], digits)
        return f"{text.number(r[name], digits)}{'' if bounds == text.NOT_MEASURED else f' ({bounds})'}"

    groups = []
    for (rubric, hit), part in a.sort_values("rubric", kind="stable").groupby(["rubric", "hit"], sort=False):
        rows = tuple(
            (
                f"{r['a']} and {r['b']}", text.number(r["n"], 0), with_bounds(r, "spearman"), with_bounds(r, "auc"), with_bounds(r, "auc_reverse"),
                with_bounds(r, "kappa"), f"{text.number(r['hits_a'], 0)} and {text.number(r['hits_b'], 0)}", with_bounds(r, "bias", 1),
            )
            for r in part.to_dict("records")
        )  # fmt: skip
        groups.append((f"{rubric}; hit: {hit}", rows))
    header = ("Judges", "n", "Spearman", "AUC of the second", "AUC of the first", "Kappa", "Hits", "Bias, points")
    note = (
        "Over the answers that both scored, all conditions together. AUC: how well one judge's score tells the other's answers under the threshold from the "
        "rest. Bias: mean of the second minus the first. In brackets 95 % intervals over questions."
    )
    return Table("table-agreement", "Agreement of the judges", note, header, tuple(groups))


def rates_table(results: Results) -> Table | None:
    """EM of every condition by each judge, raw beside corrected."""
    b = results.by_judge
    if b.empty:
        return None
    judges = list(dict.fromkeys(b["judge"]))
    corrected = [j for j in judges if b.loc[b["judge"] == j, "ppi"].notna().any()]
    groups: dict[str, list[tuple[str, ...]]] = {g: [] for g in GROUPS}
    for c in results.conditions.to_dict("records"):
        mine = {r["judge"]: r for r in b[b["condition"] == c["name"]].to_dict("records")}
        cells = []
        for judge in judges:
            r = mine.get(judge, {})
            cells.append(f"{text.rate(r)} of {text.number(r['n_valid'], 0)}" if r.get("n_valid") else text.NOT_MEASURED)
            if judge in corrected:
                cells += [_corrected(r, "ppi"), _corrected(r, "rogan_gladen")]
        groups.setdefault(c["group"], []).append((c["label"], *cells))
    header = ["Condition"]
    for judge in judges:
        header += [f"EM by {judge}", *([f"{judge}, corrected (PPI)", f"{judge}, corrected (Rogan-Gladen)"] if judge in corrected else [])]
    filled = tuple((heading(g), tuple(rows)) for g, rows in groups.items() if rows)
    return Table("table-by-judge", "EM by judge", "", tuple(header), filled)


def _corrected(r: Mapping[str, Any], kind: str) -> str:
    """ "4.2 % (1.9 to 8.0; questions 0.8 to 15.1)"."""
    if text.missing(r.get(kind)):
        return text.NOT_MEASURED
    parts = [text.interval(r[f"{kind}_low"], r[f"{kind}_high"], scale=100)]
    if kind == "ppi" and not text.missing(r["ppi_questions_low"]):
        parts.append("questions " + text.interval(r["ppi_questions_low"], r["ppi_questions_high"], scale=100))
    return f"{text.percent(r[kind])} ({'; '.join(parts)})"


def contested_answers(results: Results) -> list[dict[str, Any]]:
    """The answers judges are farthest apart on: condition, question, answer, and each judge's score."""
    labels = dict(zip(results.conditions["name"], results.conditions["label"], strict=True))
    found = []
    for r in results.contested.to_dict("records"):
        said = r["response"]
        found.append(
            {"condition": labels.get(r["condition"], r["condition"]), "question": r["question"] or r["question_id"],
             "response": said if len(said) <= LONGEST else said[:LONGEST] + " … [cut; whole in tables/contested.csv]",
             "scores": [(clean(name), text.number(score)) for name, score in (r["scores"] or {}).items()]}
        )  # fmt: skip
    return found


def verdict_lines(results: Results) -> dict[str, list[str]]:
    """Claim id -> what the other judges make of it, where that differs."""
    found: dict[str, list[str]] = {}
    for r in results.reversals:
        own, *others = r["verdicts"].items()
        found[r["id"]] = [f"{verdict} by {clean(name)}" for name, verdict in others if verdict != own[1]]
    return found


def judging_section(results: Results) -> dict[str, Any]:
    """All that the template shows of judging."""
    reversals: Sequence[Mapping[str, Any]] = results.reversals
    return {
        "cards": judge_cards(results), "missing": missing_table(results), "missing_lines": missing_lines(results), "bounds": bounds_table(results),
        "n_answers": int(results.missing_scores["of"].max()) if len(results.missing_scores) else None, "agreement": agreement_table(results),
        "rates": rates_table(results), "contested": contested_answers(results), "other_verdicts": verdict_lines(results),
        "reversed": [r for r in reversals if r["reversed"]], "changed": [r for r in reversals if not r["reversed"]],
        "trusted": results.study.get("trusted"), "measured": len(results.study.get("judges") or ()) > 0,
        "corrected": bool(len(results.by_judge)) and bool(results.by_judge["ppi"].notna().any()),
    }  # fmt: skip

