"""Passes that begin in the middle: blocks whose output an earlier pass over the same tokens has left are not run again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from convergent.models.anatomy import stream, with_stream
from convergent.models.patched import forward_of


class _Now(threading.local):
    """What the calling thread's pass resumes from, and leaves."""

    kept: dict[int, Any]
    """Block -> its output in the clean model."""
    clean = 0
    """Blocks from the first on that compute as in the clean model."""
    latest = -1
    """The block after which computing resumes; -1: all are run."""
    keep: Collection[int] = ()


_now = _Now()


@contextmanager
def resumable(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Run the body with blocks that do as `resuming` says; outside it they are run as ever."""
    with ExitStack() as stack:
        for layer, block in enumerate(blocks):
            stack.enter_context(forward_of(block, _forward(block.forward, layer)))
        yield


@contextmanager
def resuming(kept: dict[int, Any], clean: int, keep: Collection[int]) -> Iterator[int]:
    """Run the body, a pass of this thread, without the blocks up to the latest in `kept` that is among the first `clean`, which compute as in the clean model
    (`interventions.hooks.n_clean`); yields that block, -1 if all are run. Outputs of clean blocks that are in `keep` are left in `kept`.
    """
    _now.kept, _now.clean, _now.keep = kept, clean, keep
    _now.latest = max((layer for layer in kept if layer < clean), default=-1)
    try:
        yield _now.latest
    finally:
        del _now.kept
        _now.clean, _now.latest, _now.keep = 0, -1, ()


def _forward(own: Callable[..., Any], layer: int) -> Callable[..., Any]:
    """A block that is not run where its output, or that of a later block, is kept; hooks on what it hands on still run."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        if layer <= _now.latest:
            kept = _now.kept.get(layer)
            # Below the block that computing resumes after, nobody looks at what is handed on.
            return _copied(kept) if kept is not None else with_stream(_now.kept[_now.latest], args[0] if args else kwargs["hidden_states"])
        output = own(*args, **kwargs)
        if layer < _now.clean and layer in _now.keep:
            _now.kept[layer] = _copied(output)
        return output

    return forward


def _copied(output: Any) -> Any:
    return with_stream(output, stream(output).clone())  # some blocks go on in place
