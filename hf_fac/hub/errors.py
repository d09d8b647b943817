"""Requests to the Hugging Face Hub that are retried where a retry can help, and refused in words that name the remedy.

In: a function that talks to the Hub, and a `HubRequest` that says what for. Out: what the function returned, or a
`HubError`, whose message never holds a token."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import tenacity
from huggingface_hub import HfApi, constants, errors, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError, RevisionResolutionError
from huggingface_hub.utils import parse_ratelimit_headers

logger = logging.getLogger(__name__)
T = TypeVar("T")

ATTEMPTS = 5
MAX_WAIT_S = 330.0  # the Hub's rate limits count in windows of five minutes
_TRANSIENT = (408, 409, 412, 429, 500, 502, 503, 504)
_CERTAINLY_NOT_DONE = (412, 429, 503)


class HubError(RuntimeError):
    """What was found, what was expected, what to do. `status` is the HTTP status, None when there was no answer."""

    def __init__(self, message: str, *, status: int | None = None):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class HubRequest:
    """What one or several calls to the Hub are for."""

    action: str  # "push to", "pull from", ...: completes "Cannot ... the model repo"
    repo_id: str
    repo_type: str
    revision: str | None
    token: str | bool | None
    create_pr: bool = False

    @property
    def api(self) -> HfApi:
        return HfApi(token=self.token, library_name="hf_fac")

    @property
    def repo(self) -> dict[str, str]:
        """The arguments that name the repo in every method of `HfApi`."""
        return {"repo_id": self.repo_id, "repo_type": self.repo_type}

    def error(self, problem: str, status: int | None = None) -> HubError:
        where = f"the {self.repo_type} repo {self.repo_id!r}" + (f" at {self.revision!r}" if self.revision else "")
        text = f"Cannot {self.action} {where}: {problem}"
        if token := _token_in_use(self):
            text = text.replace(token, "***")
        return HubError(re.sub(r"hf_[A-Za-z0-9]{20,}", "hf_***", text), status=status)


def with_retries(attempt: Callable[[], T], request: HubRequest) -> T:
    """Returns what `attempt` returns. Transient failures are retried up to `ATTEMPTS` times.

    The Hub's client retries most single requests, but not a commit. So `attempt` runs again as a whole, and must read
    again what it builds upon.

    Raises:
        HubError: the Hub refused, was not reached, or kept failing.
        OSError: the local disk failed.
    """
    backoff = tenacity.wait_random_exponential()

    def can_pass(error: BaseException) -> bool:
        status = _status(found := _http_error(error))
        if request.create_pr:  # if only the answer was lost, a retry would open a second pull request
            return status in _CERTAINLY_NOT_DONE
        return found is not None and (status is None or status in _TRANSIENT)

    def wait(state: tenacity.RetryCallState) -> float:
        stated = _stated_wait(_http_error(state.outcome.exception()))
        return backoff(state) if stated is None else stated

    def log(state: tenacity.RetryCallState) -> None:
        reason = _status(_http_error(state.outcome.exception())) or "no answer"
        logger.warning("%s %s: %s; retrying in %.1f s", request.action, request.repo_id, reason, state.upcoming_sleep)

    retry = tenacity.retry_if_exception(can_pass)
    stop = tenacity.stop_after_attempt(ATTEMPTS) | tenacity.stop_before_delay(MAX_WAIT_S)
    retrying = tenacity.Retrying(retry=retry, wait=wait, stop=stop, before_sleep=log, reraise=True)
    try:
        return retrying(attempt)
    except (HTTPError, RevisionResolutionError, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        # Without its cause: a server may echo a token in what it says.
        raise _in_words(error, request) from None


def _http_error(error: BaseException | None) -> HTTPError | None:
    """The HTTP error that an error of the client is or was caused by; it has no response if no answer came."""
    while error is not None and not isinstance(error, HTTPError):
        error = error.__cause__
    return error


def _status(error: HTTPError | None) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def _stated_wait(error: HTTPError | None) -> float | None:
    """The seconds that the Hub asks to wait for."""
    if _status(error) is None:
        return None
    limit = parse_ratelimit_headers(error.response.headers)
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    stated = error.response.headers.get("Retry-After", "")
    return float(stated) if stated.isdigit() else None


def _in_words(error: BaseException, request: HubRequest) -> HubError:
    found = _http_error(error)
    if (status := _status(found)) is not None:
        said = _one_line(found.server_message or str(found))
        return request.error(f"the Hub answered {status} ({said}). {_remedy(found, status, request)}", status)
    no_answer = errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled | RevisionResolutionError
    remedy = "Correct that, then try again."
    if found is not None or isinstance(error, no_answer):
        cache = "The cache has no complete copy either. " if request.action == "pull from" else ""
        remedy = f"{constants.ENDPOINT} was not reached. {cache}Check the network, HF_ENDPOINT and HF_HUB_OFFLINE."
    return request.error(f"{_one_line(str(found or error))}. {remedy}")


def _remedy(error: HTTPError, status: int, request: HubRequest) -> str:
    anonymous = _token_in_use(request) is None
    page = f"{constants.ENDPOINT}/{constants.REPO_TYPES_URL_PREFIXES.get(request.repo_type, '')}{request.repo_id}"
    right = "read this repo" if request.action == "pull from" else f"write to {request.repo_id.split('/')[0]!r}"
    login = f"a token that may {right} (from {constants.ENDPOINT}/settings/tokens; `hf auth login`, HF_TOKEN or token=)"
    match error:
        case errors.GatedRepoError():
            return f"It is gated: ask for access at {page} and use a token of the account that got it."
        case errors.RevisionNotFoundError():
            return f"There is no revision {request.revision!r}; {page} lists branches and tags."
        case errors.RemoteEntryNotFoundError():
            return f"There is no such file or folder; see {page}."
    if status == 404 or isinstance(error, errors.RepositoryNotFoundError) or (status == 401 and anonymous):
        return (
            f"It does not exist, is not a {request.repo_type} repo, or is private and "
            f"{'no' if anonymous else 'another'} token was given. Check the name, or use {login}."
        )
    if status >= 500:
        opened = f" Look at {page}/discussions first: the request may be open." if request.create_pr else ""
        return f"The Hub has trouble (https://status.huggingface.co). Nothing was half done: try again later.{opened}"
    return {
        401: f"The token is mistyped, expired or revoked. Use {login}.",
        403: f"The token is valid but may not do this. Use {login}: role 'write', or fine-grained with that right.",
        409: "Another change of the repo is under way, and this one was not made. Try again in a moment.",
        412: f"Someone else committed first, {ATTEMPTS} times, and this change was not made. Try again.",
        429: f"Too many requests. Try again in {_stated_wait(error) or 300:.0f} s; uploaded files are not sent again.",
    }.get(status, "Correct that, then try again.")


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300].rstrip(".")


def _token_in_use(request: HubRequest) -> str | None:
    return request.token if isinstance(request.token, str) else None if request.token is False else get_token()
