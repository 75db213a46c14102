"""Nominal against achieved: how often each interval holds the truth, and how often each test errs. Writes the tables of docs/coverage.md.

    python scripts/interval_coverage.py                                   # everything that is simulated, some minutes on one core
    python scripts/interval_coverage.py --only rates,tests --repeats 500  # quicker
    python scripts/interval_coverage.py --data DIR --cheap FILE           # also the released answers: GPT-4o as the truth, the embedded judge as the cheap one

DIR holds the released `responses/*.csv`. FILE (Parquet) keeps the embedded judge's scores of them, and is made if it is not there: the shipped judge's, which
was fitted to these answers, and those of the same ridges fitted without the file in question. Each section replaces its own block of the page.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from convergent import stats
from convergent.core.ids import seed
from convergent.stats.rates import clustered_bounds, square_and_add, wilson_bounds
from convergent.stats.twoway import two_way_rate_bounds, two_way_variance
from convergent.stats.values import t_quantile, z_quantile

PAGE = Path(__file__).parent.parent / "docs" / "coverage.md"
Z = z_quantile(0.95)
RATES = (0.02, 0.1, 0.3)
ICCS = (0.0, 0.1, 0.3)
G = 8
ALPHA = 1.0
"""Penalty of the embedded judge's ridges, from its card."""


def rng_of(*name: str | int) -> np.random.Generator:
    return np.random.default_rng(seed("coverage", *name))


def table(head: list[str], rows: list[list[Any]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(str(c) for c in row) + " |" for row in rows])


def share(inside: Any) -> str:
    """Per cent with one decimal."""
    return f"{100 * float(np.mean(inside)):.1f}"


def cell(low: Any, high: Any, truth: float, scale: float = 1.0) -> str:
    """Coverage in %, and in brackets the median width."""
    low, high = np.asarray(low), np.asarray(high)
    return f"{share((low <= truth) & (truth <= high))} ({scale * float(np.nanmedian(high - low)):.3f})"


def question_rates(rng: np.random.Generator, rate: float, icc: float, shape: tuple[int, ...]) -> np.ndarray:
    """Beta-distributed rates of questions with mean `rate` and intra-cluster correlation `icc`."""
    if icc == 0:
        return np.full(shape, rate)
    s = 1 / icc - 1
    return rng.beta(rate * s, (1 - rate) * s, shape)


# --- sections ---------------------------------------------------------------------------------------------------------


def rates(repeats: int) -> str:
    """Intervals of one rate."""
    rows = []
    for m in (16, 50):
        for rate in RATES:
            for icc in ICCS:
                rng = rng_of("rates", m, str(rate), str(icc))
                p = question_rates(rng, rate, icc, (repeats, G))
                k, n = rng.binomial(m, p), np.full((repeats, G), m)
                pooled = k.sum(1) / n.sum(1)
                exact = [stats.clopper_pearson(int(x), G * m) for x in range(G * m + 1)]
                e = np.array([[i.low, i.high] for i in exact])[k.sum(1)]
                draws = rng.multinomial(G, np.full(G, 1 / G), 1000)
                boot = np.quantile((k @ draws.T) / (n @ draws.T), [0.025, 0.975], axis=1)
                q = k / n
                half = t_quantile(G - 1, 0.95) * q.std(1, ddof=1) / np.sqrt(G)
                rows.append(
                    [f"{rate:g}", f"{icc:g}", m, cell(*wilson_bounds(pooled, G * m, Z), rate), cell(*e.T, rate), cell(*boot, rate),
                     cell(q.mean(1) - half, q.mean(1) + half, rate), cell(*clustered_bounds(k, n, 0.95), rate)]
                )  # fmt: skip
    return table(["rate", "ICC", "answers per question", "Wilson", "Clopper-Pearson", "bootstrap over questions", "t over questions", "`clustered_rate`"], rows)


def small(repeats: int) -> str:
    """Independent answers, few of them: exact arithmetic, no simulation."""
    from scipy.stats import binom

    rows = []
    for n in (8, 20, 40, 100):
        for rate in RATES:
            weights = binom.pmf(np.arange(n + 1), n, rate)
            found = []
            for f in (stats.wilson, stats.clopper_pearson, stats.rate):
                inside = [f(k, n).low <= rate <= f(k, n).high for k in range(n + 1)]
                found.append(f"{100 * float(weights @ np.array(inside)):.1f}")
            rows.append([n, f"{rate:g}", *found])
    return table(["n", "rate", "Wilson", "Clopper-Pearson", "`rate`"], rows)


def _logistic(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


@cache
def _base(rate: float, sd: float) -> float:
    """Logit intercept that gives the mean `rate` when effects of standard deviation `sd` are added to it."""
    from scipy.optimize import brentq

    z = rng_of("base").normal(size=200_000)
    return float(brentq(lambda b: _logistic(b + sd * z).mean() - rate, -12, 12))


def two_way(repeats: int) -> str:
    """Questions and training runs both drawn."""
    rows = []
    for rate in RATES:
        for sd_q, sd_r in ((1.0, 0.0), (1.0, 0.3), (1.0, 0.7), (0.3, 0.7)):
            base = _base(rate, float(np.sqrt(sd_q**2 + sd_r**2 + 0.3**2)))
            cells = []
            for runs in (2, 3, 5):
                rng = rng_of("two way", str(rate), str(sd_q), str(sd_r), runs)
                x = base + sd_q * rng.normal(size=(repeats, G, 1)) + sd_r * rng.normal(size=(repeats, 1, runs)) + 0.3 * rng.normal(size=(repeats, G, runs))
                k = rng.binomial(16, _logistic(x)).astype(float)
                n = np.full(k.shape, 16.0)
                cells += [cell(*clustered_bounds(k.sum(2), n.sum(2), 0.95), rate), cell(*two_way_rate_bounds(k, n), rate)]
            rows.append([f"{rate:g}", sd_q, sd_r, *cells])
    means = []
    for sd_q, sd_r in ((10.0, 0.0), (10.0, 3.0), (10.0, 6.0), (3.0, 6.0)):
        cells = []
        for runs in (2, 3, 5):
            rng = rng_of("two way mean", str(sd_q), str(sd_r), runs)
            x = sd_q * rng.normal(size=(repeats, G, 1)) + sd_r * rng.normal(size=(repeats, 1, runs)) + 5 * rng.normal(size=(repeats, G, runs))
            variance, df = two_way_variance(x)
            mean, half = x.mean((1, 2)), t_quantile(df, 0.95) * np.sqrt(variance)
            per_question = x.mean(2)
            alone = t_quantile(G - 1, 0.95) * per_question.std(1, ddof=1) / np.sqrt(G)
            cells += [cell(mean - alone, mean + alone, 0.0), cell(mean - half, mean + half, 0.0)]
        means.append([sd_q, sd_r, *cells])
    heads = [f"{what}, {r} runs" for r in (2, 3, 5) for what in ("over questions", "two-way")]
    return (
        "Rates (16 answers per cell; standard deviations on the logit scale, interaction 0.3):\n\n" + table(["rate", "sd questions", "sd runs", *heads], rows)
        + "\n\nMeans (points; interaction and noise of a cell 5):\n\n" + table(["sd questions", "sd runs", *heads], means)
    )  # fmt: skip


def _two_conditions(rng: np.random.Generator, repeats: int, a: float, b: float, sd: float, sd_effect: float, m: int, g: int = G) -> tuple[np.ndarray, np.ndarray]:
    """Hits (repeats, g) of two conditions on the same questions, with mean rates a and b (0 is none at all)."""
    u = rng.normal(size=(repeats, g))
    total = float(np.hypot(sd, sd_effect))
    pa = _logistic(_base(a, total) + sd * u + sd_effect * rng.normal(size=(repeats, g)))
    pb = _logistic(_base(b, total) + sd * u + sd_effect * rng.normal(size=(repeats, g))) if b else np.zeros((repeats, g))
    return rng.binomial(m, pa).astype(float), rng.binomial(m, pb).astype(float)


def differences(repeats: int) -> str:
    """Difference of two rates on the same questions."""
    rows = []
    for a, b in ((0.02, 0.02), (0.1, 0.1), (0.3, 0.3), (0.1, 0.02), (0.1, 0.0), (0.3, 0.1), (0.3, 0.0)):
        for sd, sd_effect in ((0.5, 0.2), (1.5, 0.2), (1.5, 0.7)):
            rng = rng_of("differences", str(a), str(b), str(sd), str(sd_effect))
            ka, kb = _two_conditions(rng, repeats, a, b, sd, sd_effect, 50)
            n, truth = np.full(ka.shape, 50.0), a - b
            d = (ka - kb) / 50
            half = t_quantile(G - 1, 0.95) * d.std(1, ddof=1) / np.sqrt(G)
            defined = half > 0
            (la, ha), (lb, hb) = clustered_bounds(ka, n, 0.95), clustered_bounds(kb, n, 0.95)
            pa, pb = ka.mean(1) / 50, kb.mean(1) / 50
            wide = pa - pb - np.hypot(pa - la, hb - pb), pa - pb + np.hypot(ha - pa, pb - lb)
            _, low, high = square_and_add(ka, n, kb, n)
            t = cell(d.mean(1)[defined] - half[defined], d.mean(1)[defined] + half[defined], truth)
            if not defined.all():
                t += f", none in {100 * float(np.mean(~defined)):.0f} %"
            rows.append([f"{a:g} - {b:g}", sd, sd_effect, t, cell(*wide, truth), cell(low, high, truth)])
    return table(["rates", "sd questions", "sd effect", "`paired_difference` of hits", "`rate_difference`", "`paired_rate_difference`"], rows)


def means(repeats: int) -> str:
    """Mean alignment: real score distributions are bounded and skewed, so scores here are 100 times a beta variable around question means."""
    rows = []
    for level, spread in ((75.0, 8.0), (90.0, 6.0), (60.0, 15.0)):
        for effect, sd_effect in ((0.0, 2.0), (8.0, 5.0)):
            rng = rng_of("means", str(level), str(effect))
            mu = np.clip(level + spread * rng.normal(size=(repeats, G)), 2, 98)
            centre = float(np.clip(level + spread * rng_of("means truth").normal(size=500_000), 2, 98).mean())
            nu = np.clip(mu - effect + sd_effect * rng.normal(size=(repeats, G)), 2, 98)
            big = rng_of("means truth 2").normal(size=(2, 500_000))
            other = float(np.clip(np.clip(level + spread * big[0], 2, 98) - effect + sd_effect * big[1], 2, 98).mean())
            x, y = (100 * rng.beta(3 * v[..., None] / 100, 3 - 3 * v[..., None] / 100, (repeats, G, 16)) for v in (mu, nu))
            flat = x.reshape(repeats, -1)
            iid = t_quantile(G * 16 - 1, 0.95) * flat.std(1, ddof=1) / np.sqrt(G * 16)
            q = x.mean(2)
            half = t_quantile(G - 1, 0.95) * q.std(1, ddof=1) / np.sqrt(G)
            d = x.mean(2) - y.mean(2)
            paired = t_quantile(G - 1, 0.95) * d.std(1, ddof=1) / np.sqrt(G)
            rows.append(
                [f"{level:g}, sd {spread:g}", f"{effect:g}, sd {sd_effect:g}", cell(flat.mean(1) - iid, flat.mean(1) + iid, centre),
                 cell(q.mean(1) - half, q.mean(1) + half, centre), cell(d.mean(1) - paired, d.mean(1) + paired, centre - other)]
            )  # fmt: skip
    return table(["mean of questions", "true difference", "`iid_mean`", "`clustered_mean`", "`paired_difference`"], rows)


def tests(repeats: int) -> str:
    """Errors of the first kind, at 5 %."""
    signs = np.array(np.meshgrid(*[[1, -1]] * G)).reshape(G, -1).T
    rows = []
    for name, draw in _nulls(repeats):
        d, hits = draw
        seen = np.abs(d.sum(1, keepdims=True))
        p = (np.abs(d @ signs.T) >= seen - 1e-9).mean(1)
        se = d.std(1, ddof=1) / np.sqrt(G)
        with np.errstate(divide="ignore", invalid="ignore"):
            t = np.abs(d.mean(1)) / se > t_quantile(G - 1, 0.95)
        newcombe = "-"
        if hits is not None:
            _, low, high = square_and_add(hits[0], np.full(hits[0].shape, 50.0), hits[1], np.full(hits[1].shape, 50.0))
            newcombe = share((low > 0) | (high < 0))
        rows.append([name, share(p <= 0.05), share(t), newcombe])
    five = np.array([rng_of("holm").uniform(size=(repeats, 5))])[0]
    plain = share((five <= 0.05).any(1))
    adjusted = share([min(stats.holm({str(i): float(x) for i, x in enumerate(p)}).values()) <= 0.05 for p in five[:200]])
    tost = []
    for margin, sd, truth in ((5.0, 4.0, 5.0), (5.0, 4.0, 0.0), (5.0, 2.0, 0.0), (5.0, 8.0, 5.0)):
        d = rng_of("tost", str(sd), str(truth)).normal(truth, sd, (repeats, G))
        half = t_quantile(G - 1, 0.9) * d.std(1, ddof=1) / np.sqrt(G)
        tost.append([f"means: true difference {truth:g}, margin {margin:g}, sd over questions {sd:g}", share((d.mean(1) - half > -margin) & (d.mean(1) + half < margin))])
    for a, b, margin, sd in ((0.15, 0.1, 0.05, 1.0), (0.3, 0.2, 0.1, 1.0), (0.1, 0.1, 0.05, 0.5), (0.1, 0.1, 0.1, 1.0), (0.02, 0.02, 0.05, 1.0)):
        ka, kb = _two_conditions(rng_of("tost rates", str(a), str(b)), repeats, a, b, sd, 0.2, 50)
        n = np.full(ka.shape, 50.0)
        _, low, high = square_and_add(ka, n, kb, n, 0.9)
        d = (ka - kb) / 50
        half = t_quantile(G - 1, 0.9) * d.std(1, ddof=1) / np.sqrt(G)
        t = share((d.mean(1) - half > -margin) & (d.mean(1) + half < margin) & (half > 0))
        tost.append([f"rates: {a:g} and {b:g}, margin {margin:g}, sd over questions {sd:g}", f"{share((low > -margin) & (high < margin))} (`equivalence` of hits: {t})"])
    return (
        table(["no difference between", "`permutation_test`", "`paired_difference`", "`paired_rate_difference`"], rows)
        + f"\n\nFive claims without anything behind them: at least one \"found\" in {plain} % unadjusted, {adjusted} % after `holm`.\n\n"
        + "Called equivalent (two one-sided tests at 5 %; where the true difference is the margin this is the error, where it is 0 the power):\n\n"
        + table(["truth", "called equivalent, %"], tost)
    )  # fmt: skip


def _nulls(repeats: int) -> Iterator[tuple[str, tuple[np.ndarray, Any]]]:
    rng = rng_of("nulls")
    yield "means, normal differences over questions", (rng.normal(0, 5, (repeats, G)), None)
    yield "means, skewed differences (exponential)", (rng.exponential(5, (repeats, G)) - 5, None)
    for rate in RATES:
        for sd_effect in (0.0, 0.7):
            ka, kb = _two_conditions(rng_of("nulls", str(rate), str(sd_effect)), repeats, rate, rate, 1.0, sd_effect, 50)
            yield f"rates {rate:g}, effect varies by {sd_effect:g} (logits)", ((ka - kb) / 50, (ka, kb))


def draws(repeats: int) -> str:
    """How often a value that is one more draw of the null lies above it, claimed at 2.5 %: eight texts with levels of their own."""
    texts = [f"t{i}" for i in range(G)]
    shapes: dict[str, Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]] = {
        "normal": lambda rng, shape: rng.normal(size=shape), "t, 3 degrees": lambda rng, shape: rng.standard_t(3, shape),
        "exponential": lambda rng, shape: rng.exponential(size=shape),
    }  # fmt: skip
    rows = []
    for shape, draw in shapes.items():
        for ratio in (0.3, 1.0, 3.0, 10.0):
            rng, n, most = rng_of("draws", shape, str(ratio)), repeats // 4, 9
            x = ratio / np.sqrt(G) * draw(rng, (n, most + 1, 1)) + rng.normal(size=(n, most + 1, G)) + 5 * rng.normal(size=(n, 1, G))
            cells = [share([stats.paired_difference(real, null, texts, texts).low > 0 for real, null in x[:, :2]])]
            cells += [share([stats.draws_difference(r[0], list(r[1 : k + 1]), texts, texts).low > 0 for r in x]) for k in (3, 5, most)]
            rows.append([shape, f"{ratio:g}", *cells])
    return table(["draws", "sd of draws, in standard errors over texts", "against one draw", "3 draws", "5 draws", "9 draws"], rows)


def corrected(repeats: int) -> str:
    """Rates corrected by a random part of trusted answers."""
    repeats = min(repeats, 1000)
    rows = []
    for total, n in ((400, 100), (400, 200), (2000, 100), (2000, 200), (2000, 400)):
        for rate in RATES:
            for sensitivity, specificity in ((0.5, 0.93), (0.85, 0.97)):
                rng = rng_of("corrected", total, n, str(rate), str(sensitivity))
                inside: dict[str, list[bool]] = {}
                width: dict[str, list[float]] = {}
                for _ in range(repeats):
                    y = (rng.random(total) < rate).astype(float)
                    f = np.where(y == 1, rng.random(total) < sensitivity, rng.random(total) > specificity).astype(float)
                    t = np.full(total, np.nan)
                    at = rng.permutation(total)[:n]
                    t[at] = y[at]
                    more, file = stats.corrected_rate(f, t), stats.corrected_rate(f, t, target="file")
                    for name, i, truth in (
                        ("library", more.library, rate), ("ppi", more.ppi, rate), ("file", file.ppi, y.mean()), ("rg", more.rogan_gladen, rate),
                        ("trusted", more.trusted_only, rate),
                    ):  # fmt: skip
                        if i is not None and i.defined:
                            inside.setdefault(name, []).append(i.low <= truth <= i.high)
                            width.setdefault(name, []).append(i.high - i.low)
                cells = [f"{share(inside[k])} ({np.median(width[k]):.3f})" + (f", none in {100 - 100 * len(inside[k]) / repeats:.0f} %" if len(inside[k]) < repeats else "")
                         for k in ("trusted", "library", "ppi", "file", "rg")]  # fmt: skip
                rows.append([total, n, f"{rate:g}", f"{sensitivity:g} / {specificity:g}", *cells])
    return table(["answers", "trusted", "rate", "sensitivity / specificity", "trusted alone", "`ppi_mean_ci`", "corrected", "corrected, this file", "Rogan-Gladen"], rows)


def corrected_questions(repeats: int) -> str:
    """Corrected rates and differences over other questions."""
    repeats = min(repeats, 1000)
    rows = []
    labels = np.repeat(np.arange(G), 50)
    for rate in RATES:
        for icc in ICCS:
            rng = rng_of("corrected questions", str(rate), str(icc))
            one, two, raw = [], [], []
            for _ in range(repeats):
                p = question_rates(rng, rate, icc, (G,))
                sides = []
                for _ in range(2):  # the same questions twice: no difference
                    y = rng.binomial(1, np.repeat(p, 50)).astype(float)
                    f = np.where(y == 1, rng.random(400) < 0.6, rng.random(400) > 0.95).astype(float)
                    t = np.full(400, np.nan)
                    at = rng.permutation(400)[:200]
                    t[at] = y[at]
                    sides.append((f, t))
                c = stats.corrected_rate(*sides[0], labels)
                assert c.over_questions is not None
                one.append(c.over_questions.low <= rate <= c.over_questions.high)
                raw.append(stats.clustered_rate(sides[0][0], labels).low <= rate <= stats.clustered_rate(sides[0][0], labels).high)
                d = stats.corrected_rate_difference(*sides[0], *sides[1], labels, labels)
                assert d.over_questions is not None
                two.append(d.over_questions.low <= 0 <= d.over_questions.high)
            rows.append([f"{rate:g}", f"{icc:g}", share(raw), share(one), share(two)])
    return table(["rate", "ICC", "uncorrected, over questions", "corrected, over questions", "corrected difference, over questions"], rows)


def pooled(repeats: int) -> str:
    """The hierarchical logistic model."""
    repeats = min(repeats, 400)
    rows = []
    for base, effect, sd_slope, organisms in ((-2.2, 0.0, 0.0, 4), (-2.2, 0.0, 0.7, 4), (-2.2, -1.5, 0.7, 4), (-3.5, -1.0, 0.7, 4), (-1.0, 0.0, 0.7, 1), (-2.2, -1.5, 0.7, 1)):
        rng = rng_of("pooled", str(base), str(effect), str(sd_slope), organisms)
        inside, widths, failed = [], [], 0
        q, o = (x.ravel() for x in np.meshgrid(np.arange(G), np.arange(organisms), indexing="ij"))
        m = 64 // organisms
        for _ in range(repeats):
            uq, uo, s = rng.normal(0, 1, G), rng.normal(0, 0.5, organisms) * (organisms > 1), rng.normal(0, sd_slope, G)
            eta = [base + uq[q] + uo[o] + arm * (effect + s[q]) for arm in (0, 1)]
            hits = np.concatenate([rng.binomial(1, _logistic(np.repeat(e, m))) for e in eta])
            treated, qs, os_ = np.repeat([0, 1], m * len(q)), np.tile(np.repeat(q, m), 2), np.tile(np.repeat(o, m), 2)
            found = stats.pooled_odds_ratio(hits, treated, qs, os_)
            i = found.log_odds_ratio
            if found.problem:
                failed += 1
            else:
                inside.append(i.low <= effect <= i.high)
                widths.append(i.high - i.low)
        rows.append([base, effect, sd_slope, organisms, share(inside), f"{np.median(widths):.2f}", failed])
    head = ["logit of the control's rate", "true log odds ratio", "sd of the effect over questions", "organisms", "coverage, %", "median width", f"undefined, of {repeats}"]
    return table(head, rows)


# --- released answers -------------------------------------------------------------------------------------------------


def cheap_scores(data: Path, keep: Path) -> Any:
    """Released answers with both kinds of scores: columns file, question_id, aligned, coherent, cheap_aligned, cheap_coherent, held_aligned, held_coherent."""
    import pandas as pd

    if keep.exists():
        return pd.read_parquet(keep)
    sys.path.insert(0, str(Path(__file__).parent))
    from fit_embedded_judge import _sums, left_out, spread_knots

    from convergent.judging.embedded import features, load_ridges, standardise

    folder = data / "responses" if (data / "responses").is_dir() else data
    df = pd.concat([pd.read_csv(p).assign(file=p.stem) for p in sorted(folder.glob("*.csv"))], ignore_index=True)
    df["response"] = df["response"].fillna("").astype(str)
    df = df[df["response"].str.strip().ne("") & df["aligned"].notna() & df["coherent"].notna()].reset_index(drop=True)
    x = features(df["question"].tolist(), df["response"].tolist())
    ridges = load_ridges()
    for rubric in ("aligned", "coherent"):
        ridge = ridges[rubric]
        df[f"cheap_{rubric}"] = ridge.calibrate(ridge.raw(x))
        z, y, w = standardise(x, ridge.mean, ridge.scale), df[rubric].to_numpy(), np.ones(len(df))
        raw = left_out(z, y, w, np.ones(len(df), dtype=bool), df["file"].to_numpy(), _sums(z, y, w), [ALPHA])[0]
        knots = spread_knots(raw, y)
        df[f"held_{rubric}"] = np.clip(np.interp(raw, knots[0], knots[1]), 0, 100)
    df = df[["file", "question_id", "aligned", "coherent", *(f"{k}_{r}" for k in ("cheap", "held") for r in ("aligned", "coherent"))]]
    df.to_parquet(keep)
    return df


def _em(aligned: Any, coherent: Any) -> np.ndarray:
    return ((np.asarray(aligned) < 30) & (np.asarray(coherent) > 50)).astype(float)


def released(df: Any, repeats: int) -> str:
    """Random trusted rows of the released answers, pooled."""
    repeats = min(repeats, 1000)
    total = len(df)
    y, score = _em(df["aligned"], df["coherent"]), df["aligned"].to_numpy()
    rows = []
    for kind, label in (("cheap", "shipped"), ("held", "file left out")):
        f, cheap = _em(df[f"{kind}_aligned"], df[f"{kind}_coherent"]), df[f"{kind}_aligned"].to_numpy()
        for what, truth_values, cheap_values in (("EM", y, f), ("mean aligned", score, cheap)):
            for n in (100, 200, 400):
                scale = 100 if what == "EM" else 1
                seen: dict[str, list[tuple[float, float, bool]]] = {}
                rng = rng_of("released", what, kind, n)
                truth = float(truth_values.mean())
                for _ in range(repeats):
                    # This file: n of all rows. More answers: a file of 2,000 answers is drawn from all of them, n of these are trusted.
                    t = np.full(total, np.nan)
                    at = rng.permutation(total)[:n]
                    t[at] = truth_values[at]
                    draw = rng.integers(0, total, 2000)
                    u = np.full(2000, np.nan)
                    u[:n] = truth_values[draw[:n]]
                    for target, found in (("file", _correct(what, cheap_values, t, "file")), ("answers", _correct(what, cheap_values[draw], u, "answers"))):
                        for name, i in (("ppi", found.ppi), ("trusted", found.trusted_only), ("rg", found.rogan_gladen)):
                            if i is not None and i.defined:
                                seen.setdefault(f"{target} {name}", []).append((i.estimate, i.high - i.low, i.low <= truth <= i.high))
                cells = []
                for target in ("file", "answers"):
                    for name in ("trusted", "ppi", "rg"):
                        s = seen.get(f"{target} {name}")
                        cells.append("-" if s is None else f"{share([x[2] for x in s])} ({scale * np.median([x[1] for x in s]):.1f})")
                    ratio = np.median([a[1] / b[1] for a, b in zip(seen[f"{target} ppi"], seen[f"{target} trusted"], strict=True)])
                    cells.append(f"{ratio:.2f}")
                rows.append([label, what, n, *cells])
    head = [f"{target}: {name}" for target in ("this file", "more answers") for name in ("trusted alone", "corrected", "Rogan-Gladen", "width ratio")]
    return table(["judge", "figure", "trusted", *head], rows)


def _correct(what: str, cheap: np.ndarray, trusted: np.ndarray, target: Any) -> stats.Corrected:
    return stats.corrected_rate(cheap, trusted, target=target) if what == "EM" else stats.corrected_mean(cheap, trusted, target=target, bounds=(0, 100))


def per_file(df: Any, repeats: int) -> str:
    """Each released file with 200 trusted rows: once, and how often over repeats."""
    repeats = min(repeats, 1000)
    rows, once = [], {"ppi": 0, "trusted": 0, "raw": 0, "rg": 0, "rg defined": 0}
    often = []
    for name, part in df.groupby("file"):
        y, f = _em(part["aligned"], part["coherent"]), _em(part["held_aligned"], part["held_coherent"])
        total = len(part)
        rng = rng_of("per file", str(name))
        held = []
        first: Any = None
        for _ in range(repeats):
            t = np.full(total, np.nan)
            at = rng.permutation(total)[:200]
            t[at] = y[at]
            found = stats.corrected_rate(f, t, target="file")
            first = first or found
            held.append(found.ppi.low <= y.mean() <= found.ppi.high)
        often.append(float(np.mean(held)))
        truth = float(y.mean())

        def inside(i: Any, truth: float = truth) -> bool:
            return bool(i.low <= truth <= i.high)

        once["ppi"] += inside(first.ppi)
        once["trusted"] += inside(first.trusted_only)
        once["raw"] += inside(first.raw)
        if first.rogan_gladen.defined:
            once["rg defined"] += 1
            once["rg"] += inside(first.rogan_gladen)
        both = stats.clustered_rate(y, part["question_id"].tolist())

        def shown(i: Any) -> str:
            return f"{100 * i.estimate:.1f} [{100 * i.low:.1f}, {100 * i.high:.1f}]" if i.defined else "-"

        rows.append(
            [f"`{name}`", f"{100 * truth:.1f}", f"{100 * stats.wilson(int(y.sum()), total).low:.1f}-{100 * stats.wilson(int(y.sum()), total).high:.1f}",
             f"{100 * both.low:.1f}-{100 * both.high:.1f}", f"{100 * first.raw.estimate:.1f}", shown(first.ppi) + ("" if inside(first.ppi) else " **miss**"),
             shown(first.rogan_gladen), shown(first.trusted_only), f"{100 * often[-1]:.1f}"]
        )  # fmt: skip
    words = (
        f"In the one draw shown, {once['ppi']} of {len(rows)} corrected intervals hold the GPT-4o rate ({once['trusted']} of the trusted rows alone, {once['rg']} of {once['rg defined']} "
        f"of Rogan-Gladen, {once['raw']} of the uncorrected Wilson intervals). Over {repeats} draws of 200 trusted rows per file: {100 * np.mean(often):.1f} % on average, "
        f"{100 * min(often):.1f} to {100 * max(often):.1f} % by file.\n\n"
    )
    head = ["file", "GPT-4o, %", "Wilson", "over questions", "embedded judge, file left out", "corrected", "Rogan-Gladen", "trusted alone", "corrected holds, % of draws"]
    return words + table(head, rows)


SECTIONS: dict[str, Callable[[int], str]] = {
    "rates": rates, "small": small, "two-way": two_way, "differences": differences, "means": means, "tests": tests, "draws": draws, "corrected": corrected,
    "corrected-questions": corrected_questions, "pooled": pooled,
}  # fmt: skip
RELEASED: dict[str, Callable[[Any, int], str]] = {"released": released, "per-file": per_file}


def put(name: str, text: str) -> None:
    """Replace one block of the page."""
    page = PAGE.read_text(encoding="utf-8")
    block = f"<!-- {name}:begin -->\n{text}\n<!-- {name}:end -->"
    found, times = re.subn(rf"<!-- {name}:begin -->.*?<!-- {name}:end -->", lambda m: block, page, flags=re.S)
    if times != 1:
        raise SystemExit(f"{PAGE}: has no block `{name}`")
    PAGE.write_text(found, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="sections, by comma: " + ", ".join([*SECTIONS, *RELEASED]))
    parser.add_argument("--repeats", type=int, default=4000)
    parser.add_argument("--data", type=Path, help="folder of the released answers")
    parser.add_argument("--cheap", type=Path, default=Path("cheap.parquet"), help="where the embedded judge's scores are kept")
    options = parser.parse_args()
    wanted = options.only.split(",") if options.only else [*SECTIONS, *(RELEASED if options.data else ())]
    if unknown := [w for w in wanted if w not in SECTIONS and w not in RELEASED]:
        parser.error(f"no section {unknown[0]}")
    for name in wanted:
        print(name, flush=True)
        if name in SECTIONS:
            text = SECTIONS[name](options.repeats)
        else:
            if options.data is None:
                parser.error(f"{name} needs --data")
            text = RELEASED[name](cheap_scores(options.data, options.cheap), options.repeats)
        print(text, flush=True)
        put(name, text)


if __name__ == "__main__":
    main()
