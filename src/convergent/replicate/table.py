"""The answer as text: one table per family, the details per layer folded away, then what was not found."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from convergent.replicate.claims import NOT_FOUND, VERDICTS, Claim
from convergent.replicate.registry import FAMILIES

WIDE = 160
"""Columns of a terminal that is none, such as a pipe."""
NOTE = 90
"""Characters of a note in the short table; --json, --only and the page show all of it."""
PER_LAYER = re.compile(r"(cosine|norm)/.+/L\d+(/activation)?")


def title_of(claim: Claim) -> str:
    """The heading of the claim's family."""
    return next((f.title for f in FAMILIES if claim.id.split("/")[0] == f.prefix), "Claims that need a model")


def folded(claims: Sequence[Claim]) -> list[Claim]:
    """Without rows per layer for which nothing was published."""
    return [c for c in claims if c.published is not None or not PER_LAYER.fullmatch(c.id)]


def print_claims(claims: Sequence[Claim], whole: bool = False) -> None:
    """Print all claims, or all but the rows per layer, unless `whole`."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, WIDE)
    found, lost = [c for c in claims if c.found], [c for c in claims if not c.found]
    shown = found if whole else folded(found)
    for title in dict.fromkeys(map(title_of, shown)):
        table = Table(title=title, title_justify="left", title_style="bold", show_edge=False, pad_edge=False)
        table.add_column("id", overflow="fold", ratio=5)
        for name in ("published", "recomputed", "n", "95 %"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("verdict", no_wrap=True)
        table.add_column("note", overflow="fold", ratio=5)
        for c in shown:
            if title_of(c) == title:
                # Text, not markup: ids and notes hold names from files.
                row = cells(c)
                row[-1] = row[-1] if whole or len(row[-1]) <= NOTE else row[-1][: NOTE - 1] + "…"
                table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
        console.print(table)
        console.print()
    if len(shown) < len(found):
        console.print(Text(f"{len(found) - len(shown)} more rows per layer: --json, --out, or --only with their ids.\n", style="dim"))
    if lost:
        console.print(Text("Not found", style="bold"))
        for c in lost:
            value = "" if c.published is None else f" (published: {figure(c.published)}, {c.source})"
            console.print(Text(f"  {c.id}: {c.note.removeprefix(NOT_FOUND)}{value}"))
        console.print()
    console.print(Text(summary(claims)))


def summary(claims: Sequence[Claim]) -> str:
    """ "31 of 40 published figures compared: 28 agree, 3 differ; ..." """
    verdicts = Counter(c.verdict for c in claims if c.found)
    without = sum(not c.found for c in claims)
    agree, differ, other = (verdicts[v] for v in VERDICTS)
    return f"{agree + differ} published figures compared: {agree} agree, {differ} differ; {other} more rows counted, {without} not found."


_STYLES = {VERDICTS[0]: "green", VERDICTS[1]: "red"}


def cells(c: Claim) -> list[str]:
    """id, published, recomputed, n, interval, verdict, note."""
    interval = "-" if c.interval is None else f"{c.interval[0]:.3f} to {c.interval[1]:.3f}"
    return [c.id, figure(c.published), figure(c.recomputed), f"{c.n:,}", interval, c.verdict, c.note]


def figure(value: float | None) -> str:
    """Four digits, or three decimals for small ones; "-" for none."""
    if value is None:
        return "-"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.1f}"
