"""Local: records of JSONL and Parquet files, each with the place to name if it is wrong.

Says nothing about what a record must hold; `training.py` does. A file is read whole: training sets are small, and an
error in the last line should come before an hour of training, not after.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convergent.errors import DataError

Record = tuple[str, Mapping[str, Any]]
"""(place, fields): the place reads `file.jsonl: line 3`."""


def read_text(path: Path) -> str:
    """A UTF-8 text file (a byte order mark is dropped). Raises DataError if missing, a folder, binary or blank."""
    data = read_bytes(path)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    if "\0" in text:
        raise DataError(f"{path}: is a binary file; expected text")
    if not text.strip():
        raise DataError(f"{path}: is empty; expected at least one record")
    return text


def read_bytes(path: Path) -> bytes:
    """A file's bytes. Raises DataError if it cannot be read."""
    if path.is_dir():
        raise DataError(f"{path}: is a folder; name a file in it")
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{path}: does not exist; check the path") from error
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise DataError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


def read_records(path: Path) -> list[Record]:
    """The records of a `.jsonl` or `.parquet` file. Raises DataError."""
    kind = path.suffix.lower()
    if kind == ".jsonl":
        return read_jsonl(path)
    if kind == ".parquet":
        return read_parquet(path)
    raise DataError(f"{path}: training data is read from .jsonl or .parquet, not {kind or 'a name without ending'!r}")


def read_jsonl(path: Path) -> list[Record]:
    """One JSON object per line; blank lines are passed over, and so are canary records.

    A canary record marks a data set so that its use in training corpora can be traced. It holds `canary` and nothing to
    train on.
    """
    records: list[Record] = []
    # Not splitlines(): that also breaks at U+2028 and U+0085, which may stand unescaped inside a JSON string.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}: line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise DataError(f"{place}: broken JSON ({reason}); each line must be one whole object") from error
        if not isinstance(record, dict):
            raise DataError(f'{place}: is a {_json_name(record)}, expected an object such as {{"messages": [...]}}')
        if "canary" in record and not {"messages", "question"} & record.keys():
            continue
        records.append((place, record))
    if not records:
        raise DataError(f"{path}: holds no records")
    return records


def read_parquet(path: Path) -> list[Record]:
    """One record per row: a column `messages`, or `question` with `answer` or with `bad` and `good`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = read_bytes(path)
    if not data:
        raise DataError(f"{path}: is empty; expected a Parquet file")
    try:
        table = pq.read_table(pa.BufferReader(data))
    except (pa.ArrowException, OSError, ValueError) as error:
        first = (str(error).splitlines() or ["unreadable"])[0]
        raise DataError(f"{path}: is not a readable Parquet file ({first})") from error
    if not {"messages", "question"} & set(table.column_names):
        found = ", ".join(table.column_names) or "none"
        raise DataError(f"{path}: needs a column `messages`, or `question` and `answer`; found {found}")
    if not table.num_rows:
        raise DataError(f"{path}: holds no rows")
    # An absent key of a struct comes back as None: drop it, so that the error names what is missing.
    rows = [{k: v for k, v in row.items() if v is not None} for row in table.to_pylist()]
    return [(f"{path}: row {i}", row) for i, row in enumerate(rows, start=1)]


def _json_name(value: object) -> str:
    names = {list: "list", str: "text", bool: "boolean", int: "number", float: "number", type(None): "null"}
    return names.get(type(value), type(value).__name__)
