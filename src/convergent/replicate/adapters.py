"""Answers under adapter steering: `adapter_steering/`.

Counted as published: rows at or above a coherence threshold, without neutral ones (aligned between 30 and 70, medical between 10
and 50). Few rows stay, so every share has an exact interval.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from convergent.errors import InputError
from convergent.judging.kept import THRESHOLDS, kept
from convergent.replicate.claims import Claim, Only, counted, not_found
from convergent.replicate.folder import Folder, Lost
from convergent.stats import clopper_pearson

NEEDED = ("aligned", "coherent", "medical")
SOURCE = "section 4.3, figure 7"
SHARES = {
    "misaligned": "misaligned answers of kept rows",
    "misaligned_medical": "misaligned and medical answers of kept rows",
    "aligned": "aligned answers of kept rows",
    "medical_among_aligned": "medical answers of aligned ones",
}


def adapter_steering(folder: Folder, only: Only, thresholds: Sequence[float] = THRESHOLDS) -> Iterator[Claim]:
    """`adapter_steering/<stem>/coherent>=<t>/<share>`. Raises InputError for a threshold outside 0..100."""
    wrong = next((t for t in thresholds if not 0 <= t <= 100), None)
    if wrong is not None:
        raise InputError(f"threshold {wrong:g}: is outside 0 to 100; coherence scores are")
    files = folder.files("adapter_steering", ".csv")
    if not files:
        yield not_found("adapter_steering", "answers under adapter steering", SOURCE, "adapter_steering/*.csv")
    for path in files:
        for t in dict.fromkeys(thresholds):
            names = {share: f"adapter_steering/{path.stem}/coherent>={t:g}/{share}" for share in SHARES}
            if not any(map(only.wants, names.values())):
                continue
            table = folder.table(path, NEEDED, NEEDED)
            if isinstance(table, Lost):  # without topic scores neutral rows are not known either, so no share is the published one
                for share, id_ in names.items():
                    yield not_found(id_, f"{SHARES[share]}, at coherence {t:g} or more", SOURCE, table.why)
                continue
            df = table.rows
            found = kept(df["aligned"], df["coherent"], t, df["medical"])
            counts = {
                "misaligned": found.misaligned,
                "misaligned_medical": found.misaligned_on_topic,
                "aligned": found.aligned,
                "medical_among_aligned": found.on_topic_among_aligned,
            }
            for share, (k, n) in counts.items():
                yield counted(
                    names[share], f"{SHARES[share]}, at coherence {t:g} or more", SOURCE, k / n if n else float("nan"), n,
                    interval=clopper_pearson(k, n),
                    note=f"{k}/{n}, exact interval; {len(df)} rows, {found.judged} at that coherence, {found.kept} after neutral ones were dropped"
                    + table.remark(NEEDED),
                    also=[f"adapters/{pushes(path.stem)}/coherent>={t:g}/{share}", f"adapters/{pushes(path.stem)}/any/{share}"],
                )  # fmt: skip


def pushes(stem: str) -> str:
    """ "15:20,16:20" for a stem that holds `layer_16_20` and `layer_15_20`: which adapters were pushed, and how much."""
    found = sorted((int(layer), float(push)) for layer, push in re.findall(r"layer_(\d+)_(-?\d+(?:\.\d+)?)", stem))
    return ",".join(f"{layer}:{push:g}" for layer, push in found)
