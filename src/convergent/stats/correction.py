"""Correction: rates and means by a cheap judge, put right with the trusted scores that some of the same answers have.

The trusted answers must be a *random* part of those that the cheap judge scored (all with one chance, or each with a known one:
`inclusion`); then everything here holds however
bad the cheap judge is, and a better one only makes the interval narrower. Two estimators, both beside the raw figure and
the trusted answers alone:

- prediction-powered inference with power tuning (PPI++, Angelopoulos, Duchi and Zrnic 2023; `ppi-python`): the cheap mean over
  all answers plus the mean error on the trusted ones, the former weighed by `weight`;
- Rogan and Gladen (1978): the cheap rate put through the inverse of the misclassification matrix, interval of Lang and Reiczigel (2014).
  Less efficient than the first: it uses the same trusted answers, but not how many of them are hits.

Two targets. "answers": more answers to these questions; "file": exactly these answers, where a trusted answer adds no error
and all of them trusted leave none. The estimate is the same. `over_questions` generalises to other questions.

For rates, the library's normal interval collapses where hits are few (0 of 100 trusted: a point), so the bounds are Wilson's at the
effective number of trusted answers, n / ratio, where ratio is the share of the variance that the cheap scores leave
unexplained; it leans on 1 (the cheap scores help nothing) with the weight of PRIOR_HITS hits. Without a trusted hit this is
Wilson's interval of the trusted answers alone. The library's own interval is kept as `library`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

from convergent.stats.means import iid_mean
from convergent.stats.ppi import Sample, Target, goal_of, kish
from convergent.stats.rates import PRIOR_HITS, wilson
from convergent.stats.values import LEVEL, OVER_QUESTIONS, Interval, Labels, Values, floats, t_quantile, undefined, z_quantile

_Side: TypeAlias = "tuple[Values, Values, Labels | None, Values | None]"
"""Cheap, trusted, clusters, inclusion probabilities."""


@dataclass(frozen=True)
class Corrected:
    """One figure four ways."""

    raw: Interval
    """By the cheap judge, as if it were the truth."""
    ppi: Interval
    """Prediction-powered: use this one."""
    rogan_gladen: Interval | None
    """None for means."""
    trusted_only: Interval
    """From the trusted answers alone."""
    over_questions: Interval | None
    """`ppi` for other questions of this kind; None without clusters."""
    library: Interval
    """`ppi_mean_ci` as it comes: for "answers", normal quantiles."""
    weight: float
    """lambda of PPI++: 0 ignores the cheap scores, 1 takes them in full."""
    n: int
    """Answers with a cheap score."""
    n_trusted: int
    sensitivity: float | None = None
    """Share of trusted hits that the cheap judge calls hits; None for means or without trusted hits."""
    specificity: float | None = None
    left_out: int = 0
    """Trusted answers without a cheap score; they count nowhere."""
    notes: tuple[str, ...] = ()

    @property
    def narrower(self) -> float:
        """Width of `ppi` over that of `trusted_only`; nan where the latter has none."""
        width = self.trusted_only.high - self.trusted_only.low
        return (self.ppi.high - self.ppi.low) / width if width else math.nan


def corrected_rate(
    cheap: Values, trusted: Values, clusters: Labels | None = None, target: Target = "answers", level: float = LEVEL, inclusion: Values | None = None
) -> Corrected:
    """Rate of hits (0 or 1), corrected.

    cheap, trusted: one per answer, (n,); nan in `trusted` where there is none, nan in `cheap` leaves the answer out. clusters: question of each answer.
    inclusion: probability with which each trusted answer was chosen, where that was not the same for all (strata); read only where `trusted` is.
    Raises InputError for values other than 0, 1 and nan, fewer than two trusted answers, an inclusion probability outside 0..1, or without
    `ppi-python`.
    """
    s = Sample.of(cheap, trusted, clusters, target, inclusion)
    s.need_hits()
    low, high = s.rate_bounds(level)
    over = None
    if clusters is not None:
        over = s.over_questions(level, rate=True)
    goal = goal_of(target)
    ppi = Interval(s.rate, low, high, s.n_all, "PPI++, Wilson at the effective number of trusted answers", goal)
    return Corrected(
        wilson(int(s.f.sum()), s.n_all, level), ppi, _rogan_gladen(s, level), s.trusted_rate(level), over, s.library(level), s.weight, s.n_all, s.n,
        *s.accuracy(), s.left_out, s.notes(rate=True),
    )  # fmt: skip


def corrected_mean(
    cheap: Values, trusted: Values, clusters: Labels | None = None, target: Target = "answers", level: float = LEVEL,
    bounds: tuple[float, float] | None = None, inclusion: Values | None = None,
) -> Corrected:  # fmt: skip
    """Mean of scores, corrected; see `corrected_rate`. `bounds`: the values' range, where intervals are cut."""
    s = Sample.of(cheap, trusted, clusters, target, inclusion)

    def cut(i: Interval) -> Interval:
        if bounds is None or not i.defined:
            return i
        return Interval(i.estimate, max(i.low, bounds[0]), min(i.high, bounds[1]), i.n, i.method, i.generalises_over, i.clusters)

    half = float(t_quantile(s.df, level) * math.sqrt(s.variance))
    goal = goal_of(target)
    ppi = Interval(s.estimate, s.estimate - half, s.estimate + half, s.n_all, "PPI++, t", goal)
    mean = float(s.w @ s.y)
    alone = float(t_quantile(s.n - 1, level)) * math.sqrt(s.within(s.y - mean, target == "file"))
    over = None if clusters is None else s.over_questions(level, rate=False)
    return Corrected(
        iid_mean(s.f, level), cut(ppi), None, cut(Interval(mean, mean - alone, mean + alone, s.n, "t over trusted answers", goal)),
        None if over is None else cut(over), s.library(level), s.weight, s.n_all, s.n, None, None, s.left_out, s.notes(rate=False),
    )  # fmt: skip


@dataclass(frozen=True)
class CorrectedDifference:
    """a minus b, three ways; needs trusted answers in *both*, since a judge may be kinder to one of them."""

    raw: Interval
    ppi: Interval
    trusted_only: Interval
    over_questions: Interval | None
    """Paired by question; None without clusters."""
    a: Corrected
    b: Corrected


def corrected_rate_difference(
    cheap_a: Values, trusted_a: Values, cheap_b: Values, trusted_b: Values, clusters_a: Labels | None = None, clusters_b: Labels | None = None,
    target: Target = "answers", level: float = LEVEL, inclusion_a: Values | None = None, inclusion_b: Values | None = None,
) -> CorrectedDifference:  # fmt: skip
    """Rate of a minus rate of b, corrected: square-and-add (Newcombe 1998) from the two corrected intervals."""
    a = corrected_rate(cheap_a, trusted_a, clusters_a, target, level, inclusion_a)
    b = corrected_rate(cheap_b, trusted_b, clusters_b, target, level, inclusion_b)
    over = _over_questions_of_both((cheap_a, trusted_a, clusters_a, inclusion_a), (cheap_b, trusted_b, clusters_b, inclusion_b), level, rate=True)
    return _difference(a, b, over)


def corrected_mean_difference(
    cheap_a: Values, trusted_a: Values, cheap_b: Values, trusted_b: Values, clusters_a: Labels | None = None, clusters_b: Labels | None = None,
    target: Target = "answers", level: float = LEVEL, inclusion_a: Values | None = None, inclusion_b: Values | None = None,
) -> CorrectedDifference:  # fmt: skip
    """Mean of a minus mean of b, corrected."""
    a = corrected_mean(cheap_a, trusted_a, clusters_a, target, level, inclusion=inclusion_a)
    b = corrected_mean(cheap_b, trusted_b, clusters_b, target, level, inclusion=inclusion_b)
    over = _over_questions_of_both((cheap_a, trusted_a, clusters_a, inclusion_a), (cheap_b, trusted_b, clusters_b, inclusion_b), level, rate=False)
    return _difference(a, b, over)


def _rogan_gladen(s: Sample, level: float) -> Interval:
    """Lang and Reiczigel's interval; for "file" without the error of the cheap rate, and with the finite correction of the others."""
    method, goal = "Rogan-Gladen, Lang and Reiczigel", goal_of(s.target)
    hit = s.y == 1
    sensitivity, specificity = s.accuracy()
    n1, n0, n = kish(s.w[hit]), kish(s.w[~hit]), s.n_all
    if sensitivity is None or specificity is None:
        return Interval(math.nan, math.nan, math.nan, n, f"undefined ({method}: no trusted {'hits' if not n1 else 'misses'})", goal)
    p = float(s.f.mean())
    if sensitivity + specificity <= 1 + 1e-9:  # but for rounding
        return Interval(math.nan, math.nan, math.nan, n, f"undefined ({method}: sensitivity + specificity is not above 1)", goal)
    estimate = (p + specificity - 1) / (sensitivity + specificity - 1)
    z = z_quantile(level)
    p, nz = (n * p + z * z / 2) / (n + z * z), n + z * z
    sensitivity, specificity = (n1 * sensitivity + 1) / (n1 + 2), (n0 * specificity + 1) / (n0 + 2)
    j = sensitivity + specificity - 1
    if j <= 0:
        return Interval(math.nan, math.nan, math.nan, n, f"undefined ({method}: sensitivity + specificity is not clear of 1)", goal)
    finite = s.target == "file"
    unseen = 1 - s.n / n if finite else 1.0
    v1, v0 = unseen * sensitivity * (1 - sensitivity) / (n1 + 2), unseen * specificity * (1 - specificity) / (n0 + 2)
    centre = (p + specificity - 1) / j
    shift = 2 * z * z * (centre * v1 - (1 - centre) * v0)
    half = z * math.sqrt((0.0 if finite else p * (1 - p) / nz) + centre**2 * v1 + (1 - centre) ** 2 * v0) / j
    clip = [min(max(x, 0.0), 1.0) for x in (estimate, centre + shift - half, centre + shift + half)]
    return Interval(clip[0], clip[1], clip[2], n, method, goal)


def _difference(a: Corrected, b: Corrected, over: Interval | None) -> CorrectedDifference:
    return CorrectedDifference(_minus(a.raw, b.raw), _minus(a.ppi, b.ppi), _minus(a.trusted_only, b.trusted_only), over, a, b)


def _minus(a: Interval, b: Interval) -> Interval:
    d = a.estimate - b.estimate
    low, high = d - math.hypot(a.estimate - a.low, b.high - b.estimate), d + math.hypot(a.high - a.estimate, b.estimate - b.low)
    return Interval(d, low, high, a.n + b.n, f"square and add of two: {a.method}", a.generalises_over)


def _over_questions_of_both(a: _Side, b: _Side, level: float, rate: bool) -> Interval | None:
    if a[2] is None or b[2] is None:
        return None
    shared = set(a[2]) & set(b[2])
    sides = []
    for cheap, trusted, clusters, inclusion in (a, b):
        assert clusters is not None
        names = list(clusters)
        # In one order on both sides, so that question g is the same question.
        order = sorted((i for i, c in enumerate(names) if c in shared), key=lambda i, names=names: repr(names[i]))  # type: ignore[misc]
        pi = None if inclusion is None else floats(inclusion)[order]
        sides.append(Sample.of(floats(cheap)[order], floats(trusted)[order], [names[i] for i in order], "answers", pi))
    x, y = sides
    method, n = "PPI++, t over differences per question", x.n_all + y.n_all
    d = x.estimate - y.estimate
    ux, uy = x.influence(), y.influence()
    g = len(ux)
    if g < 2 or len(uy) != g:
        return undefined(d, n, "needs two questions in common, with cheap scores on both sides", g)
    variance = g / (g - 1) * float(((ux - uy) ** 2).sum())
    if rate:  # few hits show no spread between questions: lean on the assumed one, as if the two were independent
        fewer = min(x.hits, y.hits)
        assumed = 0.0
        for s in sides:
            p = max(min(max(s.estimate, 0.0), 1.0), 1 / s.n)
            assumed += s.assumed_effect() * p * (1 - p) / s.n
        variance = (fewer * variance + PRIOR_HITS * assumed) / (fewer + PRIOR_HITS)
    half = float(t_quantile(g - 1, level)) * math.sqrt(variance)
    low, high = (max(d - half, -1.0), min(d + half, 1.0)) if rate else (d - half, d + half)
    return Interval(d, low, high, n, method, OVER_QUESTIONS, g)
