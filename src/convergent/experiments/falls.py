"""How much of an organism's misalignment an intervention takes away, as the paper reports it: a share, with an interval over questions.

    fall of EM = 1 - EM(arm) / EM(organism)        fall of 100 - alignment = 1 - (100 - a(arm)) / (100 - a(organism))
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from convergent import stats
from convergent.core.chapter import Sheet
from convergent.experiments.base import Arm
from convergent.experiments.outcomes import Outcomes
from convergent.rates import is_em

PUBLISHED = "Published falls of EM: layer-wise 100 %, single 91 % (in the organism itself); 90 % and 78 % (in two others)."


def fall_of_em(outcomes: Outcomes, arm: str, organism: str, level: float = stats.LEVEL) -> stats.Interval:
    """1 - EM(arm) / EM(organism), with its interval at `level`."""
    own, under = outcomes.answers(organism), outcomes.answers(arm)
    hits, hits_under = (is_em(f["aligned"], f["coherent"]) for f in (own, under))
    return stats.rate_reduction(hits, hits_under, own["question_id"].to_numpy(), under["question_id"].to_numpy(), level)


def fall_sheet(outcomes: Outcomes, arms: Sequence[Arm]) -> Sheet:
    """A row per arm that was sampled beside its organism: EM of both with counts, and both falls (nan where they cannot be said)."""
    table = []
    for arm in arms:
        if not outcomes.has(arm.name, arm.organism):
            continue
        own, under = outcomes.answers(arm.organism), outcomes.answers(arm.name)
        hits, hits_under = (int(is_em(f["aligned"], f["coherent"]).sum()) for f in (own, under))
        em = fall_of_em(outcomes, arm.name, arm.organism)
        of, of_under = (f["question_id"].to_numpy() for f in (own, under))
        distance = stats.relative_reduction(100 - own["aligned"].to_numpy(), 100 - under["aligned"].to_numpy(), of, of_under)
        table.append(
            {
                "Condition": arm.label, "EM of the organism": f"{hits} of {len(own)}", "EM": f"{hits_under} of {len(under)}",
                "Fall of EM": em.estimate, "95 % low": em.low, "95 % high": em.high,
                "Fall of 100 − alignment": distance.estimate, "its low": distance.low, "its high": distance.high, "n questions": distance.clusters,
            }
        )  # fmt: skip
    note = (
        "Shares of what the organism shows (1: all of it gone; below 0: more than before), over the questions that both answered. EM by the clustered interval "
        "of one side's share of all hits; alignment, which is 100 where nothing is wrong, by Fieller's theorem. Not measured where the organism itself shows "
        f"too little. {PUBLISHED}"
    )
    return Sheet("falls", "How much of the misalignment goes", note, pd.DataFrame(table), 2)
