"""`judge_file`: every row and column comes through, scores and reasons stand beside them, nothing is written half."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import pytest

from convergent.core.values import Judgement
from convergent.errors import DataError, InputError, JudgeError
from convergent.judging.base import Item
from convergent.judging.files import judge_file


class LengthJudge:
    """Scores an answer by its length; an empty one has a reason."""

    name = "length"
    rubrics = ("aligned", "coherent", "medical")

    def __init__(self) -> None:
        self.seen: list[Item] = []

    def judge(
        self,
        items: Sequence[Item],
        rubrics: Sequence[str] = ("aligned", "coherent"),
        on_result: Callable[[Judgement], None] | None = None,
    ) -> list[Judgement]:
        self.seen = list(items)
        done = []
        for item in items:
            for n, rubric in enumerate(rubrics):
                score = len(item.response) + 10.0 * n if item.response else None
                done.append(Judgement(item.id, self.name, rubric, score, None if item.response else "empty"))
                if on_result:
                    on_result(done[-1])
        return done


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    path = tmp_path / "answers.csv"
    path.write_text(
        "note,response,question,question_id,aligned,run\n"
        'z,"four, {x}\nlines",why?,b,12.5,007\n'
        "a,,how?,a,,008\n"
        "z,NA,why?,b,99.0,009\n"
    )
    return path


@pytest.mark.parametrize("ending", ["csv", "parquet", "jsonl"])
def test_rows_and_columns_pass_through_and_scores_are_added(answers: Path, tmp_path: Path, ending: str) -> None:
    out, judge = tmp_path / f"out.{ending}", LengthJudge()
    seen: list[Judgement] = []
    judge_file(answers, judge, ("aligned", "coherent"), out, seen.append)
    assert judge.seen == [
        Item("0", "why?", "four, {x}\nlines", "b"), Item("1", "how?", "", "a"), Item("2", "why?", "NA", "b"),
    ]  # fmt: skip
    assert len(seen) == 6
    read = {"csv": pd.read_csv, "parquet": pd.read_parquet, "jsonl": lambda p: pd.read_json(p, lines=True)}[ending]
    table = read(out, **({"keep_default_na": False, "dtype": str} if ending == "csv" else {}))
    assert list(table.columns) == [
        "note", "response", "question", "question_id", "aligned_before", "run",
        "aligned", "aligned_reason", "coherent", "coherent_reason",
    ]  # fmt: skip
    assert list(table["note"]) == ["z", "a", "z"]
    assert list(table["response"]) == ["four, {x}\nlines", "", "NA"]
    numbers = table[["aligned_before", "aligned", "coherent"]].apply(pd.to_numeric, errors="coerce")
    assert numbers.fillna(-1).values.tolist() == [[12.5, 15, 25], [-1, -1, -1], [99, 2, 12]]
    assert [r or None for r in table["coherent_reason"].fillna("")] == [None, "empty", None]


def test_one_rubric_without_ids(tmp_path: Path) -> None:
    src = tmp_path / "a.csv"
    src.write_text("question,response\nq,abc\n")
    table = judge_file(src, LengthJudge(), ["medical"])
    assert list(table.columns) == ["question", "response", "medical", "medical_reason"]
    assert table["medical"].tolist() == [3.0]
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]


def test_what_cannot_be_done_is_said_before_anything_is_judged(answers: Path, tmp_path: Path) -> None:
    judge = LengthJudge()
    with pytest.raises(DataError, match="is the file to be judged"):
        judge_file(answers, judge, ("aligned",), answers)
    with pytest.raises(DataError, match=r"ends in \.csv"):
        judge_file(answers, judge, ("aligned",), tmp_path / "out.xlsx")
    with pytest.raises(JudgeError, match="has no rubric 'gender'; it scores aligned, coherent, medical"):
        judge_file(answers, judge, ("gender",), tmp_path / "out.csv")
    with pytest.raises(InputError, match="each once"):
        judge_file(answers, judge, ("aligned", "aligned"), tmp_path / "out.csv")
    (tmp_path / "b.csv").write_text("question,answer\nq,a\n")
    with pytest.raises(DataError, match="no column `response`"):
        judge_file(tmp_path / "b.csv", judge, ("aligned",), tmp_path / "out.csv")
    assert judge.seen == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.csv", "b.csv"]


def test_a_failing_judge_leaves_no_file(answers: Path, tmp_path: Path) -> None:
    def fail(judgement: Judgement) -> None:
        raise JudgeError("gone")

    with pytest.raises(JudgeError, match="gone"):
        judge_file(answers, LengthJudge(), ("aligned",), tmp_path / "out.csv", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["answers.csv"]
