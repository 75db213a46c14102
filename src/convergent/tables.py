"""Tables of answers: CSV, Parquet and JSONL by file ending, in and out, with nothing lost on the way.

Scores become numbers or missing (nan), never zero; every other column, every cell of text and the row order pass
through. A response that reads "NA" or "null" is an answer, so CSV is read and written without pandas' guesses.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from convergent.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

SCORES = ("aligned", "coherent")
"""Columns that must hold 0..100 or nothing wherever they occur."""
TEXTS = ("question_id", "question", "response", "system", "topic")
"""Columns that stay text even if every cell looks like a number."""
ABSENT = frozenset({"", "nan", "na", "n/a", "none", "null", "<na>"})
"""What an absent score looks like in text, in lower case."""


def read_table(path: str | Path, required: Iterable[str] = (), scores: Sequence[str] = SCORES) -> pd.DataFrame:
    """Read a table by its ending (.csv, .parquet, .jsonl); `scores` come as float64 with nan for an absent one.

    Rows in messages count from 1, after the header. Raises DataError for a file that is missing, a folder, empty,
    binary or damaged, for missing `required` columns, and for scores that are text or outside 0..100.
    """
    path = Path(path)
    read = _by_ending(path, _READERS)
    if path.is_dir():
        raise DataError(f"{path}: is a folder; name one table in it")
    if not path.exists():
        raise DataError(f"{path}: no such file")
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{path}: the file is empty; write it again")
        df: pd.DataFrame = read(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check the file and its rights") from error
    need_columns(df, required, path)
    if df.empty:
        raise DataError(f"{path}: has no rows; a table needs at least one answer")
    for name in scores:
        if name in df.columns:
            df[name] = score_column(df[name], path)
    return df


def write_table(df: pd.DataFrame, path: str | Path) -> None:
    """Write a table by its ending; readers see the old file or the whole new one. Raises DataError if it cannot be."""
    path = Path(path)
    write = _by_ending(path, _WRITERS)
    if path.is_dir():
        raise DataError(f"{path}: is a folder; name a file to write")
    tmp = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(df, tmp)
        tmp.replace(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error}); nothing was changed") from error
    except (ValueError, TypeError) as error:  # Arrow's and JSON's word for a cell they cannot hold
        raise DataError(f"{path}: this table does not fit the format ({error}); try another ending") from error
    finally:
        _forget(tmp)


def need_columns(df: pd.DataFrame, required: Iterable[str], place: str | Path) -> None:
    """Raise DataError, naming the nearest column, unless `df` has all `required` ones."""
    have, required = [str(c) for c in df.columns], tuple(required)
    for name in required:
        if name not in have:
            lower = {c.strip().lower(): c for c in have if c not in required}
            near = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.5)
            mend = f"the nearest is `{lower[near[0]]}`; rename it" if near else "add it"
            shown = ", ".join(have[:8]) + (", ..." if len(have) > 8 else "")
            raise DataError(f"{place}: no column `{name}`; {mend} (columns here: {shown})")


def score_column(column: pd.Series, place: str | Path) -> pd.Series:
    """Scores 0..100 as float64, nan for absent ones. Raises DataError with row number and value for anything else."""
    import pandas as pd

    values = []
    for row, cell in enumerate(column.tolist(), start=1):
        try:
            value = _score(cell)
        except (TypeError, ValueError):
            raise DataError(
                f"{place}: row {row}, column `{column.name}`: {_short(cell)} is not a number; "
                "a score is 0 to 100 or an empty cell"
            ) from None
        if not math.isnan(value) and not 0 <= value <= 100:
            raise DataError(
                f"{place}: row {row}, column `{column.name}`: {_short(cell)} is outside 0 to 100; mend the score"
            )
        values.append(value)
    return pd.Series(values, index=column.index, name=column.name, dtype="float64")


def absent(cell: Any) -> bool:
    """Whether a cell holds nothing: None, nan, pandas.NA or NaT."""
    return cell is None or type(cell).__name__ in ("NAType", "NaTType") or (isinstance(cell, float) and cell != cell)  # NA answers no comparison


def text_of(cell: Any) -> str:
    """A cell as text, as it stands; "" for an absent one."""
    return "" if absent(cell) else str(cell)


def cell_text(cell: Any) -> str:
    """A cell as text that every encoder takes: "" for an absent one, no ".0" on whole numbers, one kind of line break."""
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))
    text = text_of(cell).replace("\r\n", "\n").replace("\r", "\n").replace("\x00", "\ufffd")  # as the tables of a report have it
    return text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate, which JSON can bring, fits in no file


def unique_ids(table: pd.DataFrame, name: str, place: str | Path) -> list[str]:
    """Column `name` as text, one id per row. Raises DataError, with the rows, for a row without one and for ids that stand twice."""
    ids = [cell_text(c).strip() for c in table[name].tolist()]
    if "" in ids:
        raise DataError(f"{place}: row {ids.index('') + 1} has no `{name}`; give every row one, or remove the column")
    rows: dict[str, list[int]] = {}
    for row, own in enumerate(ids, start=1):
        rows.setdefault(own, []).append(row)
    twice = [own for own, where in rows.items() if len(where) > 1]
    if twice:
        more = f" and {len(twice) - 3} more" if len(twice) > 3 else ""
        first = " and ".join(map(str, rows[twice[0]][:2]))
        raise DataError(
            f"{place}: `{name}` {', '.join(map(_short, twice[:3]))}{more} stands more than once, first in rows {first}; "
            "an id names one answer, mend or drop those rows"
        )
    return ids


def _score(cell: Any) -> float:
    if isinstance(cell, str):
        return math.nan if cell.strip().lower() in ABSENT else float(cell)
    if absent(cell):
        return math.nan
    if isinstance(cell, bool):
        raise TypeError
    return float(cell)


def _short(cell: Any) -> str:
    text = repr(cell)
    return text if len(text) <= 40 else f"{text[:37]}..."


# Readers


def _text(path: Path) -> str:
    raw = path.read_bytes()
    if b"\0" not in raw.split(b"\n", 1)[0]:
        try:
            return raw.decode("utf-8-sig")
        except UnicodeDecodeError:
            pass
    raise DataError(f"{path}: not a text file in UTF-8; save it as UTF-8 {path.suffix[1:].upper()}, or mend the ending")


def _read_csv(path: Path) -> pd.DataFrame:
    import pandas as pd

    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        rows = [row for row in csv.reader(io.StringIO(_text(path), newline=""), strict=True) if row]
    except csv.Error as error:
        raise DataError(f"{path}: broken CSV ({error}); quote cells that hold quotes or line breaks") from error
    if not rows:
        raise DataError(f"{path}: the file is empty; write it again")
    header, *body = rows
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{path}: column `{twice}` occurs twice; rename one")
    for number, row in enumerate(body, start=1):
        if len(row) != len(header):
            raise DataError(
                f"{path}: row {number} has {len(row)} cells and the header {len(header)}; quote cells that hold commas"
            )
    columns: list[tuple[str, ...]] = list(zip(*body, strict=True)) or [()] * len(header)
    return pd.DataFrame(
        {
            name: pd.Series(cells, dtype="str") if name in TEXTS else _typed(cells)
            for name, cells in zip(header, columns, strict=True)
        }
    )


def _typed(cells: Sequence[str]) -> Any:
    """Numbers where every cell would be written back as it stands; else the text as it is."""
    import pandas as pd

    filled = [c for c in cells if c]
    if filled and all(_same(c, int) and abs(int(c)) < 2**63 for c in filled):
        return pd.array([int(c) if c else None for c in cells], dtype="Int64" if len(filled) < len(cells) else "int64")
    if filled and all(_same(c, float) for c in filled):
        return pd.Series([float(c) if c else math.nan for c in cells], dtype="float64")
    return pd.Series(cells, dtype="str")


def _same(cell: str, kind: Callable[[str], Any]) -> bool:
    try:
        number = kind(cell)
    except ValueError:
        return False
    return str(number) == cell and math.isfinite(number)


def _read_jsonl(path: Path) -> pd.DataFrame:
    import pandas as pd

    rows = []
    # Not splitlines(): U+2028 and its kin may stand unescaped within a JSON string.
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}: line {number} is not JSON ({error.msg}); one object per line") from error
        if not isinstance(row, dict):
            raise DataError(f'{path}: line {number} is not an object; write {{"question": ..., "response": ...}}')
        rows.append(row)
    if not rows:
        raise DataError(f"{path}: the file is empty; write it again")
    return pd.DataFrame(rows, dtype=object).infer_objects()


def _read_parquet(path: Path) -> pd.DataFrame:
    import pyarrow
    import pyarrow.parquet

    try:
        # Without pandas' own notes an index comes as a plain column and is not lost.
        frame: pd.DataFrame = pyarrow.parquet.read_table(path).to_pandas(ignore_metadata=True)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path}: not a Parquet file, or a damaged one; write it again") from error
    return frame


# Writers


def _write_csv(df: pd.DataFrame, path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as f:
        writer = csv.writer(_EndLines(f))
        writer.writerow(df.columns)
        for cells in _rows(df):
            writer.writerow([json.dumps(c, ensure_ascii=False) if isinstance(c, list | dict) else c for c in cells])


class _EndLines:
    """Ends lines in LF for a writer set to CRLF: csv quotes a lone CR or LF in a cell only if its line end holds it."""

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def write(self, line: str) -> int:
        return self.file.write(line.removesuffix("\r\n") + "\n")


def _write_jsonl(df: pd.DataFrame, path: Path) -> None:
    columns = [str(c) for c in df.columns]
    with path.open("w", encoding="utf-8") as f:
        for cells in _rows(df):
            f.write(json.dumps(dict(zip(columns, cells, strict=True)), ensure_ascii=False) + "\n")


def _rows(df: pd.DataFrame) -> Iterator[tuple[Any, ...]]:
    """Rows of plain Python values, None where a cell is absent."""
    return zip(*([_plain(c) for c in df[name].tolist()] for name in df.columns), strict=True)


def _plain(cell: Any) -> Any:
    if hasattr(cell, "tolist"):  # a numpy array or number inside an object column
        cell = cell.tolist()
    if (isinstance(cell, float) and not math.isfinite(cell)) or type(cell).__name__ in ("NAType", "NaTType"):
        return None
    return cell.isoformat() if hasattr(cell, "isoformat") else cell


def _write_parquet(df: pd.DataFrame, path: Path) -> None:
    df.to_parquet(path, index=False)


def _forget(tmp: Path) -> None:
    with suppress(OSError):  # if the parent is no folder, nothing was written there
        tmp.unlink(missing_ok=True)


_READERS = {".csv": _read_csv, ".parquet": _read_parquet, ".jsonl": _read_jsonl}
_WRITERS = {".csv": _write_csv, ".parquet": _write_parquet, ".jsonl": _write_jsonl}


def _by_ending(path: Path, table: dict[str, Callable[..., Any]]) -> Callable[..., Any]:
    try:
        return table[path.suffix.lower()]
    except KeyError:
        found = f"ending `{path.suffix}`" if path.suffix else "no ending"
        raise DataError(f"{path}: {found}; tables end in .csv, .parquet or .jsonl") from None


def check_writable(path: str | Path) -> None:
    """Raise DataError before long work if a table could not be written to `path`: wrong ending, a folder, a missing parent that cannot be made."""
    path = Path(path)
    if path.suffix.lower() not in (".csv", ".parquet", ".jsonl"):
        raise DataError(f"{path}: ends in {path.suffix or 'nothing'}; give a name that ends in .csv, .parquet or .jsonl")
    if path.is_dir():
        raise DataError(f"{path}: is a folder; give a file name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{path}: cannot make its folder ({error.strerror}); choose another place") from error
