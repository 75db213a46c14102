"""Run a study in several processes on one machine: organisms side by side, then experiments side by side, then the report.

    python scripts/parallel_study.py studies/paper_small.yaml --out runs/paper_small --jobs 8 [--set PLACE=VALUE ...]

For a machine that one process does not fill: a GPU with a small base, or many cores. Every job works in a folder of its own under OUT.jobs with a copy of what is
there, and `convergent merge`s back; killed, it goes on with the merged part. On a cluster do the same by hand: `convergent run STUDY --only X` on each machine.
Numbers are those of a single run. Times by stage are sums over the jobs, which slow each other down; peaks of memory are of one job.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from convergent.experiments import registry
from convergent.store import DATABASE, opened
from convergent.study.main import merge_studies
from convergent.study.plan import make_plan
from convergent.study.run import Run
from convergent.study.spec import load_study


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=4)
    parser.add_argument("--set", action="append", default=[], dest="changes")
    parser.add_argument("--train", nargs="+", help=argparse.SUPPRESS)  # a job: train these
    options = parser.parse_args()
    if options.train:
        train(options.study, options.out, options.changes, options.train)
        return
    began = time.perf_counter()

    def say(what: str) -> None:
        print(f"[{time.perf_counter() - began:6.1f} s] {what}", flush=True)

    spec, jobs = load_study(options.study, options.changes), options.out.with_name(f"{options.out.name}.jobs")
    with opened(options.out) as store:
        run = Run(spec, store, say=say)
        run.check()
        run.read_all("before")  # what is registered before any organism is there
        untrained = [o.name for o in run.organisms.values() if o.recipe is not None and not o.folder.is_dir()]
    say(f"training {len(untrained)} organisms")
    for folder in together(options, jobs, "train", [untrained[i :: options.jobs] for i in range(options.jobs)], lambda names: [__file__, options.study, "--train", *names]):
        with opened(options.out) as store:
            store.absorb(folder)
    say("what all experiments need")
    log = options.out.with_name(f"{options.out.name}.log")
    if call(["-m", "convergent", "run", options.study, "--only", "plain", "--no-report"], options.out, options.changes, log):
        raise SystemExit(f"{options.study}: what all experiments need failed; see {log}")
    with opened(options.out) as store:
        stages = make_plan(Run(spec, store, compute=False))
    cost = {name: 60.0 + sum(s.seconds for s in stages if s.name == f"read {name}") for name in spec.experiments if name != "plain"}
    say(f"{len(cost)} experiments")
    parts: list[list[str]] = [[] for _ in range(options.jobs)]
    # Those that others use go with these, so that they are done once.
    groups = [[n, *(u for u in registry.uses(n) if u in cost)] for n in cost if not any(n in registry.uses(other) for other in cost)]
    for group in sorted(groups, key=lambda g: -sum(cost[n] for n in g)):
        min(parts, key=lambda p: sum(cost[n] for n in p)).extend(group)
    done = together(options, jobs, "only", parts, lambda names: ["-m", "convergent", "run", options.study, "--no-report", *(x for n in names for x in ("--only", n))])
    for folder, n in merge_studies(options.out, done):
        say(f"merged {folder.name}: {n} rows")
    if failed := call(["-m", "convergent", "run", options.study, "--profile"], options.out, options.changes, None):
        raise SystemExit(failed)
    shutil.rmtree(jobs)
    say("done")


def train(study: str, out: Path, changes: Sequence[str], names: Sequence[str]) -> None:
    """Train some organisms of a study."""
    with opened(out) as store:
        run = Run(load_study(study, changes), store, say=print)
        run.train_all(names)


def together(options: argparse.Namespace, jobs: Path, kind: str, parts: Iterable[list[str]], command: Callable[[list[str]], list[str]]) -> list[Path]:
    """Run a command for every part that is not empty, each in a copy of the study folder without its times; the folders of all that succeeded."""
    folders = []
    with ThreadPoolExecutor(options.jobs) as pool:
        running = []
        for i, names in enumerate(parts):
            if not names:
                continue
            folder = jobs / f"{kind}-{i}"
            if not (folder / DATABASE).is_file():
                copy(options.out, folder)
            running.append(pool.submit(call, command(names), folder, options.changes, jobs / f"{folder.name}.log"))
            folders.append(folder)
        failed = [f for f, one in zip(folders, running, strict=True) if one.result()]
    for folder in failed:
        print(f"{folder.name} failed; see {jobs / folder.name}.log", flush=True)
    return [f for f in folders if f not in failed]


def copy(source: Path, folder: Path) -> None:
    """A study folder like `source`; what is never written again is linked."""
    shutil.copytree(source, folder, copy_function=lambda a, b: os.link(a, b) if a.endswith(".safetensors") else shutil.copy2(a, b))
    with opened(folder) as store:
        store.forget_seconds()


def call(command: Sequence[str], out: Path, changes: Sequence[str], log: Path | None) -> int:
    """Run python with `command` on a folder; the exit code."""
    whole = [sys.executable, *command, "--out", str(out), *(x for c in changes for x in ("--set", c))]
    if log is None:
        return subprocess.run(whole).returncode
    with log.open("w") as file:
        return subprocess.run(whole, stdout=file, stderr=subprocess.STDOUT).returncode


if __name__ == "__main__":
    main()
