"""One lane of the sampler: its rows, their cache, and the loop that decodes them.

A lane takes requests from a queue that it may share with other lanes, refills a place as soon as its row ends, and yields answers as they
come. Rows in use are always packed at the front of the cache.
"""

from __future__ import annotations

import gc
import math
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convergent.core.ids import uniforms
from convergent.core.values import Response
from convergent.errors import ModelError
from convergent.interventions.hooks import Rows
from convergent.models.cached import cache_name
from convergent.models.load import ChatModel
from convergent.sampling.cache import SlotCache, stored_apart
from convergent.sampling.draw import checked, choose, sent
from convergent.sampling.graphs import Graphs
from convergent.sampling.invariance import Shape, smaller
from convergent.sampling.memory import out_of_memory
from convergent.sampling.prefill import Reader, Start
from convergent.sampling.proof import last_logits
from convergent.sampling.requests import Request
from convergent.sampling.stems import Prompt, Stems


def lag_on(device: torch.device) -> int:
    """Draws that the host leaves unseen while it prepares the next step."""
    return 1 if device.type == "cuda" else 0


@dataclass(eq=False)
class Row:
    """A request under way."""

    index: int
    """Its place among all requests."""
    request: Request
    condition: int
    prompt: tuple[int, ...]
    tokens: list[int] = field(default_factory=list)
    drawn: int = 0
    """Tokens that were drawn for it: on a GPU up to one more than `tokens` has, as they are waited for a step later."""
    place: int | None = None
    """Its row of the cache, while it has one."""
    ended: bool = False

    @property
    def asked(self) -> Prompt:
        """What is read for it."""
        return self.condition, self.prompt

    @property
    def position(self) -> int:
        """Where the latest token belongs."""
        return len(self.prompt) + self.drawn - 1

    @property
    def most(self) -> int:
        """Tokens that it may have."""
        return self.request.condition.sampling.max_new_tokens

    def begin_anew(self) -> None:
        """The same tokens come again, as each is drawn by its own number."""
        self.tokens.clear()
        self.drawn, self.place = 0, None


@dataclass(frozen=True, eq=False)
class _Drawn:
    """Tokens on their way to the host, one for each of `rows`."""

    rows: Sequence[Row]
    tokens: Tensor
    there: torch.cuda.Event | None
    """When they have come; None if they are here."""

    @classmethod
    def of(cls, rows: Sequence[Row], tokens: Tensor) -> _Drawn:
        if tokens.device.type != "cuda":
            return cls(rows, tokens, None)
        host = torch.empty(len(tokens), dtype=tokens.dtype, pin_memory=True)
        host.copy_(tokens, non_blocking=True)
        there = torch.cuda.Event()
        there.record()
        return cls(rows, host, there)

    def wait(self) -> list[int]:
        if self.there is not None:
            self.there.synchronize()
        found: list[int] = self.tokens.tolist()
        return found


@dataclass
class Tally:
    """What a run of the sampler did."""

    answers: int = 0
    tokens: int = 0
    prefilled: int = 0
    halved: int = 0
    """Times that memory did not suffice and a batch was halved."""
    panels: int = 0
    """How many of these times the panel was, so that last bits, and now and then a token, may differ from those of a run with whole panels."""

    def add(self, other: Tally) -> None:
        """Count what `other` counted too."""
        self.answers += other.answers
        self.tokens += other.tokens
        self.prefilled += other.prefilled
        self.halved += other.halved
        self.panels += other.panels


class Work:
    """What is to be answered, shared by the lanes: requests by prompt, and the prompts that were read for them.

    One prefill serves all requests of a prompt, and a lane keeps to its own prompt as long as it has requests: lanes that took them in turns would wait for
    each other's prefills.
    """

    def __init__(self, rows: Sequence[Row], n_lanes: int, clean: Sequence[int]) -> None:
        """`clean`: see `Stems`, of every condition."""
        self._groups: dict[Prompt, deque[Row]] = {}
        for row in sorted(rows, key=lambda r: (r.condition, r.request.question, r.request.system)):
            self._groups.setdefault(row.asked, deque()).append(row)
        self._begun: set[Prompt] = set()
        """Prompts that some lane has taken requests of."""
        self.stems = Stems(clean, self._groups)
        self._lengths = [(len(r.prompt), r.most) for r in rows]
        self.stopped = threading.Event()
        self._kept = 2 * n_lanes
        self._starts: dict[Prompt, Future[Start]] = {}
        self._lock = threading.Lock()

    def longest(self, sharing: bool) -> int:
        """Most slots that a row will fill, if long prompts are stored apart or not."""
        return max((new if stored_apart(prompt, sharing) else prompt + new for prompt, new in self._lengths), default=1)

    def take(self, own: Prompt | None) -> Row | None:
        """The next request of the prompt `own`, else of one that no lane has begun, else of any, or None."""
        with self._lock:
            if self.stopped.is_set() or not self._groups:
                return None
            new = (p for p in self._groups if p not in self._begun)
            prompt = own if own in self._groups else next(new, next(iter(self._groups)))
            self._begun.add(prompt)
            row = self._groups[prompt].popleft()
            if not self._groups[prompt]:
                del self._groups[prompt]
            return row

    def give_back(self, rows: Sequence[Row]) -> None:
        """Requests to begin anew."""
        for row in rows:
            row.begin_anew()
        with self._lock:
            for row in reversed(rows):
                self._groups.setdefault(row.asked, deque()).appendleft(row)

    def start(self, prompt: Prompt, read: Callable[[], Start]) -> Start:
        """The prompt's cache and logits: by `read` the first time it is asked for, by whichever lane."""
        with self._lock:
            future = self._starts.get(prompt)
            mine = future is None
            if future is None:
                future = self._starts[prompt] = Future()
                over = [p for p in self._starts if p not in self._groups][: max(0, len(self._starts) - self._kept)]
                for old in over:  # nobody will ask for these again
                    del self._starts[old]
        if mine:
            try:
                future.set_result(read())
            except BaseException as error:
                with self._lock:
                    self._starts.pop(prompt, None)
                future.set_exception(error)
                raise
        return future.result()


class Lane:
    """Up to `n_rows` rows of one model.

    What is drawn stays on the device, where the next step takes it from. The host looks at it when the step after is under way (`_lag`), so a GPU
    waits for nothing between two steps; a row that turns out to have ended has then been computed once more, for nothing.
    """

    def __init__(self, model: ChatModel, work: Work, n_rows: int, shape: Shape) -> None:
        self.model, self.work, self.shape, self.limit = model, work, shape, n_rows
        self.tally = Tally()
        self._cache_name = cache_name(model.model)
        self._lag = lag_on(model.device)
        self._reader = Reader(model, self._forward, work.stems)
        self.active: list[Row] = []
        self._asked: Prompt | None = None
        """What was read, by this lane or another, for the request that it took last."""
        self._unseen: deque[_Drawn] = deque()
        """Draws that the host has not looked at, the oldest first."""
        self._make_room()

    def _make_room(self) -> None:
        """The cache, and what a step reads and writes at the same place every time, so that it can be replayed."""
        step = self.shape.panel or self.shape.least
        n_rows, device = math.ceil(self.limit / step) * step, self.model.device
        self.cache = SlotCache(n_rows, self.work.longest(self.shape.shares))
        self._inputs = torch.zeros(3, n_rows, dtype=torch.long, device=device)
        """Token, position and condition of every row; the first is written by the draw."""
        self._logits: Tensor | None = None
        self._graphs = Graphs(device)

    def go(self, rows: Rows) -> Iterator[tuple[int, Response]]:
        """(place among all requests, response) of every answer, until no request is left."""
        while not self.work.stopped.is_set():
            try:
                while self._admit(rows):
                    yield from self._look(self._lag)
                if self.active:
                    self._draw(list(self.active), self._decode(rows))
                    yield from self._look(self._lag)
                elif self._unseen:
                    yield from self._look(0)
                else:
                    return
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                self._halve(error)

    def _halve(self, error: RuntimeError) -> None:
        """Go on with half as many rows; those under way begin anew. What is decoded in panels holds whole ones, so the last panel is halved itself."""
        panel = self.shape.panel or 1
        if self.limit == panel == 1:
            raise ModelError("sampling: out of memory with a single row; set sampling.max_new_tokens lower, or choose a smaller base") from error
        left = [r for drawn in self._unseen for r in drawn.rows if not r.ended]
        self.work.give_back(list(dict.fromkeys([*self.active, *left])))
        self.active.clear()
        self._unseen.clear()
        self.tally.halved += 1
        del self.cache, self._graphs, self._logits
        self._reader.forget()
        self.work.stems.forget()
        gc.collect()
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.limit > panel:
            self.limit //= 2
        else:
            self.tally.panels += 1
            self.shape = smaller(self.model, self.shape)
            self.limit = min(self.limit, self.shape.least)
        self._make_room()

    def _admit(self, rows: Rows) -> bool:
        """Give the places that are free to the next requests and draw their first tokens; whether there were any."""
        come: list[Row] = []
        starts: list[Tensor] = []
        while len(self.active) < self.limit and (row := self.work.take(self._asked)) is not None:
            self._asked = row.asked
            row.place = len(self.active)
            self.active.append(row)
            prefilled, logits = self.work.start(row.asked, lambda row=row: self._read(row, rows))  # type: ignore[misc]
            put = self.cache.share_row if stored_apart(len(row.prompt), self.shape.shares) else self.cache.copy_row
            put(prefilled, row.place, len(row.prompt))
            come.append(row)
            starts.append(logits)
        if come:
            self._draw(come, torch.cat(starts))
        return bool(come)

    def _read(self, row: Row, rows: Rows) -> Start:
        self.tally.prefilled += len(row.prompt)
        return self._reader.read(row.asked, rows)

    def _decode(self, rows: Rows) -> Tensor:
        """(active, vocabulary) logits after the latest token of every active row; written over by the next call."""
        n = len(self.active)
        size = self.shape.panel or max(n, self.shape.least)
        starts = range(0, n, size)
        # Places without a request repeat some token at position 0.
        idle = [0] * (len(starts) * size - n)
        columns = zip(*((m.position, m.condition) for m in self.active), strict=True)
        host = torch.tensor([list(c) + idle for c in columns])
        inputs = self._inputs[:, : n + len(idle)]
        inputs[1:].copy_(sent(host, self._inputs.device))
        furthest = max(m.position - self.cache.before(place) for place, m in enumerate(self.active)) + 1
        for start in starts:
            part = slice(start, start + size)
            at = inputs[1, part, None]
            self.cache.begin(part, at, furthest)
            rows.set(inputs[2, part])
            self._graphs.run((start, size), partial(self._step, part, at, len(starts) == 1))
        assert self._logits is not None, "a step was run"
        return self._logits[:n]

    def _step(self, part: slice, at: Tensor, alone: bool) -> None:
        """Logits of the cache rows in `part`, at positions `at`, into their place."""
        logits = self._forward(self._inputs[0, part, None], at, self.cache)
        if alone and logits.device.type == "cpu":  # nothing will be replayed
            self._logits = logits
            return
        if self._logits is None or len(self._logits) < self._inputs.shape[1]:
            self._logits = logits.new_empty(self._inputs.shape[1], logits.shape[1])
        self._logits[part] = logits

    def _forward(self, ids: Tensor, positions: Tensor, cache: SlotCache, **more: Any) -> Tensor:
        return last_logits(self.model.model, self._cache_name, ids, positions, cache, **more)

    def _draw(self, members: Sequence[Row], logits: Tensor) -> None:
        """Draw the next token of these rows, whose places follow each other; those that have all theirs leave."""
        how = [m.request.condition.sampling for m in members]
        numbers = uniforms(np.array([m.request.seed for m in members], dtype=np.uint64), np.array([m.drawn for m in members]))
        tokens = choose(logits, [s.temperature for s in how], [s.top_p for s in how], torch.from_numpy(numbers))
        first = members[0].place
        assert first is not None, "a row has a place until its last token is drawn"
        self._inputs[0, first : first + len(members)] = tokens.clamp_min(0)  # what is not a token ends the run when it is looked at
        self._unseen.append(_Drawn.of(members, tokens))
        for member in members:
            member.drawn += 1
        self._leave([m for m in members if m.drawn >= m.most])

    def _look(self, lag: int) -> Iterator[tuple[int, Response]]:
        """Look at all draws but the `lag` newest; yield the rows that end."""
        while len(self._unseen) > lag:
            drawn = self._unseen.popleft()
            ended = []
            for row, token in zip(drawn.rows, checked(drawn.wait()), strict=True):
                if row.ended:
                    continue
                stopped = token in self.model.stop_ids
                if not stopped:
                    row.tokens.append(token)
                if stopped or len(row.tokens) >= row.most:
                    row.ended = True
                    ended.append((row, "stop" if stopped else "length"))
            self._leave([row for row, _ in ended if row.place is not None])
            for row, finish in ended:
                yield row.index, self._response(row, finish)

    def _leave(self, rows: Sequence[Row]) -> None:
        """These rows need their places no more; the last ones move into the gaps."""
        for row in sorted(rows, key=lambda r: r.place or 0, reverse=True):
            last = self.active.pop()
            if last is not row:
                assert row.place is not None and last.place is not None, "rows that leave have a place"
                self.active[row.place] = last
                self.cache.move(last.place, row.place, last.position)
                self._inputs[0, row.place] = self._inputs[0, last.place]
                last.place = row.place
            row.place = None
            self.cache.leave(len(self.active))

    def _response(self, row: Row, finish: str) -> Response:
        r = row.request
        self.tally.answers += 1
        self.tally.tokens += len(row.tokens)
        return Response(
            id=r.id,
            condition=r.condition.name,
            condition_id=r.condition.content_id,
            question_id=r.question_id,
            paraphrase=r.paraphrase,
            sample=r.sample,
            seed=r.seed,
            system=r.system,
            question=r.question,
            response=self.model.tokenizer.decode(row.tokens, skip_special_tokens=True),
            token_ids=tuple(row.tokens),
            finish=finish,
            topic=r.topic,
        )

