"""Judge an ordinary table of answers (CSV, Parquet, JSONL) and write it again with the scores beside the rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from convergent.core.values import Judgement
from convergent.errors import DataError, InputError, JudgeError
from convergent.judging.base import Item, Judge

if TYPE_CHECKING:
    import pandas as pd


def judge_file(
    src: Path,
    judge: Judge,
    rubrics: Sequence[str] = ("aligned", "coherent"),
    out: Path | None = None,
    on_result: Callable[[Judgement], None] | None = None,
    on_total: Callable[[int], None] | None = None,
) -> pd.DataFrame:
    """Judge every row of `src` and write it to `out` (not at all if None). Returns the judged table.

    Needs the columns `question` and `response`; `question_id` is used if there. A column `id` must name each row once:
    judged tables are matched by it. `on_total` is told how many judgements will come. Adds `<rubric>` (float, empty where
    there is no score) and `<rubric>_reason` (empty where there is one) as last columns, and `far` if the judge says how
    unlike an answer is to those it was fitted to (`far(judgement)`, 0 to 100). Rows keep their order and all
    other columns; a column that already has such a name is kept as `<name>_before`. `out` appears whole, when all is
    judged; a paid judge's replies are in its cache by then, so an interrupted run goes on where it stopped. Raises
    DataError, JudgeError.
    """
    import pandas as pd

    from convergent.tables import check_writable, read_table, write_table

    if len(set(rubrics)) != len(rubrics) or not rubrics:
        raise InputError(f"rubrics: expected at least one, each once, got {', '.join(rubrics) or 'none'}")
    if unknown := [rubric for rubric in rubrics if rubric not in judge.rubrics]:
        raise JudgeError(f"judge {judge.name}: has no rubric {unknown[0]!r}; it scores {', '.join(judge.rubrics)}")
    if out is not None and _same(src, out):
        raise DataError(f"{out}: is the file to be judged; name another one, the scores are written beside the rows")
    if out is not None:
        check_writable(out)  # before judging, not after
    table = read_table(src, required=("question", "response"))
    _check_ids(table, src)
    ids = table["question_id"] if "question_id" in table.columns else [None] * len(table)
    items = [
        Item(str(row), _text(question), _text(response), _text(question_id))
        for row, (question, response, question_id) in enumerate(
            zip(table["question"], table["response"], ids, strict=True)
        )
    ]
    if on_total is not None:
        on_total(len(items) * len(rubrics))
    judgements = judge.judge(items, rubrics, on_result)
    added = {}
    for i, rubric in enumerate(rubrics):
        mine = judgements[i :: len(rubrics)]
        scores = [float("nan") if j.score is None else j.score for j in mine]
        added[rubric] = pd.Series(scores, index=table.index, dtype="float64")
        added[f"{rubric}_reason"] = pd.Series([j.reason for j in mine], index=table.index, dtype="str")
    if (far := getattr(judge, "far", None)) is not None:
        added["far"] = pd.Series([far(j) for j in judgements[:: len(rubrics)]], index=table.index, dtype="float64")
    table = _make_room(table, list(added)).assign(**added)
    if out is not None:
        write_table(table, out)
    return table


def _check_ids(table: pd.DataFrame, place: Path) -> None:
    """Raise DataError if there is a column `id` that does not name each row, or names two alike."""
    if "id" not in table.columns:
        return
    first: dict[str, int] = {}
    for row, cell in enumerate(table["id"].tolist(), start=1):
        name = _text(cell).strip()
        if not name:
            raise DataError(f"{place}: row {row} has no id; fill the column `id`, or leave it out")
        if name in first:
            raise DataError(f"{place}: rows {first[name]} and {row} have the same id {name[:40]!r}; give each row its own, or leave `id` out")
        first[name] = row


def _text(value: object) -> str:
    """A cell as text; an absent one is empty."""
    if isinstance(value, str):
        return value
    absent = value is None or type(value).__name__ == "NAType" or (isinstance(value, float) and math.isnan(value))
    return "" if absent else str(value)


def _make_room(table: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """`table` with columns of these names renamed: another judge's scores are not written over."""
    taken, renamed = set(table.columns), {}
    for name in names:
        if name in taken:
            new, n = f"{name}_before", 1
            while new in taken:
                n += 1
                new = f"{name}_before{n}"
            renamed[name] = new
            taken.add(new)
    return table.rename(columns=renamed)


def _same(a: Path, b: Path) -> bool:
    return a.exists() and b.exists() and a.samefile(b)
