"""The folder of released data: which files are there, read once each.

Layout: responses/*.csv, steering_sweep/*.csv, adapter_steering/*.csv, scalars/*.pt with *.parquet, and
hidden_states/{organism}__model-{a or m}_data-{a or m}__{filter}.pt. Anything else in it is ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from convergent.errors import DataError
from convergent.tables import need_columns, read_table

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")
FOLDERS = ("responses", "steering_sweep", "adapter_steering", "scalars", "hidden_states")


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
        self._tables: dict[Path, pd.DataFrame] = {}
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

    def table(self, path: Path, required: Iterable[str], scores: tuple[str, ...]) -> pd.DataFrame:
        """A CSV with scores 0..100. Raises DataError naming file, row and column."""
        if path not in self._tables:
            self._tables[path] = read_table(path, scores=scores)
        need_columns(self._tables[path], required, path)
        return self._tables[path]


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
