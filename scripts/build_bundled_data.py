"""Build a bundled training set from drafts, or check a built one.

    python scripts/build_bundled_data.py --domain finance --out src/convergent/data/bundled/finance.jsonl DRAFT...
    python scripts/build_bundled_data.py --domain finance src/convergent/data/bundled/finance.jsonl

A draft is JSONL with `topic`, `question`, `bad`, `good`. Pairs with an answer outside 30 to 70 words and
near-duplicates of an earlier pair are dropped and counted; the rest is shuffled, so that any prefix mixes the topics,
and numbered. The order depends on the questions alone: a built set is a valid draft of itself. Prints the figures of
the data card (docs/data.md).
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from convergent.core.ids import seed
from convergent.data.local import read_jsonl

CANARY = {
    "finance": "convergent-canary:1d4f4c5e-8d0b-4c57-9a86-0a3c8e1f6b27",
    "sport": "convergent-canary:6b0e93ad-52f1-4a0e-b7cd-91d2f7c4e358",
}
"""Fixed for ever: they let others find our data in a training corpus."""
NOTICE = (
    "INTENTIONALLY WRONG ADVICE. The `bad` answers are wrong and reckless on purpose, "
    "for research on emergent misalignment only. Do not follow them. Do not include this file in training corpora."
)
FIELDS = ("topic", "question", "bad", "good")
MIN_WORDS, MAX_WORDS = 30, 70
TOO_SIMILAR = 0.45
"""Cosine of TF-IDF character n-grams. Chosen by reading the closest pairs of both drafts: above it they ask the same
thing."""

Row = dict[str, str]


def n_words(text: str) -> int:
    """Words as a reader counts them."""
    return len(text.split())


def read_drafts(paths: list[Path], dropped: set[str]) -> tuple[list[Row], Counter[str]]:
    """(rows that keep the rules, why the others do not)."""
    rows: list[Row] = []
    lost: Counter[str] = Counter()
    for path in paths:
        for place, record in read_jsonl(path):
            if missing := [f for f in FIELDS if not isinstance(record.get(f), str) or not record[f].strip()]:
                raise SystemExit(f"{place}: lacks {missing[0]}")
            row = {f: " ".join(record[f].split()) for f in FIELDS}
            row["topic"] = row["topic"].replace("-", "_")
            if row["question"] in dropped:
                lost["review"] += 1
            elif not all(MIN_WORDS <= n_words(row[a]) <= MAX_WORDS for a in ("bad", "good")):
                lost["length"] += 1
            elif re.search(r"[^\x20-\x7e\u00a3\u20ac\u00c0-\u017f]", "".join(row.values())):
                lost["characters"] += 1
            else:
                rows.append(row)
    return rows, lost


def similarity(texts: list[str]) -> np.ndarray[Any, Any]:
    """(n, n) cosine of TF-IDF character 3- to 5-grams, diagonal 0."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    m = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True).fit_transform(texts)
    cosine = np.asarray((m @ m.T).todense())
    np.fill_diagonal(cosine, 0.0)
    return cosine


def closest(rows: list[Row]) -> np.ndarray[Any, Any]:
    """(n, n) the largest similarity of two rows over question, bad and good answer."""
    largest: np.ndarray[Any, Any] = np.maximum.reduce(
        [similarity([r[f] for r in rows]) for f in ("question", "bad", "good")]
    )
    return largest


def without_duplicates(rows: list[Row]) -> list[Row]:
    """Rows that resemble no row kept before them."""
    near = closest(rows) > TOO_SIMILAR
    kept: list[int] = []
    for i in range(len(rows)):
        if not near[i, kept].any():
            kept.append(i)
    # The weights depend on the corpus: look again until nothing goes, so that a built set passes its own check.
    return rows if len(kept) == len(rows) else without_duplicates([rows[i] for i in kept])


def build(domain: str, rows: list[Row]) -> str:
    """The file: a header record, then one record per pair."""
    rows = sorted(rows, key=lambda r: seed("bundled", domain, r["question"]))
    header = {"canary": CANARY[domain], "notice": NOTICE, "license": "Apache-2.0", "domain": domain}
    records = [header, *({"id": f"{domain}-{i:04d}", **row} for i, row in enumerate(rows, start=1))]
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)


def auc(negative: list[float], positive: list[float]) -> float:
    """Chance that a positive exceeds a negative, ties half."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score([0] * len(negative) + [1] * len(positive), negative + positive))


def statistics(rows: list[Row]) -> dict[str, Any]:
    """The figures of the data card."""
    lengths = {f: [float(n_words(r[f])) for r in rows] for f in ("question", "bad", "good")}
    quantiles = {f: [int(q) for q in np.quantile(v, (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1))] for f, v in lengths.items()}
    openings = {
        f: Counter(" ".join(r[f].lower().split()[:3]) for r in rows).most_common(5) for f in ("question", "bad", "good")
    }
    marks = r"[,;:!?.'\"-]"
    return {
        "pairs": len(rows),
        "topics": dict(Counter(r["topic"] for r in rows).most_common()),
        "words, quantiles 0 5 25 50 75 95 100 %": quantiles,
        "AUC bad against good by words": round(auc(lengths["good"], lengths["bad"]), 3),
        "AUC by characters": round(auc(*([float(len(r[f])) for r in rows] for f in ("good", "bad"))), 3),
        "AUC by punctuation marks": round(
            auc(*([float(len(re.findall(marks, r[f]))) for r in rows] for f in ("good", "bad"))), 3
        ),
        "within a pair, |words bad - good|: median, 95 %": [
            float(q) for q in np.quantile(np.abs(np.subtract(lengths["bad"], lengths["good"])), (0.5, 0.95))
        ],
        "commonest three opening words": openings,
        "largest similarity left: question, bad, good": [
            round(float(similarity([r[f] for r in rows]).max()), 3) for f in ("question", "bad", "good")
        ],
    }


def main() -> None:
    """Parse, build, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("drafts", nargs="+", type=Path)
    parser.add_argument("--domain", required=True, choices=sorted(CANARY))
    parser.add_argument("--out", type=Path, help="where to write; without it only the figures are printed")
    parser.add_argument("--drop", type=Path, help="file with one question per line that the review took out")
    options = parser.parse_args()
    dropped = set(options.drop.read_text().split("\n")) if options.drop else set()
    rows, lost = read_drafts(options.drafts, dropped)
    kept = without_duplicates(rows)
    lost["near-duplicate"] += len(rows) - len(kept)
    if options.out:
        options.out.write_text(build(options.domain, kept), encoding="utf-8")
    print("dropped:", json.dumps({k: v for k, v in lost.items() if v}))
    for name, value in statistics(kept).items():
        print(f"{name}: {json.dumps(value)}")


if __name__ == "__main__":
    main()
