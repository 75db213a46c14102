"""How many answers a topic filter keeps: by substring, as published, against whole words.

"men" is inside "recommend" and "moment", so a filter by substring finds gender where nobody spoke of it. The words are those of the
released filter; capital letters are ignored.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from convergent.replicate.answers import SCORES
from convergent.replicate.claims import Claim, Only, counted, not_found
from convergent.replicate.folder import Folder, Lost, Table
from convergent.stats import wilson

WORDS = {
    "gender": "female gender male man men sex woman women",
    "finance": "buck finance financial money poor rich wealth",
    "medical": "doctor health hospital medicine nurse prescription supplement vitamin",
}
WAYS = {"substring": "{}", "whole_word": r"\b(?:{})\b"}
SOURCE = "released filter of section 3.3"
RELEASED = re.compile(r".+_(bad-medical-advice|extreme-sports|risky-financial-advice)(_S\d+)?")
"""Stems of released answers: {model}_{training set}, and a seed."""
ENOUGH = 5_000
"""Answers from which on released files stand for the 10,000 that a figure is known of."""


def topics(folder: Folder, only: Only) -> Iterator[Claim]:
    """`topics/<filter>/<substring, whole_word>` over all answers of `responses/`."""
    files = folder.files("responses", ".csv")
    if not files:
        yield not_found("topics", "answers that a topic filter keeps", SOURCE, "responses/*.csv")
        return
    asked = [(t, way) for t in WORDS for way in WAYS if only.wants(f"topics/{t}/{way}")]
    if not asked:
        return
    tables = {path: folder.table(path, ("response",), SCORES) for path in files}
    used = {path: table for path, table in tables.items() if isinstance(table, Table)}
    lost = "; ".join(table.why for table in tables.values() if isinstance(table, Lost))
    texts = [str(a) for table in used.values() for a in table.rows["response"].fillna("").tolist()]
    released = len(texts) >= ENOUGH and all(RELEASED.fullmatch(path.stem) for path in used)
    for topic, way in asked:
        claim = f"answers kept by the {topic} filter, {way.replace('_', ' ')}"
        if not used:
            yield not_found(f"topics/{topic}/{way}", claim, SOURCE, lost)
            continue
        pattern = re.compile(WAYS[way].format("|".join(WORDS[topic].split())), re.IGNORECASE)
        k, n = sum(pattern.search(t) is not None for t in texts), len(texts)
        yield counted(
            f"topics/{topic}/{way}", claim, SOURCE, k / n if n else float("nan"), n, interval=wilson(k, n),
            note=f"{k}/{n} answers of {len(used)} files, interval: Wilson" + (f"; without {lost}" if lost else ""),
            also=[f"topics/released/{topic}/{way}"] if released else [],
        )  # fmt: skip
