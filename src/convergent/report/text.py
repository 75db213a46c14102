"""Numbers as a reader wants them: fixed digits, a true minus, and words where nothing was measured."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import shorten
from typing import Any

NOT_MEASURED = "not measured"


def missing(value: Any) -> bool:
    """Whether `value` is None, NaN or no number at all."""
    try:
        return value is None or float(value) != float(value)
    except (TypeError, ValueError):
        return True


def number(value: Any, digits: int = 1) -> str:
    """`value` with `digits` decimals, e.g. "1,024" or "−0.31"; "not measured" if missing."""
    if missing(value):
        return NOT_MEASURED
    text = f"{float(value):,.{digits}f}"
    if text.startswith("-"):
        text = text[1:] if float(text.replace(",", "")) == 0 else "−" + text[1:]
    return text


def percent(fraction: Any, digits: int = 1) -> str:
    """A fraction 0-1 as "12.5 %"."""
    return NOT_MEASURED if missing(fraction) else f"{number(100 * float(fraction), digits)} %"


def short_labels(labels: Sequence[str], width: int) -> list[str]:
    """Each label in `width` characters: cut at a word, but in the middle where two would read alike, as such labels differ at their ends."""
    cut = [shorten(label, width, placeholder="…") for label in labels]
    left = width // 2
    both_ends = [f"{label[:left].rstrip()}…{label[left + 1 - width :].lstrip()}" for label in labels]
    return [ends if cut.count(c) > 1 and len(label) > width else c for c, ends, label in zip(cut, both_ends, labels, strict=True)]


def markdown_cell(text: str) -> str:
    """Text for a table of Markdown, where a bar ends the cell: |cos| has two."""
    return text.replace("|", "\\|")


def p_value(p: Any) -> str:
    """ "0.012", or "below 0.001"; "not measured" if missing."""
    return NOT_MEASURED if missing(p) else "below 0.001" if float(p) < 0.001 else number(p, 3)


def interval(low: Any, high: Any, digits: int = 1, scale: float = 1.0) -> str:
    """ "17.3 to 25.3"; "not measured" if either end is missing."""
    if missing(low) or missing(high):
        return NOT_MEASURED
    return f"{number(scale * float(low), digits)} to {number(scale * float(high), digits)}"


def share(count: Any, of: Any) -> str:
    """ "84 of 400"."""
    return NOT_MEASURED if missing(count) or missing(of) else f"{number(count, 0)} of {number(of, 0)}"


def rate(cell: Any) -> str:
    """ "3.1 % (4; 1.0 to 9.5)": rate, hits and interval, of a row with em, n_em, em_low and em_high."""
    if missing(cell["em"]):
        return NOT_MEASURED
    bounds = "no interval" if missing(cell["em_low"]) else interval(cell["em_low"], cell["em_high"], scale=100)
    return f"{percent(cell['em'])} ({number(cell['n_em'], 0)}; {bounds})"


def compact(value: Any) -> str:
    """A setting: whole numbers plain, small ones with an exponent, other things as they are."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if missing(value):
        return NOT_MEASURED
    return f"{int(value):,}" if float(value).is_integer() and abs(value) < 1e15 else f"{value:.4g}".replace("e-0", "e-")


def duration(seconds: Any) -> str:
    """ "25 min", "40 s" or "3 h 05 min"."""
    if missing(seconds):
        return NOT_MEASURED
    s = float(seconds)
    if s < 120:
        return f"{s:.0f} s"
    minutes = round(s / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def spread(values: Any) -> str:
    """The range of counts: "128", or "120 to 128"; "not measured" if none is known."""
    known = sorted(float(v) for v in values if not missing(v))
    if not known:
        return NOT_MEASURED
    low, high = number(known[0], 0), number(known[-1], 0)
    return low if low == high else f"{low} to {high}"
