"""Requests on their way: halved at 429, grown slowly, held back for all by Retry-After. On a clock of the test's own."""

from __future__ import annotations

import heapq
import threading
import time

from hypothesis import given, settings
from hypothesis import strategies as st

from convergent.judging.pace import ROUNDS, Pace, Turn


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def end(pace: Pace, turn: Turn, *, limited: bool = False, wait: float = 0.0) -> None:
    if limited:
        turn.slow_down(wait)
    else:
        turn.served = True
    pace.end(turn)


def test_a_burst_of_429_halves_once_and_the_next_burst_again() -> None:
    pace = Pace(8, Clock())
    burst = [pace.start() for _ in range(8)]
    assert not pace.may_start()
    for turn in burst:
        end(pace, turn, limited=True)
    assert (pace.limit, pace.cuts, pace.on_the_way) == (4, 1, 0)
    later = [pace.start() for _ in range(4)]
    assert not pace.may_start()
    for turn in later:
        end(pace, turn, limited=True)
    assert (pace.limit, pace.cuts) == (2, 2)
    for expected in (1, 1, 1):  # never below one
        end(pace, pace.start(), limited=True)
        assert pace.limit == expected
    assert pace.lowest == 1


def test_it_grows_by_one_after_rounds_of_successes_and_never_above_the_most() -> None:
    pace = Pace(3, Clock())
    pace.limit = 1
    limits = []
    for _ in range(ROUNDS * 5):
        end(pace, pace.start())
        limits.append(pace.limit)
    assert limits[: ROUNDS * 3 + 1] == [1] * (ROUNDS - 1) + [2] * (2 * ROUNDS) + [3] * 2
    assert set(limits[ROUNDS * 3 :]) == {3}


def test_a_429_on_the_way_up_starts_the_count_again() -> None:
    pace = Pace(8, Clock())
    pace.limit = 2
    for _ in range(2 * ROUNDS - 1):
        end(pace, pace.start())
    end(pace, pace.start(), limited=True)
    assert pace.limit == 1
    end(pace, pace.start())
    assert pace.limit == 1


def test_other_failures_neither_cut_nor_count() -> None:
    pace = Pace(4, Clock())
    pace.limit = 1
    for _ in range(2 * ROUNDS):
        pace.end(pace.start())
    assert (pace.limit, pace.cuts) == (1, 0)


def test_retry_after_holds_everybody_until_then() -> None:
    clock = Clock()
    pace = Pace(8, clock)
    first, second = pace.start(), pace.start()
    end(pace, first, limited=True, wait=5.0)
    end(pace, second, limited=True, wait=2.0)  # the longer one counts
    assert not pace.may_start()
    clock.now += 4.9
    assert not pace.may_start()
    clock.now += 0.1
    assert pace.may_start()
    turn = pace.start()
    turn.hold(3.0)  # 503 with Retry-After: a wait, no cut
    pace.end(turn)
    assert pace.limit == 4
    assert not pace.may_start()


def simulate(pace: Pace, clock: Clock, capacity: int, requests: int, seconds: float = 1.0) -> tuple[int, int]:
    """A server that takes `seconds` for each of at most `capacity` requests and says 429 at once to more: (served, refused)."""
    ends: list[tuple[float, int, Turn]] = []
    served = refused = n = 0
    while served < requests:
        while served + len(ends) < requests and pace.may_start():
            n += 1
            turn = pace.start()
            if len(ends) >= capacity:
                refused += 1
                end(pace, turn, limited=True, wait=seconds)
            else:
                heapq.heappush(ends, (clock.now + seconds, n, turn))
        if ends:
            clock.now, _, turn = heapq.heappop(ends)
            served += 1
            end(pace, turn)
        else:
            clock.now += seconds
    return served, refused


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 32))
def test_it_settles_where_the_server_can_keep_up(most: int, capacity: int) -> None:
    clock = Clock()
    pace = Pace(most, clock)
    simulate(pace, clock, capacity, 200)
    start, (served, refused) = clock.now, simulate(pace, clock, capacity, 1000)
    usable = min(most, capacity)
    assert refused <= served * 0.2
    assert served / (clock.now - start) >= 0.4 * usable  # of what the server could do
    assert 1 <= pace.limit <= most
    assert refused == 0 or most > capacity


def test_a_wait_that_is_over_while_it_is_looked_at_does_not_hang() -> None:
    """Every look at this clock takes a millisecond, so the time to go on comes between any two of them."""
    ticks = iter(range(10**9))
    pace = Pace(1, lambda: next(ticks) / 1000)
    with pace.turn() as turn:
        assert turn is not None
        turn.slow_down(0.002)
    done = threading.Event()

    def work() -> None:
        with pace.turn():
            done.set()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert done.wait(10)


def test_threads_wait_for_their_turn_and_stop_wakes_them() -> None:
    pace = Pace(2)
    inside, most, lock, go = 0, 0, threading.Lock(), threading.Event()
    turns: list[Turn | None] = []

    def work() -> None:
        nonlocal inside, most
        with pace.turn() as turn:
            with lock:
                turns.append(turn)
                inside += 1
                most = max(most, inside)
            go.wait(10)
            with lock:
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    while pace.on_the_way < 2:
        time.sleep(0.001)
    pace.stop()
    go.set()
    for thread in threads:
        thread.join(10)
    assert most <= 6 and sum(turn is not None for turn in turns) == 2 and len(turns) == 6
    assert pace.on_the_way == 0
