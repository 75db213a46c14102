"""How fast this machine multiplies matrices, which is what a plan's times are estimated from.

On a CPU each core multiplies by a thread of its own, as the sampler's lanes do. The rate counts a thread's own processor time, so that another program
takes time from the probe and not from the figure; the share of the clock that the threads got says whether there is one.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from convergent.models.lanes import side_by_side
from convergent.models.products import linear

BURSTS, BURST_SECONDS = 6, 0.02
"""Of the probe, per thread: the best counts, as caches and clocks need a moment."""
QUIET = 0.8
"""Share of the clock below which other programs are at work."""
ROWS = {"cpu": (128, 576, 1536), "cuda": (8192, 4096, 4096)}
"""(rows, d_in, d_out) of the products: a batch at the embedded model's width; on a GPU enough to fill it."""


@dataclass(frozen=True)
class Burst:
    """Products on end."""

    flop: float
    wall: float
    """Seconds by the clock."""
    own: float
    """Seconds that the thread itself ran."""


@dataclass(frozen=True)
class Speed:
    """What the probe found."""

    flops: float
    """Operations a second of all cores, with the machine to itself."""
    got: float = 1.0
    """Share of the clock that the probe was given, 0 to 1."""
    training: float | None = None
    """Operations a second in float32, which organisms are trained in; None if all work is at one rate."""

    @property
    def busy(self) -> bool:
        """Whether other programs take so much of the machine that no time can be told."""
        return self.got < QUIET


def measure(device: str, dtype: str) -> Speed:
    """Probe `device` ("cpu", "cuda:1", ...) at a dtype ("float32", ...); a tenth of a second."""
    kind = device.partition(":")[0]
    size, kept = ROWS["cuda" if kind == "cuda" else "cpu"], getattr(torch, dtype)
    if kind != "cpu":  # what waits for a GPU's work runs on no core
        found = [Burst(b.flop, b.wall, b.wall) for b in _bursts(size, kept, device)]
        return summed([found])
    lanes: list[list[Burst]] = []
    side_by_side(lambda _: lanes.append(_bursts(size, kept, device)), torch.get_num_threads(), 1, threading.Event())
    return summed(lanes)


def summed(lanes: Sequence[Sequence[Burst]]) -> Speed:
    """The best burst of each lane, added up, and the share of the clock that they got together."""
    flops = sum(max(b.flop / (b.own or b.wall) for b in lane) for lane in lanes)  # a coarse clock may count nothing of a burst
    own, wall = (sum(getattr(b, k) for lane in lanes for b in lane) for k in ("own", "wall"))
    return Speed(flops, min(1.0, own / wall))


@torch.inference_mode()
def _bursts(size: tuple[int, int, int], dtype: torch.dtype, device: str) -> list[Burst]:
    rows, d_in, d_out = size
    x, w = torch.ones(rows, d_in, dtype=dtype, device=device), torch.ones(d_out, d_in, dtype=dtype, device=device)

    def finish() -> None:
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        elif x.device.type == "mps":
            torch.mps.synchronize()

    linear(x, w)
    finish()
    found = []
    for _ in range(BURSTS):
        start, own, n = time.perf_counter(), time.thread_time(), 0
        while time.perf_counter() - start < BURST_SECONDS:
            linear(x, w)
            finish()
            n += 1
        found.append(Burst(2.0 * rows * d_in * d_out * n, time.perf_counter() - start, time.thread_time() - own))
    return found


def parameters(folder: Path) -> int:
    """Number of weights of a base, from the headers of its safetensors files."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return total
