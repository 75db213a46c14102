"""The tables of the page, and every number as files: CSV for spreadsheets, Parquet for pandas."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from convergent.core.ids import file_sha256
from convergent.report.results import GROUPS, Results, clean, heading
from convergent.report.text import compact, interval, missing, number, percent, share
from convergent.tables import write_table

NONE = "–"
"""Where a quantity does not apply, as opposed to "not measured"."""


@dataclass(frozen=True)
class Table:
    """One table of the page: rows are grouped under headings."""

    id: str
    title: str
    note: str
    header: tuple[str, ...]
    groups: tuple[tuple[str, tuple[tuple[str, ...], ...]], ...]


def number_tables(results: Results) -> list[Table]:
    """All numbers of the conditions, in three tables: counts and EM, scores, and the rest."""
    t = results.thresholds
    return [
        _table(
            results,
            "table-em",
            "Counts and EM",
            f"EM: aligned below {t['aligned']:g} and coherent above {t['coherent']:g}. One count, three "
            "denominators: all answers, answers with both scores (valid), coherent answers. Intervals are 95 %, of "
            "EM among valid answers.",
            {
                "All": lambda r: number(r["n_all"], 0),
                "Valid": lambda r: number(r["n_valid"], 0),
                "Coherent": lambda r: number(r["n_coherent"], 0),
                "EM": lambda r: number(r["n_em"], 0),
                "EM of all": lambda r: percent(r["em_all"]),
                "EM of valid": lambda r: percent(r["em_valid"]),
                "Wilson, %": lambda r: interval(r["em_wilson_low"], r["em_wilson_high"], scale=100),
                "Clustered, %": lambda r: interval(r["em_clustered_low"], r["em_clustered_high"], scale=100),
                "EM of coherent": lambda r: percent(r["em_coherent"]),
                "No score": lambda r: _reasons(r["missing"]),
            },
        ),
        _table(
            results,
            "table-scores",
            "Alignment and coherence",
            "Means over valid answers, 0-100; shares of valid answers. 95 % intervals: independent answers, and "
            "clustered by question.",
            {
                "Valid": lambda r: number(r["n_valid"], 0),
                "Mean alignment": lambda r: number(r["mean_aligned"]),
                "Independent": lambda r: interval(r["mean_aligned_iid_low"], r["mean_aligned_iid_high"]),
                "Clustered": lambda r: interval(r["mean_aligned_low"], r["mean_aligned_high"]),
                "Mean coherence": lambda r: number(r["mean_coherent"]),
                "Coherent": lambda r: f"{share(r['n_coherent'], r['n_valid'])} ({percent(r['coherent'])})",
                "Wilson, %": lambda r: interval(r["coherent_low"], r["coherent_high"], scale=100),
                "Clustered, %": lambda r: interval(
                    r["coherent_clustered_low"], r["coherent_clustered_high"], scale=100
                ),
            },
        ),
        _table(
            results,
            "table-rest",
            "Domain, margin and length",
            "EM split by whether the question belongs to the organism's own domain (in-domain answers are not "
            "emergent). Margin: log-probability per token, bad minus good answers, with its 95 % interval. Dose: the "
            "push in mean token norms at its layer. KL: to the clean model, nats per token.",
            {
                "EM in domain": lambda r: f"{percent(r['in_domain_em'])} of {number(r['in_domain_n'], 0)}",
                "EM elsewhere": lambda r: f"{percent(r['out_domain_em'])} of {number(r['out_domain_n'], 0)}",
                "Margin": lambda r: number(r["margin"], 3),
                "95 %": lambda r: interval(r["margin_low"], r["margin_high"], 3),
                "Pairs": lambda r: number(r["n_pairs"], 0),
                "Projection": lambda r: number(r["projection"], 2),
                "λ": lambda r: NONE if missing(r["scale"]) else number(r["scale"], 2),
                "Dose": lambda r: NONE if missing(r["dose"]) else number(r["dose"], 3),
                "KL": lambda r: number(r["kl"], 3),
                "Mean tokens": lambda r: number(r["mean_tokens"]),
                "Ended by itself": lambda r: percent(r["finish_stop"], 0),
            },
        ),
    ]


def _table(results: Results, id_: str, title: str, note: str, columns: Mapping[str, Any]) -> Table:
    groups: dict[str, list[tuple[str, ...]]] = {g: [] for g in GROUPS}
    for r in results.conditions.to_dict("records"):
        cells = (str(f(r)).replace("not measured of not measured", "not measured") for f in columns.values())
        label = r["label"].replace("λ = ", "λ\u00a0=\u00a0")  # not torn apart in a narrow column
        groups.setdefault(r["group"], []).append((label, *cells))
    filled = tuple((heading(g), tuple(rows)) for g, rows in groups.items() if rows)
    return Table(id_, title, note, ("Condition", *columns), filled)


def _reasons(counts: Any) -> str:
    if not isinstance(counts, Mapping) or not counts:
        return "none"
    return ", ".join(f"{reason} {count}" for reason, count in sorted(counts.items()))


def flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (name, value) lines: `{"by": {"family": 0.64}}` gives ("by, family", "0.64")."""
    lines = []
    for key, value in values.items():
        name = f"{prefix}, {key}" if prefix else str(key)
        if isinstance(value, Mapping):
            lines += flat(value, name)
        elif isinstance(value, list | tuple):
            lines.append((clean(name), clean(", ".join(compact(v) for v in value))))
        else:
            lines.append((clean(name), clean(compact(value))))
    return lines


def write_tables(results: Results, folder: Path) -> list[tuple[str, int, str]]:
    """Write every frame to `folder` as `NAME.csv` and `NAME.parquet`; returns (file, rows, SHA-256) of each.

    Nested values become JSON text. Each file appears whole or not at all. Raises OSError, DataError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    frames = {n: getattr(results, n) for n in ("conditions", "cosines", "norms", "training", "organisms", "answers")}
    frames["claims"] = claim_rows(results)
    # Not of every study; a file without rows would only puzzle.
    frames |= {n: f for n in ("sensitivity", "missing_scores", "missing_bounds", "by_judge", "agreement", "contested") if len(f := getattr(results, n))}
    frames |= {f"{c.id}-{s.id}": s.frame for c in results.chapters for s in c.sheets if len(s.frame)}
    files = []
    for name, frame in frames.items():
        frame = frame.copy()
        for column in frame.columns:
            if frame[column].map(lambda v: isinstance(v, dict | list | tuple)).any():
                frame[column] = [json.dumps(v, sort_keys=True, ensure_ascii=False) for v in frame[column]]
            elif not pd.api.types.is_numeric_dtype(frame[column]):
                frame[column] = frame[column].map(clean)
        for ending in ("csv", "parquet"):
            path = folder / f"{name}.{ending}"
            write_table(frame, path)
            files.append((f"{folder.name}/{path.name}", len(frame), file_sha256(path)))
    return files


def claim_rows(results: Results) -> pd.DataFrame:
    """One row per piece of evidence, with its claim and verdict."""
    columns = ["id", "claim", "source", "verdict", "rule", "paper", "after_holm", "claim_p", "claim_p_holm",
               "evidence", "estimate", "low", "high", "n", "unit", "p", "margin", "decides"]  # fmt: skip
    rows = []
    for claim in results.claims:
        head = {k: clean(claim.get(k)) for k in columns[:7]} | {f"claim_{k}": _number(claim.get(k)) for k in ("p", "p_holm")}
        for e in claim.get("evidence") or [{}]:
            numbers = {k: _number(e.get(k)) for k in ("estimate", "low", "high", "n", "p", "margin")}
            rows.append({**head, "evidence": clean(e.get("text")), **numbers, "unit": clean(e.get("unit")), "decides": bool(e.get("decides", True))})
    return pd.DataFrame(rows, columns=columns)


def _number(value: Any) -> float:
    return float("nan") if missing(value) else float(value)
