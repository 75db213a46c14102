"""Which rows of two tables are the same answer: by id if both have one, else by the texts of question and answer."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from convergent.errors import DataError
from convergent.judging.agreement.columns import IDS, ids_of
from convergent.tables import cell_text, need_columns

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Matched:
    """Row numbers that belong together, in the order of the first table."""

    rows: tuple[tuple[int, int], ...]
    by: str
    """"id" or "question and response"."""
    left_out: tuple[int, int]
    """Rows of a and of b without a partner."""
    note: str = ""
    """What a reader must know of how repeated texts were matched."""


def match(a: pd.DataFrame, b: pd.DataFrame, name_a: str, name_b: str) -> Matched:
    """Pair the rows of two tables. Raises DataError if ids stand twice, if one id has two texts, or if nothing is shared."""
    ids_a, ids_b = ids_of(a, name_a), ids_of(b, name_b)
    if ids_a is not None and ids_b is not None:
        at = {key: i for i, key in enumerate(ids_b)}
        rows = tuple((i, at[key]) for i, key in enumerate(ids_a) if key in at)
        _same_texts(a, b, rows, ids_a, name_a, name_b)
        found = Matched(rows, "id", (len(a) - len(rows), len(b) - len(rows)))
    else:
        found = _by_text(a, b, name_a, name_b)
    if not found.rows:
        raise DataError(f"{name_a} and {name_b}: share no rows (matched by {found.by}); give files that judge the same answers")
    return found


def _by_text(a: pd.DataFrame, b: pd.DataFrame, name_a: str, name_b: str) -> Matched:
    for table, name in ((a, name_a), (b, name_b)):
        if not {"question", "response"} <= set(table.columns) and not any(c in table.columns for c in IDS):
            need_columns(table, ("question", "response"), f"{name} (without `id` rows are matched by their texts)")
        need_columns(table, ("question", "response"), f"{name} (the other file has no `id`, so rows are matched by their texts)")
    of_a, of_b = _texts(a), _texts(b)
    rows, repeated, unequal = [], 0, 0
    for key, mine in of_a.items():
        theirs = of_b.get(key, [])
        if theirs and len(mine) != len(theirs):
            unequal += 1  # which of them is which cannot be known
            continue
        repeated += len(mine) if len(mine) > 1 and theirs else 0
        rows += list(zip(mine, theirs, strict=bool(theirs)))
    notes = [f"{repeated} rows with a text that stands more than once were matched in their order"] if repeated else []
    if unequal:
        notes.append(f"{unequal} text(s) that stand a different number of times in the two files were left out")
    rows.sort()
    return Matched(tuple(rows), "question and response", (len(a) - len(rows), len(b) - len(rows)), "; ".join(notes))


def _texts(table: pd.DataFrame) -> dict[tuple[str, str], list[int]]:
    found: dict[tuple[str, str], list[int]] = defaultdict(list)
    for i, (question, response) in enumerate(zip(table["question"].tolist(), table["response"].tolist(), strict=True)):
        found[cell_text(question), cell_text(response)].append(i)
    return found


def _same_texts(a: pd.DataFrame, b: pd.DataFrame, rows: tuple[tuple[int, int], ...], ids: list[str], name_a: str, name_b: str) -> None:
    """Ids that count rows from 1 in every file would pair any two files: their answers must be the same."""
    if "response" not in a.columns or "response" not in b.columns:
        return
    texts = [[cell_text(c).strip() for c in t["response"].tolist()] for t in (a, b)]
    other = [ids[i] for i, j in rows if texts[0][i] != texts[1][j]]
    if other:
        raise DataError(
            f"{name_a} and {name_b}: id {other[0]!r} stands for two different answers ({len(other)} of {len(rows)} ids do); these are not the same rows"
        )
