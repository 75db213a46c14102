"""Fill the results of README.md and docs/results.md from finished study folders, so that no figure in the docs is typed by hand.

    python scripts/write_results.py demo [runs/seeds/seed1 runs/seeds/seed2] [runs/demo_float32]
    python scripts/write_results.py runs/paper_small --page docs/results_paper_small.md --note "Run on ..."    this page alone
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

ROOT = Path(__file__).parent.parent
COLUMNS = {"name": "condition", "mean_aligned": "mean alignment", "em_valid": "EM, of answers with both scores", "coherent": "coherent", "margin": "margin, nats/token"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", type=Path, nargs="+", help="folders of finished studies, one per seed or dtype")
    parser.add_argument("--page", type=Path, help="write this page, and not those of the demo")
    parser.add_argument("--note", default="", help="a sentence on how it was run")
    options = parser.parse_args()
    folders: list[Path] = options.studies
    first = folders[0]
    claims = [json.loads((f / "claims.json").read_text(encoding="utf-8")) for f in folders]
    names = _names(folders)
    if options.page is None:
        readme = ROOT / "README.md"
        text = readme.read_text(encoding="utf-8")
        block = "<!-- results:begin -->\n" + claim_table(claims, names) + "\n<!-- results:end -->"
        readme.write_text(re.sub(r"<!-- results:begin -->.*<!-- results:end -->", lambda m: block, text, flags=re.S), encoding="utf-8")
    parts = [
        "# Results at 135M\n\nWritten by `scripts/write_results.py` from finished studies; nothing here is typed by hand. "
        f"Judge: {', '.join(dict.fromkeys(_judge(f) for f in folders))}. {options.note}".strip() + "\n",
        "## Verdicts by run\n\n" + claim_table(claims, names),
    ]
    for folder, name in zip(folders, names, strict=True):
        parts.append(f"## Conditions, {name}\n\n" + condition_table(folder))
    parts.append(f"## Evidence, {names[0]}\n\n" + evidence(claims[0]))
    parts.append("## Directions\n\n" + geometry(first))
    (options.page or ROOT / "docs" / "results.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _judge(folder: Path) -> str:
    name: str = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["judge"]
    return name.partition("#")[0]


def _names(folders: list[Path]) -> list[str]:
    """Each run by its seed, and by its dtype where they differ."""
    manifests = [json.loads((f / "manifest.json").read_text(encoding="utf-8")) for f in folders]
    differ = len({m["dtype"] for m in manifests}) > 1
    return [f"seed {m['study']['seed']}" + (f", {m['dtype']}" if differ else "") for m in manifests]


def claim_table(claims: list[list[dict[str, Any]]], names: list[str]) -> str:
    """Claim by run. A verdict counts the comparisons that support, oppose and leave open."""
    lines = ["| claim | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for i, claim in enumerate(claims[0]):
        cells = []
        for run in claims:
            votes = [e["supports"] for e in run[i]["evidence"] if e["decides"]]
            after = f"; {run[i]['after_holm']} after Holm" if run[i]["after_holm"] != run[i]["verdict"] else ""
            cells.append(f"{run[i]['verdict']} ({votes.count('held')} for, {votes.count('did not hold')} against, {votes.count('undecided')} open{after})")
        lines.append(f"| {markdown_cell(claim['claim'])} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def condition_table(folder: Path) -> str:
    frame = pd.read_parquet(folder / "tables" / "conditions.parquet")
    lines = ["| condition | n | mean alignment (questions) | EM: k of n (Wilson; questions) | coherent | margin (pairs) | KL |", "|---|---|---|---|---|---|---|"]
    for r in frame.itertuples():
        kl = "-" if pd.isna(r.kl) else f"{r.kl:.2f}"
        lines.append(
            f"| {markdown_cell(r.label)} | {r.n_valid:.0f} | {r.mean_aligned:.1f} [{r.mean_aligned_low:.1f}, {r.mean_aligned_high:.1f}] | {r.n_em:.0f} of {r.n_valid:.0f} "
            f"({r.em_wilson_low:.1%} to {r.em_wilson_high:.1%}; {r.em_clustered_low:.1%} to {r.em_clustered_high:.1%}) | {r.coherent:.1%} | "
            f"{r.margin:+.3f} [{r.margin_low:+.3f}, {r.margin_high:+.3f}], n = {r.n_pairs:.0f} | {kl} |"
        )
    return "\n".join(lines) + "\n"


def evidence(claims: list[dict[str, Any]]) -> str:
    lines = ["| claim | comparison | difference, 95 % interval (90 % for no change) | p, one-sided | supports |", "|---|---|---|---|---|"]
    for claim in claims:
        for e in claim["evidence"]:
            low, high, p = (math.nan if e[k] is None else e[k] for k in ("low", "high", "p"))
            lines.append(
                f"| {claim['id']} | {markdown_cell(e['text'])} | {e['estimate']:+.3f} [{low:+.3f}, {high:+.3f}] {e['unit']}, n = {e['n']} | {p:.2g} | {e['supports']}"
                f"{'' if e['decides'] else ', not counted'} |"
            )
    return "\n".join(lines) + "\n"


def geometry(folder: Path) -> str:
    """Cosines of the directions at the primary layer, and what the chat model reads on the same texts."""
    layer = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["layer"]
    cosines = pd.read_parquet(folder / "tables" / "cosines.parquet")
    here = cosines[cosines["layer"] == layer]
    lines = [f"At layer {layer}:", "", "| a | b | cosine |", "|---|---|---|"]
    for r in here.itertuples():
        b = "chat model on the same texts" if r.kind == "chat_baseline" else r.b if r.kind == "organisms" else r.kind
        lines.append(f"| {r.a} | {b} | {r.cosine:+.3f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
