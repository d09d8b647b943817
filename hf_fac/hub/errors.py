"""Asking the Hub with patience, and saying in plain words what it refused. In: a function that talks to the Hub, and
what it is for; out: what it returned, after a few attempts where repeating helps, or a `HubError`. Messages never hold
a token."""

from __future__ import annotations

import logging
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from tenacity import RetryCallState

logger = logging.getLogger(__name__)
T = TypeVar("T")

ATTEMPTS = 5
FIRST_WAIT_S = 1.0
PATIENCE_S = 330.0  # the Hub's rate limits count in windows of five minutes
_WORTH_REPEATING = (408, 409, 412, 429, 500, 502, 503, 504)
_SURELY_NOT_DONE = (412, 429, 503)


class HubError(RuntimeError):
    """What was found, what was expected, what to do. `status` is the HTTP status, None when there was none."""

    def __init__(self, message: str, *, status: int | None = None):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Goal:
    """What a conversation with the Hub is for; `repo` are the arguments that name the repo in every call."""

    doing: str  # "push to", "pull from", ...: completes "Cannot ... the model repo"
    repo_id: str
    repo_type: str
    revision: str | None
    token: str | bool | None
    create_pr: bool = False

    @property
    def repo(self) -> dict[str, str]:
        return {"repo_id": self.repo_id, "repo_type": self.repo_type}

    def error(self, problem: str, status: int | None = None) -> HubError:
        where = f"the {self.repo_type} repo {self.repo_id!r}" + (f" at {self.revision!r}" if self.revision else "")
        text = f"Cannot {self.doing} {where}: {problem}"
        if secret := _token_in_use(self.token):
            text = text.replace(secret, "***")
        return HubError(re.sub(r"hf_[A-Za-z0-9]{20,}", "hf_***", text), status=status)


def patiently(attempt: Callable[[], T], goal: Goal) -> T:
    """What the attempt returns. The client repeats most requests by itself, but neither a commit nor the questions
    before it; so the attempt is repeated as a whole, and must read again what it builds upon.

    Raises:
        HubError: the Hub's refusal in words, or the attempt's own.
        OSError: the local disk's.
    """
    from huggingface_hub.errors import EntryNotFoundError, HTTPError, RevisionResolutionError
    from tenacity import Retrying, stop_after_attempt, stop_before_delay

    def worth_repeating(state: RetryCallState) -> bool:
        root = _root(state)
        if (status := _status(root)) is None:
            return isinstance(root, HTTPError) and not goal.create_pr  # the connection broke
        # Where the answer may only have got lost, a second attempt would open a second pull request.
        return status in (_SURELY_NOT_DONE if goal.create_pr else _WORTH_REPEATING)

    def wait(state: RetryCallState) -> float:
        root = _root(state)
        if (asked := _asked_to_wait(root)) is not None:
            return asked
        return random.random() / 2 if _status(root) == 412 else FIRST_WAIT_S * 2 ** (state.attempt_number - 1)

    def tell(state: RetryCallState) -> None:
        reason = _status(_root(state)) or "no answer"
        logger.warning("%s %s: %s; again in %.1f s", goal.doing, goal.repo_id, reason, state.upcoming_sleep)

    stop = stop_after_attempt(ATTEMPTS) | stop_before_delay(PATIENCE_S)
    try:
        return Retrying(retry=worth_repeating, wait=wait, stop=stop, before_sleep=tell, reraise=True)(attempt)
    except (HTTPError, EntryNotFoundError, RevisionResolutionError, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        # Without its cause: a server may echo a token in what it says.
        raise _explained(_root(error), goal) from None


def _root(error: BaseException | RetryCallState | None) -> BaseException | None:
    from huggingface_hub.errors import HTTPError
    from tenacity import RetryCallState

    if isinstance(error, RetryCallState):
        error = error.outcome.exception() if error.outcome else None
    while error is not None and error.__cause__ is not None and not isinstance(error, HTTPError):
        error = error.__cause__
    return error


def _status(root: BaseException | None) -> int | None:
    from huggingface_hub.errors import HfHubHTTPError

    return root.response.status_code if isinstance(root, HfHubHTTPError) else None


def _asked_to_wait(root: BaseException | None) -> float | None:
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import parse_ratelimit_headers

    if not isinstance(root, HfHubHTTPError):
        return None
    limit = parse_ratelimit_headers(root.response.headers)
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    stated = root.response.headers.get("Retry-After", "")
    try:
        return float(stated) if stated.isdigit() else max(0.0, parsedate_to_datetime(stated).timestamp() - time.time())
    except ValueError:
        return None


def _explained(root: BaseException | None, goal: Goal) -> HubError:
    from huggingface_hub import constants, errors

    status, anonymous = _status(root), _token_in_use(goal.token) is None
    page = f"{constants.ENDPOINT}/{constants.REPO_TYPES_URL_PREFIXES.get(goal.repo_type, '')}{goal.repo_id}"
    right = "read this repo" if goal.doing == "pull from" else f"write to {goal.repo_id.split('/')[0]!r}"
    login = f"a token that may {right} (from {constants.ENDPOINT}/settings/tokens; `hf auth login`, HF_TOKEN or token=)"
    if isinstance(root, errors.GatedRepoError):
        todo = f"It is gated: ask for access at {page} and use a token of the account that got it."
    elif isinstance(root, errors.RevisionNotFoundError):
        todo = f"There is no revision {goal.revision!r}; {_revisions(goal)}."
    elif isinstance(root, errors.RemoteEntryNotFoundError):
        todo = f"There is no such file or folder; see {page}."
    elif status == 404 or isinstance(root, errors.RepositoryNotFoundError) or (status == 401 and anonymous):
        todo = f"It does not exist, or is private and {'no' if anonymous else 'another'} token was given. "
        todo += f"{_other_kind(goal)}Check the name and repo_type, or use {login}."
    elif status == 401:
        todo = f"The token is mistyped, expired or revoked. Use {login}."
    elif status == 403:
        todo = f"The token is valid but may not do this. Use {login}: role 'write', or fine-grained with that right."
    elif status == 409:
        todo = "Another change of the repo is under way, and this one was not made. Repeat it in a moment."
    elif status == 412:
        todo = f"Someone else committed first, {ATTEMPTS} times, and this change was not made. Repeat it."
    elif status == 429:
        todo = f"Too many requests. Repeat in {_asked_to_wait(root) or 300:.0f} s; uploaded files are not sent again."
    elif status is not None and status >= 500:
        todo = "The Hub has trouble (https://status.huggingface.co). Nothing is there half: repeat it later."
        todo += f" Look at {page}/discussions first: the request may have been opened." if goal.create_pr else ""
    elif (
        isinstance(root, errors.HTTPError | errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError) and not status
    ):
        todo = "The cache has no complete copy either. " if goal.doing == "pull from" else ""
        todo = f"{constants.ENDPOINT} was not reached. {todo}Check the network, HF_ENDPOINT and HF_HUB_OFFLINE."
    else:
        todo = "Correct that, then repeat."
    said = (isinstance(root, errors.HfHubHTTPError) and root.server_message) or str(root)
    said = " ".join(said.split())[:300].rstrip(".")
    return goal.error(f"the Hub answered {status} ({said}). {todo}" if status else f"{said}. {todo}", status)


def _revisions(goal: Goal) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    try:
        refs = HfApi(token=goal.token).list_repo_refs(**goal.repo)
    except (HTTPError, OSError):
        return "its branches cannot be listed"
    return "there are: " + ", ".join(ref.name for ref in (*refs.branches, *refs.tags))


def _other_kind(goal: Goal) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    for kind in {"model", "dataset", "space"} - {goal.repo_type}:
        try:
            if HfApi(token=goal.token).repo_exists(goal.repo_id, repo_type=kind):
                return f"There is a {kind} of that name: did you mean repo_type={kind!r}? "
        except (HTTPError, OSError):
            continue
    return ""


def _token_in_use(token: str | bool | None) -> str | None:
    from huggingface_hub import get_token

    return token if isinstance(token, str) else None if token is False else get_token()
