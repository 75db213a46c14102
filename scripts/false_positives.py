"""How often each experiment finds something where nothing is: its claims on planted models' twins and on scrambled scores, over seeds.

    OMP_NUM_THREADS=1 python scripts/false_positives.py --out runs/false_positives.jsonl --seeds 20 [--only untaught] [--table docs/false_positives.md]

A seed is another base, other twins, other answers and other nulls (tests/planted.py). One JSON line per study and seed is appended to `--out`, and
what is there is not done again. A claim that holds is a false positive; its rules ask for 95 % intervals on one side, so chance is 2.5 % at most.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from convergent import stats
from convergent.errors import DirectionError
from planted import Planted, planted
from planted_study import ScrambledJudge, WordJudge, planted_study, ran, trained_study, twins_study

FIRST_SEED = 200
LEVEL = 0.025
"""One side of a 95 % interval."""


Plan = Callable[[Planted, int], dict[str, Any]]
"""The study, as plain data, of a planted model and a seed."""


@dataclass(frozen=True)
class Null:
    """Studies in which nothing is to be found, and the claims that would be false there."""

    what: str
    study: Plan
    false: tuple[str, ...]
    """Patterns of claim ids."""
    judge: type[WordJudge] = WordJudge


def of(source: str, others: Sequence[str], experiments: dict[str, Any], direction: dict[str, Any] | None = None) -> Plan:
    """Studies of these organisms of a planted model."""

    def study(p: Planted, seed: int) -> dict[str, Any]:
        made = planted_study(p, source, others, seed=seed, experiments=experiments)
        made["direction"] |= direction or {}
        return made

    return study


QUANTILE = {"classes": {"by": "quantile"}}
"""Twins say hardly a bad word, so their classes are the lowest and highest scores."""
NULLS = {
    "untaught": Null(
        "two twins, with one adapter and with four; the paper's first experiments, with three draws of each null",
        twins_study,
        ("misaligned/*", "ablation/layerwise", "ablation/single", "transfer/*", "induction*", "suppression*"),
    ),
    "twin": Null(
        "a twin with one adapter, whose B is along an axis that nothing reads",
        of("hidden_twin", (), {"b_vector": {"random": 100, "texts": 16, "jacobian_texts": 8}, "chat_origin": {}}, QUANTILE),
        ("b_vector/[!o]*", "chat_origin/ablation/*"),
    ),
    "twins": Null(
        "two twins, with one adapter and with four",
        of(
            "direct_twin",
            ("many_twin", "sound"),
            {
                "plain": {"twin": "sound"},
                "subspace": {"held_out": ["direct_twin"], "ks": [1, 2], "sampled_k": [2]},
                "adapter_steer": {"organism": "many_twin"},
                "semantic": {"topics": ["medical"]},
                "self_correction": {},
                "cosine": {"organisms": ["direct_twin", "many_twin"]},
            },
            QUANTILE,
        ),
        ("subspace/*", "adapter_steer/*", "semantic/*", "self_correction/*", "cosine/beyond-texts"),
    ),
    "scrambled": Null(
        "two organisms whose answers have scores at random",
        of(
            "three",
            ("direct",),
            {
                "scalars": {"repeats": 2, "draws": 4, "c": 1.0, "per_class": 64, "topics": ["medical"]},
                "chat_origin": {},
                "semantic": {"topics": ["medical"]},
                "self_correction": {"controls": []},
                "cosine": {},
            },
        ),
        ("scalars/*", "chat_origin/cosine/*", "semantic/*", "self_correction/*", "cosine/*"),
        judge=ScrambledJudge,
    ),
    "good": Null(
        "an organism trained on good answers, beside its twin with another seed; as their answers are alike, scores are at random",
        lambda p, seed: trained_study(p, "good", seed),
        ("dynamics/*",),
        judge=ScrambledJudge,
    ),
}  # fmt: skip


def verdicts(name: str, seed: int, folder: Path) -> dict[str, dict[str, Any]]:
    """Claim that would be false in that null -> its verdict, and what each of its comparisons says."""
    null = NULLS[name]
    with ran(folder, null.study(planted(seed), seed), null.judge()) as (_, results):
        claims = [c for c in results.claims if any(fnmatch.fnmatchcase(c["id"], p) for p in null.false)]
        return {
            c["id"]: {"verdict": c["verdict"], "evidence": [[e["supports"], e["estimate"], e["low"], e["high"], e["text"]] for e in c["evidence"]]}
            for c in claims
        }


def kept(path: Path) -> list[dict[str, Any]]:
    """The lines of earlier runs; one that was cut off by a kill is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Per null and claim how many of N seeds held, as Markdown."""
    lines = ["| nothing is there: | claim | held | exact 95 % interval | did not hold | undecided |", "|---|---|---|---|---|---|"]
    for name in NULLS:
        mine = [r["claims"] for r in rows if r["null"] == name]
        for claim in sorted({c for claims in mine for c in claims}):
            votes = [claims[claim]["verdict"] for claims in mine if claim in claims]
            share = stats.clopper_pearson(votes.count("held"), len(votes))
            too_often = " **more than chance**" if share.low > LEVEL else ""
            lines.append(
                f"| {name} | `{claim}` | {votes.count('held')} of {len(votes)}{too_often} | {share.low:.3f} to {share.high:.3f} "
                f"| {votes.count('did not hold')} | {votes.count('undecided')} |"
            )
    return "\n".join(lines) + "\n"


PAGE = """# Where nothing is: how often each experiment finds something

Written by `scripts/false_positives.py` from {n} studies of planted models (`tests/planted.py`); nothing here is typed in. Per seed another base, other
organisms, other answers and other random nulls. Each row is a claim that is false by construction, so every "held" is a false positive:

{nulls}

A claim is held only if every comparison that it lists has its 95 % interval on the claimed side, so that chance allows 2.5 % at most, and less with more
comparisons. "More than chance" stands where the exact (Clopper-Pearson) interval lies above 2.5 %. A count of 0 of 20 still allows up to 17 %.

{table}"""


def page(rows: Sequence[dict[str, Any]]) -> str:
    """The page of the docs."""
    nulls = []
    for name, null in NULLS.items():
        mine = [r for r in rows if r["null"] == name]
        refused = sum("refused" in r for r in mine)
        more = f" In {refused} of them no direction can be read, so nothing is claimed." if refused else ""
        if mine:
            nulls.append(f"- *{name}* ({len(mine)} seeds): {null.what}.{more}")
    return PAGE.format(n=len(rows), nulls="\n".join(nulls), table=table(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/false_positives.jsonl"))
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--only", choices=NULLS, nargs="+", default=list(NULLS))
    parser.add_argument("--table", type=Path, help="file that the page is written to")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for seed in range(FIRST_SEED, FIRST_SEED + options.seeds):
        done = {(r["null"], r["seed"]) for r in kept(options.out)}
        for name in options.only:
            if (name, seed) in done:
                continue
            began = time.process_time()
            row: dict[str, Any] = {"null": name, "seed": seed}
            with tempfile.TemporaryDirectory() as folder:
                try:
                    row["claims"] = verdicts(name, seed, Path(folder))
                except DirectionError as error:  # no direction can be read, so there is nothing to claim
                    row |= {"claims": {}, "refused": str(error)}
            row["cpu_seconds"] = round(time.process_time() - began, 1)
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            held = [c for c, v in row["claims"].items() if v["verdict"] == "held"]
            print(f"seed {seed}, {name}: {row['cpu_seconds']} s, {row.get('refused') or 'held: ' + (', '.join(held) or 'none')}", flush=True)
    rows = kept(options.out)
    print(table(rows))
    if options.table is not None:
        options.table.write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
