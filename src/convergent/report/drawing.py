"""What is drawn for the page, and by whom: in this process, or by others, so that it is ready when the rest of the page is.

Knows of drawing only what comes of it: matplotlib is imported where it happens.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from multiprocessing import get_context, parent_process
from threading import Thread
from typing import TYPE_CHECKING, Any, TypeAlias

from convergent.errors import StoreError

if TYPE_CHECKING:
    from convergent.core.chapter import Chapter
    from convergent.report.results import Results

Do: TypeAlias = Callable[..., Iterable[Any]]
"""The builtin `map`, or one that works ahead elsewhere: results come in the order of what is asked, an error in the place of its result."""


@dataclass(frozen=True)
class Legend:
    """One entry of a legend, drawn by the page."""

    label: str
    colour: str
    marker: str = ""
    hollow: bool = False
    dash: str = ""
    """SVG stroke-dasharray; "none" draws no line."""


@dataclass(frozen=True)
class Figure:
    """A figure of the page; without drawings (`wide` empty) it says that nothing was measured.

    Without `narrow`, `wide` holds panels that serve every width.
    """

    id: str
    title: str
    caption: str = ""
    desc: str = ""
    wide: str = ""
    narrow: str = ""
    legend: tuple[Legend, ...] = ()
    header: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    groups: tuple[tuple[str, tuple[tuple[str, ...], ...]], ...] = ()
    """Rows under headings, instead of `rows`."""


@dataclass(frozen=True)
class DrawnTable:
    """A sheet as texts."""

    title: str
    note: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Drawn:
    """A chapter ready for the page."""

    id: str
    title: str
    method: tuple[str, ...]
    figures: tuple[Figure, ...]
    tables: tuple[DrawnTable, ...]
    notes: tuple[str, ...]


FIGURES = ("grid.sensitivity", *(f"figures.{name}" for name in ("conditions", "steering", "cosines", "norms", "margins", "training", "further")))
"""Of the core experiments, by the function that draws each, with its module of this package; first what takes longest."""
HANDS = 2
"""Processes that draw."""


@dataclass(frozen=True)
class Drawings:
    """All that is drawn of a study; each is waited for when it is taken."""

    chapters: Iterable[Drawn]
    figures: Iterable[Figure | None]


def begin(results: Results, do: Do = map) -> Drawings:
    """Have everything drawn by `do`."""
    # Answers and chapters are most of the results, and no figure shows them.
    rest = replace(results, answers=results.answers.head(0), chapters=())
    return Drawings(do(_chapter, results.chapters), do(partial(_figure, rest), FIGURES))


def _chapter(chapter: Chapter) -> Drawn:
    from convergent.report.chapters import drawn

    return drawn(chapter)


def _figure(results: Results, name: str) -> Figure | None:
    module, _, function = name.partition(".")
    made: Figure | None = getattr(import_module(f"{__package__}.{module}"), function)(results)
    return made


@contextmanager
def hands() -> Iterator[Do]:
    """A `Do` by processes of their own, which import matplotlib while the caller does something else; `map` where they are not to be had.

    For a process that has not started threads yet: these are forked, and in no other way would a script without `if __name__ == "__main__"` be
    safe from running again. Raises StoreError if one is killed.
    """
    pool = _pool()
    if pool is None:
        yield map
        return
    try:
        pool.submit(int)  # they start now
        yield pool.map
    except BrokenProcessPool as error:
        raise StoreError("report: a process that drew figures was killed, perhaps for want of memory; run the same command again") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _pool() -> ProcessPoolExecutor | None:
    if sys.platform != "linux" or len(os.sched_getaffinity(0)) < HANDS:  # elsewhere no fork is safe beside the system's own libraries
        return None
    try:
        return ProcessPoolExecutor(HANDS, get_context("fork"), _get_ready)
    except (OSError, ImportError, NotImplementedError):  # a container without semaphores
        return None


def _get_ready() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's to handle
    Thread(target=_end_with_the_caller, daemon=True).start()
    from convergent.report import chapters, figures  # noqa: F401


def _end_with_the_caller() -> None:
    """Without it, processes whose caller was killed would wait for work for good."""
    caller = parent_process()
    assert caller is not None, "a process of a pool has one"
    caller.join()
    os._exit(1)
