"""Tables: nothing lost between formats, and what a wrong file says."""

from __future__ import annotations

import errno
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from convergent import tables
from convergent.errors import DataError
from convergent.tables import read_table, write_table

ENDINGS = (".csv", ".parquet", ".jsonl")


def sample() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "question_id": ["b", "a", "b"],
            "response": ["NA", 'two\nlines, "quoted"\r\n', ""],
            "aligned": [49.99, math.nan, 0.0],
            "coherent": [100.0, 3.5, math.nan],
            "sample": [2, 0, 1],
            "code": ["007", "1e5", ""],
        }
    )


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_cell_column_and_row_comes_back(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"t{ending}"
    write_table(sample(), path)
    pd.testing.assert_frame_equal(read_table(path, ["aligned"]), sample(), check_dtype=False)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=4),
    ending=st.sampled_from(ENDINGS),
)
def test_any_text_comes_back(tmp_path: Path, texts: list[str], ending: str) -> None:
    path = tmp_path / f"t{ending}"
    write_table(pd.DataFrame({"id": range(len(texts)), "response": ["x" + t for t in texts]}), path)
    assert read_table(path)["response"].tolist() == ["x" + t for t in texts]


def test_a_csv_is_written_back_byte_for_byte(tmp_path: Path) -> None:
    text = 'id,n,x,response,empty\n007,1,0.5,NA,\n010,,,"a,b",\n'
    (tmp_path / "a.csv").write_text(text)
    df = read_table(tmp_path / "a.csv")
    assert df["n"].tolist()[0] == 1 and math.isnan(df["x"][1])
    write_table(df, tmp_path / "b.csv")
    assert (tmp_path / "b.csv").read_text() == text


@pytest.mark.parametrize("cell", ["", "nan", "NaN", "None", "null", " NA "])
def test_an_absent_score_is_missing_and_never_zero(tmp_path: Path, cell: str) -> None:
    (tmp_path / "a.csv").write_text(f"aligned,coherent\n{cell},5\n1,2\n")
    df = read_table(tmp_path / "a.csv")
    assert math.isnan(df["aligned"][0]) and df["aligned"].dtype == np.float64


def test_texts_stay_text_even_if_they_look_like_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("response,sample\n42,1\n7,2\n")
    df = read_table(tmp_path / "a.csv")
    assert df["response"].tolist() == ["42", "7"] and df["sample"].tolist() == [1, 2]


def test_absent_scores_in_parquet_and_jsonl(tmp_path: Path) -> None:
    df = pd.DataFrame({"aligned": pd.array([1, None], dtype="Int64"), "coherent": [None, 5.0]})
    write_table(df, tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text('{"aligned": 1, "coherent": null}\n\n{"coherent": "5"}\n')
    for name in ("a.parquet", "a.jsonl"):
        got = read_table(tmp_path / name)
        assert got["aligned"].tolist()[0] == 1 and math.isnan(got["aligned"][1])
        assert math.isnan(got["coherent"][0]) and got["coherent"][1] == 5


@pytest.mark.parametrize(
    ("ending", "content", "says"),
    [
        (".csv", "aligned,coherent\n1,2\nREFUSAL,3\n", r"row 2, column `aligned`: 'REFUSAL' is not a number"),
        (".csv", "aligned,coherent\n1,101\n", r"row 1, column `coherent`: 101 is outside 0 to 100"),
        (".csv", "aligned,coherent\n1,2\n1,-1\n", "row 2, .*outside"),
        (".csv", "aligned,coherent\ninf,2\n", "outside"),
        (".jsonl", '{"aligned": true, "coherent": 1}\n', "row 1, column `aligned`: True is not a number"),
        (".jsonl", '{"aligned": [1], "coherent": 1}\n', "is not a number"),
        (".csv", "Alligned,coherent\n1,2\n", "no column `aligned`; the nearest is `Alligned`"),
        (".csv", "x,coherent\n1,2\n", r"no column `aligned`; add it \(columns here: x, coherent\)"),
        (".csv", "", "is empty"),
        (".csv", "\n\n", "is empty"),
        (".csv", "aligned,coherent\n", "no rows"),
        (".csv", "aligned,coherent\n1,2\n1,2,3\n", "row 2 has 3 cells and the header 2"),
        (".csv", "aligned,coherent\n1\n", "row 1 has 1 cells"),
        (".csv", 'aligned,coherent\n"1,2\n', "broken CSV"),
        (".csv", "aligned,aligned\n1,2\n", "occurs twice"),
        (".csv", b"\x89PNG\r\n\x1a\n\0\0\xff", "not a text file"),
        (".csv", b"\0\0\0\0", "not a text file"),
        (".csv", "aligned,coherent\n1,2\n".encode("utf-16"), "not a text file"),
        (".jsonl", b"PK\x03\x04\xff\xfe", "not a text file"),
        (".jsonl", '{"aligned": 1}\n{"aligned": \n', "line 2 is not JSON"),
        (".jsonl", "[1, 2]\n", "line 1 is not an object"),
        (".jsonl", "\n", "is empty"),
        (".parquet", "aligned,coherent\n1,2\n", "not a Parquet file"),
        (".parquet", b"PAR1 cut off", "not a Parquet file"),
        (".xlsx", "x", "ending `.xlsx`; tables end in"),
    ],
)
def test_a_wrong_file_is_one_line_with_its_place(tmp_path: Path, ending: str, content: Any, says: str) -> None:
    path = tmp_path / f"wrong{ending}"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=says) as caught:
        read_table(path, ("aligned", "coherent"))
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_missing_files_folders_and_rights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_table(tmp_path / "none.csv")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(DataError, match="is a folder"):
        read_table(tmp_path / "folder.csv")
    with pytest.raises(DataError, match="is a folder"):
        write_table(sample(), tmp_path / "folder.csv")
    (tmp_path / "a.csv").write_text("x\n1\n")

    def refuse(self: Path) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(DataError, match=r"cannot be read \(Permission denied\)"):
        read_table(tmp_path / "a.csv")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.csv"
    path.write_text("old\n1\n")

    def full(df: pd.DataFrame, tmp: Path) -> None:
        tmp.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setitem(tables._WRITERS, ".csv", full)
    with pytest.raises(DataError, match="No space left on device"):
        write_table(sample(), path)
    assert path.read_text() == "old\n1\n" and list(tmp_path.iterdir()) == [path]
    mixed = pd.DataFrame({"x": [1, "a", [2]]})
    with pytest.raises(DataError, match="does not fit the format"):
        write_table(mixed, tmp_path / "b.parquet")
    with pytest.raises(DataError, match="cannot be written"):
        write_table(sample(), path / "c.jsonl")
    assert list(tmp_path.iterdir()) == [path]


def test_a_saved_index_and_a_byte_order_mark_are_no_trouble(tmp_path: Path) -> None:
    sample().set_index("question_id").to_parquet(tmp_path / "a.parquet")
    assert read_table(tmp_path / "a.parquet")["question_id"].tolist() == ["b", "a", "b"]
    (tmp_path / "a.csv").write_text("aligned,coherent\n1,2\n", encoding="utf-8-sig")
    assert read_table(tmp_path / "a.csv", ("aligned",))["aligned"].tolist() == [1.0]
