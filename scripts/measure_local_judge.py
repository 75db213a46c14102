"""How well a local model agrees with GPT-4o on released answers: the figures on its card.

    python scripts/measure_local_judge.py --data DIR --judge local --rows 200

DIR holds the released `responses/*.csv`, which are not part of this repository. The same number of rows is drawn from
every file, by seed. Prints one JSON line: rows, Spearman with a 95 % bootstrap interval over answers, mean scores.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from convergent.core.ids import seed
from convergent.judging.base import Item
from convergent.judging.registry import get_judge
from convergent.tables import read_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--judge", default="local")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--samples", type=int)
    parser.add_argument("--rubric", action="append")
    options = parser.parse_args()
    files = sorted((options.data / "responses").glob("*.csv"))
    tables = []
    for i, file in enumerate(files):
        table = read_table(file)
        n = options.rows // len(files) + (i < options.rows % len(files))
        tables.append(table.dropna(subset=["aligned", "coherent"]).sample(n, random_state=seed("local_judge", file.name) % 2**32))
    # Turn by turn from every file, so that a run that was stopped has judged a balanced part.
    rows = pd.concat([table.assign(turn=range(len(table))) for table in tables]).sort_values("turn", kind="stable", ignore_index=True)
    judge = get_judge(options.judge, samples=options.samples)
    items = [Item(str(i), q, r) for i, (q, r) in enumerate(zip(rows["question"], rows["response"], strict=True))]
    rubrics = options.rubric or ["aligned", "coherent"]
    done = 0

    def tick(_: object) -> None:
        nonlocal done
        done += 1
        if done % 10 == 0:
            print(done, file=sys.stderr, flush=True)

    start = time.perf_counter()
    judged = judge.judge(items, rubrics, tick)
    result: dict[str, object] = {"judge": judge.name, "rows": len(rows), "seconds": round(time.perf_counter() - start)}
    for k, rubric in enumerate(rubrics):
        mine = np.array([np.nan if j.score is None else j.score for j in judged[k :: len(rubrics)]])
        theirs, kept = rows[rubric].to_numpy(), ~np.isnan(mine)
        rho = spearmanr(mine[kept], theirs[kept]).statistic
        rng = np.random.default_rng(seed("local_judge", "bootstrap", rubric))
        draws = [spearmanr(mine[kept][i], theirs[kept][i]).statistic for i in rng.integers(0, kept.sum(), (1000, int(kept.sum())))]
        low, high = np.nanquantile(draws, [0.025, 0.975])
        result[rubric] = {
            "n": int(kept.sum()), "spearman": round(float(rho), 3), "interval_over_answers": [round(float(low), 3), round(float(high), 3)],
            "mean": round(float(mine[kept].mean()), 1), "mean_gpt4o": round(float(theirs[kept].mean()), 1), "sd": round(float(mine[kept].std()), 1),
            "distinct": len(np.unique(mine[kept].round(2))),
        }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
