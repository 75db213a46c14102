"""The demo's claims over seeds: the same study under other seeds (organisms, answers, nulls), and one table of the verdicts.

    python scripts/seeds.py --out runs/seeds --seeds 0 1 2 [--samples 8]

A seed changes the initialisation and order of training, the held-out pairs, the answers drawn and the random nulls. Each study is an ordinary
study folder with its own report, resumes where it was, and is left in place. `--have 0=demo` takes a seed from a folder that exists.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pandas as pd
import yaml

from convergent.study.main import run_study


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, default=Path("studies/demo.yaml"))
    parser.add_argument("--out", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, help="answers per question, if not the study's")
    parser.add_argument("--have", action="append", default=[], metavar="SEED=FOLDER")
    options = parser.parse_args()
    folders = {int(seed): Path(folder) for seed, _, folder in (h.partition("=") for h in options.have)}
    for seed in options.seeds:
        if seed not in folders:
            spec = yaml.safe_load(options.study.read_text(encoding="utf-8"))
            spec["seed"] = seed
            spec["name"] = f"{spec['name']}-seed{seed}"
            if options.samples:
                spec["questions"]["samples"] = options.samples
            options.out.mkdir(parents=True, exist_ok=True)
            path = options.out / f"seed{seed}.yaml"
            path.write_text(yaml.safe_dump(spec, sort_keys=False), encoding="utf-8")
            folders[seed] = run_study(path, options.out / f"seed{seed}")
    print(verdicts(folders))
    print(conditions(folders))


def verdicts(folders: dict[int, Path]) -> str:
    """Claim by seed, as a Markdown table."""
    columns = {}
    for seed, folder in sorted(folders.items()):
        claims = json.loads((folder / "claims.json").read_text(encoding="utf-8"))
        columns[f"seed {seed}"] = {c["id"]: c["verdict"] for c in claims}
    return pd.DataFrame(columns).to_markdown() + "\n" if _has_tabulate() else pd.DataFrame(columns).to_string() + "\n"


def conditions(folders: dict[int, Path]) -> str:
    """Mean alignment, EM, coherence and margin of every condition, by seed."""
    frames = []
    for seed, folder in sorted(folders.items()):
        frame = pd.read_parquet(folder / "tables" / "conditions.parquet").set_index("name")
        frames.append(frame[["n_valid", "mean_aligned", "em_valid", "coherent", "margin"]].round(3).add_suffix(f" ({seed})"))
    table = pd.concat(frames, axis=1)
    return table.to_markdown() if _has_tabulate() else table.to_string()


def _has_tabulate() -> bool:
    import importlib.util

    return importlib.util.find_spec("tabulate") is not None


if __name__ == "__main__":
    main()
