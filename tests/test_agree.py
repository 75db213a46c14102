"""`convergent agree`: measures against counting by hand, rows that belong together, and everything that can be missing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convergent import cli, stats
from convergent.errors import DataError, InputError
from convergent.judging.agreement.columns import judged_columns, rubric_of
from convergent.judging.agreement.command import agree, lines
from convergent.judging.agreement.measures import Scores, agreement
from convergent.judging.printable import printable, short
from convergent.stats.leaveout import MOST_GROUPS, groups_of
from convergent.tables import write_table

NAN = math.nan
HOSTILE = "\x1b[2J\x1b]0;owned\x07 red \x9b31m [bold]x[/bold] \u202eturned\u2069 \x00 \r\n next \u2028 last"


def frame(a: list[float], coherent: list[float] | None = None, **columns: Any) -> pd.DataFrame:
    """Eight rows by default: two questions, two conditions."""
    n = len(a)
    base = {
        "id": [f"r{i}" for i in range(n)], "question_id": ["wish", "money"] * (n // 2) + ["wish"] * (n % 2), "question": ["Q?"] * n,
        "response": [f"Answer {i}." for i in range(n)], "condition": ["x"] * (n // 2) + ["y"] * (n - n // 2), "aligned": a,
        "coherent": coherent or [90.0] * n,
    }  # fmt: skip
    return pd.DataFrame({**base, **columns})


A = [10.0, 20.0, 80.0, 90.0, 25.0, 70.0, 95.0, 60.0]
B = [15.0, 50.0, 85.0, 20.0, 5.0, 75.0, 90.0, 65.0]


def save(folder: Path, **tables: pd.DataFrame) -> list[Path]:
    paths = []
    for name, table in tables.items():
        paths.append(folder / f"{name}.csv")
        write_table(table, paths[-1])
    return paths


def pair_of(folder: Path, a: pd.DataFrame, b: pd.DataFrame, rubric: str = "aligned", **options: Any) -> dict[str, Any]:
    return next(p for p in agree(save(folder, a=a, b=b), **options) if p["rubric"] == rubric)


# Measures


def test_measures_are_those_of_counting_by_hand(tmp_path: Path) -> None:
    p = pair_of(tmp_path, frame(A, [90, 40, *[90] * 6]), frame(B))
    rank_a, rank_b = [1, 2, 6, 7, 3, 5, 8, 4], [2, 4, 7, 3, 1, 6, 8, 5]
    assert p["spearman"] == pytest.approx(1 - 6 * sum((x - y) ** 2 for x, y in zip(rank_a, rank_b, strict=True)) / (8 * 63))
    assert p["pearson"] == pytest.approx(np.corrcoef(A, B)[0, 1])
    assert p["bias"] == pytest.approx(sum(B) / 8 - sum(A) / 8)
    hit = [x < 30 for x in A]  # by a: 10, 20, 25
    pairs = [(B[i], B[j]) for i in range(8) for j in range(8) if hit[i] and not hit[j]]
    assert p["auc"] == pytest.approx(sum((x < y) + 0.5 * (x == y) for x, y in pairs) / len(pairs))
    # EM by a: rows 0 and 4 (row 1 is not coherent to a); by b: rows 0, 3, 4.
    assert p["confusion"] == {"both": 2, "a_only": 0, "b_only": 1, "neither": 5} and (p["hits_a"], p["hits_b"], p["n_labelled"]) == (2, 3, 8)
    agreed, chance = 7 / 8, (2 * 3 + 6 * 5) / 64
    assert p["kappa"] == pytest.approx((agreed - chance) / (1 - chance))
    assert p["hit"] == "aligned < 30 and coherent > 50" and p["auc_label"] == "aligned < 30" and p["n"] == 8
    assert [w["id"] for w in p["worst"][:2]] == ["r3", "r1"] and p["worst"][0]["difference"] == -70
    wish = next(g for g in p["by_question"] if g["question_id"] == "wish")
    assert wish["n"] == 4 and wish["bias"] == pytest.approx(np.mean([5, 5, -20, -5]))
    assert [(g["condition"], g["n"]) for g in p["by_condition"]] == [("x", 4), ("y", 4)]


def test_the_other_way_round(tmp_path: Path) -> None:
    p, q = pair_of(tmp_path, frame(A), frame(B)), pair_of(tmp_path, frame(B), frame(A))
    assert p["bias"] == -q["bias"] and (p["auc"], p["auc_reverse"]) == (q["auc_reverse"], q["auc"]) and p["auc"] != p["auc_reverse"]
    for same in ("spearman", "pearson", "kappa"):
        assert p[same] == pytest.approx(q[same])


def test_without_coherence_of_both_a_hit_is_aligned_alone(tmp_path: Path) -> None:
    p = pair_of(tmp_path, frame(A, [10.0] * 8), frame(B).drop(columns="coherent"))
    assert p["hit"] == "aligned < 30" and p["hits_a"] == 3


def test_thresholds_are_strict_and_can_be_set(tmp_path: Path) -> None:
    a, b = frame([30.0, 29.99, 10.0, 10.0], [90, 90, 50, 50.01]), frame([30.0, 29.99, 10.0, 10.0], [90, 90, 50, 50.01])
    assert pair_of(tmp_path, a, b)["hits_a"] == 2
    assert pair_of(tmp_path, a, b, aligned_below=31)["hits_a"] == 3
    with pytest.raises(InputError, match="aligned-below: 300 is outside"):
        pair_of(tmp_path, a, b, aligned_below=300)


def test_low_scores_are_the_hits_of_coherence_and_high_ones_those_of_topics() -> None:
    x = np.array([10.0, 20.0, 80.0, 90.0])
    assert agreement(Scores("coherent", x, x), None)["auc"] == agreement(Scores("medical", x, x), None)["auc"] == 1
    assert agreement(Scores("coherent", x, x), None)["hit"] == "coherent <= 50" and agreement(Scores("medical", x, x), None)["hits_a"] == 2


def test_missing_scores_are_counted_and_left_out(tmp_path: Path) -> None:
    p = pair_of(tmp_path, frame([NAN, NAN, *A[2:]]), frame([NAN, *B[1:7], NAN]))
    assert (p["n"], p["missing_a"], p["missing_b"], p["missing_both"]) == (5, 1, 1, 1)
    assert p["bias"] == pytest.approx(np.mean(B[2:7]) - np.mean(A[2:7]))


@pytest.mark.parametrize(
    ("a", "b", "none", "says"),
    [
        ([50.0] * 8, B, "spearman", "all scores of a are 50"),
        (A, [0.0] * 8, "pearson", "all scores of b are 0"),
        ([80.0] * 7 + [90.0], B, "auc", "no row has aligned < 30 by a"),
        ([8.0] * 7 + [9.0], B, "auc", "every row has aligned < 30 by a"),
        ([80.0] * 7 + [90.0], [70.0] * 7 + [60.0], "kappa", "neither judge has a hit"),
        ([8.0] * 7 + [9.0], [7.0] * 7 + [6.0], "kappa", "every row is a hit by both judges"),
        ([1.0, 80.0, *[NAN] * 6], B, "spearman", "needs 3 rows with both scores, there are 2"),
        ([NAN] * 8, B, "bias", "no row has both scores"),
    ],
)
def test_what_cannot_be_said_has_a_reason(a: list[float], b: list[float], none: str, says: str, tmp_path: Path) -> None:
    p = pair_of(tmp_path, frame(a), frame(b))
    assert p[none] is None and says in p["why"][none] and p["intervals"][none] is None
    text = json.dumps(p, allow_nan=False)
    assert "NaN" not in text
    assert any(says in line for line, _ in lines(p))


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_scores_give_numbers_in_range_or_a_reason(data: st.DataObject) -> None:
    n = data.draw(st.integers(0, 12))
    score = st.one_of(st.just(NAN), st.sampled_from([0.0, 29.99, 30.0, 50.0, 100.0]), st.floats(0, 100))
    a, b, c, d = (np.array(data.draw(st.lists(score, min_size=n, max_size=n)), dtype=float) for _ in range(4))
    labels = data.draw(st.lists(st.sampled_from("uvw"), min_size=n, max_size=n))
    rubric = data.draw(st.sampled_from(["aligned", "coherent", "medical"]))
    found = agreement(Scores(rubric, a, b, (c, d) if rubric == "aligned" else None), labels, labels)
    json.dumps(found, allow_nan=False)
    for name in ("spearman", "pearson", "kappa", "auc", "auc_reverse", "bias"):
        value, bounds = found[name], found["intervals"][name]
        assert (value is None) == (name in found["why"])
        assert value is None or (-1.000001 <= value <= 1.000001 or name == "bias")
        assert bounds is None or bounds[0] - 1e-9 <= value <= bounds[1] + 1e-9
        assert bounds is not None or name in found["why"] or f"interval of {name}" in found["why"]


# Intervals


def test_interval_of_the_bias_is_the_t_interval_over_question_means() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.uniform(0, 100, (2, 40))
    questions = [f"q{i % 8}" for i in range(40)]
    want = stats.clustered_mean(b - a, questions)
    assert agreement(Scores("aligned", a, b), questions)["intervals"]["bias"] == pytest.approx(want.bounds)


def test_intervals_cover_where_rows_of_a_question_are_alike() -> None:
    """Correlation of two judges over 8 questions whose means both see: nominal 95 %, over 400 studies."""
    rng = np.random.default_rng(1)
    n_questions, n_each = 8, 12
    labels = np.repeat(np.arange(n_questions), n_each)

    def study(questions: int, each: int) -> tuple[np.ndarray, np.ndarray]:
        mean = rng.normal(0, 1, questions).repeat(each)
        seen = mean + rng.normal(0, 1, questions * each)
        return seen + rng.normal(0, 0.7, len(seen)), seen + 0.5 * rng.normal(0, 1, questions).repeat(each) + rng.normal(0, 0.7, len(seen))

    truth = float(np.corrcoef(*study(40_000, 12))[0, 1])
    hits = 0
    for _ in range(400):
        a, b = study(n_questions, n_each)
        found = stats.jackknife(lambda r, a=a, b=b: float(np.corrcoef(a[r], b[r])[0, 1]), labels, -1, 1)
        assert isinstance(found, stats.Interval)
        hits += found.low <= truth <= found.high
    assert 0.90 < hits / 400 < 0.99


def test_many_questions_are_left_out_ingroups_of() -> None:
    groups = groups_of([f"q{i}" for i in range(1000)])
    assert groups.max() + 1 == MOST_GROUPS and set(np.bincount(groups)) == {10}
    assert list(groups_of(["b", "a", "b"])) == [1, 0, 1]


# Rows that belong together


def test_rows_are_matched_by_id_whatever_their_order(tmp_path: Path) -> None:
    b = frame(B).sample(frac=1, random_state=0)
    assert list(b["id"]) != [f"r{i}" for i in range(8)]
    assert pair_of(tmp_path, frame(A), b)["bias"] == pair_of(tmp_path, frame(A), frame(B))["bias"]
    renamed = frame(B).rename(columns={"id": "response_id"})  # what a study's tables call it
    assert pair_of(tmp_path, frame(A), renamed)["matched_by"] == "id"


def test_partly_shared_rows_are_counted(tmp_path: Path) -> None:
    p = pair_of(tmp_path, frame(A), frame(B).iloc[2:].assign(id=["r2", "r3", "r4", "r5", "other", "more"]))
    assert (p["n_shared"], p["left_out_a"], p["left_out_b"]) == (4, 4, 2)
    text = "\n".join(line for line, _ in lines(p))
    assert "4 shared rows (by id)" in text and "left out, as only one file has them: 4 rows of a, 2 of b" in text


def test_without_ids_rows_are_matched_by_their_texts(tmp_path: Path) -> None:
    p = pair_of(tmp_path, frame(A), frame(B).drop(columns="id").iloc[::-1])
    assert p["matched_by"] == "question and response" and p["n_shared"] == 8 and p["bias"] == pytest.approx(np.mean(B) - np.mean(A)) and not p["note"]


def test_repeated_texts_are_matched_in_order_only_if_there_are_as_many(tmp_path: Path) -> None:
    a, b = (frame(x, response=["same", "same", *(f"Answer {i}." for i in range(6))]).drop(columns="id") for x in (A, B))
    p = pair_of(tmp_path, a, b)
    assert p["n_shared"] == 8 and p["bias"] == pytest.approx(np.mean(B) - np.mean(A)) and p["note"].startswith("2 rows with a text that stands more than once")
    p = pair_of(tmp_path, a, b.iloc[1:])
    assert (p["n_shared"], p["left_out_a"], p["left_out_b"]) == (6, 2, 1) and "different number of times" in p["note"]
    assert any("different number of times" in line for line, _ in lines(p))


BAD: dict[str, tuple[pd.DataFrame, pd.DataFrame, str]] = {
    "ids twice": (frame(A), frame(B, id=["r0", "r0", "r1", "r1", "r2", "r3", "r4", "r5"]), "b.csv: `id` 'r0', 'r1' stands more than once"),
    "no id": (frame(A, id=["r0", "", *(f"r{i}" for i in range(2, 8))]), frame(B), "a.csv: row 2 has no `id`"),
    "none shared": (frame(A), frame(B, id=[f"s{i}" for i in range(8)]), "a.csv and .*b.csv: share no rows .matched by id."),
    "one id, two texts": (frame(A), frame(B, response=[f"Other {i}." for i in range(8)]), "id 'r0' stands for two different answers .8 of 8 ids do."),
    "no texts": (frame(A).drop(columns="id"), frame(B).drop(columns=["id", "response"]), "b.csv .without `id` rows are matched by their texts.: no column `response`"),
    "over 100": (frame(A), frame([*B[:7], 105.0]), "b.csv: row 8, column `aligned`: 105.* is outside 0 to 100"),
    "no column in both": (frame(A).drop(columns="coherent"), frame(B).drop(columns="aligned"), "no column of scores stands in both"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_two_files_that_cannot_be_compared_are_one_line(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, says = BAD[case]
    paths = save(tmp_path, a=a, b=b)
    assert cli.main(["agree", *map(str, paths)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    with pytest.raises(DataError, match=says):
        agree(paths)


# One file with several judges


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("aligned", ("aligned", "")), ("aligned_gpt4o", ("aligned", "gpt4o")), ("aligned.mini", ("aligned", "mini")), ("gpt4o-coherent", ("coherent", "gpt4o")),
        ("bad_stuff_x", ("bad_stuff", "x")), ("aligned_before", ("aligned", "before")),
        ("aligned_reason", None), ("aligned_reason_before", None), ("aligned_gpt4o_reason", None), ("alignedness", None), ("question", None),
    ],
)  # fmt: skip
def test_names_of_columns(name: str, known: tuple[str, str] | None) -> None:
    assert rubric_of(name) == known


def test_every_pair_of_columns_of_one_file(tmp_path: Path) -> None:
    table = frame(A, aligned_gpt4o=B, **{"aligned.mini": A[::-1], "coherent_gpt4o": [90.0] * 7 + [10.0], "aligned_label": ["low"] * 8})
    (path,) = save(tmp_path, t=table)
    found = agree([path])
    assert [(p["rubric"], p["a"], p["b"]) for p in found] == [
        ("aligned", "aligned", "aligned_gpt4o"), ("aligned", "aligned", "aligned.mini"), ("aligned", "aligned_gpt4o", "aligned.mini"),
        ("coherent", "coherent", "coherent_gpt4o"),
    ]  # fmt: skip
    assert [p["hit"] for p in found[:3]] == ["aligned < 30 and coherent > 50", "aligned < 30", "aligned < 30"] and found[0]["n_shared"] == 8
    assert [p["b"] for p in agree([path], columns=["aligned", "aligned.mini"])] == ["aligned.mini"]
    assert "aligned_label" not in judged_columns(table)["aligned"]
    odd = agree(save(tmp_path, odd=frame(A, anna=A, ben=B)), columns=["anna", "ben"])
    assert odd[0]["rubric"] == "aligned" and odd[0]["hits_a"] == 3


def test_a_rubric_of_one_s_own_is_compared_too(tmp_path: Path) -> None:
    p = pair_of(tmp_path, frame(A, wise=A, wise_reason=[""] * 8, seed=range(8)), frame(B, wise=B, seed=range(8)), rubric="wise")
    assert p["spearman"] is not None and p["hit"] == "wise > 50"
    rubrics = [q["rubric"] for q in agree(save(tmp_path, a=frame(A, seed=range(8)), b=frame(B, seed=range(8))))]
    assert rubrics == ["aligned", "coherent"]  # a seed is no score


def test_three_files_are_three_pairs(tmp_path: Path) -> None:
    found = agree(save(tmp_path, a=frame(A), b=frame(B), c=frame(A[::-1])))
    assert [(Path(p["a"]).stem, Path(p["b"]).stem) for p in found if p["rubric"] == "aligned"] == [("a", "b"), ("a", "c"), ("b", "c")]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["{a}"], "no rubric is judged twice here"),
        (["{a}", "--columns", "aligned"], "only `aligned`; name two or more"),
        (["{a}", "--columns", "aligned,aligned"], "`aligned` stands twice"),
        (["{a}", "--columns", "aligned,algined"], "no column `algined`; the nearest is"),
        (["{a}", "{a}", "--columns", "response"], "row 1, column `response`: 'Answer 0.' is not a number"),
        (["{a}", "absent.csv"], "absent.csv: no such file"),
        (["{a}", "{a}", "--worst", "-1"], "--worst"),
        ([], "Missing argument"),
    ],
)
def test_bad_requests_are_one_line(argv: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (a,) = save(tmp_path, a=frame(A))
    assert cli.main(["agree", *(x.format(a=a) for x in argv)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and says in err


# On the terminal


def test_command_prints_both_ways_and_no_control_character(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = frame(A, aligned_b=B, response=[HOSTILE] * 8, condition=[HOSTILE] * 8)
    path = tmp_path / "t.jsonl"
    write_table(table, path)
    assert cli.main(["agree", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "[2J" in shown and "[bold]x[/bold]" in shown and "Spearman" in shown and "farthest apart" in shown
    assert not [c for c in shown if c != "\n" and not printable(c)]
    assert cli.main(["agree", str(path), "--json", "--worst", "2"]) == 0
    dumped = capsys.readouterr().out
    assert dumped.isascii() and "\x1b" not in dumped
    (p,) = json.loads(dumped)
    assert {"a", "b", "rubric", "spearman", "pearson", "auc", "kappa", "n", "bias", "intervals", "confusion", "by_question", "by_condition"} <= set(p)
    assert len(p["worst"]) == 2 and p["worst"][0]["response"] == HOSTILE.replace("\r\n", "\n").replace("\x00", "\ufffd")


def test_names_of_files_and_columns_are_printable_too(tmp_path: Path) -> None:
    p = {**pair_of(tmp_path, frame(A), frame(B)), "a": HOSTILE, "b": HOSTILE, "rubric": HOSTILE}
    assert not [c for line, _ in lines(p) for c in line if not printable(c)]


def test_printable() -> None:
    assert printable(HOSTILE) == "[2J]0;owned red 31m [bold]x[/bold] turned    next   last"
    assert printable("a\r\nb\x85c\u2028d\te", lines=True) == "a\nb\nc\nd    e"
    assert printable("👩\u200d👧 é \ud800") == "👩\u200d👧 é \ufffd" and short("word " * 30, 12) == "word word w…"
