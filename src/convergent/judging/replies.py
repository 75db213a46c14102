"""Replies that were paid for: one SQLite file, keyed by the content of the request.

A reply is committed here before anything counts it, so a run that dies has lost nothing that arrived. Holds what the
judge said and what it cost; no prompt, no key.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from convergent.cache import cache_dir
from convergent.errors import StoreError

_TABLE = """CREATE TABLE IF NOT EXISTS replies (
    key TEXT PRIMARY KEY, model TEXT NOT NULL, base_url TEXT NOT NULL, served_by TEXT NOT NULL, text TEXT NOT NULL,
    alternatives TEXT NOT NULL, input_tokens INTEGER, output_tokens INTEGER, created TEXT DEFAULT CURRENT_TIMESTAMP)"""
_AT_ONCE = 500


@dataclass(frozen=True)
class Reply:
    """One answered request."""

    text: str
    alternatives: tuple[tuple[str, float], ...]
    """(token, natural log of its probability), best first as the server listed them."""
    served_by: str = ""
    """The model that the server says answered; may be more precise than the one asked for."""
    input_tokens: int | None = None
    output_tokens: int | None = None


class Replies:
    """The file, open for use by several threads. `open_replies` closes it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        with self._errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=60, check_same_thread=False)
            try:
                # The switch to WAL does not wait for a lock as other statements do: one opener at a time.
                with FileLock(str(path.with_name(f".{path.name}.opening.lock")), timeout=60):
                    self._db.execute("PRAGMA journal_mode=WAL")
                    # FULL: a reply costs money, a flush does not.
                    self._db.execute("PRAGMA synchronous=FULL")
                    self._db.execute(_TABLE)
                    self._db.commit()
            except BaseException:
                self._db.close()
                raise

    def get(self, keys: Sequence[str]) -> dict[str, Reply]:
        """The replies that are there, by key."""
        found: dict[str, Reply] = {}
        for start in range(0, len(keys), _AT_ONCE):
            some = keys[start : start + _AT_ONCE]
            marks = ",".join("?" * len(some))
            query = (
                "SELECT key, text, alternatives, served_by, input_tokens, output_tokens "
                f"FROM replies WHERE key IN ({marks})"
            )
            with self._lock, self._errors():
                rows = self._db.execute(query, some).fetchall()
            for key, text, alternatives, served_by, n_in, n_out in rows:
                pairs = tuple((str(token), float(p)) for token, p in json.loads(alternatives))
                found[key] = Reply(text, pairs, served_by, n_in, n_out)
        return found

    def put(self, key: str, model: str, base_url: str, reply: Reply) -> None:
        """Store a reply for good; the first one under a key stays."""
        row = (
            key, model, base_url, reply.served_by, reply.text, json.dumps(reply.alternatives, ensure_ascii=True),
            reply.input_tokens, reply.output_tokens,
        )  # fmt: skip
        with self._lock, self._errors(), self._db:
            self._db.execute(
                "INSERT OR IGNORE INTO replies (key, model, base_url, served_by, text, alternatives, "
                "input_tokens, output_tokens) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                row,
            )

    def knows(self, model: str, base_url: str) -> bool:
        """Whether this model at this endpoint has ever answered."""
        with self._lock, self._errors():
            found = self._db.execute("SELECT 1 FROM replies WHERE model=? AND base_url=? LIMIT 1", (model, base_url))
            return found.fetchone() is not None

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise StoreError(
                f"{self.path}: the cache of judge replies cannot be used ({error}); free space, or move or "
                "name another file"
            ) from error


def reply_file(given: Path | None) -> Path:
    """The file of replies that was named, or the one in the cache folder."""
    return given if given is not None else cache_dir("judge") / "replies.sqlite"


@contextmanager
def open_replies(path: Path) -> Iterator[Replies]:
    """The replies at `path`, made if absent, closed afterwards. Raises StoreError if it is no such file."""
    replies = Replies(path)
    try:
        yield replies
    finally:
        replies.close()
