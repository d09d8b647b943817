"""One server that speaks chat completions: a request's body in, a checked reply or the reason for none out.

A request has a total time, and its reply a bound. The key goes to this address only: redirects are refused, and the
saved Hub token is for Hugging Face's own hosts.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from contextlib import suppress
from email.utils import parsedate_to_datetime
from functools import cache
from typing import TYPE_CHECKING

from .base import ChatError
from .wire import Reply, read_reply

if TYPE_CHECKING:
    from ssl import SSLContext

    from httpx2 import URL, AsyncClient, Response

_TOKEN_BYTES = 1024  # no token is longer, escaped in JSON
_REPLY_BYTES = 1 << 20  # room for all else in a reply
_RETRIED = (408, 409, 425, 429)  # and what is 500 or more
_THIS_REQUEST = (400, 413, 414, 415, 422)  # the server did not like what was asked; another request may do
_HF_HOSTS = (".huggingface.co", ".huggingface.cloud")
_ROUTER = "https://router.huggingface.co/v1"  # takes "model" and "model:provider"


class Transient(Exception):
    """It may pass. wait: seconds that the server asked for, or None."""

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.wait = wait


class TimedOut(Transient):
    """No whole answer in time."""


class Failed(Exception):
    """This request gets no answer."""


class Server:
    """One address and its key. `mask` and `clean` take the key out of whatever the server says."""

    def __init__(self, name: str, base_url: str | None, token: str | None, timeout: float, max_wait: float):
        from httpx2 import URL, InvalidURL

        try:
            url = URL(_ROUTER if base_url is None else base_url)
        except InvalidURL:
            raise ValueError("base_url is no address.") from None
        if url.scheme not in ("http", "https") or not url.host:
            raise ValueError("base_url must begin with http:// or https:// and name a host.")
        if url.userinfo or url.query or url.fragment:
            raise ValueError("base_url must hold no user, password or query: it is logged. A key is the token.")
        path = url.path.rstrip("/") or "/v1"
        self.url = url.copy_with(path=path if path.endswith("/chat/completions") else f"{path}/chat/completions")
        self.name, self.timeout, self.max_wait = name, timeout, max_wait
        self._key = _key(token, url)
        self._is_hub = base_url is None
        if self._is_hub and self._key and not self._key.startswith("hf_"):
            raise ValueError("A provider is reached through Hugging Face, with a token of the Hub. To use the "
                             "provider's own key give the provider's address as base_url.")  # fmt: skip

    def client(self) -> AsyncClient:
        from httpx2 import AsyncClient, Limits, Timeout

        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        # The caller bounds the number of requests, and `post` their time.
        settings = {"timeout": Timeout(None), "limits": Limits(), "verify": _tls()}
        return AsyncClient(headers=headers, follow_redirects=False, **settings)

    async def post(self, client: AsyncClient, body: bytes, max_tokens: int) -> Reply:
        """Raises: Transient, Failed or ChatError for whatever else comes."""
        from httpx2 import HTTPError, InvalidURL, LocalProtocolError, UnsupportedProtocol
        from huggingface_hub import constants

        if self._is_hub and constants.HF_HUB_OFFLINE:
            raise ChatError(f"{self.name}: HF_HUB_OFFLINE is set; unset it, or give the base_url of a server.")
        most = _REPLY_BYTES + _TOKEN_BYTES * max_tokens
        try:
            async with asyncio.timeout(self.timeout), client.stream("POST", self.url, content=body) as response:
                data = bytearray()
                async for part in response.aiter_bytes():
                    data += part
                    if len(data) > most:
                        raise Failed(f"The server's answer is larger than {most:,} bytes, more than max_tokens allows.")
        except TimeoutError:
            raise TimedOut(f"The server did not answer within {self.timeout:g} s") from None
        except (LocalProtocolError, UnsupportedProtocol, InvalidURL) as error:  # it never left this machine
            raise ChatError(f"{self.name}: the request cannot be sent ({self.clean(str(error))}).") from None
        except HTTPError as error:
            raise Transient(f"The connection broke ({type(error).__name__}: {self.clean(str(error))})") from None
        if not response.is_success:
            raise self._refusal(response, bytes(data))
        try:
            return read_reply(bytes(data))
        except ValueError as error:
            said = self.clean(data.decode(errors="replace")) or "nothing"
            reason = self.clean(str(error))
            raise Transient(f"The server's answer has the wrong shape ({reason}), it says: {said}") from None

    def _refusal(self, response: Response, data: bytes) -> Exception:
        status, said = response.status_code, self.clean(_message(data))
        if status in _RETRIED or status >= 500:
            wait, asks = _asked_to_wait(response.headers.get("Retry-After")), ""
            if wait is not None and wait > self.max_wait:
                asks = f" and asks to wait {wait:,.0f} s, longer than the {self.max_wait:,.0f} s of max_wait"
            return Transient(f"The server answered {status} ({said}){asks}", wait)
        if status in _THIS_REQUEST:
            return Failed(f"The server refused the request: {status} ({said}). Change the conversation or parameters.")
        if response.has_redirect_location:
            said = f"to {self.clean(response.headers['Location'])}"
        todo = {
            401: "The key is missing, mistyped or expired: give token=.",
            402: "The account has no credit left.",
            403: "The key may not use this model or server: use one that may.",
            404: "There is no such model, or no chat completions at that address: check model and base_url (.../v1).",
        }.get(status, "Check base_url, model and extra_body.")
        if response.has_redirect_location:
            todo = "Redirects are not followed: if you trust that address, give it as base_url."
        return ChatError(f"{self.name}: the server answered {status} ({said}). {todo}")

    def mask(self, text: str) -> str:
        if self._key:
            for form in (self._key, repr(self._key)[1:-1], json.dumps(self._key)[1:-1]):
                text = text.replace(form, "***")
        return text

    def clean(self, text: str) -> str:
        """One short line of printable characters, without keys."""
        text = re.sub(r"hf_[A-Za-z0-9]{20,}", "hf_***", self.mask(text))
        return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:300].rstrip(".")


@cache
def _tls() -> SSLContext:
    from httpx2 import create_ssl_context

    return create_ssl_context()  # reading all certificates takes 50 ms


def _key(token: str | None, url: URL) -> str | None:
    """The key for a server: the one given, or the saved Hub token where the server is Hugging Face's, encrypted."""
    from huggingface_hub import get_token

    key = (token or "").strip()
    if not key and url.scheme == "https" and f".{url.host}".endswith(_HF_HOSTS):
        key = get_token() or ""
    if not all("!" <= character <= "~" for character in key):
        raise ValueError(
            "The key holds a space, a control character or one that is not ASCII: copy it again, without what is "
            "around it."
        )
    return key or None


def _message(data: bytes) -> str:
    """What a refusal says, in one of the shapes that servers use."""
    with suppress(ValueError, TypeError, KeyError, RecursionError):
        error = json.loads(data)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    return data.decode(errors="replace")


def _asked_to_wait(stated: str | None) -> float | None:
    """Seconds from a Retry-After header: a number or a date."""
    if not stated:
        return None
    with suppress(ValueError):
        return max(0.0, float(stated))
    with suppress(ValueError):
        return max(0.0, parsedate_to_datetime(stated).timestamp() - time.time())
    return None
