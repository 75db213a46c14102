"""What a long judging run says on the way: how far it is, what was paid, what has no score."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

from convergent.core.values import Judgement
from convergent.judging.base import Judge

EVERY = 10.0
"""Seconds between two lines."""


class Progress:
    """An `on_result` that now and then passes a line to `say`, and sums up in the end."""

    def __init__(self, judge: Judge, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._judge, self._say, self._clock = judge, say, clock
        self._last, self._done, self._total = clock(), 0, 0
        self._absent: Counter[str] = Counter()

    def expect(self, total: int) -> None:
        """So many judgements will come."""
        self._total = total

    def __call__(self, judgement: Judgement) -> None:
        self._done += 1
        if judgement.reason is not None:
            self._absent[judgement.reason] += 1
        if self._clock() - self._last >= EVERY and self._done != self._total:
            self._last = self._clock()
            self._say(self.line())

    def line(self) -> str:
        """So far: `judge openai:gpt-4o: 240 of 2000 judgements, 212 requests answered, $0.0312 of at most $5.0000; no score: 3 refusal`."""
        parts = [f"judge {self._judge.name}: {self._done}{f' of {self._total}' if self._total else ''} judgements"]
        paid, spent, most = (getattr(self._judge, name, None) for name in ("paid", "spent", "max_cost"))
        if isinstance(paid, int):
            parts.append(f"{paid} requests answered")
            if spent:
                parts.append(f"${spent:.4f}" + (f" of at most ${most:.4f}" if most is not None else ""))
        absent = ", ".join(f"{n} {reason}" for reason, n in self._absent.most_common())
        return ", ".join(parts) + (f"; no score: {absent}" if absent else "")
