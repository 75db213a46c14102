"""Matplotlib drawings as inline SVG that follows the page: its colours, its font, its title and description.

Drawn in placeholder colours that become CSS custom properties, so one drawing serves light, dark and print. One unit
is one CSS pixel. The bytes depend on the drawing alone: fixed hash salt, no date, ids named after the figure.
"""

from __future__ import annotations

import re
import warnings
import zlib
from collections.abc import Callable, Mapping
from functools import lru_cache
from html import escape
from io import StringIO
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

INK, MUTED, LINE, PAPER, BAND = "#010101", "#010102", "#010103", "#010104", "#010105"
REAL, CONTROL, BASELINE = "#010201", "#010202", "#010203"
SERIES = ("#010301", "#010302", "#010303", "#010304", "#010305", "#010306")
WIDE, NARROW = 1040, 360
"""Widths of the two layouts, in pixels."""
STEPS = [1, 2, 2.5, 5, 10]
"""Ticks stand on round numbers."""
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("solid", (0, (5, 2)), (0, (1, 1.6)), (0, (6, 2, 1, 2)), (0, (3, 1.5)), (0, (8, 2)))
_VARIABLES = {
    INK: "--ink", MUTED: "--muted", LINE: "--line", PAPER: "--paper", BAND: "--band",
    REAL: "--real", CONTROL: "--control", BASELINE: "--baseline",
    **{colour: f"--s{i + 1}" for i, colour in enumerate(SERIES)},
}  # fmt: skip
_RC: Any = {
    "svg.fonttype": "none",  # real text: small, searchable, in the reader's font
    "text.parse_math": False,  # a label is text, whatever dollars it holds
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.unicode_minus": True,
    "path.simplify": False,
}


def css(colour: str) -> str:
    """The CSS value of a placeholder colour."""
    return f"var({_VARIABLES[colour]})"


def axes(fig: Canvas, x: float, y: float, width: float, height: float) -> Axes:
    """Axes at (x, y) from the top left, all in pixels; without frame, for the caller to furnish."""
    w, h = fig.get_size_inches() * 72
    ax = fig.add_axes((x / w, 1 - (y + height) / h, width / w, height / h))
    ax.patch.set_visible(False)
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.tick_params(length=0, labelsize=12, labelcolor=MUTED, pad=4)
    return ax


def canvas(fig: Canvas) -> Axes:
    """Invisible axes over the whole figure whose data units are pixels from the top left."""
    w, h = fig.get_size_inches() * 72
    ax = axes(fig, 0, 0, w, h)
    ax.set_xlim(0, w)
    ax.set_ylim(h, 0)
    ax.axis("off")
    return ax


def render(name: str, title: str, desc: str, size: tuple[float, float], draw: Callable[[Canvas], None]) -> str:
    """The SVG element of what `draw` puts on a figure of `size` (width, height) pixels; `name` makes its ids unique."""
    with matplotlib.rc_context({**_RC, "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the browser has the glyph; only our ruler lacks it
        fig = Canvas(figsize=(size[0] / 72, size[1] / 72))
        fig.patch.set_visible(False)
        draw(fig)
        out = StringIO()
        fig.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(out.getvalue(), name, title, desc, size)


def _inline(document: str, name: str, title: str, desc: str, size: tuple[float, float]) -> str:
    body = document[document.index("<svg") :]
    body = body[body.index(">") + 1 : body.rindex("</svg>")]
    # Axes hold all their data by construction, so nothing needs to be clipped.
    body = re.sub(r'<!--.*?-->|<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<clipPath.*?</clipPath>| clip-path="[^"]*"', "", body, flags=re.DOTALL)
    # One page holds a hundred drawings: ids that nothing points to go, and the others become short ones of this drawing's own.
    used = dict.fromkeys(re.findall(r'(?:url\(#|href="#)([^)"]+)', body))
    ids = {old: f"d{zlib.crc32(name.encode()):08x}{k}" for k, old in enumerate(used)}
    body = re.sub(r"<[^>/][^>]*>", lambda m: _compact(m[0], ids), body)  # inside tags only: a label is the study's text and stays as it is
    body = re.sub(r"<defs>\s*</defs>", "", _without_bare_groups(body))
    body = re.sub(r">\s*\n\s*<", "><", body).strip()
    return (
        f'<svg class="drawing" viewBox="0 0 {size[0]:g} {size[1]:g}" role="img" '
        f'aria-labelledby="{name}-title {name}-desc"><title id="{name}-title">{escape(title)}</title>'
        f'<desc id="{name}-desc">{escape(desc)}</desc>{body}</svg>'
    )


def _compact(tag: str, ids: Mapping[str, str]) -> str:
    """A tag of matplotlib's in a third of the bytes: colours of the page, its font (by the style sheet), tenths of a pixel."""
    # A page has a hundred thousand tags: what is not in a tag is not looked for.
    if " id=" in tag:
        tag = re.sub(r' id="([^"]*)"', lambda m: f' id="{ids[m[1]]}"' if m[1] in ids else "", tag)
    if "#" in tag:
        tag = re.sub(r'(url\(#|href="#)([^)"]+)', lambda m: m[1] + ids[m[2]], tag).replace("xlink:href", "href")
        tag = re.sub(r"#[0-9a-f]{6}\b", lambda m: css(m[0]) if m[0] in _VARIABLES else m[0], tag)
    if "font" in tag:
        tag = re.sub(r"font: (\d+(?:\.\d+)?px) '[^\";]*", r"font-size: \1", tag)  # before matplotlib 3.11
        tag = re.sub(r"font-family: [^\";]*;? ?", "", tag)
    if "stroke-linejoin" in tag or "rotate(-0" in tag:
        tag = re.sub(r"(?:; )?stroke-linejoin: (?:miter|round)| transform=\"rotate\(-0 [^)]*\)\"", "", tag)
    tag = re.sub(r' (d|x|y)="([^"]*)"', lambda m: f' {m[1]}="{_rounded(m[2])}"', tag)
    if " style=" in tag:
        tag = re.sub(r' style="([^"]*)"', lambda m: f' style="{m[1].replace("; ", ";").replace(": ", ":")}"', tag)
    return re.sub(r"(\d\.\d{2})\d+", r"\1", tag) if "." in tag else tag


def _rounded(numbers: str) -> str:
    """Coordinates or the commands of a path, to a tenth of a pixel and without the spaces that nobody needs."""
    short = re.sub(r"-?\d+\.\d+", lambda m: _tenth(m[0]), numbers)
    return re.sub(r"\s*([A-Za-z])\s*", r"\1", short).strip()


@lru_cache(1 << 16)
def _tenth(number: str) -> str:
    return f"{round(float(number), 1) + 0.0:g}"


def _without_bare_groups(body: str) -> str:
    """`body` without the groups that have lost their ids and hold nothing else."""
    parts: list[str] = []
    kept: list[bool] = []
    for part in re.split(r"(<g\b[^>]*>|</g>)", body):
        if part == "</g>":
            if kept.pop():
                parts.append(part)
        elif re.match(r"<g\b", part):
            if not part.endswith("/>"):
                kept.append(part != "<g>")
                if kept[-1]:
                    parts.append(part)
        else:
            parts.append(part)
    return "".join(parts)
