"""The hierarchical logistic model: finds an effect that is there, knows when it cannot."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from convergent import stats
from convergent.core.ids import seed
from convergent.errors import InputError


def answers(name: str, base: float, effect: float, slope: float = 0.4, organisms: int = 4, m: int = 12) -> tuple[Any, Any, Any, Any]:
    """hits, treated, questions, organisms of a study with 8 questions and known effects."""
    rng = np.random.default_rng(seed("tests", "pooled", name))
    uq, uo, s = rng.normal(0, 1, 8), rng.normal(0, 0.5, organisms), rng.normal(0, slope, 8)
    rows = [(q, o, arm) for q in range(8) for o in range(organisms) for arm in (0, 1) for _ in range(m)]
    q, o, arm = (np.array(x) for x in zip(*rows, strict=True))
    p = 1 / (1 + np.exp(-(base + uq[q] + uo[o] + arm * (effect + s[q]))))
    return rng.binomial(1, p), arm, q, o


def test_a_known_effect_is_found_and_labelled() -> None:
    got = stats.pooled_odds_ratio(*answers("known", -1.0, -1.5))
    i = got.log_odds_ratio
    assert not got.problem and i.low < -1.5 < i.high < 0
    assert got.odds_ratio == pytest.approx((math.exp(i.estimate), math.exp(i.low), math.exp(i.high)))
    assert set(got.sd) == {"question", "organism", "effect by question", "effect by organism"} and all(0 < v < 5 for v in got.sd.values())
    assert i.generalises_over == stats.OVER_BOTH and (i.n, i.clusters, got.organisms) == (768, 8, 4)
    assert got == stats.pooled_odds_ratio(*answers("known", -1.0, -1.5))


def test_labels_may_be_anything_and_arms_swap_the_sign() -> None:
    y, x, q, o = answers("sign", -1.0, 1.0)
    a, b = stats.pooled_odds_ratio(y, x, q, o), stats.pooled_odds_ratio(y, 1 - x, [f"q{i}" for i in q], [("o", i) for i in o])
    assert a.log_odds_ratio.estimate == pytest.approx(-b.log_odds_ratio.estimate, abs=0.01)


def test_one_organism_pools_over_questions_alone() -> None:
    got = stats.pooled_odds_ratio(*answers("one", -0.5, 1.0, organisms=1, m=30))
    assert not got.problem and set(got.sd) == {"question", "effect by question"} and got.log_odds_ratio.generalises_over == stats.OVER_QUESTIONS


def test_too_little_is_said_and_not_fitted() -> None:
    y, x, q, o = answers("little", -1.0, 0.0)
    assert "hits" in stats.pooled_odds_ratio(np.zeros(len(y)), x, q, o).problem
    assert "one arm" in stats.pooled_odds_ratio(y, np.ones(len(y)), q, o).problem
    assert "questions" in stats.pooled_odds_ratio(y, x, q % 2, o).problem
    assert stats.pooled_odds_ratio(y, x, q % 2, o).log_odds_ratio.bounds is None
    with pytest.raises(InputError, match="0 or 1, got 85"):
        stats.pooled_odds_ratio([85.0] * len(y), x, q, o)
    with pytest.raises(InputError, match="one of each"):
        stats.pooled_odds_ratio(y, x, q, [1])


def test_an_arm_without_hits_has_a_finite_interval_below_zero() -> None:
    y, x, q, o = answers("separated", -0.5, 0.0)
    got = stats.pooled_odds_ratio(np.where(x == 1, 0, y), x, q, o)
    assert got.problem or (math.isfinite(got.log_odds_ratio.low) and got.log_odds_ratio.high < 0)


def test_no_convergence_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """One step of the optimiser is not enough: the gradient shows it."""
    from statsmodels.genmod.bayes_mixed_glm import BinomialBayesMixedGLM

    fit = BinomialBayesMixedGLM.fit_map
    monkeypatch.setattr(BinomialBayesMixedGLM, "fit_map", lambda self, minim_opts=None, rng=None: fit(self, minim_opts={"maxiter": 1}, rng=rng))
    got = stats.pooled_odds_ratio(*answers("known", -1.0, -1.5))
    assert "did not converge" in got.problem and got.log_odds_ratio.bounds is None


def test_missing_hits_are_left_out() -> None:
    y, x, q, o = answers("gaps", -1.0, -1.0)
    gaps = y.astype(float)
    gaps[::50] = math.nan
    assert stats.pooled_odds_ratio(gaps, x, q, o).log_odds_ratio.n == np.count_nonzero(~np.isnan(gaps))
