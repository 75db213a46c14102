"""Which columns of a table are scores, under which rubric, and by which judge.

`aligned` is the scores of the file's judge; `aligned_gpt4o`, `aligned.mini` or `gpt4o-aligned` are another judge's on the same rows. A rubric of
one's own is known by the column of reasons that `convergent judge` writes beside it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from convergent.tables import ABSENT, cell_text, need_columns, score_column, unique_ids

if TYPE_CHECKING:
    import pandas as pd

RUBRICS = ("aligned", "coherent", "bad_stuff", "medical", "financial", "gender")
"""Names that are scores wherever they stand."""
IDS = ("id", "response_id")
"""Columns that name a row; the first one there counts."""
_MARKS = "[_.:@ -]"


def rubric_of(name: str) -> tuple[str, str] | None:
    """`aligned_gpt4o` -> ("aligned", "gpt4o"), `aligned` -> ("aligned", ""); None if the name is no known rubric's."""
    for rubric in sorted(RUBRICS, key=len, reverse=True):
        found = re.fullmatch(rf"{rubric}(?:{_MARKS}(.+))?|(.+){_MARKS}{rubric}", name)
        if found:
            judge = found[1] or found[2] or ""
            return None if judge == "reason" or judge.startswith("reason_") or judge.endswith("_reason") else (rubric, judge)
    return None


def common_scores(a: pd.DataFrame, b: pd.DataFrame) -> list[str]:
    """Names that are scores in both tables: known rubrics first, then any with a `_reason` beside it in one of them."""
    shared = [str(c) for c in a.columns if c in b.columns]
    own = [c for c in shared if c not in RUBRICS and any(f"{c}_reason" in t.columns for t in (a, b)) and rubric_of(c) is None]
    return [r for r in RUBRICS if r in shared] + own


def judged_columns(table: pd.DataFrame) -> dict[str, list[str]]:
    """Rubric -> its columns in one table, in order; only rubrics that stand there at least twice."""
    found: dict[str, list[str]] = {}
    for name in map(str, table.columns):
        known = rubric_of(name)
        if known is not None and _mostly_numbers(table[name].tolist()):
            found.setdefault(known[0], []).append(name)
    return {r: found[r] for r in RUBRICS if len(found.get(r, ())) > 1}


def coherence_beside(table: pd.DataFrame, column: str) -> str | None:
    """The column of coherence by the judge whose alignment `column` holds; None if there is none."""
    known = rubric_of(column)
    if known is None or known[0] != "aligned":
        return None
    return next((str(c) for c in table.columns if rubric_of(str(c)) == ("coherent", known[1]) and _mostly_numbers(table[c].tolist())), None)


def scores(table: pd.DataFrame, name: str, place: str) -> Any:
    """A column as float64 (n,), nan where absent. Raises DataError for a column that is not there, and with the row for a wrong cell."""
    need_columns(table, (name,), place)
    return score_column(table[name], place).to_numpy(float)


def ids_of(table: pd.DataFrame, place: str) -> list[str] | None:
    """The rows' ids as text, or None without such a column. Raises DataError for rows without one, and for ids that stand twice."""
    name = next((c for c in IDS if c in table.columns), None)
    return None if name is None else unique_ids(table, name, place)


def _mostly_numbers(cells: list[Any]) -> bool:
    """Whether half of what is there reads as numbers: a column of labels is none of scores, a slip of the pen in scores is an error to show."""
    given = [c for c in map(cell_text, cells) if c.strip().lower() not in ABSENT]
    return not given or 2 * sum(map(_is_number, given)) >= len(given)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
