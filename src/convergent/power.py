"""How large a study must be, from the spread that a judged file shows: what `convergent power` prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convergent.errors import DataError, InputError
from convergent.rates import ALIGNED_BELOW, COHERENT_ABOVE, both_scored, is_em, question_of

if TYPE_CHECKING:
    import numpy as np

    from convergent.stats import Clustering

OUTCOMES = {"aligned": 5.0, "em": 0.1}
"""Outcome -> the difference that is looked for if none is named: points of alignment; rate points (0.1 is 10 percentage points)."""


def clustering_of(
    file: Path, against: Path | None = None, outcome: str = "aligned", aligned_below: float = ALIGNED_BELOW, coherent_above: float = COHERENT_ABOVE
) -> Clustering:
    """Spread of an outcome in a judged file, or of the difference between two. Raises DataError for tables without questions or scores."""
    from convergent.stats import measured

    if outcome not in OUTCOMES:
        raise InputError(f"outcome: `{outcome}` is not known; {' or '.join(OUTCOMES)}")
    values, questions = _read(file, outcome, aligned_below, coherent_above)
    return measured(values, questions, None if against is None else _read(against, outcome, aligned_below, coherent_above))


def power_command(
    file: Path, against: Path | None = None, outcome: str = "aligned", difference: float | None = None, target: float = 0.8, questions: int | None = None,
    as_json: bool = False,
) -> None:  # fmt: skip
    """What `convergent power` does: table of power by design, the smallest design, and what the questions of the file can show."""
    from convergent.stats import answers_needed, detectable, power_table, smallest_design

    if not 0.05 < target < 1:
        raise InputError(f"power: {target:g}; a power lies between 0.05 and 1, 0.8 is usual")
    clustering = clustering_of(file, against, outcome)
    d = OUTCOMES[outcome] if difference is None else difference
    if outcome == "em" and abs(d) >= 1:
        raise InputError(f"difference: {d:g}; a difference of EM rates lies between 0 and 1, 0.1 is 10 percentage points")
    have = questions or clustering.questions
    rows, best, here = power_table(clustering, d), smallest_design(clustering, d, target), answers_needed(clustering, d, have, target)
    if as_json:
        record = {
            "file": str(file), "against": None if against is None else str(against), "outcome": outcome, "difference": d, "target": target,
            "within": clustering.within, "between": clustering.between, "source": clustering.source, "questions": have, "table": rows,
            "smallest": None if best is None else {"questions": best.questions, "answers": best.answers, "total": best.total, "power": best.power},
            "with_these_questions": None if here is None else {"answers": here.answers, "total": here.total, "power": here.power},
            "detectable": {str(m): _finite(detectable(clustering, have, m, target)) for m in (8, 16, 32, 64, 128)},
        }  # fmt: skip
        print(json.dumps(record, indent=1, allow_nan=False))
        return
    _print(clustering, outcome, d, target, have, rows, best, here, {m: detectable(clustering, have, m, target) for m in (8, 16, 32, 64, 128)})


def _read(path: Path, outcome: str, aligned_below: float, coherent_above: float) -> tuple[np.ndarray, list[str]]:
    from convergent.tables import read_table

    df = read_table(path, required=("aligned", "coherent"))
    valid = both_scored(df)
    questions = question_of(valid)
    if questions is None:
        raise DataError(f"{path}: no column `question_id` or `question`; answers to one question are alike, so power needs to know them")
    if outcome == "aligned":
        return valid["aligned"].to_numpy(dtype=float), questions
    return is_em(valid["aligned"], valid["coherent"], aligned_below, coherent_above).to_numpy(dtype=float), questions


def _finite(x: float) -> float | None:
    return x if x < float("inf") else None


def _print(
    clustering: Clustering, outcome: str, d: float, target: float, have: int, rows: list[dict[str, Any]], best: Any, here: Any, seen: dict[int, float]
) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    scale, unit = (100.0, "percentage points of EM") if outcome == "em" else (1.0, "points of alignment")
    console.print(
        Text(
            f"Spread, {clustering.source}: answers to one question {scale * clustering.within:.1f}, the difference between questions "
            f"{scale * clustering.between:.1f} {unit} (standard deviations)."
        )
    )
    table = Table(title=f"Power to see {abs(scale * d):g} {unit} between two conditions", title_justify="left")
    table.add_column("answers per question\nand condition", justify="right")
    columns, lines = sorted({r["questions"] for r in rows}), sorted({r["answers"] for r in rows})
    for g in columns:
        table.add_column(f"{g}\nquestions", justify="right", no_wrap=True)
    cells = {(r["questions"], r["answers"]): r["power"] for r in rows}
    for m in lines:
        table.add_row(str(m), *(Text(f"{cells[g, m]:.2f}", style="bold" if cells[g, m] >= target else "") for g in columns))
    console.print(table)
    share = f"{100 * target:g} %"
    if best is None:
        console.print(Text(f"No design up to 400 questions with 1,000 answers each reaches {share}."))
    else:
        console.print(
            Text(f"Smallest design with {share}: {best.questions} questions x {best.answers} answers x 2 conditions = {best.total} answers ({best.power:.2f}).")
        )
    if here is None:
        console.print(Text(f"With {have} questions {share} is out of reach, however many answers: ask more questions."))
    else:
        console.print(Text(f"With {have} questions: {here.answers} answers per question and condition ({here.power:.2f})."))
    words = ", ".join(f"{m} answers {scale * x:.3g}" for m, x in seen.items())
    console.print(Text(f"Seen with {share} over {have} questions, in {unit}: {words}."))
