"""What was timed on this machine, remembered in the cache: the choice that follows from it should not change from run to run."""

from __future__ import annotations

import functools
import json
import platform
from collections.abc import Callable
from pathlib import Path

import torch

from convergent.cache import cache_dir, write_text


def remembered(name: str, n_threads: int, measure: Callable[[], float]) -> float:
    """What `measure` returned the first time on this kind of machine with this torch and so many threads."""
    key = f"{_processor()}-{torch.backends.cpu.get_cpu_capability()}-{torch.__version__}-{n_threads}"
    path = cache_dir() / f"{name}.json"
    try:
        known = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        known = {}
    if key not in known:
        known[key] = round(measure(), 3)
        write_text(path, json.dumps(known, indent=1))
    return float(known[key])


@functools.cache
def _processor() -> str:
    """Makers of processors are told apart, as libraries do."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
