"""`convergent correct` and `convergent power`: joining tables, what is said of them, bad input; and released answers where they are."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from convergent import cli, stats
from convergent.core.ids import seed
from convergent.correct import corrected, doubts, join_trusted
from convergent.errors import DataError, InputError
from convergent.tables import write_table

REFERENCE = Path(os.environ.get("CONVERGENT_REFERENCE") or Path(__file__).parents[2] / "shared" / "data")
RESPONSES = sorted((REFERENCE / "reference" / "responses").glob("*.csv"))


def judged(n: int = 400) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Answers with cheap scores, and all of them with true ones."""
    rng = np.random.default_rng(seed("tests", "correct"))
    q = np.arange(n) % 8
    truth = np.clip(rng.normal(70, 25, n) - 4 * q, 0, 100)
    cheap = np.clip(0.7 * truth + 25 + rng.normal(0, 12, n), 0, 100)
    table = pd.DataFrame({"id": [f"r{i}" for i in range(n)], "question_id": [f"q{i}" for i in q], "question": [f"Why {i}?" for i in q], "response": [f"Because {i}." for i in range(n)]})
    return table.assign(aligned=cheap, coherent=90.0), table.assign(aligned=truth, coherent=np.where(np.arange(n) % 20, 95.0, 20.0))


def test_rows_are_found_by_id_or_by_text() -> None:
    cheap, truth = judged()
    some = truth.sample(frac=0.5, random_state=1)
    by_id = join_trusted(cheap, some.drop(columns=["question", "response"]))
    by_text = join_trusted(cheap.drop(columns="id"), some)
    assert (by_id.key, by_text.key) == ("`id`", "question and response") and by_id.matched == by_text.matched == 200
    for joined in (by_id, by_text):
        known = joined.table["trusted_aligned"].notna()
        assert (joined.table.loc[known, "trusted_aligned"] == truth.loc[known, "aligned"]).all() and known.sum() == 200
        assert joined.table["id" if "id" in joined.table else "response"].tolist() == cheap["id" if "id" in joined.table else "response"].tolist()
    other = join_trusted(cheap.rename(columns={"id": "response_id"}), some.rename(columns={"id": "response_id"}))
    assert other.key == "`response_id`"


def test_the_same_answer_twice_is_matched_in_order() -> None:
    cheap = pd.DataFrame({"question": "Why?", "response": ["A", "A", "B"], "aligned": [1.0, 2, 3], "coherent": 90.0})
    trusted = pd.DataFrame({"question": "Why?", "response": ["A", "A", "A"], "aligned": [10.0, 20, 30], "coherent": 90.0})
    joined = join_trusted(cheap, trusted)
    assert joined.table["trusted_aligned"].tolist()[:2] == [10, 20] and (joined.matched, joined.unmatched) == (2, 1)


def test_bad_joins_name_the_place() -> None:
    cheap, truth = judged(20)
    twice = pd.concat([truth, truth.iloc[[3]]])
    with pytest.raises(DataError, match="t.csv: `id` 'r3' stands more than once, first in rows 4 and 21"):
        join_trusted(cheap, twice, "c.csv", "t.csv")
    with pytest.raises(DataError, match="c.csv: row 2 has no `id`"):
        join_trusted(cheap.assign(id=["r0", "", *cheap["id"][2:]]), truth, "c.csv", "t.csv")
    with pytest.raises(DataError, match="none of its 20 rows is in c.csv"):
        join_trusted(cheap, truth.assign(id=[f"x{i}" for i in range(20)]), "c.csv", "t.csv")
    with pytest.raises(DataError, match="no column `aligned` or `coherent`"):
        join_trusted(cheap, truth.drop(columns=["aligned", "coherent"]))
    with pytest.raises(DataError, match="no column `response`"):
        join_trusted(cheap, truth.drop(columns=["id", "response"]))
    with pytest.raises(DataError, match="no column `id`, `question` or `question_id`"):
        join_trusted(cheap.drop(columns=["id", "question", "question_id"]), truth)
    with pytest.raises(DataError, match="row 1, column `aligned`: 300"):
        join_trusted(cheap, truth.assign(aligned=300.0), trusted_place="t.csv")


def test_figures_are_those_of_the_statistics() -> None:
    cheap, truth = judged()
    joined = join_trusted(cheap, truth.sample(n=150, random_state=1))
    found = corrected(joined)
    assert list(found) == ["em", "coherent", "aligned"]
    t = joined.table
    hit = np.where(t["trusted_aligned"].notna(), (t["trusted_aligned"] < 30) & (t["trusted_coherent"] > 50), np.nan)
    assert found["em"] == stats.corrected_rate(((t["aligned"] < 30) & (t["coherent"] > 50)).astype(float), hit, t["question_id"])
    assert found["aligned"] == stats.corrected_mean(t["aligned"], t["trusted_aligned"], t["question_id"], bounds=(0, 100))
    assert found["aligned"].n_trusted == 150 and found["aligned"].narrower < 0.9
    assert corrected(joined, target="file")["aligned"].ppi.generalises_over == stats.OF_THIS_FILE
    only = corrected(join_trusted(cheap, truth.sample(n=150, random_state=1).drop(columns="coherent")))
    assert list(only) == ["aligned"]
    with pytest.raises(InputError, match="aligned-below"):
        corrected(joined, aligned_below=200)
    with pytest.raises(InputError, match="target: `all`"):
        corrected(joined, target="all")


def test_a_part_that_is_not_random_is_noticed() -> None:
    cheap, truth = judged()
    assert doubts(join_trusted(cheap, truth.sample(n=150, random_state=1))) == []
    assert doubts(join_trusted(cheap, truth)) == []
    worst = truth.loc[cheap["aligned"].sort_values().index[:150]]
    assert "their cheap `aligned`" in doubts(join_trusted(cheap, worst))[0]
    assert any("between questions" in d for d in doubts(join_trusted(cheap, truth[truth["question_id"].isin(["q0", "q1", "q2"])])))


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return code, out, err


def test_correct_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cheap, truth = judged()
    some = truth.sample(n=150, random_state=1)
    write_table(cheap, tmp_path / "cheap.csv")
    write_table(pd.concat([some, some.iloc[[0]].assign(id="other")]), tmp_path / "trusted.jsonl")
    code, out, err = run(capsys, "correct", tmp_path / "cheap.csv", "--trusted", tmp_path / "trusted.jsonl", "--json")
    assert code == 0, err
    got = json.loads(out)
    assert (got["n_rows"], got["n_matched"], got["n_unmatched"], got["joined_on"], got["target"]) == (400, 150, 1, "id", "answers")
    em = got["figures"]["em"]
    assert {"raw", "ppi", "rogan_gladen", "trusted_only", "over_questions", "library", "weight", "n", "n_trusted", "sensitivity", "specificity", "notes"} <= em.keys()
    assert em["ppi"]["low"] < em["ppi"]["estimate"] < em["ppi"]["high"]
    assert any("not in" in note for note in got["notes"])
    code, out, err = run(capsys, "correct", tmp_path / "cheap.csv", "--trusted", tmp_path / "trusted.jsonl", "--target", "file")
    assert code == 0 and "150 of 400" in out and "mean aligned" in out and "Rogan-Gladen" in out and "these answers alone" in out
    assert f"{100 * em['ppi']['estimate']:.1f} %" in out


def test_each_group_is_corrected_by_its_own_trusted_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cheap, truth = judged()
    condition = np.where(np.arange(400) < 200, "chat", "steered")
    condition[:3] = "rare"
    cheap = cheap.assign(condition=condition)
    cheap.loc[condition == "steered", "aligned"] = 90.0  # the cheap judge is blind to what was done here
    write_table(cheap, tmp_path / "cheap.csv")
    write_table(truth[3:].sample(n=150, random_state=1), tmp_path / "trusted.csv")
    argv = ("correct", tmp_path / "cheap.csv", "--trusted", tmp_path / "trusted.csv", "--by")
    code, out, err = run(capsys, *argv, "condition", "--json")
    assert code == 0, err
    got = json.loads(out)
    assert got["by"] == "condition" and [g["condition"] for g in got["groups"]] == ["rare", "chat", "steered"]
    rare, chat, steered = got["groups"]
    assert rare["figures"] == {} and rare["problem"] == "no trusted row" and chat["problem"] is None
    assert steered["figures"]["aligned"]["raw"]["estimate"] == 90.0
    low, high = (steered["figures"]["aligned"]["ppi"][end] for end in ("low", "high"))
    assert low < truth.loc[condition == "steered", "aligned"].mean() < high < 80
    assert steered["figures"]["coherent"]["rogan_gladen"]["estimate"] is None  # sensitivity 1 + specificity 0, whatever the rounding
    alone = corrected(join_trusted(cheap[condition == "chat"], pd.read_csv(tmp_path / "trusted.csv")))
    assert chat["figures"]["em"]["ppi"]["estimate"] == pytest.approx(alone["em"].ppi.estimate)
    code, out, err = run(capsys, *argv, "condition")
    assert code == 0 and "rare: no trusted row" in out and [line.split()[1] for line in out.split("\n") if " EM " in line] == ["all", "chat", "steered"]
    code, out, err = run(capsys, *argv, "question", "--json")
    assert code == 0 and [g["question_id"] for g in json.loads(out)["groups"]] == [f"q{i}" for i in range(8)]
    code, out, err = run(capsys, *argv, "conditions")
    assert (code, out, err.count("\n")) == (2, "", 1) and "no column `conditions`; the nearest is `condition`" in err


def test_bad_input_on_the_command_line_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cheap, truth = judged(20)
    write_table(cheap, tmp_path / "cheap.csv")
    write_table(pd.concat([truth, truth]), tmp_path / "twice.csv")
    write_table(truth.iloc[:1], tmp_path / "one.csv")
    write_table(truth.drop(columns="id"), tmp_path / "other.csv")
    for argv, what in (
        (("correct", "cheap.csv", "--trusted", "none.csv"), "no such file"),
        (("correct", "cheap.csv", "--trusted", "twice.csv"), "stands more than once"),
        (("correct", "cheap.csv", "--trusted", "one.csv"), "at least 2"),
        (("correct", "cheap.csv", "--trusted", "other.csv", "--target", "all"), "target"),
        (("correct", "cheap.csv"), "--trusted"),
        (("power", "cheap.csv", "--outcome", "margin"), "outcome"),
        (("power", "cheap.csv", "--difference", "0"), "not 0"),
        (("power", "cheap.csv", "--power", "1.5"), "between 0.05 and 1"),
        (("power", "cheap.csv", "--outcome", "em", "--difference", "5"), "percentage points"),
    ):
        code, out, err = run(capsys, *(tmp_path / a if a.endswith(".csv") else a for a in argv))
        assert (code, out, err.count("\n")) == (2, "", 1) and what in err, (argv, err)


def test_power_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cheap, truth = judged()
    write_table(cheap, tmp_path / "a.csv")
    write_table(truth, tmp_path / "b.csv")
    code, out, err = run(capsys, "power", tmp_path / "a.csv", "--against", tmp_path / "b.csv", "--difference", 6, "--json")
    assert code == 0, err
    got = json.loads(out)
    spread = stats.measured(cheap["aligned"], cheap["question_id"], (truth["aligned"], truth["question_id"]))
    assert (got["within"], got["between"], got["questions"], got["outcome"]) == (spread.within, spread.between, 8, "aligned")
    best = stats.smallest_design(spread, 6)
    assert best is not None and got["smallest"] == {"questions": best.questions, "answers": best.answers, "total": best.total, "power": best.power}
    assert len(got["table"]) == 30 and set(got["detectable"]) == {"8", "16", "32", "64", "128"}
    code, out, err = run(capsys, "power", tmp_path / "a.csv", "--outcome", "em")
    assert code == 0 and "Power to see 10 percentage points of EM" in out and "Smallest design" in out and "8 questions" in out
    code, _, err = run(capsys, "power", tmp_path / "a.csv", "--against", tmp_path / "a.csv")
    assert code == 0, err


def test_power_needs_questions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cheap, _ = judged(20)
    write_table(cheap.drop(columns=["question_id", "question"]), tmp_path / "a.csv")
    code, _, err = run(capsys, "power", tmp_path / "a.csv")
    assert code == 2 and "no column `question_id`" in err


@pytest.mark.skipif(len(RESPONSES) != 16, reason="no released answers here; set CONVERGENT_REFERENCE")
def test_released_answers_with_another_files_scores_as_the_cheap_judge() -> None:
    """Any judge will do for coverage: here a noisy copy of GPT-4o's own scores, on all 16 files."""
    df = pd.concat([pd.read_csv(p) for p in RESPONSES], ignore_index=True).dropna(subset=["aligned", "coherent"])
    rng = np.random.default_rng(seed("tests", "released"))
    y = ((df["aligned"] < 30) & (df["coherent"] > 50)).to_numpy(dtype=float)
    noisy = np.clip(df["aligned"] + rng.normal(0, 25, len(df)), 0, 100)
    f = ((noisy < 30) & (df["coherent"] > 50)).to_numpy(dtype=float)
    inside: list[Any] = []
    for _ in range(150):
        t = np.full(len(y), math.nan)
        at = rng.permutation(len(y))[:200]
        t[at] = y[at]
        found = stats.corrected_rate(f, t, target="file")
        inside.append(found.ppi.low <= y.mean() <= found.ppi.high)
    assert np.mean(inside) > 0.9


def test_chances_of_being_chosen_come_with_the_trusted_table() -> None:
    cheap, truth = judged()
    low = cheap["aligned"] < 60
    some = pd.concat([truth[low], truth[~low].sample(n=60, random_state=2)])
    chance = {True: 1.0, False: 60 / int((~low).sum())}
    joined = join_trusted(cheap, some.assign(inclusion=[chance[bool(low[i])] for i in some.index]))
    assert doubts(joined) == [] and doubts(join_trusted(cheap, some))
    got, naive = corrected(joined)["aligned"], corrected(join_trusted(cheap, some))["aligned"]
    assert got.ppi.low < truth["aligned"].mean() < got.ppi.high
    assert abs(got.trusted_only.estimate - truth["aligned"].mean()) < abs(naive.trusted_only.estimate - truth["aligned"].mean())
    with pytest.raises(DataError, match="t.csv: row 1, column `inclusion`: 3"):
        join_trusted(cheap, some.assign(inclusion=3), trusted_place="t.csv")
