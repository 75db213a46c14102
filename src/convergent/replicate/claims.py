"""`Claim`: one figure, as published and as counted here, and whether they agree.

Values are fractions (0.21, not 21 %), cosines, norms or coefficients. A claim that could not be counted has `recomputed` None
and a note that begins with "not found" and says what is missing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

from convergent.replicate.published import Published, published
from convergent.stats import Interval

AGREES, DIFFERS, NOT_COMPARABLE = VERDICTS = ("agrees", "differs", "not comparable")
NOT_FOUND = "not found: "


@dataclass(frozen=True)
class Claim:
    """One row of the answer."""

    id: str
    claim: str
    source: str
    """Section or figure of the paper; for a figure that is printed nowhere, where else it is from."""
    published: float | None
    recomputed: float | None
    n: int
    """What the figure was counted over: answers, tokens, layers or dimensions; `claim` says which."""
    interval: tuple[float, float] | None
    """95 %, of the kind that `note` names."""
    verdict: str
    note: str

    @property
    def found(self) -> bool:
        return self.recomputed is not None

    def row(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self) | {"interval": None if self.interval is None else list(self.interval)}


def counted(
    id_: str,
    claim: str,
    source: str,
    recomputed: float,
    n: int,
    *,
    interval: Interval | None = None,
    note: str = "",
    also: Iterable[str] = (),
) -> Claim:
    """A claim that was counted, with its verdict. `also`: other names under which a published figure may be listed."""
    if math.isnan(recomputed):
        return not_found(id_, claim, source, f"anything to count; {note}" if note else "anything to count")
    value = float(recomputed)
    bounds = None if interval is None or not interval.defined else (interval.low, interval.high)
    known = published(id_, *also)
    if known is None:
        return Claim(id_, claim, source, None, value, n, bounds, NOT_COMPARABLE, note)
    verdict, why = compare(known, value, bounds)
    return Claim(id_, known.claim or claim, known.source, known.value, value, n, bounds, verdict, "; ".join(t for t in (why, known.note, note) if t))


def not_found(id_: str, claim: str, source: str, what: str) -> Claim:
    """A claim that could not be counted: `what` is missing."""
    known = published(id_)
    value, place = (known.value, known.source) if known else (None, source)
    return Claim(id_, claim, place, value, None, 0, None, NOT_COMPARABLE, NOT_FOUND + what)


def compare(known: Published, value: float, bounds: tuple[float, float] | None) -> tuple[str, str]:
    """Verdict and reason. Compared by `known.by`:

    figure: the figure must follow from these very data, so |value - published| is at most the tolerance (half of the last
        printed digit, or the spread of random splits), or the inequality that was published holds.
    sample: the published figure came from other answers of the same model, so it has to lie in the interval.
    """
    far = abs(value - known.value)
    inside = bounds is not None and bounds[0] <= known.value <= bounds[1]
    if known.relation != "=":
        holds = value > known.value if known.relation == ">" else value < known.value
        return (AGREES if holds else DIFFERS), f"published as {known.relation} {known.value:g}"
    if far <= known.tolerance + 1e-9:
        return AGREES, "" if known.by == "figure" else "the published figure itself"
    if known.by == "sample" and inside:
        return AGREES, "another sample: the published figure lies within the interval"
    return DIFFERS, f"off by {far:.3g}" + (", within the interval" if inside else ", outside the interval" if bounds else "")


class Only:
    """Which ids are asked for. Asked before anything is computed."""

    def __init__(self, pattern: str | None = None) -> None:
        self.pattern = pattern or "*"
        cut = [self.pattern.index(c) for c in "*?[" if c in self.pattern]
        self._head = self.pattern[: min(cut)] if cut else self.pattern

    def wants(self, id_: str) -> bool:
        """Whether this id is asked for."""
        return fnmatchcase(id_, self.pattern)

    def may_want(self, start: str) -> bool:
        """Whether an id that begins with `start` could be; says yes where it cannot be known."""
        return self._head.startswith(start) or start.startswith(self._head)
