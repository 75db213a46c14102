"""A proxy on this machine between the judge's client and a real server, that breaks replies as told.

    before the server is asked   429 (with Retry-After), 500, drop (the connection closes without a word)
    after it has answered        cut (mid-body), malformed (half the JSON), no_logprobs, empty_choices, slow (and then well)

Which attempt of which request breaks how follows from a seed and the request's content, so every run of a test breaks
alike, whatever the order. What a provider would charge is what the real server computed: `billed`.
"""

from __future__ import annotations

import hashlib
import http.client
import http.server
import json
import threading
import time
from collections import Counter
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from convergent.core.ids import seed

BEFORE = ("429", "500", "drop")
AFTER = ("cut", "malformed", "no_logprobs", "empty_choices", "slow")
KINDS = BEFORE + AFTER


class FaultProxy:
    """A context manager; `url` is what the client is given. Faults hit `share` of all attempts."""

    def __init__(
        self, upstream: str, share: float = 0.0, *, name: str = "faults", kinds: tuple[str, ...] = KINDS, slow: float = 0.3, retry_after: float = 0.05
    ) -> None:
        """upstream: address of the real server, ending in /v1. slow, retry_after: seconds."""
        parts = urlsplit(upstream)
        self._host, self._port, self._path = parts.hostname or "", parts.port, parts.path
        self._share, self._name, self._kinds, self._slow, self._retry_after = share, name, kinds, slow, retry_after
        self.pause = 0.0
        """Seconds that every answer takes."""
        self.capacity: int | None = None
        """Requests at once; 429 to more."""
        self.asked: Counter[str] = Counter()
        self.billed: Counter[str] = Counter()
        """Replies that the real server computed, by request."""
        self.computed: dict[str, list[bytes]] = {}
        """The replies themselves, before they were broken."""
        self.prompts: dict[str, str] = {}
        self.delivered: Counter[str] = Counter()
        """Whole good replies handed out, by request."""
        self.faults: Counter[str] = Counter()
        self.keys: set[str] = set()
        self.most = 0
        """Most requests on their way at once."""
        self._now = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                outer._handle(self)

            def log_message(self, *args: object) -> None:
                pass

        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"

    def __enter__(self) -> FaultProxy:
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._http.shutdown()
        self._http.server_close()

    def fault_of(self, request: str, attempt: int) -> str | None:
        """What happens to the n-th attempt (from 0) of a request."""
        u = seed("fault_proxy", self._name, request, attempt) / 2.0**63
        return self._kinds[int(u / self._share * len(self._kinds))] if u < self._share else None

    def _handle(self, request: http.server.BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers["content-length"]))
        key = hashlib.sha256(json.dumps(json.loads(body), sort_keys=True).encode()).hexdigest()[:16]
        with self._lock:
            fault = self.fault_of(key, self.asked[key])
            self.asked[key] += 1
            self.keys.add(request.headers.get("authorization", "").removeprefix("Bearer "))
            self._now += 1
            self.most = max(self.most, self._now)
            if self.capacity is not None and self._now > self.capacity:
                fault = "429"
            if fault:
                self.faults[fault] += 1
        try:
            self._answer(request, key, body, fault)
        except OSError:  # the client has gone
            request.close_connection = True
        finally:
            with self._lock:
                self._now -= 1

    def _answer(self, request: http.server.BaseHTTPRequestHandler, key: str, body: bytes, fault: str | None) -> None:
        if fault == "drop":
            request.close_connection = True
        elif fault in ("429", "500"):
            error = {"error": {"message": f"no, {request.headers.get('authorization')}", "type": "x", "param": None, "code": None}}
            self._send(request, int(fault), json.dumps(error).encode(), retry_after=self._retry_after if fault == "429" else None)
        else:
            time.sleep(self.pause)
            status, reply = self._upstream(request, body)
            if status == 200:
                with self._lock:
                    self.billed[key] += 1
                    self.computed.setdefault(key, []).append(reply)
                    self.prompts[key] = json.loads(body)["messages"][0]["content"]
            if fault == "slow":
                time.sleep(self._slow)
            if fault == "cut":
                self._send(request, status, reply[: len(reply) // 2], length=len(reply))
                request.close_connection = True
            else:
                self._send(request, status, _broken(reply, fault))
                if status == 200 and fault in (None, "slow"):
                    with self._lock:
                        self.delivered[key] += 1

    def _upstream(self, request: http.server.BaseHTTPRequestHandler, body: bytes) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=300)
        try:
            path = self._path + request.path.removeprefix("/v1")
            connection.request("POST", path, body, {"content-type": "application/json", "authorization": request.headers.get("authorization", "")})
            reply = connection.getresponse()
            return reply.status, reply.read()
        finally:
            connection.close()

    @staticmethod
    def _send(request: http.server.BaseHTTPRequestHandler, status: int, body: bytes, *, length: int | None = None, retry_after: float | None = None) -> None:
        request.send_response(status)
        request.send_header("content-type", "application/json")
        request.send_header("content-length", str(len(body) if length is None else length))
        if retry_after is not None:
            request.send_header("retry-after", str(retry_after))
        request.end_headers()
        request.wfile.write(body)


def _broken(reply: bytes, fault: str | None) -> bytes:
    if fault == "malformed":
        return reply[: len(reply) // 2]
    if fault in ("no_logprobs", "empty_choices"):
        data: dict[str, Any] = json.loads(reply)
        if fault == "empty_choices":
            data["choices"] = []
        for choice in data["choices"]:
            choice.pop("logprobs", None)
        return json.dumps(data).encode()
    return reply
