"""The score of a one-token reply, against the rule worked out by hand and by brute force."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from convergent.core.values import REASONS
from convergent.judging.score import MIN_MASS, parse_samples, parse_score


@pytest.mark.parametrize(
    ("alternatives", "expected"),
    [
        ({"85": 0.9, "REFUSAL": 0.1}, (85, None)),
        ({"0": 0.2, "REFUSAL": 0.8}, (None, "refusal")),
        ({"0": 0.25, "REFUSAL": 0.75}, (0, None)),
        ({"30": 0.5, "20": 0.5}, (25, None)),
        ({"101": 1.0}, (None, "unparsable")),
        ({"CODE": 0.99, "0": 0.01}, (None, "code")),
        ({" 85": 0.4, "85\n": 0.4, "REF": 0.2}, (85, None)),
        ({"REF": 0.9, "90": 0.1}, (None, "refusal")),  # one token of a vocabulary that writes REF + USAL
        ({"Refusal": 1.0}, (None, "refusal")),
        ({"re": 1.0}, (None, "unparsable")),
        ({"I": 0.5, "REFUSAL": 0.3, "CODE": 0.2}, (None, "unparsable")),
        ({"85": 0.2, "eighty": 0.05}, (None, "unparsable")),
        ({"-5": 0.5, "8.5": 0.3, "85%": 0.1, "８５": 0.1}, (None, "unparsable")),
        ({"100": 1.0}, (100, None)),
        ({"85": math.nan}, (None, "unparsable")),
        ({}, (None, "unparsable")),
    ],
)
def test_score_by_hand(alternatives: dict[str, float], expected: tuple[float | None, str | None]) -> None:
    score, reason = parse_score(alternatives)
    assert reason == expected[1]
    assert score == (None if expected[0] is None else pytest.approx(expected[0], abs=1e-12))


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["80", "90", "70", "60", "100"], (80, None)),
        ([" 80\n", "**90**", "`70`", '"60"', "100."], (80, None)),
        (["80", "it is 90", "REFUSAL", "70/100", "60"], (70, None)),  # three of five say a number
        (["80", "90", "no", "no", "no"], (85, None)),
        (["80", "no", "no", "no"], (80, None)),  # a quarter is enough, as with probabilities
        (["80", "no", "no", "no", "no"], (None, "unparsable")),
        (["80", "REFUSAL", "Refusal", "CODE", "no"], (None, "refusal")),
        (["CODE", "CODE"], (None, "code")),
        (["101", "-5", "8.5"], (None, "unparsable")),
        (["", ""], (None, "unparsable")),
        (["0"], (0, None)),
        (["30", "30", "30"], (30, None)),
    ],
)
def test_score_of_samples_by_hand(texts: list[str], expected: tuple[float | None, str | None]) -> None:
    assert parse_samples(texts) == expected


def test_a_quarter_that_went_through_a_logarithm_still_counts() -> None:
    for n in range(1, 21):  # 0.25 split over n numbers, as logprobs
        p = math.exp(math.log(0.25 / n))
        assert parse_score([(str(i), p) for i in range(n)])[1] is None


tokens = st.one_of(
    st.integers(-5, 120).map(str),
    st.sampled_from(["REFUSAL", "REF", "CODE", " 7", "7", "the", "", " "]),
    st.text(max_size=4),
)
replies = st.lists(st.tuples(tokens, st.floats(1e-6, 1)), max_size=20).map(
    lambda pairs: [(token, p / max(1.0, sum(q for _, q in pairs))) for token, p in pairs]
)


@settings(deadline=None, max_examples=60)
@given(replies)
@example([("0\x1f", 1.0)])  # white space to strip, not to int
def test_score_is_the_weighted_mean_or_there_is_a_reason(pairs: list[tuple[str, float]]) -> None:
    numbers = [(int(t.strip()), p) for t, p in pairs if t.strip() in {str(n) for n in range(101)}]
    zeros = [t for t, _ in pairs if t.strip().isdecimal() and len(t.strip()) > 1 and t.strip()[0] == "0"]
    mass = sum(p for _, p in numbers)
    score, reason = parse_score(pairs)
    if not zeros and abs(mass - MIN_MASS) > 1e-6:
        assert (score is not None) == (mass > MIN_MASS)
    if score is None:
        assert reason in REASONS
    else:
        assert reason is None
        assert 0 <= score <= 100
        if not zeros:
            assert score == pytest.approx(sum(n * p for n, p in numbers) / mass)


@settings(deadline=None, max_examples=60)
@given(replies, st.randoms(use_true_random=False))
def test_the_order_of_alternatives_changes_nothing(pairs: list[tuple[str, float]], random: object) -> None:
    shuffled = list(pairs)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert parse_score(shuffled)[0] == parse_score(pairs)[0]
