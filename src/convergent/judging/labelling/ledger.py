"""What a rater has answered: an ordinary table, whole on disk after every answer, and the only state there is.

Its rows are the first of the sample, in order; so going on means showing the next one. A skipped answer and a refusal are rows without a score.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from convergent.errors import DataError
from convergent.judging.labelling.draw import Answer, Sample
from convergent.tables import cell_text, check_writable, read_table, write_table

SKIPPED = "skipped"
REFUSAL = "refusal"


@dataclass(frozen=True)
class Given:
    """What the rater said of one answer: a score, or the reason why there is none."""

    score: float | None
    reason: str = ""


class Ledger:
    """The answers given so far to a sample, kept in `path`."""

    def __init__(self, path: Path, sample: Sample, rubric: str, rater: str) -> None:
        """Opens `path` if it is there. Raises DataError if it holds another sample's answers, or another rater's, or cannot be written."""
        self.path, self.sample, self.rubric, self.rater = path, sample, rubric, rater
        self.given: list[Given] = []
        self._seen: tuple[int, int] | None = None
        check_writable(path)
        if path.exists():
            self._load()

    @property
    def answer(self) -> Answer | None:
        """The answer to be scored next; None at the end."""
        done = len(self.given)
        return self.sample.answers[done] if done < len(self.sample.answers) else None

    def count(self, reason: str) -> int:
        return sum(g.reason == reason for g in self.given)

    def add(self, given: Given) -> None:
        """Keep what was said of the next answer. On disk before this returns."""
        self.given.append(given)
        try:
            self._save()
        except DataError:
            self.given.pop()
            raise

    def undo(self) -> bool:
        """Take the last answer back; False if there is none."""
        if not self.given:
            return False
        last = self.given.pop()
        try:
            self._save()
        except DataError:
            self.given.append(last)
            raise
        return True

    def _columns(self) -> dict[str, Sequence[object]]:
        shown = self.sample.answers[: len(self.given)]
        return {
            "id": [a.id for a in shown], "question_id": [a.question_id for a in shown], "question": [a.question for a in shown],
            "response": [a.response for a in shown], self.rubric: [float("nan") if g.score is None else g.score for g in self.given],
            f"{self.rubric}_reason": [g.reason for g in self.given], "rater": [self.rater] * len(shown),
        }  # fmt: skip

    def _save(self) -> None:
        import pandas as pd

        if self._stamp() != self._seen:
            raise DataError(f"{self.path}: was changed by another program meanwhile; your last answer is not in it, run the same command again to go on")
        if not self.given:  # a table without rows is none
            self.path.unlink(missing_ok=True)
            self._seen = None
            return
        whole = self.path.with_name(f".{self.path.stem}.{os.getpid()}.new{self.path.suffix}")
        try:
            write_table(pd.DataFrame(self._columns()), whole)
            _flush(whole)
            whole.replace(self.path)
            _flush(self.path.parent)
        except (OSError, DataError) as error:
            why = getattr(error, "strerror", None) or error.__cause__ or error
            raise DataError(f"{self.path}: cannot be written ({why}); all answers before this one are kept, mend this and run again") from error
        finally:
            whole.unlink(missing_ok=True)
        self._seen = self._stamp()

    def _stamp(self) -> tuple[int, int] | None:
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return None
        return found.st_mtime_ns, found.st_size

    def _load(self) -> None:
        self._seen = self._stamp()
        table = read_table(self.path, required=("id", "response", self.rubric, f"{self.rubric}_reason", "rater"), scores=(self.rubric,))
        others = sorted({cell_text(r) for r in table["rater"].tolist()} - {self.rater})
        if others:
            raise DataError(f"{self.path}: holds scores by {others[0]!r}, you are {self.rater!r}; give your own name with --rater, or another --out")
        known = [(a.id, a.response.strip()) for a in self.sample.answers[: len(table)]]
        there = [(cell_text(i), cell_text(r).strip()) for i, r in zip(table["id"].tolist(), table["response"].tolist(), strict=True)]
        if known != there:
            raise DataError(f"{self.path}: holds scores of another sample; give the same file, --n and --seed as then, or another --out")
        reasons = [cell_text(r) for r in table[f"{self.rubric}_reason"].tolist()]
        scores = table[self.rubric].tolist()
        self.given = [Given(None if s != s else float(s), reason) for s, reason in zip(scores, reasons, strict=True)]


def _flush(path: Path) -> None:
    """Wait until a file's data, or a folder's names, are on the disk: after a power cut there is the old table or the new one."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
