"""Correction: by hand, against ppi-python, and whether corrected intervals hold the truth."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ppi_py import ppi_mean_ci, ppi_mean_pointestimate

from convergent import stats
from convergent.core.ids import seed
from convergent.errors import InputError

NAN = math.nan
CHEAP = [1, 1, 0, 0, 1, 0, 0, 0]
TRUSTED = [1, 0, 0, 0, NAN, NAN, NAN, NAN]


def study(rng: np.random.Generator, n_all: int, n: int, rate: float, sensitivity: float, specificity: float) -> tuple[Any, Any, Any]:
    """cheap, trusted (nan but for n random answers), and the truth of all."""
    y = (rng.random(n_all) < rate).astype(float)
    f = np.where(y == 1, rng.random(n_all) < sensitivity, rng.random(n_all) > specificity).astype(float)
    t = np.full(n_all, NAN)
    at = rng.permutation(n_all)[:n]
    t[at] = y[at]
    return f, t, y


def test_by_hand() -> None:
    # Covariance on the trusted 1/8, variance of all eight 15/56, as many trusted as not: weight (1/8) / (2 * 15/56).
    # Cheap mean of the others 1/4, of the trusted 1/2: 1/4 - weight / 4.
    weight = (1 / 8) / (2 * 15 / 56)
    got = stats.corrected_rate(CHEAP, TRUSTED)
    assert got.weight == pytest.approx(weight)
    assert got.ppi.estimate == pytest.approx(1 / 4 - weight / 4)
    assert (got.n, got.n_trusted, got.raw.estimate, got.trusted_only.estimate) == (8, 4, 3 / 8, 1 / 4)
    assert (got.sensitivity, got.specificity) == (1, pytest.approx(2 / 3))
    assert got.rogan_gladen is not None and got.rogan_gladen.estimate == pytest.approx((3 / 8 + 2 / 3 - 1) / (1 + 2 / 3 - 1))
    assert got.over_questions is None
    assert any("only 4 trusted" in note for note in got.notes) and any("only 1 trusted hits" in note for note in got.notes)


def test_estimate_weight_and_interval_are_those_of_the_library() -> None:
    rng = np.random.default_rng(seed("tests", "library"))
    f, t, _ = study(rng, 500, 150, 0.3, 0.7, 0.9)
    scores, noisy = rng.normal(60, 20, 500), np.full(500, NAN)
    noisy[:150] = scores[:150] * 0.8 + rng.normal(10, 8, 150)
    for got, cheap, trusted in ((stats.corrected_rate(f, t), f, t), (stats.corrected_mean(scores, noisy), scores, noisy)):
        at = ~np.isnan(trusted)
        args = trusted[at], cheap[at], cheap[~at]
        assert got.ppi.estimate == pytest.approx(float(np.squeeze(ppi_mean_pointestimate(*args))))
        low, high = ppi_mean_ci(*args, alpha=0.05)
        assert got.library.bounds == pytest.approx([float(np.squeeze(low)), float(np.squeeze(high))])
        assert 0 < got.weight <= 1
    # With many hits our own bounds are near the library's; t and n - 2 make those of the mean a little wider.
    assert got.ppi.bounds == pytest.approx(got.library.bounds, rel=0.01)
    rate = stats.corrected_rate(f, t)
    assert rate.ppi.bounds == pytest.approx(rate.library.bounds, abs=0.02)


def test_the_two_targets_share_the_estimate_and_the_file_is_known_better() -> None:
    f, t, y = study(np.random.default_rng(seed("tests", "targets")), 400, 200, 0.2, 0.7, 0.95)
    more, file = stats.corrected_rate(f, t), stats.corrected_rate(f, t, target="file")
    assert more.ppi.estimate == file.ppi.estimate
    assert file.ppi.high - file.ppi.low < 0.85 * (more.ppi.high - more.ppi.low)
    assert (more.ppi.generalises_over, file.ppi.generalises_over) == (stats.OVER_ANSWERS, stats.OF_THIS_FILE)
    everything = stats.corrected_rate(f, y, target="file")
    assert everything.ppi.bounds == pytest.approx([y.mean()] * 2) == everything.trusted_only.bounds
    whole = stats.corrected_rate(f, y)
    assert whole.ppi.bounds == pytest.approx(stats.wilson(int(y.sum()), 400).bounds) and whole.library.bounds is None
    mean = stats.corrected_mean(100 * f, 100 * y, target="file")
    assert mean.ppi.bounds == pytest.approx([100 * y.mean()] * 2)


def test_the_file_holds_at_least_what_was_seen() -> None:
    f, t, _ = study(np.random.default_rng(seed("tests", "floor")), 220, 200, 0.02, 0.5, 0.95)
    got = stats.corrected_rate(f, t, target="file")
    assert got.ppi.low >= np.nansum(t) / 220 - 1e-12 and got.ppi.high <= 1 - np.nansum(1 - t) / 220 + 1e-12


def test_without_a_trusted_hit_the_library_collapses_and_we_do_not() -> None:
    f = np.zeros(1000)
    f[:40] = 1
    t = np.full(1000, NAN)
    t[::10] = 0
    got = stats.corrected_rate(f, t)
    assert got.library.bounds == [0, 0]
    assert got.ppi.bounds == pytest.approx(stats.wilson(0, 100).bounds)
    assert got.rogan_gladen is not None and got.rogan_gladen.bounds is None and "no trusted hits" in got.rogan_gladen.method
    assert any("only 0 trusted hits" in note for note in got.notes)


def test_three_trusted_hits_that_the_judge_found_promise_little_about_the_next() -> None:
    f, t = np.zeros(2000), np.full(2000, NAN)
    f[:60] = 1
    t[:3], t[100:197] = 1, 0  # no error among 100 trusted answers
    got = stats.corrected_rate(f, t)
    # Nothing left unexplained, with the weight of 3 hits against 5: (1 - 0.05) * 5 / 8 + 0.05 of the variance of 100 answers.
    assert got.ppi.bounds == pytest.approx([*_wilson(got.ppi.estimate, 100 / (0.95 * 5 / 8 + 0.05))], rel=0.02)
    assert got.narrower > 0.75


def _wilson(p: float, n: float) -> tuple[float, float]:
    z = 1.959963984540054
    centre, half = (p + z * z / (2 * n)) / (1 + z * z / n), z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return centre - half, centre + half


def test_rogan_gladen_by_hand() -> None:
    # 200 answers, 50 called hits. Trusted: of 10 hits 8 called, of 90 misses 9 called.
    f, t = np.zeros(200), np.full(200, NAN)
    f[:8] = t[:10] = 1
    t[10:100] = 0
    f[10:19] = 1
    f[100:133] = 1
    got = stats.corrected_rate(f, t).rogan_gladen
    assert got is not None and f.mean() == 0.25 and got.estimate == pytest.approx((0.25 + 0.9 - 1) / (0.8 + 0.9 - 1))
    z = 1.959963984540054
    n, n1, n0 = 200 + z * z, 12, 92
    p, se, sp = (50 + z * z / 2) / n, 9 / 12, 82 / 92
    centre = (p + sp - 1) / (se + sp - 1)
    shift = 2 * z * z * (centre * se * (1 - se) / n1 - (1 - centre) * sp * (1 - sp) / n0)
    half = z * math.sqrt(p * (1 - p) / n + centre**2 * se * (1 - se) / n1 + (1 - centre) ** 2 * sp * (1 - sp) / n0) / (se + sp - 1)
    assert got.bounds == pytest.approx([max(centre + shift - half, 0), centre + shift + half])


def test_a_judge_no_better_than_chance_has_no_rogan_gladen_and_does_no_harm() -> None:
    rng = np.random.default_rng(seed("tests", "chance"))
    f, t, _ = study(rng, 2000, 300, 0.3, 0.2, 0.7)
    got = stats.corrected_rate(f, t)
    assert got.rogan_gladen is not None and got.rogan_gladen.bounds is None and any("no better than chance" in n for n in got.notes)
    assert got.weight == 0 and got.ppi.estimate == pytest.approx(got.trusted_only.estimate)
    assert got.narrower == pytest.approx(1, abs=0.01)


def test_a_good_judge_narrows_and_a_perfect_one_ends_at_all_answers() -> None:
    rng = np.random.default_rng(seed("tests", "good"))
    f, t, y = study(rng, 4000, 400, 0.3, 0.9, 0.97)
    assert 0.4 < stats.corrected_rate(f, t).narrower < 0.65
    perfect = stats.corrected_rate(y, t)
    assert perfect.ppi.estimate == pytest.approx(y.mean(), abs=0.005)  # the weight is estimated, so not exactly 1
    assert perfect.narrower < 0.45


def test_clusters_widen_and_are_labelled() -> None:
    rng = np.random.default_rng(seed("tests", "clusters"))
    labels = np.repeat([f"q{i}" for i in range(8)], 50)
    p = np.repeat(rng.beta(0.4, 1.6, 8), 50)
    y = rng.binomial(1, p).astype(float)
    f = np.where(rng.random(400) < 0.9, y, 1 - y)
    t = np.full(400, NAN)
    at = rng.permutation(400)[:200]
    t[at] = y[at]
    got = stats.corrected_rate(f, t, labels)
    assert got.over_questions is not None and got.over_questions.generalises_over == stats.OVER_QUESTIONS and got.over_questions.clusters == 8
    assert got.over_questions.high - got.over_questions.low > 1.5 * (got.ppi.high - got.ppi.low)
    full = stats.corrected_rate(f, y, labels).over_questions
    assert full is not None and full.bounds == pytest.approx(stats.clustered_rate(y, labels).bounds, abs=0.02)
    mean = stats.corrected_mean(100 * f, 100 * t, labels, bounds=(0, 100)).over_questions
    assert mean is not None and mean.low >= 0 and mean.estimate == pytest.approx(100 * got.ppi.estimate)
    assert stats.corrected_rate(f, t, ["one"] * 400).over_questions.bounds is None


def test_the_influence_of_questions_is_the_linearised_estimate() -> None:
    """Leaving no trusted answer out, the influence is that of the plain mean: sum over the question of (y - mean) / n."""
    from convergent.stats.ppi import Sample

    y, labels = np.array([1.0, 0, 0, 1, 1, 1]), list("aabbcc")
    s = Sample.of([0, 0, 1, 1, 0, 1], y, labels, "answers")
    assert s.influence() == pytest.approx([((y[2 * g : 2 * g + 2] - y.mean()).sum()) / 6 for g in range(3)])
    half = Sample.of(CHEAP, TRUSTED, list("aabbccdd"), "answers")
    assert half.influence().sum() == pytest.approx(0)
    survey = half.slope * np.mean(CHEAP) + np.mean(half.y - half.slope * half.f[half.at])
    assert survey == pytest.approx(half.estimate)  # the difference estimator of survey sampling


def test_differences_correct_a_judge_that_favours_one_side() -> None:
    rng = np.random.default_rng(seed("tests", "difference"))
    a, ta, _ = study(rng, 2000, 400, 0.2, 0.9, 0.80)  # kinder to b: fewer false alarms there
    b, tb, _ = study(rng, 2000, 400, 0.2, 0.9, 0.99)
    got = stats.corrected_rate_difference(a, ta, b, tb, np.arange(2000) % 8, np.arange(2000) % 8)
    assert got.raw.low > 0.08
    assert got.ppi.low < 0 < got.ppi.high and got.over_questions is not None and got.over_questions.low < 0 < got.over_questions.high
    assert got.ppi.high - got.ppi.low < got.trusted_only.high - got.trusted_only.low
    mean = stats.corrected_mean_difference(100 * a, 100 * ta, 100 * b, 100 * tb)
    assert mean.over_questions is None and mean.ppi.estimate == pytest.approx(100 * got.ppi.estimate)
    # Questions that one side lacks are left out of the paired one.
    q = np.arange(2000) % 8
    some = stats.corrected_rate_difference(a, ta, b, tb, q, np.where(q == 7, 8, q)).over_questions
    assert some is not None and some.clusters == 7


@settings(deadline=None, max_examples=60)
@given(n=st.integers(2, 60), rest=st.integers(0, 80), draw=st.randoms(use_true_random=False), target=st.sampled_from(["answers", "file"]))
def test_bounds_hold_the_estimate_and_stay_in_range(n: int, rest: int, draw: Any, target: Any) -> None:
    f = [float(draw.random() < 0.3) for _ in range(n + rest)]
    t = [float(draw.random() < 0.2) for _ in range(n)] + [NAN] * rest
    got = stats.corrected_rate(f, t, [i % 5 for i in range(n + rest)], target)
    for i in (got.ppi, got.over_questions, got.trusted_only, got.rogan_gladen):
        if i is not None and i.defined:
            assert 0 <= i.low <= i.high <= 1
    assert got.ppi.low <= got.ppi.estimate + 1e-12 and got.ppi.estimate - 1e-12 <= got.ppi.high


def test_all_trusted_and_all_alike_says_nothing_of_other_questions() -> None:
    over = stats.corrected_rate([1, 1], [1, 1], ["a", "b"], "file").over_questions
    assert over is not None and not over.defined and "do not differ" in over.method


def test_bad_input() -> None:
    with pytest.raises(InputError, match="0 or 1, got 85"):
        stats.corrected_rate([85, 1, 0], [1, 0, NAN])
    with pytest.raises(InputError, match="trusted hit is 0 or 1, got 2"):
        stats.corrected_rate([1, 1, 0], [1, 2, NAN])
    with pytest.raises(InputError, match="3 cheap scores but 2 trusted"):
        stats.corrected_rate([1, 0, 1], [1, 0])
    with pytest.raises(InputError, match="1 answers have both"):
        stats.corrected_rate([1, NAN, 1], [1, 0, NAN])
    with pytest.raises(InputError, match="target `all`"):
        stats.corrected_mean([1, 2, 3], [1, 2, NAN], target="all")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="one label per answer"):
        stats.corrected_mean([1, 2, 3], [1, 2, NAN], ["a"])
    left = stats.corrected_rate([1, 0, NAN, 1, 0], [1, 0, 1, NAN, NAN])
    assert (left.n, left.n_trusted, left.left_out) == (4, 2, 1) and any("no cheap score" in n for n in left.notes)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "ppi_py", None)
    with pytest.raises(InputError, match=r"convergent\[ppi\]"):
        stats.corrected_rate(CHEAP, TRUSTED)


def test_importing_the_library_leaves_warnings_alone() -> None:
    import subprocess
    import sys

    code = "import warnings; from convergent import stats; before = list(warnings.filters); stats.corrected_rate([1,0,1,0],[1,0,float('nan'),0]); print(warnings.filters == before)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "True"


# Coverage; the full tables are in docs/coverage.md


@pytest.mark.parametrize(("rate", "n_all", "n"), [(0.02, 2000, 100), (0.1, 2000, 200), (0.1, 400, 200), (0.3, 2000, 400)])
def test_corrected_rates_cover_where_the_library_does_not(rate: float, n_all: int, n: int) -> None:
    rng = np.random.default_rng(seed("tests", "coverage", str(rate), n_all))
    more, file, library = [], [], []
    for _ in range(300):
        f, t, y = study(rng, n_all, n, rate, 0.6, 0.95)
        a, b = stats.corrected_rate(f, t), stats.corrected_rate(f, t, target="file")
        more.append(a.ppi.low <= rate <= a.ppi.high)
        file.append(b.ppi.low <= y.mean() <= b.ppi.high)
        library.append(a.library.low <= rate <= a.library.high)
    assert np.mean(more) > 0.91 and np.mean(file) > 0.91  # 300 repeats: standard error 1.3 %
    if rate == 0.02:
        assert np.mean(library) < 0.9


def test_corrected_means_cover() -> None:
    rng = np.random.default_rng(seed("tests", "coverage of means"))
    inside, file = [], []
    for _ in range(300):
        y = 100 * rng.beta(4, 1, 600)
        f = np.clip(0.6 * y + 20 + rng.normal(0, 10, 600), 0, 100)
        t = np.full(600, NAN)
        t[:150] = y[:150]
        a, b = stats.corrected_mean(f, t), stats.corrected_mean(f, t, target="file")
        inside.append(a.ppi.low <= 80 <= a.ppi.high)
        file.append(b.ppi.low <= y.mean() <= b.ppi.high)
        assert a.narrower < 0.9
    assert 0.91 < np.mean(inside) < 0.985 and 0.91 < np.mean(file) < 0.985


# Unequal chances


def test_equal_inclusion_is_a_simple_random_part_but_for_the_weight() -> None:
    f, t, _ = study(np.random.default_rng(seed("tests", "equal")), 2000, 300, 0.3, 0.7, 0.95)
    plain, even = stats.corrected_rate(f, t), stats.corrected_rate(f, t, inclusion=np.full(2000, 0.15))
    assert even.ppi.estimate == pytest.approx(plain.ppi.estimate, abs=0.003)
    assert even.ppi.bounds == pytest.approx(plain.ppi.bounds, abs=0.005)
    assert even.trusted_only.bounds == pytest.approx(plain.trusted_only.bounds) and even.sensitivity == plain.sensitivity
    assert even.rogan_gladen.bounds == pytest.approx(plain.rogan_gladen.bounds)


@pytest.mark.parametrize("target", ["answers", "file"])
def test_answers_chosen_by_their_cheap_score_need_their_chances_and_then_cover(target: Any) -> None:
    rng = np.random.default_rng(seed("tests", "strata", target))
    inside, naive, means = [], [], []
    for _ in range(300):
        y = (rng.random(2000) < 0.1).astype(float)
        f = np.where(y == 1, rng.random(2000) < 0.6, rng.random(2000) > 0.95).astype(float)
        chance = np.where(f == 1, 0.5, 0.06)  # hits by the cheap judge are looked at more often
        t = np.where(rng.random(2000) < chance, y, NAN)
        truth = 0.1 if target == "answers" else y.mean()
        got, blind = stats.corrected_rate(f, t, target=target, inclusion=chance), stats.corrected_rate(f, t, target=target)
        inside.append(got.ppi.low <= truth <= got.ppi.high)
        naive.append(blind.ppi.low <= truth <= blind.ppi.high)
        mean = stats.corrected_mean(100 * f, 100 * t, target=target, inclusion=chance)
        means.append(mean.ppi.low <= 100 * truth <= mean.ppi.high)
    assert np.mean(inside) > 0.91 and np.mean(means) > 0.88
    assert np.mean(naive) < 0.5


def test_chances_are_checked() -> None:
    for bad in (0.0, 1.5, NAN):
        with pytest.raises(InputError, match="inclusion probability"):
            stats.corrected_rate(CHEAP, TRUSTED, inclusion=[0.5, bad, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5])
    with pytest.raises(InputError, match="one per answer"):
        stats.corrected_rate(CHEAP, TRUSTED, inclusion=[0.5])
