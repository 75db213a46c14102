"""Decoding steps as CUDA graphs: what a step launches, some thousand small kernels, is launched at once instead of one by one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable

import torch

from convergent.sampling.memory import out_of_memory

_log = logging.getLogger(__name__)


class Graphs:
    """Steps by key. One is run plainly the first time, so that libraries set up what they need, captured the second, and replayed from then on.

    A step must read and write tensors that stay where they are, and wait for nothing. Elsewhere than on a GPU it is always run plainly.
    """

    def __init__(self, device: torch.device) -> None:
        self._used = device.type == "cuda"
        self._ran: set[Hashable] = set()
        self._made: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle() if self._used else None

    def run(self, key: Hashable, step: Callable[[], None]) -> None:
        """Do a step, which must be the same for the same key."""
        if self._used and key in self._ran and key not in self._made:
            self._capture(key, step)
        if key in self._made:
            self._made[key].replay()
        else:
            step()
            self._ran.add(key)

    def _capture(self, key: Hashable, step: Callable[[], None]) -> None:
        graph, aside = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(aside):
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    step()
                finally:
                    graph.capture_end()
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            self._used = False
            _log.warning("sampling: steps are launched one by one, as they cannot be captured: %s", " ".join(str(error).split())[:200])
            return
        torch.cuda.current_stream().wait_stream(aside)
        self._made[key] = graph
