"""Write docs/benchmarks.md from the JSON lines of `benchmarks/run.py`: every claim with its target, the median ratio and its extremes, bad rows included.

    python scripts/write_benchmarks.py [benchmarks/results.jsonl]

The newest line of a claim counts. A claim without a line is "not measured"; lines of `--quick` runs are shown as such.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"
CLAIMS: dict[str, tuple[str, str, str]] = {
    "decode_line_float32": ("decode, 128 rows, against the linear layers' own time, fp32", "-", "≥ 60 %"),
    "decode_line_float32_fastest": ("the same line by the fastest library and layout", "-", "≥ 60 %"),
    "decode_line_bfloat16": ("the first in bf16", "-", "≥ 45 %"),
    "decode_line_bfloat16_fastest": ("the second in bf16", "-", "≥ 45 %"),
    "decode_equal": ("decode, 64 rows of equal length", "transformers `generate`", "≥ 2.2x"),
    "decode_equal_ceiling": ("ceiling of that row: the linear layers' own time in float32", "transformers `generate`", ""),
    "decode_equal_bfloat16": ("the same, both in bf16", "transformers `generate`", "≥ 2.2x"),
    "decode_natural": ("decode, 128 answers of natural length up to 200 tokens", "`generate`, batched as a careful user would", "≥ 3x"),
    "decode_natural_ceiling": ("ceiling of that row", "transformers `generate`", ""),
    "decode_natural_bfloat16": ("the same, both in bf16", "`generate`, batched as a careful user would", "≥ 3x"),
    "readers_32": ("32 readers at once", "llama.cpp (`xllamacpp`), 32 slots", "≥ 2x"),
    "readers_32_ceiling": ("ceiling of that row", "llama.cpp, 32 slots", ""),
    "readers_1": ("one reader", "llama.cpp (`xllamacpp`)", "≥ 0.5x"),
    "readers_1_ceiling": ("ceiling of that row", "llama.cpp", ""),
    "sweep_best": ("sweep of 16 conditions x 64 answers", "best of repeng, steering-vectors, pyvene, nnsight", "≥ 4x"),
    "sweep_authors": ("the same sweep", "the authors' procedure", "≥ 6x"),
    "sweep_line": ("what the sweep reaches of the line: the linear layers' own time on its tokens", "-", ""),
    "extraction_steering-vectors": ("directions of all layers from 400 answers", "steering-vectors", "≥ 3x"),
    "extraction_authors": ("the same directions", "the authors' procedure", "≥ 3x"),
    "extraction_hidden_states": ("the same directions", "`output_hidden_states`", "≥ 3x"),
    "extraction_line": ("what extraction reaches of the line", "-", ""),
    "extraction_memory": ("memory of the same, theirs over ours", "best of them", "≥ 2x"),
    "extraction_peak": ("the whole process's peak memory of the same, theirs over ours", "best of them", ""),
    "training_all_adapter": ("LoRA training, `all_adapter`", "best of TRL SFTTrainer and PEFT with a plain loop", "≥ 1.8x"),
    "training_all_adapter_line": ("what it reaches of the line", "-", ""),
    "training_nine_adapter": ("LoRA training, `nine_adapter`", "best of TRL SFTTrainer and PEFT with a plain loop", "≥ 2.5x"),
    "training_nine_adapter_line": ("what it reaches of the line", "-", ""),
    "demo": ("the whole demo", "-", "≤ 12 min"),
    "startup_help": ("`convergent --help`", "-", "≤ 0.3 s"),
    "startup_load": ("loading the embedded model", "-", ""),
    "startup_report": ("report of a finished study", "-", "≤ 5 s"),
    "decode_gpu_135M_bfloat16": ("on a GPU: 512 rows, 135M shape, bf16", "transformers `generate`, sdpa", ""),
    "decode_gpu_135M_bfloat16_vllm": ("the same", "vLLM", ""),
    "decode_gpu_135M_bfloat16_graphs": ("the same", "the same without CUDA graphs", ""),
    "judge": ("answers judged, embedded judge", "-", "≥ 200/s"),
    "judge_line": ("what it reaches of the line, its own 8-bit layers", "-", ""),
}
"""Row of a record -> claim, peer, target, in the order of the table. Rows that are not here come after."""

LINES = {
    "decode_equal": "decode_equal_ceiling",
    "decode_natural": "decode_natural_ceiling",
    "readers_32": "readers_32_ceiling",
    "readers_1": "readers_1_ceiling",
    "sweep_best": "sweep_line",
    "sweep_authors": "sweep_line",
    "extraction_steering-vectors": "extraction_line",
    "extraction_authors": "extraction_line",
    "extraction_hidden_states": "extraction_line",
    "training_all_adapter": "training_all_adapter_line",
    "training_nine_adapter": "training_nine_adapter_line",
    "judge": "judge_line",
}
"""Row -> the row that holds its ratio at the machine's line (a ceiling), or the share of the line that it reaches."""


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The newest record of each claim; a full run counts before a quick one."""
    newest: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else [], start=1):
        try:
            record = json.loads(line)
            claim = record["claim"]
        except (ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"{path}: line {number}: is no benchmark record ({error}); remove it") from error
        if not (claim in newest and record.get("quick") and not newest[claim].get("quick")):
            newest[claim] = record
    return newest


def rows_of(record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Row name -> {"ratios", "peer", "note", "unit", "target", "at_most", "most"}, whatever the benchmark's own form and age."""
    plain = {"peer": "", "note": "", "unit": "x", "target": None, "at_most": False, "most": None, "ratios": []}
    if "rows" in record:
        return {name: {**plain, **r} for name, r in record["rows"].items()}
    if record["claim"] == "judge":
        speeds = record["answers_per_second"][record["judge"]]
        return {"judge": {**plain, "ratios": speeds, "unit": " answers/s", "target": 200.0}}
    if record["claim"].startswith("training_"):
        return {record["claim"]: {**plain, **_best(record), "target": {"all_adapter": 1.8, "nine_adapter": 2.5}.get(record["recipe"])}}
    ratios = record.get("ratios", [])
    if isinstance(ratios, Mapping):
        return {f"{record['claim']}_{peer}": {**plain, "ratios": values, "peer": peer} for peer, values in ratios.items()}
    return {record["claim"]: {**plain, "ratios": ratios}}


def _best(found: Mapping[str, Any]) -> dict[str, Any]:
    """The peer that was hardest to beat."""
    ratios = {peer: values for peer, values in found["ratios"].items() if values}
    peer = min(ratios, key=lambda p: statistics.median(ratios[p]), default="")
    failed = "; ".join(f"{p} failed: {why}" for p, why in found.get("failed", {}).items())
    return {"ratios": ratios.get(peer, []), "peer": peer, "note": failed}


def line_of(name: str, row: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    claim, peer, target = CLAIMS.get(name, (name.replace("_", " "), row["peer"] or "-", _target(row)))
    if row["peer"] and name in CLAIMS and peer not in ("-", row["peer"]):
        peer += f": {row['peer']}"
    values = row["ratios"]
    if not values:
        figures, met = ["not measured", "", "0"], "-"
    else:
        percent = "%" in target
        median = statistics.median(values)
        figures = [_figure(median, row["unit"], percent), f"{_figure(min(values), row['unit'], percent)} to {_figure(max(values), row['unit'], percent)}", str(len(values))]
        met = "-" if row["target"] is None else "yes" if _met(row, median) else "**no**"
    when = record.get("date", "") + (", quick: provisional" if record.get("quick") else "")
    return _table_row([claim, peer, target, *figures, met, row["note"], when])


def _target(row: Mapping[str, Any]) -> str:
    if row["target"] is None:
        return ""
    return f"{row['target']:g}{row['unit']}" if row["most"] is None else f"{row['target']:g} to {row['most']:g}{row['unit']}"


def _met(row: Mapping[str, Any], median: float) -> bool:
    if row["at_most"]:
        return bool(median <= row["target"])
    return bool(median >= row["target"] and (row["most"] is None or median <= row["most"]))


def _figure(value: float, unit: str, percent: bool) -> str:
    return f"{100 * value:.0f} %" if percent else f"{value:.3g}{unit if unit in ('x', '') or unit.startswith(' ') else ' ' + unit}"


def _table_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(c.replace("|", "/").replace("\n", " ") for c in cells) + " |"


def _reach(found: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]]) -> list[str]:
    """For every row that misses its target and whose line was measured: what it would be at the line."""
    rows = [_table_row(["claim", "peer", "target", "seen", "at the line", "target"]), "|---|---|---|---|---|---|"]
    for name, line in LINES.items():
        if not (name in found and line in found and found[name][0]["ratios"] and found[line][0]["ratios"]):
            continue
        row, seen = found[name][0], statistics.median(found[name][0]["ratios"])
        at_line = statistics.median(found[line][0]["ratios"])
        if not line.endswith("_ceiling"):
            at_line = seen / at_line
        if row["target"] is not None and not _met(row, seen):
            figures = [_figure(v, row["unit"], False) for v in (row["target"], seen, at_line)]
            rows.append(_table_row([CLAIMS[name][0], row["peer"] or CLAIMS[name][1], *figures, "above the line" if row["target"] > at_line else "below it: not reached yet"]))
    return rows


def page(records: Mapping[str, Mapping[str, Any]]) -> str:
    """The whole page."""
    found = {name: (row, record) for record in records.values() for name, row in rows_of(record).items()}
    absent = {"peer": "", "note": "no stored result", "unit": "x", "target": None, "at_most": False, "most": None, "ratios": []}
    header = [_table_row(["claim", "peer", "target", "median", "least to most", "repeats", "met", "note", "date"]), "|---|---|---|---|---|---|---|---|---|"]
    main = [line_of(name, *found.get(name, (absent, {}))) for name in CLAIMS]
    growth = [line_of(name, *pair) for name, pair in found.items() if name.startswith("growth")]
    other = [line_of(name, *pair) for name, pair in found.items() if name not in CLAIMS and not name.startswith("growth")]
    parts = [
        "# Benchmarks",
        "Written by `scripts/write_benchmarks.py` from the lines that `make bench` stores; nothing here is typed by hand. Machines differ, so only ratios count: each is taken "
        "within a repeat, peer and project on the same work in one run with alternating order, and shown as median with its extremes. Bad rows stand with the good ones; a "
        "claim without a stored result is not measured. The same on two cores that have AVX2 and no more: [benchmarks_avx2.md](benchmarks_avx2.md).",
        "\n".join([*header, *main]),
        "## Missed targets and the line",
        "The line is the time of the linear layers alone, in float32 by the faster of torch's two libraries, on the same tokens (the judge's: of its own 8-bit layers). No code on these products passes it on that machine, whatever else it does. "
        "Products are shared out over the cores where that is faster. "
        "Ceilings were measured with the peer in one run; else the ratio is divided by the share of the line that was reached in a run of its own.",
        "\n".join(_reach(found)),
        "## Growth",
        "\n".join([*header, *growth]) if growth else "Not measured.",
        "## Beside the table",
        "\n".join([*header, *other]) if other else "Nothing.",
        "## Machines and versions",
        *(_where(claim, record) for claim, record in sorted(records.items())),
    ]
    return "\n\n".join(parts) + "\n"


def _where(claim: str, record: Mapping[str, Any]) -> str:
    machine = record.get("machine", "")
    if isinstance(machine, Mapping):
        machine = (
            f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, {' '.join(machine['isa']) or 'no vector flags known'}, {machine['memory_gib']} GiB, "
            f"GPU: {machine['gpu'] or 'none'}, {machine['system']}, Python {machine['python']}, load at the end {machine['load']}"
        )
    versions = ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items())
    settings = ", ".join(f"{k} {v}" for k, v in record.get("settings", {}).items() if not isinstance(v, dict))
    lines = [f"**{claim}** ({record.get('date', 'no date')}, took {record.get('seconds', '?')} s). {machine}. {versions}.", f"Work: {settings}." if settings else ""]
    lines += [f"{name} failed: {why}" for name, why in record.get("failed", {}).items()]
    return "  \n".join(line for line in lines if line)


if __name__ == "__main__":
    PAGE.write_text(page(read(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "benchmarks" / "results.jsonl")), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
