"""Corrected figures of a judged table: EM, coherence and mean alignment, put right with trusted scores of some of its rows.

Reads two tables, joins them row by row, and leaves every interval to `stats`. The trusted rows must be a random part of the judged ones; what
speaks against that is said in the notes. Rows that were chosen with unequal chances carry them in a column `inclusion` of the trusted table.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convergent.errors import DataError, InputError
from convergent.rates import ALIGNED_BELOW, COHERENT_ABOVE, both_scored, check_thresholds, groups_of, is_em, question_of

if TYPE_CHECKING:
    import pandas as pd

    from convergent.stats import Corrected, Interval

IDS = ("id", "response_id")
"""Columns that name an answer, in order of preference; used if both tables have one."""
SHORT = {"em": "EM", "coherent": "coherent", "aligned": "mean aligned"}
"""Figures in a row of a group."""
NOT_RANDOM = 0.001
"""p below which trusted rows look unlike the others."""


@dataclass(frozen=True, eq=False)
class Joined:
    """The judged table with the trusted scores beside the cheap ones."""

    table: pd.DataFrame
    """Rows of the judged table, with `trusted_aligned` and `trusted_coherent` (nan where there is none), and `inclusion` if the trusted table has it."""
    key: str
    """What rows were joined on."""
    matched: int
    unmatched: int
    """Rows of the trusted table that are not in the judged one."""


def join_trusted(cheap: pd.DataFrame, trusted: pd.DataFrame, cheap_place: str = "judged table", trusted_place: str = "trusted table") -> Joined:
    """Find each trusted row among the judged ones: by `id` or `response_id` if both have it, else by question and response.

    The same answer given twice is matched in order. Raises DataError for ids that are empty or occur twice, for tables without anything to join
    on, for a trusted table without scores, and if no row matches.
    """
    from convergent.tables import score_column, unique_ids

    rubrics = [name for name in ("aligned", "coherent") if name in trusted.columns]
    if not rubrics:
        raise DataError(f"{trusted_place}: no column `aligned` or `coherent`; trusted scores are 0 to 100 in these columns")
    name = next((name for name in IDS if name in cheap.columns and name in trusted.columns), None)
    keys: Sequence[Any]
    wanted: Sequence[Any]
    if name is not None:
        keys, wanted = unique_ids(cheap, name, cheap_place), unique_ids(trusted, name, trusted_place)
        shown = f"`{name}`"
    else:
        keys, wanted = _texts(cheap, cheap_place), _texts(trusted, trusted_place)
        shown = "question and response"
    places: dict[Any, list[int]] = defaultdict(list)
    for row, key in enumerate(keys):
        places[key].append(row)
    scores = {rubric: score_column(trusted[rubric], trusted_place).tolist() for rubric in rubrics}
    chances = _chances(trusted, trusted_place)
    columns = {name: [math.nan] * len(cheap) for name in ("aligned", "coherent", *(("inclusion",) if chances else ()))}
    unmatched = 0
    for row, key in enumerate(wanted):
        if not places.get(key):
            unmatched += 1
            continue
        at = places[key].pop(0)
        for rubric in rubrics:
            columns[rubric][at] = scores[rubric][row]
        if chances:
            columns["inclusion"][at] = chances[row]
    if unmatched == len(trusted):
        raise DataError(f"{trusted_place}: none of its {len(trusted)} rows is in {cheap_place} (joined on {shown}); the two must share answers")
    table = cheap.assign(**{name if name == "inclusion" else f"trusted_{name}": values for name, values in columns.items()})
    return Joined(table, shown, len(trusted) - unmatched, unmatched)


def corrected(
    joined: Joined, aligned_below: float = ALIGNED_BELOW, coherent_above: float = COHERENT_ABOVE, target: str = "answers"
) -> dict[str, Corrected]:
    """figure -> `Corrected`, of the rows with both cheap scores: "em" and "coherent" (rates), "aligned" (mean of scores).

    A figure needs its trusted scores: EM both of them. Raises InputError for thresholds outside 0..100, an unknown target, or fewer than two trusted rows.
    """
    import numpy as np

    from convergent.stats import corrected_mean, corrected_rate
    from convergent.stats.ppi import TARGETS

    check_thresholds(aligned_below, coherent_above)
    if target not in TARGETS:
        raise InputError(f"target: `{target}` is not known; answers (more of them) or file (these alone)")
    df = joined.table
    df = both_scored(df)
    questions = question_of(df)
    chances = df["inclusion"].to_numpy(dtype=float) if "inclusion" in df.columns else None
    a, c, ta, tc = (df[name].to_numpy(dtype=float) for name in ("aligned", "coherent", "trusted_aligned", "trusted_coherent"))

    def rate(cheap: Any, hit: Any, known: Any) -> Corrected:
        return corrected_rate(cheap.astype(float), np.where(known, hit.astype(float), np.nan), questions, target, inclusion=chances)  # type: ignore[arg-type]

    found = {}
    known_a, known_c = ~np.isnan(ta), ~np.isnan(tc)
    if known_a.any() and known_c.any():
        found["em"] = rate(is_em(a, c, aligned_below, coherent_above), is_em(ta, tc, aligned_below, coherent_above), known_a & known_c)
    if known_c.any():
        found["coherent"] = rate(c > coherent_above, tc > coherent_above, known_c)
    if known_a.any():
        found["aligned"] = corrected_mean(a, ta, questions, target, bounds=(0, 100), inclusion=chances)  # type: ignore[arg-type]
    return found


def corrected_by(
    joined: Joined, by: str, aligned_below: float = ALIGNED_BELOW, coherent_above: float = COHERENT_ABOVE, target: str = "answers", place: str = "judged table"
) -> tuple[str, dict[str, dict[str, Corrected] | str]]:
    """Name of the grouping, and group -> `corrected` of its rows, or why that cannot be said. `by`: "question", or a column of the judged table.

    Each group is corrected by its own trusted rows alone: a judge that is kinder to one group than to another is put right in each.
    """
    name, groups = groups_of(joined.table, by, place)
    found: dict[str, dict[str, Corrected] | str] = {}
    for group in dict.fromkeys(groups):
        part = replace(joined, table=joined.table[[g == group for g in groups]])
        try:
            found[group] = corrected(part, aligned_below, coherent_above, target) or "no trusted row"
        except InputError as error:  # fewer than two trusted rows; thresholds and target have been seen to be right
            found[group] = str(error)
    return name, found


def doubts(joined: Joined) -> list[str]:
    """What speaks against the trusted rows being a random part of the judged ones: their cheap scores, or their questions, differ."""
    from scipy.stats import ks_2samp

    from convergent.stats import association

    df = joined.table
    known = (df["trusted_aligned"].notna() | df["trusted_coherent"].notna()).to_numpy()
    only = "the figures hold only for a random part, or with chances in a column `inclusion`"
    found: list[str] = []
    if known.all() or "inclusion" in df.columns:
        return found
    for name in ("aligned", "coherent"):
        x = df[name].to_numpy(dtype=float)
        inside, outside = (part[part == part] for part in (x[known], x[~known]))
        if len(inside) > 1 and len(outside) > 1 and (p := float(ks_2samp(inside, outside).pvalue)) < NOT_RANDOM:
            found.append(
                f"trusted rows are no random part: their cheap `{name}` has mean {inside.mean():.1f}, that of the others {outside.mean():.1f} (p {p:.2g}); "
                f"{only}"
            )
    questions = question_of(df)
    if questions is not None:
        counted: dict[str, list[int]] = {}
        for q, k in zip(questions, known.tolist(), strict=True):
            cell = counted.setdefault(q, [0, 0])
            cell[0] += k
            cell[1] += 1
        tested = association([(q, k, n) for q, (k, n) in counted.items()])
        if tested.p < NOT_RANDOM:
            found.append(f"trusted rows are no random part: their share differs between questions (p {tested.p:.2g}); {only}")
    return found


def correct_command(
    cheap: Path,
    trusted: Path,
    aligned_below: float = ALIGNED_BELOW,
    coherent_above: float = COHERENT_ABOVE,
    target: str = "answers",
    by: str | None = None,
    as_json: bool = False,
) -> None:
    """What `convergent correct` does; with `by` also for every group. Raises before any output."""
    from convergent.tables import read_table

    joined = join_trusted(read_table(cheap, required=("aligned", "coherent")), read_table(trusted), str(cheap), str(trusted))
    found = corrected(joined, aligned_below, coherent_above, target)
    name, groups = corrected_by(joined, by, aligned_below, coherent_above, target, str(cheap)) if by is not None else ("", {})
    notes = doubts(joined)
    if joined.unmatched:
        notes.append(f"{joined.unmatched} of {joined.matched + joined.unmatched} trusted rows are not in {cheap} and count nowhere")
    if as_json:
        record = {
            "file": str(cheap), "trusted": str(trusted), "joined_on": joined.key.strip("`"), "n_rows": len(joined.table), "n_matched": joined.matched,
            "n_unmatched": joined.unmatched, "target": target, "aligned_below": aligned_below, "coherent_above": coherent_above, "notes": notes,
            "figures": {figure: _plain(c) for figure, c in found.items()},
        }  # fmt: skip
        if by is not None:
            record |= {"by": name, "groups": [_group(name, group, made) for group, made in groups.items()]}
        print(json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False))
    else:
        _print(found, groups, joined, notes, aligned_below, coherent_above, target)


def _chances(trusted: pd.DataFrame, place: str) -> list[float]:
    """Column `inclusion` as numbers above 0 up to 1; empty without it."""
    if "inclusion" not in trusted.columns:
        return []
    found = []
    for row, cell in enumerate(trusted["inclusion"].tolist(), start=1):
        try:
            value = float(cell)
        except (TypeError, ValueError):
            value = math.nan
        if not 0 < value <= 1:
            raise DataError(f"{place}: row {row}, column `inclusion`: {cell!r} is no chance of being chosen; write one above 0, up to 1, or drop the column")
        found.append(value)
    return found


def _texts(df: pd.DataFrame, place: str) -> list[tuple[str, str]]:
    from convergent.tables import need_columns, text_of

    need_columns(df, ("response",), place)
    name = next((n for n in ("question", "question_id") if n in df.columns), None)
    if name is None:
        raise DataError(f"{place}: no column `id`, `question` or `question_id` to join on; add one")
    return [(text_of(q).strip(), text_of(r).strip()) for q, r in zip(df[name].tolist(), df["response"].tolist(), strict=True)]


def _group(name: str, group: str, made: dict[str, Corrected] | str) -> dict[str, Any]:
    if isinstance(made, str):
        return {name: group, "figures": {}, "problem": made}
    return {name: group, "figures": {figure: _plain(c) for figure, c in made.items()}, "problem": None}


def _plain(c: Corrected) -> dict[str, Any]:
    """JSON-ready: nan and inf are null."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: finite(v) for k, v in value.items()}
        if isinstance(value, float) and not math.isfinite(value):
            return None
        return list(value) if isinstance(value, tuple) else value

    return finite(asdict(c))  # type: ignore[no-any-return]


def _print(
    found: dict[str, Corrected], groups: dict[str, dict[str, Corrected] | str], joined: Joined, notes: list[str], aligned_below: float,
    coherent_above: float, target: str,
) -> None:  # fmt: skip
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 150)
    titles = {"em": f"EM (aligned < {aligned_below:g}, coherent > {coherent_above:g})", "coherent": f"coherent > {coherent_above:g}", "aligned": "mean aligned"}

    def shown(i: Interval | None, scale: float, unit: str) -> str:
        if i is None or math.isnan(i.estimate):
            return "-"
        bounds = f" [{scale * i.low:.1f}, {scale * i.high:.1f}]" if i.defined else ""
        return f"{scale * i.estimate:.1f}{unit}{bounds}"

    heads = ("raw (cheap judge)", "corrected (PPI)", "corrected, other questions", "Rogan-Gladen", "trusted rows alone")
    lines = []
    for group, made in (("", found), *groups.items()):
        if isinstance(made, str):
            notes = [*notes, f"{group}: {made}"]
            continue
        for name, c in made.items():
            scale, unit = (1.0, "") if name == "aligned" else (100.0, " %")
            cells = [shown(i, scale, unit) for i in (c.raw, c.ppi, c.over_questions, c.rogan_gladen, c.trusted_only)]
            lines.append((group, SHORT[name] if group else titles[name], f"{c.n_trusted} of {c.n}", cells))
    if console.width >= 130:
        table = Table(title="Corrected figures, 95 % intervals", title_justify="left")
        for head in (*(["group"] if groups else []), "figure", "trusted", *heads):
            table.add_column(head, justify="left" if head in ("group", "figure") else "right")
        for group, title, n, cells in lines:
            table.add_row(*(Text(x) for x in (*([group or "all"] if groups else []), title, n, *cells)))
        console.print(table)
    else:  # a table would cut figures off
        for group, title, n, cells in lines:
            console.print(Text(f"{group}{': ' if group else ''}{title}, trusted {n}", style="bold"))
            for head, cell in zip(heads, cells, strict=True):
                console.print(Text(f"  {head}: {cell}"))
    for name, c in found.items():
        if c.sensitivity is not None and c.specificity is not None:
            finds, clears = 100 * c.sensitivity, 100 * c.specificity
            console.print(Text(f"{titles[name]}: the cheap judge finds {finds:.0f} % of the trusted hits and clears {clears:.0f} % of the misses"))
        for note in c.notes:
            console.print(Text(f"{titles[name]}: {note}"))
    for note in notes:
        console.print(Text(note, style="yellow"))
    over = "more answers to these questions" if target == "answers" else "these answers alone"
    console.print(Text(f"Joined on {joined.key}. Intervals are for {over}, in the third column for other questions of this kind."), style="dim")
