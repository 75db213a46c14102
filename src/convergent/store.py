"""The study folder: SQLite for rows, safetensors for tensors, a manifest for provenance.

    study.sqlite      responses, judgements, margins, facts, seconds, memory (WAL; every row is committed as it is made)
    organisms/        PEFT folders
    directions/       safetensors, named by content
    manifest.json     versions, seeds, checksums
    report.html, tables/

Rows are keyed by content, so `INSERT OR IGNORE` makes a repeated row impossible and a resumed run asks only for what is absent. One process
at a time: the lock is the operating system's and dies with its holder.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from convergent.cache import rights_of_folder
from convergent.core.direction import Direction
from convergent.core.values import Judgement, Response
from convergent.errors import StoreError

if TYPE_CHECKING:
    from convergent.directions.margin import Margin

T = TypeVar("T")
DATABASE, LOCK = "study.sqlite", ".lock"
VERSION = 1
"""Of the tables; kept in the database's `user_version`."""

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
    condition_id TEXT NOT NULL, data_id TEXT NOT NULL, read_id TEXT NOT NULL, pair_id TEXT NOT NULL,
    bad REAL NOT NULL, good REAL NOT NULL, margin REAL NOT NULL, margin_matched REAL NOT NULL, n_bad INTEGER NOT NULL, n_good INTEGER NOT NULL, projection REAL,
    PRIMARY KEY (condition_id, data_id, read_id));
CREATE TABLE IF NOT EXISTS facts (key TEXT PRIMARY KEY, stage TEXT NOT NULL, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS seconds (stage TEXT PRIMARY KEY, seconds REAL NOT NULL);
CREATE TABLE IF NOT EXISTS memory (stage TEXT PRIMARY KEY, resident REAL NOT NULL, device REAL NOT NULL, so_far INTEGER NOT NULL);
"""
_NAMES = {"responses", "judgements", "margins", "facts", "seconds", "memory"}
_KEEP_HIGHEST = """ON CONFLICT (stage) DO UPDATE SET
    so_far = CASE WHEN excluded.resident > resident THEN excluded.so_far WHEN excluded.resident < resident THEN so_far ELSE min(so_far, excluded.so_far) END,
    resident = max(resident, excluded.resident), device = max(device, excluded.device)"""

# What a stage made, and what was made from that: ids name what goes in, so a later stage would not notice that its input was made anew.
# Judging is the exception: directions are keyed by the classes that the scores lead to.
_MADE_BY: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "train": (("responses", "judgements", "margins"), ("organisms", "directions")),
    "sample": (("responses", "judgements"), ("directions",)),
    "judge": (("judgements",), ()),
    "extract": ((), ("directions",)),
    "margin": (("margins",), ()),
}


class Store:
    """An open study folder. Use `opened` or `looked_at`."""

    def __init__(self, folder: Path, connection: sqlite3.Connection) -> None:
        self.folder = folder
        self._db = connection
        self._mutex = threading.Lock()  # a judge may report from several threads
        self._judged: dict[str, dict[tuple[str, str], Judgement]] = {}  # asked for once per reading; nobody else writes

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
        ids = list(ids)
        known: dict[str, Response] = {}
        for start in range(0, len(ids), 500):  # SQLite bounds the number of parameters
            part = ids[start : start + 500]
            for r in self._read(f"SELECT * FROM responses WHERE id IN ({', '.join('?' * len(part))})", part):
                known[r[0]] = Response(
                    id=r[0], condition=r[1], condition_id=r[2], question_id=r[5], paraphrase=r[6], sample=r[7], seed=r[8], system=r[9],
                    question=r[10], response=r[11], token_ids=tuple(json.loads(r[12])), finish=r[14], topic=r[15],
                )  # fmt: skip
        return [known[i] for i in ids if i in known]

    # judgements

    def add_judgement(self, j: Judgement, judge: str) -> None:
        """Commit one judgement under the judge's id. One that failed with an error is not kept: the next run asks again."""
        if j.reason != "error":
            row = (j.response_id, judge, j.rubric, j.score, j.reason, j.raw)
            self._write("INSERT OR IGNORE INTO judgements VALUES (?, ?, ?, ?, ?, ?)", [row])
            if judge in self._judged:
                self._judged[judge].setdefault((j.response_id, j.rubric), Judgement(j.response_id, judge, j.rubric, j.score, j.reason, j.raw))

    def judgements(self, judge: str) -> Mapping[tuple[str, str], Judgement]:
        """(response id, rubric) -> judgement, for one judge's id; a view that grows with what is added."""
        if judge not in self._judged:
            rows = self._read("SELECT response_id, judge, rubric, score, reason, raw FROM judgements WHERE judge = ?", (judge,))
            self._judged[judge] = {(r[0], r[2]): Judgement(*r) for r in rows}
        return MappingProxyType(self._judged[judge])

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

    # facts, seconds and tensors

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

    def add_seconds(self, stage: str, seconds: float) -> None:
        """Add to the time that a stage took, over all runs of this folder."""
        self._write(
            "INSERT INTO seconds VALUES (?, ?) ON CONFLICT (stage) DO UPDATE SET seconds = seconds + excluded.seconds", [(stage, seconds)]
        )

    def seconds(self) -> dict[str, float]:
        """Stage -> seconds of work over all runs of this folder."""
        return dict(self._read("SELECT stage, seconds FROM seconds ORDER BY stage"))

    def add_memory(self, stage: str, resident: float, device: float, so_far: bool) -> None:
        """Keep the highest peak of a stage over all runs of this folder; see `study.peak` for the numbers."""
        self._write(f"INSERT INTO memory VALUES (?, ?, ?, ?) {_KEEP_HIGHEST}", [(stage, resident, device, int(so_far))])

    def memory(self) -> dict[str, tuple[float, float, bool]]:
        """Stage -> (resident, device, so_far); nothing of a stage that an earlier version ran, which kept no such thing."""
        with self._mutex, guarded(self.folder):
            if "memory" not in _tables(self._db):
                return {}
        return {r[0]: (r[1], r[2], bool(r[3])) for r in self._read("SELECT stage, resident, device, so_far FROM memory ORDER BY stage")}

    def forget_seconds(self) -> None:
        """Drop the times, for a copy whose own are to be added to the first folder's."""
        self._write("DELETE FROM seconds WHERE true", [()])

    def direction(self, key: str, make: Callable[[], Direction]) -> Direction:
        """A direction computed once per content key."""
        path = self.folder / "directions" / f"{key}.safetensors"
        if not path.is_file():
            made = make()
            with guarded(self.folder):
                made.save(path)
        return Direction.load(path)

    def tensors(self, key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Named tensors computed once per content key."""
        path = self.folder / "directions" / f"{key}.tensors.safetensors"
        if not path.is_file():
            made = make()
            with guarded(self.folder):
                path.parent.mkdir(parents=True, exist_ok=True)
                part = path.with_name(f".{path.name}.part")
                save_file(made, part)
                rights_of_folder(part)
                part.replace(path)
        with guarded(self.folder):
            return load_file(path)

    def absorb(self, other: Path) -> int:
        """Take over what another folder of the same study has and this one lacks, and add its times; returns the number of rows taken.

        Everything is keyed by content, so what both have is the same; of memory the higher peak stays. The other folder stays as it is.
        Raises StoreError if it is no study's.
        """
        if not (other / DATABASE).is_file():
            raise StoreError(f"{other}: not a study folder (no {DATABASE}); give the --out of a run")
        with looked_at(other):  # of our format
            pass
        n = 0
        self._judged.clear()
        with self._mutex, guarded(self.folder):
            self._db.execute("ATTACH DATABASE ? AS other", (str(other / DATABASE),))
            try:
                with self._db:
                    for table in ("responses", "judgements", "margins", "facts"):
                        n += self._db.execute(f"INSERT OR IGNORE INTO main.{table} SELECT * FROM other.{table}").rowcount
                    # WHERE true: or SQLite takes the conflict clause for a join's.
                    self._db.execute(
                        "INSERT INTO main.seconds SELECT * FROM other.seconds WHERE true ON CONFLICT (stage) DO UPDATE SET seconds = seconds + excluded.seconds"
                    )
                    if self._db.execute("SELECT 1 FROM other.sqlite_master WHERE type = 'table' AND name = 'memory'").fetchone():
                        self._db.execute(f"INSERT INTO main.memory SELECT * FROM other.memory WHERE true {_KEEP_HIGHEST}")
            finally:
                self._db.execute("DETACH DATABASE other")
        with guarded(self.folder):
            for folder in ("organisms", "directions"):
                for found in sorted((other / folder).glob("[!.]*")):
                    target = self.folder / folder / found.name
                    if target.exists() or found.suffix == ".lock":
                        continue
                    target.parent.mkdir(parents=True, exist_ok=True)
                    part = target.with_name(f".{target.name}.part")  # a kill must not leave half of one under its name
                    if found.is_dir():
                        shutil.rmtree(part, ignore_errors=True)
                        shutil.copytree(found, part)
                    else:
                        shutil.copyfile(found, part)
                    part.replace(target)
        return n

    def forget(self, stage: str) -> int:
        """Drop what a stage made ("train", "sample", "judge", "extract" or "margin") and what was made from that.

        Returns the number of rows and folder entries dropped.
        """
        tables, folders = _MADE_BY[stage]
        n = 0
        self._judged.clear()
        with self._mutex, guarded(self.folder), self._db:
            for table in tables:
                n += self._db.execute(f"DELETE FROM {table}").rowcount
            if "directions" in folders:
                n += self._db.execute("DELETE FROM facts WHERE stage = 'extract'").rowcount
        with guarded(self.folder):
            for name in folders:
                path = self.folder / name
                if path.is_dir():
                    # Renamed first: a kill in the middle must not leave half an organism under its name.
                    trash = self.folder / f".trash-{name}-{os.getpid()}"
                    n += sum(not p.name.startswith(".") and p.suffix != ".lock" for p in path.iterdir())
                    path.replace(trash)
                    shutil.rmtree(trash)
        return n


def _mend(error: sqlite3.Error) -> str:
    """What to do about an error of SQLite."""
    name = getattr(error, "sqlite_errorname", "") or ""
    if name.startswith(("SQLITE_FULL", "SQLITE_IOERR")):
        return "every finished row is kept; free space on this disk and run again"
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return "another program holds it; close that one and run again"
    if name.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM")):
        return "give it rights to be written, or choose another folder"
    return "it is damaged or not a study's; move it away or choose another folder"


@contextmanager
def guarded(folder: Path) -> Iterator[None]:
    """Turn a full disk, missing rights or a damaged file into a StoreError. Misuse of SQLite by us is not one."""
    try:
        yield
    except (sqlite3.OperationalError, sqlite3.DatabaseError) as error:
        if isinstance(error, sqlite3.ProgrammingError | sqlite3.InterfaceError):
            raise
        raise StoreError(f"{folder / DATABASE}: {error}; {_mend(error)}") from error
    except (OSError, SafetensorError) as error:
        place = getattr(error, "filename", None) or folder
        why = getattr(error, "strerror", None) or error
        raise StoreError(f"{place}: {why}; what was finished is kept, mend this or choose another folder, and run again") from error


@contextmanager
def opened(folder: Path) -> Iterator[Store]:
    """Open (or make) a study folder and hold its lock for the time of the body.

    Raises StoreError if another run holds the lock or the folder holds something else.
    """
    _check_folder(folder)
    with guarded(folder):
        folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(str(folder / LOCK), timeout=0)
    try:
        with guarded(folder):
            try:
                lock.acquire()
            except Timeout:  # itself an OSError
                raise StoreError(f"{folder}: another run is at work in this folder; wait for it, or choose another folder") from None
            for stale in (*folder.glob(".trash-*"), *folder.glob("directions/.*.part")):  # of a killed run
                shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
        with _connected(folder / DATABASE) as connection:
            with guarded(folder):
                connection.execute("PRAGMA journal_mode=WAL")
                connection.execute("PRAGMA synchronous=NORMAL")
                connection.executescript(_TABLES)
                connection.execute(f"PRAGMA user_version={VERSION}")
            yield Store(folder, connection)
    finally:
        lock.release()


@contextmanager
def looked_at(folder: Path) -> Iterator[Store]:
    """The store of a folder to read from, without its lock and without making anything; an empty one if there is none."""
    _check_folder(folder)
    if (folder / DATABASE).is_file():
        with _connected(folder / DATABASE) as connection:
            with guarded(folder):
                connection.execute("PRAGMA query_only=ON")
            if _tables(connection):
                yield Store(folder, connection)
                return
    with _connected(":memory:") as connection:
        connection.executescript(_TABLES)
        yield Store(folder, connection)


@contextmanager
def _connected(path: Path | str) -> Iterator[sqlite3.Connection]:
    """A connection to a database that is ours or empty. Raises StoreError for any other."""
    folder = Path(path).parent
    with guarded(folder):
        connection = sqlite3.connect(path, check_same_thread=False)
    try:
        with guarded(folder):
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            foreign = _tables(connection) - _NAMES
        if version not in (0, VERSION) or foreign:
            what = f"tables of format {version}, this is {VERSION}" if version not in (0, VERSION) else f"a table {min(foreign)!r}"
            raise StoreError(f"{path}: not a study's database ({what}); choose another folder")
        yield connection
    finally:
        connection.close()


def _tables(connection: sqlite3.Connection) -> set[str]:
    return {r[0] for r in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


def _check_folder(folder: Path) -> None:
    """Raise StoreError unless `folder` is absent, empty or a study's: runs write and --fresh deletes in it."""
    with guarded(folder):
        if folder.exists() and not folder.is_dir():
            raise StoreError(f"{folder}: is a file; choose a folder")
        if folder.is_dir() and not (folder / DATABASE).is_file():
            other = next((p.name for p in sorted(folder.iterdir()) if p.name != LOCK), None)
            if other is not None:
                raise StoreError(f"{folder}: holds other things ({other}) and no study; choose an empty or a new folder")
