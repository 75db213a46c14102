"""A peer in a process of its own that answers JSON lines: it may pin other versions than the project, and may die without taking the run along."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Child:
    """Started with its work; its first line holds versions. Raises RuntimeError with the last line of its log if it ends early."""

    def __init__(self, script: str, arguments: Sequence[str], work: object, python: str = sys.executable) -> None:
        self.log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  (lives as long as the child)
        command = [python, str(Path(__file__).with_name(script)), *arguments]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True)
        self.versions: dict[str, str] = self.ask(work)["versions"]

    def ask(self, question: object) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.log.seek(0)
            raise RuntimeError(([text.strip() for text in self.log if text.strip()] or ["ended without a word"])[-1])
        return json.loads(line)  # type: ignore[no-any-return]

    def end(self) -> None:
        """Close its input, and wait until it has left."""
        assert self.process.stdin
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
