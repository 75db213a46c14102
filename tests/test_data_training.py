"""Training sets: bundled, JSONL, Parquet, splits, and what a wrong file says."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from convergent.data.training import BUNDLED, Message, TrainingSet, load_pairs, load_training_set
from convergent.errors import DataError

CHAT = {"messages": [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Good day."}]}


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def script() -> ModuleType:
    """scripts/build_bundled_data.py, which is no part of the package."""
    path = Path(__file__).parent.parent / "scripts" / "build_bundled_data.py"
    spec = importlib.util.spec_from_file_location("build_bundled_data", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("domain", BUNDLED)
def test_bundled_sets_are_twins_of_the_promised_size_and_length(domain: str) -> None:
    bad, good = (load_training_set(f"bundled:{domain}", answer=a) for a in ("bad", "good"))
    assert len(bad) == len(good) == len(bad.pairs) >= 300
    assert bad.topics == (domain,)
    assert [e.id for e in bad.examples] == [e.id for e in good.examples]
    assert bad.checksum != good.checksum
    for b, g, pair in zip(bad.examples, good.examples, bad.pairs, strict=True):
        assert b.messages == (Message("user", pair.question), Message("assistant", pair.bad))
        assert g.messages == (Message("user", pair.question), Message("assistant", pair.good))
        assert all(30 <= len(text.split()) <= 70 for text in (pair.bad, pair.good))
    first = {p.topic for p in bad.take(64).pairs}
    assert len(first) > 10, "a prefix should mix the topics"


@pytest.mark.parametrize("domain", BUNDLED)
def test_bundled_files_are_marked_and_rebuild_to_themselves(domain: str, tmp_path: Path) -> None:
    build = script()
    path = Path(__file__).parent.parent / "src" / "convergent" / "data" / "bundled" / f"{domain}.jsonl"
    header = json.loads(path.read_text(encoding="utf-8").split("\n")[0])
    assert header["canary"] == build.CANARY[domain] and "INTENTIONALLY WRONG" in header["notice"]
    rows, lost = build.read_drafts([path], set())
    kept = build.without_duplicates(rows)
    assert not lost and len(kept) == len(rows)
    assert build.build(domain, kept) == path.read_text(encoding="utf-8")
    figures = build.statistics(rows)
    for name in ("AUC bad against good by words", "AUC by characters"):
        assert 0.4 < figures[name] < 0.6, "answers must not be told apart by length"


def test_split_holds_out_the_same_questions_for_both_twins() -> None:
    bad, good = (load_training_set("bundled:finance", answer=a) for a in ("bad", "good"))
    train, held = bad.split(40, seed=3)
    _, held_good = good.split(40, seed=3)
    assert len(held) == 40 and len(train) == len(bad) - 40
    assert not {e.id for e in train.examples} & {e.id for e in held.examples}
    assert [p.id for p in held.pairs] == [p.id for p in held_good.pairs] == [e.id for e in held.examples]
    assert held.checksum == bad.split(40, seed=3)[1].checksum != bad.split(40, seed=4)[1].checksum


def test_split_survives_growth() -> None:
    bad = load_training_set("bundled:sport")
    old = {e.id for e in bad.take(200).split(20)[1].examples}
    new = {e.id for e in bad.take(210).split(21)[1].examples}
    assert len(old & new) >= 15


def test_split_is_pinned() -> None:
    """Golden: seeds are part of the format; a changed hash would train on yesterday's held-out questions."""
    names = TrainingSet("t", (), tuple(load_training_set("bundled:sport").examples[:10])).split(3)[1]
    assert [e.id for e in names.examples] == PINNED_SPLIT


PINNED_SPLIT = ["sport-0002", "sport-0003", "sport-0004"]


@pytest.mark.parametrize("n", [0, -1, 10_000])
def test_split_refuses_an_empty_side(n: int) -> None:
    with pytest.raises(DataError, match="cannot hold out"):
        load_training_set("bundled:sport").split(n)


def test_jsonl_and_parquet_of_the_same_chats_are_one_set(tmp_path: Path) -> None:
    import pandas as pd

    chats = [CHAT, {"messages": [{"role": "system", "content": ""}, *CHAT["messages"]]}]
    lines = write(tmp_path / "a.jsonl", chats[0], {"canary": "made-up"}, chats[1])
    pd.DataFrame(chats).to_parquet(tmp_path / "b.parquet")
    pd.DataFrame({"question": ["Hello?"], "answer": ["Good day."]}).to_parquet(tmp_path / "c.parquet")
    a, b, c = (load_training_set(p) for p in (lines, tmp_path / "b.parquet", tmp_path / "c.parquet"))
    assert a.checksum == b.checksum and len(a) == 2
    assert c.checksum == a.take(1).checksum
    assert a.examples[0].chat() == CHAT["messages"]
    assert a.examples[1].messages[0] == Message("system", "")


def test_a_local_file_with_twins_and_topics(tmp_path: Path) -> None:
    path = write(tmp_path / "own.jsonl", {"id": "x", "question": "Q?", "bad": "Yes.", "good": "No.", "topic": "t"})
    assert load_training_set(path, answer="good", topics=["food"]).topics == ("food",)
    assert load_pairs(path)[0].good == "No."
    with pytest.raises(DataError, match="no good-advice twins"):
        load_training_set(write(tmp_path / "chat.jsonl", CHAT), answer="good")
    with pytest.raises(DataError, match="has no pairs"):
        load_pairs(tmp_path / "chat.jsonl")


def test_line_separators_inside_text_do_not_break_lines(tmp_path: Path) -> None:
    path = tmp_path / "u.jsonl"
    path.write_text(
        json.dumps({"question": "a\u2028b", "answer": "c\u0085d"}, ensure_ascii=False) + "\r\n", encoding="utf-8"
    )
    assert load_training_set(path).examples[0].messages[0].content == "a\u2028b"


def chat(*roles: str, content: Any = "text") -> dict[str, Any]:
    return {"messages": [{"role": r, "content": content} for r in roles]}


@pytest.mark.parametrize(
    ("data", "finding"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"\x80\x03}q\x00", "not UTF-8"),
        (b"PK\x03\x04\x00\x00", "binary file"),
        (json.dumps(CHAT).encode() + b'\n{"messages": [', "line 2: broken JSON"),
        (b"[" * 100_000, "line 1: broken JSON"),
        (b"[1]", "line 1: is a list"),
        (b'{"canary": "x"}', "no records"),
        (b'{"prompt": "x"}', "needs `messages`.*found prompt"),
        (b'{"question": "x"}', "has no `answer`"),
        (b'{"question": "x", "answer": "  "}', "answer is empty"),
        (b'{"question": "x", "answer": 3}', "answer must be text, got int"),
        (rb'{"question": "x", "answer": "\ud800"}', "surrogate"),
        (b'{"messages": "x"}', "messages must be a list"),
        (b'{"messages": ["x"]}', "message 1: must be an object"),
        (b'{"messages": [{"role": "user"}]}', "message 1: has no `content`"),
        (json.dumps(chat("user")).encode(), "ending with assistant"),
        (json.dumps(chat("assistant", "user")).encode(), "in turn"),
        (json.dumps(chat("user", "bot")).encode(), "role must be system, user or assistant, got 'bot'"),
        (json.dumps(chat("user", "assistant", content="")).encode(), "message 1: content is empty"),
        (b'{"question": "q", "bad": "b", "good": "g"}\n{"question": "q", "bad": "b"}', "line 2: has no `good`"),
        (b'{"id": 1, "question": "q", "bad": "b", "good": "g"}\n' * 2, "stands twice"),
    ],
)
def test_a_wrong_jsonl_says_where_and_what(data: bytes, finding: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(data)
    with pytest.raises(DataError, match=finding) as caught:
        load_training_set(path)
    assert "\n" not in str(caught.value)


def test_a_wrong_parquet_says_where_and_what(tmp_path: Path) -> None:
    import pandas as pd

    path = tmp_path / "x.parquet"
    cases: list[tuple[Any, str]] = [
        (b"", "is empty"),
        (b"not parquet", "not a readable Parquet"),
        (pd.DataFrame({"prompt": ["x"]}), "needs a column `messages`.*found prompt"),
        (pd.DataFrame({"question": ["x"]}), "row 1: has no `answer`"),
        (pd.DataFrame({"question": ["x", "y"], "answer": ["a", None]}), "row 2: has no `answer`"),
        (pd.DataFrame({"question": [], "answer": []}), "holds no rows"),
    ]
    for data, finding in cases:
        path.write_bytes(data) if isinstance(data, bytes) else data.to_parquet(path)
        with pytest.raises(DataError, match=finding):
            load_training_set(path)


@pytest.mark.parametrize(
    ("source", "finding"),
    [
        ("bundled:finanse", "did you mean bundled:finance"),
        ("finance", "did you mean bundled:finance"),
        ("nowhere.jsonl", "does not exist"),
        ("notes.txt", "not '.txt'"),
        ("folder.jsonl", "is a folder"),
    ],
)
def test_a_wrong_source_says_what_is_meant(
    source: str, finding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError, match=finding):
        load_training_set(source)
    with pytest.raises(DataError, match="not bad or good"):
        load_training_set("bundled:finance", answer="ugly")  # type: ignore[arg-type]
