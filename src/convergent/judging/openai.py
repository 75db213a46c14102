"""The LLM judge: any OpenAI-compatible endpoint, one token a judgement, read as a weighted mean over its alternatives.

A request is named by its content (model, address, prompt, parameters). Its reply is stored under that name before it is
counted, and what is stored is never asked again: not for the same text in another row, not after a crash, not by
another process, which waits for its turn. What came back, not when, decides a score, so concurrency changes nothing.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout

from convergent.core.ids import content_id
from convergent.core.values import Judgement
from convergent.errors import ConvergentError, InputError, JudgeError
from convergent.judging.base import NOT_MEASURED, Item
from convergent.judging.endpoint import NO_LOGPROBS, Endpoint, Failed, read_key, resolve
from convergent.judging.pace import Pace
from convergent.judging.prices import Estimate, estimate_tokens, price_of
from convergent.judging.replies import Replies, Reply, open_replies, reply_file
from convergent.judging.rubrics import Rubrics, load_rubrics
from convergent.judging.work import PARAMETERS, Work, parameters_of

REPLY_SECONDS = 1.0
"""Of a reply of one token over a network, roughly; servers differ."""
MAX_FAILURES = 10
"""Requests that may fail in a row, each after its retries, before the run is stopped."""
DIGITS_AFTER = 8
"""Replies with no two-digit number among their alternatives, until a model is taken to write numbers digit by digit."""
_log = logging.getLogger(__name__)


class Server(Protocol):
    """A server that is started for the judge and ends with it."""

    @property
    def name(self) -> str:
        """The judge's name, e.g. `local:SmolLM2-135M-Instruct`."""

    @property
    def identity(self) -> str:
        """What stands in content keys in place of an address: its weights."""

    @property
    def card(self) -> dict[str, Any]:
        """What is known of the judge's quality."""

    def running(self) -> AbstractContextManager[str]:
        """Its address, while it runs."""


class OpenAIJudge:
    """Judge protocol over HTTP. See `docs/judges_llm.md` for keys, prices and the cache."""

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        key_env: str | None = None,
        rubrics: Rubrics | None = None,
        cache: Path | None = None,
        concurrency: int = 8,
        samples: int | None = None,
        max_cost: float | None = None,
        prices: str | Path | None = None,
        on_estimate: Callable[[Estimate], None] | None = None,
        attempts: int = 6,
        backoff: float = 0.5,
        timeout: float = 60.0,
        server: Server | None = None,
    ) -> None:
        """Nothing is sent yet. Raises JudgeError or InputError for an option that cannot be used.

        base_url: address of the endpoint; default $OPENAI_BASE_URL, else OpenAI.
        key_env: name of the environment variable with its key, see `endpoint.resolve`.
        cache: SQLite file of replies; default in the cache folder.
        concurrency: requests on their way at most; fewer while the server says 429.
        samples: for a model without token probabilities: the mean of so many replies at temperature 1.
        max_cost: US dollars for the life of this judge; needs a price.
        prices: a price file that goes before all others, see `prices.price_files`.
        on_estimate: called before the first paid request of each `judge`.
        attempts, backoff (seconds, doubled each time), timeout (seconds): of one request.
        server: started on this machine while judging, in place of an address; free of charge.
        """
        if not model.strip():
            raise JudgeError("judge openai: needs a model, as in openai:gpt-4o")
        if concurrency < 1 or attempts < 1:
            raise InputError(
                f"judge openai: concurrency and attempts must be 1 or more, "
                f"got {concurrency} and {attempts}"
            )
        if samples is not None and not 1 <= samples <= 100:
            raise InputError(f"judge openai: samples must be 1 to 100, got {samples}; 5 is a good number")
        if max_cost is not None and not 0 <= max_cost < math.inf:
            raise InputError(f"judge openai: max_cost must be dollars, 0 or more, got {max_cost}")
        self.model, self._server, self._samples = model.strip(), server, samples
        self.base_url, self.key_env = resolve(base_url, key_env) if server is None else (server.identity, None)
        self._rubrics = rubrics if rubrics is not None else load_rubrics()
        self._cache = cache
        self._concurrency, self._max_cost, self._on_estimate = concurrency, max_cost, on_estimate
        self._priced = price_of(self.model, prices) if server is None else None
        self._price = self._priced.price if self._priced else None
        self._attempts, self._backoff, self._timeout = attempts, backoff, timeout
        if max_cost is not None and self._price is None:
            raise JudgeError(f"judge {self.name}: has no price, so max_cost cannot be kept; {self._no_price}")
        self.spent = 0.0
        """US dollars so far, by the server's token counts; replies too broken to use count as estimated."""
        self.paid = 0
        """Requests answered so far."""
        self.pace = Pace(concurrency)
        """Of the latest `judge`."""
        self._worst = 1.0
        """Largest ratio seen of real to estimated cost: what is on its way is reserved at this rate."""

    @property
    def name(self) -> str:
        own = f"openai:{self.model}" if self._server is None else self._server.name
        return own if self._samples is None else f"{own}+{self._samples}samples"

    @property
    def rubrics(self) -> tuple[str, ...]:
        return self._rubrics.names

    @property
    def seconds_each(self) -> float:
        """Rough seconds per judgement, for a plan: a reply takes about one, and so many are on their way at once."""
        return REPLY_SECONDS * (self._samples or 1) / self._concurrency

    @property
    def samples(self) -> int | None:
        """Replies a judgement where probabilities are not read."""
        return self._samples

    @property
    def max_cost(self) -> float | None:
        return self._max_cost

    def check_key(self) -> None:
        """Raise JudgeError, without quoting it, if the variable that holds the key is not set or holds no key. Asks nobody."""
        read_key(self.key_env)

    @property
    def content_id(self) -> str:
        """Depends on all that decides a score: model, address, parameters, rubric texts."""
        how = PARAMETERS if self._samples is None else [dict(parameters_of(i, self._server is not None)) for i in range(self._samples)]
        return content_id(self.model, self.base_url, how, self._rubrics)

    @property
    def card(self) -> dict[str, Any]:
        """What is known of this judge, for the report."""
        read = "the first token's alternatives, at temperature 0"
        if self._samples is not None:
            read = f"the mean of {self._samples} sampled replies at temperature 1, not from token probabilities: scores carry sampling noise"
            if self._server is not None:
                read += "; replies are held to whole numbers, REFUSAL and CODE by a grammar"
        known = NOT_MEASURED if self._server is None else self._server.card
        return {"score": read, "rubrics": self._rubrics.content_id, **known}

    def judge(
        self,
        items: Sequence[Item],
        rubrics: Sequence[str] = ("aligned", "coherent"),
        on_result: Callable[[Judgement], None] | None = None,
    ) -> list[Judgement]:
        """Judge every item under every rubric, in order of items, then rubrics.

        `on_result` sees judgements as they arrive. An answer without a visible character has reason "empty" and costs
        nothing; a request that fails after its retries has reason "error", is not stored, and is asked again by the
        next run. Raises JudgeError if the endpoint cannot be asked, InputError for a bad option, StoreError for the
        cache; all that arrived is kept.
        """
        work = self._work(items, rubrics, on_result)
        with open_replies(reply_file(self._cache)) as replies:
            work.settle(replies)
            if work.open:
                with self._alone():
                    work.settle(replies)  # another process may have asked meanwhile
                    if work.open:
                        self._pay(work, replies)
        if halt := self._digit_by_digit(work):  # all from the cache
            raise halt
        if work.digits and not work.numbers:
            _log.warning("judge %s: no number of two digits in %d replies; if it writes digit by digit, these are no scores", self.name, work.digits)
        return work.results()

    def estimate(self, items: Sequence[Item], rubrics: Sequence[str] = ("aligned", "coherent")) -> Estimate:
        """What `judge` would send now. Sends nothing."""
        work = self._work(items, rubrics, None)
        with open_replies(reply_file(self._cache)) as replies:
            work.settle(replies)
        return self._estimate(work)

    def _work(self, items: Sequence[Item], rubrics: Sequence[str], on_result: Callable[[Judgement], None] | None) -> Work:
        asked = {"model": self.model, "base_url": self.base_url}
        return Work(self.name, self._rubrics, asked, self._samples, self._server is not None, items, rubrics, on_result)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One process (and one judge in it) at a time pays for one model at one address; a killed one lets go."""
        path = reply_file(self._cache)
        lock = FileLock(str(path.with_name(f".{path.name}.{content_id(self.model, self.base_url)}.lock")))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            _log.warning("judge %s: another run is asking it; waiting for its turn", self.name)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def _endpoint(self) -> Iterator[Endpoint]:
        """The endpoint, with its server where there is one of ours."""
        with self._server.running() if self._server is not None else _given(self.base_url) as address:
            self.pace = Pace(self._concurrency)
            endpoint = Endpoint(
                self.model, address, self.key_env,
                pace=self.pace, attempts=self._attempts, backoff=self._backoff, timeout=self._timeout,
            )  # fmt: skip
            with closing(endpoint):
                yield endpoint

    def _cost(self, prompt: str) -> float:
        """US dollars that a request is expected to cost."""
        return self._price.cost(estimate_tokens(prompt), self._tokens_out) if self._price else 0.0

    @property
    def _tokens_out(self) -> int:
        return 1 if self._samples is None else 3

    @property
    def _no_price(self) -> str:
        return f"add `{self.model}: {{input: ..., output: ...}}` to a price file ({self._priced.looked_in if self._priced else ''})"

    def _estimate(self, work: Work) -> Estimate:
        tokens = sum(estimate_tokens(work.prompt(key)) for key in work.open)
        n_free = len(work.jobs) - len({i for request in work.open.values() for i in request.jobs})
        if self._server is not None:
            return Estimate(len(work.open), n_free, tokens, 0.0, "", "on this machine, free of charge")
        price = self._price
        cost = None if price is None else price.cost(tokens, self._tokens_out * len(work.open))
        looked_in = self._priced.looked_in if self._priced else ""
        return Estimate(len(work.open), n_free, tokens, cost, price.as_of if price else "", looked_in)

    def _pay(self, work: Work, replies: Replies) -> None:
        """Ask for all that is open. One request at a time until one has succeeded, then all threads."""
        estimate = self._estimate(work)
        if self._on_estimate is not None:
            self._on_estimate(estimate)
        if self._max_cost is not None and self.spent + (estimate.cost or 0.0) > self._max_cost:
            raise JudgeError(
                f"judge {self.name}: {estimate}, with ${self.spent:.4f} spent, is over max_cost ${self._max_cost:.4f}; "
                "nothing was sent, raise it or judge fewer rows"
            )
        queue, running = deque(work.open), dict[Future[tuple[Reply, int]], str]()
        proved, broke, failures = False, False, 0
        halt: ConvergentError | None = None
        known = replies.knows(self.model, self.base_url)
        with self._endpoint() as endpoint, ThreadPoolExecutor(self._concurrency, "judge") as pool:

            def ask(key: str, prompt: str, parameters: Any) -> tuple[Reply, int]:
                reply, wasted = endpoint.ask(prompt, parameters)
                replies.put(key, self.model, self.base_url, reply)
                return reply, wasted

            try:
                while queue or running:
                    while queue and len(running) < (self._concurrency if proved else 1):
                        if self._over_budget([*running.values(), queue[0]], work):
                            broke = True
                            queue.clear()
                            break
                        key = queue.popleft()
                        running[pool.submit(ask, key, work.prompt(key), work.parameters(key))] = key
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        key = running.pop(future)
                        try:
                            reply, wasted = future.result()
                        except Failed as failed:
                            self._count(work.prompt(key), None, failed.wasted)
                            failures += failed.kind not in ("refused", "stopped")
                            halt = halt or self._hopeless(failed, proved, known, failures)
                            if not halt:
                                work.fail(key, str(failed))
                        except ConvergentError as error:
                            halt = halt or error
                        else:
                            self._count(work.prompt(key), reply, wasted)
                            proved, failures = True, 0
                            work.finish(key, reply)
                            halt = halt or self._digit_by_digit(work)
                        if halt:
                            queue.clear()
                            endpoint.stop()
            except BaseException:
                # What is on its way has been paid for: leaving the pool waits for it, and `ask` stores it.
                endpoint.stop()
                raise
        if halt:
            raise halt
        if broke:
            raise JudgeError(
                f"judge {self.name}: stopped at ${self.spent:.4f} of max_cost ${self._max_cost:.4f}, "
                f"{len(work.open)} requests are left; replies are kept, raise it and run again to go on"
            )

    def _count(self, prompt: str, reply: Reply | None, wasted: int) -> None:
        self.paid += reply is not None
        if self._price is None:
            return
        self.spent += wasted * self._cost(prompt)
        if reply is not None:
            n_in = estimate_tokens(prompt) if reply.input_tokens is None else reply.input_tokens
            paid = self._price.cost(n_in, self._tokens_out if reply.output_tokens is None else reply.output_tokens)
            self.spent += paid
            if expected := self._cost(prompt):
                self._worst = max(self._worst, paid / expected)

    def _over_budget(self, keys: Sequence[str], work: Work) -> bool:
        """Whether what is spent, on its way and next would exceed max_cost."""
        if self._max_cost is None or self._price is None:
            return False
        ahead = sum(self._cost(work.prompt(key)) for key in keys)
        return self.spent + self._worst * ahead > self._max_cost

    def _digit_by_digit(self, work: Work) -> JudgeError | None:
        """The error to stop with if the model writes 85 as `8`, `5`: its first token is no score, though it looks like one."""
        if work.numbers or work.digits < DIGITS_AFTER:
            return None
        return JudgeError(
            f"judge {self.name}: writes numbers digit by digit ({work.digits} replies, no two-digit number among their alternatives), "
            "so its first token is no score; replies are kept, have it judge by samples (--samples 5)"
        )

    def _hopeless(self, failed: Failed, proved: bool, known: bool, failures: int) -> JudgeError | None:
        """The error to stop with if this failure means that others would fail too."""
        place = f"judge {self.name} at {self.base_url}"
        if failures >= MAX_FAILURES:
            return JudgeError(
                f"{place}: {failures} requests failed in a row ({failed}); "
                "replies are kept, run again to go on"
            )
        if proved or failed.kind in ("refused", "stopped"):
            return None
        if failed.kind in ("connection", "rate"):
            return JudgeError(f"{place}: {failed}; check address and network, then run again")
        if known:  # it has worked before: one text may be at fault
            return None
        if failed.kind == "logprobs":
            return JudgeError(f"{place}: {NO_LOGPROBS}")
        return JudgeError(f"{place}: cannot be asked ({failed}); check that the address speaks chat completions")


@contextmanager
def _given(address: str) -> Iterator[str]:
    yield address
