"""What the benchmarks share: sides in alternating order, ratios within a repeat, the machine, versions, and one JSON line.

A benchmark measures *sides* (this project, its peers, the machine's own line) on the same work in one run. Each repeat runs every side once, in an order that
turns round from repeat to repeat, so that what else the machine does falls on all alike; a ratio is taken within a repeat, and its median and extremes are shown.
A peer that is missing or fails is named with its reason; a failure of our own side ends the run. Knows nothing of what is measured.

The line on stdout: {"claim", "rows": {row: {"target", "peer", "ratios", "note", "unit", "at_most", "most"}}, "sides", "unit", "failed", "settings", "versions", "machine", ...}. `benchmarks/run.py`
collects it, `scripts/write_benchmarks.py` makes the page of it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

OURS = "convergent"
FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_bf16", "amx_int8")
VERSIONED = ("convergent", "torch", "transformers", "numpy")


def arguments(doc: str | None, repeats: int = 5) -> argparse.ArgumentParser:
    """The options every benchmark has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="less work and two repeats: shows that it runs, its figures mean little")
    parser.add_argument("--repeats", type=int, help=f"default {repeats}, with --quick 2")
    parser.add_argument("--threads", type=int, default=_cores(), help="of every side (default: all cores)")
    parser.set_defaults(full_repeats=repeats)
    return parser


def started(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options given, with threads set; notes when the run began."""
    options = parser.parse_args()
    options.repeats = options.repeats or (2 if options.quick else options.full_repeats)
    options.began = time.perf_counter()
    torch.set_num_threads(options.threads)
    return options


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Sides:
    """Figures of each side by repeat; `ours` are those that must not fail."""

    def __init__(self, sides: Mapping[str, Callable[[], float]], ours: Sequence[str] = (OURS,)) -> None:
        self.sides, self.ours = dict(sides), ours
        self.figures: dict[str, list[float]] = {name: [] for name in sides}
        self.failed: dict[str, str] = {}

    def measure(self, repeats: int) -> Sides:
        for repeat in range(repeats):
            for name in list(self.sides)[:: 1 if repeat % 2 == 0 else -1]:
                if name in self.failed:
                    continue
                try:
                    self.figures[name].append(self.sides[name]())
                except Exception as error:
                    if name in self.ours:
                        raise
                    self.fail(name, error)
        return self

    def fail(self, name: str, error: object) -> None:
        """Say why `name` has no figures."""
        self.failed[name] = why(error)
        self.figures.pop(name, None)

    def ratios(self, ours: str, peer: str, more_is_better: bool = True) -> list[float]:
        """How many times better `ours` was than `peer`, repeat by repeat; empty if one of them has no figures."""
        pairs = list(zip(self.figures.get(ours, []), self.figures.get(peer, []), strict=False))
        return [a / b if more_is_better else b / a for a, b in pairs]

    def best(self, names: Sequence[str], more_is_better: bool = True) -> str | None:
        """The one of `names` with the best median; None if all failed."""
        there = [n for n in names if self.figures.get(n)]
        return (max if more_is_better else min)(there, key=lambda n: statistics.median(self.figures[n]), default=None)

    def show(self, unit: str) -> None:
        for name, values in self.figures.items():
            print(f"{name:28s} {spread(values)} {unit}")
        for name, reason in self.failed.items():
            print(f"{name:28s} FAILED: {reason}")


def why(error: object) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return (f"{type(error).__name__}: {text}" if isinstance(error, Exception) else text)[:240]


def spread(values: Sequence[float]) -> str:
    """Median (least to most)."""
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})" if values else "none"


def row(
    ratios: Sequence[float], target: float | None, peer: str, note: str = "", unit: str = "x", at_most: bool = False, most: float | None = None
) -> dict[str, Any]:
    """One line of the table; `ratios` empty says that it was not measured, and `note` why. With another unit they are figures, and `at_most` says which way is good.

    With `most` the target has two ends: met is a median from `target` to `most`.
    """
    return {"ratios": list(ratios), "target": target, "peer": peer, "note": note, "unit": unit, "at_most": at_most, "most": most}


def finish(
    options: argparse.Namespace, claim: str, rows: Mapping[str, Mapping[str, Any]], sides: Sides | None = None, unit: str = "",
    versions: Mapping[str, str] | None = None, settings: Mapping[str, Any] | None = None, **more: Any,
) -> None:  # fmt: skip
    """Print what was seen, and the JSON line last."""
    if sides:
        sides.show(unit)
    for name, r in rows.items():
        target = "" if r["target"] is None else f", target {'at most' if r['at_most'] else 'at least'} {r['target']:g}" + ("" if r["most"] is None else f" and at most {r['most']:g}")
        print(f"{name}: {spread(r['ratios'])} {r['unit']}{target}" + (f", against {r['peer']}" if r["peer"] else "") + (f" ({r['note']})" if r["note"] else ""))
    record = {
        "claim": claim, "date": datetime.datetime.now(datetime.UTC).date().isoformat(), "quick": options.quick, "repeats": options.repeats, "rows": rows,
        "sides": sides.figures if sides else {}, "unit": unit, "failed": sides.failed if sides else {}, "settings": dict(settings or {}),
        "versions": {**installed(*VERSIONED), **(versions or {})}, "machine": machine(options.threads),
        "seconds": round(time.perf_counter() - options.began, 1), **more,
    }  # fmt: skip
    print(json.dumps(record))


def installed(*names: str) -> dict[str, str]:
    """Versions of packages in this environment."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine(threads: int) -> dict[str, Any]:
    """The machine in words and flags, without names of hosts or users."""
    return {
        "cpu": _field("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(), "threads": threads, "isa": [f for f in FLAGS if f in _field("flags").split()],
        "torch_isa": torch.backends.cpu.get_cpu_capability(), "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30) if hasattr(os, "sysconf") else None,
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": platform.system(), "python": platform.python_version(),
    }  # fmt: skip


def _field(name: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == name), "")
