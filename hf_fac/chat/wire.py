"""A request for one chat completion as bytes, and the reply to it as a `Completion`. Nothing is sent here."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from .base import Completion, before_stop

_TOKEN_CHARACTERS = 256  # no token is longer
_UNBOUNDED_TOKENS = 100_000  # more than a server's own prompt, or thinking that max_tokens does not bound, can have


@dataclass(frozen=True)
class Request:
    """What is asked; `key` stands for everything that shapes the answer, the number of the completion among it."""

    key: str
    messages: list[dict]
    prefill: str | None
    temperature: float
    top_p: float
    max_tokens: int
    stop: list[str]
    seed: int

    def body(self, model: str | None, *, continue_final_message: bool, extra: dict[str, Any]) -> bytes:
        """Raises: UnicodeEncodeError for half a surrogate pair."""
        body: dict[str, Any] = {
            "model": model or "dummy",  # servers of one model ignore it, but want one
            "messages": list(self.messages),
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
        }
        if self.top_p < 1:  # TGI refuses 1, which is the default elsewhere
            body["top_p"] = self.top_p
        if self.stop:
            body["stop"] = self.stop
        body |= extra
        if self.prefill:
            body["messages"] = [*body["messages"], {"role": "assistant", "content": self.prefill}]
            if continue_final_message:
                body |= {"continue_final_message": True, "add_generation_prompt": False}
        return json.dumps(body, ensure_ascii=False).encode()


class _Message(BaseModel):
    content: str | None = None
    refusal: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class Reply(BaseModel):
    """What is read of a reply; the rest is not looked at."""

    choices: list[_Choice] = Field(min_length=1)
    usage: Any = None


def read_reply(data: bytes) -> Reply:
    """Raises: ValueError that says where the reply has the wrong shape."""
    try:
        return Reply.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise ValueError(f"{'.'.join(map(str, first['loc'])) or 'it'}: {first['msg']}") from None


def completion(
    reply: Reply, request: Request, *, removes_prefill: bool, mask: Callable[[str], str], clean: Callable[[str], str]
) -> tuple[Completion, int, int]:
    """Returns the answer, or why there is none, and the prompt and completion tokens to count for it: the server's
    figures, or a quarter of the characters where it gives none or one that cannot be.

    mask, clean: applied to the answer's text, and to what else the server says.
    """
    message, finish_reason = reply.choices[0].message, reply.choices[0].finish_reason
    content = mask(message.content or "")
    prompt = "".join(one["content"] for one in request.messages)
    prompt_tokens = _stated(reply.usage, "prompt_tokens", len(prompt.encode()) + _UNBOUNDED_TOKENS)
    completion_tokens = _stated(reply.usage, "completion_tokens", request.max_tokens + _UNBOUNDED_TOKENS)
    error = None
    if message.refusal:
        error = f"The model refused: {clean(message.refusal)}"
    elif finish_reason == "content_filter":
        error = "The server's content filter withheld the answer."
    elif not content:
        error = f"The answer has no text (finish_reason {clean(repr(finish_reason))})."
        if finish_reason == "length":
            error += " All tokens went elsewhere, into thinking perhaps: raise max_tokens."
    elif len(content) > _TOKEN_CHARACTERS * request.max_tokens:
        error = f"The answer has {len(content):,} characters, more than max_tokens={request.max_tokens} can hold."
    text = content.removeprefix(request.prefill) if request.prefill and removes_prefill else content
    finish = "failed" if error else "length" if finish_reason == "length" else "stop"
    answer = Completion(
        "" if error else before_stop(text, request.stop), finish, error, prompt_tokens, completion_tokens
    )
    return answer, prompt_tokens or len(prompt) // 4, completion_tokens or len(content) // 4


def _stated(usage: Any, name: str, most: int) -> int:
    """The server's count of tokens, 0 where it does not say or says what cannot be."""
    count = usage.get(name) if isinstance(usage, dict) else None
    return count if type(count) is int and 0 <= count <= most else 0
