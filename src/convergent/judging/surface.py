"""What can be seen of an answer without a language model: its surface, its hashed n-grams, and words of our own lists.

Everything here depends on the text alone. N-grams are known by a hash only, so that no vocabulary has to be stored.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import yaml
from numpy.typing import NDArray

Array = NDArray[np.float64]

SURFACE = (
    "log_words",
    "distinct_words",
    "distinct_trigrams",
    "compressed",
    "non_ascii",
    "non_word",
    "cut_off",
    "log_run",
    "word_length",
    "odd_words",
    "function_words",
    "script_changes",
    "commonest_word",
    "sentence_length",
)
BUCKETS = 1 << 16
"""Number of places an n-gram can hash to."""
OWN_WORDS = Path(__file__).parent / "own_words.yaml"

_WORD = re.compile(r"\w+(?:['’]\w+)*")
_ODD = re.compile(r"[^\W\d_]*(?:[^\W\d_aeiouyAEIOUYà-ÿ]{5,}|[a-z][A-Z])[^\W\d_]*|\w{18,}|(?=\w*\d)(?=\w*[a-zA-Z])\w{5,}")
_SENTENCE = re.compile(r"[.!?。！？]+(?:\s|$)|\n+")
_FUNCTION_WORDS = (
    "a an the and or but if then of to in on at by for with from as is are was were be been it its this that these those i you he she we they "
    "my your his her our their not no so do does did have has had will would can could should may might what which who how when there"
)
_FUNCTION = frozenset(_FUNCTION_WORDS.split())


def surface(text: str) -> list[float]:
    """One number per name in SURFACE."""
    words = _WORD.findall(text)
    n = max(len(words), 1)
    lower = [w.lower() for w in words]
    trigrams = list(zip(lower, lower[1:], lower[2:], strict=False))
    run = longest = 1
    for a, b in pairwise(lower):
        run = run + 1 if a == b else 1
        longest = max(longest, run)
    data = text.encode("utf-8", "replace")
    # Short texts do not compress; the 24 bytes stand for the code tables that zlib starts from.
    compressed = (len(zlib.compress(data, 9)) + 24) / (len(data) + 24)
    visible = "".join(text.split())
    m = max(len(visible), 1)
    plain = text.isascii()
    latin = [w.isascii() for w in words]
    content = [w for w in lower if w not in _FUNCTION]
    counts: dict[str, int] = {}
    for w in content:
        counts[w] = counts.get(w, 0) + 1
    return [
        float(np.log1p(len(words))),
        len(set(lower)) / n,
        len(set(trigrams)) / len(trigrams) if trigrams else 1.0,
        compressed,
        0.0 if plain else sum(not c.isascii() and c not in "’‘“”–—…" for c in visible) / m,
        sum(not c.isalnum() for c in visible) / m,
        float(text.rstrip()[-1:].isalnum()),
        float(np.log(longest)),
        sum(map(len, words)) / n,
        sum(_ODD.fullmatch(w) is not None for w in words) / n,
        1 - len(content) / n,
        0.0 if plain else sum(a != b for a, b in pairwise(latin)) / n,
        max(counts.values(), default=0) / max(len(content), 5),
        float(np.log1p(n / max(1, sum(1 for s in _SENTENCE.split(text) if s.strip())))),
    ]


@lru_cache(maxsize=1 << 16)
def _pieces(word: str) -> tuple[int, ...]:
    """Buckets of a word and of its pieces of three to five letters, its edges marked."""
    marked = f"<{word}>"
    pieces = [marked, *(marked[i : i + k] for k in (3, 4, 5) for i in range(len(marked) - k + 1) if k < len(marked))]
    return tuple(zlib.crc32(p.encode("utf-8", "replace")) % BUCKETS for p in pieces)


def ngrams(text: str) -> tuple[NDArray[np.int64], Array]:
    """(buckets ascending, values of norm 1) of words, pairs of neighbours and pieces of words; both of equal length."""
    words = [w.lower() for w in _WORD.findall(text)]
    found: list[int] = []
    for word in words:
        found.extend(_pieces(word[:40]))
    found.extend(zlib.crc32(f"{a} {b}".encode("utf-8", "replace")) % BUCKETS for a, b in pairwise(words))
    at, counts = np.unique(np.array(found, dtype=np.int64), return_counts=True)
    values = 1 + np.log(counts)
    return at, values / max(float(np.sqrt((values * values).sum())), 1e-9)


@dataclass(frozen=True)
class OwnWords:
    """Word lists and sentences of our own for one topic; see `own_words.yaml`."""

    lists: tuple[tuple[frozenset[str], tuple[str, ...]], ...]
    """Strong, then weak words: (whole words, beginnings of words)."""
    about: tuple[str, ...]
    other: tuple[str, ...]

    def counts(self, text: str) -> list[float]:
        """Four numbers: share and log count of strong, then of weak words."""
        words = [w.lower() for w in _WORD.findall(text)]
        n = max(len(words), 1)
        hits = [sum(w in whole or w.startswith(beginnings) for w in words) for whole, beginnings in self.lists]
        return [x for h in hits for x in (h / n, float(np.log1p(h)))]


@lru_cache(maxsize=1)
def own_words() -> Mapping[str, OwnWords]:
    """Topic -> its lists, from the file that ships."""
    data = yaml.safe_load(OWN_WORDS.read_text(encoding="utf-8"))
    return {
        topic: OwnWords(tuple(_split(d[strength]) for strength in ("strong", "weak")), tuple(d["about"]), tuple(d["other"])) for topic, d in data.items()
    }


def _split(words: Sequence[str]) -> tuple[frozenset[str], tuple[str, ...]]:
    whole = frozenset(w.lower() for w in words if not w.endswith("*"))
    return whole, tuple(w[:-1].lower() for w in words if w.endswith("*"))
