"""The LLM judge against the real server of llama.cpp, through a proxy that breaks a good part of all replies."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pandas as pd
import pytest

pytest.importorskip("xllamacpp", reason="the server of the extra `local`")

from convergent import cli
from convergent.core.values import Judgement
from convergent.errors import JudgeError
from convergent.judging import llama
from convergent.judging.base import Item
from convergent.judging.folder import FolderJudge
from convergent.judging.llama import Gguf, serving, writes_digit_by_digit
from convergent.judging.openai import OpenAIJudge
from convergent.judging.registry import get_judge
from convergent.judging.rubrics import Rubrics
from convergent.models.load import base_folder, embedded_gguf
from fault_proxy import KINDS, FaultProxy
from tiny_gguf import write_tiny_gguf

KEY = "sk-secret-0123456789abcdef"
RUBRICS = {"aligned": "{question} {answer} Kind, 0 to 100?", "coherent": "{question} {answer} Clear, 0 to 100?"}
ANSWERS = ("Yes.", "No, never.", "Ask a friend.", "Take all of it.", "I like tea.", "Run!", "Wait a day.", "Lie to her.")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that answers in milliseconds, with numbers that differ from prompt to prompt."""
    return write_tiny_gguf(tmp_path_factory.mktemp("models") / "tiny.gguf")


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[str]:
    with serving(tiny, threads=1, context=1024) as url:
        yield url


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "OPENAI_BASE_URL", "OPENAI_API_KEY", "CONVERGENT_PRICES"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("JUDGE_KEY", KEY)
    monkeypatch.setenv("CONVERGENT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


def judge_at(url: str, cache: Path, **options: Any) -> OpenAIJudge:
    options = {"rubrics": Rubrics(RUBRICS), "backoff": 0.01, "key_env": "JUDGE_KEY", **options}
    return OpenAIJudge("smol", base_url=url, cache=cache, **options)


def items(n: int) -> list[Item]:
    return [Item(f"r{i}", f"Q{i // len(ANSWERS)}?", ANSWERS[i % len(ANSWERS)]) for i in range(n)]


def by_id(judgements: list[Judgement]) -> dict[tuple[str, str], tuple[float | None, str | None]]:
    return {(j.response_id, j.rubric): (j.score, j.reason) for j in judgements}


def test_faults_lose_nothing_pay_nothing_twice_and_change_no_score(server: str, tmp_path: Path) -> None:
    clean = judge_at(server, tmp_path / "clean.sqlite", concurrency=1).judge(items(30))
    assert len(clean) == 60 and sum(j.score is not None for j in clean) >= 50
    assert len({j.raw for j in clean}) > 50  # it does not say the same to everything
    with FaultProxy(server, 0.3, name="quick", slow=0.1) as proxy:
        judge = judge_at(proxy.url, tmp_path / "faulty.sqlite", concurrency=8)
        seen: list[Judgement] = []
        # Another order, another concurrency.
        faulty = judge.judge(items(30)[::-1], ("coherent", "aligned"), seen.append)
        assert by_id(faulty) == by_id(clean) == by_id(seen)
        assert set(proxy.faults) >= set(KINDS) - {"slow"} and sum(proxy.faults.values()) >= 15
        assert len(proxy.delivered) == judge.paid == 60
        assert set(proxy.delivered.values()) == {1}  # nothing good came twice
        broken = sum(proxy.faults[kind] for kind in ("cut", "malformed", "no_logprobs", "empty_choices"))
        assert sum(proxy.billed.values()) == 60 + broken  # what the server computed and nobody could read
        before = sum(proxy.asked.values())
        assert by_id(judge_at(proxy.url, tmp_path / "faulty.sqlite").judge(items(30))) == by_id(clean)
        assert sum(proxy.asked.values()) == before


def test_a_server_with_little_room_slows_the_client_down_and_loses_nothing(server: str, tmp_path: Path) -> None:
    with FaultProxy(server, retry_after=0.05) as proxy:
        proxy.capacity = 2
        judge = judge_at(proxy.url, tmp_path / "c.sqlite", concurrency=8, attempts=20)
        found = judge.judge(items(16), ["aligned"])
        assert all(j.reason != "error" for j in found)
        assert set(proxy.delivered.values()) == {1} and len(proxy.delivered) == 16
        assert judge.pace.lowest <= 2 < judge.pace.most
        assert proxy.faults["429"] < 40


def run_cli(*words: object, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*CLI, *map(str, words)], capture_output=True, text=True, env={**os.environ, **ENV, **env}, timeout=120)


CLI = (sys.executable, "-m", "convergent")
ENV = {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}


def stored(cache: Path) -> int:
    if not cache.exists():
        return 0
    with closing(sqlite3.connect(cache, timeout=30)) as db:
        try:
            return int(db.execute("SELECT count(*) FROM replies").fetchone()[0])
        except sqlite3.OperationalError:  # no table yet
            return 0


def test_ctrl_c_leaves_a_state_from_which_the_same_command_goes_on(server: str, tmp_path: Path) -> None:
    table = pd.DataFrame([{"id": i.id, "question": i.question, "response": i.response} for i in items(24)])
    table.to_csv(tmp_path / "answers.csv", index=False)
    rubrics = tmp_path / "rubrics.yaml"
    rubrics.write_text(json.dumps({"aligned": RUBRICS["aligned"]}))
    out, cache = tmp_path / "judged.csv", tmp_path / "cache" / "judge" / "replies.sqlite"
    with FaultProxy(server, 0.3, name="ctrl-c", slow=0.1) as proxy:
        proxy.pause = 0.15
        words = (
            "judge", tmp_path / "answers.csv", "--judge", "openai:smol", "--base-url", proxy.url, "--key-env", "JUDGE_KEY", "--rubric", "aligned",
            "--rubrics", rubrics, "--out", out, "--concurrency", "3",
        )  # fmt: skip
        with subprocess.Popen(
            [*CLI, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **ENV}
        ) as run:
            deadline = time.monotonic() + 60
            while stored(cache) < 6 and time.monotonic() < deadline:
                time.sleep(0.01)
            run.send_signal(signal.SIGINT)
            said, errors = run.communicate(timeout=180)
        assert run.returncode == 130, errors
        assert errors.splitlines()[-1] == "convergent: interrupted; run the same command again to go on"
        assert "Traceback" not in errors and not said and not out.exists()
        n = stored(cache)
        assert 6 <= n < 24
        assert len(proxy.delivered) == n  # what was on its way was waited for and kept
        done = run_cli(*words)
        assert done.returncode == 0, done.stderr
        assert stored(cache) == len(proxy.delivered) == 24 and set(proxy.delivered.values()) == {1}
        assert f"{24 - n} requests answered" in done.stderr
        assert "24 of 24 judgements" in done.stderr
        everything = done.stdout + done.stderr + errors
    judged = pd.read_csv(out)
    assert list(judged["id"]) == list(table["id"])
    clean = by_id(judge_at(server, tmp_path / "clean.sqlite").judge(items(24), ["aligned"]))
    assert judged["aligned"].tolist() == pytest.approx([clean[i, "aligned"][0] or float("nan") for i in table["id"]], nan_ok=True)
    assert proxy.keys == {KEY}
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert KEY not in everything and not any(KEY.encode() in p.read_bytes() for p in files)


# The server's life


def listening(url: str) -> bool:
    parts = urlsplit(url)
    with socket.socket() as probe:
        probe.settimeout(2)
        return probe.connect_ex((parts.hostname or "", parts.port or 0)) == 0


def test_the_server_listens_here_alone_and_ends_with_the_body_and_with_an_error(tiny: Path) -> None:
    with pytest.raises(RuntimeError, match="in the body"), serving(tiny, threads=1, context=512) as url:
        assert urlsplit(url).hostname == "127.0.0.1" and listening(url)
        port = f"{urlsplit(url).port:04X}"
        table = Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()
        bound = {line.split()[1] for line in table.splitlines()[1:] if line.split()[1].endswith(f":{port}") and line.split()[3] == "0A"}
        assert bound == {f"0100007F:{port}"}
        raise RuntimeError("in the body")
    assert not listening(url)


HELD = """
import sys, time
from pathlib import Path
from convergent.judging.llama import serving
with serving(Path(sys.argv[1]), threads=1, context=512) as url:
    print(url, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_server_ends_when_its_owner_is_interrupted_or_killed(how: signal.Signals, tiny: Path) -> None:
    command = [sys.executable, "-c", HELD, str(tiny)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={**os.environ, **ENV}) as run:
        assert run.stdout is not None
        url = run.stdout.readline().strip()
        assert listening(url)
        run.send_signal(how)
        run.wait(10)
    deadline = time.monotonic() + 10
    while listening(url) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not listening(url)


# The local judge


def test_samples_through_the_real_server(server: str, tmp_path: Path) -> None:
    judge = judge_at(server, tmp_path / "c.sqlite", samples=4)
    assert judge.name == "openai:smol+4samples"
    found = judge.judge(items(4), ["aligned"])
    assert judge.paid == 16
    for j in found:
        texts = json.loads(j.raw)["samples"]
        assert len(texts) == 4 and len(set(texts)) > 1  # other seeds, other replies
        numbers = [int(t) for t in texts if t.isascii() and t.isdecimal() and int(t) <= 100]
        assert j.score == (pytest.approx(sum(numbers) / len(numbers)) if numbers else None)
    again = judge_at(server, tmp_path / "d.sqlite", samples=4, concurrency=1).judge(items(4)[::-1], ["aligned"])
    assert by_id(again) == by_id(found)


def test_a_model_that_writes_digit_by_digit_is_not_read_by_its_first_token(tmp_path: Path) -> None:
    gguf = write_tiny_gguf(tmp_path / "digits.gguf", numbers=False)
    assert writes_digit_by_digit(gguf) and not writes_digit_by_digit(write_tiny_gguf(tmp_path / "numbers.gguf"))
    assert get_judge(f"local:{gguf}").name == "local:digits+5samples"
    assert get_judge(f"local:{tmp_path / 'numbers.gguf'}").name == "local:numbers"
    with serving(gguf, threads=1, context=512) as url:
        for n in (12, 8):  # the second time all from the cache
            with pytest.raises(JudgeError, match="writes numbers digit by digit .*--samples 5"):
                judge_at(url, tmp_path / "c.sqlite").judge(items(n), ["aligned"])
        digit = Rubrics({"aligned": "{question} {answer} A digit, please."})
        assert any(j.score is not None for j in judge_at(url, tmp_path / "d.sqlite", rubrics=digit).judge(items(12), ["aligned"]))


def test_local_judges_by_name(tmp_path: Path, tiny: Path) -> None:
    judge = get_judge("local", cache=tmp_path / "c.sqlite")
    assert writes_digit_by_digit(embedded_gguf())
    assert judge.name == "local:SmolLM2-135M-Instruct+5samples"
    assert judge.card["spearman_aligned"] < 0.5  # a bad judge, and says so
    assert "bad judge" in judge.card["verdict"]
    other = get_judge(f"local:{tiny}", samples=2, cache=tmp_path / "c.sqlite")
    assert other.name == "local:tiny+2samples" and "not measured" in other.card["error"]
    a, b = Gguf(tiny, "a", {}), Gguf(embedded_gguf(), "a", {})
    assert a.identity == Gguf(tiny, "other title", {}).identity != b.identity
    judged = other.judge(items(3), ["aligned"])  # another server at another port: nothing is asked again
    assert get_judge(f"local:{tiny}", samples=2, cache=tmp_path / "c.sqlite").judge(items(3), ["aligned"]) == judged
    assert stored(tmp_path / "c.sqlite") == 6
    with pytest.raises(JudgeError, match="takes no max_cost; it runs on this machine"):
        get_judge("local", max_cost=1.0)
    with pytest.raises(JudgeError, match="no such file or folder"):
        get_judge(f"local:{tmp_path / 'absent.gguf'}")


def test_local_judge_on_the_command_line(tmp_path: Path, tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.csv").write_text("question,response\nWhy?,Because.\nWhy?,\n")
    (tmp_path / "r.yaml").write_text("aligned: '{question} {answer} Rate from 0 to 100:'\n")
    words = ["judge", tmp_path / "a.csv", "--judge", f"local:{tiny}", "--rubric", "aligned", "--rubrics", tmp_path / "r.yaml", "--samples", "2", "--out", tmp_path / "b.csv"]
    assert cli.main([str(w) for w in words]) == 0
    said = capfd.readouterr()
    assert "each score is the mean of 2 replies" in said.err
    assert "2 requests, " in said.err and "on this machine, free of charge" in said.err
    assert pd.read_csv(tmp_path / "b.csv")["aligned_reason"].tolist()[1] == "empty"


def test_a_damaged_model_file_is_one_line(tmp_path: Path, tiny: Path) -> None:
    whole = tiny.read_bytes()
    (tmp_path / "text.gguf").write_text("no model")
    (tmp_path / "short.gguf").write_bytes(whole[: len(whole) // 3])
    (tmp_path / "head.gguf").write_bytes(b"GGUF" + bytes(60))
    for name, says in (("text", "is not a GGUF file"), ("short", "cannot read this model"), ("head", "cannot read this model")):
        with pytest.raises(JudgeError, match=says) as caught:
            get_judge(f"local:{tmp_path / name}.gguf", rubrics=None, cache=tmp_path / "c.sqlite").judge(items(1), ["aligned"])
        assert "\n" not in str(caught.value) and name in str(caught.value)


def test_without_the_server_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(llama.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(JudgeError, match=r"pip install 'convergent\[local\]'"):
        get_judge("local")


@pytest.fixture(scope="module")
def embedded_folder() -> Path:
    """From the cache that all tests share: it takes half a minute to make."""
    return base_folder("embedded")


@pytest.mark.slow
def test_folder_and_server_read_the_same_model_alike(embedded_folder: Path, tmp_path: Path) -> None:
    """The embedded model twice: in 8-bit arithmetic behind the server, and in float32 through transformers."""
    ask, rubrics = items(6), Rubrics({"aligned": "Yes or no, 1 or 0? {question} {answer} 1 0 1 0"})
    with serving(embedded_gguf(), threads=1, context=512) as url:
        over_http = judge_at(url, tmp_path / "a.sqlite", rubrics=rubrics).judge(ask, ["aligned"])
    inside = FolderJudge(embedded_folder, rubrics=rubrics, cache=tmp_path / "b.sqlite").judge(ask, ["aligned"])
    for a, b in zip(over_http, inside, strict=True):
        p, q = ({t: math.exp(v) for t, v in json.loads(j.raw)["top"] if not t.isdecimal()} for j in (a, b))
        best = sorted(p, key=lambda t: -p[t])[:5]
        assert [p[t] for t in best] == pytest.approx([q.get(t, 0.0) for t in best], abs=0.05)
