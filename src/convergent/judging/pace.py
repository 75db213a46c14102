"""How many requests may be on their way at once: halved when the server says 429, grown again slowly.

Additive increase, multiplicative decrease, as TCP does it (Jacobson 1988). A burst of 429 to requests that left
together is one signal, not many: only a request that left after the last cut can cut again. `Retry-After` holds
everybody back, not just the one who was told. Knows no HTTP; the clock can be given, so that it can be tested.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

ROUNDS = 10
"""So many times `limit` successes in a row until one more request may be on its way."""


@dataclass
class Turn:
    """One attempt on its way."""

    cuts: int
    """How many cuts there had been when it left."""
    limited: bool = False
    wait: float = 0.0
    """Seconds that the server asked to wait."""
    served: bool = False

    def slow_down(self, wait: float) -> None:
        """The server said 429."""
        self.limited, self.wait = True, wait

    def hold(self, wait: float) -> None:
        """The server asked to wait without saying 429."""
        self.wait = wait


class Pace:
    """The number of attempts that may be on their way, for several threads."""

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.most = most
        self.limit = most
        """Now; between 1 and `most`."""
        self.lowest = most
        """The smallest limit that there was."""
        self.on_the_way = 0
        self.cuts = 0
        self._clock, self._not_before, self._run, self._stopped = clock, -float("inf"), 0, False
        self._changed = threading.Condition()

    def may_start(self) -> bool:
        """Whether one more attempt may leave now."""
        return self._may_start(self._clock())

    def _may_start(self, now: float) -> bool:
        return self.on_the_way < self.limit and now >= self._not_before

    def start(self) -> Turn:
        """An attempt leaves."""
        self.on_the_way += 1
        return Turn(self.cuts)

    def end(self, turn: Turn) -> None:
        """An attempt is over, whatever came of it."""
        self.on_the_way -= 1
        if turn.wait > 0:
            self._not_before = max(self._not_before, self._clock() + turn.wait)
        if turn.limited:
            self._run = 0
            if turn.cuts == self.cuts:
                self.cuts += 1
                self.limit = max(1, self.limit // 2)
                self.lowest = min(self.lowest, self.limit)
        elif turn.served:
            self._run += 1
            if self._run >= ROUNDS * self.limit and self.limit < self.most:
                self.limit, self._run = self.limit + 1, 0

    @contextmanager
    def turn(self) -> Iterator[Turn | None]:
        """Wait until an attempt may leave; None if everything was stopped meanwhile."""
        with self._changed:
            while not self._stopped:
                now = self._clock()  # once: were it read again, the time could come in between, and nobody would wake us
                if self._may_start(now):
                    break
                self._changed.wait(self._not_before - now if now < self._not_before else None)
            turn = None if self._stopped else self.start()
        try:
            yield turn
        finally:
            if turn is not None:
                with self._changed:
                    self.end(turn)
                    self._changed.notify_all()

    def stop(self) -> None:
        """Let nobody start any more; who waits is woken."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
