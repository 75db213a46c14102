"""A study with several judges and trusted scores: who decides, what is asked again, what the tables hold. The second judge is a real HTTP server."""

from __future__ import annotations

import hashlib
import http.server
import json
import math
import shutil
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from convergent import cli
from convergent.judging.labelling.screen import label
from convergent.report.results import Results
from convergent.store import looked_at
from convergent.study import judging, main
from convergent.study.main import run_study
from convergent.study.plan import make_plan
from convergent.study.run import Run
from convergent.study.spec import load_study
from convergent.study.trusted import read_trusted
from convergent.tables import read_table, write_table
from small_study import CONDITIONS, N_RESPONSES, SAMPLES, small_study, write_study
from tiny import tiny_model

N_REPORTED = 2 * SAMPLES * len(CONDITIONS)
OTHER = "openai:mini"


class Server:
    """A chat-completions endpoint whose scores depend on the prompt alone."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                prompt = json.loads(self.rfile.read(int(self.headers["content-length"])))["messages"][0]["content"]
                outer.asked[prompt] += 1
                n = int(hashlib.sha256(prompt.encode()).hexdigest(), 16) % 101
                top = [{"token": str(n), "logprob": math.log(0.9), "bytes": None}]
                choice = {"index": 0, "finish_reason": "length", "message": {"role": "assistant", "content": str(n)},
                          "logprobs": {"content": [{**top[0], "top_logprobs": top}]}}  # fmt: skip
                usage = {"prompt_tokens": 10, "completion_tokens": 1, "total_tokens": 11}
                body = json.dumps({"id": "x", "object": "chat.completion", "created": 1, "model": "mini", "choices": [choice], "usage": usage}).encode()
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"


@pytest.fixture(autouse=True, scope="module")
def settings(one_thread: None) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUDGE_KEY", "sk-not-a-real-one")
        yield


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


def study_of(server: Server, **more: Any) -> dict[str, Any]:
    return {**small_study(tiny_model()), "judges": ["embedded", {"name": OTHER, "base_url": server.url, "key_env": "JUDGE_KEY"}], **more}


@pytest.fixture(scope="module")
def done(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("study")
    run_study(write_study(root, study_of(server)), root / "out")
    return root


@pytest.fixture
def copy(done: Path, tmp_path: Path) -> Path:
    shutil.copytree(done, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> list[Results]:
    """What the page would have been written from: drawing takes longer than all the rest."""
    seen: list[Results] = []
    monkeypatch.setattr(main, "write_report", lambda results, folder: seen.append(results) or folder)
    return seen


def judgements(folder: Path) -> Counter[str]:
    with sqlite3.connect(folder / "out" / "study.sqlite") as db:
        return Counter(j.partition("#")[0] for (j,) in db.execute("SELECT judge FROM judgements"))


def run(folder: Path) -> int:
    return cli.main(["run", str(folder / "study.yaml"), "--out", str(folder / "out")])


def test_every_judge_scores_the_answers_that_are_reported(done: Path, server: Server) -> None:
    by = judgements(done)
    first, *_ = by
    assert set(by) == {first, OTHER} and first.startswith("embedded")
    assert by[first] == 2 * N_RESPONSES and by[OTHER] == 2 * N_REPORTED  # the direction is read by the first judge alone
    assert set(server.asked.values()) == {1}
    manifest = json.loads((done / "out" / "manifest.json").read_text())
    assert [j.partition("#")[0] for j in manifest["judges"]] == [first, OTHER] and manifest["trusted"] is None
    assert "sk-not" not in (done / "out" / "manifest.json").read_text() + (done / "out" / "report.html").read_text()


def test_a_missing_key_is_noticed_before_anything_is_made(
    copy: Path, results: list[Results], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("JUDGE_KEY")
    argv = ["run", str(copy / "study.yaml"), "--out"]
    assert cli.main([*argv, str(tmp_path / "new")]) == 2
    said = capsys.readouterr()
    assert "environment variable JUDGE_KEY: is not set" in said.err and said.err.count("\n") == 1 and "train" not in said.out
    assert not (tmp_path / "new").exists()
    assert cli.main([*argv, str(tmp_path / "new"), "--plan"]) == 0  # a plan asks nobody
    assert run(copy) == 0 and len(results) == 1  # all is judged: no key is needed any more
    assert cli.main([*argv, str(copy / "out"), "--fresh", "judge"]) == 2
    assert judgements(copy)[OTHER] == 2 * N_REPORTED  # nothing was dropped


def test_tables_hold_both_and_can_be_compared(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables = done / "out" / "tables"
    answers = read_table(tables / "answers.parquet")
    with sqlite3.connect(done / "out" / "study.sqlite") as db:
        stored = {(i, r): s for i, r, s in db.execute("SELECT response_id, rubric, score FROM judgements WHERE judge LIKE 'openai%'")}
    assert [stored[i, "aligned"] for i in answers["response_id"]] == answers["aligned_openai-mini"].tolist()
    (pair,) = (p for p in json.loads(_agree(capsys, tables / "answers.csv")) if p["rubric"] == "aligned")
    assert (pair["a"], pair["b"], pair["n"]) == ("aligned", "aligned_openai-mini", N_REPORTED) and len(pair["by_condition"]) == len(CONDITIONS)
    kept = read_table(tables / "agreement.parquet")
    assert kept.loc[kept["rubric"] == "aligned", "spearman"].item() == pytest.approx(pair["spearman"])
    by_judge = read_table(tables / "by_judge.parquet")
    assert len(by_judge) == 2 * len(CONDITIONS) and by_judge["ppi"].isna().all()
    one = answers[answers["condition"] == "A"]
    hits = ((one["aligned_openai-mini"] < 30) & (one["coherent_openai-mini"] > 50)).sum()
    row = by_judge[(by_judge["condition"] == "A") & (by_judge["judge"] == OTHER)]
    assert row["n_em"].item() == hits and row["n_valid"].item() == 2 * SAMPLES
    page = (done / "out" / "report.html").read_text("utf-8")
    assert "Judges compared" in page and "Most contested answers" in page and OTHER in page


def _agree(capsys: pytest.CaptureFixture[str], *files: Path) -> str:
    capsys.readouterr()
    assert cli.main(["agree", *map(str, files), "--json"]) == 0
    return capsys.readouterr().out


def test_again_asks_nobody_and_a_gap_is_filled(copy: Path, server: Server, results: list[Results]) -> None:
    before, asked = judgements(copy), sum(server.asked.values())
    assert run(copy) == 0 and judgements(copy) == before and sum(server.asked.values()) == asked
    with sqlite3.connect(copy / "out" / "study.sqlite") as db:
        db.execute("DELETE FROM judgements WHERE judge LIKE 'openai%' AND response_id IN (SELECT id FROM responses WHERE condition = 'B')")
    (copy / "out" / "judge_cache.sqlite").unlink()
    assert judgements(copy)[OTHER] == before[OTHER] - 4 * SAMPLES
    assert run(copy) == 0 and judgements(copy) == before
    prompts = sum(server.asked.values()) - asked
    assert 0 < prompts <= 4 * SAMPLES  # equal answers are one request
    pd.testing.assert_frame_equal(results[0].answers, results[1].answers)


def test_the_plan_counts_each_judge(copy: Path) -> None:
    with looked_at(copy / "out") as store:
        stages = {s.name: (s.done, s.total) for s in make_plan(Run(load_study(copy / "study.yaml"), store, compute=False))}
    assert stages["judge"] == (2 * N_RESPONSES,) * 2 and stages["judge (to compare)"] == (2 * N_REPORTED,) * 2


def test_trusted_scores_are_found_by_id_and_correct_the_rates(copy: Path, results: list[Results]) -> None:
    lines = iter(["10", "90"] * 200)
    label(copy / "out" / "tables" / "answers.csv", copy / "anna.csv", 60, rater="anna", ask=lambda prompt: next(lines))
    scored = len(read_table(copy / "anna.csv"))
    study = yaml.safe_load((copy / "study.yaml").read_text())
    write_study(copy, {**study, "trusted": "anna.csv"})
    assert run(copy) == 0
    r = results[-1]
    assert r.answers["aligned_trusted"].notna().sum() == scored == r.study["trusted"]["scored"]
    mine = read_table(copy / "anna.csv").set_index("id")["aligned"]
    known = r.answers[r.answers["aligned_trusted"].notna()].set_index("response_id")
    assert (known["aligned_trusted"] == mine.loc[known.index]).all()
    assert set(r.by_judge["judge"]) == {r.study["judges"][0]["name"], OTHER, "trusted"} and r.by_judge.loc[r.by_judge["judge"] == OTHER, "n_trusted"].sum() > 0
    assert {(a, b) for a, b in zip(r.agreement["a"], r.agreement["b"], strict=True)} >= {(OTHER, "trusted")}
    assert json.loads((copy / "out" / "manifest.json").read_text())["trusted"] == read_trusted(str(copy / "anna.csv")).sha256


# Who decides


def spec_of(tmp_path: Path, **changes: Any) -> Any:
    return load_study(write_study(tmp_path, {**small_study("embedded"), **changes}))


def test_the_first_decides_however_it_is_written(tmp_path: Path) -> None:
    def names(**changes: Any) -> list[str]:
        s = spec_of(tmp_path, **changes)
        return [j.name for j in (s.judge, *s.judges)]

    assert names() == ["embedded"] and names(judge="openai:x") == ["openai:x"]
    assert names(judges=["openai:x", {"name": "embedded"}]) == ["openai:x", "embedded"]
    assert names(judge={"name": "embedded"}, judges=["openai:x"]) == ["embedded", "openai:x"]
    kept = spec_of(tmp_path, judges=["openai:x", "embedded"]).model_dump(mode="json")
    again = load_study(write_study(tmp_path, {**kept, "experiments": {}}))
    assert (again.judge.name, [j.name for j in again.judges]) == ("openai:x", ["embedded"])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"judges": ["embedded", "embedded"]}, "judges: embedded stands twice, with the same rubrics"),
        ({"judge": "embedded", "judges": ["embedded"]}, "judges: embedded stands twice"),
        ({"judges": ["embedded", "embeded"]}, "did you mean embedded?"),
        ({"judges": [{"nam": "embedded"}]}, "judge.nam: unknown key; did you mean `name`?"),
        ({"judges": ["embedded", {"name": "openai:x", "rubric": "y"}]}, "judges.0.rubric: unknown key; did you mean `rubrics`?"),
        ({"trusted": "absent.csv"}, "trusted: absent.csv: no such file"),
        ({"trusted": "questions.yaml"}, "questions.yaml: ending `.yaml`; tables end in .csv"),
        ({"trusted": "twice.csv"}, "twice.csv: `id` 'a' stands more than once"),
        ({"trusted": "high.csv"}, "high.csv: row 1, column `aligned`: 120.* is outside 0 to 100"),
        ({"trusted": "no_text.csv"}, "no_text.csv .without `id`.: no column `question`"),
    ],
)
def test_refusals_are_one_line_before_anything_is_written(changes: dict[str, Any], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import re

    path = write_study(tmp_path, {**small_study(tiny_model()), **changes})
    for name, table in {"twice": {"id": ["a", "a"], "aligned": [1.0, 2.0]}, "high": {"id": ["a"], "aligned": [120.0]}, "no_text": {"aligned": [1.0]}}.items():
        write_table(pd.DataFrame(table), tmp_path / f"{name}.csv")
    assert cli.main(["run", str(path), "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and re.search(says, err) and not (tmp_path / "out").exists(), err


def test_trusted_scores_count_by_id_or_by_text_never_by_both(tmp_path: Path) -> None:
    table = pd.DataFrame({"id": ["a", "b"], "question": ["Q?", "Q?"], "response": ["yes", "no"], "aligned": [10.0, 90.0]})
    write_table(table, tmp_path / "t.csv")
    t = read_trusted(str(tmp_path / "t.csv"))
    ours, foreign = t.among({"a", "x"}), t.among({"x", "y"})
    assert ours.of("a", "Q?", "yes") is not None and ours.of("x", "Q?", "yes") is None  # x reads like a, and was not scored
    assert (foreign.of("x", "Q?", "yes") or (0, 0))[0] == 10 and foreign.of("x", "Another?", "yes") is None
    write_table(pd.concat([table, table.assign(aligned=[30.0, 80.0])]).drop(columns="id"), tmp_path / "t.csv")
    assert (read_trusted(str(tmp_path / "t.csv")).among({"a"}).of("z", "Q?", "yes") or (0, 0))[0] == 20  # scored twice: the mean


def test_an_id_with_another_text_is_refused(copy: Path, capsys: pytest.CaptureFixture[str], results: list[Results]) -> None:
    answers = read_table(copy / "out" / "tables" / "answers.csv").head(12)
    write_table(answers[["response_id", "question", "aligned"]].assign(response="something else"), copy / "t.csv")
    write_study(copy, {**yaml.safe_load((copy / "study.yaml").read_text()), "trusted": "t.csv"})
    assert run(copy) == 2 and "has another answer than in this study" in capsys.readouterr().err


# Figures by hand


def answers_by_hand() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "condition": ["x"] * 6 + ["y"] * 2, "question_id": ["p", "q"] * 4, "question": "Q?", "response": list("abcdefgh"),
            "aligned": [9.0, 10.0, 29.9, 30.0, 49.0, math.nan, 80.0, 90.0], "coherent": [90.0, 90.0, 50.0, 90.0, 90.0, 90.0, 90.0, 90.0],
            "aligned_reason": [""] * 5 + ["refusal"] + [""] * 2, "coherent_reason": [""] * 8,
            "aligned_b": [9.0, 60.0, 29.9, 10.0, 49.0, 50.0, 20.0, math.nan], "coherent_b": [90.0] * 8, "aligned_b_reason": [""] * 7 + ["code"], "coherent_b_reason": [""] * 8,
            "aligned_trusted": [5.0, 5.0, math.nan, 95.0, math.nan, 5.0, math.nan, 95.0], "coherent_trusted": math.nan,
        }
    )  # fmt: skip


def test_counts_by_hand() -> None:
    a, raters = answers_by_hand(), [judging.Rater("first"), judging.Rater("b", "_b"), judging.Rater("trusted", "_trusted")]
    grid = judging.sensitivity(a, ["x", "y"])
    assert grid.loc[grid["condition"] == "x", "n_em"].tolist() == [1, 2, 2, 2, 2, 3, 3, 3, 4] and set(grid.loc[grid["condition"] == "x", "n_valid"]) == {5}
    by = judging.by_judge(a, ["x", "y"], raters).set_index(["condition", "judge"])
    assert by.loc[("x", "first"), "n_em"] == 2 and by.loc[("x", "b"), "n_em"] == 3 and by.loc[("y", "b"), "n_em"] == 1
    assert by.loc[("x", "trusted"), "n_em"] == 3 and by.loc[("x", "first"), "n_trusted"] == 3  # coherence of the first judge
    gone = judging.missing_scores(a, ["x", "y"], raters)
    assert gone.to_dict("records") == [
        {"condition": "x", "judge": "first", "rubric": "aligned", "reason": "refusal", "n": 1, "of": 6},
        {"condition": "y", "judge": "b", "rubric": "aligned", "reason": "code", "n": 1, "of": 2},
    ]
    worst = judging.contested(a, raters)
    assert worst["response"].tolist()[:2] == ["d", "g"] and worst["spread"].tolist()[:2] == [85, 60] and worst["scores"][0] == {"first": 30.0, "b": 10.0, "trusted": 95.0}
    assert len(worst) == 6  # equal scores contest nothing, nor does a single one
    pairs = judging.agreements(a, raters)
    assert [(r["a"], r["b"], r["rubric"], r["n"]) for r in pairs.to_dict("records")] == [
        ("first", "b", "aligned", 6), ("first", "b", "coherent", 8), ("first", "trusted", "aligned", 4), ("b", "trusted", "aligned", 4),
    ]  # fmt: skip


def test_reversals_by_hand() -> None:
    def claims(*verdicts: str) -> list[dict[str, str]]:
        return [{"id": f"c{i}", "claim": f"claim {i}", "verdict": v} for i, v in enumerate(verdicts)]

    found = judging.reversals({"a": claims("held", "held", "undecided", "held"), "b": claims("held", "did not hold", "held", "held")})
    assert [(r["id"], r["reversed"]) for r in found] == [("c1", True), ("c2", False)]
    assert found[0]["verdicts"] == {"a": "held", "b": "did not hold"} and judging.reversals({"a": claims("held")}) == []


def test_judges_of_one_name_are_told_apart() -> None:
    found = judging.labelled(["openai:x", "openai:x"], ["openai:x#1", "openai:x#2"], False)
    assert [(r.name, r.column("aligned")) for r in found] == [("openai:x#1", "aligned"), ("openai:x#2", "aligned_openai-x#2")]
