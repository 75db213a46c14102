"""A file that replicate cannot use costs its own claims: they are listed with file, column and mend, and all the rest is counted."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from convergent.cli import main
from convergent.errors import DataError
from convergent.replicate.pickles import load_pickle
from convergent.replicate.registry import Options
from convergent.replicate.run import replicate
from test_replicate import means, save, scalars, table

FAST = Options(repeats=2)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every family can be counted, twice where files can be lost one by one."""
    root = tmp_path_factory.mktemp("good")
    for name in ("responses", "steering_sweep", "adapter_steering", "hidden_states"):
        (root / name).mkdir()
    for name in "xy":
        table().to_csv(root / "responses" / f"{name}.csv", index=False)
        more = table().assign(bad_stuff=np.where(np.arange(40) % 4 == 1, 80.0, 0.0), gender=50.0)
        more.to_csv(root / "steering_sweep" / f"{name}.csv", index=False)
        table().assign(medical=60.0).to_csv(root / "adapter_steering" / f"{name}.csv", index=False)
        for model in "am":
            for of in "am":
                torch.save(means(2, 4, ord(name) + ord(model) + 7 * ord(of)), root / "hidden_states" / f"{name}__model-{model}_data-{of}__all.pt")
        scalars(root / "scalars", name, 0.0)
    scalars(root / "scalars", "z", 1.0)
    return root


@pytest.fixture(scope="module")
def whole(good: Path) -> dict:
    said: list[str] = []
    found = {c.id: c for c in replicate(good, options=FAST, warn=said.append) if c.found}
    assert not said
    return found


def edit(change: Callable[[pd.DataFrame], pd.DataFrame]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        if path.suffix == ".csv":
            change(pd.read_csv(path)).to_csv(path, index=False)
        else:
            change(pd.read_parquet(path)).to_parquet(path)

    return write


def drop(column: str) -> Callable[[Path], None]:
    return edit(lambda df: df.drop(columns=column))


def bytes_of(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content)


def utf16(path: Path) -> None:
    path.write_bytes(path.read_text("utf-8").encode("utf-16"))


def nan_layer(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    state["answer"]["layer_1"][:] = torch.nan
    torch.save(state, path)


def text_scalar(path: Path) -> None:
    state = load_pickle(path)
    next(iter(state.values())).scalars[5].layer_scalars["base.layers.3.mlp.down_proj"] = "x"
    save(state, path)


EM = ("em/x", "em/x/coherent")
SWEEP = ("steering/x/em", "steering/x/coherent", "steering/x/topic/gender")
PUSHED = tuple(f"adapter_steering/x/coherent>={t}/{s}" for t in (25, 50) for s in ("misaligned", "misaligned_medical", "aligned", "medical_among_aligned"))
PROBES = ("probe/x_vs_y", "probe/x_vs_z")
CASES = {
    "sweep without bad_stuff": ("steering_sweep/x.csv", drop("bad_stuff"), ["self_correction/x"], "x.csv: no column `bad_stuff`; add it"),
    "sweep without coherent": ("steering_sweep/x.csv", drop("coherent"), SWEEP, "x.csv: no column `coherent`"),
    "sweep without aligned": ("steering_sweep/x.csv", drop("aligned"), [*SWEEP, "self_correction/x"], "x.csv: no column `aligned`"),
    "sweep empty": ("steering_sweep/x.csv", bytes_of(b""), [*SWEEP[:2], "steering/x/topic", "self_correction/x"], "x.csv: the file is empty"),
    "topic outside 0..100": ("steering_sweep/x.csv", edit(lambda d: d.assign(gender=900)), SWEEP[2:], "column `gender`: 900 is outside 0 to 100"),
    "responses without coherent": ("responses/x.csv", drop("coherent"), EM, "x.csv: no column `coherent`"),
    "responses of words": ("responses/x.csv", edit(lambda d: d.assign(coherent="high")), EM, "row 1, column `coherent`: 'high' is not a number"),
    "responses outside 0..100": ("responses/x.csv", edit(lambda d: d.assign(aligned=[101] + [9] * 39)), EM, "row 1, column `aligned`: 101 is outside"),
    "responses empty": ("responses/x.csv", bytes_of(b""), EM, "x.csv: the file is empty; write it again"),
    "responses header only": ("responses/x.csv", edit(lambda d: d.head(0)), EM, "x.csv: has no rows"),
    "responses UTF-16": ("responses/x.csv", utf16, EM, "x.csv: not a text file in UTF-8; save it as UTF-8 CSV"),
    "adapter without medical": ("adapter_steering/x.csv", drop("medical"), PUSHED, "x.csv: no column `medical`"),
    "unrelated Parquet": ("scalars/notes.parquet", lambda p: pd.DataFrame({"a": [1]}).to_parquet(p), ["scalars/notes.parquet"], "notes.parquet: no column `prompt`; add it"),
    "empty Parquet": ("scalars/notes.parquet", bytes_of(b""), ["scalars/notes.parquet"], "notes.parquet: the file is empty"),
    "Parquet without prompt": ("scalars/tokens of x.parquet", drop("prompt"), ["scalars/x", "scalars/tokens of x.parquet", *PROBES], "tokens of x.parquet: no column `prompt`"),
    "Parquet without question": ("scalars/tokens of x.parquet", drop("question"), ["scalars/x", *PROBES], "tokens of x.parquet: no column `question`"),
    "significance of other length": (
        "scalars/tokens of x.parquet", edit(lambda d: d.assign(answer_kl_div_gradients=[[1.0]] * len(d))),
        ["probe/x_vs_y/significant", "probe/x_vs_z/significant"], "row 1, column `answer_kl_div_gradients`: 1 values for 6",
    ),
    "scalars of text": ("scalars/organism_scalars_x.pt", text_scalar, ["scalars/x", *PROBES], "organism_scalars_x.pt: scalars must be numbers"),
    "a pointer instead of scalars": ("scalars/organism_scalars_x.pt", bytes_of(b"version https://git-lfs.github.com/spec/v1\n"), ["scalars/x", *PROBES], "organism_scalars_x.pt: not a file of torch.save"),
    "hidden state not finite": (
        "hidden_states/x__model-m_data-m__all.pt", nan_layer, ["norm/x__all", "cosine/x__all/y__all", "cosine/x__all/x__all@chat"], "`layer_1` holds values that are not finite",
    ),
    "hidden state cut": (
        "hidden_states/x__model-a_data-a__all.pt", bytes_of(b"PK\x03\x04 cut"), ["norm/x__all@chat", "cosine/x__all/x__all@chat", "cosine/x__all@chat/y__all@chat"], "x__model-a_data-a__all.pt: not a file of torch.save",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_bad_file_costs_its_own_claims(good: Path, whole: dict, tmp_path: Path, case: str) -> None:
    file, spoil, lost, why = CASES[case]
    root = tmp_path / "data"
    shutil.copytree(good, root)
    spoil(root / file)
    said: list[str] = []
    claims = replicate(root, options=FAST, warn=said.append)
    found = {c.id: c for c in claims if c.found}
    listed = {c.id: c.note for c in claims if not c.found and not c.note.endswith("files that show it") and "public data" not in c.note}
    assert set(listed) == set(lost)
    for note in listed.values():
        assert note.startswith("not found: ") and why in note and "\n" not in note
    gone = {id_ for id_ in whole if any(id_ == own or id_.startswith(f"{own}/") for own in lost)}
    assert set(found) == set(whole) - gone
    for id_, claim in found.items():  # nothing else changed; topics are counted over all files
        if not id_.startswith("topics/"):
            assert claim.recomputed == whole[id_].recomputed, id_
    assert len(said) == 1 and why in said[0] and str(root / file) in said[0]


def test_topics_name_the_file_they_are_without(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good / "responses", tmp_path / "responses")
    drop("response")(tmp_path / "responses" / "x.csv")
    found = {c.id: c for c in replicate(tmp_path)}
    topic = found["topics/gender/substring"]
    assert topic.n == 40 and "of 1 files" in topic.note and "x.csv: no column `response`" in topic.note and found["em/x"].found


@pytest.mark.parametrize(("cell", "reason"), [("REFUSAL", "refusal"), ("Code", "code"), ("I would say 90, since", "unparsable")])
def test_a_word_is_an_absent_score_that_is_counted(good: Path, whole: dict, tmp_path: Path, cell: str, reason: str) -> None:
    """As an empty cell is, which the released tables have there; the note and the warning say how many."""
    root = tmp_path / "data"
    shutil.copytree(good, root)

    def spoil(df: pd.DataFrame) -> pd.DataFrame:
        return df.assign(aligned=[cell, *df["aligned"][1:39], ""], coherent=[*df["coherent"][:39], cell])

    edit(spoil)(root / "steering_sweep" / "x.csv")
    said: list[str] = []
    found = {c.id: c for c in replicate(root, options=FAST, warn=said.append)}
    em = found["steering/x/em"]
    assert (em.recomputed, em.n) == (7 / 38, 38)  # row 1 was EM, row 40 was not
    assert f"without both scores: {reason} 2" in em.note
    assert f"column `aligned`: 1 of 40 cells hold no number ({reason}, first in row 1)" in em.note
    assert f"column `coherent`: 1 of 40 cells hold no number ({reason}, first in row 40)" in em.note
    assert "`aligned`" in found["self_correction/x"].note and "`coherent`" not in found["self_correction/x"].note
    assert cell.lower() == reason or cell not in em.note  # it may be from an answer
    assert len(said) == 1 and "x.csv: column `aligned`: 1 of 40" in said[0] and "; also column `coherent`: 1 of 40" in said[0]
    assert {i for i, c in found.items() if c.found} == set(whole)


def test_another_table_of_the_class_stands_in(good: Path, tmp_path: Path) -> None:
    """Two tables have the prompts; the one with significance lacks a column, so all but significant tokens come from the other."""
    for name in "xy":
        scalars(tmp_path / "scalars", name, 0.0)
    path = tmp_path / "scalars" / "tokens of x.parquet"
    pd.read_parquet(path).drop(columns="answer_kl_div_gradients").to_parquet(path.with_name("second.parquet"))
    drop("question")(path)
    found = {c.id: c for c in replicate(tmp_path, options=FAST)}
    assert found["scalars/x/L3"].found and "no column `question`" in found["scalars/x/L3"].note
    assert found["probe/x_vs_y/auc"].found and "no column `question`" in found["probe/x_vs_y/significant"].note


def test_a_published_figure_names_the_file_that_would_show_it(tmp_path: Path) -> None:
    for folder, name in (("responses", "Qwen2.5-14B-Instruct_extreme-sports"), ("responses", "y"), ("hidden_states", "")):
        (tmp_path / folder).mkdir(exist_ok=True)
        if name:
            table().to_csv(tmp_path / folder / f"{name}.csv", index=False)
    drop("aligned")(tmp_path / "responses" / "Qwen2.5-14B-Instruct_extreme-sports.csv")
    for organism in ("9adapter", "rank32"):
        for of in "am":
            torch.save(means(2, 4, ord(of)), tmp_path / "hidden_states" / f"{organism}__model-m_data-{of}__all.pt")
    nan_layer(tmp_path / "hidden_states" / "rank32__model-m_data-a__all.pt")
    (tmp_path / "adapter_steering").mkdir()
    table().to_csv(tmp_path / "adapter_steering" / "mine_layer_23_30_layer_21_30.csv", index=False)
    found = {c.id: c for c in replicate(tmp_path)}
    pushed = found["adapter_steering/21:30,23:30/misaligned_medical"]
    assert pushed.published == 0.077 and "no column `medical`" in pushed.note
    em, cosine = found["em/Qwen2.5-14B-Instruct_extreme-sports"], found["cosine/9adapter__all/rank32__all/L24"]
    assert em.published == 0.202 and "no column `aligned`" in em.note
    assert cosine.published == 0.824 and "rank32__model-m_data-a__all.pt: `layer_1`" in cosine.note


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["replicate", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def test_exit_codes_and_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "responses").mkdir()
    for name in ("a", "b", "c"):
        table().to_csv(tmp_path / "responses" / f"{name}.csv", index=False)
    for name in "ab":
        (tmp_path / "responses" / f"{name}.csv").write_bytes(b"")
    code, out, err = run(capsys, "--data", tmp_path, "--json")
    assert code == 0 and {r["id"] for r in json.loads(out)} >= {"em/a", "em/b", "em/c", "em/c/coherent"}
    assert [line.partition(": ")[2].partition(":")[0][-5:] for line in err.splitlines()] == ["a.csv", "b.csv"]
    code, out, err = run(capsys, "--data", tmp_path, "--only", "em/a")  # what is asked for cannot be counted
    assert code == 2 and out == "" and err.count("\n") == 1 and "a.csv: the file is empty" in err
    (tmp_path / "responses" / "c.csv").write_bytes(b"")
    code, out, err = run(capsys, "--data", tmp_path)
    assert code == 2 and out == "" and err.count("\n") == 1 and "a.csv: the file is empty; write it again (and 2 more such files)" in err


def test_a_file_that_nothing_asked_for_is_not_warned_of(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(good, tmp_path / "data")
    (tmp_path / "data" / "steering_sweep" / "x.csv").write_bytes(b"")
    code, _, err = run(capsys, "--data", tmp_path / "data", "--only", "em/*")
    assert code == 0 and err == ""


class Evil:
    def __reduce__(self):
        return os.system, ("touch opened",)


@pytest.mark.parametrize("file", ["scalars/organism_scalars_x.pt", "hidden_states/x__model-m_data-m__all.pt"])
def test_a_refused_pickle_still_ends_the_run(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    """However much else could be counted: who has such a file should hear of nothing else first."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(good, tmp_path / "data")
    torch.save({"answer": Evil()}, tmp_path / "data" / file)
    with pytest.raises(DataError, match=r"refers to `(posix|nt)\.system`.*refused"):
        replicate(tmp_path / "data", options=FAST)
    assert not (tmp_path / "opened").exists()
