"""The paper's claims beside this study's: published, recomputed from released data, live here, with controls.

What is published and recomputed stands in `paper_claims.yaml`; what is live comes from the study's claims, by `Claim.paper`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml

from convergent.report import text
from convergent.report.results import Results

NOT_HERE = "not in this study"


@dataclass(frozen=True)
class Recount:
    """A figure counted again in the released data."""

    of: str
    """Id of the row of `convergent replicate`."""
    what: str
    value: str
    interval: str
    """ "17.3 to 25.3"; empty where there is none."""
    n: int
    verdict: str
    """agrees or differs: with the published figure, or one known from the released data."""


@dataclass(frozen=True)
class PaperClaim:
    """One claim of the paper."""

    id: str
    claim: str
    section: str
    published: str
    recomputed: tuple[Recount, ...]
    nothing: str
    """Why nothing is recomputed."""


@dataclass(frozen=True)
class Row:
    """A claim of the paper and what this study says of it."""

    paper: PaperClaim
    live: tuple[Mapping[str, Any], ...]
    """The study's claims: `anchor` on the page, `claim`, `verdict`, `first` (its first comparison), `n` comparisons, `votes` (verdict -> how many); verdict and
    votes are on the paper's claim, so turned round where the study tests its opposite (`opposes`)."""
    verdict: str
    """Over every comparison with every control: held, did not hold, undecided; or not in this study."""


@cache
def paper_claims() -> tuple[PaperClaim, ...]:
    """Every claim, in the order of the page."""
    rows = yaml.safe_load(resources.files("convergent.report").joinpath("paper_claims.yaml").read_text("utf-8"))
    return tuple(
        PaperClaim(r["id"], r["claim"], r["section"], r["published"], tuple(map(_recount, r.get("recomputed", ()))), r.get("nothing", "")) for r in rows
    )


def _recount(row: Mapping[str, Any]) -> Recount:
    percent = row.get("as") == "percent"
    bounds = ""
    if "low" in row:
        bounds = text.interval(row["low"], row["high"], scale=100) if percent else text.interval(row["low"], row["high"], 3)
    value = text.percent(row["figure"]) if percent else text.number(row["figure"], 3)
    return Recount(row["of"], row["what"], value, bounds, row["n"], row["verdict"])


def paper_rows(results: Results) -> list[Row]:
    """A row per claim of the paper; the study's claims in their own order."""
    live: dict[str, list[Mapping[str, Any]]] = {}
    for k, claim in enumerate(results.claims):
        evidence = [e for e in claim.get("evidence") or [] if e.get("decides", True)]
        opposes = bool(claim.get("opposes"))
        said = [_turned(str(e.get("supports")), opposes) for e in evidence]
        shown = {
            "anchor": anchor(k), "claim": claim.get("claim", ""), "opposes": opposes, "verdict": _turned(str(claim.get("verdict", "")), opposes),
            "first": evidence[0] if evidence else None, "n": len(evidence), "votes": {v: said.count(v) for v in ("held", "did not hold", "undecided")},
        }  # fmt: skip
        live.setdefault(str(claim.get("paper") or ""), []).append(shown)
    return [Row(p, tuple(mine), _overall([c["verdict"] for c in mine])) for p in paper_claims() for mine in [live.get(p.id, [])]]


def _turned(verdict: str, opposes: bool) -> str:
    """A verdict on a statement as one on its opposite."""
    return {"held": "did not hold", "did not hold": "held"}.get(verdict, verdict) if opposes else verdict


def anchor(k: int) -> str:
    """Id of the k-th claim's card on the page."""
    return f"claim-{k + 1}"


def _overall(verdicts: Sequence[str]) -> str:
    """As `Claim.verdict` joins comparisons: all held, or one against, or open."""
    if not verdicts:
        return NOT_HERE
    if "did not hold" in verdicts:
        return "did not hold"
    return "held" if set(verdicts) == {"held"} else "undecided"
