"""A GGUF model behind an OpenAI-compatible server on this machine (llama.cpp, from the wheel `xllamacpp`).

The server runs in a process of its own: a damaged model file may end that process, not ours. It listens on 127.0.0.1
alone, at a port the system picks, and ends with us: it watches a pipe that closes when we leave the `with`, fail, are
interrupted or are killed. One slot and, unless samples are drawn, no prompt cache, so that a reply depends on its prompt
alone: with several slots or a cache, what else was asked moves the last digits. On a CPU one slot costs little: reading
the prompt is the work.
"""

from __future__ import annotations

import importlib.util
import json
import mmap
import os
import select
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from convergent.core.ids import bytes_id, content_id
from convergent.errors import JudgeError

EXTRA = "pip install 'convergent[local]'"
CONTEXT = 8192
"""Tokens of prompt and reply at most."""
START_SECONDS = 300.0
_ENDS = 1 << 20
_VOCABULARY = 64 << 20
"""The vocabulary lies within so many bytes from the start of a GGUF file."""


@dataclass(frozen=True)
class Gguf:
    """A model file, and how to have it answer. Raises JudgeError when made if it is no GGUF file."""

    path: Path
    title: str
    card: dict[str, Any]
    keep_prompt: bool = False
    """See `serving`."""

    def __post_init__(self) -> None:
        place = f"judge local: {self.path}"
        try:
            with self.path.open("rb") as f:
                if f.read(4) != b"GGUF":
                    raise JudgeError(f"{place}: is not a GGUF file; give a .gguf model or a Hugging Face folder")
        except OSError as error:
            raise JudgeError(f"{place}: cannot be read ({error.strerror}); give a .gguf model or a Hugging Face folder") from error

    @property
    def name(self) -> str:
        return f"local:{self.title}"

    @property
    def identity(self) -> str:
        """Names the weights (by size and both ends of the file) and the way they are read; stands in content keys."""
        size = self.path.stat().st_size
        with self.path.open("rb") as f:
            head = f.read(_ENDS)
            f.seek(max(0, size - _ENDS))
            return f"gguf:{content_id(size, bytes_id(head), bytes_id(f.read()))}"

    @contextmanager
    def running(self) -> Iterator[str]:
        """The server's address ending in /v1, while it runs. Raises JudgeError if it does not start."""
        with serving(self.path, keep_prompt=self.keep_prompt) as url:
            yield url


def writes_digit_by_digit(path: Path) -> bool:
    """Whether the vocabulary of a GGUF file has no two-digit numbers: then the first token of a reply is no score."""
    with path.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        end = min(len(data), _VOCABULARY)
        # GGUF writes a string as its length (8 bytes) and its bytes.
        return all(data.find(struct.pack("<Q", 2) + number, 0, end) < 0 for number in (b"85", b"42", b"70"))


def check_installed() -> None:
    """Raise JudgeError unless the server is there."""
    if importlib.util.find_spec("xllamacpp") is None:
        raise JudgeError(f"judge local: needs the server in xllamacpp, which is not installed; run {EXTRA}, or give a Hugging Face folder: local:FOLDER")


@contextmanager
def serving(gguf: Path, threads: int | None = None, context: int = CONTEXT, keep_prompt: bool = False) -> Iterator[str]:
    """The address (ending in /v1) of a server for `gguf`, which ends with the body, whatever happens in it.

    threads: default all cores that this process may use. keep_prompt: what the last prompt shares with the next is not
    read again; several samples of one prompt then cost little more than one, and order may move a reply by rounding.
    Raises JudgeError if the server does not start.
    """
    check_installed()
    config = {"title": gguf.stem, "gguf": str(gguf.resolve()), "threads": threads or _cores(), "context": context, "keep_prompt": keep_prompt}
    package = str(Path(__file__).parents[2])
    paths = os.pathsep.join(p for p in (package, os.environ.get("PYTHONPATH", "")) if p)
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "convergent.judging.llama"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env={**os.environ, "PYTHONPATH": paths},
            start_new_session=True,  # Ctrl-C in a terminal is for us; we end it
        )  # fmt: skip
        try:
            assert server.stdin is not None
            try:
                server.stdin.write(json.dumps(config).encode() + b"\n")
                server.stdin.flush()
                url = _announced(server)
            except BrokenPipeError:
                url = None
            if url is None:
                raise JudgeError(f"judge local: {gguf}: the server cannot read this model ({_reason(log)}); give another .gguf file")
            yield url
        finally:
            _end(server)


def _announced(server: subprocess.Popen[bytes]) -> str | None:
    """The address that the server prints once the model is loaded; None if it ended first, or was too slow."""
    assert server.stdout is not None
    deadline = time.monotonic() + START_SECONDS
    line = b""
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([server.stdout], [], [], max(0.0, deadline - time.monotonic()))
        more = os.read(server.stdout.fileno(), 4096) if ready else b""
        if not more:
            return None
        line += more
    return f"{json.loads(line)['url']}/v1"


def _end(server: subprocess.Popen[bytes]) -> None:
    """Close its pipe, and do not wait for long."""
    for pipe in (server.stdin, server.stdout):
        if pipe is not None:
            with suppress(OSError):
                pipe.close()
    try:
        server.wait(2)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
    except BaseException:  # a second Ctrl-C
        server.kill()
        raise


def _reason(log: IO[bytes]) -> str:
    """The last line of the server's log that speaks of an error."""
    log.seek(0)
    lines = [line.decode("utf-8", "replace").strip() for line in log.readlines()[-200:]]
    wrong = [line for line in lines if any(word in line.lower() for word in ("error", "failed", "unable", "invalid"))]
    return (wrong or lines or ["no reason given"])[0][-160:]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _serve() -> None:
    """The server's process: read what to serve from stdin, print the address, stay until stdin closes."""
    out = os.dup(1)
    os.dup2(2, 1)  # what the library prints is log, not address
    config = json.loads(sys.stdin.buffer.readline())

    def leave() -> None:
        sys.stdin.buffer.read()
        os._exit(0)

    threading.Thread(target=leave, daemon=True).start()  # while the model loads too
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = config["gguf"]
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.model_alias = {config["title"]}
    params.n_ctx = config["context"]
    params.n_parallel = 1
    params.cache_prompt = config["keep_prompt"]
    params.cache_ram_mib = 0
    params.cpuparams.n_threads = config["threads"]
    params.cpuparams_batch.n_threads = config["threads"]
    server = xllamacpp.Server(params)
    os.write(out, json.dumps({"url": server.listening_address}).encode() + b"\n")
    threading.Event().wait()


if __name__ == "__main__":
    _serve()
