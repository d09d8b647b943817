"""Many questions to a chat model, each until its answer can be read, and none twice.

In: questions with a reader of their answers. Out: by key what was read, or the reason why nothing was. Every answer is
in a journal on disk before more are asked for, so that a stopped run goes on where it was.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..storage.differences import differences
from ..storage.journal import put_lines, whole_lines
from ..tasks.parsing import Answer

if TYPE_CHECKING:
    from ..chat.base import Chat, Completion
    from ..tasks.prompts import Message

_AGAIN = 0.7  # temperature of the second attempt and on: at 0 the same answer would come back
_JOURNAL = "hf_fac journal 1"


@dataclass(frozen=True)
class Question:
    """key: what it is filed under. read: gives the value in an answer's text, or the reason why there is none."""

    key: str
    conversation: list[Message]
    read: Callable[[str], Answer]


class Journal:
    """Answers in a JSONL file, its first line the settings that they were given under; without a path in memory only.

    Raises: ValueError for a file with other settings, or that is no journal. Half a last line, as a kill leaves it, is
        taken off.
    """

    def __init__(self, path: str | os.PathLike[str] | None, settings: dict[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self._answers: dict[str, list[dict[str, Any]]] = {}
        self.settings = json.loads(json.dumps(settings))
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self._read()
        if not self.path.exists() or not self.path.stat().st_size:
            self._append([{"journal": _JOURNAL, "settings": self.settings}])

    def _read(self) -> None:
        begun = b'{"journal"'
        with self.path.open("rb") as file:
            found = file.read(len(begun))
        if found != begun[: len(found)]:
            raise ValueError(f"{self.path} is no journal: choose another file.")
        if lines := whole_lines(self.path, mend=True):
            self._read_lines(lines)

    def _read_lines(self, lines: list[bytes]) -> None:
        try:
            first, *entries = map(json.loads, lines)
            if first["journal"] != _JOURNAL:
                raise ValueError(f"expected {_JOURNAL!r}, found {first['journal']!r:.80}")
            found = first["settings"]
            for entry in entries:
                self._answers.setdefault(entry["key"], []).append(entry)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} is no journal: choose another file ({error!r}).") from error
        if values := differences(found, self.settings):
            raise ValueError(f"{self.path} holds answers given under other settings ({values}): choose another file.")

    def answers(self, question: Question) -> list[dict[str, Any]]:
        """What was answered to a question, by attempt. Raises: ValueError where something else was asked then."""
        found = self._answers.get(question.key, [])
        if any(entry["asked"] != _digest(question) for entry in found):
            raise ValueError(
                f"{self.path} holds an answer to another question under {question.key!r}: it belongs to another "
                "dictionary, or its spans have changed. Choose another file."
            )
        return found

    def add(self, answered: Sequence[tuple[Question, Completion]]) -> None:
        entries = [
            {"key": question.key, "asked": _digest(question), "text": answer.text, "finish": answer.finish}
            for question, answer in answered
        ]
        if self.path is not None:
            self._append(entries)
        for entry in entries:
            self._answers.setdefault(entry["key"], []).append(entry)

    def _append(self, entries: list[dict[str, Any]]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            put_lines(file, [json.dumps(entry) for entry in entries])


def ask(
    chat: Chat,
    questions: Sequence[Question],
    *,
    journal: Journal,
    seed: int,
    max_tokens: int,
    attempts: int = 3,
    batch_size: int = 64,
    stop: Sequence[str] = (),
    may_be_cut: bool = False,
) -> dict[str, Answer]:
    """By key, in the order of the questions: what was read, or the reason why nothing was.

    An answer that cannot be read is asked for again, with another seed, `attempts` times in all. Where the chat failed
    to answer nothing is journaled, so that another run asks again. The first attempt is at temperature 0.

    Args:
        batch_size: questions put to the chat at once, and what a kill can cost.
        may_be_cut: read answers that end at max_tokens, too.

    Raises: ValueError, see `Journal`; ChatError when the chat cannot answer anything, with what it had answered kept.
    """
    from tqdm.auto import tqdm

    read: dict[str, Answer] = {}
    waiting = list(questions)
    with tqdm(total=len(waiting), unit="answer", delay=2, leave=False) as bar:
        for attempt in range(attempts):
            known = {q.key: len(journal.answers(q)) for q in waiting}
            open_ = [q for q in waiting if known[q.key] <= attempt]
            for start in range(0, len(open_), batch_size):
                batch = open_[start : start + batch_size]
                settings = {"temperature": _AGAIN if attempt else 0.0, "seed": seed + attempt, "stop": stop}
                read |= _complete(chat, batch, journal, max_tokens=max_tokens, **settings)
            for question in waiting:
                if question.key not in read:
                    entry = journal.answers(question)[attempt]
                    answer = question.read(entry["text"])
                    if entry["finish"] == "length" and not may_be_cut:
                        answer = Answer(None, f"it was cut off after {max_tokens} tokens: {entry['text'][:80]!a}")
                    if answer.reason is None or attempt == attempts - 1:
                        read[question.key] = answer
            waiting = [q for q in waiting if q.key not in read]
            bar.update(len(read) - bar.n)
    return {question.key: read[question.key] for question in questions}


def _complete(chat: Chat, batch: list[Question], journal: Journal, **settings: Any) -> dict[str, Answer]:
    """Puts the answers into the journal; what could not be answered is returned."""
    from ..chat.base import ChatError

    try:
        completions = chat.complete([question.conversation for question in batch], **settings)
    except ChatError as error:
        journal.add([(q, c[0]) for q, c in zip(batch, error.completions, strict=False) if c[0].finish != "failed"])
        raise
    answered = [(question, choices[0]) for question, choices in zip(batch, completions, strict=True)]
    journal.add([(question, answer) for question, answer in answered if answer.finish != "failed"])
    return {
        question.key: Answer(None, f"the chat failed: {answer.error}")
        for question, answer in answered
        if answer.finish == "failed"
    }


def _digest(question: Question) -> str:
    import xxhash

    return xxhash.xxh3_64_hexdigest(json.dumps(question.conversation, sort_keys=True).encode())
