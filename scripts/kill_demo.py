"""kill -9 at random moments of the demo study, on the real model: the same rows and figures as an undisturbed run?

    python scripts/kill_demo.py --out runs/kills                                  # ten kills of the whole demo: about an hour
    python scripts/kill_demo.py --out runs/kills --examples 32 --samples 2        # the same chain, smaller

Each run is a new process, as a user's would be. The moments are drawn from a named seed: each is a share of the time that the undisturbed run took. What CI
runs is `tests/test_kill.py`, on tiny models.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from convergent.core.ids import seed

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from test_kill import TABLES, figures, rows

COMMAND = [sys.executable, "-m", "convergent", "run"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, default=Path("studies/demo.yaml"))
    parser.add_argument("--out", type=Path, default=Path("runs/kills"))
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--examples", type=int, help="training examples per organism, if not the study's")
    parser.add_argument("--samples", type=int, help="answers per question, if not the study's")
    parser.add_argument("--name", default="demo", help="seed of the moments")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    study = options.out / "study.yaml"
    study.write_text(yaml.safe_dump(smaller(yaml.safe_load(options.study.read_text(encoding="utf-8")), options.examples, options.samples)), encoding="utf-8")
    calm, killed = options.out / "undisturbed", options.out / "killed"
    for folder in (calm, killed):
        shutil.rmtree(folder, ignore_errors=True)
    whole = run(study, calm, None)[1]
    print(f"undisturbed: {whole:.0f} s", flush=True)
    draw = np.random.default_rng(seed("kill-demo", options.name))
    # Starting takes a part of every run; the kills are spread over the work that follows.
    for n in range(options.kills):
        limit = float(draw.uniform(0.02, 2.0 / options.kills)) * whole
        code, took = run(study, killed, limit)
        print(f"kill {n + 1}: after {took:.1f} s" if code is None else f"kill {n + 1}: the study was done before, after {took:.1f} s", flush=True)
    code, took = run(study, killed, None)
    print(f"last run: {took:.0f} s", flush=True)
    print(compare(calm, killed))


def smaller(study: dict[str, Any], examples: int | None, samples: int | None) -> dict[str, Any]:
    """The study with fewer examples and answers."""
    if examples:
        for organism in study["organisms"].values():
            organism["examples"] = examples
    if samples:
        study["questions"]["samples"] = samples
        study["direction"]["samples"] = 3 * samples
        study["direction"]["classes"]["min_per_class"] = 1
    return study


def run(study: Path, out: Path, limit: float | None) -> tuple[int | None, float]:
    """(exit code or None if killed, seconds)."""
    start = time.monotonic()
    process = subprocess.Popen([*COMMAND, str(study), "--out", str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        _, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return None, time.monotonic() - start
    if process.returncode:
        raise SystemExit(f"{study}: exit code {process.returncode}\n{errors[-2000:]}")
    return process.returncode, time.monotonic() - start


def compare(calm: Path, killed: Path) -> str:
    """A line per table; raises SystemExit at the first difference."""
    lines = []
    for table in TABLES:
        want, found = rows(calm, table), rows(killed, table)
        if want != found:
            raise SystemExit(f"{table}: {len(set(want) - set(found))} rows lost or changed, {len(set(found) - set(want))} that should not be there")
        lines.append(f"{table}: {len(want)} rows, all equal")
    want_tables, found_tables = figures(calm), figures(killed)
    if want_tables.keys() != found_tables.keys():
        raise SystemExit(f"tables differ: {sorted(want_tables.keys() ^ found_tables.keys())}")
    for name, frame in want_tables.items():
        pd.testing.assert_frame_equal(found_tables[name], frame, check_exact=True, obj=name)
        lines.append(f"{name}: {len(frame)} rows, all equal")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
