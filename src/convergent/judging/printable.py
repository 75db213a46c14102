"""Text of models on a terminal: whatever could move the cursor, colour the screen or turn the writing round is taken out."""

from __future__ import annotations

import re
import unicodedata

_JOINERS = frozenset("\u200c\u200d")
"""Invisible, and needed by scripts and emoji."""
_BREAKS = re.compile(r"\r\n|[\r\n\v\f\x1c-\x1e\x85\u2028\u2029]")


def printable(text: object, lines: bool = False) -> str:
    """`text` without control and formatting characters; a tab is four spaces, a lone surrogate a replacement sign.

    `lines`: line breaks of every kind stay, as newlines; else they become single spaces. An escape sequence loses its ESC (or its 8-bit CSI), so
    that the rest of it stands there as plain characters.
    """
    parts = (_visible(part) for part in _BREAKS.split(str(text)))
    return ("\n" if lines else " ").join(parts)


def short(text: object, width: int) -> str:
    """`text` printable, in one line of at most `width` characters."""
    line = " ".join(printable(text).split())
    return line if len(line) <= width else line[: max(0, width - 1)].rstrip() + "…"


def _visible(text: str) -> str:
    return "".join(_sign(c) for c in text)


def _sign(char: str) -> str:
    if char == "\t":
        return "    "
    kind = unicodedata.category(char)
    if kind == "Cs":
        return "\ufffd"
    return "" if kind in ("Cc", "Cf") and char not in _JOINERS else char
