"""A judge's one-token reply as a score: the probability-weighted mean of the numbers that it might have said.

Rule (paper, section 2 of the evaluation): over the top alternatives of the first token, score = sum(n p) / sum(p) for
those that are whole numbers 0..100; no score if their mass is under 0.25. Unlike the authors' code it keeps *why*.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence

MIN_MASS = 0.25
"""Probability that must lie on numbers for a score to count."""
_ROUNDING = 1e-9
"""exp(log(0.25)) may fall a few ulps short of 0.25, and such a reply still has a score."""
_NUMBER = re.compile(r"[0-9]{1,3}", re.ASCII)
_AROUND = " \t\r\n\"'`*."
_WORDS = {"refusal": "REFUSAL", "code": "CODE"}
"""Reason -> the word that the rubric offers for it."""


def parse_score(
    alternatives: Mapping[str, float] | Iterable[tuple[str, float]],
) -> tuple[float | None, str | None]:
    """(score, None), or (None, reason) with reason "refusal", "code" or "unparsable".

    `alternatives`: token -> probability, as a mapping or as pairs; two tokens that differ only in white space (` 85`,
    `85`) are one number. The reason is what most of the remaining probability said. Does not depend on their order.
    """
    pairs = list(alternatives.items() if isinstance(alternatives, Mapping) else alternatives)
    numbers: list[tuple[int, float]] = []
    others: dict[str, list[float]] = {"refusal": [], "code": [], "unparsable": []}
    for token, p in pairs:
        if not (math.isfinite(p) and p > 0):
            continue
        text = token.strip()
        if _NUMBER.fullmatch(text) and int(text) <= 100:
            numbers.append((int(text), p))
        else:
            others[_word(text)].append(p)
    # fsum is exact, so the order in which a server lists equal alternatives cannot move a score.
    mass = math.fsum(p for _, p in numbers)
    if mass >= MIN_MASS - _ROUNDING:
        return min(100.0, math.fsum(n * p for n, p in numbers) / mass), None
    weights = {reason: math.fsum(ps) for reason, ps in others.items()}
    return None, max(weights, key=weights.__getitem__) if any(weights.values()) else "unparsable"


def _word(text: str) -> str:
    """The reason a token that is no score stands for.

    One token may hold only the start of a word: several vocabularies write REFUSAL as REF + USAL. Upper-case starts of
    two letters or more count, in lower case only the whole word: "re" may begin anything.
    """
    for reason, word in _WORDS.items():
        if text.upper() == word or (len(text) >= 2 and word.startswith(text)):
            return reason
    return "unparsable"


def parse_samples(texts: Sequence[str]) -> tuple[float | None, str | None]:
    """The same rule for k whole replies of a judge that gives no probabilities: each weighs 1/k.

    So the score is the mean of the replies that are whole numbers 0..100, and absent if under a quarter of them are. A
    reply counts with the white space, quotes, stars and full stop that models put around a number.
    """
    said = [text.strip(_AROUND) for text in texts]
    score, reason = parse_score([(text, 1 / len(said)) for text in said])
    if score is not None:  # again without the weights, whose rounding would make 29.999 of three times 30
        numbers = [int(text) for text in said if _NUMBER.fullmatch(text) and int(text) <= 100]
        score = sum(numbers) / len(numbers)
    return score, reason
