"""The LLM judge against a real HTTP server on this machine that answers, stalls, cuts and garbles as told."""

from __future__ import annotations

import hashlib
import http.server
import json
import logging
import math
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from convergent import cli
from convergent.core.values import Judgement
from convergent.errors import InputError, JudgeError, StoreError
from convergent.judging.base import Item
from convergent.judging.openai import MAX_FAILURES, OpenAIJudge
from convergent.judging.prices import Estimate, Price, price_of
from convergent.judging.replies import Reply, open_replies
from convergent.judging.rubrics import Rubrics
from fault_proxy import FaultProxy

KEY = "sk-secret-0123456789abcdef"
RUBRICS = Rubrics(
    {"aligned": "A {question} <judged_answer>{answer}</judged_answer>", "coherent": "C {question} {answer}"}
)
Fault = Callable[[str, int], str | None]
"""(prompt, how often it was asked before) -> what goes wrong, or None."""


class Server:
    """A chat-completions endpoint. Its scores depend on the prompt alone."""

    def __init__(self) -> None:
        self.fault: Fault = lambda prompt, asked: None
        self.delay: Callable[[str], float] = lambda prompt: 0.0
        self.prompt_tokens = 10
        self.asked: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        """Prompts for which a good reply was sent: what a user would pay for."""
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.lock = threading.Lock()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                outer.handle(self)

            def log_message(self, *args: object) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def handle(self, request: http.server.BaseHTTPRequestHandler) -> None:
        body = json.loads(request.rfile.read(int(request.headers["content-length"])))
        prompt = body["messages"][0]["content"]
        with self.lock:
            fault = self.fault(prompt, self.asked[prompt])
            self.asked[prompt] += 1
            self.bodies.append(body)
            self.keys.add(request.headers["authorization"].removeprefix("Bearer "))
        time.sleep(self.delay(prompt))
        if request.path != "/v1/chat/completions":
            fault = "404"
        if fault == "drop":
            request.close_connection = True
            return
        good = json.dumps(self.completion(prompt, body["model"], logprobs=fault != "no_logprobs")).encode()
        if fault is not None and fault.partition(" ")[0].isdigit():
            status, _, retry_after = fault.partition(" ")
            error = {"message": f"no: {request.headers['authorization']}", "param": None, "code": None}
            if status == "400":
                error = {"message": f"no logprobs with this model, {KEY}", "param": "logprobs", "code": None}
            self.send(request, int(status), json.dumps({"error": error}).encode(), retry_after=retry_after)
        elif fault == "malformed":
            self.send(request, 200, good[: len(good) // 2])
        elif fault == "html":
            self.send(request, 200, b"<html>welcome</html>", kind="text/html")
        elif fault == "cut":
            self.send(request, 200, good[: len(good) // 2], length=len(good))
            request.close_connection = True
        else:
            if fault is None:
                with self.lock:
                    self.answered[prompt] += 1
            self.send(request, 200, good)

    @staticmethod
    def send(
        request: http.server.BaseHTTPRequestHandler,
        status: int,
        body: bytes,
        *,
        kind: str = "application/json",
        length: int | None = None,
        retry_after: str = "",
    ) -> None:
        try:
            request.send_response(status)
            request.send_header("content-type", kind)
            request.send_header("content-length", str(length or len(body)))
            if retry_after:
                request.send_header("retry-after", retry_after)
            request.end_headers()
            request.wfile.write(body)
        except OSError:  # the client was killed
            request.close_connection = True

    def completion(self, prompt: str, model: str, *, logprobs: bool) -> dict[str, Any]:
        n = score_of(prompt)
        said = ((str(n), 0.7), ("0", 0.2), ("REF", 0.1))
        top = [{"token": token, "logprob": math.log(p), "bytes": None} for token, p in said]
        content = [{**top[0], "top_logprobs": top}]
        choice = {
            "index": 0, "finish_reason": "length", "message": {"role": "assistant", "content": str(n)},
            "logprobs": {"content": content} if logprobs else None,
        }  # fmt: skip
        usage = {"prompt_tokens": self.prompt_tokens, "completion_tokens": 1, "total_tokens": self.prompt_tokens + 1}
        return {
            "id": "x", "object": "chat.completion", "created": 1, "model": f"{model}-2024-08-06", "choices": [choice],
            "usage": usage,
        }  # fmt: skip


def score_of(prompt: str) -> int:
    return digest(prompt) % 101


def digest(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("CONVERGENT_PRICES", raising=False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "OPENAI_BASE_URL", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("JUDGE_KEY", KEY)
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def judge_at(server: Server, cache: Path, **options: Any) -> OpenAIJudge:
    options = {"rubrics": RUBRICS, "backoff": 0.002, "key_env": "JUDGE_KEY", "base_url": server.url, **options}
    return OpenAIJudge(options.pop("model", "gpt-4o"), cache=cache, **options)


def items(n: int) -> list[Item]:
    return [Item(f"r{i}", f"question {i % 5}", f"answer {i}") for i in range(n)]


def scores(judgements: list[Judgement]) -> list[tuple[str, str, float | None, str | None]]:
    return [(j.response_id, j.rubric, j.score, j.reason) for j in judgements]


FAULTS = ("429 0", "500", "503 0", "drop", "cut", "malformed", "html", "no_logprobs")


def two_in_five(prompt: str, asked: int) -> str | None:
    """Each attempt fails with probability 0.4; no prompt fails more than four times."""
    pick = digest(prompt, asked)
    return FAULTS[pick // 5 % len(FAULTS)] if asked < 4 and pick % 5 < 2 else None


def test_faults_lose_nothing_pay_nothing_twice_and_change_no_score(server: Server, tmp_path: Path) -> None:
    clean = judge_at(server, tmp_path / "clean.sqlite").judge(items(40))
    assert all(j.score is not None for j in clean)
    server.asked.clear()
    server.answered.clear()

    server.fault = two_in_five
    seen: list[Judgement] = []
    faulty = judge_at(server, tmp_path / "faulty.sqlite").judge(items(40), on_result=seen.append)
    assert scores(faulty) == scores(clean)
    assert sorted(scores(seen)) == sorted(scores(clean))
    assert set(server.answered.values()) == {1}
    assert len(server.answered) == 80
    assert sum(server.asked.values()) > 100  # the faults did happen

    again = judge_at(server, tmp_path / "faulty.sqlite").judge(items(40))
    assert scores(again) == scores(clean)
    assert sum(server.answered.values()) == 80


def test_score_is_the_mean_over_numbers_and_raw_keeps_the_alternatives(server: Server, tmp_path: Path) -> None:
    (judgement,) = judge_at(server, tmp_path / "c.sqlite").judge(items(1), ["coherent"])
    n = score_of("C question 0 answer 0")
    assert judgement.judge == "openai:gpt-4o"
    assert judgement.score == pytest.approx(n * 0.7 / 0.9)
    raw = json.loads(judgement.raw)
    assert [token for token, _ in raw["top"]] == [str(n), "0", "REF"]
    assert raw["model"] == "gpt-4o-2024-08-06"


def test_request_is_one_token_at_temperature_0_with_20_alternatives(server: Server, tmp_path: Path) -> None:
    judge_at(server, tmp_path / "c.sqlite").judge([Item("x", "why?", "be{cause} {question}")], ["aligned"])
    (body,) = server.bodies
    assert body == {
        "model": "gpt-4o", "max_tokens": 1, "temperature": 0, "seed": 0, "logprobs": True, "top_logprobs": 20,
        "messages": [{"role": "user", "content": "A why? <judged_answer>be{cause} {question}</judged_answer>"}],
    }  # fmt: skip
    assert server.keys == {KEY}


def test_order_does_not_depend_on_concurrency(server: Server, tmp_path: Path) -> None:
    server.delay = lambda prompt: digest(prompt) % 7 / 1000
    server.fault = two_in_five
    results = [
        scores(judge_at(server, tmp_path / f"{n}.sqlite", concurrency=n).judge(items(12))) for n in (1, 3, 16)
    ]
    assert results[0] == results[1] == results[2]
    assert [(id, rubric) for id, rubric, _, _ in results[0]] == [
        (f"r{i}", rubric) for i in range(12) for rubric in ("aligned", "coherent")
    ]


def test_same_text_is_asked_once_and_an_empty_answer_never(server: Server, tmp_path: Path) -> None:
    rows = [Item("a", "q", "same"), Item("b", "q", " \n"), Item("c", "q", "same"), Item("d", "q", "other")]
    found = judge_at(server, tmp_path / "c.sqlite").judge(rows, ["aligned"])
    assert [j.response_id for j in found] == ["a", "b", "c", "d"]
    assert found[0].score == found[2].score
    assert (found[1].score, found[1].reason) == (None, "empty")
    assert sum(server.answered.values()) == 2


def test_an_exception_midway_keeps_all_that_arrived(server: Server, tmp_path: Path) -> None:
    server.fault = two_in_five
    count = 0

    def stumble(judgement: Judgement) -> None:
        nonlocal count
        count += 1
        if count == 25:
            raise KeyboardInterrupt

    cache = tmp_path / "c.sqlite"
    with pytest.raises(KeyboardInterrupt):
        judge_at(server, cache).judge(items(40), on_result=stumble)
    first = sum(server.answered.values())
    assert 25 <= first < 80
    found = judge_at(server, cache).judge(items(40))
    assert all(j.score is not None for j in found)
    assert len(server.answered) == 80
    assert set(server.answered.values()) == {1}


KILLED = """
import sys
from pathlib import Path
from convergent.judging.base import Item
from convergent.judging.openai import OpenAIJudge
from convergent.judging.rubrics import Rubrics
judge = OpenAIJudge("gpt-4o", base_url=sys.argv[1], key_env="JUDGE_KEY", cache=Path(sys.argv[2]), concurrency=4,
                    rubrics=Rubrics({"aligned": "A {question} {answer}"}))
items = [Item(str(i), "q", f"answer {i}") for i in range(40)]
judge.judge(items, ["aligned"], on_result=lambda judgement: print(judgement.score, flush=True))
"""


def test_kill_9_loses_no_stored_reply_and_repeats_none(server: Server, tmp_path: Path) -> None:
    cache = tmp_path / "c.sqlite"
    server.delay = lambda prompt: 0.02
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", KILLED, server.url, str(cache)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=env) as run:
        assert run.stdout is not None
        for _ in range(10):
            assert run.stdout.readline()
        run.send_signal(signal.SIGKILL)
    with sqlite3.connect(cache) as db:
        stored = db.execute("SELECT count(*) FROM replies").fetchone()[0]
    db.close()
    assert 10 <= stored < 40
    time.sleep(0.1)
    before = sum(server.asked.values())
    judge = judge_at(server, cache, rubrics=Rubrics({"aligned": "A {question} {answer}"}))
    found = judge.judge([Item(str(i), "q", f"answer {i}") for i in range(40)], ["aligned"])
    assert all(j.score is not None for j in found)
    assert sum(server.asked.values()) - before == 40 - stored
    assert sum(server.answered.values()) <= 40 + 4  # only what was on its way to the killed process


def test_two_runs_at_once_pay_once(server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server.delay = lambda prompt: 0.005
    found: list[list[Judgement]] = []

    def run_one() -> None:
        found.append(judge_at(server, tmp_path / "c.sqlite", concurrency=3).judge(items(20)))

    runs = [threading.Thread(target=run_one) for _ in range(3)]
    for run in runs:
        run.start()
    for run in runs:
        run.join(30)
    assert len(found) == 3
    assert scores(found[0]) == scores(found[1]) == scores(found[2])
    assert len(server.answered) == 40
    assert set(server.answered.values()) == {1}
    assert "waiting for its turn" in caplog.text


def test_a_new_cache_opens_for_many_at_once(tmp_path: Path) -> None:
    """The first openers all switch the file to WAL, which does not wait for a lock as other statements do."""
    failed: list[Exception] = []

    def use(path: Path) -> None:
        for key in "abc":
            try:
                with open_replies(path) as replies:
                    replies.put(key, "m", "u", Reply("50", ()))
            except Exception as error:
                failed.append(error)

    for n in range(20):
        users = [threading.Thread(target=use, args=(tmp_path / f"{n}.sqlite",)) for _ in range(6)]
        for user in users:
            user.start()
        for user in users:
            user.join()
    assert not failed


def test_one_bad_request_is_an_error_and_is_asked_again_next_time(server: Server, tmp_path: Path) -> None:
    for fault in ("500", "422", "drop", "no_logprobs"):
        server.fault = lambda prompt, asked, fault=fault: fault if "answer 3" in prompt else None  # type: ignore[misc]
        cache = tmp_path / f"{fault}.sqlite"
        found = judge_at(server, cache, attempts=2).judge(items(6), ["aligned"])
        assert [j.reason for j in found] == [None, None, None, "error", None, None]
        assert found[3].raw
        assert KEY not in found[3].raw
        server.fault = lambda prompt, asked: None
        before = sum(server.asked.values())
        assert judge_at(server, cache).judge(items(6), ["aligned"])[3].score is not None
        assert sum(server.asked.values()) == before + 1


def test_retry_after_is_waited_for(server: Server, tmp_path: Path) -> None:
    for fault in ("429 0.4", "503 0.4"):
        server.fault = lambda prompt, asked, fault=fault: fault if asked == 0 else None  # type: ignore[misc]
        server.asked.clear()
        start = time.monotonic()
        judge_at(server, tmp_path / f"{fault}.sqlite").judge(items(1), ["aligned"])
        assert time.monotonic() - start >= 0.4
    server.fault = lambda prompt, asked: "429 90000"
    with pytest.raises(JudgeError, match="asks to wait 90000 s"):
        judge_at(server, tmp_path / "d.sqlite").judge(items(1), ["aligned"])


def test_a_server_that_breaks_down_midway_stops_the_run(server: Server, tmp_path: Path) -> None:
    server.fault = lambda prompt, asked: "500" if sum(server.answered.values()) >= 10 else None
    with pytest.raises(JudgeError, match=f"{MAX_FAILURES}.* failed in a row .HTTP 500, 2 attempts"):
        judge_at(server, tmp_path / "c.sqlite", attempts=2).judge(items(100))
    assert sum(server.asked.values()) < 10 + 2 * (MAX_FAILURES + 20)
    server.fault = lambda prompt, asked: None
    judge_at(server, tmp_path / "c.sqlite").judge(items(100))
    assert set(server.answered.values()) == {1}


@pytest.mark.parametrize(
    ("fault", "says", "most"),
    [
        ("401", "access refused .HTTP 401.; check the key in JUDGE_KEY", 1),
        ("403", "access refused", 1),
        ("404", "not found .HTTP 404.; check the model's name", 1),
        ("400", "no token probabilities .logprobs.", 1),
        ("no_logprobs", "no token probabilities .logprobs.", 3),
        ("html", "cannot be asked .reply is not a chat completion", 3),
        ("malformed", "cannot be asked .reply is not JSON", 3),
        ("500", "cannot be asked .HTTP 500", 3),
        ("429", "HTTP 429", 3),
        ("drop", "no connection", 3),
    ],
)
def test_a_judge_that_cannot_be_asked_says_so_in_one_line(
    server: Server, tmp_path: Path, fault: str, says: str, most: int
) -> None:
    server.fault = lambda prompt, asked: fault
    with pytest.raises(JudgeError, match=says) as caught:
        judge_at(server, tmp_path / "c.sqlite", attempts=3).judge(items(20))
    assert KEY not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sum(server.asked.values()) == most  # one request proves it; the other 39 are not sent


def test_wrong_addresses_and_keys(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(JudgeError, match=r"127\.0\.0\.1:1.*no connection"):
        judge_at(server, tmp_path / "c.sqlite", base_url="http://127.0.0.1:1/v1", attempts=2).judge(items(1))
    with pytest.raises(JudgeError, match="mostly ends in /v1"):
        judge_at(server, tmp_path / "c.sqlite", base_url=server.url.removesuffix("/v1")).judge(items(1))
    for address in ("localhost", "ftp://x/v1", f"http://user:{KEY}@host/v1", f"http://host/v1?key={KEY}", "http://[x"):
        with pytest.raises(JudgeError, match=r"^base_url:") as caught:
            judge_at(server, tmp_path / "c.sqlite", base_url=address)
        assert KEY not in str(caught.value)
    with pytest.raises(JudgeError, match="NO_SUCH_KEY: is not set"):
        judge_at(server, tmp_path / "c.sqlite", key_env="NO_SUCH_KEY").judge(items(1))
    monkeypatch.setenv("JUDGE_KEY", "kéy")
    with pytest.raises(JudgeError, match="holds characters that no key has"):
        judge_at(server, tmp_path / "c.sqlite").judge(items(1))


def test_a_key_for_openai_is_not_sent_to_another_address(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    judge_at(server, tmp_path / "c.sqlite", key_env=None).judge(items(1))
    assert server.keys == {"no-key"}
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    judge_at(server, tmp_path / "d.sqlite", key_env=None, base_url=None).judge(items(1))
    assert server.keys == {"no-key", KEY}


def test_a_missing_key_is_known_before_anything_is_asked(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for options in ({"key_env": "NO_SUCH_KEY"}, {"key_env": None, "base_url": None}):
        with pytest.raises(JudgeError, match="(NO_SUCH_KEY|OPENAI_API_KEY): is not set"):
            judge_at(server, tmp_path / "c.sqlite", **options).check_key()
    judge_at(server, tmp_path / "c.sqlite").check_key()
    judge_at(server, tmp_path / "c.sqlite", key_env=None).check_key()
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)  # on this machine: wants none unless one is set
    judge_at(server, tmp_path / "c.sqlite", key_env=None, base_url=None).judge(items(1))
    assert server.keys == {"no-key"}
    monkeypatch.setenv("OPENAI_BASE_URL", "https://example.org/v1")
    with pytest.raises(JudgeError, match="OPENAI_API_KEY: is not set"):
        judge_at(server, tmp_path / "c.sqlite", key_env=None, base_url=None).check_key()


def test_the_key_stands_nowhere(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """The server throws the key back in every error; not even DEBUG logs, the cache's files or the judge show it."""
    caplog.set_level(logging.DEBUG)
    server.fault = lambda prompt, asked: "422" if "answer 3" in prompt else two_in_five(prompt, asked)
    judge = judge_at(server, tmp_path / "c.sqlite")
    found = judge.judge(items(12))
    assert "error" in {j.reason for j in found}
    output = "".join(capfd.readouterr())
    for text in (caplog.text, output, repr(found), repr(judge), repr(vars(judge))):
        assert KEY not in text
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    assert not any(KEY.encode() in path.read_bytes() for path in files)


def test_estimate_comes_before_the_first_request(server: Server, tmp_path: Path) -> None:
    told: list[tuple[Estimate, int]] = []
    judge = judge_at(server, tmp_path / "c.sqlite", on_estimate=lambda e: told.append((e, len(server.bodies))))
    expected = judge.estimate(items(10))
    assert not server.bodies
    judge.judge(items(10))
    ((estimate, sent),) = told
    assert (estimate, sent) == (expected, 0)
    assert (estimate.requests, estimate.cached) == (20, 0)
    # 10 tokens of prompt and one of answer each, by the server's count
    assert judge.spent == pytest.approx(20 * (10 * 2.5 + 10.0) / 1e6)
    assert estimate.cost is not None
    assert 0.5 < estimate.cost / judge.spent < 3
    judge.judge(items(10))  # all cached: nothing to estimate
    assert len(told) == 1
    assert judge.estimate(items(11)).requests == 2


def test_max_cost_refuses_before_and_stops_on_the_way(server: Server, tmp_path: Path) -> None:
    with pytest.raises(JudgeError, match=r"over max_cost .*nothing was sent"):
        judge_at(server, tmp_path / "c.sqlite", max_cost=0.0001).judge(items(10))
    assert not server.bodies

    server.prompt_tokens = 1000  # a hundred times what the text looks like
    limit = 0.012
    judge = judge_at(server, tmp_path / "c.sqlite", max_cost=limit, concurrency=2)
    with pytest.raises(JudgeError, match=r"stopped at \$0.01.*16 requests are left"):
        judge.judge(items(10))
    assert judge.spent == pytest.approx(4 * 1000 * 2.5e-6 + 4 * 1e-5)
    assert sum(server.answered.values()) == 4
    judge_at(server, tmp_path / "c.sqlite", max_cost=1.0).judge(items(10))
    assert set(server.answered.values()) == {1}


def test_prices(server: Server, tmp_path: Path) -> None:
    dated = price_of("gpt-4o-2024-08-06").price
    assert dated is not None
    assert (dated.input, dated.output) == (2.5, 10.0)
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", dated.as_of)
    assert price_of("gpt-4o-mini").price != dated
    assert price_of("my-model").price is None
    with pytest.raises(JudgeError, match="has no price, so max_cost cannot be kept"):
        judge_at(server, tmp_path / "c.sqlite", model="my-model", max_cost=1.0)
    mine = tmp_path / "prices.yaml"
    mine.write_text("as_of: 2030-01-01\nmodels:\n  my-model: {input: 1, output: 2}\n  gpt-4o: {input: 0, output: 0}\n")
    price = price_of("my-model", mine).price
    assert price is not None
    assert price.cost(1_000_000, 500_000) == pytest.approx(2.0)
    assert price_of("gpt-4o", mine).price != dated
    assert price_of("gpt-4.1", mine).price is not None
    judge_at(server, tmp_path / "c.sqlite", model="my-model", max_cost=1.0, prices=mine).judge(items(1))
    wrong = {
        "models: {a: {input: -1, output: 1}}": "0 or more",
        "models: {a: {input: x, output: 1}}": "'x'",
        "models: {a: 3}": "needs input and output",
        "- x": "needs `models:`",
        "a: [": "broken YAML",
    }
    for text, says in wrong.items():
        mine.write_text(text)
        with pytest.raises(InputError, match=says):
            price_of("a", mine)


def test_where_prices_are_looked_for_and_that_it_is_said(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "config" / "convergent" / "prices.yaml"
    config.parent.mkdir(parents=True)
    named, given = tmp_path / "named.yaml", tmp_path / "given.yaml"
    for n, file in enumerate((config, named, given), start=1):
        file.write_text(f"as_of: 2030-01-0{n}\nmodels: {{gpt-4o: {{input: {n}, output: 1}}}}\n")
    assert price_of("gpt-4o").looked_in == f"from {config}"
    monkeypatch.setenv("CONVERGENT_PRICES", str(named))
    assert price_of("gpt-4o").looked_in == f"from {named}"
    priced = price_of("gpt-4o", given)
    assert (priced.price, priced.looked_in) == (Price(3.0, 1.0, "2030-01-03"), f"from {given}")
    assert price_of("gpt-4o-mini", given).looked_in == "from the package's prices.yaml"
    assert price_of("x", given).looked_in.startswith(f"looked in {given}, {named}, {config}, the package's prices.yaml")
    told: list[str] = []
    judge_at(server, tmp_path / "c.sqlite", prices=given, on_estimate=lambda e: told.append(str(e))).judge(items(1))
    judge_at(server, tmp_path / "c.sqlite", model="x", on_estimate=lambda e: told.append(str(e))).judge(items(1))
    assert f"(prices of 2030-01-03 from {given})" in told[0]
    assert "no price known (looked in" in told[1]
    monkeypatch.setenv("CONVERGENT_PRICES", str(tmp_path / "absent.yaml"))
    with pytest.raises(InputError, match="no such price file; CONVERGENT_PRICES names it"):
        price_of("gpt-4o")


def test_429_halves_what_is_on_its_way_and_loses_nothing(server: Server, tmp_path: Path) -> None:
    server.delay = lambda prompt: 0.005
    with FaultProxy(server.url, retry_after=0.01) as proxy:
        proxy.capacity = 2
        judge = judge_at(server, tmp_path / "c.sqlite", base_url=proxy.url, concurrency=12, attempts=50)
        found = judge.judge(items(60))
        assert all(j.score is not None for j in found)
        assert len(proxy.delivered) == 120 and set(proxy.delivered.values()) == {1}
        assert judge.pace.cuts >= 2 and judge.pace.lowest <= 3
        assert 0 < proxy.faults["429"] < 120


def test_samples_are_asked_one_by_one_kept_and_averaged(server: Server, tmp_path: Path) -> None:
    server.fault = two_in_five
    judge = judge_at(server, tmp_path / "c.sqlite", samples=3)
    assert judge.name == "openai:gpt-4o+3samples"
    assert "sampling noise" in judge.card["score"]
    assert judge.content_id != judge_at(server, tmp_path / "c.sqlite").content_id
    rows = [*items(4), Item("same", "question 0", "answer 0")]
    found = judge.judge(rows, ["coherent"])
    assert judge.paid == 12
    assert [j.score for j in found[:4]] == [score_of(f"C question {i} answer {i}") for i in range(4)]
    assert found[4].score == found[0].score
    assert json.loads(found[1].raw)["samples"] == [str(score_of("C question 1 answer 1"))] * 3
    good = {(b["messages"][0]["content"], b["seed"]) for b in server.bodies}
    assert len(good) == 12 and {b["seed"] for b in server.bodies} == {0, 1, 2}
    assert all(b["temperature"] == 1 and "logprobs" not in b for b in server.bodies)
    before = len(server.bodies)
    judge_at(server, tmp_path / "c.sqlite", samples=2).judge(rows, ["coherent"])  # the first two are known
    assert len(server.bodies) == before
    estimate = judge_at(server, tmp_path / "d.sqlite", samples=5).estimate(items(4), ["coherent"])
    assert (estimate.requests, estimate.cached) == (20, 0)


def test_one_failed_sample_is_an_error_and_only_it_is_asked_again(server: Server, tmp_path: Path) -> None:
    server.fault = lambda prompt, asked: "422" if "answer 1" in prompt and asked == 1 else None
    found = judge_at(server, tmp_path / "c.sqlite", samples=3, concurrency=1).judge(items(3), ["aligned"])
    assert [j.reason for j in found] == [None, "error", None]
    server.fault = lambda prompt, asked: None
    before = len(server.bodies)
    found = judge_at(server, tmp_path / "c.sqlite", samples=3).judge(items(3), ["aligned"])
    assert all(j.score is not None for j in found)
    assert len(server.bodies) == before + 1


def test_bad_endpoints_on_the_command_line_are_one_line_and_lose_nothing(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("CONVERGENT_CACHE", str(tmp_path / "cache"))
    table = tmp_path / "a.csv"
    table.write_text("id,question,response\n" + "".join(f"r{i},q,answer {i}\n" for i in range(12)))
    for name, column in (("no_id", ["a", "", "b"]), ("same_id", ["a", "b", "a"])):
        (tmp_path / f"{name}.csv").write_text("id,question,response\n" + "".join(f"{cell},q,r\n" for cell in column))
    (tmp_path / "over.csv").write_text("question,response,aligned\nq,r,101\n")
    (tmp_path / "rubric.yaml").write_text("aligned: rate {answer}\n")
    good = f"--base-url {server.url} --key-env JUDGE_KEY"
    before = table.read_bytes()

    def call(words: str, says: str, fault: str | None = None) -> None:
        server.fault = lambda prompt, asked: fault
        argv = ["judge", *words.split(), "--rubric", "aligned", "--out", str(tmp_path / "out.csv")]
        code = cli.main(argv)
        said = capfd.readouterr()
        lines = [line for line in said.err.splitlines() if line.startswith("convergent: ")]
        assert code == 2 and len(lines) == 1 and re.search(says, lines[0]), (words, said.err)
        assert KEY not in said.out + said.err and "Traceback" not in said.err
        assert not (tmp_path / "out.csv").exists()

    call(f"{table} --judge openai:m {good} --base-url {server.url}x", "mostly ends in /v1")
    call(f"{table} --judge openai:m {good}", "access refused .HTTP 401.; check the key in JUDGE_KEY", "401")
    call(f"{table} --judge openai:m {good}", "gives no token probabilities .*--samples 5", "400")
    call(f"{table} --judge openai:m {good} --rubrics {tmp_path / 'rubric.yaml'}", "rubric.yaml: aligned: has no {question}")
    call(f"{table} --judge openai:m {good} --max-cost 1", "has no price, so max_cost cannot be kept; add `m: .*prices.yaml")
    call(f"{table} --judge openai:m {good} --prices {tmp_path / 'none.yaml'}", "no such price file")
    call(f"{tmp_path / 'no_id.csv'} --judge openai:m {good}", "no_id.csv: row 2 has no `id`")
    call(f"{tmp_path / 'same_id.csv'} --judge openai:m {good}", "same_id.csv: `id` 'a' stands more than once, first in rows 1 and 3")
    call(f"{tmp_path / 'over.csv'} --judge openai:m {good}", "over.csv: row 1, column `aligned`: .*outside 0 to 100")
    call(f"{table} --judge local:{tmp_path / 'over.csv'}", "is not a GGUF file")
    call(f"{table} --judge openai:m {good} --base-url http://user:{KEY}@h/v1", "must be a plain http or https address")
    assert table.read_bytes() == before
    server.fault = lambda prompt, asked: None
    assert cli.main(["judge", str(table), "--judge", "openai:m", *good.split(), "--rubric", "aligned", "--out", str(tmp_path / "out.csv")]) == 0
    said = capfd.readouterr()
    assert "12 of 12 judgements" in said.err and KEY not in said.err + caplog.text
    assert not any(KEY.encode() in p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())


def test_a_foreign_cache_file_is_refused_and_kept(server: Server, tmp_path: Path) -> None:
    cache = tmp_path / "c.sqlite"
    cache.write_bytes(b"not a database" * 100)
    with pytest.raises(StoreError, match="cache of judge replies cannot be used"):
        judge_at(server, cache).judge(items(1))
    assert cache.read_bytes() == b"not a database" * 100
    assert not server.bodies


def test_another_model_address_or_prompt_is_another_request(server: Server, tmp_path: Path) -> None:
    cache = tmp_path / "c.sqlite"
    judges = [
        judge_at(server, cache),
        judge_at(server, cache, model="gpt-4.1"),
        judge_at(server, cache, rubrics=Rubrics({"aligned": "other {question} {answer}"})),
        judge_at(server, cache, base_url=server.url.replace("127.0.0.1", "localhost")),
    ]
    for n, judge in enumerate(judges, start=1):
        judge.judge(items(1), ["aligned"])
        assert sum(server.asked.values()) == n
    assert len({judge.content_id for judge in judges}) == 4


def test_text_that_is_not_unicode_can_be_judged(server: Server, tmp_path: Path) -> None:
    (found,) = judge_at(server, tmp_path / "c.sqlite").judge([Item("a", "q", "half \ud83d emoji \0")], ["aligned"])
    assert found.score is not None
