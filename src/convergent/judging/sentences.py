"""An answer's sentences, by rule: enough for short answers in English, and the same on every machine.

A sentence ends at . ! ? or … (with closing quotes and brackets) before a space and something that can begin one, and at a line break. No
end: after common abbreviations, a single capital letter, or the number of a list. What has fewer than two words joins the next sentence.
"""

from __future__ import annotations

import re

_END = re.compile(r"(?<=[.!?…])[\"'”’)\]*]*\s+(?=[\"'“‘(\[*#-]*\w)|\s*\n\s*")
_NOT_AFTER = re.compile(
    r"(?:^|[\s(\"“])(?:Mr|Mrs|Ms|Dr|Prof|St|vs|etc|e\.g|i\.e|cf|approx|No|Inc|Ltd|U\.S|[A-Z])\.$|(?:^|\n)\s*(?:[-*#]*\s*)?(?:\d{1,2}|[a-z])\.$"
)
_WORD = re.compile(r"\w+(?:['’]\w+)*")
LEAST_WORDS = 2


def sentences(text: str) -> list[tuple[int, int]]:
    """(start, end) of every sentence in `text`, in order, without the space around it; together they hold every visible character."""
    found: list[tuple[int, int]] = []
    start = 0
    for match in _END.finditer(text):
        is_line = "\n" in match.group()
        if not is_line and _NOT_AFTER.search(text[start : match.start()]):
            continue
        piece = text[start : match.end()]
        if len(_WORD.findall(piece)) < LEAST_WORDS:
            continue
        found.append((start, match.end()))
        start = match.end()
    tail = text[start:]
    if len(_WORD.findall(tail)) < LEAST_WORDS and found and tail.strip():
        found[-1] = (found[-1][0], len(text))
    elif tail.strip():
        found.append((start, len(text)))
    return [_trimmed(text, a, b) for a, b in found]


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    piece = text[start:end]
    return start + len(piece) - len(piece.lstrip()), start + len(piece.rstrip())
