"""What writes text: conversations in, n completions each out.

`Chat` is the protocol; `local.LocalChat` has a model of transformers behind it, `endpoint.EndpointChat` a server.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol


class Completion(NamedTuple):
    """One answer.

    text: what was written, without the prefill and without a stop string; "" where nothing came.
    finish: "stop" for an end of its own or a stop string, "length" at max_tokens, "failed" where the request failed,
        "not_asked" where the chat takes no more requests; in the last two `error` says why.
    prompt_tokens, completion_tokens: as the model or server counts them, 0 where it does not say.
    """

    text: str
    finish: Literal["stop", "length", "failed", "not_asked"]
    error: str | None
    prompt_tokens: int
    completion_tokens: int


class ChatError(RuntimeError):
    """No request can succeed: what the server said and what to do.

    completions: as `complete` would have returned them, with all that was answered before; the rest failed.
    """

    def __init__(self, message: str):
        super().__init__(message)
        self.completions: list[list[Completion]] = []


class Chat(Protocol):
    """Anything that completes conversations."""

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
        """Returns n completions of each conversation, in order. What fails is a completion that says why.

        Args:
            conversations: lists of messages, each a dict with a role and a content.
            n: completions of each conversation. The same conversation twice gets the same answers twice: for others
                ask for more, or with another seed.
            temperature: 0 takes the likeliest token, and all n are the same.
            top_p: the share of probability that the likeliest tokens drawn from must reach.
            max_tokens: the most tokens of a completion.
            prefill: per conversation, how the assistant's turn begins; the completion continues it.
            stop: strings before which a completion ends.

        Raises: ValueError for an argument out of range or a conversation that cannot be read; it names which.
        """
        ...


def before_stop(text: str, stop: Sequence[str]) -> str:
    """Returns what stands before the first of the stop strings, or all."""
    return text[: min((at for string in stop if (at := text.find(string)) >= 0), default=None)]


def progress_bar(total: int) -> Any:
    """Returns a bar that shows itself after two seconds."""
    from tqdm.auto import tqdm

    return tqdm(total=total, unit="completion", delay=2, leave=False)


def check_arguments(
    conversations: Sequence[list[dict]],
    n: int,
    temperature: float,
    top_p: float,
    max_tokens: int,
    prefill: Sequence[str | None] | None,
    stop: Sequence[str],
) -> list[str | None]:
    """Returns `prefill`, one for each conversation. Raises: ValueError naming what is wrong and where."""
    if isinstance(stop, str) or not all(stop):
        raise ValueError(f"stop is {stop!r}; it must be a list of strings, none of them empty.")
    for name, value, right, rule in (
        ("n", n, n >= 1, "at least 1"),
        ("temperature", temperature, 0 <= temperature < float("inf"), "at least 0"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1"),
        ("max_tokens", max_tokens, max_tokens >= 1, "at least 1"),
    ):
        if not right:
            raise ValueError(f"{name} is {value}; it must be {rule}.")
    if prefill is not None and (isinstance(prefill, str) or len(prefill) != len(conversations)):
        raise ValueError(
            f"prefill has {len(prefill)} entries for {len(conversations)} conversations; give each one or None."
        )
    for index, messages in enumerate(conversations):
        if not isinstance(messages, list) or not messages:
            raise ValueError(f"Conversation {index} is {messages!r:.100}; it must be a list of messages, not empty.")
        for message in messages:
            if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
                raise ValueError(
                    f"Conversation {index} has the message {message!r:.100}; it must be a dict with role and content."
                )
            if not isinstance(message["content"], str):
                raise ValueError(f"Conversation {index} has a content that is no text: {message['content']!r:.100}.")
    return list(prefill or [None] * len(conversations))
