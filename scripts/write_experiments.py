"""Write what a stored study saw into the docs page of each experiment, under "What we saw at 135M".

    python scripts/write_experiments.py runs/paper_small [--docs docs/experiments] [--note "Run on ..."]

Every number comes out of the study folder: verdicts and comparisons from claims.json, times and memory from its store. Pages without that heading, and
experiments without a page, are named and left alone.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from pathlib import Path
from typing import Any

import pandas as pd

from convergent.report.text import markdown_cell
from convergent.store import looked_at
from convergent.study.peak import Peak

HEADING = "## What we saw at 135M"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="folder of a finished study")
    parser.add_argument("--docs", type=Path, default=Path("docs/experiments"))
    parser.add_argument("--note", default="", help="a sentence on how it was run, put behind where the figures come from")
    options = parser.parse_args()
    claims = json.loads((options.study / "claims.json").read_text(encoding="utf-8"))
    study = json.loads((options.study / "study.json").read_text(encoding="utf-8"))
    for name in study["study"]["experiments"]:
        page = options.docs / f"{name}.md"
        text = page.read_text(encoding="utf-8") if page.is_file() else ""
        if HEADING not in text:
            print(f"{page}: no such page, or no heading {HEADING!r}; left alone")
            continue
        mine = [c for c in claims if c["experiment"] == name]
        seen = "\n".join([f"{HEADING}\n", f"{source(options.study, study)} {options.note}".strip(), "", *table(mine), "", times(options.study, name), ""])
        page.write_text(re.sub(rf"{HEADING}\n.*?(?=\n## |\Z)", lambda _, seen=seen: seen, text, flags=re.DOTALL), encoding="utf-8")
        print(f"wrote {page}: {len(mine)} claims")


def source(folder: Path, study: dict[str, Any]) -> str:
    """Where the figures come from, in one paragraph."""
    spec, manifest = study["study"], json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    questions = pd.read_csv(folder / "tables" / "answers.csv", usecols=["question_id"])["question_id"].nunique()
    return (
        f"Study `{study['file']}`: {len(spec['organisms'])} organisms on `{spec['base']}`, seed {spec['seed']}, judge {manifest['judge'].partition('#')[0]}, "
        f"{questions} questions x {spec['questions']['samples']} answers per condition. Intervals are 95 %, over questions for alignment and over held-out "
        "pairs for the margin. Written by `scripts/write_experiments.py`."
    )


def table(claims: list[dict[str, Any]]) -> list[str]:
    """One row per claim: its verdict, its first comparison, and how the comparisons with controls fell."""
    if not claims:
        return ["This study decided no claim of it: what it needs was not there (see the notes of the report)."]
    rows = ["| Claim | Verdict | First comparison | Comparisons: for, against, open |", "|---|---|---|---|"]
    for c in claims:
        votes = [e["supports"] for e in c["evidence"] if e.get("decides", True)]
        counts = ", ".join(str(votes.count(v)) for v in ("held", "did not hold", "undecided"))
        first = shown(c["evidence"][0]) if votes else ""
        rows.append(f"| {markdown_cell(c['claim'])} | **{c['verdict']}** | {markdown_cell(first)} | {counts} |")
    return rows


def shown(e: dict[str, Any]) -> str:
    """A comparison as text."""
    if e["estimate"] is None or math.isnan(e["estimate"]):
        return f"{e['text']}: not measured"
    digits = 1 if abs(e["estimate"]) >= 1 else 3
    low, high = (f"{e[k]:.{digits}f}" if e[k] is not None and not math.isnan(e[k]) else "–" for k in ("low", "high"))
    return f"{e['text']}: {e['estimate']:.{digits}f} [{low}, {high}] {e['unit']}, n = {e['n']}"


def times(folder: Path, name: str) -> str:
    """How long its readings took and the peak of memory meanwhile, where the store has it; arms share the stages of the whole study."""
    with looked_at(folder) as store:
        seconds = store.seconds()
        peaks = {stage: Peak(*p) for stage, p in store.memory().items()}
    own, whole = seconds.get(name), sum(seconds.values())
    highest = max(peaks, key=lambda stage: peaks[stage].resident, default="")
    return (
        (f"Its readings took {own:.0f} s{f' (peak memory of the process {peaks[name]})' if name in peaks else ''}; " if own else "It has no readings of its own; ")
        + f"the whole study {whole / 60:.0f} min, of which sampling {seconds.get('sample', 0) / 60:.0f} and margins {seconds.get('margin', 0) / 60:.0f}"
        + (f" (peak {peaks[highest]}, while at {highest})." if peaks else ".")
    )


if __name__ == "__main__":
    main()
