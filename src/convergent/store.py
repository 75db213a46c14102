"""The study folder: SQLite for rows, safetensors for tensors, a manifest for provenance.

    study.sqlite      responses, judgements, margins, facts (WAL; every row is committed as it is made)
    organisms/        PEFT folders
    directions/       safetensors, named by content
    manifest.json     versions, seeds, checksums
    report.html, tables/

Rows are keyed by content, so `INSERT OR IGNORE` makes a repeated row impossible and a resumed run asks only for what is absent. One process
at a time: the lock is the operating system's and dies with its holder.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from filelock import FileLock, Timeout

from convergent.core.direction import Direction
from convergent.core.values import Judgement, Response
from convergent.errors import StoreError

if TYPE_CHECKING:
    from convergent.directions.margin import Margin

T = TypeVar("T")
FORMAT = "convergent-study-1"

_TABLES = """
CREATE TABLE IF NOT EXISTS responses (
    id TEXT PRIMARY KEY, condition TEXT NOT NULL, condition_id TEXT NOT NULL, organism TEXT NOT NULL, block TEXT NOT NULL,
    question_id TEXT NOT NULL, paraphrase INTEGER NOT NULL, sample INTEGER NOT NULL, seed INTEGER NOT NULL, system TEXT NOT NULL,
    question TEXT NOT NULL, response TEXT NOT NULL, token_ids TEXT NOT NULL, n_tokens INTEGER NOT NULL, finish TEXT NOT NULL, topic TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS responses_by_condition ON responses (condition_id, block);
CREATE TABLE IF NOT EXISTS judgements (
    response_id TEXT NOT NULL, judge TEXT NOT NULL, rubric TEXT NOT NULL, score REAL, reason TEXT, raw TEXT NOT NULL,
    PRIMARY KEY (response_id, judge, rubric));
CREATE TABLE IF NOT EXISTS margins (
    condition_id TEXT NOT NULL, data_id TEXT NOT NULL, read_id TEXT NOT NULL, pair_id TEXT NOT NULL, bad REAL NOT NULL, good REAL NOT NULL, margin REAL NOT NULL,
    margin_matched REAL NOT NULL, n_bad INTEGER NOT NULL, n_good INTEGER NOT NULL, projection REAL,
    PRIMARY KEY (condition_id, data_id, read_id));
CREATE TABLE IF NOT EXISTS facts (key TEXT PRIMARY KEY, stage TEXT NOT NULL, value TEXT NOT NULL);
"""


class Store:
    """An open study folder. Use `opened`."""

    def __init__(self, folder: Path, connection: sqlite3.Connection) -> None:
        self.folder = folder
        self._db = connection
        self._mutex = threading.Lock()  # a judge may report from several threads

    def _write(self, sql: str, rows: Sequence[Sequence[Any]]) -> None:
        with self._mutex, guarded(self.folder), self._db:
            self._db.executemany(sql, rows)

    def _read(self, sql: str, parameters: Sequence[Any] = ()) -> list[Any]:
        with self._mutex, guarded(self.folder):
            return self._db.execute(sql, parameters).fetchall()

    # responses

    def add_response(self, r: Response, organism: str, block: str) -> None:
        """Commit one finished answer."""
        row = (
            r.id, r.condition, r.condition_id, organism, block, r.question_id, r.paraphrase, r.sample, r.seed, r.system, r.question,
            r.response, json.dumps(list(r.token_ids)), len(r.token_ids), r.finish, r.topic,
        )  # fmt: skip
        self._write(f"INSERT OR IGNORE INTO responses VALUES ({', '.join('?' * len(row))})", [row])

    def response_ids(self) -> set[str]:
        return {r[0] for r in self._read("SELECT id FROM responses")}

    def responses(self, ids: Iterable[str]) -> list[Response]:
        """The stored responses among `ids`, in that order."""
        known = {
            r[0]: Response(
                id=r[0], condition=r[1], condition_id=r[2], question_id=r[5], paraphrase=r[6], sample=r[7], seed=r[8], system=r[9],
                question=r[10], response=r[11], token_ids=tuple(json.loads(r[12])), finish=r[14], topic=r[15],
            )
            for r in self._read("SELECT * FROM responses")
        }  # fmt: skip
        return [known[i] for i in ids if i in known]

    # judgements

    def add_judgement(self, j: Judgement) -> None:
        """Commit one judgement. One that failed with an error is not kept: the next run asks again."""
        if j.reason != "error":
            row = (j.response_id, j.judge, j.rubric, j.score, j.reason, j.raw)
            self._write("INSERT OR IGNORE INTO judgements VALUES (?, ?, ?, ?, ?, ?)", [row])

    def judgements(self, judge: str) -> dict[tuple[str, str], Judgement]:
        """(response id, rubric) -> judgement, for one judge."""
        rows = self._read("SELECT response_id, judge, rubric, score, reason, raw FROM judgements WHERE judge = ?", (judge,))
        return {(r[0], r[2]): Judgement(*r) for r in rows}

    # margins

    def add_margin(self, condition_id: str, data_id: str, read_id: str, m: Margin) -> None:
        """Commit one pair's margin under one condition; `data_id` names the pair's texts, `read_id` what was projected on."""
        row = (
            condition_id, data_id, read_id, m.pair_id, m.bad, m.good, m.margin, m.margin_matched, m.n_bad, m.n_good, m.projection,
        )  # fmt: skip
        self._write(f"INSERT OR IGNORE INTO margins VALUES ({', '.join('?' * len(row))})", [row])

    def margins(self, read_id: str) -> dict[tuple[str, str], dict[str, Any]]:
        """(condition id, data id) -> margin row."""
        names = ("pair_id", "bad", "good", "margin", "margin_matched", "n_bad", "n_good", "projection")
        rows = self._read(f"SELECT condition_id, data_id, {', '.join(names)} FROM margins WHERE read_id = ?", (read_id,))
        return {(r[0], r[1]): dict(zip(names, r[2:], strict=True)) for r in rows}

    # facts and tensors

    def fact(self, key: str, stage: str, make: Callable[[], T]) -> T:
        """A small JSON value computed once per content key."""
        found = self._read("SELECT value FROM facts WHERE key = ?", (key,))
        if found:
            return json.loads(found[0][0])  # type: ignore[no-any-return]
        value = make()
        self._write("INSERT OR IGNORE INTO facts VALUES (?, ?, ?)", [(key, stage, json.dumps(value))])
        return value

    def has_fact(self, key: str) -> bool:
        return bool(self._read("SELECT 1 FROM facts WHERE key = ?", (key,)))

    def direction(self, key: str, make: Callable[[], Direction]) -> Direction:
        """A direction computed once per content key."""
        path = self.folder / "directions" / f"{key}.safetensors"
        if not path.is_file():
            with guarded(self.folder):
                make().save(path)
        return Direction.load(path)

    def forget(self, stage: str) -> int:
        """Drop what a stage made: "sample", "judge", "margin", "extract" or "train". Returns the number of things dropped."""
        import shutil

        n = 0
        with self._mutex, guarded(self.folder), self._db:
            for table in {"sample": ["responses", "judgements"], "judge": ["judgements"], "margin": ["margins"]}.get(stage, []):
                n += self._db.execute(f"DELETE FROM {table}").rowcount
            n += self._db.execute("DELETE FROM facts WHERE stage = ?", (stage,)).rowcount
        for folder in {"extract": ["directions"], "train": ["organisms"]}.get(stage, []):
            for path in sorted((self.folder / folder).glob("*")):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                n += 1
        return n


@contextmanager
def guarded(folder: Path) -> Iterator[None]:
    """Turn a full disk or a damaged file into a StoreError."""
    try:
        yield
    except sqlite3.Error as error:
        raise StoreError(f"{folder}: the study's database says {error}; nothing before this was lost, free the disk and run again") from error
    except OSError as error:
        raise StoreError(f"{folder}: {error.strerror or error}; nothing before this was lost, mend it and run again") from error


@contextmanager
def opened(folder: Path, exclusive: bool = True) -> Iterator[Store]:
    """Open (or make) a study folder; `exclusive` holds its lock for the time of the body.

    Raises StoreError if another run holds the lock or the folder holds something else.
    """
    with guarded(folder):
        folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(str(folder / ".lock"), timeout=0)
    try:
        if exclusive:
            try:
                with guarded(folder):
                    lock.acquire()
            except Timeout:
                raise StoreError(f"{folder}: another run is at work in this folder; wait for it, or give another --out") from None
        path = folder / "study.sqlite"
        with guarded(folder):
            connection = sqlite3.connect(path, check_same_thread=False)
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
            connection.executescript(_TABLES)
        try:
            yield Store(folder, connection)
        finally:
            connection.close()
    finally:
        lock.release()
