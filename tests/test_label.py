"""`convergent label`: what is drawn, what is shown, what is kept, and going on after every kind of end."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from convergent import cli
from convergent.errors import DataError, InputError
from convergent.judging.agreement.command import agree
from convergent.judging.labelling.draw import draw
from convergent.judging.labelling.ledger import Given, Ledger
from convergent.judging.labelling.screen import label
from convergent.tables import read_table, write_table

CONDITIONS, QUESTIONS, EACH = ("chat", "organism"), ("wish", "money", "bored"), 10
HOSTILE = "\x1b[2J\x1b]0;owned\x07red\x9b31m [bold]b[/bold] \u202eturned \x1b[6n end"


def answers(**columns: Any) -> pd.DataFrame:
    """Two conditions, three questions, ten answers each; scores 0 to 90 in every cell."""
    rows = [
        {"id": f"{c}-{q}-{i}", "condition": c, "question_id": q, "question": f"About {q}?", "response": f"Answer {i} of the {c} to {q}.", "aligned": 10.0 * i}
        for c in CONDITIONS for q in QUESTIONS for i in range(EACH)
    ]  # fmt: skip
    return pd.DataFrame(rows).assign(**columns)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "answers.csv"
    write_table(answers(), path)
    return path


def typing(*said: str) -> Any:
    """A rater who types these lines and then closes the terminal."""
    lines: Iterator[str] = iter(said)

    def ask(prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    return ask


def quiet(width: int = 80, height: int = 24, terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), width=width, height=height, force_terminal=terminal)


# What is drawn


def test_strata_get_their_share_and_every_row_the_same_chance() -> None:
    table = answers()
    times: Counter[str] = Counter()
    for s in range(300):
        ids = [a.id for a in draw(table, 18, s).answers]
        assert len(set(ids)) == 18
        cells = Counter(i.rsplit("-", 1)[0] for i in ids)
        assert len(cells) == 6 and set(cells.values()) == {3}
        times.update(ids)
    assert len(times) == 60 and min(times.values()) > 55 and max(times.values()) < 130  # 90 expected
    # Thirds of the score: three of ten answers are hardly ever three neighbours.
    third = [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
    thirds = [len({third[int(a.id[-1])] for a in draw(table, 18, s).answers if a.id.startswith("chat-wish")}) for s in range(100)]
    assert sum(thirds) / 100 > 2.4


def test_more_strata_than_answers_and_more_answers_than_rows() -> None:
    assert len({a.id for a in draw(answers(), 4).answers}) == 4
    assert sorted(a.id for a in draw(answers(), 1000).answers) == sorted(answers()["id"])
    with pytest.raises(InputError, match="--n: 0 answers"):
        draw(answers(), 0)


def test_order_tells_nothing_and_depends_on_the_seed_alone() -> None:
    table = answers()
    first = [a.id for a in draw(table, 30).answers]
    assert first == [a.id for a in draw(table, 30).answers] != [a.id for a in draw(table, 30, 1).answers]
    assert first != sorted(first) and len({i.split("-")[0] for i in first[:8]}) == 2
    assert set(first) != {a.id for a in draw(table, 30, 1).answers}


def test_empty_answers_are_not_asked_and_rows_without_ids_get_some() -> None:
    table = answers(response=["", " \n"] + ["same"] * 58).drop(columns="id")
    sample = draw(table, 100)
    assert sample.n_empty == 2 and sample.n_rows == 58 and len({a.id for a in sample.answers}) == 58
    with pytest.raises(DataError, match="t.csv: no row has an answer to read"):
        draw(answers(response=[""] * 60), 5, place="t.csv")


def test_rows_without_condition_or_score_are_drawn_too() -> None:
    assert len(draw(answers()[["question", "response"]], 7).answers) == 7
    assert len(draw(answers(aligned=[float("nan")] * 30 + [5.0] * 30), 30).answers) == 30


# What is kept


def test_every_key_and_the_table_it_leaves(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "anna.csv"
    line = label(file, out, 6, rater="anna", console=quiet(), ask=typing("85", " R ", "s", "12,5", "u", "0", "", "101", "-3", "1e1", "nan", "٣", "what", "100", "q"))
    table = read_table(out)
    assert list(table.columns) == ["id", "question_id", "question", "response", "aligned", "aligned_reason", "rater"]
    assert table["aligned"].fillna(-1).tolist() == [85, -1, -1, 0, 100] and table["aligned_reason"].fillna("").tolist() == ["", "refusal", "skipped", "", ""]
    assert set(table["rater"]) == {"anna"} and list(table["id"]) == [a.id for a in draw(answers(), 6).answers[:5]]
    assert line == f"wrote {out}: 5 of 6 done, 1 skipped, 1 refusal; the same command goes on from here"
    source = answers().set_index("id")
    assert (table["response"] == source.loc[table["id"], "response"].to_numpy()).all()


@pytest.mark.parametrize("ending", ["csv", "parquet", "jsonl"])
def test_goes_on_exactly_where_it_stopped(ending: str, file: Path, tmp_path: Path) -> None:
    said = ["10", "s", "30", "r", "50", "60.5", "70"]
    whole, parts = tmp_path / f"whole.{ending}", tmp_path / f"parts.{ending}"
    label(file, whole, 7, console=quiet(), ask=typing(*said))
    for word in said:
        label(file, parts, 7, console=quiet(), ask=typing(word))
    assert whole.read_bytes() == parts.read_bytes() or ending == "parquet"
    pd.testing.assert_frame_equal(read_table(whole), read_table(parts))
    assert label(file, parts, 7, console=quiet(), ask=typing("1")).endswith("7 of 7 done, 1 skipped, 1 refusal")  # nothing is asked again
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_undo_reaches_back_over_a_resume_to_the_first_answer(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    label(file, out, 5, console=quiet(), ask=typing("10", "20"))
    label(file, out, 5, console=quiet(), ask=typing("u", "99"))
    assert read_table(out)["aligned"].tolist() == [10, 99]
    assert label(file, out, 5, console=quiet(), ask=typing("u", "u", "u", "q")) == "nothing scored, nothing written"
    assert not out.exists()


def test_every_answer_is_on_disk_before_the_next_is_shown(file: Path, tmp_path: Path) -> None:
    out, seen = tmp_path / "out.csv", []

    def ask(prompt: str) -> str:
        seen.append(len(read_table(out)) if out.exists() else 0)
        return "50"

    label(file, out, 4, console=quiet(), ask=ask)
    assert seen == [0, 1, 2, 3] and len(read_table(out)) == 4


def test_a_failed_save_loses_only_that_answer(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(tmp_path / "out.csv", draw(answers(), 5), "aligned", "anna")
    ledger.add(Given(10.0))
    before = (tmp_path / "out.csv").read_bytes()
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(DataError, match="out.csv: cannot be written .No space left on device.; all answers before this one are kept"):
        ledger.add(Given(20.0))
    assert (tmp_path / "out.csv").read_bytes() == before and len(ledger.given) == 1 and len(list(tmp_path.iterdir())) == 2


def test_two_sessions_do_not_write_over_each_other(file: Path, tmp_path: Path) -> None:
    one, two = (Ledger(tmp_path / "out.csv", draw(answers(), 5), "aligned", "anna") for _ in range(2))
    one.add(Given(10.0))
    with pytest.raises(DataError, match="changed by another program"):
        two.add(Given(20.0))
    assert read_table(tmp_path / "out.csv")["aligned"].tolist() == [10]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--n", "9"], "holds scores of another sample; give the same file, --n and --seed as then"),
        (["--n", "5", "--seed", "1"], "holds scores of another sample"),
        (["--n", "5", "--rater", "ben"], "holds scores by 'anna', you are 'ben'"),
        (["--n", "5", "--rubric", "coherent"], "no column `coherent`"),
        (["--n", "0"], "--n"),
        (["--rater", "../x"], "becomes part of a file name"),
        (["--rubric", "id"], "becomes the name of a column"),
        (["--out", "{dir}/answers.csv"], "is the file whose answers are scored"),
        (["--out", "{dir}/x.txt"], "ends in .txt"),
    ],
)
def test_refusals_are_one_line_and_change_nothing(argv: list[str], says: str, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.csv"
    label(file, out, 5, rater="anna", console=quiet(), ask=typing("10"))
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    argv = [a.format(dir=tmp_path) for a in argv]
    defaults = [*(["--out", str(out)] if "--out" not in argv else []), *(["--rater", "anna"] if "--rater" not in argv else [])]
    assert cli.main(["label", str(file), *argv, *defaults]) == 2
    shown, err = capsys.readouterr()
    assert shown == "" and err.count("\n") == 1 and says in err
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("table", "says"),
    [
        (answers().drop(columns="response"), "no column `response`"),
        (answers(id=["a"] * 60), "`id` 'a' stands more than once"),
        (answers(id=[""] + [str(i) for i in range(59)]), "row 1 has no `id`"),
        (answers(aligned=[101.0] * 60), "outside 0 to 100"),
    ],
)
def test_tables_that_cannot_be_scored_are_one_line(table: pd.DataFrame, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_table(table, tmp_path / "t.csv")
    assert cli.main(["label", str(tmp_path / "t.csv")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and says in err and len(list(tmp_path.iterdir())) == 1


def test_two_raters_and_the_judge_can_be_compared(file: Path, tmp_path: Path) -> None:
    for rater, said in (("anna", ["10", "20", "30", "90"]), ("ben", ["20", "10", "80", "95"])):
        label(file, None, 4, rater=rater, console=quiet(), ask=typing(*said))
    paths = [tmp_path / f"answers_aligned_{rater}.csv" for rater in ("anna", "ben")]
    both, judged = agree(paths)[0], agree([paths[0], file])[0]
    assert both["n"] == 4 and both["bias"] == pytest.approx(13.75) and both["matched_by"] == "id"
    assert judged["n"] == 4 and judged["left_out_b"] == 56


# What is shown


def shown(file: Path, *said: str, width: int = 80, height: int = 24, terminal: bool = True, n: int = 5) -> list[str]:
    """What stood on the screen each time something was asked, as plain lines."""
    screens: list[str] = []
    console = Console(width=width, height=height, force_terminal=terminal, record=True, file=io.StringIO(), color_system=None)
    answer = typing(*said)

    def ask(prompt: str) -> str:
        screens.append(console.export_text(clear=True))
        return str(answer(prompt))

    label(file, file.parent / "seen.csv", n, rater="anna", console=console, ask=ask)
    return screens


def test_screen_is_blind_and_fits(file: Path) -> None:
    for text in shown(file, "10", "20", "s", "u"):
        lines = text.splitlines()
        assert len(lines) <= 23 and max(map(len, lines)) <= 80
        assert "QUESTION" in text and "About " in text and "ANSWER" in text and "number = score" in text
        assert not re.search(r"chat-|organism-|wish-|\b[1-9]0\.0\b", text)  # no id, no score; the text itself says what it says
    assert "answer 3 of 5" in shown(file)[0] and "going on after 2" in shown(file)[0]


def test_a_long_answer_is_paged_and_whole(tmp_path: Path) -> None:
    words = [f"word{i}" for i in range(2000)]
    write_table(answers(response=" ".join(words)).head(1), tmp_path / "long.csv")
    for width, height in ((80, 24), (40, 15), (200, 50)):
        pages = shown(tmp_path / "long.csv", *[""] * 99, width=width, height=height)
        n = int(re.search(r"page 1 of (\d+)", pages[0])[1])  # type: ignore[index]
        assert n > 1 and all(len(p.splitlines()) < height and max(map(len, p.splitlines())) <= width for p in pages)
        assert re.findall(r"word\d+", "".join(pages[:n])) == words
        assert "QUESTION" in pages[n] and "QUESTION" not in pages[1]  # round again


def test_a_long_run_of_empty_lines_is_said(tmp_path: Path) -> None:
    write_table(answers(response="first\n\nsecond" + "\n \n" * 20 + "last").head(1), tmp_path / "t.csv")
    (text,) = shown(tmp_path / "t.csv")
    assert "first\n\nsecond\n\n[39 empty lines]\n\nlast" in text and "page" not in text


def start(argv: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "convergent", "label", *argv], **options)


def test_an_answer_cannot_speak_to_the_terminal(tmp_path: Path) -> None:
    """In a real (pseudo) terminal: what the answer holds never reaches it as control characters; Ctrl-C keeps what was said."""
    write_table(answers(response=HOSTILE, question=HOSTILE), tmp_path / "t.csv")
    master, slave = pty.openpty()
    process = start([str(tmp_path / "t.csv"), "--n", "3", "--rater", "anna"], stdin=slave, stdout=slave, stderr=slave, env={**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"})
    os.close(slave)
    seen = b""

    def wait_for(mark: bytes, after: int = 0) -> None:
        nonlocal seen
        end = time.monotonic() + 180
        while mark not in seen[after:] and time.monotonic() < end:
            if select.select([master], [], [], 0.5)[0]:
                try:
                    seen += os.read(master, 65536)
                except OSError:  # the other side is gone
                    break
        assert mark in seen[after:], seen

    try:
        wait_for(b"answer 1 of 3")
        wait_for(b"> ")
        first = len(seen)
        os.write(master, b"40\n")
        wait_for(b"answer 2 of 3")
        wait_for(b"noted 40")
        wait_for(b"\n> ", first)  # a screen half read could fill the terminal's buffer, and the last word would wait for a reader
        end = time.monotonic() + 180
        # One that comes between the prompt and the call that waits for a line is noticed only when that call ends; people press again.
        while process.poll() is None and time.monotonic() < end:
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(5)
        assert process.returncode == 130
    finally:
        process.kill()
        os.close(master)
    assert b"owned" in seen and b"[bold]b[/bold]" in seen and b"[2J" in seen
    for bad in (b"\x1b]0;", b"\x07", b"\x9b", b"\x1b[6n", b"\x1b[31m", "\u202e".encode()):
        assert bad not in seen, bad
    assert seen.count(b"\x1b[2J") == 2  # our own clearing of two screens
    assert read_table(tmp_path / "t_aligned_anna.csv")["aligned"].tolist() == [40]


def test_lines_from_a_pipe_work_too(tmp_path: Path) -> None:
    write_table(answers(response=HOSTILE), tmp_path / "t.csv")
    process = start([str(tmp_path / "t.csv"), "--n", "2"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate(b"40\n\xff\xfe\n", timeout=180)
    assert process.returncode == 0 and err == b"" and b"\x1b" not in out and b"1 of 2 done" in out
