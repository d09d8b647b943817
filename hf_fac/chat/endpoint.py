"""What writes text on a server: any endpoint that speaks chat completions, through `huggingface_hub.InferenceClient`.

Conversations in, n completions each out, as of every `Chat`. Many requests run at once; what passes is asked for again;
every answer is on disk before the next is asked for, so that a run that is repeated pays for nothing twice.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import re
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ..storage.journal import SharedLines
from .local import NOT_ASKED, Completion, before_stop, check_arguments, progress_bar

if TYPE_CHECKING:
    from httpx2 import Response
    from huggingface_hub import ChatCompletionOutput
    from tenacity import RetryCallState

logger = logging.getLogger(__name__)

FIRST_WAIT_S = 0.5
_LOST_IN_A_ROW = 10  # requests that failed to the last attempt: the server is gone, and the rest is not asked
_REPEAT = (408, 409, 425, 429)  # and what is 500 or more
_THIS_REQUEST = (400, 413, 414, 415, 422)  # the server did not like what was asked; another request may do
_HF_HOSTS = (".huggingface.co", ".huggingface.cloud")


class ChatError(RuntimeError):
    """No request can succeed: what the server said and what to do.

    completions: as `complete` would have returned them, with all that was answered before; the rest failed.
    """

    def __init__(self, message: str):
        super().__init__(message)
        self.completions: list[list[Completion]] = []


@dataclass(frozen=True)
class Spent:
    """What an `EndpointChat` has used so far.

    requests: sent, those that were asked again included.
    prompt_tokens, completion_tokens: as the server counts them; a quarter of the characters where it does not say.
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
        provider: the Hub's name of a provider; not with base_url.
        token: the key. By default the saved Hub token, which goes to Hugging Face's own hosts only.
        max_concurrency: requests at once.
        max_requests: the most requests sent, those that are asked again included.
        max_tokens_total: no request is sent once so many prompt and completion tokens were used. Requests under way
            then are waited for: it can be exceeded by what max_concurrency requests cost.
        timeout: seconds that a server may be silent.
        attempts: how often a request is sent before it has failed.
        max_wait: the longest pause in seconds that a server may ask for; with a longer one the request has failed.
        cache_dir: a folder for the answers (answers.jsonl), refusals and empty ones too, as they were paid for; for
            another try give another seed. None keeps none.
        continue_final_message: ask the server to go on with a turn that was begun, as vLLM and SGLang understand it.
            Other servers get the beginning as a last message of the assistant, which many continue too; one that
            repeats it has it taken away.
        extra_body: more parameters for the server, `{"chat_template_kwargs": {"enable_thinking": False}}` say.

    Raises: ValueError for settings that do not fit together.
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
        from huggingface_hub import InferenceClient, get_token

        if model is None and base_url is None:
            raise ValueError('Give a model ("org/name") or the base_url of a server ("http://127.0.0.1:8000/v1").')
        if base_url is not None and provider is not None:
            raise ValueError("Give base_url or provider, not both: a provider has its own address.")
        if max_concurrency < 1 or attempts < 1:
            raise ValueError(f"max_concurrency is {max_concurrency}, attempts {attempts}; both must be at least 1.")
        host = None
        if base_url is not None:
            parts = urlsplit(base_url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError("base_url must begin with http:// or https:// and name a host.")
            if parts.username or parts.password or parts.query or parts.fragment:
                raise ValueError("base_url must hold no user, password or query: it is logged. A key is the token.")
            # Unencrypted, no host gets the saved token.
            host = parts.hostname if parts.scheme == "https" else ""
        self.model, self.base_url, self.provider = model, base_url, provider
        self.max_concurrency, self.max_requests, self.max_tokens_total = max_concurrency, max_requests, max_tokens_total
        self.timeout, self.attempts, self.max_wait = timeout, attempts, max_wait
        self.continue_final_message, self.extra_body = continue_final_message, dict(extra_body or {})
        self.spent = Spent()
        if token is None and (host is None or f".{host}".endswith(_HF_HOSTS)):
            token = get_token()
        # The client would send the saved token to whatever host it is given; a word that is no key stops that.
        elif token is None:
            token = "none"
        self._secret = token if token != "none" else None
        self._client = InferenceClient(
            **({"base_url": base_url} if base_url else {"model": model, "provider": provider}),
            token=token,
            timeout=timeout,
        )
        self._lock = threading.Lock()
        self._not_before = 0.0
        self._answers = SharedLines(Path(cache_dir) / "answers.jsonl") if cache_dir is not None else None

    def __repr__(self) -> str:
        where = self.base_url or self.provider or "the Hub's choice of provider"
        return f"EndpointChat({self.model!r} at {where}, max_concurrency={self.max_concurrency})"

    def complete(
        self,
        conversations: Sequence[list[dict]],
        *,
        n: int = 1,
        temperature: float = 0.8,
        top_p: float = 0.9,
        max_tokens: int = 256,
        seed: int = 0,
        begun: Sequence[str | None] | None = None,
        stop: Sequence[str] = (),
    ) -> list[list[Completion]]:
        """Returns n completions of each conversation; the arguments are those of `Chat.complete`.

        Servers give one answer to a request: the i-th of n is asked for with seed + i (so seeds nearer than n overlap
        where a server minds them). A completion is "failed" when the server refused it, gave an answer without text,
        failed `attempts` times, or was not asked since a cap was reached; how many, and why, is logged.

        Raises:
            ValueError: an argument out of range.
            ChatError: no request can succeed (a wrong key, no such model, no credit). Its `completions` hold what was
                answered until then.
        """
        begun = check_arguments(conversations, n, temperature, top_p, max_tokens, begun, stop)
        shared = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens, "stop": list(stop)}
        asked = [
            [self._request({"messages": messages, "begun": start, **shared}, seed, i) for i in range(n)]
            for messages, start in zip(conversations, begun, strict=True)
        ]
        answers: dict[str, Completion] = {}
        try:
            self._answer_all({request.key: request for requests in asked for request in requests}, answers)
        except ChatError as error:
            error.completions = [[answers.get(request.key, _UNASKED) for request in requests] for requests in asked]
            raise
        reasons = [answer.error for answer in answers.values() if answer.finish == "failed"]
        if reasons:
            logger.warning("%d of %d completions failed; the first: %s", len(reasons), len(answers), reasons[0])
        self._count(failed=len(reasons))
        return [[answers[request.key] for request in requests] for requests in asked]

    def _request(self, body: dict[str, Any], seed: int, i: int) -> _Request:
        where = [self.model, self.base_url, self.provider, self.continue_final_message, self.extra_body]
        identity = json.dumps([where, body, seed, i], sort_keys=True)
        return _Request(hashlib.sha256(identity.encode()).hexdigest(), seed=seed + i, **body)

    def _answer_all(self, requests: dict[str, _Request], answers: dict[str, Completion]) -> None:
        """Fills `answers` from disk and from the server; after an exception they hold what was answered until then."""
        if self._answers is not None:
            found = {key: self._answers.known[key] for key in requests if key in self._answers.known}
            whole = {key: entry for key, entry in found.items() if entry.keys() == set(Completion._fields)}
            answers.update((key, Completion(**entry)) for key, entry in whole.items())
            self._count(from_disk=len(answers))
        missing = [request for key, request in requests.items() if key not in answers]
        run = _Run()
        with ThreadPoolExecutor(self.max_concurrency) as executor, progress_bar(len(missing)) as bar:
            futures = {executor.submit(self._answer, request, run): request.key for request in missing}
            try:
                for future in as_completed(futures):
                    future.result()
                    bar.update()
            finally:
                # After an exception what is under way is waited for, as it is paid for, and nothing else is begun.
                run.halt.set()
                executor.shutdown(cancel_futures=True)
                answers.update(
                    (key, future.result())
                    for future, key in futures.items()
                    if not future.cancelled() and future.exception() is None
                )

    def _answer(self, request: _Request, run: _Run) -> Completion:
        from tenacity import Retrying, retry_if_exception, stop_after_attempt
        from tenacity.nap import sleep_using_event
        from tenacity.stop import stop_when_event_set

        def tell(state: RetryCallState) -> None:
            logger.info("%s; again in %.1f s", state.outcome.exception(), state.upcoming_sleep)

        attempts = Retrying(
            retry=retry_if_exception(lambda error: isinstance(error, _Again) and (error.wait or 0) <= self.max_wait),
            wait=lambda state: _pause(state.outcome.exception(), state.attempt_number, self.max_wait),
            stop=stop_after_attempt(self.attempts) | stop_when_event_set(run.halt),
            sleep=sleep_using_event(run.halt),
            before_sleep=tell,
            reraise=True,
        )
        try:
            return attempts(self._attempt, request, run)
        except ChatError:
            run.halt.set()
            raise
        except _Failed as error:
            return Completion("", "failed", str(error), 0, 0)
        except _Again as error:
            run.lost += 1
            run.last = str(error)
            tried = attempts.statistics["attempt_number"]
            return Completion("", "failed", f"{error}; attempts: {tried}.", 0, 0)

    def _attempt(self, request: _Request, run: _Run) -> Completion:
        from huggingface_hub.errors import HfHubHTTPError, HTTPError, InferenceTimeoutError

        run.halt.wait(max(0.0, self._not_before - time.monotonic()))
        if run.halt.is_set():
            raise _Failed(_UNASKED.error)
        if run.lost >= _LOST_IN_A_ROW:
            raise _Failed(f"{NOT_ASKED}the server failed {run.lost} requests in a row, the last so: {run.last}.")
        self._count_request()
        extra = dict(self.extra_body)
        messages = list(request.messages)
        if request.begun:
            messages.append({"role": "assistant", "content": request.begun})
            if self.continue_final_message:
                extra |= {"continue_final_message": True, "add_generation_prompt": False}
        try:
            output = self._client.chat_completion(
                messages,
                model=self.model,
                max_tokens=request.max_tokens,
                temperature=request.temperature,
                top_p=request.top_p if request.top_p < 1 else None,  # TGI refuses 1, which is the default elsewhere
                seed=request.seed,
                stop=request.stop or None,
                extra_body=extra or None,
            )
            answer = self._read(output, request)
        except HfHubHTTPError as error:
            raise self._refusal(error.response, error.server_message) from None
        except InferenceTimeoutError:
            raise _Again(f"The server was silent for {self.timeout:g} s") from None
        except HTTPError as error:
            raise _Again(f"The connection broke ({type(error).__name__}: {self._clean(str(error))})") from None
        except UnicodeEncodeError as error:
            raise _Failed(f"The conversation cannot be sent as UTF-8: {error.reason}.") from None
        except (ValueError, TypeError, AttributeError, LookupError) as error:
            if isinstance(error.__context__, HTTPError):  # the client stumbled over the refusal's own shape
                raise self._refusal(error.__context__.response, None) from None
            if type(error) is ValueError and self.base_url is None and not self.spent.completion_tokens:
                raise ChatError(self._clean(str(error))) from None  # the client's own: no such provider, no key, ...
            reason = f"{type(error).__name__}: {self._clean(str(error))}"
            raise _Again(f"The server's answer has the wrong shape ({reason})") from None
        run.lost = 0
        if self._answers is not None:
            with self._lock:
                self._answers.add(request.key, answer._asdict())
        return answer

    def _read(self, output: ChatCompletionOutput, request: _Request) -> Completion:
        """The answer, or why there is none. Raises: what an answer of the wrong shape makes it raise."""
        if not isinstance(output.choices, list) or not output.choices:
            raise LookupError(f"no choices in {str(dict(output))[:200]}")
        choice = output.choices[0]
        content = choice.message.content
        if content is not None and not isinstance(content, str):
            raise TypeError(f"content is {type(content).__name__}")
        usage = output.usage
        characters = sum(len(message["content"]) for message in request.messages)
        prompt_tokens = (usage and usage.prompt_tokens) or 0
        completion_tokens = (usage and usage.completion_tokens) or 0
        self._count(
            prompt_tokens=prompt_tokens or characters // 4,
            completion_tokens=completion_tokens or len(content or "") // 4,
        )
        error = None
        if refusal := getattr(choice.message, "refusal", None):
            error = f"The model refused: {self._clean(str(refusal))}"
        elif choice.finish_reason == "content_filter":
            error = "The server's content filter withheld the answer."
        elif not content:
            error = f"The answer has no text (finish_reason {choice.finish_reason!r})."
            if choice.finish_reason == "length":
                error += " All tokens went elsewhere, into thinking perhaps: raise max_tokens."
        if error:
            return Completion("", "failed", error, prompt_tokens, completion_tokens)
        if request.begun and not self.continue_final_message:
            content = content.removeprefix(request.begun)
        finish = "length" if choice.finish_reason == "length" else "stop"
        return Completion(before_stop(content, request.stop), finish, None, prompt_tokens, completion_tokens)

    def _refusal(self, response: Response, message: str | None) -> Exception:
        status, said = response.status_code, self._clean(message or response.text)
        if status in _REPEAT or status >= 500:
            wait = _asked_to_wait(response.headers.get("Retry-After"))
            if wait is not None and wait <= self.max_wait:
                self._not_before = max(self._not_before, time.monotonic() + wait)  # for all requests: one limit
            return _Again(f"The server answered {status} ({said})", wait)
        if status in _THIS_REQUEST:
            return _Failed(f"The server refused the request: {status} ({said}). Change the conversation or parameters.")
        todo = {
            401: "The key is missing, mistyped or expired: give token=.",
            402: "The account has no credit left.",
            403: "The key may not use this model or server: use one that may.",
            404: "There is no such model, or no chat completions at that address: check model and base_url (.../v1).",
        }.get(status, "Check base_url, model and extra_body.")
        return ChatError(f"{self!r}: the server answered {status} ({said}). {todo}")

    def _clean(self, text: str) -> str:
        if self._secret:
            text = text.replace(self._secret, "***")
        return " ".join(re.sub(r"hf_[A-Za-z0-9]{20,}", "hf_***", text).split())[:300].rstrip(".")

    def _count_request(self) -> None:
        with self._lock:
            used = self.spent.prompt_tokens + self.spent.completion_tokens
            for name, cap, value in (
                ("max_requests", self.max_requests, self.spent.requests),
                ("max_tokens_total", self.max_tokens_total, used),
            ):
                if cap is not None and value >= cap:
                    raise _Failed(f"{NOT_ASKED}{name} is {cap}, and {value} were used.")
            self.spent = replace(self.spent, requests=self.spent.requests + 1)

    def _count(self, **more: int) -> None:
        with self._lock:
            self.spent = replace(
                self.spent, **{name: getattr(self.spent, name) + value for name, value in more.items()}
            )


_UNASKED = Completion("", "failed", f"{NOT_ASKED}the run ended before its turn.", 0, 0)


@dataclass(frozen=True)
class _Request:
    """What is asked; `key` stands for everything that shapes the answer, the number of the completion among it."""

    key: str
    messages: list[dict]
    begun: str | None
    temperature: float
    top_p: float
    max_tokens: int
    stop: list[str]
    seed: int


@dataclass
class _Run:
    """One call of `complete`: `lost` requests in a row failed for good, the last for the reason `last`."""

    halt: threading.Event = field(default_factory=threading.Event)
    lost: int = 0
    last: str = ""


class _Again(Exception):
    """It may pass; the server asked to wait so many seconds, or None."""

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.wait = wait


class _Failed(Exception):
    """This request gets no answer."""


def _asked_to_wait(stated: str | None) -> float | None:
    """Seconds from a Retry-After header: a number or a date."""
    if not stated:
        return None
    with suppress(ValueError):
        return max(0.0, float(stated))
    with suppress(ValueError):
        return max(0.0, parsedate_to_datetime(stated).timestamp() - time.time())
    return None


def _pause(error: _Again, attempt: int, most: float) -> float:
    """Seconds until the next attempt: what the server asked for, else doubling; some luck keeps requests apart."""
    luck = _luck.random()
    return (
        FIRST_WAIT_S * luck + error.wait if error.wait is not None else min(most, FIRST_WAIT_S * 2 ** (attempt - luck))
    )


_luck = random.Random()  # not the shared one: a caller's seeded run must not see that requests were repeated
