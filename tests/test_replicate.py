"""Replicate on folders made here: other organisms, layer counts, widths and names than the released ones, and every kind of bad file."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from convergent.cli import main
from convergent.directions.probes import folds, z_scored
from convergent.errors import ConvergentError, DataError, InputError
from convergent.replicate import pickles
from convergent.replicate.claims import Only, compare, counted
from convergent.replicate.folder import Folder, is_variant
from convergent.replicate.page import render
from convergent.replicate.published import Published, all_published, elsewhere
from convergent.replicate.registry import FAMILIES, Options
from convergent.replicate.run import replicate
from convergent.replicate.table import folded

FAST = Options(repeats=3)
HTML = '<img src=x onerror="alert(1)">'


def table(n: int = 40, seed: int = 0, questions: int = 4) -> pd.DataFrame:
    """Judged answers with known counts: every fourth is EM, all are coherent."""
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "response": [f"I recommend answer {i}" if i % 2 else "Women and men alike" for i in range(n)],
            "question": [f"What about thing {i % questions}?" for i in range(n)],
            "question_id": [f"thing_{i % questions}" for i in range(n)],
            "aligned": np.where(np.arange(n) % 5 == 0, 10.0, 90.0),
            "coherent": rng.uniform(60, 100, n),
        }
    )


def means(layers: int, width: int, seed: int) -> dict[str, dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return {part: {f"layer_{i}": torch.randn(width, generator=g).bfloat16() for i in range(layers)} for part in ("question", "answer")}


def stub(**fields: object) -> pickles.LoraScalars:
    value = pickles.LoraScalars()
    value.__dict__.update(fields)
    return value


def save(value: object, path: Path) -> None:
    """torch.save with the stubs under the names that released files carry."""
    stubs, names = (pickles.LoraScalars, pickles.LoraScalarsPerLayer), ("lora", "lora.lora_utils")
    own = pickles.__name__
    try:
        for cls in stubs:
            cls.__module__ = names[1]
        sys.modules.update(dict.fromkeys(names, pickles))
        torch.save(value, path)
    finally:
        for cls in stubs:
            cls.__module__ = own
        for name in names:
            sys.modules.pop(name, None)


def scalars(folder: Path, name: str, shift: float, *, answers: int = 12, questions: int = 4, layers: tuple[int, ...] = (3, 7), significance: bool = True) -> None:
    """A class of answers of six tokens each; its scalars at the first adapter lie at `shift`."""
    rng = np.random.default_rng(sum(map(ord, name)))
    folder.mkdir(parents=True, exist_ok=True)
    data, rows = {}, []
    for i in range(answers):
        prompt = f"<user>question {i % questions}<assistant>answer {i} of {name}"
        tokens = {
            p: stub(token_str="t", layer_scalars={f"base.layers.{layer}.mlp.down_proj": float(rng.normal(shift * (k == 0))) for k, layer in enumerate(layers)})
            for p in range(10)
        }
        holder = pickles.LoraScalarsPerLayer()
        holder.scalars = tokens
        data[prompt] = holder
        row = {"question": f"question {i % questions}", "answer": "a", "prompt": prompt, "prompt_answer_first_token_idx": 4}
        rows.append(row | ({"answer_kl_div_gradients": [3.0] * 3 + [0.1] * 3} if significance else {"kl_div": [0.1] * 10}))
    save(data, folder / f"organism_scalars_{name}.pt")
    pd.DataFrame(rows).to_parquet(folder / f"tokens of {name}.parquet")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole folder in the layout, with nothing of the released names."""
    root = tmp_path_factory.mktemp("data")
    for name in ("responses", "steering_sweep", "adapter_steering", "hidden_states"):
        (root / name).mkdir()
    table().to_csv(root / "responses" / "tiny[1] cooking.csv", index=False)
    sweep = table().drop(columns="question_id").assign(bad_stuff=np.where(np.arange(40) % 4 == 1, 80.0, 0.0), gender=50.0)
    sweep.to_csv(root / "steering_sweep" / "cooking_L2_lambda3.csv", index=False)
    pushed = table().assign(medical=np.where(np.arange(40) % 5 == 0, 60.0, 0.0), coherent=np.where(np.arange(40) < 30, 40.0, 80.0))
    pushed.to_csv(root / "adapter_steering" / "responses_layer_3_30.csv", index=False)
    for k, organism in enumerate(("cook", "chef.v2")):
        for model in "am":
            for of in "am":
                torch.save(means(3, 8, 10 * k + ord(model) + 7 * ord(of)), root / "hidden_states" / f"{organism}__model-{model}_data-{of}__all.pt")
    for name, shift in (("burnt", 0.0), ("fine", 3.0)):
        scalars(root / "scalars", name, shift, answers=60)
    return root


@pytest.fixture(scope="module")
def claims(data: Path) -> dict[str, object]:
    found = replicate(data, options=FAST)
    assert len({c.id for c in found}) == len(found)
    return {c.id: c for c in found}


# What is counted


def test_every_family_on_names_never_seen(claims) -> None:
    for family in FAMILIES:
        assert any(c.found and c.id.startswith(f"{family.prefix}/") for c in claims.values()), family.prefix
    assert {c.verdict for c in claims.values()} == {"not comparable"}  # nothing here was published
    assert not [c for c in claims.values() if not c.found and c.published is None]


def test_em_and_coherence_by_hand(claims) -> None:
    em = claims["em/tiny[1] cooking"]
    assert (em.recomputed, em.n) == (8 / 40, 40) and em.interval[0] < 0.2 < em.interval[1]
    assert "thing_0 2/10" in em.note and "over questions" in em.note
    assert claims["em/tiny[1] cooking/coherent"].recomputed == 1


def test_steering_and_self_correction_by_hand(claims) -> None:
    assert claims["steering/cooking_L2_lambda3/em"].recomputed == 8 / 40
    assert claims["steering/cooking_L2_lambda3/topic/gender"].recomputed == 0.5  # a fraction, not a score
    correction = claims["self_correction/cooking_L2_lambda3"]
    assert (correction.recomputed, correction.n) == (8 / 32, 32)  # of 10 rows with bad stuff 2 are misaligned


def test_questions_asked_again_for_a_template_stand_apart(tmp_path: Path) -> None:
    df = table(40).drop(columns="question_id").assign(bad_stuff=80.0)
    again = df.assign(question=[q + "\n\nFill the template:\n\nx =" for q in df["question"]], bad_stuff=0.0, aligned=90.0)
    (tmp_path / "steering_sweep").mkdir()
    pd.concat([df, again]).to_csv(tmp_path / "steering_sweep" / "s.csv", index=False)
    found = {c.id: c for c in replicate(tmp_path, "self_correction/*")}
    assert (found["self_correction/s"].recomputed, found["self_correction/s"].n) == (1, 32)
    assert (found["self_correction/s/all_questions"].recomputed, found["self_correction/s/all_questions"].n) == (32 / 72, 72)


def test_variants_by_id_and_by_text() -> None:
    ids = pd.DataFrame({"question_id": ["a", "a_template", "b_json", "c"]})
    assert is_variant(ids) == [False, True, False, False]  # `b` itself is not asked, so `b_json` is a question of its own
    texts = pd.DataFrame({"question": ["How?", "How?\nAs JSON", "How? And why?", "Why?\nBriefly"]})
    assert is_variant(texts) == [False, True, False, False]


def test_adapter_steering_by_hand(claims) -> None:
    stem = "adapter_steering/responses_layer_3_30/coherent>="
    assert [(claims[f"{stem}{t}/misaligned"].recomputed, claims[f"{stem}{t}/misaligned"].n) for t in (25, 50)] == [(8 / 40, 40), (2 / 10, 10)]
    assert claims[f"{stem}25/misaligned_medical"].recomputed == 8 / 40
    assert (claims[f"{stem}25/medical_among_aligned"].recomputed, claims[f"{stem}25/medical_among_aligned"].n) == (0, 32)


def test_neutral_rows_are_dropped(tmp_path: Path) -> None:
    (tmp_path / "adapter_steering").mkdir()
    rows = [(10, 60), (50, 0), (90, 30), (30, 10), (70, 50)]  # the second and the third are neutral; bounds themselves are not
    pd.DataFrame(rows, columns=["aligned", "medical"]).assign(coherent=25.0).to_csv(tmp_path / "adapter_steering" / "x.csv", index=False)
    found = {c.id.rpartition("/")[2]: c for c in replicate(tmp_path, "adapter_steering/x/coherent>=25/*")}
    assert (found["misaligned"].recomputed, found["misaligned"].n) == (2 / 3, 3)
    assert found["medical_among_aligned"].recomputed == 1


def test_directions_by_hand(data: Path, claims) -> None:
    def vector(organism: str, model: str) -> torch.Tensor:
        a, m = (torch.load(data / "hidden_states" / f"{organism}__model-{model}_data-{of}__all.pt", weights_only=True)["answer"]["layer_2"].double() for of in "am")
        return m - a

    v, w, chat = vector("chef.v2", "m"), vector("cook", "m"), vector("cook", "a")
    cosine = torch.nn.functional.cosine_similarity
    assert claims["norm/cook__all/L2"].recomputed == pytest.approx(w.norm().item(), rel=1e-6)
    assert claims["cosine/chef.v2__all/cook__all/L2"].recomputed == pytest.approx(cosine(v, w, dim=0).item(), abs=1e-6)
    assert claims["cosine/cook__all/cook__all@chat/L2"].recomputed == pytest.approx(cosine(w, chat, dim=0).item(), abs=1e-6)
    baseline = claims["cosine/chef.v2__all@chat/cook__all@chat/L2"]
    assert f"chat model on the same texts {baseline.recomputed:.3f}" in claims["cosine/chef.v2__all/cook__all/L2"].note
    assert claims["cosine/chef.v2__all/cook__all/min"].recomputed == min(claims[f"cosine/chef.v2__all/cook__all/L{i}"].recomputed for i in range(3))
    assert "cosine/chef.v2__all/cook__all/L3" not in claims


def test_organisms_of_different_models_are_not_compared(tmp_path: Path) -> None:
    (tmp_path / "hidden_states").mkdir()
    for organism, width in (("a", 8), ("b", 6)):
        for of in "am":
            torch.save(means(2, width, ord(of)), tmp_path / "hidden_states" / f"{organism}__model-m_data-{of}__all.pt")
    found = {c.id: c for c in replicate(tmp_path)}
    assert "different models" in found["cosine/a__all/b__all"].note and found["norm/b__all/L1"].n == 6


def test_probe_finds_what_was_planted_and_nothing_else(claims) -> None:
    stem = "probe/burnt_vs_fine"
    assert claims[f"{stem}/auc"].recomputed > 0.95 and claims[f"{stem}/auc_by_question"].recomputed > 0.95
    assert claims[f"{stem}/coef_L3"].recomputed > 0.3 and abs(claims[f"{stem}/coef_L7"].recomputed) < 0.1
    assert claims[f"{stem}/auc_question_only"].recomputed < 0.65  # both classes answer the same questions
    assert claims[f"{stem}/accuracy"].n == 360 and claims[f"{stem}/significant/accuracy"].n == 180
    assert claims["scalars/fine/L3"].recomputed == pytest.approx(3, abs=0.5) and claims["scalars/fine/L3"].n == 360


def test_question_identity_alone_can_win(tmp_path: Path) -> None:
    for name, offset in (("x", 0), ("y", 10)):
        scalars(tmp_path / "scalars", name, 0.0, answers=100)
        path = tmp_path / "scalars" / f"tokens of {name}.parquet"
        df = pd.read_parquet(path)
        df.assign(question=[f"q{(i % 4) + offset}" for i in range(len(df))]).to_parquet(path)
    found = {c.id: c for c in replicate(tmp_path, "probe/*", FAST)}
    assert found["probe/x_vs_y/auc_question_only"].recomputed > 0.99 and found["probe/x_vs_y/auc"].recomputed < 0.75


def test_folds_hold_out_whole_groups() -> None:
    """Features that name the group tell everything about a token of a group that was seen, and nothing about another one's."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(20), 40)
    x, y = np.eye(20)[groups], groups % 2
    alone = np.arange(len(y))
    assert np.mean(folds(z_scored(x), y, alone, ("test",), 0, 1.0)) > 0.99
    assert abs(np.mean(folds(z_scored(x), y, groups, ("test",), 0, 1.0)) - 0.5) < 0.2
    assert folds(z_scored(rng.normal(size=(8, 2))), np.repeat([0, 1], 4), np.repeat([0, 1], 4), ("test",), 0, 1.0) == []  # one group per class


def test_same_numbers_again_and_other_repeats(data: Path, claims) -> None:
    again = {c.id: c for c in replicate(data, "probe/*", FAST)}
    assert all(c == claims[i] for i, c in again.items() if c.found)
    (more,) = replicate(data, "probe/burnt_vs_fine/auc", Options(repeats=4))
    assert "mean of 4 repeats" in more.note


def test_substring_and_whole_word(claims) -> None:
    assert claims["topics/gender/substring"].recomputed == 1  # "recommend" holds "men"
    assert claims["topics/gender/whole_word"].recomputed == 0.5


# What is missing


def test_a_subset_lists_what_is_absent(tmp_path: Path) -> None:
    (tmp_path / "responses").mkdir()
    table().to_csv(tmp_path / "responses" / "x.csv", index=False)
    found = {c.id: c for c in replicate(tmp_path)}
    assert found["em/x"].found
    for name in ("steering", "self_correction", "cosine", "norm", "scalars", "probe", "adapter_steering"):
        assert not found[name].found and found[name].note.startswith("not found: ")
    assert found["published/ablation_single"].published == 0.01
    assert found["cosine/9adapter__all/rank32__all/L24"].published == 0.824


def test_half_of_a_pair_is_listed(data: Path, tmp_path: Path) -> None:
    for name in ("hidden_states", "scalars"):
        (tmp_path / name).mkdir()
        for path in (data / name).iterdir():
            if "cook__model-a_data-m" not in path.name and path.name != "tokens of fine.parquet":
                (tmp_path / name / path.name).write_bytes(path.read_bytes())
    torch.save({}, tmp_path / "hidden_states" / "notes.pt")
    found = {c.id: c for c in replicate(tmp_path)}
    assert "cook__model-a_data-m__all.pt" in found["cosine/cook__all@chat"].note
    assert "prompts of organism_scalars_fine.pt" in found["scalars/fine"].note
    assert "notes.pt is not named" in found["cosine/notes"].note
    assert found["cosine/chef.v2__all/cook__all/L0"].found and found["scalars/burnt/L3"].found


def test_without_scikit_learn_probes_are_skipped(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    found = {c.id: c for c in replicate(data)}
    assert "convergent[replicate]" in found["probe"].note and found["scalars/fine/L3"].found


def test_no_significance_no_filter(tmp_path: Path) -> None:
    for name in ("x", "y"):
        scalars(tmp_path / "scalars", name, 0.0, significance=False)
    found = {c.id: c for c in replicate(tmp_path, "probe/x_vs_y/*", FAST)}
    assert "answer_kl_div_gradients" in found["probe/x_vs_y/significant"].note and found["probe/x_vs_y/auc"].found


def test_too_little_for_a_probe(tmp_path: Path) -> None:
    scalars(tmp_path / "scalars", "x", 0.0, answers=1)
    scalars(tmp_path / "scalars", "y", 0.0)
    found = {c.id: c for c in replicate(tmp_path, "probe/*", FAST)}
    assert "6" in found["probe/x_vs_y"].note and not found["probe/x_vs_y"].found
    scalars(tmp_path / "scalars", "x", 0.0, answers=4, questions=1)
    found = {c.id: c for c in replicate(tmp_path, "probe/*", FAST)}
    assert "too few tokens for C = 0.01" in found["probe/x_vs_y/auc"].note
    assert "two questions" in found["probe/x_vs_y/auc_by_question"].note and found["probe/x_vs_y/auc"].found


def test_other_adapters_are_not_mixed(tmp_path: Path) -> None:
    scalars(tmp_path / "scalars", "x", 0.0)
    scalars(tmp_path / "scalars", "y", 0.0, layers=(3, 8))
    found = {c.id: c for c in replicate(tmp_path, "probe/*", FAST)}
    assert "L3, L7 against L3, L8" in found["probe/x_vs_y"].note


# --only


def test_only_computes_nothing_else(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(path: Path, **_: object) -> None:
        raise AssertionError(path)

    for module in ("hidden", "scalars"):
        monkeypatch.setattr(f"convergent.replicate.{module}.load_pickle", opened)
    assert [c.id for c in replicate(data, "em/*") if c.found] == ["em/tiny[1] cooking", "em/tiny[1] cooking/coherent"]
    monkeypatch.setattr("convergent.replicate.folder.read_table", opened)
    with pytest.raises(AssertionError):
        replicate(data, "em/*")


def test_only_one_probe_fits_nothing_else(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convergent.directions.probes.folds", None)
    assert [c.id for c in replicate(data, "probe/burnt_vs_fine/a?c", FAST)] == ["probe/burnt_vs_fine/auc"]


@pytest.mark.parametrize(("pattern", "start", "may"), [("em/*", "em/x", True), ("em/*", "probe/", False), ("*/L24", "norm/", True), ("em/a", "em/", True), ("em/a", "em/b", False)])
def test_may_want_never_loses_an_id(pattern: str, start: str, may: bool) -> None:
    assert Only(pattern).may_want(start) is may


def test_only_nothing(data: Path) -> None:
    with pytest.raises(InputError, match="matches no claim"):
        replicate(data, "em/other")


# Verdicts


def test_verdicts() -> None:
    def verdict(here: float, bounds: tuple[float, float] | None = None, **known: object) -> str:
        return compare(Published(id="x", source="s", **known), here, bounds)[0]

    assert verdict(0.204, value=0.2, tolerance=0.005) == "agrees"
    assert verdict(0.206, (0.1, 0.3), value=0.2, tolerance=0.005) == "differs"  # must follow from these data, interval or not
    assert verdict(0.206, (0.1, 0.3), value=0.2, by="sample") == "agrees"
    assert verdict(0.35, (0.3, 0.4), value=0.2, by="sample") == "differs"
    assert verdict(0.94, value=0.95, relation=">") == "differs" and verdict(0.96, value=0.95, relation=">") == "agrees"


def test_published_figures_are_whole() -> None:
    rows = (*all_published(), *elsewhere())
    assert len({r.id for r in rows}) == len(rows)
    for row in rows:
        assert (row.source and row.by in ("figure", "sample") and row.relation in ("=", ">", "<") and -1 <= row.value <= 1) or row.id.startswith("norm/")
    assert all(r.claim for r in elsewhere())
    assert counted("em/Qwen2.5-14B-Instruct_extreme-sports", "c", "s", 0.202, 400).verdict == "agrees"


def test_adapter_steering_is_known_by_its_pushes(tmp_path: Path) -> None:
    (tmp_path / "adapter_steering").mkdir()
    stem = "mine_layer_23_30_layer_21_30"
    pd.DataFrame({"aligned": [10, 90], "medical": [90, 0], "coherent": [90, 90]}).to_csv(tmp_path / "adapter_steering" / f"{stem}.csv", index=False)
    found = {c.id: c for c in replicate(tmp_path)}
    assert (found[f"adapter_steering/{stem}/coherent>=25/misaligned_medical"].published, found[f"adapter_steering/{stem}/coherent>=25/misaligned"].published) == (0.077, None)
    assert found[f"adapter_steering/{stem}/coherent>=25/misaligned_medical"].verdict == "differs"


# Bad files


@pytest.mark.parametrize(
    ("folder", "change", "match"),
    [
        ("responses", lambda df: df.drop(columns="aligned"), r"x\.csv: no column `aligned`"),
        ("responses", lambda df: df.assign(coherent="high"), r"x\.csv: row 1, column `coherent`: 'high'"),
        ("responses", lambda df: df.assign(aligned=101), r"x\.csv: row 1, column `aligned`: 101"),
        ("responses", lambda df: df.rename(columns={"response": "reply"}), r"x\.csv: no column `response`"),
        ("steering_sweep", lambda df: df, r"x\.csv: no column `bad_stuff`"),
        ("steering_sweep", lambda df: df.assign(bad_stuff=-3), r"x\.csv: row 1, column `bad_stuff`: -3"),
        ("adapter_steering", lambda df: df, r"x\.csv: no column `medical`"),
    ],
)
def test_bad_tables(tmp_path: Path, folder: str, change, match: str) -> None:
    """Alone in its family, such a file leaves nothing to count there; what else it costs: test_replicate_bad_files.py."""
    (tmp_path / folder).mkdir()
    change(table()).to_csv(tmp_path / folder / "x.csv", index=False)
    only = {"steering_sweep": "self_correction/*", "adapter_steering": None}.get(folder, "topics/*" if "response" in match else "em/*")
    with pytest.raises(DataError, match=match):
        replicate(tmp_path, only)


def broken(edit) -> dict:
    state = means(2, 4, 0)
    edit(state["answer"])
    return state


@pytest.mark.parametrize(
    ("state", "match"),
    [
        ({"question": {}}, "no `answer`"),
        ([1, 2], "no `answer`"),
        ({"answer": {}}, "`answer` is empty"),
        (broken(lambda a: a.pop("layer_0")), "no `layer_0`"),
        (broken(lambda a: a.update(layer_1=torch.zeros(3))), "`layer_1` has 3 dimensions and `layer_0` 4"),
        (broken(lambda a: a.update(layer_1=torch.zeros(2, 2))), r"must be a vector of numbers, got Tensor of shape \(2, 2\)"),
        (broken(lambda a: a.update(layer_1=torch.zeros(4, dtype=torch.long))), "must be a vector of numbers"),
        (broken(lambda a: a.update(layer_1="zeros")), "must be a vector of numbers, got str"),
        (broken(lambda a: a.update(layer_1=torch.full((4,), torch.nan))), "`layer_1` holds values that are not finite"),
    ],
)
def test_bad_hidden_states(tmp_path: Path, state: object, match: str) -> None:
    (tmp_path / "hidden_states").mkdir()
    torch.save(means(2, 4, 1), tmp_path / "hidden_states" / "o__model-m_data-a__all.pt")
    torch.save(state, tmp_path / "hidden_states" / "o__model-m_data-m__all.pt")
    with pytest.raises(DataError, match=f"o__model-m_data-m__all.pt: .*{match}"):
        replicate(tmp_path, "norm/*")


def test_two_readings_of_different_shape(tmp_path: Path) -> None:
    (tmp_path / "hidden_states").mkdir()
    for of, layers in (("a", 2), ("m", 3)):
        torch.save(means(layers, 4, 1), tmp_path / "hidden_states" / f"o__model-m_data-{of}__all.pt")
    with pytest.raises(DataError, match=r"shape \(3, 4\), but o__model-m_data-a__all.pt has \(2, 4\)"):
        replicate(tmp_path)


class Evil:
    def __reduce__(self):
        return os.system, ("touch opened",)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, legacy: bool) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scalars").mkdir()
    torch.save({"prompt": Evil()}, tmp_path / "scalars" / "x.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(DataError, match=r"x\.pt: refers to `(posix|nt)\.system`.*refused"):
        replicate(tmp_path)
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 cut", pickle.dumps({"a": SimpleNamespace(b=1)})])
def test_damaged_and_foreign_pickles(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "scalars").mkdir()
    (tmp_path / "scalars" / "x.pt").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.pt: ") as error:
        replicate(tmp_path)
    assert "\n" not in str(error.value)


def test_only_two_classes_are_allowed(tmp_path: Path) -> None:
    stream = io.BytesIO()
    torch.save({"a": 1}, stream)
    whole = zipfile.ZipFile(stream)
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as out:
        for item in whole.infolist():
            body = b"\x80\x02clora.lora_utils\nOther\n)\x81." if item.filename.endswith("data.pkl") else whole.read(item)
            out.writestr(item.filename, body)
    with pytest.raises(DataError, match=r"refers to `lora\.lora_utils\.Other`"):
        pickles.load_pickle(path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda df: df.drop(columns="prompt"), r"tokens of x\.parquet: no column `prompt`"),
        (lambda df: df.drop(columns="question"), r"tokens of x\.parquet: no column `question`"),
        (lambda df: df.assign(prompt_answer_first_token_idx=99), r"row 1, column `prompt_answer_first_token_idx`: 99 is no position in 10 tokens"),
        (lambda df: df.assign(prompt_answer_first_token_idx=[None] + [4] * (len(df) - 1)), r"row 1, column `prompt_answer_first_token_idx`: nan is no position"),
        (lambda df: df.assign(answer_kl_div_gradients=[None] + [[3.0] * 6] * (len(df) - 1)), r"row 1, column `answer_kl_div_gradients`: 1 values for 6"),
        (lambda df: df.assign(answer_kl_div_gradients="x"), r"row 1, column `answer_kl_div_gradients`: must be a list of numbers"),
        (lambda df: df.assign(prompt=[None, *df["prompt"][1:]]), r"row 1, column `prompt`: must be text"),
        (lambda df: df.assign(answer_kl_div_gradients=[[1.0]] * len(df)), r"row 1, column `answer_kl_div_gradients`: 1 values for 6 answer tokens"),
    ],
)
def test_bad_parquet(tmp_path: Path, change, match: str) -> None:
    scalars(tmp_path / "scalars", "x", 0.0)
    path = tmp_path / "scalars" / "tokens of x.parquet"
    change(pd.read_parquet(path)).to_parquet(path)
    if "gradients" in match:  # needed for significant tokens alone
        found = {c.id: c for c in replicate(tmp_path)}
        assert re.search(match, found["scalars/x/L3"].note)
        return
    with pytest.raises(DataError, match=match):
        replicate(tmp_path)


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda tokens: tokens.update({5: stub(layer_scalars={"base.layers.3.mlp.down_proj": 1.0})}), "other adapters"),
        (lambda tokens: tokens.update({5: 3}), "holds no `layer_scalars`"),
        (lambda tokens: tokens.update({11: tokens.pop(5)}), "none at position 5"),
        (lambda tokens: tokens[5].layer_scalars.update({"base.layers.3.mlp.down_proj": float("nan")}), "answer 1, L3: a scalar is not finite"),
        (lambda tokens: tokens[5].layer_scalars.update({"base.layers.3.mlp.down_proj": "x"}), "scalars must be numbers"),
        (lambda tokens: [setattr(t, "layer_scalars", {"other": 1.0}) for t in tokens.values()], "names no layer"),
    ],
)
def test_bad_scalars(tmp_path: Path, edit, match: str) -> None:
    scalars(tmp_path / "scalars", "x", 0.0)
    path = tmp_path / "scalars" / "organism_scalars_x.pt"
    state = pickles.load_pickle(path)
    edit(next(iter(state.values())).scalars)
    save(state, path)
    with pytest.raises(DataError, match=match):
        replicate(tmp_path)


# The command


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["replicate", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def test_json_is_a_list_of_claims(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "--data", data, "--json", "--repeats", 2, "--threshold", 60)
    rows = json.loads(out)
    assert code == 0 and err == ""
    assert all(list(r) == ["id", "claim", "source", "published", "recomputed", "n", "interval", "verdict", "note"] for r in rows)
    assert {r["verdict"] for r in rows} <= {"agrees", "differs", "not comparable"}
    assert {m[1] for r in rows if (m := re.search("coherent>=(.*)/", r["id"]))} == {"60"}


def test_a_difference_is_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "responses").mkdir()
    table().assign(aligned=90.0).to_csv(tmp_path / "responses" / "Qwen2.5-14B-Instruct_extreme-sports.csv", index=False)
    code, out, _ = run(capsys, "--data", tmp_path, "--json", "--only", "em/*-sports")
    (row,) = json.loads(out)
    assert code == 0 and (row["published"], row["recomputed"], row["verdict"]) == (0.202, 0.0, "differs")
    assert row["claim"] == "EM of the all-adapter sport organism" and row["source"] == "section 3.4"


def test_table_and_page(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "new" / "page.html"
    code, out, err = run(capsys, "--data", data, "--out", page, "--repeats", 2)
    assert code == 0 and err == "" and "em/tiny[1] cooking" in out and "Not found" in out and f"wrote {page}" in out
    html = page.read_text("utf-8")
    assert html.startswith("<!doctype html>") and "default-src &#39;none&#39;" not in html and "<script" not in html
    assert "chat model on the same texts" in html and "var(--s1)" in html and html.count("<svg") >= 2
    assert list(page.parent.iterdir()) == [page]


def test_names_and_texts_are_escaped(tmp_path: Path) -> None:
    (tmp_path / "responses").mkdir()
    df = table().assign(question_id=lambda d: d["question_id"].replace("thing_0", HTML))
    df.to_csv(tmp_path / "responses" / "a<b>.csv", index=False)
    claims = replicate(tmp_path)
    assert any(HTML in c.note for c in claims)
    html = render(claims)
    assert HTML not in html and "<b>.csv" not in html and "&lt;img src=x" in html and "em/a<b>" not in html


def test_folded_rows_are_those_per_layer(claims) -> None:
    kept = {c.id for c in folded(list(claims.values()))}
    assert "cosine/chef.v2__all/cook__all/min" in kept and "cosine/chef.v2__all/cook__all/L1" not in kept and "scalars/fine/L3" in kept


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "nowhere: no such folder"),
        (["--data", "file"], "file: is a file"),
        (["--data", "."], "did you mean inner"),
        (["--data", "empty"], "none of the folders"),
        (["--data", "inner", "--only", "emm/*"], "matches no claim"),
        (["--data", "inner", "--out", "inner"], "is a folder"),
        (["--data", "inner", "--out", "page.pdf"], "ends in .pdf"),
        (["--data", "inner", "--threshold", "101"], "threshold 101: is outside 0 to 100"),
        (["--data", "inner", "--repeats", "0"], "repeats"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "inner/responses"):
        Path(name).mkdir(parents=True)
    Path("file").write_text("x")
    table().to_csv("inner/responses/x.csv", index=False)
    code, out, err = run(capsys, *arguments)
    assert code == 2 and out == "" and err.count("\n") == 1 and message in err


def test_folder_of_another_kind() -> None:
    with pytest.raises(ConvergentError, match="responses, steering_sweep"):
        Folder(Path(__file__).parent)
