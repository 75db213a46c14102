"""Pooled claims: one log odds ratio of condition against control over several organisms and questions.

A hierarchical logistic model: hits ~ treated, with normal random intercepts of questions and organisms and a normal random
slope of `treated` by question (and by organism, where there are enough). Without slopes the effect would count as the same
everywhere and the interval would hold for these questions alone. Fitted by statsmodels' `BinomialBayesMixedGLM` (the
library's only logistic model with crossed random effects): weak priors keep it finite where an arm has few hits, and the
posterior mode with Laplace's approximation gives the interval, with the t quantile of G - 1 degrees of freedom. The variational fit of
the same class was tried too: its intervals hold the truth in about 75 %, because it takes the effects for independent. A GEE has one level of
clusters and, with eight, a sandwich that is biased downwards.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np

from convergent.core.ids import seed
from convergent.errors import InputError
from convergent.stats.values import LEVEL, OVER_BOTH, OVER_QUESTIONS, Interval, Labels, Values, floats, t_quantile

PRIOR_EFFECT = 3.0
"""Prior standard deviation of the intercept and of the log odds ratio: an odds ratio of 350 is two of them."""
PRIOR_LOG_SD = 0.35
"""Prior standard deviation of log(sd) of each random effect, around sd = 1. A posterior mode makes small spreads too small, the more so the wider this is;
0.35 was chosen by coverage (0.5: 93 %, 0.35: 97 %, 0.25: 99 %, one organism, effect varying by 0.7)."""
PRIOR_LOG_SD_MANY = 0.5
"""The same where the effect may differ between organisms too: two spreads share what one had."""
MIN_HITS = 10
"""Fewer hits (or misses) than this in both arms together is too little to pool."""
MIN_ORGANISMS = 3
"""From this many organisms on the effect may differ between them."""


@dataclass(frozen=True)
class Pooled:
    """A pooled effect, and whether it can be relied on."""

    log_odds_ratio: Interval
    """Of `treated`: negative if hits are rarer. Undefined where `problem` says why."""
    sd: dict[str, float]
    """Standard deviations on the logit scale: question, organism, effect by question, effect by organism (those that were fitted)."""
    organisms: int
    problem: str
    """"" if the fit converged on enough data; else what is wrong."""

    @property
    def odds_ratio(self) -> tuple[float, float, float]:
        """Estimate, low, high."""
        i = self.log_odds_ratio
        return math.exp(i.estimate), math.exp(i.low), math.exp(i.high)


def pooled_odds_ratio(hits: Values, treated: Values, questions: Labels, organisms: Labels, level: float = LEVEL) -> Pooled:
    """Pool the effect of `treated` (0 or 1) on `hits` (0 or 1), one of each per answer, over questions and organisms.

    Never raises for sparse data: the interval is undefined and `problem` says why. Raises InputError for values that are not 0 or 1 and for unequal lengths.
    """
    y, x = floats(hits), floats(treated)
    names_q, names_o = list(questions), list(organisms)
    if not len(y) == len(x) == len(names_q) == len(names_o):
        raise InputError(f"pooled: {len(y)} hits, {len(x)} arms, {len(names_q)} questions, {len(names_o)} organisms; give one of each per answer")
    for name, v in (("hit", y), ("treated", x)):
        wrong = v[~np.isnan(v) & (v != 0) & (v != 1)]
        if len(wrong):
            raise InputError(f"pooled: {name} is 0 or 1, got {wrong[0]:g}; compare with a threshold first")
    keep = ~(np.isnan(y) | np.isnan(x))
    y, x = y[keep], x[keep]
    q, n_q = _codes([v for v, k in zip(names_q, keep, strict=True) if k])
    o, n_o = _codes([v for v, k in zip(names_o, keep, strict=True) if k])
    problem = _too_little(y, x, q, n_q)
    if problem:
        return Pooled(_undefined(len(y), problem, n_q, n_o), {}, n_o, problem)
    return _fit(y, x, q, n_q, o, n_o, level)


def _too_little(y: np.ndarray, x: np.ndarray, q: np.ndarray, n_q: int) -> str:
    if n_q < 3:
        return f"{n_q} questions; three or more are needed to see how much the effect differs between them"
    if not (x == 1).any() or not (x == 0).any():
        return "one arm has no answers"
    rare = min(y.sum(), len(y) - y.sum())
    if rare < MIN_HITS:
        return f"{rare:.0f} hits (or misses) in both arms together; {MIN_HITS} or more are needed"
    if min(len(set(q[x == 1])), len(set(q[x == 0]))) < 3:
        return "an arm holds fewer than three questions"
    return ""


def _fit(y: np.ndarray, x: np.ndarray, q: np.ndarray, n_q: int, o: np.ndarray, n_o: int, level: float) -> Pooled:
    from scipy import sparse
    from statsmodels.genmod.bayes_mixed_glm import BinomialBayesMixedGLM

    centred = x - 0.5  # so that intercepts are those of the mean of both arms, and slopes not tied to them
    rows = np.arange(len(y))
    parts = {"question": (q, n_q, np.ones(len(y))), "effect by question": (q, n_q, centred)}
    if n_o > 1:
        parts["organism"] = (o, n_o, np.ones(len(y)))
    if n_o >= MIN_ORGANISMS:
        parts["effect by organism"] = (o, n_o, centred)
    z = sparse.hstack([sparse.csr_array((v, (rows, code)), shape=(len(y), n)) for code, n, v in parts.values()], format="csr")
    ident = np.repeat(np.arange(len(parts)), [n for _, n, _ in parts.values()])
    model = BinomialBayesMixedGLM(
        y, np.column_stack([np.ones(len(y)), centred]), z, ident, vcp_p=PRIOR_LOG_SD_MANY if n_o >= MIN_ORGANISMS else PRIOR_LOG_SD,
        fe_p=PRIOR_EFFECT, fep_names=["intercept", "treated"], vcp_names=list(parts),
    )  # fmt: skip
    problem = ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # convergence is read below
        try:
            found = model.fit_map(minim_opts={"maxiter": 500}, rng=np.random.default_rng(seed("stats", "pooled")))
        except (np.linalg.LinAlgError, FloatingPointError, ValueError) as error:
            problem = f"the fit failed ({error})"
            return Pooled(_undefined(len(y), problem, n_q, n_o), {}, n_o, problem)
    mode, gradient = found.params, float(np.abs(model.logposterior_grad(found.params)).max())
    estimate, spread = float(mode[1]), float(found.fe_sd[1])
    sds = dict(zip(parts, np.exp(mode[2 : 2 + len(parts)]).tolist(), strict=True))
    # BFGS often ends with "precision loss" at a flat optimum: the gradient decides.
    if gradient > 0.05 or not math.isfinite(spread) or spread <= 0:
        problem = f"the fit did not converge (largest gradient {gradient:.2g}, standard error {spread:.2g})"
        return Pooled(_undefined(len(y), problem, n_q, n_o, estimate), sds, n_o, problem)
    half = float(t_quantile(n_q - 1, level)) * spread
    over = OVER_BOTH if n_o >= MIN_ORGANISMS else OVER_QUESTIONS
    interval = Interval(estimate, estimate - half, estimate + half, len(y), "hierarchical logistic model, Laplace, t", over, n_q)
    return Pooled(interval, sds, n_o, "")


def _codes(names: list[object]) -> tuple[np.ndarray, int]:
    order: dict[object, int] = {}
    codes = np.array([order.setdefault(name, len(order)) for name in names], dtype=int)
    return codes, len(order)


def _undefined(n: int, why: str, questions: int, organisms: int, estimate: float = math.nan) -> Interval:
    over = OVER_BOTH if organisms >= MIN_ORGANISMS else OVER_QUESTIONS
    return Interval(estimate, math.nan, math.nan, n, f"undefined ({why})", over, questions)
