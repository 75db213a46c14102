"""Pieces of work side by side, each computed by one thread alone.

Threads that share one small operation after the other wait for each other between any two, and where another program has a core they mostly wait. With a
piece for every core nothing is shared: packed passes of the embedded model are a quarter faster side by side than one after the other on two cores, and a
multiple beside another busy program (docs/training_speed.md).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

import torch

MOST_LANES = 8
"""With more cores a lane gets several: each needs memory of its own."""

T = TypeVar("T")
R = TypeVar("R")


def lanes_on(device: torch.device) -> tuple[int, int]:
    """(lanes, threads of each): one lane on a GPU."""
    cores = torch.get_num_threads()
    if device.type != "cpu":
        return 1, cores
    n_threads = -(-cores // MOST_LANES)
    return cores // n_threads, n_threads


def groups(items: Iterable[T], device: torch.device) -> Iterator[list[T]]:
    """As many items at a time as there are lanes, none of them made before its group is due."""
    waiting, (n, _) = iter(items), lanes_on(device)
    while group := list(islice(waiting, n)):
        yield group


def side_by_side(work: Callable[[int], None], n: int, n_threads: int, stopped: threading.Event) -> None:
    """`work(k)` for k < n, each in a thread of its own that computes on `n_threads`. When this ends, however it ends, `stopped` is set and all are at rest."""

    def alone(k: int) -> None:
        torch.set_num_threads(n_threads)  # of this thread
        work(k)

    threads = [threading.Thread(target=alone, args=(k,), name="lane", daemon=True) for k in range(n)]
    before = torch.get_num_threads()
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        stopped.set()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
        torch.set_num_threads(before)


def in_lanes(work: Callable[[T], R], items: Sequence[T], device: torch.device) -> list[R]:
    """`work(item)` for all items, in their order; item k is computed in lane k modulo the number of lanes.

    One item alone gets all threads. Inference mode is the caller's, gradients are as in a new thread. All lanes are at rest when this ends, however it ends;
    raises what an item raised.
    """
    n_lanes, n_threads = lanes_on(device)
    if n_lanes == 1 or len(items) == 1:
        return [work(item) for item in items]
    found: dict[int, R] = {}
    errors: dict[int, BaseException] = {}
    stopped, inference = threading.Event(), torch.is_inference_mode_enabled()

    def lane(first: int) -> None:
        for k in range(first, len(items), n_lanes):
            if stopped.is_set():
                return
            try:
                with torch.inference_mode(inference):
                    found[k] = work(items[k])
            except BaseException as error:
                stopped.set()
                errors[k] = error

    side_by_side(lane, min(n_lanes, len(items)), n_threads, stopped)
    if errors:
        raise errors[min(errors)]
    return [found[k] for k in range(len(items))]
