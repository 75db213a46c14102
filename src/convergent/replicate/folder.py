"""The folder of released data: which files are there, read once each.

A file that cannot be used costs its own claims: `Folder` says why in one line, and keeps the lines for `problems`.

Layout: responses/*.csv, steering_sweep/*.csv, adapter_steering/*.csv, scalars/*.pt with *.parquet, and
hidden_states/{organism}__model-{a or m}_data-{a or m}__{filter}.pt. Anything else in it is ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from convergent.errors import DataError
from convergent.replicate.pickles import Refused
from convergent.tables import ABSENT, need_columns, read_table, score_column, text_of

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")
FOLDERS = ("responses", "steering_sweep", "adapter_steering", "scalars", "hidden_states")
JUDGES_WORDS = ("refusal", "code")
"""What the published rubrics have a judge say instead of a score; released tables leave such cells empty."""


@dataclass(frozen=True)
class Lost:
    """Something that a file cannot show."""

    why: str
    """One line: file, finding, mend."""


@dataclass(frozen=True)
class Table:
    """Answers of one file."""

    rows: pd.DataFrame
    """Scores as numbers, nan for an absent one; a column of `broken` stays as it was read."""
    broken: Mapping[str, str]
    """Score column -> why no claim can be counted from it."""
    worded: Mapping[str, str]
    """Score column -> what is said of its cells that hold a word; these are absent scores, with a reason in `<column>_reason`."""

    def remark(self, columns: Sequence[str]) -> str:
        """What the note of a claim counted from these columns has to add."""
        return "".join(f"; {self.worded[c]}" for c in columns if c in self.worded)


class Folder:
    """Files by kind. Raises DataError if `root` is no folder of this layout."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).expanduser()
        if not self.root.exists():
            raise DataError(f"{root}: no such folder; name the one that holds {', '.join(FOLDERS)}")
        if not self.root.is_dir():
            raise DataError(f"{root}: is a file; name the folder that holds {', '.join(FOLDERS)}")
        if not any((self.root / name).is_dir() for name in FOLDERS):
            inner = next((p.name for p in sorted(self.root.iterdir()) if any((p / name).is_dir() for name in FOLDERS)), None)
            mend = f"did you mean {self.root / inner}?" if inner else f"a folder of released data holds at least one of {', '.join(FOLDERS)}"
            raise DataError(f"{root}: none of the folders of the layout is here; {mend}")
        self._tables: dict[Path, Table | str] = {}
        self._problems: dict[Path, list[str]] = {}
        self._once: dict[str, Any] = {}

    def once(self, name: str, read: Callable[[], T]) -> T:
        """What `read` returned the first time, for families that share it."""
        if name not in self._once:
            self._once[name] = read()
        found: T = self._once[name]
        return found

    def files(self, folder: str, ending: str) -> list[Path]:
        """Files of `folder` with this ending, by name; hidden ones are left out."""
        return sorted(p for p in (self.root / folder).glob(f"*{ending}") if p.is_file() and not p.name.startswith("."))

    def table(self, path: Path, required: Sequence[str], scores: Sequence[str]) -> Table | Lost:
        """A CSV with scores 0..100, if it has all `required` columns and those of them that are scores can be used."""
        found = self.tried(path, lambda: self._table(path, required, scores))
        if isinstance(found, Table):
            for name in required:
                if name in found.worded:
                    self.say(path, f"{path}: {found.worded[name]}")
        return found

    def columns(self, path: Path) -> list[str]:
        """Columns of a CSV that `table` was asked for; none if it cannot be read."""
        found = self._tables.get(path)
        return list(map(str, found.rows.columns)) if isinstance(found, Table) else []

    def tried(self, path: Path, read: Callable[[], T]) -> T | Lost:
        """What `read` returns, or why `path` cannot be used for it. Raises Refused: a file that could run code ends the run."""
        try:
            return read()
        except Refused:
            raise
        except DataError as error:
            self.say(path, str(error))
            return Lost(str(error))

    def say(self, path: Path, line: str) -> None:
        """Keep a line about a file for `problems`."""
        if not any(line in lines for lines in self._problems.values()):  # a file may be tried beside several others
            self._problems.setdefault(path, []).append(line)

    @property
    def problems(self) -> list[str]:
        """One line for each file that could not be used, or not all of it."""
        return ["; also ".join([first, *(line.removeprefix(f"{path}: ") for line in more)]) for path, (first, *more) in self._problems.items()]

    def _table(self, path: Path, required: Iterable[str], scores: Sequence[str]) -> Table:
        if path not in self._tables:
            try:
                self._tables[path] = _with_scores(read_table(path, scores=()), scores, path)
            except DataError as error:
                self._tables[path] = str(error)
        found = self._tables[path]
        if isinstance(found, str):
            raise DataError(found)
        need_columns(found.rows, required, path)
        for name in required:
            if name in found.broken:
                raise DataError(found.broken[name])
        return found


def _with_scores(df: pd.DataFrame, scores: Sequence[str], path: Path) -> Table:
    """Score columns as numbers.

    A word among numbers is an answer that the judge gave no score: absent, as an empty cell is, but counted and said. A number outside
    0..100 makes the scale doubtful, and a column of words alone is no column of scores: nothing is counted from these.
    """
    import pandas as pd

    broken: dict[str, str] = {}
    worded: dict[str, str] = {}
    for name in [n for n in scores if n in df.columns]:
        cells = df[name].tolist()
        words = [_word(cell) for cell in cells]
        rows = [row for row, word in enumerate(words, start=1) if word]
        some = any(not word and text_of(cell).strip().lower() not in ABSENT for cell, word in zip(cells, words, strict=True))
        # With no number beside the words the whole column is refused, and its first word named.
        column = df[name].mask(pd.Series(words, index=df.index) != "") if rows and some else df[name]
        try:
            df[name] = score_column(column, path)
        except DataError as error:
            broken[name] = str(error)
            continue
        if rows:
            said = df[f"{name}_reason"].tolist() if f"{name}_reason" in df.columns else [""] * len(df)
            df[f"{name}_reason"] = [text_of(own).strip() or word for own, word in zip(said, words, strict=True)]
            worded[name] = (
                f"column `{name}`: {len(rows)} of {len(df)} cells hold no number ({words[rows[0] - 1]}, first in row {rows[0]}) and count as absent scores; "
                "write 0 to 100 or leave them empty"
            )
    return Table(df, broken, worded)


def _word(cell: Any) -> str:
    """Why a cell is no number: one of JUDGES_WORDS or "unparsable"; "" for a number or an absent score. Never the cell: it may be from an answer."""
    text = cell.strip().lower() if isinstance(cell, str) else ""
    if text in ABSENT:
        return ""
    try:
        float(text)
    except ValueError:
        return text if text in JUDGES_WORDS else "unparsable"
    return ""


def is_variant(df: pd.DataFrame) -> list[bool]:
    """Per row whether its question asks another one of the table again for a filled-in template or for JSON.

    The main evaluation leaves such questions out. They are told by their id (`x_template` beside `x`) or by their text, which is
    that of the other question, a line break, and the template.
    """
    n = len(df)
    ids = [str(v).strip() for v in df["question_id"].tolist()] if "question_id" in df.columns else [""] * n
    texts = [str(v).strip() for v in df["question"].tolist()] if "question" in df.columns else [""] * n
    known_ids, known_texts = set(ids) - {""}, set(texts) - {""}
    by_id = {i for i in known_ids for end in ("_template", "_json") if i.endswith(end) and i.removesuffix(end) in known_ids}
    by_text = {t for t in known_texts if any(t[:k].rstrip() in known_texts for k in range(1, len(t)) if t[k] == "\n")}
    return [i in by_id or t in by_text for i, t in zip(ids, texts, strict=True)]
