"""The batched sampler: a stream of requests through one model, rows of different conditions side by side.

A row's tokens depend on its own seed and condition alone. That holds to the bit because (1) its random numbers are counter-based,
(2) its positions start at slot 0 of its own cache row, (3) a prompt is always prefilled alone, and (4) every matrix product gives a row
the same bits whatever the other rows are. The last is a property of the machine's kernels: it is probed (`rows_are_invariant`), and where
it does not hold for free, rows are decoded in panels of one fixed shape, or, where not even that helps, one by one.

Knows nothing of stores and judges: finished answers go to a callback as soon as they exist.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convergent.core.ids import uniforms
from convergent.core.values import Response
from convergent.errors import InputError, ModelError
from convergent.interventions.hooks import Rows, applied_rows
from convergent.models.chat import encode_prompt
from convergent.models.load import ChatModel
from convergent.sampling.cache import ATTENTION, SPAN, SlotCache, attending, attention, register
from convergent.sampling.draw import draw
from convergent.sampling.requests import Request

MIN_ROWS = 16
"""Smaller matrix products take another path (and other roundings) in common BLAS libraries: each thread's share has to be a few rows."""
PANEL = 32
DEFAULT_ROWS = 128
_OWN_ATTENTION = "{}: its attention does not go through the attention interface of transformers, so it cannot be sampled; choose another base"


@dataclass(eq=False)
class _Row:
    """A request under way."""

    request: Request
    condition: int
    prompt: tuple[int, ...]
    tokens: list[int] = field(default_factory=list)

    @property
    def position(self) -> int:
        """Where the latest token belongs."""
        return len(self.prompt) + len(self.tokens) - 1


@dataclass
class Tally:
    """What a run of the sampler did."""

    answers: int = 0
    tokens: int = 0
    prefilled: int = 0


def sample(
    model: ChatModel,
    requests: Iterable[Request],
    on_response: Callable[[Response], None] | None = None,
    n_rows: int = DEFAULT_ROWS,
    tally: Tally | None = None,
) -> list[Response]:
    """Draw an answer for every request; returns them in the order of the requests.

    All requests must be for this `model`; their conditions differ in interventions and sampling parameters. `n_rows` bounds the batch
    and so the memory (2 * n_layers * n_kv_heads * head_dim values per token and row); it does not change any answer.
    `on_response` is called in the order of completion.
    """
    wanted = list(requests)
    if n_rows < 1:
        raise InputError(f"n_rows must be 1 or more, got {n_rows}")
    run = _Run(model, wanted, n_rows, tally or Tally())
    done: dict[int, Response] = {}
    with torch.inference_mode(), slot_attention(model.model), applied_rows(model.anatomy, run.interventions) as rows:
        for index, response in run.go(rows):
            done[index] = response
            if on_response is not None:
                on_response(response)
    return [done[i] for i in range(len(wanted))]


@contextmanager
def slot_attention(model: Any) -> Iterator[None]:
    """Run the body with the sampler's attention; the model's own is restored afterwards."""
    register()
    before = model.config._attn_implementation
    was_training = model.training
    try:
        model.eval()
        model.set_attn_implementation(ATTENTION)
        if model.config._attn_implementation != ATTENTION:
            raise ModelError(_OWN_ATTENTION.format(type(model).__name__))
        yield
    finally:
        model.set_attn_implementation(before)
        model.train(was_training)


@torch.inference_mode()
def rows_are_invariant(model: ChatModel, n_rows: int = 64) -> bool:
    """Whether matrix products of this model give a row the same bits for any number (>= MIN_ROWS) and order of rows.

    Probed on every distinct shape of linear layer, and on attention over spans of several lengths.
    """
    sizes = sorted({MIN_ROWS, MIN_ROWS + 1, MIN_ROWS + 5, n_rows // 2, n_rows - 1} - set(range(MIN_ROWS)))
    return _linears_are_invariant(model, n_rows, sizes) and _attention_is_invariant(model, (MIN_ROWS, 2 * MIN_ROWS))


def _panel_size(model: ChatModel, n_rows: int) -> int | None:
    """Rows per forward pass: None is any number, else a fixed one."""
    if rows_are_invariant(model, max(64, n_rows)):
        return None
    return PANEL if _linears_are_invariant(model, PANEL, ()) and _attention_is_invariant(model, (PANEL,)) else 1


def _linears_are_invariant(model: ChatModel, n_rows: int, sizes: Sequence[int]) -> bool:
    """Whether linear layers give the same bits for `n_rows` rows, for these in reverse, and for the first m of `sizes`."""
    weights = {tuple(m.weight.shape): m.weight for m in model.model.modules() if isinstance(m, torch.nn.Linear)}
    for weight in weights.values():
        x = _counted(n_rows, weight.shape[1]).to(weight)
        y = torch.nn.functional.linear(x, weight)
        if not torch.equal(torch.nn.functional.linear(x.flip(0), weight).flip(0), y):
            return False
        if not all(torch.equal(torch.nn.functional.linear(x[:m], weight), y[:m]) for m in sizes):
            return False
    return True


def _attention_is_invariant(model: ChatModel, sizes: Sequence[int]) -> bool:
    """Whether attention gives a row the same bits for several numbers of rows and of slots beyond its own."""
    text = model.model.config.get_text_config()
    n_heads = text.num_attention_heads
    n_kv = getattr(text, "num_key_value_heads", None) or n_heads
    d = getattr(text, "head_dim", None) or text.hidden_size // n_heads
    like = next(model.model.parameters())
    rows, longest = max(sizes), 5 * SPAN
    q = _counted(rows, n_heads, 1, d).to(like)
    k, v = _counted(rows, n_kv, longest, d).to(like), _counted(rows, n_kv, longest, d).flip(0).to(like)
    found = []
    for n in sizes:
        with attending(torch.full((n, 1), SPAN - 2, device=like.device)):
            found += [attention(torch.nn.Module(), q[:n], k[:n, :, :s], v[:n, :, :s], None)[0] for s in (SPAN, 2 * SPAN, longest)]
    return all(torch.equal(f[: min(sizes)], found[0][: min(sizes)]) for f in found)


def _counted(*shape: int) -> Tensor:
    """Numbers in [-1, 1] without pattern or random state."""
    return torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * 0.7310585).view(shape)


class _Run:
    """State of one call of `sample`: the queue, the cache and the active rows, always packed at the front of the cache."""

    def __init__(self, model: ChatModel, requests: Sequence[Request], n_rows: int, tally: Tally) -> None:
        self.model, self.tally = model, tally
        conditions = {r.condition.content_id: r.condition for r in requests}
        self.number = {cid: i for i, cid in enumerate(conditions)}
        self.interventions = [c.interventions for c in conditions.values()]
        prompts: dict[tuple[str, str], tuple[int, ...]] = {}
        for r in requests:
            if (r.question, r.system) not in prompts:
                prompts[r.question, r.system] = encode_prompt(model.tokenizer, r.question, r.system)
        # Requests that share condition and prompt follow each other, so that one prefill serves them all.
        order = sorted(
            range(len(requests)),
            key=lambda i: (self.number[requests[i].condition.content_id], requests[i].question, requests[i].system),
        )
        self.queue = deque(
            (i, _Row(r, self.number[r.condition.content_id], prompts[r.question, r.system]))
            for i in order
            for r in [requests[i]]
        )
        longest = max((len(row.prompt) + row.request.condition.sampling.max_new_tokens for _, row in self.queue), default=1)
        self.limit = min(n_rows, len(requests))
        self.panel = _panel_size(model, self.limit) if requests else 1
        step = self.panel or MIN_ROWS
        self.cache = SlotCache(math.ceil(self.limit / step) * step, longest)
        self.active: list[tuple[int, _Row]] = []
        self.prefilled: tuple[tuple[int, tuple[int, ...]], SlotCache, Tensor] | None = None

    def go(self, rows: Rows) -> Iterator[tuple[int, Response]]:
        while self.queue or self.active:
            while self.queue and len(self.active) < self.limit:
                index, row = self.queue.popleft()
                prefilled, logits = self._prefill(row, rows)
                self.cache.copy_row(prefilled, len(self.active), len(row.prompt))
                self.active.append((index, row))
                yield from self._extend([len(self.active) - 1], logits)
            if self.active:
                yield from self._extend(list(range(len(self.active))), self._decode(rows))

    def _prefill(self, row: _Row, rows: Rows) -> tuple[SlotCache, Tensor]:
        """Cache and (1, vocabulary) logits after the prompt, from a pass over it alone, kept for the requests that share it."""
        key = (row.condition, row.prompt)
        if self.prefilled is None or self.prefilled[0] != key:
            cache, logits = self._forward_alone(row.condition, row.prompt, rows)
            self.prefilled = (key, cache, logits)
            self.tally.prefilled += len(row.prompt)
        return self.prefilled[1:]

    def _forward_alone(self, condition: int, ids: Sequence[int], rows: Rows) -> tuple[SlotCache, Tensor]:
        device = self.model.device
        cache = SlotCache(1, len(ids))
        positions = torch.arange(len(ids), device=device)[None]
        step = cache.begin(slice(0, 1), positions, len(ids))
        rows.set([condition])
        out = self.model.model(
            input_ids=torch.tensor([list(ids)], device=device),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        if not step.stored or step.read != step.stored:
            raise ModelError(_OWN_ATTENTION.format(type(self.model.model).__name__))
        return cache, out.logits[:, -1]

    def _decode(self, rows: Rows) -> Tensor:
        """(active, vocabulary) logits after the latest token of every active row."""
        n = len(self.active)
        size = self.panel or max(n, MIN_ROWS)
        parts = [self._decode_panel(start, size, rows) for start in range(0, n, size)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts))[:n]

    def _decode_panel(self, start: int, size: int, rows: Rows) -> Tensor:
        """(size, vocabulary) logits of the cache rows from `start` on; places without a request repeat token 0 at position 0."""
        device = self.model.device
        members = [row for _, row in self.active[start : start + size]]
        idle = [0] * (size - len(members))
        positions = [m.position for m in members] + idle
        at = torch.tensor(positions, device=device)[:, None]
        self.cache.begin(slice(start, start + size), at, max(positions) + 1)
        rows.set([m.condition for m in members] + idle)
        out = self.model.model(
            input_ids=torch.tensor([m.tokens[-1] for m in members] + idle, device=device)[:, None],
            position_ids=at,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = out.logits[:, -1]
        return logits

    def _extend(self, places: list[int], logits: Tensor) -> Iterator[tuple[int, Response]]:
        """Draw the next token of the rows at `places`; yield those that end and close the gaps they leave."""
        device = logits.device
        members = [self.active[p][1] for p in places]
        sampling = [m.request.condition.sampling for m in members]
        temperature = torch.tensor([s.temperature for s in sampling], dtype=torch.float64, device=device)
        top_p = torch.tensor([s.top_p for s in sampling], dtype=torch.float64, device=device)
        numbers = uniforms(
            np.array([m.request.seed for m in members], dtype=np.uint64), np.array([len(m.tokens) for m in members])
        )
        chosen = draw(logits, temperature, top_p, torch.from_numpy(numbers).to(device)).tolist()
        ended = []
        for place, member, token in zip(places, members, chosen, strict=True):
            stopped = token in self.model.stop_ids
            if not stopped:
                member.tokens.append(token)
            if stopped or len(member.tokens) >= member.request.condition.sampling.max_new_tokens:
                ended.append((place, "stop" if stopped else "length"))
        for place, finish in reversed(ended):
            index, row = self.active[place]
            last = self.active.pop()
            if place < len(self.active):
                self.active[place] = last
                self._move(len(self.active), place, last[1].position)
            yield index, self._response(row, finish)

    def _move(self, source: int, target: int, n_tokens: int) -> None:
        for store in (self.cache.keys, self.cache.values):
            for tensor in store.values():
                tensor[target, :, :n_tokens] = tensor[source, :, :n_tokens]

    def _response(self, row: _Row, finish: str) -> Response:
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
