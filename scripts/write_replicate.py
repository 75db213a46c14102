"""Write docs/replicate.md from a run of `convergent replicate`, so that no figure in it is typed by hand.

    python scripts/write_replicate.py DATA [--repeats 100]

Runs the command once as a process of its own, to say what it took.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from convergent.replicate.claims import NOT_FOUND
from convergent.replicate.table import figure
from convergent.report.text import markdown_cell

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "replicate.md"
TEXT = ROOT / "scripts" / "replicate.md.in"


def main(data: str, repeats: int) -> None:
    command = [sys.executable, "-m", "convergent", "replicate", "--data", data, "--json", "--repeats", str(repeats)]
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    wall = time.monotonic() - start
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    claims = json.loads(done.stdout)
    cost = (
        f"{len(claims):,} rows with {repeats} repeats of each probe took {used.ru_utime + used.ru_stime:.0f} s of processor time "
        f"({wall:.0f} s by the clock on one of {os.cpu_count()} shared cores) and {used.ru_maxrss / 1e6:.2f} GB of memory"
    )
    found = [c for c in claims if c["recomputed"] is not None]
    compared = [c for c in found if c["published"] is not None]
    parts = {
        "cost": cost,
        "tally": f"{len(compared)} published figures were compared: {sum(c['verdict'] == 'agrees' for c in compared)} agree, "
        f"{sum(c['verdict'] == 'differs' for c in compared)} differ.",
        "compared": rows(compared, note=True),
        "em": rows([c for c in found if c["id"].startswith("em/") and c["id"].count("/") == 1], note=False),
        "probe": probe(found),
        "baseline": baseline(found),
        "lost": "\n".join(f"| `{c['id']}` | {figure(c['published'])} | {c['source']} | {markdown_cell(c['note'].removeprefix(NOT_FOUND))} |" for c in claims if c["recomputed"] is None),
    }
    text = TEXT.read_text(encoding="utf-8")
    for name, value in parts.items():
        text = text.replace("{{" + name + "}}", value)
    PAGE.write_text(text, encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}: {cost}")


def rows(claims: list[dict[str, Any]], note: bool) -> str:
    """Markdown rows: id, published, recomputed, n, interval, and verdict with the first parts of the note."""
    lines = []
    for c in claims:
        interval = "-" if c["interval"] is None else f"{c['interval'][0]:.3f} to {c['interval'][1]:.3f}"
        last = f" {c['verdict']} | {markdown_cell('; '.join(c['note'].split('; ')[:2]))} |" if note else f" {over_questions(c['note'])} |"
        lines.append(f"| `{c['id']}` | {figure(c['published'])} | {figure(c['recomputed'])} | {c['n']:,} | {interval} |{last}")
    return "\n".join(lines)


def over_questions(note: str) -> str:
    return note.partition("over questions ")[2].partition(";")[0] or "-"


def probe(found: list[dict[str, Any]]) -> str:
    """Every figure of every pair, all tokens beside the significant ones."""
    table: dict[str, dict[str, str]] = {}
    for c in found:
        if c["id"].startswith("probe/"):
            *stem, name = c["id"].split("/")
            table.setdefault(f"{stem[1]}: {name}", {})["significant" if stem[-1] == "significant" else "all"] = f"{c['recomputed']:.3f} (n = {c['n']:,})"
    return "\n".join(f"| {name} | {v.get('all', '-')} | {v.get('significant', '-')} |" for name, v in table.items())


def baseline(found: list[dict[str, Any]]) -> str:
    """Smallest cosine of each pair, by organisms and by the chat model on the same texts."""
    smallest = {c["id"].removeprefix("cosine/").removesuffix("/min"): c["recomputed"] for c in found if c["id"].startswith("cosine/") and c["id"].endswith("/min")}
    lines = []
    for pair, value in smallest.items():
        a, b = pair.split("/")
        if "@chat" not in pair:
            chat = smallest.get(f"{a}@chat/{b}@chat")
            lines.append(f"| {a}, {b} | {value:.3f} | {'-' if chat is None else f'{chat:.3f}'} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    main(arguments.data, arguments.repeats)
