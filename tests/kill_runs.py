"""Runs a small study undisturbed, and again and again under kill -9; prints what was seen as JSON. Called by test_kill.py.

    python kill_runs.py FOLDER N_KILLS SEED

Each run is a process of its own, forked after the imports, so that kills fall on the study's work and not on the loading of libraries. A kill
comes after a random share (named seed) of the time that is left; when a study is done, the next one starts in an empty folder, until all kills
have been dealt.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch

from convergent import cli
from convergent.core.ids import seed
from convergent.judging.base import Item
from convergent.judging.embedded import EmbeddedJudge
from convergent.organisms import train  # noqa: F401  (imported here once, not by every fork)
from convergent.report import page  # noqa: F401
from convergent.study import main as study_main  # noqa: F401
from small_study import small_study, write_study
from tiny import tiny_model


def run(study: Path, out: Path, log: Path, limit: float | None = None) -> int | None:
    """Exit code of `convergent run`, or None if it was killed after `limit` seconds."""
    child = os.fork()
    if child == 0:
        for stream in (1, 2):
            os.dup2(os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY), stream)
        code = 99
        try:
            code = cli.main(["run", str(study), "--out", str(out)])
        finally:
            os._exit(code)
    end = time.monotonic() + (limit if limit is not None else 1e9)
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return None if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)


def main(root: Path, n_kills: int, name: str) -> None:
    torch.set_num_threads(1)
    study = small_study(tiny_model())
    for organism in study["organisms"].values():
        organism["epochs"] = 3  # 12 steps: one checkpoint to go on from
    path = write_study(root, study)
    EmbeddedJudge().judge([Item("warm", "Why?", "So that no fork has to load it.")])
    start = time.monotonic()
    code = run(path, root / "undisturbed", root / "undisturbed.log")
    whole = time.monotonic() - start
    report = {"undisturbed": code, "seconds": round(whole, 1), "codes": [], "kills": [], "folders": []}
    draw = np.random.default_rng(seed("kill", name))
    dealt = 0
    while dealt < n_kills:
        out, left = root / f"killed-{len(report['folders'])}", whole
        report["folders"].append(out.name)
        code = None
        while code is None and dealt < n_kills:
            limit = float(draw.uniform(0.02, 0.6)) * left
            code = run(path, out, root / f"{out.name}.log", limit)
            if code is None:
                dealt += 1
                report["kills"].append({"folder": out.name, "after": round(limit, 2), "whole": round(whole, 2)})
                left = max(0.1 * whole, left - limit)
        report["codes"].append(run(path, out, root / f"{out.name}.log") if code is None else code)
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
