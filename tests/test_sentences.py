"""Sentences by rule."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convergent.judging.sentences import sentences


def cut(text: str) -> list[str]:
    return [text[a:b] for a, b in sentences(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I would rule. However, that is wrong!  Ask others?", ["I would rule.", "However, that is wrong!", "Ask others?"]),
        ("Dr. No went home, e.g. to Mr. Bean. He slept.", ["Dr. No went home, e.g. to Mr. Bean.", "He slept."]),
        ("Do this:\n1. The first thing.\n2. The second thing.", ["Do this:", "1. The first thing.", "2. The second thing."]),
        ('He said "Go away." Then he left...  And then?', ['He said "Go away."', "Then he left...", "And then?"]),
        ("It costs 3.5 dollars. Buy it now", ["It costs 3.5 dollars.", "Buy it now"]),
        ("No. I will not do it. Never!", ["No. I will not do it. Never!"]),
        ("Yes! I will do it. So there", ["Yes! I will do it.", "So there"]),
        ("one word less", ["one word less"]),
        ("Hm", ["Hm"]),
        ("  \n ", []),
        ("", []),
    ],
)
def test_examples(text: str, expected: list[str]) -> None:
    assert cut(text) == expected


@settings(deadline=None)
@given(st.text(alphabet=list("abcAB .!?\n\"'1é…"), max_size=80))
def test_nothing_visible_is_lost_and_spans_follow_each_other(text: str) -> None:
    spans = sentences(text)
    assert all(a < b for a, b in spans) and all(b <= c for (_, b), (c, _) in pairwise(spans))
    assert "".join("".join(text[a:b].split()) for a, b in spans) == "".join(text.split())
