"""How much memory this process held at most while a stage worked, in MiB: what stands beside the stage's seconds.

    resident   the process's peak resident set while the stage ran: models, libraries and mapped files included, not what the stage added; of this
               process alone, so the server of a llama.cpp judge is not in it
    device     the largest of torch's allocations on one GPU while the stage ran; 0 if none was used

Linux counts from the moment that it is told to (`/proc/self/clear_refs`). Where that cannot be had, as on macOS or without the right to, the peak is
that of the process since its start: a bound of the stage's own, and marked "so far".
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

MIB = 2**20
_RESET = "5"
"""What `clear_refs` takes for "forget the peak of the resident set" (man 5 proc)."""


@dataclass(frozen=True)
class Peak:
    """Of one stage, or of several; 0 is not measured."""

    resident: float = 0.0
    device: float = 0.0
    so_far: bool = False
    """`resident` is the process's since its start: the stage's own is not larger, and may be smaller."""

    def __or__(self, other: Peak) -> Peak:
        """Of both together."""
        high = max(self, other, key=lambda p: (p.resident, not p.so_far))
        return Peak(high.resident, max(self.device, other.device), high.so_far)

    def __str__(self) -> str:
        """ "812 MiB", "812 MiB so far, 300 MiB on the GPU"; empty if nothing was measured."""
        host = [f"{self.resident:,.0f} MiB{' so far' if self.so_far else ''}"] if self.resident else []
        return ", ".join(host + ([f"{self.device:,.0f} MiB on the GPU"] if self.device else []))


class Watch:
    """`with Watch() as watch: ...`, then `watch.peak`. One may run inside another: the outer one's peak holds the inner one's."""

    _running: ClassVar[list[Watch]] = []  # the counters are the process's, so whoever sets them back must let the others read them first

    def __enter__(self) -> Watch:
        for other in self._running:
            other._look()
        self.peak = Peak()
        self._so_far = not _set_back()
        self._running.append(self)
        return self

    def __exit__(self, *exc: object) -> None:
        self._look()
        self._running.remove(self)

    def _look(self) -> None:
        resident = _resident()
        self.peak |= Peak(resident or 0.0, _device(), bool(resident) and self._so_far)


def highest(peaks: Iterable[Peak]) -> Peak:
    """Of several stages that ran one after the other."""
    found = Peak()
    for peak in peaks:
        found |= peak
    return found


def _set_back() -> bool:
    """Begin to count anew; False if the resident set's peak cannot be."""
    if torch.cuda.is_initialized():
        for gpu in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(gpu)
    if _high_water() is None:
        return False
    try:
        Path("/proc/self/clear_refs").write_text(_RESET, encoding="ascii")
    except OSError:
        return False
    return True


def _high_water() -> float | None:
    """Linux's count, which can be set back."""
    with suppress(OSError):
        found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
        return int(found[1]) / 1024 if found else None
    return None


def _resident() -> float | None:
    """MiB; since the last `_set_back` where that is to be had, else since the process began."""
    if (since := _high_water()) is not None:
        return since
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / MIB if sys.platform == "darwin" else used / 1024


def _device() -> float:
    if not torch.cuda.is_initialized():
        return 0.0
    return max((torch.cuda.max_memory_allocated(gpu) for gpu in range(torch.cuda.device_count())), default=0) / MIB
