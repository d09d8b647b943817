"""Text from any server that speaks chat completions: conversations in, n completions each out, as of every `Chat`.

Many requests run at once, each within a total time. Transient failures are retried. Every answer is on disk before the
next is asked for, so a repeated run pays for nothing twice. A key goes to one host only, and is masked in all texts.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import random
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..storage.cache import Cache, content_key
from .base import ChatError, Completion, check_arguments, progress_bar
from .transport import Failed, Server, TimedOut, Transient
from .wire import Request, completion

if TYPE_CHECKING:
    from httpx2 import AsyncClient

__all__ = ["ChatError", "EndpointChat", "Spent"]
logger = logging.getLogger(__name__)

FIRST_WAIT_S = 0.5
_LOST_IN_A_ROW = 10  # requests that failed to the last attempt: the server is gone
_TIMEOUTS_IN_A_ROW = 3  # one after the other, with no answer to any request in between


@dataclass(frozen=True)
class Spent:
    """What an `EndpointChat` has used so far.

    requests: sent, retries included.
    prompt_tokens, completion_tokens: as the server counts them; a quarter of the characters where it does not say, or
        says what cannot be.
    from_disk: answers that cost nothing, as they were on disk.
    failed: completions that failed.
    """

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    from_disk: int = 0
    failed: int = 0


class EndpointChat:
    """A `Chat` with vLLM, TGI, llama.cpp, `transformers serve`, OpenAI, an Inference Endpoint or a provider of the Hub.

        chat = EndpointChat("my-model", base_url="http://127.0.0.1:8000/v1", cache_dir="answers")
        chat = EndpointChat("meta-llama/Llama-3.3-70B-Instruct", provider="together", max_tokens_total=2_000_000)

    Args:
        model: the model's name for the server; without base_url, a model of the Hub.
        base_url: the server, up to and including /v1. Without user, password or query: a key is the `token`.
        provider: the Hub's name of a provider, which is reached through Hugging Face; not with base_url.
        token: the key; blank is none. By default the saved Hub token, which goes to Hugging Face's own hosts only.
        max_concurrency: requests at once.
        max_requests: the most requests sent, retries included.
        max_tokens_total: no request is sent once so many prompt and completion tokens were used. Requests under way
            then are waited for: it can be exceeded by what max_concurrency requests cost.
        timeout: seconds that a request may take in all, its answer included.
        attempts: how often a request is sent before it has failed.
        max_wait: the longest pause in seconds that a server may ask for; with a longer one the request has failed.
        cache_dir: a folder for the answers (`storage.cache.Cache`), refusals and empty ones too, as they were paid for;
            for another try give another seed. None keeps none.
        continue_final_message: ask the server to go on with a prefilled turn, as vLLM and SGLang understand it.
            Other servers get the beginning as a last message of the assistant, which many continue too; one that
            repeats it has it taken away.
        extra_body: more parameters for the server, `{"chat_template_kwargs": {"enable_thinking": False}}` say.

    Raises: ValueError for settings that do not fit together, or a key that cannot be one.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        base_url: str | None = None,
        provider: str | None = None,
        token: str | None = None,
        max_concurrency: int = 8,
        max_requests: int | None = None,
        max_tokens_total: int | None = None,
        timeout: float = 120.0,
        attempts: int = 8,
        max_wait: float = 300.0,
        cache_dir: str | Path | None = None,
        continue_final_message: bool = False,
        extra_body: dict[str, Any] | None = None,
    ):
        if model is None and base_url is None:
            raise ValueError('Give a model ("org/name") or the base_url of a server ("http://127.0.0.1:8000/v1").')
        if base_url is None and "://" in model:
            raise ValueError("model is an address: give it as base_url.")
        if base_url is not None and provider is not None:
            raise ValueError("Give base_url or provider, not both: a provider has its own address.")
        if max_concurrency < 1 or attempts < 1:
            raise ValueError(f"max_concurrency is {max_concurrency}, attempts {attempts}; both must be at least 1.")
        if not timeout > 0:
            raise ValueError(f"timeout is {timeout}; it must be above 0 seconds.")
        base_url = base_url and base_url.strip()
        self.model, self.base_url, self.provider = model, base_url, provider
        self.max_concurrency, self.attempts = max_concurrency, attempts
        self.continue_final_message, self.extra_body = continue_final_message, dict(extra_body or {})
        self._budget = _Budget(max_requests, max_tokens_total)
        self._server = Server(repr(self), base_url, token, timeout, max_wait)
        self._cache = None if cache_dir is None else Cache(cache_dir)

    def __repr__(self) -> str:
        where = self.base_url or self.provider or "the Hub's choice of provider"
        return f"EndpointChat({self.model!r} at {where}, max_concurrency={self.max_concurrency})"

    @property
    def spent(self) -> Spent:
        return self._budget.spent

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

        Servers give one answer to a request: the i-th of n is asked for with seed + i (so seeds nearer than n overlap
        where a server minds them). A completion is "failed" when the server refused it, gave an answer without text,
        failed `attempts` times, or was not asked since a cap was reached; how many, and why, is logged.

        Raises:
            ValueError: an argument out of range.
            ChatError: no request can succeed (a wrong key, no such model, no credit, a server that does not answer).
                Its `completions` hold what was answered until then.
            KeyboardInterrupt: after the requests under way were answered; a second Ctrl-C drops them.
        """
        prefill = check_arguments(conversations, n, temperature, top_p, max_tokens, prefill, stop)
        shared = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens, "stop": list(stop)}
        asked = [
            [self._request({"messages": messages, "prefill": start, **shared}, seed, i) for i in range(n)]
            for messages, start in zip(conversations, prefill, strict=True)
        ]
        run = _Run()
        self._answer_all({request.key: request for requests in asked for request in requests}, run)
        answers = [[run.answers.get(request.key, _UNASKED) for request in requests] for requests in asked]
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
        where = [self.model, self.base_url, self.provider, self.continue_final_message, self.extra_body]
        return Request(content_key("endpoint", where, body, seed, i), seed=seed + i, **body)

    def with_cache(self, cache: Cache) -> EndpointChat:
        """Returns this chat with its answers kept in the cache, unless it keeps them in a folder of its own."""
        if self._cache is not None:
            return self
        chat = copy.copy(self)
        chat._cache = cache
        return chat

    def _answer_all(self, requests: dict[str, Request], run: _Run) -> None:
        """Fills the run's answers from disk and from the server."""
        from anyio.from_thread import start_blocking_portal

        if self._cache is not None:
            run.answers.update((key, Completion(*answer)) for key, answer in self._cache.get(requests).items())
            self._budget.count(from_disk=len(run.answers))
        missing = [request for key, request in requests.items() if key not in run.answers]
        if not missing:
            return
        # In a thread of its own: a notebook's has an event loop that runs already.
        with start_blocking_portal() as portal:
            done = portal.start_task_soon(self._ask, missing, run)
            try:
                done.result()
            except KeyboardInterrupt:
                portal.call(run.halt.set)
                logger.warning(
                    "Interrupted: waiting for %d requests under way, at most %g s, as they are paid for. Ctrl-C again "
                    "drops them.",
                    run.under_way,
                    self._server.timeout,
                )
                done.result()
                raise

    async def _ask(self, requests: list[Request], run: _Run) -> None:
        room = asyncio.Semaphore(self.max_concurrency)

        async def answer(request: Request) -> None:
            async with room:
                if run.halt.is_set():
                    return
                try:
                    run.answers[request.key] = await self._answer(client, request, run)
                except Exception as error:
                    # What is under way is waited for, as it is paid for, and nothing else is sent.
                    run.error = run.error or error
                    run.halt.set()
            bar.update()

        with progress_bar(len(requests)) as bar:
            async with self._server.client() as client, asyncio.TaskGroup() as tasks:
                for request in requests:
                    tasks.create_task(answer(request))

    async def _answer(self, client: AsyncClient, request: Request, run: _Run) -> Completion:
        from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt

        most = self._server.max_wait
        attempts = AsyncRetrying(
            retry=retry_if_exception(lambda error: isinstance(error, Transient) and (error.wait or 0) <= most),
            wait=lambda state: _pause(state.outcome.exception(), state.attempt_number, most),
            stop=stop_after_attempt(self.attempts) | (lambda _: run.halt.is_set()),
            sleep=run.sleep,
            before_sleep=lambda state: run.tell(f"{state.outcome.exception()}; again in {state.upcoming_sleep:.1f} s"),
            reraise=True,
        )
        try:
            return await attempts(self._attempt, client, request, run)
        except NotAsked as error:
            return Completion("", "not_asked", str(error), 0, 0)
        except Failed as error:
            run.tell(str(error))
            return Completion("", "failed", str(error), 0, 0)
        except Transient as error:
            run.lost += 1
            if run.lost >= _LOST_IN_A_ROW:
                raise ChatError(
                    f"{self!r}: {run.lost} requests in a row failed, the last so: {error}. Repeat this when the server "
                    "answers again."
                ) from None
            tried = attempts.statistics["attempt_number"]
            return Completion("", "failed", f"{error}; attempts: {tried}.", 0, 0)

    async def _attempt(self, client: AsyncClient, request: Request, run: _Run) -> Completion:
        await run.sleep(run.not_before - time.monotonic())
        if run.halt.is_set():
            raise NotAsked(_UNASKED.error)
        try:
            how = {"continue_final_message": self.continue_final_message, "extra": self.extra_body}
            body = request.body(f"{self.model}:{self.provider}" if self.provider else self.model, **how)
        except UnicodeEncodeError as error:
            raise Failed(f"The conversation cannot be sent as UTF-8: {error.reason}.") from None
        self._budget.reserve_request()
        run.under_way, started = run.under_way + 1, time.monotonic()
        try:
            reply = await self._server.post(client, body, request.max_tokens)
        except TimedOut as error:
            if run.count_timeout(started) >= _TIMEOUTS_IN_A_ROW:
                raise ChatError(
                    f"{self!r}: {error}, {run.timeouts} times in a row. Raise the timeout or see why the server does "
                    "not answer, then repeat this."
                ) from None
            raise
        except Failed:
            run.timeouts = 0
            raise
        except Transient as error:
            run.timeouts = 0
            if error.wait is not None and error.wait <= self._server.max_wait:
                run.not_before = max(run.not_before, time.monotonic() + error.wait)  # for all requests: one limit
            raise
        finally:
            run.under_way -= 1
        run.lost = run.timeouts = 0
        answer, prompt_tokens, completion_tokens = completion(
            reply,
            request,
            removes_prefill=not self.continue_final_message,
            mask=self._server.mask,
            clean=self._server.clean,
        )
        self._budget.count(prompt_tokens=prompt_tokens, completion_tokens=completion_tokens)
        if self._cache is not None:
            self._cache.put({request.key: list(answer)})
        return answer


class _Budget:
    """What was spent, and a bound on it that holds for all threads."""

    def __init__(self, max_requests: int | None, max_tokens_total: int | None):
        self.max_requests, self.max_tokens_total = max_requests, max_tokens_total
        self.spent = Spent()
        self._lock = threading.Lock()

    def reserve_request(self) -> None:
        """Raises: NotAsked when a bound is reached."""
        with self._lock:
            used = self.spent.prompt_tokens + self.spent.completion_tokens
            for name, cap, value in (
                ("max_requests", self.max_requests, self.spent.requests),
                ("max_tokens_total", self.max_tokens_total, used),
            ):
                if cap is not None and value >= cap:
                    raise NotAsked(f"{name} is {cap}, and {value} were used.")
            self.spent = replace(self.spent, requests=self.spent.requests + 1)

    def count(self, **more: int) -> None:
        with self._lock:
            self.spent = replace(
                self.spent, **{name: getattr(self.spent, name) + value for name, value in more.items()}
            )


_UNASKED = Completion("", "not_asked", "The run ended before its turn.", 0, 0)


class NotAsked(Exception):
    """The request was not sent."""


@dataclass
class _Run:
    """One call of `complete`, in its own event loop.

    lost: requests in a row that failed for good. timeouts: in a row, those of one moment counted once.
    """

    answers: dict[str, Completion] = field(default_factory=dict)
    halt: asyncio.Event = field(default_factory=asyncio.Event)
    error: Exception | None = None
    under_way: int = 0
    not_before: float = 0.0
    lost: int = 0
    timeouts: int = 0
    last_timeout: float = 0.0
    told: bool = False

    async def sleep(self, seconds: float) -> None:
        """Less when the run is halted."""
        if seconds > 0:
            with suppress(TimeoutError):
                await asyncio.wait_for(self.halt.wait(), seconds)

    def count_timeout(self, started: float) -> int:
        if not self.timeouts or started >= self.last_timeout:
            self.timeouts, self.last_timeout = self.timeouts + 1, time.monotonic()
        return self.timeouts

    def tell(self, failure: str) -> None:
        logger.log(logging.INFO if self.told else logging.WARNING, failure)  # the first where everybody sees it
        self.told = True


def _pause(error: Transient, attempt: int, most: float) -> float:
    """Seconds until the next attempt: what the server asked for, else doubling; some luck keeps requests apart."""
    luck = _luck.random()
    return (
        FIRST_WAIT_S * luck + error.wait if error.wait is not None else min(most, FIRST_WAIT_S * 2 ** (attempt - luck))
    )


_luck = random.Random()  # not the shared one: a caller's seeded run must not see that requests were retried
