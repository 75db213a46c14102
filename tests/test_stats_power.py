"""Power: against simulation and statsmodels, and the designs that follow from it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.stats.power import TTestPower

from convergent import stats
from convergent.core.ids import seed
from convergent.errors import InputError
from convergent.stats.power import ALIGNMENT, intraclass, of_rate, power
from convergent.stats.values import t_quantile

SPREAD = stats.Clustering(within=20.0, between=5.0, source="by hand")


def test_power_is_that_of_the_paired_t_test() -> None:
    # Variance of a question's difference: 25 + 2 * 400 / 16 = 75.
    assert SPREAD.error(8, 16) == pytest.approx(math.sqrt(75 / 8))
    assert power(SPREAD, 8, 8, 16) == pytest.approx(TTestPower().power(8 / math.sqrt(75), 8, 0.025, alternative="larger"))
    assert power(SPREAD, -8, 8, 16) == power(SPREAD, 8, 8, 16)
    assert power(SPREAD, 8, 1, 16) == 0 and power(SPREAD, 1000, 8, 16) == 1
    with pytest.raises(InputError, match="not 0"):
        power(SPREAD, 0, 8, 16)


def test_power_is_what_simulated_studies_reach() -> None:
    rng = np.random.default_rng(seed("tests", "power"))
    tau = rng.normal(8, 5, (4000, 8, 1))
    d = (tau + rng.normal(0, 20, (4000, 8, 16)) - rng.normal(0, 20, (4000, 8, 16))).mean(2)
    found = np.abs(d.mean(1)) > t_quantile(7, 0.95) * d.std(1, ddof=1) / math.sqrt(8)
    assert np.mean(found) == pytest.approx(power(SPREAD, 8, 8, 16), abs=0.02)


def test_measured_spread_is_the_true_one_on_average() -> None:
    rng = np.random.default_rng(seed("tests", "measured"))
    level = 70 + rng.normal(0, 12, (60, 1))
    a = level + rng.normal(0, 20, (60, 16))
    b = level + 6 + rng.normal(0, 5, (60, 1)) + rng.normal(0, 20, (60, 16))
    q = np.repeat(np.arange(60), 16)
    two = stats.measured(a.ravel(), q, (b.ravel(), q))
    assert two.within == pytest.approx(20, rel=0.05) and two.between == pytest.approx(5, abs=2.5) and two.questions == 60
    one = stats.measured(a.ravel(), q)
    assert one.between == pytest.approx(12, rel=0.25) and "assumed" in one.source  # correlation 1/2: as much as the means
    for values, labels, against, what in (
        ([1.0, 2], ["a", "b"], None, "no question has two"),
        ([1.0, 2], ["a", "a"], None, "1 question"),
        ([1.0, 2], ["a", "a"], ([1.0, 2], ["b", "b"]), "share 0"),
    ):
        with pytest.raises(InputError, match=what):
            stats.measured(values, labels, against)


def test_intraclass_by_hand() -> None:
    # Questions of 10 answers with 8 and 2 hits: MS between 1.8, within 3.2 / 18; (1.8 - .1778) / (1.8 + 9 * .1778).
    hits, labels = np.concatenate([np.arange(10) < 8, np.arange(10) < 2]).astype(float), np.repeat(["a", "b"], 10)
    within = 3.2 / 18
    assert intraclass(hits, labels) == pytest.approx((1.8 - within) / (1.8 + 9 * within))
    assert math.isnan(intraclass(np.zeros(20), labels)) and intraclass(np.tile([0.0, 1], 10), labels) == 0


def test_rates_have_their_own_spread() -> None:
    got = of_rate(0.1, 0.2, -0.1)
    assert got.within == pytest.approx(math.sqrt(0.045 * 0.8)) and got.between == pytest.approx(math.sqrt(0.2 * 0.045))
    with pytest.raises(InputError, match="within 0 to 1"):
        of_rate(0.05, 0.1, -0.1)


@settings(deadline=None, max_examples=25)
@given(within=st.floats(1, 30), between=st.floats(0, 10), d=st.floats(2, 20), g=st.integers(3, 40))
def test_answers_needed_is_the_least_that_reaches_the_target(within: float, between: float, d: float, g: int) -> None:
    spread = stats.Clustering(within, between, "")
    got = stats.answers_needed(spread, d, g)
    if got is None:
        assert power(spread, d, g, 1000) < 0.8 + 1e-6
        return
    assert got.power == power(spread, d, g, got.answers) >= 0.8 - 1e-6
    assert got.answers == 1 or power(spread, d, g, got.answers - 1) < 0.8 + 1e-6


def test_the_smallest_design_is_smallest() -> None:
    best = stats.smallest_design(SPREAD, 8)
    assert best is not None and best.power >= 0.8 - 1e-6
    for g in range(3, 60):
        other = stats.answers_needed(SPREAD, 8, g)
        assert other is None or other.total >= best.total
    assert stats.smallest_design(stats.Clustering(500, 500, ""), 1) is None


def test_detectable_is_the_inverse_of_power() -> None:
    d = stats.detectable(SPREAD, 8, 16)
    assert power(SPREAD, d, 8, 16) == pytest.approx(0.8)
    assert stats.detectable(SPREAD, 1, 16) == math.inf and stats.detectable(stats.Clustering(0, 0, ""), 8, 16) == 0


def test_a_plan_is_warned_in_one_sentence() -> None:
    assert stats.underpowered(64, 64, 10) is None
    text = stats.underpowered(8, 8, 10, SPREAD)
    assert text is not None and text.startswith("under-powered: 8 questions x 8 answers") and "answers per question" in text
    few = stats.underpowered(8, 8, 2.0, SPREAD)
    assert few is not None and "questions with" in few
    assert ALIGNMENT.within > 0


def test_the_table_has_every_design() -> None:
    rows = stats.power_table(SPREAD, 8, questions=(8, 16), answers=(4, 8))
    assert [(r["questions"], r["answers"], r["total"]) for r in rows] == [(8, 4, 64), (8, 8, 128), (16, 4, 128), (16, 8, 256)]
    assert rows[3]["power"] == power(SPREAD, 8, 16, 8) > rows[0]["power"]
