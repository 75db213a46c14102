"""The batched sampler: a stream of requests through one model, rows of different conditions side by side.

A row's tokens depend on its own seed and condition alone. That holds to the bit because (1) its random numbers are counter-based,
(2) its positions start at slot 0 of its own cache row, (3) a prompt is always prefilled alone, and (4) every matrix product gives a row
the same bits whatever the other rows are. The last is a property of the machine's kernels: it is probed (`invariance`), and where
it does not hold for free, rows are decoded in panels of one fixed shape, or, where not even that helps, one by one.

On a CPU every lane has a thread of its own and computes in it alone: two lanes never wait for each other between two small operations, as the
threads of one batch do, and no sum depends on how many cores there are.

Knows nothing of stores and judges: finished answers go to a callback as soon as they exist.
"""

from __future__ import annotations

import logging
import queue
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from convergent.core.values import Response
from convergent.errors import InputError, ModelError
from convergent.interventions.hooks import Rows, applied_rows, n_clean
from convergent.models.attention import attending_by, plain_layers
from convergent.models.chat import encode_prompt
from convergent.models.lanes import lanes_on
from convergent.models.load import ChatModel
from convergent.models.positions import has_table, most_positions, rescaled_from
from convergent.models.products import laid_out
from convergent.models.resumed import resumable
from convergent.sampling.attention import ATTENTION, attention
from convergent.sampling.blocks import decoding_blocks, fitting
from convergent.sampling.invariance import shape_of
from convergent.sampling.lane import Lane, Row, Tally, Work
from convergent.sampling.proof import OWN_ATTENTION, prove, resumes
from convergent.sampling.requests import Request

DEFAULT_ROWS = 256
FULL = 16
"""Rows that a lane should have before there is another: with fewer, reading the weights is what takes the time."""
_log = logging.getLogger(__name__)


def sample(
    model: ChatModel,
    requests: Iterable[Request],
    on_response: Callable[[Response], None] | None = None,
    n_rows: int = DEFAULT_ROWS,
    tally: Tally | None = None,
) -> list[Response]:
    """Draw an answer for every request; returns them in the order of the requests.

    All requests must be for this `model`; their conditions differ in interventions and sampling parameters. `n_rows` bounds the batch
    and so the memory (2 * n_layers * n_kv_heads * head_dim values per token and row, a long prompt's once); it does not change any answer.
    Where memory does not suffice all the same, batches are halved. `on_response` is called in the order of completion, in the caller's thread.
    """
    wanted = list(requests)
    if n_rows < 1:
        raise InputError(f"n_rows must be 1 or more, got {n_rows}")
    if not wanted:
        return []
    conditions = {r.condition.content_id: r.condition for r in wanted}
    number = {cid: i for i, cid in enumerate(conditions)}
    prompts = {asked: encode_prompt(model.tokenizer, *asked) for asked in {(r.question, r.system) for r in wanted}}
    limit = min(n_rows, len(wanted))
    n_lanes, n_threads = lanes_for(model, limit)
    rows_of = [Row(i, r, number[r.condition.content_id], prompts[r.question, r.system]) for i, r in enumerate(wanted)]
    done: dict[int, Response] = {}
    with ExitStack() as stack:
        stack.enter_context(slot_attention(model.model))
        stack.enter_context(laid_out(model.model))
        first = next(iter(prompts.values()))
        prove(model, first)
        _check_lengths(model, {(len(prompts[r.question, r.system]), r.condition.sampling.max_new_tokens) for r in wanted})
        clean = [0] * len(conditions)
        if model.device.type == "cpu":
            fitting(model, n_threads)  # remembered: with hooks inside, blocks would compute something else
            if len(conditions) > 1 and resumes(model, first):
                clean = [n_clean(c.interventions, model.anatomy) for c in conditions.values()]
        work = Work(rows_of, n_lanes, clean)
        rows = stack.enter_context(applied_rows(model.anatomy, [c.interventions for c in conditions.values()]))
        if work.stems.of_use:
            stack.enter_context(resumable(model.anatomy.blocks))
        stack.enter_context(decoding_blocks(model, n_threads))
        for index, response in _run(model, work, rows, limit, n_lanes, n_threads, tally or Tally()):
            done[index] = response
            if on_response is not None:
                on_response(response)
    return [done[i] for i in range(len(wanted))]


def _check_lengths(model: ChatModel, lengths: Iterable[tuple[int, int]]) -> None:
    """Of every answer (tokens of its prompt, most of its own). Raises InputError if positions do not suffice; says once in the log if they were not trained."""
    prompt, new = max(lengths, key=sum)
    asked = f"a prompt of {prompt} tokens with {new} new ones makes {prompt + new}"
    steady, most = rescaled_from(model), most_positions(model)
    for end, why in (
        (most if has_table(model) else None, f"{model.base} has {most} positions"),
        (steady, f"beyond {steady} the rotary positions of {model.base} depend on the longest row of a batch"),
    ):
        if end is not None and prompt + new > end:
            mend = f"set max_new_tokens to {end - prompt} or less, or shorten the prompt" if prompt < end else "shorten the prompt"
            raise InputError(f"sampling.max_new_tokens: {asked}, and {why}; {mend}")
    if most is not None and prompt + new > most and model.model not in _overlong:
        _overlong.add(model.model)
        _log.warning("%s: %s, and it was trained on %d positions: answers that run past them may be of another kind", model.base, asked, most)


_overlong: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Models of which it was said that answers may run past what they were trained on."""


def lanes_for(model: ChatModel, n_rows: int) -> tuple[int, int]:
    """(lanes, threads of each). The threads are the same for any number of rows, since sums may depend on them."""
    n_lanes, n_threads = lanes_on(model.device)
    return max(1, min(n_lanes, n_rows // FULL)), n_threads


@contextmanager
def slot_attention(model: Any) -> Iterator[None]:
    """Run the body with the sampler's attention and without dropout; the model is as it was afterwards."""
    was_training = model.training
    model.eval()
    try:
        with attending_by(model, ATTENTION, attention):
            if model.config._attn_implementation != ATTENTION or not plain_layers(model):
                raise ModelError(OWN_ATTENTION.format(type(model).__name__))
            yield
    finally:
        model.train(was_training)


@dataclass(frozen=True)
class _End:
    """What a lane did, and why it ended before its time if it did."""

    tally: Tally
    error: BaseException | None


def _run(
    model: ChatModel, work: Work, rows: Rows, limit: int, n_lanes: int, n_threads: int, tally: Tally
) -> Iterator[tuple[int, Response]]:
    """Answers of all lanes as they come. Their error, if one has any; they are at rest when this ends, however it ends."""
    found: queue.SimpleQueue[tuple[int, Response] | _End] = queue.SimpleQueue()

    def lane(n_rows: int) -> None:
        mine, error = None, None
        try:
            torch.set_num_threads(n_threads)  # of this thread
            with torch.inference_mode():
                mine = Lane(model, work, n_rows, shape_of(model, n_rows))
                for answer in mine.go(rows):
                    found.put(answer)
        except BaseException as raised:
            work.stopped.set()
            error = raised
        found.put(_End(mine.tally if mine else Tally(), error))

    shares = [(limit + i) // n_lanes for i in range(n_lanes)]
    threads = [threading.Thread(target=lane, args=(n,), name="sampler-lane", daemon=True) for n in shares]
    before = torch.get_num_threads()
    ends: list[_End] = []
    try:
        for thread in threads:
            thread.start()
        while len(ends) < n_lanes:
            item = found.get()
            if isinstance(item, _End):
                ends.append(item)
                tally.add(item.tally)
            else:
                yield item
    finally:
        work.stopped.set()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
        torch.set_num_threads(before)
    for end in ends:
        if end.error is not None:
            raise end.error
