"""Adapters knocked out of an organism, one by one and two by two: what each is worth to the margin, and to the organism's predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any

import numpy as np

from convergent import stats
from convergent.core.values import Pair
from convergent.directions.margin import margins
from convergent.directions.scalars import labels
from convergent.interventions.controls import Effects
from convergent.models.load import ChatModel
from convergent.models.texts import Text
from convergent.organisms.adapters import Adapter


def knockouts(organism: ChatModel, adapters: Sequence[Adapter], pairs: Sequence[Pair], texts: Sequence[Text], two_by_two: bool) -> dict[str, Any]:
    """Margin on held-out `pairs` and KL to the organism over `texts` without each adapter, each two, and all; JSON-ready.

    Every change is paired by held-out pair, with a t interval over pairs. `interaction`: both together minus the sum of each alone. `left`: margin
    without the strongest adapter minus the middle between the organism's and that without any.
    """
    n = len(adapters)
    which: list[tuple[int, ...]] = [(), *((k,) for k in range(n)), *(combinations(range(n), 2) if two_by_two else ()), tuple(range(n))]
    which = list(dict.fromkeys(which))
    conditions = [tuple(adapters[k].low_rank(-1) for k in knocked) for knocked in which]
    found = np.full((len(which), len(pairs)), np.nan)
    for i, m in enumerate(margins(organism, pairs, conditions)):
        found[m.condition, i % len(pairs)] = m.margin
    effects = Effects(organism, texts)
    kls = [0.0, *(effects.kl(c) for c in conditions[1:])]
    row_of = dict(zip(which, found, strict=True))

    def interval(d: np.ndarray) -> dict[str, Any]:
        return asdict(stats.clustered_mean(d, [p.id for p in pairs]))

    rows: list[dict[str, Any]] = []
    for knocked, kl in list(zip(which, kls, strict=True))[1:]:
        rows.append({"adapters": list(knocked), "margin": float(row_of[knocked].mean()), "kl": kl, "change": interval(row_of[knocked] - row_of[()])})
        if len(knocked) == 2 and n > 2:
            a, b = (row_of[k,] for k in knocked)
            rows[-1]["interaction"] = interval(row_of[knocked] - a - b + row_of[()])
    none, everything = row_of[()], row_of[tuple(range(n))]
    strongest = min(range(n), key=lambda k: float(row_of[k,].mean()))
    return {
        "adapters": list(labels(adapters)), "layers": [a.layer for a in adapters], "margin": float(none.mean()),
        "margin_without_any": float(everything.mean()), "rows": rows, "strongest": strongest,
        "left": interval(row_of[strongest,] - (none + everything) / 2), "pairs": len(pairs), "effect_texts": len(texts),
    }  # fmt: skip
