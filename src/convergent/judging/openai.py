"""The LLM judge: any OpenAI-compatible endpoint, one token a judgement, read as a weighted mean over its alternatives.

A request is named by its content (model, address, prompt, parameters). Its reply is stored under that name before it is
counted, and what is stored is never asked again: not for the same text in another row, not after a crash, not by
another process, which waits for its turn. What came back, not when, decides a score, so concurrency changes nothing.
"""

from __future__ import annotations

import json
import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from convergent.cache import cache_dir
from convergent.core.ids import content_id
from convergent.core.values import Judgement
from convergent.errors import ConvergentError, InputError, JudgeError
from convergent.judging.base import Item
from convergent.judging.endpoint import PARAMETERS, Endpoint, Failed, resolve
from convergent.judging.prices import Estimate, estimate_tokens, price_of
from convergent.judging.replies import Replies, Reply, open_replies
from convergent.judging.rubrics import Rubrics, load_rubrics
from convergent.judging.score import parse_score

MAX_FAILURES = 10
"""Requests that may fail in a row, each after its retries, before the run is stopped."""
_log = logging.getLogger(__name__)


class OpenAIJudge:
    """Judge protocol over HTTP. See `docs/judges.md` for keys, prices and the cache."""

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        key_env: str | None = None,
        rubrics: Rubrics | None = None,
        cache: Path | None = None,
        concurrency: int = 8,
        max_cost: float | None = None,
        prices: str | Path | None = None,
        on_estimate: Callable[[Estimate], None] | None = None,
        attempts: int = 6,
        backoff: float = 0.5,
        timeout: float = 60.0,
    ) -> None:
        """Nothing is sent yet. Raises JudgeError or InputError for an option that cannot be used.

        base_url: address of the endpoint; default $OPENAI_BASE_URL, else OpenAI.
        key_env: name of the environment variable with its key, see `endpoint.resolve`.
        cache: SQLite file of replies; default in the cache folder.
        max_cost: US dollars for the life of this judge; needs a price.
        prices: a price file that goes before the bundled one.
        on_estimate: called before the first paid request of each `judge`.
        attempts, backoff (seconds, doubled each time), timeout (seconds): of one request.
        """
        if not model.strip():
            raise JudgeError("judge openai: needs a model, as in openai:gpt-4o")
        if concurrency < 1 or attempts < 1:
            raise InputError(
                f"judge openai: concurrency and attempts must be 1 or more, "
                f"got {concurrency} and {attempts}"
            )
        if max_cost is not None and not 0 <= max_cost < math.inf:
            raise InputError(f"judge openai: max_cost must be dollars, 0 or more, got {max_cost}")
        self.model = model.strip()
        self.base_url, self.key_env = resolve(base_url, key_env)
        self._rubrics = rubrics if rubrics is not None else load_rubrics()
        self._cache = cache
        self._concurrency, self._max_cost, self._on_estimate = concurrency, max_cost, on_estimate
        self._price = price_of(self.model, prices)
        self._attempts, self._backoff, self._timeout = attempts, backoff, timeout
        if max_cost is not None and self._price is None:
            raise JudgeError(
                f"judge {self.name}: has no price, so max_cost cannot be kept; give a price file with "
                f"`models: {{{self.model}: ...}}`"
            )
        self.spent = 0.0
        """US dollars so far, by the server's token counts; replies too broken to use count as estimated."""
        self._worst = 1.0
        """Largest ratio seen of real to estimated cost: what is on its way is reserved at this rate."""

    @property
    def name(self) -> str:
        return f"openai:{self.model}"

    @property
    def rubrics(self) -> tuple[str, ...]:
        return self._rubrics.names

    @property
    def content_id(self) -> str:
        """Depends on all that decides a score: model, address, parameters, rubric texts."""
        return content_id(self.model, self.base_url, PARAMETERS, self._rubrics)

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
        work = _Work(self, items, rubrics, on_result)
        with open_replies(self._cache_path()) as replies:
            work.settle(replies)
            if work.open:
                with self._alone():
                    work.settle(replies)  # another process may have asked meanwhile
                    if work.open:
                        self._pay(work, replies)
        return work.results()

    def estimate(self, items: Sequence[Item], rubrics: Sequence[str] = ("aligned", "coherent")) -> Estimate:
        """What `judge` would send now. Sends nothing."""
        work = _Work(self, items, rubrics, None)
        with open_replies(self._cache_path()) as replies:
            work.settle(replies)
        return self._estimate(work)

    def _cache_path(self) -> Path:
        return self._cache if self._cache is not None else cache_dir("judge") / "replies.sqlite"

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One process (and one judge in it) at a time pays for one model at one address; a killed one lets go."""
        path = self._cache_path()
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

    def _estimate(self, work: _Work) -> Estimate:
        tokens = sum(estimate_tokens(work.prompt(key)) for key in work.open)
        price = self._price
        cost = None if price is None else price.cost(tokens, len(work.open))
        n_free = len(work.jobs) - len(work.open)
        return Estimate(len(work.open), n_free, tokens, cost, price.as_of if price else "")

    def _pay(self, work: _Work, replies: Replies) -> None:
        """Ask for all that is open. One request at a time until one has succeeded, then all threads."""
        estimate = self._estimate(work)
        if self._on_estimate is not None:
            self._on_estimate(estimate)
        if self._max_cost is not None and self.spent + (estimate.cost or 0.0) > self._max_cost:
            raise JudgeError(
                f"judge {self.name}: {estimate}, with ${self.spent:.4f} spent, is over max_cost ${self._max_cost:.4f}; "
                "nothing was sent, raise it or judge fewer rows"
            )
        endpoint = Endpoint(
            self.model, self.base_url, self.key_env,
            attempts=self._attempts, backoff=self._backoff, timeout=self._timeout,
        )  # fmt: skip

        def ask(key: str, prompt: str) -> tuple[Reply, int]:
            reply, wasted = endpoint.ask(prompt)
            replies.put(key, self.model, self.base_url, reply)
            return reply, wasted

        queue, running = deque(work.open), dict[Future[tuple[Reply, int]], str]()
        proved, broke, failures = False, False, 0
        halt: ConvergentError | None = None
        known = replies.knows(self.model, self.base_url)
        with closing(endpoint), ThreadPoolExecutor(self._concurrency, "judge") as pool:
            try:
                while queue or running:
                    while queue and len(running) < (self._concurrency if proved else 1):
                        if self._over_budget([*running.values(), queue[0]], work):
                            broke = True
                            queue.clear()
                            break
                        key = queue.popleft()
                        running[pool.submit(ask, key, work.prompt(key))] = key
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
        if self._price is None:
            return
        guess = estimate_tokens(prompt)
        self.spent += wasted * self._price.cost(guess, 1)
        if reply is not None:
            n_in = guess if reply.input_tokens is None else reply.input_tokens
            paid = self._price.cost(n_in, 1 if reply.output_tokens is None else reply.output_tokens)
            self.spent += paid
            if expected := self._price.cost(guess, 1):
                self._worst = max(self._worst, paid / expected)

    def _over_budget(self, keys: Sequence[str], work: _Work) -> bool:
        """Whether what is spent, on its way and next would exceed max_cost."""
        price = self._price
        if self._max_cost is None or price is None:
            return False
        ahead = sum(price.cost(estimate_tokens(work.prompt(key)), 1) for key in keys)
        return self.spent + self._worst * ahead > self._max_cost

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
            return JudgeError(f"{place}: gives no token probabilities (logprobs); name a model or a server that does")
        return JudgeError(f"{place}: cannot be asked ({failed}); check that the address speaks chat completions")


class _Work:
    """The judgements that are wanted, and which requests are still open. Used by one thread."""

    def __init__(
        self,
        judge: OpenAIJudge,
        items: Sequence[Item],
        rubrics: Sequence[str],
        on_result: Callable[[Judgement], None] | None,
    ) -> None:
        self._judge, self._items, self._on_result = judge, items, on_result
        self.jobs = [(item, rubric) for item in items for rubric in rubrics]
        self._results: list[Judgement | None] = [None] * len(self.jobs)
        self.open: dict[str, list[int]] = {}
        """Key of a request -> the jobs that it serves: equal texts are asked once."""
        for i, (item, rubric) in enumerate(self.jobs):
            text = judge._rubrics.prompt(rubric, item)
            if item.response.strip():
                key = content_id({"model": judge.model, "base_url": judge.base_url, "prompt": text, **PARAMETERS})
                self.open.setdefault(key, []).append(i)
        for i, (item, _) in enumerate(self.jobs):
            if not item.response.strip():
                self._set(i, None, "empty", "")

    def prompt(self, key: str) -> str:
        """Made again when needed: a large file's prompts would fill the memory."""
        item, rubric = self.jobs[self.open[key][0]]
        return self._judge._rubrics.prompt(rubric, item)

    def settle(self, replies: Replies) -> None:
        """Finish what the cache can answer."""
        for key, reply in replies.get(list(self.open)).items():
            self.finish(key, reply)

    def finish(self, key: str, reply: Reply) -> None:
        """Score every job that waits for this request."""
        score, reason = parse_score((token, math.exp(min(p, 0.0))) for token, p in reply.alternatives)
        raw = json.dumps({"text": reply.text, "top": reply.alternatives, "model": reply.served_by}, ensure_ascii=False)
        for i in self.open.pop(key):
            self._set(i, score, reason, raw)

    def fail(self, key: str, message: str) -> None:
        """Give up a request for this run."""
        for i in self.open.pop(key):
            self._set(i, None, "error", message)

    def results(self) -> list[Judgement]:
        done = [judgement for judgement in self._results if judgement is not None]
        assert len(done) == len(self.jobs), "every job ends with a judgement or with an error that was raised"
        return done

    def _set(self, i: int, score: float | None, reason: str | None, raw: str) -> None:
        item, rubric = self.jobs[i]
        judgement = Judgement(item.id, self._judge.name, rubric, score, reason, raw)
        self._results[i] = judgement
        if self._on_result is not None:
            self._on_result(judgement)
