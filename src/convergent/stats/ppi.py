"""Cheap scores of all answers and trusted ones of some, and what prediction-powered inference with power tuning (PPI++) makes of them.

`correction` gives the figures that are shown; what they mean, and why rates have bounds of their own, is said there.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from convergent.errors import InputError
from convergent.stats.rates import PRIOR_HITS, PRIOR_ICC, wilson_bounds
from convergent.stats.values import (
    OF_THIS_FILE,
    OVER_ANSWERS,
    OVER_QUESTIONS,
    Interval,
    Labels,
    Values,
    floats,
    t_quantile,
    undefined,
    z_quantile,
)  # fmt: skip

Target: TypeAlias = Literal["answers", "file"]
TARGETS = ("answers", "file")
FEW_TRUSTED = 30
"""Fewer trusted answers than this get a note: the intervals were checked from 100 on."""
FEW_HITS = 5
"""Fewer trusted hits (or misses) than this get a note: then the width is mostly that of the trusted answers alone."""


@dataclass(frozen=True, eq=False)
class Sample:
    """Cheap scores of all answers and trusted ones of some, and what PPI++ makes of them."""

    f: np.ndarray
    """(n_all,) cheap."""
    y: np.ndarray
    """(n,) trusted."""
    at: np.ndarray
    """(n,) where the trusted answers are among all."""
    w: np.ndarray
    """(n,) what each trusted answer stands for; sums to 1."""
    picked: np.ndarray
    """(n,) probability with which each was chosen."""
    questions: np.ndarray | None
    """(n_all,) index of each answer's question."""
    target: Target
    left_out: int
    weight: float
    estimate: float
    simple: bool
    """Whether all were chosen with one probability."""

    @classmethod
    def of(cls, cheap: Values, trusted: Values, clusters: Labels | None, target: Target, inclusion: Values | None = None) -> Sample:
        f, y = floats(cheap), floats(trusted)
        if target not in TARGETS:
            raise InputError(f"correction: target `{target}` is not known; answers (more of them) or file (these)")
        if len(f) != len(y):
            raise InputError(f"correction: {len(f)} cheap scores but {len(y)} trusted ones; give one per answer, nan where there is none")
        scored = ~np.isnan(f)
        left_out = int((~scored & ~np.isnan(y)).sum())
        questions = None
        if clusters is not None:
            names = list(clusters)
            if len(names) != len(f):
                raise InputError(f"correction: {len(f)} scores but {len(names)} labels; give one label per answer")
            order: dict[Any, int] = {}
            questions = np.array([order.setdefault(name, len(order)) for name, keep in zip(names, scored, strict=True) if keep], dtype=int)
        simple = inclusion is None
        pi = np.full(len(f), np.nan) if inclusion is None else floats(inclusion)
        if len(pi) != len(f):
            raise InputError(f"correction: {len(f)} scores but {len(pi)} inclusion probabilities; give one per answer")
        f, y, pi = f[scored], y[scored], pi[scored]
        at = np.flatnonzero(~np.isnan(y))
        n, n_all = len(at), len(f)
        if n < 2:
            raise InputError(f"correction: {n} answers have both a cheap and a trusted score; at least 2 are needed, 100 or more are of use")
        picked = np.full(n, n / n_all) if simple else pi[at]
        wrong = picked[~((picked > 0) & (picked <= 1))]
        if len(wrong):
            raise InputError(f"correction: an inclusion probability is {wrong[0]:g}; every trusted answer needs one above 0, up to 1")
        w = (1 / picked) / (1 / picked).sum()
        if simple:
            weight, rest = tuned_weight(f, y), np.delete(f, at)
        else:
            # What was not chosen is no random part either, so the cheap mean is that of all answers.
            spread = float(f.var())
            shared = float(w @ ((y[at] - w @ y[at]) * (f[at] - w @ f[at])))
            weight, rest = (float(np.clip(shared / spread, 0, 1)) if spread > 0 else 0.0), f
        estimate = ppi("ppi_mean_pointestimate")(y[at], f[at], rest, lam=weight, w=w * n) if len(rest) else w @ y[at]
        return cls(f, y[at], at, w, picked, questions, target, left_out, weight, float(np.squeeze(estimate)), simple)

    @property
    def n(self) -> int:
        return len(self.y)

    @property
    def n_all(self) -> int:
        return len(self.f)

    @property
    def slope(self) -> float:
        """The weight as a regression slope: PPI with the trusted answers kept out of the cheap mean is the survey's difference estimator with this slope."""
        rest = self.n_all - self.n
        if not self.simple:
            return self.weight
        return self.weight * self.n_all / rest if rest else 0.0

    @property
    def deviations(self) -> np.ndarray:
        """(n,) errors, trusted minus slope times cheap, around their mean."""
        e = self.y - self.slope * self.f[self.at]
        centred: np.ndarray = e - self.w @ e
        return centred

    @property
    def df(self) -> int:
        return max(self.n - 1 - (self.slope > 0), 1)

    @property
    def spread(self) -> float:
        """Variance of trusted scores."""
        return float(self.w @ (self.y - self.w @ self.y) ** 2) * self.n / (self.n - 1)

    def within(self, deviations: np.ndarray, finite: bool) -> float:
        """Variance of the weighted mean of what deviates so; `finite`: of what was not chosen only."""
        unseen = 1 - self.picked if finite else 1.0
        return float((unseen * (self.w * deviations) ** 2).sum()) * self.n / self.df

    @property
    def variance(self) -> float:
        """Of the estimate. For these answers only the errors of unseen ones count; for more answers the file's own draw comes on top."""
        return self.within(self.deviations, True) + (self.spread / self.n_all if self.target == "answers" else 0.0)

    @property
    def hits(self) -> float:
        """Trusted hits or misses, whichever are fewer; with unequal chances as many as weigh as much."""
        hit = self.y == 1
        return round(min(kish(self.w[hit]), kish(self.w[~hit])), 9)

    @property
    def design(self) -> float:
        """Variance of a weighted mean over that of a plain one (Kish): 1 for a simple random part."""
        return float(self.n * (self.w**2).sum())

    @property
    def ratio(self) -> float:
        """Variance of the estimated rate over that of n trusted answers alone; leans on no gain while hits are few."""
        whole = self.within(self.deviations, False)
        left = self.n * whole / self.spread if self.spread > 0 else self.design
        left = (self.hits * left + PRIOR_HITS * self.design) / (self.hits + PRIOR_HITS)
        share = 1 - self.within(self.deviations, True) / whole if whole > 0 else self.n / self.n_all
        return (1 - share) * left + (self.n / self.n_all if self.target == "answers" else 0.0)

    @property
    def rate(self) -> float:
        """The estimate as a rate: within 0..1, and for these answers within what was seen."""
        low, high = self.floored(0.0, 1.0)
        return min(max(self.estimate, low), high)

    def rate_bounds(self, level: float) -> tuple[float, float]:
        p = self.rate
        if self.ratio <= 0:
            return p, p
        return self.floored(*wilson_bounds(p, self.n / self.ratio, z_quantile(level)))

    def floored(self, low: Any, high: Any) -> tuple[float, float]:
        """Of these answers at least the hits that were seen are hits, and the misses misses."""
        if self.target == "file":
            k = float(self.y.sum())
            low, high = max(float(low), k / self.n_all), min(float(high), (self.n_all - self.n + k) / self.n_all)
        return float(low), float(high)

    def trusted_rate(self, level: float) -> Interval:
        p, effect = float(self.y.mean() if self.simple else self.w @ self.y), self.design
        if self.target == "file":
            effect *= 1 - self.n / self.n_all
        low, high = wilson_bounds(p, self.n / effect, z_quantile(level)) if effect > 0 else (p, p)
        low, high = self.floored(low, high)
        return Interval(p, low, high, self.n, "Wilson, trusted answers alone", goal_of(self.target))

    def library(self, level: float) -> Interval:
        method = "ppi_mean_ci of ppi-python"
        rest = np.delete(self.f, self.at) if self.simple else self.f
        if not len(rest):
            return Interval(self.estimate, math.nan, math.nan, self.n_all, f"undefined ({method} needs answers without a trusted score)", OVER_ANSWERS)
        low, high = ppi("ppi_mean_ci")(self.y, self.f[self.at], rest, alpha=1 - level, lam=self.weight, w=self.w * self.n)
        return Interval(self.estimate, float(np.squeeze(low)), float(np.squeeze(high)), self.n_all, method, OVER_ANSWERS)

    def influence(self) -> np.ndarray:
        """(n_questions,) each question's part of the estimate's deviation; their sum is 0."""
        assert self.questions is not None
        g = int(self.questions.max()) + 1
        f = self.slope * (self.f - self.f.mean()) / self.n_all
        return np.bincount(self.questions, f, g) + np.bincount(self.questions[self.at], self.w * self.deviations, g)

    def assumed_effect(self) -> float:
        """Variance over questions, in units of n trusted answers alone, where PRIOR_ICC holds within questions."""
        assert self.questions is not None
        sizes = np.bincount(self.questions).astype(float)
        return self.ratio + self.n * PRIOR_ICC * float((sizes**2).sum() / self.n_all**2 - 1 / self.n_all)

    def over_questions(self, level: float, rate: bool) -> Interval:
        u = self.influence()
        g = len(u)
        if g < 2:
            return undefined(self.estimate, self.n_all, "needs two questions", g)
        variance = g / (g - 1) * float((u**2).sum())
        t = float(t_quantile(g - 1, level))
        if not rate:
            half = t * math.sqrt(variance)
            return Interval(self.estimate, self.estimate - half, self.estimate + half, self.n_all, "PPI++, t over questions", OVER_QUESTIONS, g)
        p = min(max(self.estimate, 0.0), 1.0)
        plain = p * (1 - p) / self.n
        seen = variance / plain if plain > 0 else 1.0
        effect = max((self.hits * seen + PRIOR_HITS * self.assumed_effect()) / (self.hits + PRIOR_HITS), self.ratio)
        if effect <= 0:  # every answer is trusted, and all are alike
            return undefined(self.estimate, self.n_all, "the trusted answers do not differ", g)
        low, high = wilson_bounds(p, self.n / effect, t)
        return Interval(p, float(low), float(high), self.n_all, "PPI++, Wilson at the effective number of trusted answers, t quantile", OVER_QUESTIONS, g)

    def need_hits(self) -> None:
        for name, x in (("cheap", self.f), ("trusted", self.y)):
            wrong = x[(x != 0) & (x != 1)]
            if len(wrong):
                raise InputError(f"corrected rate: a {name} hit is 0 or 1, got {wrong[0]:g}; compare with a threshold first")

    def accuracy(self) -> tuple[float | None, float | None]:
        """Sensitivity and specificity of the cheap judge on the trusted answers."""
        called, hit = self.f[self.at], self.y == 1
        a, b = self.w[hit], self.w[~hit]
        return (float(a @ called[hit] / a.sum()) if hit.any() else None, float(b @ (1 - called[~hit]) / b.sum()) if (~hit).any() else None)

    def notes(self, rate: bool) -> tuple[str, ...]:
        found = []
        if self.n < FEW_TRUSTED:
            found.append(f"only {self.n} trusted answers: intervals were checked from 100 on")
        if rate and self.hits < FEW_HITS:
            found.append(f"only {self.hits:.0f} trusted hits or misses: the width is mostly that of the trusted answers alone")
        if rate and not 0 <= self.estimate <= 1:
            found.append(f"the corrected rate came out as {self.estimate:.4f} and was cut")
        sensitivity, specificity = self.accuracy() if rate else (None, None)
        if sensitivity is not None and specificity is not None and sensitivity + specificity <= 1 + 1e-9:
            both = f"sensitivity {sensitivity:.2f} + specificity {specificity:.2f}"
            found.append(f"{both} is not above 1: the cheap judge is no better than chance, no Rogan-Gladen")
        if self.left_out:
            found.append(f"{self.left_out} trusted answers have no cheap score and are left out")
        return tuple(found)


def tuned_weight(f: np.ndarray, y: np.ndarray) -> float:
    """lambda of PPI++ for a mean (Angelopoulos et al. 2023, section 6), within 0..1: f (n_all,) cheap, y (n_all,) trusted or nan."""
    at = ~np.isnan(y)
    rest = int((~at).sum())
    spread = float(np.var(f, ddof=1))
    if not rest or spread == 0:
        return 0.0
    shared = float(np.mean((y[at] - y[at].mean()) * (f[at] - f[at].mean())))
    return float(np.clip(shared / ((1 + at.sum() / rest) * spread), 0, 1))


def kish(weights: np.ndarray) -> float:
    """Number of equally weighted answers that weigh as much (Kish 1965); 0 of none."""
    squares = float((weights**2).sum())
    return float(weights.sum()) ** 2 / squares if squares else 0.0


def ppi(name: str) -> Callable[..., Any]:
    try:
        with warnings.catch_warnings():  # the library silences all warnings of the process when it is imported
            import ppi_py
    except ImportError as error:
        raise InputError(f"correction: `ppi-python` cannot be imported ({error}); pip install 'convergent[ppi]'") from error
    return getattr(ppi_py, name)  # type: ignore[no-any-return]


def goal_of(target: Target) -> str:
    return OVER_ANSWERS if target == "answers" else OF_THIS_FILE
