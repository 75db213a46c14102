"""Geometry of directions: by hand, against scipy, and against a truth that was planted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles
from torch.testing import assert_close

from convergent import stats
from convergent.core.ids import seed
from convergent.directions import geometry
from convergent.directions.compare import CHAT, compare, wanted
from convergent.directions.questions import QuestionSums
from convergent.errors import DirectionError
from synthetic_sums import drawn_sums, unit

pytestmark = pytest.mark.usefixtures("one_thread")
Q, LAYERS, D = 8, 2, 24


def rng_of(name: str) -> np.random.Generator:
    return np.random.default_rng(seed("tests", "geometry", name))


def flat(v: np.ndarray, size: float = 1.0) -> np.ndarray:
    """(Q, LAYERS, D) the same difference for every question and layer."""
    return np.broadcast_to(size * v, (Q, LAYERS, len(v))).copy()


def test_removing_dimensions_by_hand():
    v = torch.arange(1.0, 9).reshape(2, 4)
    assert geometry.without(v, torch.tensor([[0, 3], [1, 2]])).tolist() == [[0, 2, 3, 0], [5, 0, 0, 8]]
    assert geometry.without(torch.stack([v, v]), torch.tensor([[0], [1]])).shape == (2, 2, 4)
    assert_close(geometry.cosines(torch.tensor([[3.0, 4]]), torch.tensor([[4.0, 3]])), torch.tensor([0.96]))


def test_largest_dimensions_are_those_of_the_mean_activation_not_of_v():
    sums = drawn_sums(flat(5 * np.eye(D)[7]), "massive", common=-50.0)
    assert geometry.largest_dimensions(sums, 1).tolist() == [[0], [0]]
    assert sums.direction().abs().argmax(1).tolist() == [7, 7]


def test_reliability_is_the_share_of_signal():
    """|v|^2 / (|v|^2 + noise): with 48 answers per class and noise 1, the noise of v is 2 D / 48."""
    size = 1.5
    truth = size**2 / (size**2 + 2 * D / 48)
    found = [float(geometry.reliability(drawn_sums(flat(unit("r", D), size), f"r{i}"), 0, 16)[0]) for i in range(20)]
    assert np.mean(found) == pytest.approx(truth, abs=0.05)
    nothing = [float(geometry.reliability(drawn_sums(flat(unit("r", D), 0), f"n{i}"), 0, 16)[0]) for i in range(20)]
    assert np.mean(nothing) < 0.3
    sums = drawn_sums(flat(unit("r", D), size), "w")
    part = QuestionSums(sums.questions[1:], sums.sums[:, :, 1:], sums.mass[:, :, 1:])
    left = geometry.reliability(sums, 0, 64, torch.tensor([0.0] + [1.0] * 7))
    assert_close(left, geometry.reliability(part, 0, 64), atol=0.06, rtol=0)  # other splits, the same answers


def test_halves_of_unequal_size_do_not_turn_questions_into_noise():
    """Five answers a cell: 3 against 2. Questions that lie far apart must not make the halves of a direction opposites, nor scrambled labels large."""
    v = flat(unit("odd", D), 3.0)
    plain = drawn_sums(v, "odd", n=5)
    place = torch.from_numpy(100 * rng_of("odd").standard_normal((Q, LAYERS, D)))
    moved = QuestionSums(plain.questions, (plain.sums.double() + plain.mass[..., None, None] * place).float(), plain.mass)
    assert_close(geometry.reliability(moved, 0, 16), geometry.reliability(plain, 0, 16), atol=1e-3, rtol=0)
    assert geometry.reliability(moved, 0, 16).min() > 0.7
    assert_close(geometry.scrambled(moved, 0, "A", 5), geometry.scrambled(plain, 0, "A", 5), atol=1e-3, rtol=0)


def test_scrambled_labels_leave_noise_but_not_the_direction():
    v = unit("s", D)
    sums = drawn_sums(flat(v, 20.0), "s")
    found = geometry.scrambled(sums, 0, "A", 50)
    assert found.shape == (50, LAYERS, D)
    along, size = (found @ torch.from_numpy(v)).abs().mean(), found.norm(dim=-1).mean()
    assert along < 0.5 * size and size < 3  # the direction itself has length 20
    assert not torch.equal(found, geometry.scrambled(sums, 0, "B", 50)) and torch.equal(found, geometry.scrambled(sums, 0, "A", 50))
    rows = geometry.scrambled_differences(sums, 0, "A")
    assert rows.shape == (Q, LAYERS, D) and (rows @ torch.from_numpy(v)).abs().max() < 5


def test_scrambled_labels_find_more_than_random_vectors_do_where_answers_differ_along_few_lines():
    """The reason for the floor: answers that differ along one line make two scrambled directions far less orthogonal than random vectors are."""
    rng, line = rng_of("line"), unit("line", D)
    both = [drawn_sums(np.zeros((Q, LAYERS, D)), f"line{i}", noise=0.05) for i in range(2)]
    round_ = [drawn_sums(np.zeros((Q, LAYERS, D)), f"round{i}") for i in range(2)]
    for s in both:
        s.sums.add_(torch.from_numpy(rng.standard_normal((2, 2, Q, LAYERS, 1)) * line).float())
    found = [float(geometry.cosines(*(geometry.scrambled(s, 0, str(i), 100) for i, s in enumerate(pair))).abs().mean()) for pair in (both, round_)]
    assert found[0] > 0.4 and found[1] < 1.5 / D**0.5


def test_spans_and_angles_against_scipy():
    rng = rng_of("angles")
    a, b = (torch.from_numpy(rng.standard_normal((n, LAYERS, D))) for n in (3, 5))
    found = geometry.principal_cosines(geometry.span(a), geometry.span(b))
    for layer in range(LAYERS):
        expected = np.sort(np.cos(subspace_angles(a[:, layer].numpy().T, b[:, layer].numpy().T)))[::-1]
        assert found[layer].numpy() == pytest.approx(expected, abs=1e-10)
    assert_close(geometry.overlap(geometry.span(a), geometry.span(b)), found.square().mean(1))
    assert_close(geometry.overlap(geometry.span(a), geometry.span(torch.cat([a, b]))), torch.ones(LAYERS, dtype=torch.float64))
    twice = geometry.span(torch.cat([a, 2 * a]))
    assert (twice.norm(dim=2) > 0).sum(1).tolist() == [3, 3], "a span is no wider than its rows"
    chance = np.mean([float(geometry.overlap(*(geometry.span(torch.from_numpy(rng.standard_normal((4, 1, D)))) for _ in "ab"))[0]) for _ in range(200)])
    assert chance == pytest.approx(4 / D, abs=0.02)


def test_top_basis_finds_a_planted_subspace_and_is_nested():
    rng = rng_of("basis")
    planted = np.linalg.qr(rng.standard_normal((D, 3)))[0].T
    rows = torch.from_numpy(rng.standard_normal((24, 3)) * [4, 2, 1] @ planted + 0.01 * rng.standard_normal((24, D)))
    basis = geometry.top_basis(rows, 3)
    assert np.cos(subspace_angles(basis.numpy().T, planted.T)).min() > 0.999
    assert_close(basis @ basis.T, torch.eye(3, dtype=torch.float64))
    assert torch.equal(geometry.top_basis(rows, 2), basis[:2]) and torch.equal(geometry.top_basis(-rows, 3), basis)
    assert len(geometry.top_basis(torch.stack([rows[0], 2 * rows[0]]), 4)) == 1
    assert len(geometry.top_basis(torch.zeros(2, D), 4)) == len(geometry.top_basis(torch.zeros(0, D), 4)) == 0


def test_joint_rows_weigh_organisms_alike():
    rng = rng_of("joint")
    parts = [torch.from_numpy(size * rng.standard_normal((n, 1, D))) for size, n in ((1.0, 2), (100.0, 8))]
    made = geometry.joint_rows(parts)
    assert_close(made[:2].square().sum(), torch.tensor(1.0, dtype=torch.float64))
    assert_close(made[2:].square().sum(), torch.tensor(1.0, dtype=torch.float64))


def test_jackknife_of_each_component_is_that_of_each_alone():
    x = rng_of("each").standard_normal((8, 3))
    labels = [f"q{i}" for i in range(8)]
    calls = []

    def both(rows):
        calls.append(len(rows))
        return np.array([np.corrcoef(x[rows, 0], x[rows, 1])[0, 1], np.nan])

    one, none = stats.jackknife_each(both, labels, -1, 1)
    assert one == stats.jackknife(lambda rows: float(np.corrcoef(x[rows, 0], x[rows, 1])[0, 1]), labels, -1, 1)
    assert sorted(calls) == [7] * 8 + [8] and not none.defined and "empty" in none.method


@pytest.mark.parametrize("noise", [0.3, 1.0])
def test_jackknife_interval_of_a_cosine_and_of_its_excess_covers(noise):
    """Eight questions that differ in truth: an interval over questions holds what such studies find on the mean."""
    rng, d, repeats = rng_of(f"coverage{noise}"), 16, 250
    shared, text = unit("shared", d), unit("text", d)
    found = []
    for _ in range(repeats):
        question = rng.standard_normal((8, d)) * 0.5
        one, two, chat_one, chat_two = (s * shared + text + question + noise * rng.standard_normal((8, d)) for s in (1.0, 1.0, 0.0, 0.0))

        def both(rows, a=one, b=two, c=chat_one, e=chat_two):
            own, chat = (float(x[rows].mean(0) @ y[rows].mean(0) / np.linalg.norm(x[rows].mean(0)) / np.linalg.norm(y[rows].mean(0))) for x, y in ((a, b), (c, e)))
            return np.array([own, own - chat])

        labels = [f"q{i}" for i in range(8)]
        found.append((stats.jackknife_each(both, labels, -1, 1)[0], stats.jackknife_each(both, labels, -2, 2)[1]))
    for intervals in zip(*found, strict=True):
        truth = np.mean([i.estimate for i in intervals])
        assert np.mean([i.low <= truth <= i.high for i in intervals]) >= 0.91


def study_of(name: str, shared: float, alone: float) -> dict[tuple[str, str], QuestionSums]:
    """Two organisms and the chat model: texts give all the same difference; organisms add a `shared` direction and one of their own (`alone`)."""
    texts = flat(unit("text", D), 3.0) + 0.5 * rng_of(name).standard_normal((Q, 1, D))
    own = {o: texts + flat(unit("shared", D), shared) + flat(unit(f"{name}{o}", D), alone) for o in "AB"}
    made = {}
    for whose, reader in wanted("AB", "A"):
        # Noise of answers is the same whoever reads them.
        made[whose, reader] = drawn_sums(texts if reader == CHAT else own[reader], f"{name}{whose}", noise=0.5)
    return made


def compared(sums, **changed):
    settings = {"layer": 1, "allowed": 0, "massive": 2, "splits": 4, "draws": 20, "root_seed": 0, **changed}
    return compare(sums, "AB", "A", lambda a, b: ("families",), **settings)


def test_a_direction_shared_beyond_the_texts_is_found():
    value = compared(study_of("planted", 4.0, 0.0))
    measures = value["groups"]["families"]["measures"]
    for what in ("own-chat", "common-common_chat", "own_kept-chat_kept"):
        assert measures[what]["low"][1] > 0, what
    assert value["pairs"][0]["own-chat at layer"]["low"] == measures["own-chat"]["low"][1]
    assert value["groups"]["families"]["lowest"]["own"]["y"] == min(measures["own"]["y"])
    assert measures["own"]["low"][1] > value["scrambled"]["families"]["high"][1]
    assert value["organisms"]["A"]["with_chat"][0] < 0.7 and value["organisms"]["A"]["reliability"][0] > 0.8
    # With the allowed exception the lowest is the second lowest.
    assert compared(study_of("planted", 4.0, 0.0), allowed=1)["groups"]["families"]["lowest"]["own"]["y"] == max(measures["own"]["y"])
    with pytest.raises(DirectionError, match="24 dimensions would be removed of 24"):
        compared(study_of("planted", 4.0, 0.0), massive=24)


def test_where_only_the_texts_are_alike_nothing_is_found():
    """Twenty studies whose organisms have each a direction of its own: likeness beyond the texts is claimed in none."""
    found = [compared(study_of(f"nothing{i}", 0.0, 3.0))["groups"]["families"]["measures"] for i in range(20)]
    assert np.mean([m["own"]["y"][1] for m in found]) > 0.2, "the texts make them alike"
    assert sum(m["own-chat"]["low"][1] > 0 or m["common-common_chat"]["low"][1] > 0 for m in found) <= 1
