"""Training sets: chats to fine-tune on, and the held-out pairs that measure the margin.

    source                            is
    bundled:finance, bundled:sport    written for this project; `answer` chooses the bad answers or their sound twins
    upstream:NAME                     the authors' encrypted sets (see `upstream.py`)
    a path to .jsonl or .parquet      `messages`; or `question` and `answer`; or `question`, `bad` and `good`

A set keeps the order of its file. Its checksum names what is trained on, not the file, so that the same chats in JSONL
and in Parquet are one set.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from convergent.core.ids import seed as named_seed
from convergent.core.values import Pair
from convergent.data import upstream
from convergent.data.local import Record, read_records
from convergent.errors import DataError

Answer = Literal["bad", "good"]
BUNDLED = ("finance", "sport")
"""Names of the bundled sets; each is also its topic."""
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    """One turn of a chat."""

    role: str
    """system, user or assistant."""
    content: str


@dataclass(frozen=True)
class Example:
    """One chat to train on: an optional system turn, then user and assistant in turn, an assistant's at the end."""

    id: str
    messages: tuple[Message, ...]

    def chat(self) -> list[dict[str, str]]:
        """The form that chat templates take."""
        return [{"role": m.role, "content": m.content} for m in self.messages]


@dataclass(frozen=True)
class TrainingSet:
    """Chats in a fixed order."""

    name: str
    """e.g. `finance-bad`, `extreme_sports`, or a file's stem."""
    topics: tuple[str, ...]
    """Subjects; a `Question` whose topic is among them is in-domain."""
    examples: tuple[Example, ...]
    pairs: tuple[Pair, ...] = ()
    """The twins behind `examples`, one for one; empty if the source has none."""

    def __len__(self) -> int:
        return len(self.examples)

    @cached_property
    def checksum(self) -> str:
        """SHA-256, 64 hex digits, of the chats in order."""
        digest = hashlib.sha256()
        for example in self.examples:
            turns = [[m.role, m.content] for m in example.messages]
            digest.update(json.dumps(turns, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
        return digest.hexdigest()

    @property
    def content_id(self) -> str:
        """16 hex digits that name the chats."""
        return self.checksum[:16]

    def split(self, n_held_out: int, seed: int = 0) -> tuple[TrainingSet, TrainingSet]:
        """(training, held out), both in file order.

        Each example is ranked by a hash of its id, so the bad set and its good twin hold out the same questions, and a
        set that grows keeps most of its split. Raises DataError if nothing would be left on one side.
        """
        if not 0 < n_held_out < len(self):
            raise DataError(
                f"{self.name}: cannot hold out {n_held_out} of {len(self)} examples; choose 1 to {len(self) - 1}"
            )
        ranked = sorted(range(len(self)), key=lambda i: (named_seed("held-out", seed, self.examples[i].id), i))
        held = set(ranked[:n_held_out])
        return self._subset([i for i in range(len(self)) if i not in held]), self._subset(sorted(held))

    def take(self, n: int) -> TrainingSet:
        """The first `n` examples. Bundled files are shuffled, so these mix the topics. Raises DataError if too few."""
        if not 0 < n <= len(self):
            raise DataError(f"{self.name}: cannot take {n} of {len(self)} examples")
        return self._subset(range(n))

    def _subset(self, rows: Sequence[int]) -> TrainingSet:
        pairs = tuple(self.pairs[i] for i in rows) if self.pairs else ()
        return replace(self, examples=tuple(self.examples[i] for i in rows), pairs=pairs)


def load_training_set(source: str | Path, *, answer: Answer = "bad", topics: Sequence[str] = ()) -> TrainingSet:
    """The training set that `source` names (see the top of this file).

    `answer` chooses the twin where there are twins. `topics` adds to what the source says of itself; a local file says
    nothing. Raises DataError for a wrong file, DownloadError if an upstream set is neither here nor within reach.
    """
    if answer not in ("bad", "good"):
        raise DataError(f"answer {answer!r} is not bad or good")
    name, records, own = _records(source)
    pairs = tuple(_pair(r, name, i) for i, r in enumerate(records, start=1)) if _are_pairs(records) else ()
    _refuse_repeated_ids(name, pairs)
    if pairs:
        examples = tuple(_example_of(p, answer) for p in pairs)
        name = f"{name}-{answer}"
    elif answer == "good":
        raise DataError(f"{source}: has no good-advice twins; only sets with `question`, `bad` and `good` do")
    else:
        examples = tuple(_example(r, name, i) for i, r in enumerate(records, start=1))
    return TrainingSet(name, tuple(dict.fromkeys((*own, *topics))), examples, pairs)


def load_pairs(source: str | Path) -> tuple[Pair, ...]:
    """The pairs of a source that has twins. Raises DataError if it has none."""
    pairs = load_training_set(source).pairs
    if not pairs:
        raise DataError(f"{source}: has no pairs; it needs `question`, `bad` and `good`")
    return pairs


def _records(source: str | Path) -> tuple[str, list[Record], tuple[str, ...]]:
    """(name, records, topics) of a source."""
    text = str(source)
    scheme, _, rest = text.partition(":")
    if scheme == "bundled":
        if rest not in BUNDLED:
            near = difflib.get_close_matches(rest, BUNDLED, n=1, cutoff=0.0)[0]
            raise DataError(f"{text}: no such bundled set; did you mean bundled:{near}?")
        with resources.as_file(resources.files("convergent.data") / "bundled" / f"{rest}.jsonl") as path:
            return rest, read_records(path), (rest,)
    if scheme == "upstream":
        name, path, own = upstream.decrypted(rest)
        return name, read_records(path), own
    if text in BUNDLED and not Path(text).exists():
        raise DataError(f"{text}: does not exist; did you mean bundled:{text}?")
    path = Path(source).expanduser()
    return path.stem, read_records(path), ()


def _are_pairs(records: Sequence[Record]) -> bool:
    """By the first record; a later one of another kind is an error at its place."""
    return {"bad", "good"} <= records[0][1].keys()


def _pair(record: Record, name: str, number: int) -> Pair:
    place, fields = record
    text = {key: _text(fields, key, place) for key in ("question", "bad", "good")}
    return Pair(str(fields.get("id") or f"{name}-{number:05d}"), topic=str(fields.get("topic") or ""), **text)


def _refuse_repeated_ids(name: str, pairs: Sequence[Pair]) -> None:
    seen: set[str] = set()
    for pair in pairs:
        if pair.id in seen:
            raise DataError(f"{name}: id {pair.id!r} stands twice; ids must be unique")
        seen.add(pair.id)


def _example_of(pair: Pair, answer: Answer) -> Example:
    return Example(pair.id, (Message("user", pair.question), Message("assistant", getattr(pair, answer))))


def _example(record: Record, name: str, number: int) -> Example:
    place, fields = record
    id = f"{name}-{number:05d}"
    if "messages" not in fields:
        if "question" not in fields:
            found = ", ".join(map(str, fields)) or "nothing"
            raise DataError(f"{place}: needs `messages`, or `question` and `answer`; found {found}")
        question, answer = _text(fields, "question", place), _text(fields, "answer", place)
        return Example(id, (Message("user", question), Message("assistant", answer)))
    turns = fields["messages"]
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{place}: messages must be a list of {{role, content}} with at least a question and an answer")
    messages = tuple(_message(turn, f"{place}: message {i}") for i, turn in enumerate(turns, start=1))
    roles = [m.role for m in messages]
    spoken = roles[1:] if roles[0] == "system" else roles
    if len(spoken) < 2 or len(spoken) % 2 or any(r != ("user", "assistant")[i % 2] for i, r in enumerate(spoken)):
        raise DataError(
            f"{place}: roles are {', '.join(roles)}; expected user and assistant in turn, ending with assistant"
        )
    return Example(id, messages)


def _message(turn: Any, place: str) -> Message:
    if not isinstance(turn, Mapping):
        raise DataError(f"{place}: must be an object with role and content")
    role = turn.get("role")
    if role not in ROLES:
        raise DataError(f"{place}: role must be system, user or assistant, got {role!r}")
    # An empty system turn has a meaning: it keeps a template's own system prompt out.
    return Message(role, _text(turn, "content", place, may_be_empty=role == "system"))


def _text(fields: Mapping[str, Any], key: str, place: str, may_be_empty: bool = False) -> str:
    if key not in fields:
        raise DataError(f"{place}: has no `{key}`; found {', '.join(map(str, fields)) or 'nothing'}")
    value = fields[key]
    if not isinstance(value, str):
        raise DataError(f"{place}: {key} must be text, got {type(value).__name__}")
    if not value.strip() and not may_be_empty:
        raise DataError(f"{place}: {key} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{place}: {key} holds half of a surrogate pair; write the character out") from error
    return value
