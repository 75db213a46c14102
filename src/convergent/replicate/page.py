"""The answer as one HTML page, in the style of the report: no script, nothing fetched, names from files only as text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from convergent.errors import StoreError
from convergent.replicate.claims import NOT_FOUND, VERDICTS, Claim
from convergent.replicate.hidden import CHAT
from convergent.replicate.table import cells, figure, folded, summary, title_of

HERE = Path(__file__).parent
REPORT = HERE.parent / "report"
LOOK = dict(zip(VERDICTS, ("held", "did-not-hold", "undecided"), strict=True))
"""Verdict -> class of the report's style sheet."""
MARK = dict(zip(VERDICTS, ("✓", "✕", "–"), strict=True))
DRAWN = 6
"""Pairs of directions in the figure; its colours and dashes tell six apart."""


def check_page(path: Path) -> None:
    """Raise StoreError before long work if the page could not be written to `path`."""
    if path.is_dir():
        raise StoreError(f"{path}: is a folder; name a file such as {path / 'replicate.html'}")
    if path.suffix.lower() not in (".html", ".htm"):
        raise StoreError(f"{path}: ends in {path.suffix or 'nothing'}; the page is HTML, give a name that ends in .html")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"{path}: cannot make its folder ({error.strerror}); choose another place") from error


def write_page(claims: Sequence[Claim], path: Path, command: str = "") -> None:
    """Write the page whole or not at all. Raises StoreError."""
    check_page(path)
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(render(claims, command), encoding="utf-8", errors="replace", newline="\n")
        part.replace(path)
    except OSError as error:
        raise StoreError(f"{path}: cannot be written ({error.strerror or error}); free space or name another folder") from error
    finally:
        part.unlink(missing_ok=True)


def render(claims: Sequence[Claim], command: str = "") -> str:
    """The page as text."""
    env = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    env.filters["figure"] = figure
    found, short = [c for c in claims if c.found], set(folded(claims))
    titles = list(dict.fromkeys(map(title_of, found)))
    families = [
        {
            "id": title.lower().replace(" ", "-"),
            "title": title,
            "rows": [(c, cells(c)) for c in found if title_of(c) == title and c in short],
            "folded": [(c, cells(c)) for c in found if title_of(c) == title and c not in short],
        }
        for title in titles
    ]
    return env.get_template("page.html.j2").render(
        style=Markup((REPORT / "style.css").read_text("utf-8")),
        summary=summary(claims),
        compared=[c for c in found if c.published is not None],
        families=families,
        lost=[(c, c.note.removeprefix(NOT_FOUND)) for c in claims if not c.found],
        drawing=_drawing(found),
        look=LOOK,
        mark=MARK,
        command=command,
    )


def _drawing(found: Sequence[Claim]) -> dict[str, object] | None:
    """Cosines per layer of pairs of organisms, each with the chat model's on the same texts dashed beside it."""
    from convergent.report.drawing import Legend
    from convergent.report.lines import Line, Plot, css_dash, line_figure
    from convergent.report.svg import DASHES, SERIES, css

    pairs: dict[tuple[str, str], dict[int, float]] = {}
    for c in found:
        parts = c.id.split("/")
        if len(parts) == 4 and parts[0] == "cosine" and parts[3][1:].isdigit() and c.recomputed is not None:
            pairs.setdefault((parts[1], parts[2]), {})[int(parts[3][1:])] = c.recomputed
    organisms = [p for p in pairs if CHAT not in p[0] + p[1]][:DRAWN]
    lines, legend, rows = [], [], []
    for k, (a, b) in enumerate(organisms):
        colour = SERIES[k]
        for pair, dash, name in (((a, b), "solid", f"{a}, {b}"), ((a + CHAT, b + CHAT), DASHES[1], "chat model on the same texts")):
            if pair in pairs:
                layers = sorted(pairs[pair])
                lines.append(Line(np.array(layers), np.array([pairs[pair][n] for n in layers]), colour, dash=dash))
                legend.append(Legend(name, css(colour), dash=css_dash(dash)))
                values = list(pairs[pair].values())
                rows.append((f"{a}, {b}", name if CHAT in pair[0] else "organisms", f"{min(values):.3f}", f"{max(values):.3f}"))
    if not lines:
        return None
    drawn = line_figure(
        "fig-cosines", "Cosines of directions by layer", "", "Cosine per layer of each pair of directions, and of the same pair read by the chat model.",
        [Plot("Cosine", "layer", tuple(lines))], 1, legend, ("Pair", "Read by", "Smallest", "Largest"), tuple(rows),
    )  # fmt: skip
    return {"wide": Markup(drawn.wide), "narrow": Markup(drawn.narrow), "legend": legend, "header": drawn.header, "rows": rows}
