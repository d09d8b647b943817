"""Completions from any server that speaks chat completions: conversations in, n completions each out.

Many requests run at once, each within a total time. Transient failures are retried. Every answer is in the cache before
the next request is sent, so a repeated run pays for nothing twice. The key goes to one host only.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anyio.from_thread import start_blocking_portal
from httpx2 import AsyncClient
from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt

from ..storage.cache import Cache, content_key
from ..storage.validation import check_counts
from .base import ChatError, Completion, check_arguments, progress_bar
from .server import MAX_WAIT_S, Request, RequestFailed, Server, TimedOut, TransientFailure

__all__ = ["ChatError", "EndpointChat", "Spent"]
logger = logging.getLogger(__name__)

FIRST_WAIT_S = 0.5
_FAILURES_IN_A_ROW = 10  # requests that failed after all attempts: the server is gone
_TIMEOUTS_IN_A_ROW = 3  # with no reply to any request in between
_ENDED = Completion("", "not_asked", "The run ended before its turn.", 0, 0)
_jitter = random.Random()  # not the global one: retries must not change a caller's seeded random numbers


@dataclass(frozen=True)
class Spent:
    """What an `EndpointChat` has used so far.

    requests: sent, retries included.
    prompt_tokens, completion_tokens: as the server counts them; a quarter of the characters where it does not.
    from_cache: completions that cost nothing, as they were in the cache.
    failed: completions that failed or were not asked for.
    """

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    from_cache: int = 0
    failed: int = 0


class EndpointChat:
    """A `Chat` with vLLM, TGI, llama.cpp, `transformers serve`, OpenAI, an Inference Endpoint or a provider of the Hub.

        chat = EndpointChat("my-model", base_url="http://127.0.0.1:8000/v1", cache_dir="answers")
        chat = EndpointChat("meta-llama/Llama-3.3-70B-Instruct:together", max_tokens_total=2_000_000)

    Args:
        model: the model's name for the server; without base_url, a model of the Hub, with ":" and a provider if you
            want a certain one.
        base_url: the server, up to and including /v1. Without user, password or query: pass a key as `token`.
        token: the key. None is the saved Hub token, which is sent to Hugging Face's own hosts only.
        max_concurrency: requests at once.
        max_tokens_total: no request is sent once so many prompt and completion tokens were used. Requests already sent
            are waited for, so it can be exceeded by what max_concurrency requests cost.
        timeout: seconds for one request, its reply included.
        attempts: how often a request is sent before it has failed.
        cache_dir: a folder for the answers (`storage.cache.Cache`), refusals and empty ones too, as they were paid for;
            another seed gives other answers. None keeps none.
        continue_final_message: ask the server to continue a prefilled turn, which vLLM and SGLang support. Other
            servers get the prefill as a last message of the assistant, which many continue too; it is removed from
            answers that repeat it.
        extra_body: more parameters for the server, for example `{"chat_template_kwargs": {"enable_thinking": False}}`.

    Raises: ValueError for settings that do not fit together, or an invalid key.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        base_url: str | None = None,
        token: str | None = None,
        max_concurrency: int = 8,
        max_tokens_total: int | None = None,
        timeout: float = 120.0,
        attempts: int = 8,
        cache_dir: str | Path | None = None,
        continue_final_message: bool = False,
        extra_body: dict[str, Any] | None = None,
    ):
        if model is None and base_url is None:
            raise ValueError('Give a model ("org/name") or the base_url of a server ("http://127.0.0.1:8000/v1").')
        if base_url is None and "://" in model:
            raise ValueError("model is an address: give it as base_url.")
        check_counts(max_concurrency=max_concurrency, attempts=attempts)
        if not timeout > 0:
            raise ValueError(f"timeout is {timeout}; it must be above 0 seconds.")
        self.model, self.base_url = model, base_url and base_url.strip()
        self.max_concurrency, self.attempts = max_concurrency, attempts
        self.continue_final_message, self.extra_body = continue_final_message, dict(extra_body or {})
        self._budget = _Budget(max_tokens_total)
        self._server = Server(repr(self), self.base_url, token, timeout)
        self._cache = None if cache_dir is None else Cache(cache_dir)

    def __repr__(self) -> str:
        where = self.base_url or "the Hub"
        return f"EndpointChat({self.model!r} at {where}, max_concurrency={self.max_concurrency})"

    @property
    def spent(self) -> Spent:
        return self._budget.spent

    def with_cache(self, cache: Cache) -> EndpointChat:
        """Returns this chat with its answers kept in the cache, unless it keeps them in a folder of its own."""
        if self._cache is not None:
            return self
        chat = copy.copy(self)
        chat._cache = cache
        return chat

    def complete(
        self,
        conversations: Sequence[list[dict]],
        *,
        n: int = 1,
        temperature: float = 0.8,
        top_p: float = 0.9,
        max_tokens: int = 256,
        seed: int = 0,
        prefill: Sequence[str | None] | None = None,
        stop: Sequence[str] = (),
    ) -> list[list[Completion]]:
        """Returns n completions of each conversation; the arguments are those of `Chat.complete`.

        One request is sent for each completion, the i-th of n with seed + i, so calls whose seeds are closer than n
        share answers where a server follows seeds. A completion is "failed" when the server refused it, answered
        without text or failed `attempts` times, and "not_asked" once `max_tokens_total` is reached; how many, and why,
        is logged.

        Raises:
            ValueError: an argument out of range.
            ChatError: no request can succeed (a wrong key, no such model, no credit, a server that does not answer).
                Its `completions` hold the answers until then.
            KeyboardInterrupt: after the replies to the requests already sent; a second Ctrl-C does not wait for them.
        """
        prefill = check_arguments(conversations, n, temperature, top_p, max_tokens, prefill, stop)
        shared = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens, "stop": list(stop)}
        requests = [
            [self._request({"messages": messages, "prefill": start, **shared}, seed, i) for i in range(n)]
            for messages, start in zip(conversations, prefill, strict=True)
        ]
        run = _Run()
        self._answer_all({request.key: request for group in requests for request in group}, run)
        answers = [[run.answers.get(request.key, _ENDED) for request in group] for group in requests]
        if run.error is not None:
            if isinstance(run.error, ChatError):
                run.error.completions = answers
            raise run.error
        reasons = [answer.error for answer in run.answers.values() if answer.finish in ("failed", "not_asked")]
        if reasons:
            logger.warning("%d of %d completions failed; the first: %s", len(reasons), len(run.answers), reasons[0])
        self._budget.count(failed=len(reasons))
        return answers

    def _request(self, body: dict[str, Any], seed: int, i: int) -> Request:
        where = [self.model, self.base_url, self.continue_final_message, self.extra_body]
        return Request(content_key("endpoint", where, body, seed, i), seed=seed + i, **body)

    def _answer_all(self, requests: dict[str, Request], run: _Run) -> None:
        """Put answers into the run, from the cache and from the server."""
        if self._cache is not None:
            run.answers.update((key, Completion(*answer)) for key, answer in self._cache.get(requests).items())
            self._budget.count(from_cache=len(run.answers))
        missing = [request for key, request in requests.items() if key not in run.answers]
        if not missing:
            return
        # In a thread of its own: a notebook's thread runs an event loop already.
        with start_blocking_portal() as portal:
            done = portal.start_task_soon(self._send_all, missing, run)
            try:
                done.result()
            except KeyboardInterrupt:
                portal.call(run.halt.set)
                logger.warning(
                    "Interrupted: waiting for the replies to %d requests, at most %g s, as they are paid for. Ctrl-C "
                    "again does not wait.",
                    run.in_flight,
                    self._server.timeout,
                )
                done.result()
                raise

    async def _send_all(self, requests: list[Request], run: _Run) -> None:
        slots = asyncio.Semaphore(self.max_concurrency)

        async def answer(request: Request) -> None:
            async with slots:
                if run.halt.is_set():
                    return
                try:
                    run.answers[request.key] = await self._answer(client, request, run)
                except Exception as error:
                    # Requests already sent are waited for, as they are paid for; no other is sent.
                    run.error = run.error or error
                    run.halt.set()
            bar.update()

        with progress_bar(len(requests)) as bar:
            async with self._server.client() as client, asyncio.TaskGroup() as tasks:
                for request in requests:
                    tasks.create_task(answer(request))

    async def _answer(self, client: AsyncClient, request: Request, run: _Run) -> Completion:
        """The answer to a request, after retries; a request that failed is a completion too."""
        retrying = AsyncRetrying(
            retry=retry_if_exception(lambda error: isinstance(error, TransientFailure) and _can_wait(error)),
            wait=lambda state: _pause(state.outcome.exception(), state.attempt_number),
            stop=stop_after_attempt(self.attempts) | (lambda _: run.halt.is_set()),
            sleep=run.sleep,
            before_sleep=lambda state: run.log(f"{state.outcome.exception()}; again in {state.upcoming_sleep:.1f} s"),
            reraise=True,
        )
        try:
            return await retrying(self._attempt, client, request, run)
        except NotSent as error:
            return Completion("", "not_asked", str(error), 0, 0)
        except RequestFailed as error:
            run.log(str(error))
            return Completion("", "failed", str(error), 0, 0)
        except TransientFailure as error:
            run.failures += 1
            if run.failures >= _FAILURES_IN_A_ROW:
                raise ChatError(
                    f"{self!r}: {run.failures} requests in a row failed, the last with: {error}. Repeat this when the "
                    "server answers again."
                ) from None
            return Completion("", "failed", f"{error}; attempts: {retrying.statistics['attempt_number']}.", 0, 0)

    async def _attempt(self, client: AsyncClient, request: Request, run: _Run) -> Completion:
        await run.sleep(run.not_before - time.monotonic())
        if run.halt.is_set():
            raise NotSent(_ENDED.error)
        body = request.body(self.model, continue_final_message=self.continue_final_message, extra=self.extra_body)
        self._budget.reserve_request()
        run.in_flight, started = run.in_flight + 1, time.monotonic()
        try:
            reply = await self._server.post(client, body, request.max_tokens)
        except TimedOut as error:
            if run.count_timeout(started) >= _TIMEOUTS_IN_A_ROW:
                raise ChatError(
                    f"{self!r}: {error}, {run.timeouts} times in a row. Raise the timeout or find out why the server "
                    "does not answer, then repeat this."
                ) from None
            raise
        except (RequestFailed, TransientFailure) as error:
            run.timeouts = 0
            if isinstance(error, TransientFailure) and error.wait is not None and _can_wait(error):
                run.not_before = max(run.not_before, time.monotonic() + error.wait)  # for all requests: one limit
            raise
        finally:
            run.in_flight -= 1
        run.failures = run.timeouts = 0
        answer = reply.completion(request, repeats_prefill=not self.continue_final_message)
        self._budget.count(
            prompt_tokens=reply.prompt_tokens or sum(len(message["content"]) for message in request.messages) // 4,
            completion_tokens=reply.completion_tokens or len(reply.text) // 4,
        )
        if self._cache is not None:
            self._cache.put({request.key: list(answer)})
        return answer


class NotSent(Exception):
    """The request was not sent: the run has ended or its budget is used."""


class _Budget:
    """What was spent, and a bound on it, in all threads."""

    def __init__(self, max_tokens_total: int | None):
        self.max_tokens_total = max_tokens_total
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    @property
    def spent(self) -> Spent:
        return Spent(**self._counts)

    def reserve_request(self) -> None:
        """Count a request. Raises: NotSent when the bound is reached."""
        with self._lock:
            used = self._counts["prompt_tokens"] + self._counts["completion_tokens"]
            if self.max_tokens_total is not None and used >= self.max_tokens_total:
                raise NotSent(f"max_tokens_total is {self.max_tokens_total:,}, and {used:,} were used.")
            self._counts["requests"] += 1

    def count(self, **more: int) -> None:
        with self._lock:
            self._counts.update(more)


@dataclass
class _Run:
    """One call of `complete`, in its own event loop.

    halt: set to send nothing more. not_before: `time.monotonic()` before which nothing is sent.
    failures: requests that failed in a row. timeouts: in a row, those of requests sent at one time counted once.
    """

    answers: dict[str, Completion] = field(default_factory=dict)
    halt: asyncio.Event = field(default_factory=asyncio.Event)
    error: Exception | None = None
    in_flight: int = 0
    not_before: float = 0.0
    failures: int = 0
    timeouts: int = 0
    last_timeout: float = 0.0
    has_logged: bool = False

    async def sleep(self, seconds: float) -> None:
        """Sleep, or wake early when the run is halted."""
        if seconds > 0:
            with suppress(TimeoutError):
                await asyncio.wait_for(self.halt.wait(), seconds)

    def count_timeout(self, started: float) -> int:
        if not self.timeouts or started >= self.last_timeout:
            self.timeouts, self.last_timeout = self.timeouts + 1, time.monotonic()
        return self.timeouts

    def log(self, failure: str) -> None:
        # The first as a warning, which is shown by default.
        logger.log(logging.INFO if self.has_logged else logging.WARNING, failure)
        self.has_logged = True


def _can_wait(error: TransientFailure) -> bool:
    return (error.wait or 0) <= MAX_WAIT_S


def _pause(error: TransientFailure, attempt: int) -> float:
    """Seconds until the next attempt: what the server asked for, or twice as long each time; requests are spread."""
    spread = _jitter.random()
    if error.wait is not None:
        return FIRST_WAIT_S * spread + error.wait
    return min(MAX_WAIT_S, FIRST_WAIT_S * 2 ** (attempt - spread))
