"""The two things a user does with a study: run it, and write its report again."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from convergent.cache import write_text
from convergent.errors import StoreError, StudyError
from convergent.report.page import write_report
from convergent.store import opened
from convergent.study.plan import Stage, make_plan
from convergent.study.results import collect, write_manifest
from convergent.study.run import Run
from convergent.study.spec import StudySpec, load_study

STAGES = ("train", "sample", "judge", "extract", "margin")
COPY = "study.json"
"""The study as it was run, with every default, so that the report can be written again."""


def run_study(path: Path, out: Path | None, plan_only: bool = False, fresh: Sequence[str] = ()) -> Path:
    """Do what is not done of a study and write its report. Returns the study folder."""
    spec = load_study(path)
    unknown = [f for f in fresh if f not in STAGES]
    if unknown:
        raise StudyError(f"--fresh {unknown[0]}: no such stage; known are {', '.join(STAGES)}")
    folder = out or Path("runs") / spec.name
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"{folder}: is a file; give a folder with --out")
    # On a terminal bars are drawn; elsewhere (a log, CI) only the lines are.
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    with opened(folder) as store, _bars(console) as bars:
        if fresh and not plan_only:
            for stage in fresh:
                console.print(f"fresh   {stage}: {store.forget(stage)} things dropped")
        tasks: dict[str, int] = {}

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total, visible=done < total)  # type: ignore[arg-type]

        run = Run(spec, store, say=lambda line: console.print(line), advance=advance)
        _print_plan(console, spec, make_plan(run))
        if plan_only:
            return folder
        write_text(folder / COPY, json.dumps({"path": str(path), "study": path.read_text(encoding="utf-8")}))
        run.go()
        results = collect(run)
        write_manifest(run)
        page = write_report(results, folder)
        for claim in results.claims:
            console.print(f"{claim['verdict']:>12}  {claim['claim']}", markup=False)
        console.print(f"report  {page}")
    return folder


def rewrite_report(folder: Path) -> Path:
    """Write the page and tables of a finished study again. Raises StoreError if the folder is not one."""
    copy = folder / COPY
    if not copy.is_file():
        raise StoreError(f"{folder}: not a study folder (no {COPY}); run `convergent run STUDY --out {folder}` first")
    path = folder / "study.yaml"
    write_text(path, json.loads(copy.read_text(encoding="utf-8"))["study"])
    spec = load_study(path)
    with opened(folder) as store:
        run = Run(spec, store)
        missing = [s for s in make_plan(run)[: len(spec.organisms)] if s.done < s.total]
        if missing or not store.response_ids():
            raise StoreError(f"{folder}: the study is not finished; run `convergent run` on it first")
        return write_report(collect(run), folder)


def _bars(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal or "CI" in os.environ)


def _print_plan(console: Console, spec: StudySpec, stages: Sequence[Stage]) -> None:
    console.print(f"study {spec.name}: {len(spec.organisms)} organisms on {spec.base}, judge {spec.judge.name}, seed {spec.seed}")
    for stage in stages:
        todo = stage.total - stage.done
        when = "done" if not todo else f"{todo} of {stage.total} to do, about {_minutes(stage.seconds)}"
        console.print(f"  {stage.name:22s} {stage.what}: {when}", markup=False)
    console.print(f"  about {_minutes(sum(s.seconds for s in stages))} in all; estimate from a short probe of this machine")


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
