"""The two things a user does with a study: run it, and write its report again."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from convergent import stats
from convergent.cache import write_text
from convergent.errors import StoreError, StudyError
from convergent.experiments import registry
from convergent.report.drawing import Do
from convergent.report.page import write_report
from convergent.report.results import Results
from convergent.store import guarded, looked_at, opened
from convergent.study.memory import estimate_memory
from convergent.study.plan import Stage, make_plan, speed_of
from convergent.study.profile import Profile
from convergent.study.results import collect, write_manifest
from convergent.study.run import Run
from convergent.study.spec import StudySpec, load_study, study_from
from convergent.study.speed import Speed

STAGES = ("train", "sample", "judge", "extract", "margin")
CLAIMS = "claims.json"
"""The verdicts with their evidence, for scripts."""
COPY = "study.json"
"""The study as it was run, with every default, so that the report can be written again from anywhere."""


def run_study(
    path: str | Path,
    out: str | Path | None = None,
    plan_only: bool = False,
    fresh: Sequence[str] = (),
    only: Sequence[str] = (),
    changes: Sequence[str] = (),
    profile: bool = False,
    report: bool = True,
) -> Path:
    """Do what is not done of a study and write its report. Returns the study folder.

    `plan_only` prints and makes nothing. `fresh`: stages to forget first, with what was made from them. `only`: experiments to do, with `plain` and
    those that they use; the report then shows these, and another run without it goes on with the rest. `report=False` leaves claims and page to that
    run. `changes`: see `load_study`. `profile` prints at the end where the time and memory went.
    """
    spec = chosen(load_study(path, changes), only)
    unknown = [f for f in fresh if f not in STAGES]
    if unknown:
        raise StudyError(f"--fresh {unknown[0]}: no such stage; known are {', '.join(STAGES)}")
    folder = Path("runs") / spec.name if out is None else Path(out)
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True, markup=False)
    # First without the lock and without writing: a study that cannot be run must leave nothing behind.
    with looked_at(folder) as store:
        look = Run(spec, store, compute=False)
        look.check()
        speed = speed_of(look)
        stages = make_plan(look, speed)
        if plan_only:
            _print_plan(console, look, stages, speed)
            return folder
        _check_keys(look, stages, bool(fresh))
    # On a terminal bars are drawn; elsewhere (a log, CI) only the lines are.
    with opened(folder) as store, _bars(console) as bars:
        for stage in fresh:
            console.print(f"fresh   {stage}: {store.forget(stage)} things dropped")
        look = Run(spec, store, compute=False)
        _print_plan(console, look, make_plan(look, speed), speed)
        with guarded(folder):
            write_text(folder / COPY, json.dumps({"file": Path(path).name, "study": spec.model_dump(mode="json")}, indent=1))
        run = Run(spec, store, say=console.print, advance=_advance(bars))
        watch = Profile(run)
        run.go()
        if report:
            _conclude(console, run, Path(path).name, folder)
        for line in watch.lines() if profile else ():
            console.print(line)
    return folder


def _conclude(console: Console, run: Run, file: str, folder: Path) -> None:
    """Decide the claims and write the page."""
    results = collect(run, file)
    with guarded(folder):
        write_manifest(run)
    _write_claims(results, folder)
    page = write_report(results, folder)
    for claim in results.claims:
        console.print(f"{claim['verdict']:>12}  {claim['claim']}")
    console.print(f"report  {page}")


def _write_claims(results: Results, folder: Path) -> None:
    with guarded(folder):
        write_text(folder / CLAIMS, json.dumps(list(results.claims), indent=1))


def chosen(spec: StudySpec, names: Sequence[str]) -> StudySpec:
    """A study of some of its experiments, of `plain`, and of those that they use; all of them without names. Raises StudyError for an unknown one."""
    missing = next((n for n in names if n not in spec.experiments), None)
    if missing is not None:
        raise StudyError(f"--only {missing}: this study has no such experiment; it has {', '.join(spec.experiments)}")
    if not names:
        return spec
    kept = {"plain", *names, *(used for n in names for used in registry.uses(n))}
    return spec.model_copy(update={"experiments": {n: b for n, b in spec.experiments.items() if n in kept}})


def _check_keys(run: Run, stages: Sequence[Stage], fresh: bool) -> None:
    """Raise JudgeError if a judge that still has to judge lacks its key: known now, and not after hours of sampling."""
    for stage in (s for s in stages if s.judge):
        check = getattr(run.judges[stage.judge], "check_key", None)
        if check is not None and (fresh or stage.done < stage.total):
            check()


def merge_studies(into: str | Path, others: Sequence[str | Path]) -> list[tuple[Path, int]]:
    """Take over into a study folder what other folders of the same study hold; (folder, rows that were new) of each.

    The next `run_study` on the folder does what is still missing and writes the report. Raises StoreError if a folder is none of a study, or of another
    one: base, seed and organisms must be the same, experiments and judges may differ.
    """
    into, folders = Path(into), [Path(f) for f in others]
    kept = [f for f in (into, *folders) if (f / COPY).is_file()]
    for folder in folders:
        if folder not in kept:
            raise StoreError(f"{folder}: not a study folder (no {COPY}); give the --out of a run")
    for folder in kept[1:]:
        a, b = (_kept_copy(f)[1] for f in (kept[0], folder))
        other = next((k for k in ("base", "seed", "organisms", "direction") if a.get(k) != b.get(k)), None)
        if other is not None:
            raise StoreError(f"{folder}: another study than {kept[0]} ({other} differs); merge folders of one study only")
    with opened(into) as store:
        return [(folder, store.absorb(folder)) for folder in folders]


def _kept_copy(folder: Path) -> tuple[str, dict[str, Any]]:
    """(name of the study file, the study) as a folder keeps them."""
    try:
        kept = json.loads((folder / COPY).read_text(encoding="utf-8"))
        return str(kept["file"]), dict(kept["study"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{folder / COPY}: cannot be read as the copy of a study ({error}); run `convergent run` on this folder again") from error


def rewrite_report(folder: str | Path, do: Do = map) -> Path:
    """Decide the claims of a finished study again and write them, page and tables; computes nothing. `do`: see `write_report`.

    Raises StoreError if the folder is not one.
    """
    folder = Path(folder)
    copy = folder / COPY
    if not copy.is_file():
        raise StoreError(f"{folder}: not a study folder (no {COPY}); run `convergent run STUDY --out {folder}` first")
    file, study = _kept_copy(folder)
    spec = study_from(study, copy)
    with opened(folder) as store:
        run = Run(spec, store, compute=False)
        # Counts alone are asked for, which any speed will do for. A judgement that failed for good is shown as such, so it does not count here.
        missing = [s for s in make_plan(run, Speed(flops=1.0)) if s.done < s.total and not s.name.startswith("judge")]
        if missing:
            raise StoreError(
                f"{folder}: the study is not finished ({missing[0].name}: {missing[0].done} of {missing[0].total}); run `convergent run` on it again"
            )
        results = collect(run, file)
        _write_claims(results, folder)
        return write_report(results, folder, do)


def _bars(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal or "CI" in os.environ)


def _advance(bars: Progress) -> Callable[[str, int, int, str], None]:
    """Draws one bar per stage, gone when it is full."""
    tasks: dict[str, TaskID] = {}

    def advance(stage: str, done: int, total: int, note: str) -> None:
        if stage not in tasks:
            tasks[stage] = bars.add_task(stage, total=total)
        bars.update(tasks[stage], completed=done, total=total, visible=done < total, description=f"{stage} {note}".strip())

    return advance


WORTH_SEEING = 10.0
"""Points of mean alignment between two conditions that a study should be able to see; a plan that cannot says so."""


def _print_plan(console: Console, run: Run, stages: Sequence[Stage], speed: Speed) -> None:
    spec: StudySpec = run.spec
    console.print(f"study {spec.name}: {len(spec.organisms)} organisms on {spec.base}, {_judges(run)}, seed {spec.seed}")
    for stage in stages:
        todo = stage.total - stage.done
        when = f"done ({stage.total})" if not todo else f"{todo} of {stage.total} to do, about {_minutes(stage.seconds)}"
        console.print(f"  {stage.name:22s} {stage.what}: {when}{'; ' + stage.note if todo and stage.note else ''}")
    left = sum(s.seconds for s in stages)
    memory = estimate_memory(run)
    if memory is not None:
        console.print(
            f"  memory about {memory.peak:.0f} GB at once: {memory.weights:.0f} of weights, and {memory.cache:.0f} of cache for {spec.sampling.rows} rows "
            f"while sampling or {memory.training:.0f} while training"
            + (f"; more than the machine's {memory.there:.3g}: lower sampling.rows or the recipe's batch_size" if memory.too_much else "")
        )
    m = run.planned
    if m and left:
        paid = f", about ${left / 3600 * m.price_per_hour:.2f} of machine time" if m.price_per_hour else ""
        console.print(f"  {spec.base} is not on this machine: counts are exact, times for {m.tflops:g} TFLOP/s{paid}")
    console.print(f"  about {_minutes(left)} in all, estimated from a short probe of this machine" if left else "  nothing is left to do but the report")
    if run.device.startswith("cuda") and left and not m:
        console.print("  times on a GPU are a lower bound that no run has confirmed: a small base waits for its host")
    if left and any(s.judge and s.seconds and hasattr(run.judges[s.judge], "seconds_each") for s in stages):
        console.print("  judging over a network is reckoned at a second a reply; it takes what the server takes")
    if speed.busy and left:
        console.print(f"  other programs left the probe {speed.got:.0%} of the processors: times are for this machine to itself, so expect more")
    weak = stats.underpowered(len(run.questions), spec.questions.samples, WORTH_SEEING, unit="points of alignment")
    if weak and left:
        console.print(f"  {weak}; `convergent power` plans by your own data")


def _judges(run: Run) -> str:
    first, *others = (j.name for j in run.judges.values())
    return f"judge {first}{', compared with ' + ' and '.join(others) if others else ''}"


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
