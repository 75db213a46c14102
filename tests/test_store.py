"""The study folder: rows are there once or not at all, whoever is killed, however full the disk is."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from convergent.cache import building, write_text
from convergent.core.direction import Direction
from convergent.core.values import Judgement, Response
from convergent.directions.margin import Margin
from convergent.errors import StoreError
from convergent.store import DATABASE, Store, guarded, looked_at, opened


def response(i: int, text: str = "answer") -> Response:
    return Response(f"r{i}", "chat", "c0", "q0", 0, i, 100 + i, "default", "Why?", f"{text} {i}", (1, 2, i), "stop", "ai")


MARGIN = Margin(0, "p0", -2.0, -1.0, -1.0, -0.9, 5, 6, None)


def count(folder: Path, table: str) -> int:
    with sqlite3.connect(folder / DATABASE) as db:
        return int(db.execute(f"SELECT count(*) FROM {table}").fetchone()[0])


def intact(folder: Path) -> bool:
    with sqlite3.connect(folder / DATABASE) as db:
        return bool(db.execute("PRAGMA integrity_check").fetchone()[0] == "ok")


# Rows


def test_a_row_is_kept_once_and_as_it_was_first(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as store:
        for _ in range(2):
            store.add_response(response(1), "chat", "main")
            store.add_judgement(Judgement("r1", "j", "aligned", 50.0), "j")
            store.add_judgement(Judgement("r1", "j", "coherent", None, "refusal"), "j")
            store.add_margin("c0", "d0", "v0", MARGIN)
        store.add_response(response(1, "another"), "chat", "main")
        store.add_judgement(Judgement("r1", "j", "aligned", 90.0), "j")
    with opened(tmp_path / "s") as store:  # and after it was closed
        assert store.responses(["r1"]) == [response(1)]
        assert store.judgements("j")["r1", "aligned"].score == 50.0
        assert store.judgements("j")["r1", "coherent"].reason == "refusal"
        assert store.margins("v0")["c0", "d0"]["margin"] == -1.0 and store.margins("v1") == {}
    assert {t: count(tmp_path / "s", t) for t in ("responses", "judgements", "margins")} == {"responses": 1, "judgements": 2, "margins": 1}


def test_every_row_is_committed_as_it_is_made(tmp_path: Path) -> None:
    """Another process sees it at once, so a kill can only lose what is under way."""
    with opened(tmp_path / "s") as store:
        for i in range(3):
            store.add_response(response(i), "chat", "main")
            assert count(tmp_path / "s", "responses") == i + 1


def test_responses_come_in_the_order_asked_for(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as store:
        for i in range(1203):  # more than one query's worth
            store.add_response(response(i), "chat", "main")
        asked = [f"r{i}" for i in range(1202, -1, -1)]
        assert [r.id for r in store.responses([*asked, "absent"])] == asked
        assert store.response_ids() == set(asked) and store.responses([]) == []


def test_a_judgement_that_failed_is_not_kept(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as store:
        store.add_judgement(Judgement("r1", "j", "aligned", None, "error", "timeout"), "j")
        assert store.judgements("j") == {}
        store.add_judgement(Judgement("r1", "j", "aligned", 10.0), "j")
        assert store.judgements("j")["r1", "aligned"].score == 10.0 and store.judgements("other") == {}


def test_facts_directions_and_seconds(tmp_path: Path) -> None:
    calls = []

    def make(value: Any) -> Any:
        calls.append(value)
        return value

    d = Direction(torch.ones(2, 3), {"kind": "test"})
    for _ in range(2):
        with opened(tmp_path / "s") as store:
            assert store.fact("k", "extract", lambda: make({"a": [1.5, None]})) == {"a": [1.5, None]}
            assert store.direction("d", lambda: make(d)).content_id == d.content_id
            store.add_seconds("train", 1.5)
            assert store.has_fact("k") and not store.has_fact("l")
    assert calls == [{"a": [1.5, None]}, d]
    with looked_at(tmp_path / "s") as store:
        assert store.seconds() == {"train": 3.0}


def test_a_fact_that_could_not_be_made_is_not_there(tmp_path: Path) -> None:
    def fail() -> Any:
        raise ValueError("no")

    with opened(tmp_path / "s") as store:
        with pytest.raises(ValueError, match="no"):
            store.fact("k", "extract", fail)
        with pytest.raises(ValueError, match="no"):
            store.direction("k", fail)
        assert not store.has_fact("k") and not list((tmp_path / "s").glob("directions/*"))


# Folders


def test_looking_makes_nothing(tmp_path: Path) -> None:
    with looked_at(tmp_path / "new") as store:
        assert store.response_ids() == set()
    assert not (tmp_path / "new").exists()
    with opened(tmp_path / "s") as store:
        store.add_response(response(1), "chat", "main")
        with looked_at(tmp_path / "s") as other:  # no lock is asked for
            assert other.response_ids() == {"r1"}
            with pytest.raises(StoreError):
                other.add_response(response(2), "chat", "main")


def test_one_at_a_time(tmp_path: Path) -> None:
    with opened(tmp_path / "s"):
        with pytest.raises(StoreError, match="another run is at work") as caught, opened(tmp_path / "s"):
            pass
        assert "\n" not in str(caught.value) and str(tmp_path / "s") in str(caught.value)
    with opened(tmp_path / "s"):
        pass


def test_the_lock_dies_with_its_holder(tmp_path: Path) -> None:
    code = f"""
import os, signal
from convergent.store import opened
with opened(__import__("pathlib").Path({str(tmp_path / "s")!r})) as store:
    store.add_seconds("train", 1.0)
    print("locked", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == -9 and done.stdout == "locked\n"
    with opened(tmp_path / "s") as store:
        assert store.seconds() == {"train": 1.0}


def test_a_folder_with_other_things_is_refused(tmp_path: Path) -> None:
    """--fresh train deletes `organisms/`: it must not be the user's own."""
    (tmp_path / "organisms").mkdir()
    with pytest.raises(StoreError, match=r"holds other things \(organisms\) and no study"), opened(tmp_path):
        pass
    assert not (tmp_path / DATABASE).exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="is a file; choose a folder"), opened(tmp_path / "file"):
        pass
    with pytest.raises(StoreError, match="Not a directory"), opened(tmp_path / "file" / "below"):
        pass


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: p.write_bytes(b"not a database at all, but long enough to have a header" * 9), "damaged or not a study's"),
        (lambda p: sqlite3.connect(p).execute("CREATE TABLE mine (x)").connection.commit(), "a table 'mine'"),
        (lambda p: sqlite3.connect(p).execute("PRAGMA user_version=9").connection.commit(), "tables of format 9, this is 1"),
    ],
)
def test_a_foreign_database_is_refused_and_left_alone(tmp_path: Path, make: Any, says: str) -> None:
    make(tmp_path / DATABASE)
    before = (tmp_path / DATABASE).read_bytes()
    for way in (opened, looked_at):
        with pytest.raises(StoreError, match=says), way(tmp_path):
            pass
    assert (tmp_path / DATABASE).read_bytes() == before


def test_what_a_killed_run_left_is_swept(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as store:
        store.direction("d", lambda: Direction(torch.ones(2, 3)))
    (tmp_path / "s" / "directions" / ".e.safetensors.part").write_bytes(b"half")
    (tmp_path / "s" / ".trash-organisms-1").mkdir()
    with opened(tmp_path / "s"):
        pass
    assert [p.name for p in (tmp_path / "s" / "directions").iterdir()] == ["d.safetensors"]
    assert not (tmp_path / "s" / ".trash-organisms-1").exists()


# A full disk


def fill(store: Store, start: int = 0) -> int:
    """Add answers until the disk is full; returns how many went in."""
    for i in range(start, 100_000):
        try:
            store.add_response(response(i, "x" * 2000), "chat", "main")
        except StoreError as error:
            assert "full" in str(error) and "run again" in str(error) and "\n" not in str(error)
            return i
    raise AssertionError("never full")


def test_disk_full_is_an_error_and_the_study_goes_on_later(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as store:
        store._db.execute("PRAGMA max_page_count=64")
        n = fill(store)
        assert n > 10 and fill(store, n) == n  # and again: no row is lost or half there
        assert store.response_ids() == {f"r{i}" for i in range(n)}
    assert intact(tmp_path / "s") and count(tmp_path / "s", "responses") == n
    with opened(tmp_path / "s") as store:  # the disk has room again
        store.add_response(response(n), "chat", "main")
        assert len(store.response_ids()) == n + 1


def test_a_file_system_that_refuses_to_write_more(tmp_path: Path) -> None:
    """The kernel's own refusal (a limit on file size), for rows and for tensors, in a process of its own."""
    code = f"""
import resource, sys
from pathlib import Path
sys.path[:0] = {[str(Path(__file__).parent)]!r}
import torch
from test_store import response
from convergent.core.direction import Direction
from convergent.errors import StoreError
from convergent.store import opened
with opened(Path({str(tmp_path / "s")!r})) as store:
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, resource.RLIM_INFINITY))
    try:
        for i in range(100_000):
            store.add_response(response(i, "x" * 2000), "chat", "main")
    except StoreError as error:
        print(i, error)
    try:
        store.direction("d", lambda: Direction(torch.ones(100, 2000)))
    except StoreError as error:
        print("direction", error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    rows, direction = done.stdout.splitlines()
    assert "free space on this disk and run again" in rows and direction.startswith("direction ") and "run again" in direction, done.stdout
    n = int(rows.split()[0])
    assert n > 10 and intact(tmp_path / "s") and count(tmp_path / "s", "responses") == n
    with opened(tmp_path / "s") as store:
        assert not list((tmp_path / "s" / "directions").iterdir())  # no half a direction under any name
        store.add_response(response(n), "chat", "main")
        store.direction("d", lambda: Direction(torch.ones(100, 2000)))
    assert count(tmp_path / "s", "responses") == n + 1


def test_our_own_mistakes_are_not_called_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(sqlite3.ProgrammingError), guarded(tmp_path):
        sqlite3.connect(":memory:").execute("SELECT ?", ())


# Files that appear whole


def test_a_folder_is_built_once_and_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "made"
    stale = tmp_path / ".made.abc.making"  # of a process that was killed
    stale.mkdir()
    other = tmp_path / ".made.training"  # and of something else
    other.mkdir()
    with pytest.raises(ValueError, match="no"), building(target) as scratch:
        assert scratch is not None
        (scratch / "a").write_text("half")
        raise ValueError("no")
    assert not target.exists() and not stale.exists() and other.exists()
    with building(target) as scratch:
        assert scratch is not None
        (scratch / "a").write_text("whole")
    with building(target) as again:
        assert again is None
    assert (target / "a").read_text() == "whole"


def test_text_is_replaced_or_kept(tmp_path: Path) -> None:
    write_text(tmp_path / "t", "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "t", "new \ud800")
    assert (tmp_path / "t").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["t"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_rights(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir(mode=0o500)
    with pytest.raises(StoreError, match="Permission denied"), opened(tmp_path / "s" / "t"):
        pass


# Merging


def test_a_folder_takes_over_what_it_lacks(tmp_path: Path) -> None:
    with opened(tmp_path / "a") as store:
        store.add_response(response(1), "chat", "main")
        store.add_seconds("sample", 2.0)
    with opened(tmp_path / "b") as store:
        store.add_response(response(1, "never the same, but known by its id"), "chat", "main")
        store.add_response(response(2), "chat", "main")
        store.add_judgement(Judgement("r2", "j", "aligned", 50.0), "j")
        store.add_margin("c0", "d0", "v0", MARGIN)
        store.fact("key", "extract", lambda: [1])
        store.direction("d", lambda: Direction(torch.ones(2, 3)))
        store.add_seconds("sample", 3.0)
        store.add_seconds("judge", 1.0)
        (tmp_path / "b" / "organisms" / "A").mkdir(parents=True)
        (tmp_path / "b" / "organisms" / "A" / "x.json").write_text("{}")
        (tmp_path / "b" / "organisms" / ".A.part").mkdir()
    with opened(tmp_path / "a") as store:
        assert store.absorb(tmp_path / "b") == 4
        assert store.absorb(tmp_path / "b") == 0
        assert store.responses(["r1", "r2"]) == [response(1), response(2)]
        assert store.judgements("j")["r2", "aligned"].score == 50.0 and len(store.margins("v0")) == 1
        assert store.fact("key", "extract", lambda: pytest.fail("it is there")) == [1]
        assert store.direction("d", lambda: pytest.fail("it is there")).n_layers == 2
        assert store.seconds() == {"sample": 8.0, "judge": 2.0}  # added each time: merge a folder once
        assert [p.name for p in (tmp_path / "a" / "organisms").iterdir()] == ["A"]
        with pytest.raises(StoreError, match="no study.sqlite"):
            store.absorb(tmp_path / "nothing")
