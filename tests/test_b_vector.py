"""One adapter's B against the direction: Jacobian products against finite differences, the parts of B, and a whole study."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from convergent import stats
from convergent.core.direction import Direction
from convergent.core.interventions import Add, LowRank
from convergent.directions.alignment import by_question, class_cosine, compared, group_sums, leaving_out, pushed
from convergent.directions.extract import chance_of_cosine, null_cosine
from convergent.directions.jacobian import Products, Written, jacobian_products
from convergent.errors import DirectionError, StudyError
from convergent.experiments import b_vector, b_vector_page
from convergent.experiments.b_vector import BVectorBlock, subject, without
from convergent.experiments.base import NotHereError
from convergent.experiments.outcomes import DRAWS
from convergent.experiments.scene import Scene, Subject
from convergent.interventions.hooks import applied
from convergent.interventions.weights import folded
from convergent.models.load import ChatModel, load_base
from convergent.models.texts import Text
from convergent.organisms.adapters import Adapter, AdapterShape
from convergent.store import looked_at
from convergent.study.main import run_study
from convergent.study.run import Run
from convergent.study.spec import load_study
from plain_peft import plain_peft
from small_study import small_study, write_study
from tiny import FAMILIES, SENTENCES, n_hooks, tiny_chat, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
LAYER = 2
TEXTS = [Text(str(i), *s.split("? ")) for i, s in enumerate(SENTENCES[:3])]
ONE_GROUP = torch.zeros(len(TEXTS), dtype=torch.long)


def wide(family: str = "llama") -> ChatModel:
    """A tiny model in float64, so that finite differences are less drowned in rounding; norms and rotations go on in float32 inside."""
    chat = load_base(str(tiny_model(family)), dtype="float32", device="cpu")
    chat.model.double()
    return chat


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def at_layer(chat: ChatModel, u: Tensor, layer: int = LAYER) -> Direction:
    vectors = torch.zeros(chat.n_layers, chat.d_model)
    vectors[layer] = u.float()
    return Direction(vectors)


def difference(chat: ChatModel, change: Any, step: float) -> Tensor:
    """(n_layers, d_model) central difference of the mean answer activation; its error falls with the square of the step."""
    plus, minus = (group_sums(chat, TEXTS, ONE_GROUP, interventions=(change(sign * step),)) for sign in (1, -1))
    found: Tensor = (plus[0][0] - minus[0][0]) / plus[1][0] / (2 * step)
    return found


def mean_products(products: list[Products], row: int) -> Tensor:
    """(n_later, d_model) mean over answer tokens."""
    return sum(p.sums[row] for p in products) / sum(p.n_tokens for p in products)  # type: ignore[return-value]


# --- Jacobian products


@pytest.mark.parametrize("family", FAMILIES)
def test_a_product_is_the_derivative_of_the_mean_answer_activation(family: str) -> None:
    chat = wide(family)
    pushes = draw(2, chat.d_model).float().double()
    found = list(jacobian_products(chat, TEXTS, LAYER, pushes))
    for row in range(2):
        want = difference(chat, lambda e, row=row: Add(at_layer(chat, pushes[row]), LAYER, e), 1e-3)[LAYER:]
        assert_close(mean_products(found, row), want, rtol=1e-3, atol=1e-4)
    assert n_hooks(chat.model) == 0


def test_the_difference_converges_to_the_product_with_the_square_of_the_step() -> None:
    chat = wide()
    push = draw(1, chat.d_model).float().double()
    exact = mean_products(list(jacobian_products(chat, TEXTS, LAYER, push)), 0)
    errors = [
        float((difference(chat, lambda e: Add(at_layer(chat, push[0]), LAYER, e), step)[LAYER:] - exact).norm() / exact.norm())
        for step in (0.08, 0.04, 0.02, 0.01)
    ]
    assert errors[0] > 1e-6, "the first step is large enough to see its error"
    for coarse, fine in pairwise(errors):
        assert 3 < coarse / fine < 5, f"halving the step divides the error by 4: {errors}"


def test_a_written_push_is_what_the_adapter_writes() -> None:
    """Against the difference of a LowRank of growing size, which the hook engine runs."""
    chat = wide()
    a, b, scale = 0.1 * draw(1, 64, seed=1).float(), draw(chat.d_model, 1, seed=2).float(), 1.7
    linear = chat.anatomy.mlp_linears[LAYER]
    assert linear is not None
    written = Written(linear, a, scale, b.T.double())
    found = list(jacobian_products(chat, TEXTS, LAYER, draw(1, chat.d_model), written=written))
    assert found[0].sums.shape == (2, chat.n_layers - LAYER, chat.d_model)
    want = difference(chat, lambda e: LowRank(LAYER, "mlp.down_proj", a, b, scale * e), 1e-3)[LAYER:]
    assert_close(mean_products(found, 1), want, rtol=1e-3, atol=1e-4)
    other = mean_products(list(jacobian_products(chat, TEXTS, LAYER, b.T.double())), 0)
    assert (other - want).norm() > 0.1 * want.norm(), "a constant push is another thing"


def test_at_its_own_block_a_push_is_itself_and_products_are_linear() -> None:
    chat = wide()
    u, w = draw(2, chat.d_model)
    found = list(jacobian_products(chat, TEXTS, LAYER, torch.stack([u, w, 2 * u - 3 * w])))
    for p in found:
        assert_close(p.sums[:2, 0], p.n_tokens * torch.stack([u, w]))
        assert_close(p.sums[2], 2 * p.sums[0] - 3 * p.sums[1], rtol=1e-4, atol=1e-4)
        assert_close(p.along[0], p.squares[0])  # a push lies along itself, token by token
        assert bool((p.along <= p.squares * (1 + 1e-9)).all())


def test_a_push_that_does_not_fit_is_refused_and_an_empty_answer_left_out() -> None:
    chat = tiny_chat()
    with pytest.raises(DirectionError, match=r"\(1, 31\) at the output of block 2.*needs \(pushes, 32\)"):
        list(jacobian_products(chat, TEXTS, LAYER, torch.ones(1, 31)))
    with pytest.raises(DirectionError, match="one of blocks 0 to 5"):
        list(jacobian_products(chat, TEXTS, 6, torch.ones(1, 32)))
    found = list(jacobian_products(chat, [TEXTS[0], Text("empty", "What?", ())], LAYER, torch.ones(1, 32)))
    assert [p.text for p in found] == ["0"]
    assert n_hooks(chat.model) == 0


# --- sums by question, and what is left when one is left out


def test_texts_are_taken_from_the_questions_in_turn() -> None:
    question_of = {f"{q}{i}": q for q in "abc" for i in range(4 if q == "a" else 2)}
    taken = by_question(question_of, list(question_of), 5, 0)
    assert sorted(question_of[i] for i in taken) == ["a", "a", "b", "b", "c"]
    assert taken == by_question(question_of, list(question_of)[::-1], 5, 0), "whatever the order they come in"
    assert taken != by_question(question_of, list(question_of), 5, 1)
    assert sorted(by_question(question_of, list(question_of), None, 0)) == sorted(question_of)


def test_leaving_out_by_hand() -> None:
    kept = leaving_out(3, lambda keep: keep @ torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64))
    assert kept == {"all": 7.0, "without": [6.0, 5.0, 3.0]}


def test_sums_by_question_add_up_to_the_mean() -> None:
    chat = tiny_chat()
    sums, mass = group_sums(chat, TEXTS, torch.tensor([0, 2, 0]), n_groups=4)
    whole, n = group_sums(chat, TEXTS, ONE_GROUP)
    assert mass[1] == mass[3] == 0 and not sums[1].any() and mass.sum() == n
    assert_close(sums.sum(0), whole[0])


def test_cosine_with_a_direction_without_a_question_by_hand() -> None:
    b = torch.tensor([1.0, 0.0], dtype=torch.float64)
    bad = torch.tensor([[2.0, 0.0], [0.0, 6.0]], dtype=torch.float64), torch.tensor([1.0, 2.0], dtype=torch.float64)
    good = torch.tensor([[0.0, 0.0], [3.0, 3.0]], dtype=torch.float64), torch.tensor([1.0, 1.0], dtype=torch.float64)
    kept = class_cosine(b, bad, good)  # of all (2/3, 2) - (3/2, 3/2); without the first question (0, 3) - (3, 3); without the second (2, 0) - (0, 0)
    assert kept["all"] == pytest.approx((-5 / 6) / math.hypot(-5 / 6, 1 / 2)) and kept["without"] == pytest.approx([-1, 1])


def test_the_parts_of_a_change_add_up_to_its_cosine() -> None:
    shifts = {"organism": draw(4, 3, 8), "v": draw(4, 3, 8, seed=1), "B along v": draw(4, 3, 8, seed=2)}
    shifts["rest of B"] = shifts["organism"] - shifts["B along v"]
    kept = compared(shifts, "organism", "v")
    for pick in ("all", 0, 3):
        value = {k: np.array(v["all"] if pick == "all" else v["without"][pick]) for k, v in kept.items()}
        np.testing.assert_allclose(value["part/B along v"] + value["part/rest of B"], value["v"])
    total = {k: s[1:].sum(0) for k, s in shifts.items()}
    want = torch.nn.functional.cosine_similarity(total["organism"], total["v"], dim=-1)
    np.testing.assert_allclose(kept["v"]["without"][0], want)


def test_a_planted_b_is_seen_in_the_products() -> None:
    """B = v: all of it along v, by its own component. B orthogonal to v: nothing at its block, and what is there further down is the rest's."""
    chat = tiny_chat()
    v = draw(chat.d_model)
    groups = {t.id: i for i, t in enumerate(TEXTS)}
    for b in (3 * v, draw(chat.d_model, seed=1)):
        b = b if torch.equal(b, 3 * v) else b - (b @ v) / (v @ v) * v
        own = float(b @ v / (v @ v))
        products = jacobian_products(chat, TEXTS, LAYER, torch.stack([v, b]))
        found = pushed(products, groups, ["v", "B"], "v", ("B", own))
        cosine, direct = np.array(found["cosine"]["B"]["all"]), np.array(found["direct"]["all"])
        if own > 1:
            np.testing.assert_allclose(cosine, 1, atol=1e-5)
            np.testing.assert_allclose(direct, 1, atol=1e-5)
            np.testing.assert_allclose(found["token"]["B"]["all"], 1, atol=1e-5)
        else:
            assert abs(cosine[0]) < 1e-6 and np.abs(direct).max() < 1e-6 and np.abs(cosine[1:]).min() > 1e-4
        assert len(found["cosine"]["B"]["without"]) == 3 and found["n_texts"] == 3


def test_the_exact_law_of_chance() -> None:
    d = 40
    assert chance_of_cosine(null_cosine(d, 0.95), d) == pytest.approx(0.05)
    r = np.random.default_rng(0).standard_normal((20_000, d))
    seen = np.mean(np.abs(r[:, 0] / np.linalg.norm(r, axis=1)) >= 0.3)
    assert chance_of_cosine(-0.3, d) == pytest.approx(seen, abs=0.006)
    # Beside the published 0.04: the median of the largest of 200 random |cos| in 5,120 dimensions.
    assert null_cosine(5120, 0.5 ** (1 / 200)) == pytest.approx(0.041, abs=0.001)


# --- the interval


def test_values_left_out_elsewhere_give_the_jackknife_s_interval() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal(24)
    labels = [i % 6 for i in range(24)]
    whole = stats.jackknife(lambda r: float(x[r].mean()), labels, -math.inf, math.inf)
    without = [float(np.delete(x, np.arange(g, 24, 6)).mean()) for g in range(6)]
    assert stats.leave_one_out(float(x.mean()), without, 24) == whole
    assert stats.leave_one_out(1.0, [1.0], 3) == "needs two questions"
    assert "not a number" in str(stats.leave_one_out(1.0, [1.0, math.nan], 3))


def test_the_interval_of_a_cosine_of_sums_covers() -> None:
    """Eight questions, each with its own change of 30 dimensions around true ones whose cosine is 0.5."""
    rng = np.random.default_rng(1)
    a, b = np.zeros(30), np.zeros(30)
    a[0], b[0], b[1] = 1, 0.5, math.sqrt(0.75)
    hits = 0
    for _ in range(400):
        x, y = (u + 0.15 * rng.standard_normal((8, 30)) for u in (a, b))
        kept = leaving_out(8, lambda keep, x=x, y=y: torch.nn.functional.cosine_similarity(keep @ torch.tensor(x), keep @ torch.tensor(y), dim=0))
        made = b_vector_page.interval({"c": kept}, lambda k: float(k["c"]), 8)
        truth = 0.5 / (1 + 30 * 0.15**2 / 8)  # noise in the sums shortens the cosine: it is that of eight questions that is estimated
        hits += made.low <= truth <= made.high
    assert 0.90 <= hits / 400 <= 0.99, hits


# --- B without v


def test_b_without_v_is_orthogonal_and_as_long() -> None:
    chat = tiny_chat()
    v = draw(chat.d_model)
    adapter = Adapter(LAYER, "mlp.down_proj", draw(1, 64, seed=1).float(), draw(chat.d_model, 1, seed=2).float(), 0.5)
    change = without(adapter, v)
    b = (adapter.b + change.b)[:, 0].double()
    assert float(b @ v / (b.norm() * v.norm())) == pytest.approx(0, abs=1e-6) and float(b.norm()) == pytest.approx(float(adapter.b.norm()), rel=1e-6)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        with folded(chat.anatomy, [LowRank(LAYER, adapter.module, adapter.a, b[:, None].float(), adapter.scale)]):
            want = chat.model(input_ids=ids).logits
        with folded(chat.anatomy, [adapter.low_rank()]), applied(chat.anatomy, [change]):
            assert_close(chat.model(input_ids=ids).logits, want, rtol=1e-4, atol=1e-4)


# --- which organism, which adapter


def scene(**organisms: AdapterShape | None) -> Scene:
    return Scene({o: Subject(o, o, 0, "bad", "x", a) for o, a in organisms.items()}, next(iter(organisms)), 6, 3)


NINE, ONE = AdapterShape(("down",), (1, 2, 3, 4), 1), AdapterShape(("down",), (2,), 1)


def test_the_organism_with_one_adapter_is_found() -> None:
    assert subject(BVectorBlock(), scene(A=NINE, S=ONE)) == ("S", 2)
    assert subject(BVectorBlock(), scene(A=NINE)) == ("A", 3), "of several, the one nearest to the primary layer"
    assert subject(BVectorBlock(organism="A", layer=1), scene(A=NINE, S=ONE)) == ("A", 1)


@pytest.mark.parametrize(
    ("settings", "shape", "says"),
    [
        ({}, None, r"organism: A is a full fine-tune and has no B vector; name one with a rank-1 adapter"),
        ({}, AdapterShape(("down", "q"), (2,), 1), r"organism: A has adapters of rank 1 on down, q;"),
        ({}, AdapterShape(("down",), (2,), 4), r"organism: A has adapters of rank 4 on down;"),
        ({"organism": "chat"}, ONE, r"organism: chat has no adapters"),
        ({"layer": 5}, ONE, r"layer: A has no adapter at block 5; it has them at 2"),
        ({}, AdapterShape(("down",), (5,), 1), r"layer: nothing is downstream of block 5"),
    ],
)
def test_organisms_without_a_b_vector_are_refused_in_one_sentence(settings: dict[str, Any], shape: AdapterShape | None, says: str) -> None:
    with pytest.raises(NotHereError, match=says):
        b_vector.check(BVectorBlock(**settings), scene(A=shape))


@pytest.mark.parametrize(
    ("block", "says"),
    [
        ({"organism": "B"}, r"experiments\.b_vector\.organism: B has adapters of rank 2 on"),
        ({"organism": "Z"}, r"experiments\.b_vector\.organism: no organism 'Z'"),
        ({"scale": 0}, r"experiments\.b_vector\.scale: got 0\.0; a finite coefficient other than 0"),
        ({"texts": 0}, r"experiments\.b_vector\.texts"),
        ({"layer": 40}, r"experiments\.b_vector\.layer: A has no adapter at block 40"),
        ({"random": 0}, r"experiments\.b_vector\.random"),
    ],
)
def test_bad_settings_are_one_line_and_nothing_is_written(block: dict[str, Any], says: str, tmp_path: Path) -> None:
    study = small_study(tiny_model())
    study["experiments"] = {"b_vector": block}
    with pytest.raises(StudyError, match=says):
        run_study(write_study(tmp_path, study), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- a whole study


def one_adapter_study(base: Path, folder: Path, **block: Any) -> dict[str, Any]:
    study = small_study(base)
    study["organisms"] = {"S": {"path": str(folder)}}
    study["direction"]["source"] = "S"
    study["experiments"] = {"plain": {}, "b_vector": {"jacobian_texts": 4, "jacobian_random": 19, **block}}
    return study


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An organism that plain PEFT wrote, run through the experiment."""
    folder = tmp_path_factory.mktemp("b_vector")
    plain_peft(folder / "peft", tiny_model(), layers=[LAYER])
    path = write_study(folder, one_adapter_study(tiny_model(), folder / "peft"))
    run_study(path, folder / "out")
    return path, folder / "out"


def values_of(path: Path, out: Path) -> tuple[dict[str, Any], dict[str, str]]:
    with looked_at(out) as store:
        return Run(load_study(path), store, compute=False).values()


def test_a_whole_study(finished: tuple[Path, Path]) -> None:
    path, out = finished
    found, absent = values_of(path, out)
    assert not absent and len(found) == 6
    cosine = found["b_vector/cosine"]
    assert cosine["cosine"]["all"] == pytest.approx(cosine["layers"][LAYER], abs=1e-5), "the direction is found again from its questions"
    assert len(cosine["null"]) == 200 and len(cosine["cosine"]["without"]) == 2
    down = found["b_vector/downstream"]
    for label in ("misaligned", "aligned"):
        kept = down[label]["kept"]
        # At its own block the organism's change is B times a number, and what is added is v.
        assert abs(kept["v"]["all"][0]) == pytest.approx(abs(cosine["cosine"]["all"]), abs=1e-4)
        assert kept["part/B along v"]["all"][0] + kept["part/rest of B"]["all"][0] == pytest.approx(kept["v"]["all"][0], abs=1e-4)
        assert kept["part/rest of B"]["all"][0] == pytest.approx(0, abs=1e-4)
        assert kept["random"]["all"][0] != kept["orthogonal"]["all"][0]
        assert len({tuple(v["all"]) for k, v in kept.items() if k.startswith("random")}) == 19 and not any(k.startswith("other_concept,") for k in kept)
    jacobian = found["b_vector/jacobian/organism-reads-organism"]
    assert jacobian["cosine"]["B"]["all"][0] == pytest.approx(cosine["cosine"]["all"], abs=1e-5) == jacobian["direct"]["all"][0]
    assert jacobian["cosine"]["v"]["all"] == pytest.approx([1] * 4) and set(jacobian["cosine"]) >= {"B as written", "other concept", "random 2"}
    claims = {c["id"]: c for c in json.loads((out / "claims.json").read_text())}
    assert {f"b_vector/{c}" for c in ("orthogonal", "downstream", "rest", "jacobian", "everywhere", "at-layer", "in-b")} <= set(claims)
    said = [e["text"] for e in claims["b_vector/downstream"]["evidence"]]
    assert len(said) == 5 and sum("the largest |cosine| of 19 draws" in t for t in said) == 3
    assert len(claims["b_vector/jacobian"]["evidence"]) == 6
    page = (out / "report.html").read_text()
    for figure in ("cosine", "downstream", "jacobian", "parts"):
        assert f'id="fig-b_vector-{figure}"' in page
    numbers = pd.read_csv(out / "tables" / "b_vector-numbers.csv")
    assert len(numbers) == 2 + 8 + 12 and numbers["Here"].notna().all()


def test_readings_are_made_once(finished: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path, out = finished
    before = (out / "claims.json").read_text()
    monkeypatch.setattr(Run, "model", lambda *a, **k: pytest.fail("a model was loaded again"))
    run_study(path, out)
    assert (out / "claims.json").read_text() == before


def test_another_seed_or_setting_is_another_reading(finished: tuple[Path, Path], tmp_path: Path) -> None:
    path, out = finished

    def keys(**block: Any) -> list[str]:
        changed = write_study(tmp_path / str(len(list(tmp_path.iterdir()))), one_adapter_study(tiny_model(), path.parent / "peft", **block))
        with looked_at(out) as store:
            run = Run(load_study(changed), store, compute=False)
            return [run.reading_key(r) for r in run.readings if DRAWS not in r]  # their vectors hang on readings that are not made again here

    assert keys() == keys() and not set(keys()) & set(keys(jacobian_random=20))
    assert keys() == keys(null_draws=7)


def test_where_a_norm_follows_the_adapter_b_is_no_vector_of_the_stream(tmp_path: Path) -> None:
    base = tiny_model("olmo2")
    plain_peft(tmp_path / "peft", base, layers=[LAYER])
    study = one_adapter_study(base, tmp_path / "peft")
    run_study(write_study(tmp_path, study), tmp_path / "out")
    _, absent = values_of(tmp_path / "study.yaml", tmp_path / "out")
    assert "a norm follows it" in absent["b_vector/cosine"]
    assert "S/b-in-b is left out" in (tmp_path / "out" / "report.html").read_text()


def test_a_vector_of_zeros_is_refused_and_says_why() -> None:
    """After one step of a warm-up B is still zero, and taking v out of it would divide by nothing."""

    class Untrained:
        def adapters(self, organism: str) -> tuple[Adapter, ...]:
            return (Adapter(3, "mlp.down_proj", torch.ones(1, 8), torch.zeros(4, 1), 256.0),)

    with pytest.raises(NotHereError, match="B of S at block 3 is zero, as at the start of training"):
        b_vector.adapter_of(Untrained(), "S", 3)  # type: ignore[arg-type]
