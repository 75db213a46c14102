"""`convergent agree`: every pair of judges in the files given, as a list of plain values and as lines on a terminal."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convergent.errors import DataError, InputError
from convergent.judging.agreement.columns import IDS, coherence_beside, common_scores, ids_of, judged_columns, rubric_of, scores
from convergent.judging.agreement.measures import Scores, agreement
from convergent.judging.agreement.rows import match
from convergent.judging.printable import printable, short
from convergent.rates import ALIGNED_BELOW, COHERENT_ABOVE, check_thresholds, question_of
from convergent.tables import cell_text, read_table

if TYPE_CHECKING:
    import pandas as pd

WORST = 10
SHOWN_GROUPS = 12
"""Questions or conditions on the screen; the rest is in the JSON."""


def agree(
    files: Sequence[str | Path],
    columns: Sequence[str] = (),
    rubric: str = "aligned",
    worst: int = WORST,
    aligned_below: float = ALIGNED_BELOW,
    coherent_above: float = COHERENT_ABOVE,
) -> list[dict[str, Any]]:
    """Agreement of every pair of judges, one dict per pair and rubric, JSON-ready.

    Several files: the scores that two of them hold under one name, on the rows they share. One file: its columns of one rubric, each pair.
    columns: only these; in one file, `rubric` is theirs where their names do not tell. Keys: a, b, rubric, those of `measures.agreement`, and
    matched_by, n_shared, left_out_a, left_out_b, note. Raises DataError for tables that cannot be compared.
    """
    check_thresholds(aligned_below, coherent_above)
    if len(set(columns)) != len(columns):
        raise InputError(f"--columns: `{next(c for c in columns if list(columns).count(c) > 1)}` stands twice; name each once")
    tables = [read_table(path) for path in files]
    names = [str(path) for path in files]
    thresholds = {"aligned_below": aligned_below, "coherent_above": coherent_above}
    if not tables:
        raise InputError("agree: no file given; name a table with two judged columns, or two judged tables")
    if len(tables) == 1:
        return _in_one(tables[0], names[0], columns, rubric, worst, thresholds)
    found = []
    for (a, name_a), (b, name_b) in combinations(zip(tables, names, strict=True), 2):
        found += _of_two(a, b, name_a, name_b, columns, worst, thresholds)
    return found


def _in_one(table: pd.DataFrame, name: str, columns: Sequence[str], rubric: str, worst: int, thresholds: dict[str, float]) -> list[dict[str, Any]]:
    ids_of(table, name)  # rows that are shown must have a name of their own
    if len(columns) == 1:
        raise InputError(f"--columns: only `{columns[0]}`; name two or more, or give a second file")
    groups: dict[str, list[str]] = {}
    if columns:
        known = [(rubric_of(c) or ("", ""))[0] for c in columns]
        groups[known[0] if known[0] and len(set(known)) == 1 else rubric] = list(columns)
    else:
        groups = judged_columns(table)
    if not groups:
        raise DataError(
            f"{name}: no rubric is judged twice here (such as `aligned` and `aligned_gpt4o`); name the columns with --columns, or give a second file"
        )
    return [
        {"a": a, "b": b, "rubric": r, **_pair(table, table, a, b, r, name, name, worst, thresholds), "matched_by": "row", "n_shared": len(table),
         "left_out_a": 0, "left_out_b": 0, "note": ""}
        for r, names in groups.items() for a, b in combinations(names, 2)
    ]  # fmt: skip


def _of_two(
    a: pd.DataFrame, b: pd.DataFrame, name_a: str, name_b: str, columns: Sequence[str], worst: int, thresholds: dict[str, float]
) -> list[dict[str, Any]]:
    shared = list(columns) or common_scores(a, b)
    if not shared:
        raise DataError(f"{name_a} and {name_b}: no column of scores stands in both (such as `aligned`); name one with --columns")
    matched = match(a, b, name_a, name_b)
    x, y = (t.iloc[[pair[side] for pair in matched.rows]].reset_index(drop=True) for side, t in enumerate((a, b)))
    for c in shared:  # before the rows are cut, so that a message names the row of the file
        scores(a, c, name_a), scores(b, c, name_b)
    return [
        {"a": name_a, "b": name_b, "rubric": c, **_pair(x, y, c, c, (rubric_of(c) or (c, ""))[0], name_a, name_b, worst, thresholds),
         "matched_by": matched.by, "n_shared": len(x), "left_out_a": matched.left_out[0], "left_out_b": matched.left_out[1], "note": matched.note}
        for c in shared
    ]  # fmt: skip


def _pair(
    a: pd.DataFrame, b: pd.DataFrame, column_a: str, column_b: str, rubric: str, name_a: str, name_b: str, worst: int, thresholds: dict[str, float]
) -> dict[str, Any]:
    """Measures of two columns on rows that belong together, and the rows farthest apart with their texts."""
    coherent = None
    if rubric == "aligned":
        beside = coherence_beside(a, column_a), coherence_beside(b, column_b)
        if beside[0] and beside[1]:
            coherent = scores(a, beside[0], name_a), scores(b, beside[1], name_b)
    s = Scores(rubric, scores(a, column_a, name_a), scores(b, column_b, name_b), coherent, **thresholds)
    questions = question_of(a) or question_of(b)
    conditions = next(([cell_text(c) for c in t["condition"].tolist()] for t in (a, b) if "condition" in t.columns), None)
    found = agreement(s, questions, conditions, worst)
    return {**found, "worst": [_row(a, b, i, float(s.a[i]), float(s.b[i])) for i in found["worst"]]}


def _row(a: pd.DataFrame, b: pd.DataFrame, i: int, score_a: float, score_b: float) -> dict[str, Any]:
    def cell(name: str) -> str:
        return next((text for t in (a, b) if name in t.columns and (text := cell_text(t[name].iloc[i]))), "")

    own = next((c for c in IDS if c in a.columns), None)
    return {
        "row": i + 1, "id": cell(own) if own else "", "question_id": cell("question_id"), "condition": cell("condition"), "question": cell("question"),
        "response": cell("response"), "a": score_a, "b": score_b, "difference": score_b - score_a,
    }  # fmt: skip


# Printing


def agree_command(
    files: Sequence[Path], columns: Sequence[str], rubric: str, worst: int, aligned_below: float, coherent_above: float, as_json: bool
) -> None:
    """What `convergent agree` does. Raises before any output."""
    names = [c.strip() for given in columns for c in given.split(",") if c.strip()]
    found = agree(files, names, rubric, worst, aligned_below, coherent_above)
    if as_json:
        print(json.dumps(found, indent=1, allow_nan=False))  # ASCII: an escape sequence in an answer stays an escaped one
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    for pair in found:
        for line, style in lines(pair):
            # Text, not markup: an answer may hold brackets.
            console.print(Text(line, style=style), soft_wrap=not console.is_terminal)


NAMES = {"spearman": "Spearman", "pearson": "Pearson", "auc": "AUC", "auc_reverse": "AUC back", "kappa": "kappa", "bias": "bias b - a"}


def lines(pair: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """A pair's lines and their styles; all text of the files is printable."""
    yield f"{printable(pair['rubric'])}: a = {printable(pair['a'])}, b = {printable(pair['b'])}", "bold"
    missing = ", ".join(f"{pair[f'missing_{k}']} lack {who}" for k, who in (("a", "a's"), ("b", "b's"), ("both", "both")) if pair[f"missing_{k}"])
    shared = f"{pair['n_shared']:,} rows" if pair["matched_by"] == "row" else f"{pair['n_shared']:,} shared rows (by {pair['matched_by']})"
    yield f"  n = {pair['n']:,} with both scores, of {shared}{f'; {missing}' if missing else ''}", ""
    if pair["left_out_a"] or pair["left_out_b"]:
        yield f"  left out, as only one file has them: {pair['left_out_a']:,} rows of a, {pair['left_out_b']:,} of b", ""
    if pair["note"]:
        yield f"  {pair['note']}", "yellow"
    remarks = {
        "auc": f"b's score against a's {pair['auc_label']}", "auc_reverse": f"a's score against b's {pair['auc_label']}",
        "kappa": pair["hit"],
    }  # fmt: skip
    for name, label in NAMES.items():
        digits = 1 if name == "bias" else 2
        if pair[name] is None:
            yield f"  {label:10s}  -  ({pair['why'][name]})", "dim"
            continue
        bounds = pair["intervals"][name]
        span = f"[{bounds[0]:.{digits}f}, {bounds[1]:.{digits}f}]" if bounds else "[no interval]"
        yield f"  {label:10s} {pair[name]:7.{digits}f}  {span:16s} {remarks.get(name, '')}".rstrip(), ""
    c = pair["confusion"]
    yield (
        f"  hits       {pair['hits_a']:,} by a, {pair['hits_b']:,} by b, of {pair['n_labelled']:,}: both {c['both']:,}, a only {c['a_only']:,}, "
        f"b only {c['b_only']:,}, neither {c['neither']:,}"
    ), ""
    for key, title in (("by_question", "question"), ("by_condition", "condition")):
        yield from _groups(pair[key], title)
    if pair["worst"]:
        yield "  farthest apart", "bold"
    for k, row in enumerate(pair["worst"], start=1):
        where = " · ".join(filter(None, (short(row["id"], 20), short(row["condition"], 20), short(row["question_id"] or row["question"], 30))))
        yield f"  {k:2d}. a {row['a']:.1f}  b {row['b']:.1f}  {where or 'row ' + str(row['row'])}", ""
        yield f"      {short(row['response'], 72) or '(empty)'}", "dim"
    yield "  Intervals are 95 %, over questions of this kind (t over questions, jackknife).", "dim"
    yield "", ""


def _groups(groups: Sequence[dict[str, Any]], title: str) -> Iterator[tuple[str, str]]:
    key = "question_id" if title == "question" else "condition"
    if len(groups) < 2:
        return
    yield f"  {'by ' + title:30s} {'n':>6s} {'Spearm.':>7s} {'AUC':>5s} {'kappa':>6s} {'bias':>6s}  hits a, b", "bold"
    shown = sorted(groups, key=lambda g: -abs(g["bias"] or 0))[:SHOWN_GROUPS] if len(groups) > SHOWN_GROUPS else groups
    for g in shown:
        cells = [f"{'-' if g[m] is None else format(g[m], f'.{d}f'):>{w}s}" for m, d, w in (("spearman", 2, 7), ("auc", 2, 5), ("kappa", 2, 6), ("bias", 1, 6))]
        yield f"  {short(g[key], 30) or '(none)':30s} {g['n']:6,} {' '.join(cells)}  {g['hits_a']}, {g['hits_b']}", ""
    if len(shown) < len(groups):
        yield f"  the {len(shown)} with the largest bias of {len(groups)}; all with --json", "dim"
