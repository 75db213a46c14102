"""What is waited for before any work: `convergent --help`, imports, loading the model, and the report of a finished study. Each in a new process.

    help     wall-clock of `convergent --help`, interpreter included; bare `python -c pass` stands beside it
    import   of the package, and of what loading needs (torch, transformers)
    load     of the embedded model once those are imported, and how much memory of its own that took (weights that are mapped from the file take none)
    report   of a finished study (`--study FOLDER`), on a copy
    demo     all of it, as its folder says: read and not run, where `--study` is the demo
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from common import Sides, arguments, finish, row, started

from convergent.store import looked_at

CLI = "import sys; from convergent.cli import main; sys.exit(main())"
LOAD = """
import json, os, sys, time
start = time.perf_counter()
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
from convergent.models.load import load_base
imported = time.perf_counter()
def own():
    return next(int(l.split()[1]) / 1024 for l in open("/proc/self/status") if l.startswith("RssAnon")) if os.path.exists("/proc/self/status") else 0.0
before = own()
load_base(dtype="float32")
print(json.dumps([imported - start, time.perf_counter() - imported, own() - before]))
"""


def seconds_of(code: str, *arguments: str) -> float:
    """Wall-clock of a new interpreter running `code`. Raises RuntimeError with its last word if it fails."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False, text=True)
    if done.returncode:
        word = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise RuntimeError(" ".join("FOLDER" if w.startswith("/") else w for w in word.split()))  # a temporary place says nothing on a page
    return time.perf_counter() - start


def demo_minutes(folder: Path) -> list[float]:
    """What the stages of a finished demo took, over all its runs; none of another study."""
    if json.loads((folder / "study.json").read_text(encoding="utf-8"))["study"]["name"] != "demo":
        return []
    with looked_at(folder) as store:
        return [sum(store.seconds().values()) / 60]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--study", type=Path, default=Path("demo"), help="folder of a finished study (default: demo)")
    options = started(parser)
    loads: list[list[float]] = []

    def load() -> float:
        out = subprocess.run([sys.executable, "-c", LOAD], stdout=subprocess.PIPE, check=True, text=True).stdout
        loads.append(json.loads(out.splitlines()[-1]))
        return loads[-1][1]

    sides: dict[str, Callable[[], float]] = {
        "help": lambda: seconds_of(CLI, "--help"), "bare python": lambda: seconds_of("pass"), "import convergent": lambda: seconds_of("import convergent"), "load": load,
    }  # fmt: skip
    finished = (options.study / "study.sqlite").is_file()
    with tempfile.TemporaryDirectory() as folder:
        if finished:
            copy = Path(folder) / "study"
            shutil.copytree(options.study, copy)
            sides["report"] = lambda: seconds_of(CLI, "report", str(copy))
        load()  # the first reads from disk, and may convert
        loads.clear()
        measured = Sides(sides, ours=[name for name in sides if name != "report"]).measure(options.repeats)
    if loads:
        measured.figures["import torch, transformers"] = [i for i, _, _ in loads]
    memory = sorted(m for _, _, m in loads)[len(loads) // 2]
    no_study = "" if finished else f"no finished study at {options.study.name}; give --study"
    rows = {
        "startup_help": row(measured.figures["help"], 0.3, "", "wall-clock with the interpreter", "s", at_most=True),
        "startup_import": row(measured.figures["import convergent"], None, "", "wall-clock with the interpreter", "s", at_most=True),
        "startup_load": row(measured.figures["load"], None, "", f"after imports; {memory:.0f} MiB of its own memory", "s", at_most=True),
        "startup_report": row(measured.figures.get("report", []), 5.0, "", measured.failed.get("report", no_study or "the command, imports included"), "s", at_most=True),
    }
    if finished and (minutes := demo_minutes(options.study)):
        rows["demo"] = row(minutes, 12.0, "", "its stages in one run; loading models and the report come on top", "min", at_most=True)
    finish(options, "startup", rows, measured, "s")


if __name__ == "__main__":
    main()
