"""Ask a chat model many questions, each until its answer can be read, and none twice.

In: questions, each with a function that reads its answer. Out: for each an `Answer`. Completions are cached, so a
stopped run that starts again asks only what was not answered yet.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from ..chat.base import ChatError, Completion, keeping_answers
from ..chat.identity import chat_identity
from ..storage.cache import Cache, content_key
from ..tasks.parsing import Answer

if TYPE_CHECKING:
    from ..chat.base import Chat
    from ..tasks.prompts import Message
    from .questions import PromptFormat

_RETRY_TEMPERATURE = 0.7  # at 0 the same answer would come back
_TOKENS = 200


@dataclass(frozen=True)
class Question:
    """A conversation, and the function that reads the text of its answer."""

    conversation: list[Message]
    read: Callable[[str], Answer]


class CachedChat:
    """Asks a chat questions and keeps its answers.

    Args:
        cache_dir: the folder for the answers (`storage.cache.Cache`); None keeps them in memory.
        seed: of the first attempt; each retry takes the next one.
        attempts: how often a question is asked until its answer can be read.
        batch_size: questions in one call of the chat. A kill loses the answers of one batch; with an `EndpointChat`,
            only those of open requests.
    """

    def __init__(
        self, chat: Chat, cache_dir: str | os.PathLike[str] | None, *, seed: int, attempts: int, batch_size: int
    ) -> None:
        self.cache = Cache(cache_dir)
        self.chat = keeping_answers(chat, self.cache)
        self.identity = chat_identity(chat, self.cache)
        self.seed, self.attempts, self.batch_size = seed, attempts, batch_size

    def ask(
        self,
        questions: Sequence[Question],
        *,
        max_tokens: int,
        stop: Sequence[str] = (),
        accept_truncated: bool = False,
    ) -> list[Answer]:
        """Returns for each question what was read, or the reason why nothing was.

        The first attempt is at temperature 0. A failed request is not retried here and not cached: the next run asks
        again.

        Args:
            accept_truncated: read answers that end at max_tokens, too.

        Raises: ChatError when the chat cannot answer anything; what it had answered is cached.
        """
        answers: dict[int, Answer] = {}
        waiting = list(range(len(questions)))
        with tqdm(total=len(questions), unit="answer", delay=2, leave=False) as bar:
            for attempt in range(self.attempts):
                settings = {
                    "temperature": _RETRY_TEMPERATURE if attempt else 0.0, "seed": self.seed + attempt,
                    "max_tokens": max_tokens, "stop": list(stop),
                }  # fmt: skip
                unread = []
                for start in range(0, len(waiting), self.batch_size):
                    batch = waiting[start : start + self.batch_size]
                    completions = self._complete([questions[place].conversation for place in batch], settings)
                    for place, completion in zip(batch, completions, strict=True):
                        answers[place] = _read(questions[place], completion, accept_truncated)
                        if answers[place].reason is not None and _was_answered(completion):
                            unread.append(place)
                        else:
                            bar.update()
                waiting = unread
        return [answers[place] for place in range(len(questions))]

    def ask_by_feature(
        self,
        conversations: Mapping[int, list[Message]],
        read: Callable[[str, PromptFormat], Answer],
        prompt_format: PromptFormat,
    ) -> dict[int, Answer]:
        """Returns the answers to one question for each feature, whose prompts and answers are in `prompt_format`."""
        questions = [Question(asked, lambda text: read(text, prompt_format)) for asked in conversations.values()]
        # In "text" an answer is one line.
        answers = self.ask(questions, max_tokens=_TOKENS, stop=("\n",) if prompt_format == "text" else ())
        return dict(zip(conversations, answers, strict=True))

    def _complete(self, conversations: Sequence[list[Message]], settings: dict[str, Any]) -> list[Completion]:
        keys = [content_key("question", self.identity, conversation, settings) for conversation in conversations]
        found = {key: Completion(*values) for key, values in self.cache.get(keys).items()}
        missing = {key: asked for key, asked in zip(keys, conversations, strict=True) if key not in found}
        if missing:
            try:
                written = self.chat.complete(list(missing.values()), **settings)
            except ChatError as error:
                self._keep(missing, error.completions)
                raise
            found |= self._keep(missing, written)
        return [found[key] for key in keys]

    def _keep(self, keys: Iterable[str], written: Sequence[list[Completion]]) -> dict[str, Completion]:
        completions = {key: choices[0] for key, choices in zip(keys, written, strict=False)}
        self.cache.put({key: list(completion) for key, completion in completions.items() if _was_answered(completion)})
        return completions


def _read(question: Question, completion: Completion, accept_truncated: bool) -> Answer:
    if not _was_answered(completion):
        return Answer(None, f"the chat failed: {completion.error}")
    if completion.finish == "length" and not accept_truncated:
        return Answer(None, f"it was cut off after {completion.completion_tokens} tokens: {completion.text[:80]!a}")
    return question.read(completion.text)


def _was_answered(completion: Completion) -> bool:
    return completion.finish in ("stop", "length")
