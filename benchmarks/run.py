"""Run the benchmarks, each file in a process of its own, and keep their JSON lines.

    python benchmarks/run.py                     all of them
    python benchmarks/run.py sweep readers       these
    python benchmarks/run.py --quick             every one with little work: shows that they run
    python benchmarks/run.py training -- --recipes nine_adapter --steps 6        one, with options of its own

A benchmark that fails is named and the others go on; the exit code says so at the end. `scripts/write_benchmarks.py` makes docs/benchmarks.md of the lines.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
NOT_BENCHMARKS = {"run", "common", "decoding", "child", "sweep_peers", "llama_readers", "vllm_peer"}
PASSED = ("quick", "repeats", "threads", "study")


def benchmarks() -> list[str]:
    return sorted(f.stem for f in HERE.glob("*.py") if f.stem not in NOT_BENCHMARKS)


def command_of(name: str, options: argparse.Namespace, own: Sequence[str] = ()) -> list[str]:
    """How one is called: with those of `options` that its file knows, and its own."""
    script = HERE / f"{name}.py"
    source = script.read_text(encoding="utf-8")
    if "from common import" in source:
        source += (HERE / "common.py").read_text(encoding="utf-8")
    command = [sys.executable, str(script)]
    for option in PASSED:
        value = getattr(options, option)
        if value not in (None, False) and f'"--{option}"' in source:
            command += [f"--{option}"] if value is True else [f"--{option}", str(value)]
    return [*command, *own]


def lines_of(text: str) -> list[dict[str, Any]]:
    """The JSON objects with a `claim` among the lines of a benchmark's output."""
    found = []
    for line in text.splitlines():
        if line.startswith('{"claim"'):
            found.append(json.loads(line))
    return found


def main() -> None:
    known = benchmarks()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}; default all")
    parser.add_argument("--quick", action="store_true", help="little work and one or two repeats")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--study", type=Path, help="folder of a finished study, for start-up")
    parser.add_argument("--out", type=Path, default=HERE / "results.jsonl", help="file to which lines are appended (default: benchmarks/results.jsonl)")
    given = sys.argv[1:]
    cut = given.index("--") if "--" in given else len(given)
    options, own = parser.parse_args(given[:cut]), given[cut + 1 :]
    if own and len(options.names) != 1:
        parser.error("-- is followed by options of one benchmark: name that one alone before it")
    if unknown := [n for n in options.names if n not in known]:
        parser.error(f"{unknown[0]}: no such benchmark; there are {', '.join(known)}")
    failed = []
    for name in options.names or known:
        command = command_of(name, options, own)
        print(f"== {name}", flush=True)
        start = time.perf_counter()
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        print(result.stdout, flush=True)
        took = time.perf_counter() - start
        found = lines_of(result.stdout)
        with options.out.open("a", encoding="utf-8") as file:
            for record in found:
                defaults = {"date": datetime.datetime.now(datetime.UTC).date().isoformat(), "quick": "--quick" in command, "seconds": round(took, 1)}
                file.write(json.dumps({**defaults, **record}) + "\n")
        if result.returncode or not found:
            failed.append(name)
        print(f"== {name}: {'failed' if name in failed else 'done'} in {took:.0f} s", flush=True)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
