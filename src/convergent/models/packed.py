"""Teacher-forced passes over many texts: no token is read twice, none is padding, and blocks below a change are not run again.

Texts are laid out as a forest in one row of tokens. What several of them begin with is there once; a *branch*, a run of tokens that belongs to the same
texts, looks at itself and at the branches before it. Linear layers and norms see one long row, attention goes branch by branch. A model whose attention
this does not know (found by trying) gets padded batches of whole texts, with the same numbers up to rounding.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convergent.errors import ModelError
from convergent.models.attention import ABSENT, attending_by, plain_layers, window_of
from convergent.models.head import head_is_plain
from convergent.models.lanes import in_lanes
from convergent.models.load import ChatModel
from convergent.models.positions import rescaled_from
from convergent.models.products import sped_up
from convergent.models.resumed import resumable, resuming
from convergent.models.texts import batches, padded

ATTENTION = "convergent_forest"
ON_GPU = 4
"""Times as many tokens in a batch on a GPU: there a pass of a small model takes as long as it takes to launch, up to some thousand tokens."""
_log = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, eq=False)
class Branch:
    """Tokens start to stop of the row, and the row's tokens that they continue."""

    start: int
    stop: int
    path: tuple[int, ...]
    """The tokens before this branch, from the first of its text on."""


@dataclass(eq=False)
class Forest:
    """Texts as one row of tokens."""

    ids: list[int]
    positions: list[int]
    branches: list[Branch]
    at: list[list[int]]
    """Per text the place of each of its tokens in the row."""
    _masks: dict[Any, Any] = field(default_factory=dict)

    def keys(self, branch: Branch, device: torch.device) -> Tensor:
        """(n_keys,) what a branch looks at: its path, then itself."""
        key = ("keys", branch.start)
        if key not in self._masks:
            self._masks[key] = torch.tensor([*branch.path, *range(branch.start, branch.stop)], device=device)
        found: Tensor = self._masks[key]
        return found

    def mask(self, n: int, before: int, window: int | None, like: Tensor) -> Tensor:
        """(n, before + n) 0 where the last n tokens of a text may look, else -inf."""
        key = (n, before, window, like.dtype)
        if key not in self._masks:
            see = torch.ones(n, before + n, dtype=torch.bool).tril(before)
            if window:
                see &= torch.ones(n, before + n, dtype=torch.bool).triu(before - window + 1)
            self._masks[key] = torch.zeros(n, before + n, dtype=like.dtype).masked_fill(~see, float("-inf")).to(like.device)
        found: Tensor = self._masks[key]
        return found

    def dense(self, window: int | None, like: Tensor) -> Tensor:
        """(n_tokens, n_tokens): the same for the whole row at once."""
        key = ("dense", window, like.dtype)
        if key not in self._masks:
            n = len(self.ids)
            mask = torch.full((n, n), float("-inf"), dtype=like.dtype)
            for b in self.branches:
                mask[b.start : b.stop, list(b.path) + list(range(b.start, b.stop))] = self.mask(b.stop - b.start, len(b.path), window, mask)
            self._masks[key] = mask.to(like.device)
        found: Tensor = self._masks[key]
        return found


def forest(sequences: Sequence[Sequence[int]]) -> Forest:
    """Lay out token sequences; none may be empty."""
    made = Forest([], [], [], [[] for _ in sequences])
    order = sorted(range(len(sequences)), key=lambda i: tuple(sequences[i]))
    todo: list[tuple[int, int, int, tuple[int, ...]]] = [(0, len(order), 0, ())]
    while todo:
        low, high, depth, path = todo.pop()
        first = sequences[order[low]]
        # In sorted order, what the first and the last share all share.
        end = depth + _shared(first[depth:], sequences[order[high - 1]][depth:])
        if end > depth:
            start = len(made.ids)
            made.ids += first[depth:end]
            made.positions += range(depth, end)
            made.branches.append(Branch(start, len(made.ids), path))
            path = (*path, *range(start, len(made.ids)))
        while low < high and len(sequences[order[low]]) == end:
            made.at[order[low]] = list(path)
            low += 1
        cuts = [k for k in range(low, high) if k == low or sequences[order[k]][end] != sequences[order[k - 1]][end]]
        todo += reversed([(a, b, end, path) for a, b in pairwise([*cuts, high])])
    return made


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    n = min(len(a), len(b))
    return next((k for k in range(n) if a[k] != b[k]), n)


class _Now(threading.local):
    """What the calling thread reads."""

    forest: Forest
    calls = 0


_now = _Now()


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = ABSENT,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of every token of the row to the tokens of its own text up to itself.

    query (1, n_heads, n_tokens, head_dim); key, value (1, n_kv_heads, n_tokens, head_dim). Returns (1, n_tokens, n_heads, head_dim).
    """
    if kwargs.get("s_aux") is not None or kwargs.get("position_bias") is not None:
        raise ModelError(f"{type(module).__name__}: attention with sinks or a position bias is read in padded batches")
    _now.calls += 1
    now = _now.forest
    window = window_of(module, sliding_window)
    if query.device.type != "cpu":  # one kernel with a mask costs less than one per branch
        return _attend(query, key, value, now.dense(window, query), scaling, softcap).transpose(1, 2), None
    out = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
    for b in now.branches:
        at = now.keys(b, query.device) if b.path else slice(b.start, b.stop)
        mask = now.mask(b.stop - b.start, len(b.path), window, query)
        own = _attend(query[:, :, b.start : b.stop], key[:, :, at], value[:, :, at], mask, scaling, softcap)
        out[:, b.start : b.stop] = own.transpose(1, 2)
    return out, None


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float | None, softcap: float | None) -> Tensor:
    """(1, n_heads, n, head_dim)."""
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, enable_gqa=k.shape[1] != q.shape[1])
    times = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(times, 1).transpose(2, 3) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    weights = (torch.tanh(scores / softcap) * softcap + mask).softmax(-1, dtype=torch.float32).to(v.dtype)
    return weights @ v.repeat_interleave(times, 1)


@dataclass(eq=False)
class Batch:
    """Some texts, ready to be read. Tokens count in the flat order of a pass: `h.flatten(0, 1)` of what a module returns."""

    members: list[int]
    """Which of the given texts."""
    inputs: dict[str, Tensor]
    at: list[Tensor]
    """Per member the (n_tokens,) places of its tokens."""
    forest: Forest | None
    """None: whole texts, padded."""
    kept: dict[int, Any] = field(default_factory=dict)
    """Block -> its output in the clean model."""

    @property
    def n_tokens(self) -> int:
        return self.inputs["input_ids"].numel()


def read_in_batches(model: ChatModel, sequences: Sequence[Sequence[int]], batch_tokens: int) -> Iterator[Batch]:
    """All texts in batches of at most `batch_tokens` tokens that are computed, `ON_GPU` times as many on a GPU (one text at least).

    Call it inside `inference_mode` and with no intervention or hook in force: what the model can do is tried first.
    """
    device = model.device
    batch_tokens *= 1 if device.type == "cpu" else ON_GPU
    _head_is_plain(model)
    most = rescaled_from(model)
    alone = [i for i, s in enumerate(sequences) if most is not None and len(s) > most]
    if alone and model.model not in _reads_alone:
        _reads_alone.add(model.model)
        _log.warning("%s: texts of more than %d tokens are read one by one: its rotary positions depend on the longest text beside them", model.base, most)
    if not packs(model):
        for members in batches([len(s) for s in sequences], batch_tokens, most):
            yield _whole(members, sequences, device)
        return
    others = sorted(set(range(len(sequences))) - set(alone))
    for run_of in _runs([sequences[i] for i in others], batch_tokens):
        members = [others[k] for k in run_of]
        yield _packed(members, forest([sequences[i] for i in members]), device)
    for i in alone:
        yield _whole([i], sequences, device)


_reads_alone: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Models of which it was said."""


def _whole(members: list[int], sequences: Sequence[Sequence[int]], device: torch.device) -> Batch:
    ids, mask = padded([sequences[i] for i in members], device)
    at = [torch.arange(len(sequences[i]), device=device) + row * ids.shape[1] for row, i in enumerate(members)]
    return Batch(members, {"input_ids": ids, "attention_mask": mask}, at, None)


def _packed(members: list[int], made: Forest, device: torch.device) -> Batch:
    ids, positions = (torch.tensor([row], device=device) for row in (made.ids, made.positions))
    return Batch(members, {"input_ids": ids, "position_ids": positions}, [torch.tensor(at, device=device) for at in made.at], made)


def _runs(sequences: Sequence[Sequence[int]], batch_tokens: int) -> Iterator[list[int]]:
    """Indices in sorted order, so that texts with the same beginning meet, cut where the forest would grow beyond `batch_tokens`."""
    members: list[int] = []
    total = 0
    for i in sorted(range(len(sequences)), key=lambda i: (tuple(sequences[i]), i)):
        new = len(sequences[i]) - (_shared(sequences[members[-1]], sequences[i]) if members else 0)
        if members and total + new > batch_tokens:
            yield members
            members, total, new = [], 0, len(sequences[i])
        members.append(i)
        total += new
    if members:
        yield members


def run(model: ChatModel, batch: Batch, call: Callable[..., Any] | None = None, clean: int = 0, keep: Collection[int] = (), **more: Any) -> Any:
    """What `call` (the body, if None) returns for a batch.

    `clean`: how many blocks from the first on run as in the clean model, `interventions.hooks.n_clean` of what is in force. Those whose output an earlier pass
    over this batch has left in `batch.kept` are not run; outputs of blocks in `keep` are left there.
    """
    call = model.anatomy.body if call is None else call
    if batch.forest is None:
        return call(**batch.inputs, use_cache=False, **more)
    with _ready(model), resuming(batch.kept, clean, keep):
        _now.forest = batch.forest
        try:
            return call(**batch.inputs, use_cache=False, **more)
        finally:
            del _now.forest


def run_each(model: ChatModel, items: Sequence[T], read: Callable[[T], R]) -> list[R]:
    """`read(item)` for all items, side by side in lanes (see `models.lanes`); each calls `run` or `predictions` over a batch of its own.

    Hooks and interventions are set before: they are the same for all items, and what a hook does for one of them it has to find by its thread.
    """
    if not packs(model) or rescaled_from(model) is not None:  # who knows what else such a model keeps of a pass
        return [read(item) for item in items]
    with _ready(model):
        return in_lanes(read, items, model.device)


_in_use: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Models that are set up for forests."""


@contextmanager
def _ready(model: ChatModel) -> Iterator[None]:
    """Attention and blocks do what the thread's `_now` says, linear layers by the fastest library; within it, nothing."""
    if model.model in _in_use:
        yield
        return
    with ExitStack() as stack:
        stack.enter_context(attending_by(model.model, ATTENTION, attention))
        stack.enter_context(sped_up(model.model))
        stack.enter_context(resumable(model.anatomy.blocks))
        _in_use.add(model.model)
        stack.callback(_in_use.discard, model.model)
        yield


_packs: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


@torch.inference_mode()
def packs(model: ChatModel) -> bool:
    """Whether a forest and a resumed pass give what plain passes give, tried once per model on three short texts."""
    if model.model not in _packs:
        try:
            _packs[model.model] = plain_layers(model.model) and _agrees(model)
        except (ModelError, TypeError, ValueError, KeyError, IndexError, AttributeError, NotImplementedError, RuntimeError) as error:
            _log.debug("%s: %s", type(model.model).__name__, error)
            _packs[model.model] = False
        if not _packs[model.model]:
            _log.warning("%s: texts are read in padded batches: its attention or its blocks are not what packed ones need", type(model.model).__name__)
    return _packs[model.model]


def _agrees(model: ChatModel) -> bool:
    sequences = [(1, 2, 3, 4, 5, 6), (1, 2, 3, 9, 8), (7, 5, 3)]
    batch = _packed([0, 1, 2], forest(sequences), model.device)
    middle, before = model.n_layers // 2, _now.calls
    whole = run(model, batch, clean=middle + 1, keep=(middle,))[0][0]
    if _now.calls - before != model.n_layers:
        return False
    again = run(model, batch, clean=middle + 1)[0][0]
    allowed = 1e-3 if whole.dtype in (torch.float32, torch.float64) else 0.05
    for s, at in zip(sequences, batch.at, strict=True):
        plain = model.anatomy.body(input_ids=torch.tensor([s], device=model.device), use_cache=False)[0][0]
        if any(float((h[at] - plain).float().norm() / plain.float().norm()) > allowed for h in (whole, again)):
            return False
    return True


CHUNK = 64
"""Rows of logits at a time: over 49k words they fit a CPU's cache."""


def predictions(model: ChatModel, batch: Batch, at: Tensor, clean: int = 0, keep: Collection[int] = ()) -> Iterator[tuple[slice, Tensor]]:
    """Logits (n, vocabulary) float32 or wider of what follows the tokens `at` of a batch, some at a time: (rows of `at`, logits). See `run`.

    The head runs on those tokens only. Run all of it under the same interventions.
    """
    if _head_is_plain(model):
        head: Any = model.anatomy.head
        hidden = run(model, batch, clean=clean, keep=keep)[0].flatten(0, 1)[at]
        chunks = ((slice(i, i + CHUNK), head(hidden[i : i + CHUNK])) for i in range(0, len(at), CHUNK))
    else:
        logits = run(model, batch, model.model, clean, keep).logits.flatten(0, 1)[at]
        chunks = ((slice(i, i + CHUNK), logits[i : i + CHUNK]) for i in range(0, len(at), CHUNK))
    for rows, part in chunks:
        yield rows, part.to(torch.promote_types(part.dtype, torch.float32))


_plain_heads: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def _head_is_plain(model: ChatModel) -> bool:
    """`head_is_plain`, tried once per model."""
    if model.model not in _plain_heads:
        _plain_heads[model.model] = head_is_plain(model)
    return _plain_heads[model.model]
