"""One prompt to an OpenAI-compatible endpoint, one reply back, or why there is none. Knows no rubrics, no cache.

Retries are ours, not the client's: they must cover replies that arrive broken, wait as Retry-After says, and end at
once when the run is stopped. How many attempts are on their way at once is up to a `Pace`, which 429 slows down for all.
The key is read here, given to the client and never put into a message.

    what happens                                        then
    429, 408, 409, 5xx, cut connection, broken reply    asked again, then `Failed`
    400, 413, 422 about this text                       `Failed` ("refused")
    401, 403, 404, quota used up, unknown parameter     JudgeError: no request will do better
"""

from __future__ import annotations

import email.utils
import math
import os
import random
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from convergent.errors import JudgeError
from convergent.judging.pace import Pace, Turn
from convergent.judging.replies import Reply
from convergent.judging.work import PARAMETERS

if TYPE_CHECKING:
    import openai
    import tenacity

OFFICIAL = "https://api.openai.com/v1"
KEY_ENV = "OPENAI_API_KEY"
URL_ENV = "OPENAI_BASE_URL"
"""The official client's variable; read here so that it stands in the content key like any other address."""
NO_LOGPROBS = "gives no token probabilities (logprobs); name a model or server that does, or have it judge by samples (--samples 5)"
LONGEST_WAIT = 600.0
"""Seconds: a server that asks for more is taken to be closed for today."""
LONGEST_BACKOFF = 30.0


class Failed(Exception):
    """One request that came to nothing; others may succeed."""

    def __init__(self, kind: str, message: str, wasted: int = 0) -> None:
        super().__init__(message)
        self.kind = kind
        """connection, rate, server, malformed, logprobs, refused or stopped."""
        self.wasted = wasted
        """Replies that came, may have been charged, and could not be used."""


class _Again(Exception):
    """An attempt worth repeating."""

    def __init__(self, kind: str, message: str, wait: float = 0.0) -> None:
        super().__init__(message)
        self.kind, self.wait = kind, wait


def resolve(base_url: str | None, key_env: str | None) -> tuple[str, str | None]:
    """(address, name of the key's variable or None). Raises JudgeError for an address that is none.

    The variable is OPENAI_API_KEY for OpenAI itself and for $OPENAI_BASE_URL (unless that is this machine and no such key
    is set: a server of one's own mostly wants none). An address given by hand gets a key only if its variable is named too,
    so that a key for one service is not sent to another.
    """
    by_default = base_url is None and key_env is None
    if base_url is None:
        base_url, key_env = os.environ.get(URL_ENV) or OFFICIAL, key_env or KEY_ENV
    base_url = base_url.strip().rstrip("/")
    try:
        parts = urlsplit(base_url)
        ok = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        raise JudgeError("base_url: is not an address; expected something like http://localhost:8000/v1") from None
    if not ok or parts.username or parts.password or parts.query or parts.fragment:
        # Not quoted: it may hold a secret.
        raise JudgeError(
            "base_url: must be a plain http or https address such as http://localhost:8000/v1, "
            "without a name, password or query; a key goes into an environment variable"
        )
    if base_url == OFFICIAL:
        key_env = key_env or KEY_ENV
    if by_default and parts.hostname in ("localhost", "127.0.0.1", "::1") and not os.environ.get(KEY_ENV, "").strip():
        key_env = None
    return base_url, key_env


def read_key(key_env: str | None) -> str:
    """The key in the named variable; a stand-in if none is named. Raises JudgeError without quoting it."""
    if key_env is None:
        return "no-key"
    key = os.environ.get(key_env, "").strip()
    if not key:
        raise JudgeError(f"environment variable {key_env}: is not set; put the endpoint's key there")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise JudgeError(f"environment variable {key_env}: holds characters that no key has; set it again")
    return key


class Endpoint:
    """A model at an address. `ask` may be called from several threads; `stop` ends all waiting."""

    def __init__(
        self,
        model: str,
        base_url: str,
        key_env: str | None,
        *,
        pace: Pace,
        attempts: int = 6,
        backoff: float = 0.5,
        timeout: float = 60.0,
    ) -> None:
        import openai

        self.model, self.base_url, self.key_env = model, base_url, key_env
        self._key = read_key(key_env)
        self._attempts, self._backoff = attempts, backoff
        self._client = openai.OpenAI(base_url=base_url, api_key=self._key, max_retries=0, timeout=timeout)
        self._pace, self._stopped = pace, threading.Event()

    def stop(self) -> None:
        """Begin no new attempt; waiting threads end with Failed("stopped")."""
        self._stopped.set()
        self._pace.stop()

    def close(self) -> None:
        self._client.close()

    def ask(self, prompt: str, parameters: Mapping[str, Any] = PARAMETERS) -> tuple[Reply, int]:
        """(reply, number of unusable replies before it). Raises Failed, or JudgeError if asking is pointless."""
        import tenacity

        unusable = 0
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_Again),
            stop=tenacity.stop_after_attempt(self._attempts) | tenacity.stop_when_event_set(self._stopped),
            wait=self._wait,
            sleep=tenacity.sleep_using_event(self._stopped),
            reraise=True,
        )
        try:
            for attempt in retrying:
                with attempt:
                    try:
                        return self._once(prompt, parameters), unusable
                    except _Again as again:
                        unusable += again.kind in ("malformed", "logprobs")
                        raise
        except _Again as again:
            raise Failed(again.kind, f"{again}, {self._attempts} attempts", unusable) from None
        raise AssertionError("a retry loop ends with a reply or an error")

    def _wait(self, state: tenacity.RetryCallState) -> float:
        """Seconds until the next attempt: what the server asked for, at least an exponential back-off with jitter."""
        error = state.outcome.exception() if state.outcome else None
        backoff = min(LONGEST_BACKOFF, self._backoff * 2.0 ** (state.attempt_number - 1))
        return max(getattr(error, "wait", 0.0), backoff * random.uniform(0.75, 1.0))

    def _once(self, prompt: str, parameters: Mapping[str, Any]) -> Reply:
        import openai

        with self._pace.turn() as turn:
            if turn is None or self._stopped.is_set():
                raise Failed("stopped", "stopped")
            try:
                completion = self._client.chat.completions.create(
                    model=self.model, messages=[{"role": "user", "content": prompt}], **parameters
                )
            except openai.APIStatusError as error:
                raise self._of_status(error, turn, parameters) from None
            except openai.APITimeoutError:
                raise _Again("connection", "no answer in time") from None
            except openai.APIConnectionError:
                raise _Again("connection", "no connection") from None
            except (openai.OpenAIError, ValueError):  # a body that is not JSON is a ValueError
                raise _Again("malformed", "reply is not JSON") from None
            turn.served = True
        return _read(completion, with_alternatives="logprobs" in parameters)

    def _of_status(self, error: openai.APIStatusError, turn: Turn, parameters: Mapping[str, Any]) -> Exception:
        """What an HTTP error means; server text is quoted only where it helps, shortened and without the key."""
        status, place = error.status_code, f"judge openai:{self.model} at {self.base_url}"
        said = self._clean(error.message)
        if status in (401, 403):
            hint = f"check the key in {self.key_env}" if self.key_env else "name the variable that holds its key"
            return JudgeError(f"{place}: access refused (HTTP {status}); {hint}")
        if status in (404, 405):
            return JudgeError(
                f"{place}: not found (HTTP {status}); check the model's name and the address, which mostly ends in /v1"
            )
        if status == 429 and error.code == "insufficient_quota":
            return JudgeError(f"{place}: the account's quota is used up; replies so far are kept, run again later")
        if status in (408, 409, 429) or status >= 500:
            wait = _retry_after(error.response.headers)
            if wait > LONGEST_WAIT:
                return JudgeError(
                    f"{place}: asks to wait {wait:.0f} s (HTTP {status}); "
                    "replies so far are kept, run again then"
                )
            if status == 429:
                turn.slow_down(wait)
            else:
                turn.hold(wait)
            return _Again("rate" if status == 429 else "server", f"HTTP {status}", wait)
        parameter = str(error.param or "")
        if "logprob" in f"{parameter} {error.message}".lower():
            return JudgeError(f"{place}: {NO_LOGPROBS} ({said})")
        if parameter in (*parameters, "model"):
            return JudgeError(f"{place}: does not take {parameter} as this judge needs it ({said}); name another model")
        return Failed("refused", f"HTTP {status}: {said}")

    def _clean(self, text: str) -> str:
        return " ".join(text.replace(self._key, "***").split())[:160]


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds in a Retry-After header (a number or a date), 0 if there is none."""
    value = headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (TypeError, ValueError):
            return 0.0
    return max(0.0, seconds) if not math.isnan(seconds) else 0.0


def _read(completion: Any, with_alternatives: bool) -> Reply:
    """The text, and the first token's alternatives if they were asked for. The client does not check what it parses, so nothing is taken for granted."""
    try:
        choice = completion.choices[0]
        text = choice.message.content or ""
        if not isinstance(text, str):
            raise TypeError
    except (AttributeError, IndexError, TypeError):
        raise _Again("malformed", "reply is not a chat completion") from None
    pairs = _alternatives(choice, text) if with_alternatives else ()
    usage = getattr(completion, "usage", None)
    counts = [getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
    n_in, n_out = (n if isinstance(n, int) and n >= 0 else None for n in counts)
    served_by = completion.model if isinstance(completion.model, str) else ""
    return Reply(_utf8(text), pairs, _utf8(served_by), n_in, n_out)


def _alternatives(choice: Any, text: str) -> tuple[tuple[str, float], ...]:
    try:
        tokens = choice.logprobs.content or []
        top = tokens[0].top_logprobs if tokens else []
        pairs = tuple((_utf8(alternative.token), float(alternative.logprob)) for alternative in top)
    except (AttributeError, IndexError, TypeError, ValueError):
        raise _Again("logprobs", "reply without token probabilities") from None
    if not pairs and (text or tokens):
        raise _Again("logprobs", "reply without token probabilities")
    return pairs


def _utf8(text: Any) -> str:
    if not isinstance(text, str):
        raise TypeError
    return text.encode("utf-8", "replace").decode("utf-8")
