"""Texts on their way to samples, and how a chat is asked for them: once, as what it answered is in the journal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from ..chat.local import NOT_ASKED
from .verification import Measured

if TYPE_CHECKING:
    from ..chat.local import Chat, Completion
    from ..steering.steered_chat import SteeredChat, UserTurn
    from ..storage.journal import Piece
    from ..tasks.task import Task

TOKENS = ("prompt_tokens", "completion_tokens")
_AT_ONCE = 64  # conversations put to the chat at once, and what a kill can cost


# Given the fewest texts of use, and whether rows are being finished: a context in which texts may be asked for,
# and how many. Raises `Stopped` when there is no room for so many.
Allow = Callable[[int, bool], AbstractContextManager[int]]


class Stopped(Exception):
    """A bound was reached: no request is sent any more. The reason is its message."""


@dataclass(frozen=True)
class Settings:
    """How texts are asked for: see `FACSynthesizer`."""

    task: Task
    ways: tuple[str, ...]
    samples_per_feature: int
    candidates: int
    rounds: int
    temperature: float
    max_tokens: int
    answer_tokens: int
    max_copied_words: int
    seed: int
    keep: Callable[[Mapping[str, Any]], bool] | None = None


class Request(NamedTuple):
    """n texts asked for with one conversation. asked: what goes into a sample's provenance."""

    key: str
    feature: int
    conversation: list[dict]
    begun: str | None
    asked: dict[str, Any]


@dataclass
class Candidate:
    """A text written for a feature, and what became of it.

    number: which of the request's answers. text: the carrier (`Task.carrier`), "" when the answer could not be read.
    row: the whole sample, once there is one. copied: the most consecutive words shared with what the prompt showed.
    refused: why it is no sample; None for one that is, that missed its feature, or that was not needed.
    """

    feature: int
    way: str
    request: str
    number: int
    text: str
    asked: dict[str, Any]
    row: dict[str, Any] | None = None
    measured: Measured | None = None
    copied: int = 0
    refused: str | None = None
    chosen: bool = False
    parts: dict[str, str] = field(default_factory=dict)
    attempts: int = 0

    def record(self) -> dict[str, Any]:
        activation, activates, _, _ = self.measured or Measured(0.0, [], None, None)
        return {
            "feature": self.feature, "way": self.way, "request": self.request, "number": self.number, "text": self.text,
            "asked": self.asked, "row": self.row if self.chosen else None, "activation": activation,
            "activates": activates, "copied": self.copied, "refused": self.refused, "chosen": self.chosen,
        }  # fmt: skip


class Asker:
    """Puts requests to a chat, or to the steered model, each answer journaled before the next request.

    Args:
        neutral: what writes without being told of a feature; None where nothing is steered.
        piece: where answers are kept.
        allow: see `Allow`.

    reserve: texts that are still needed to finish what was found. spare: as many again for each request that finds
    something. finishing: no search any more.
    stopped: why requests were left unasked, None where none were. left: why failed ones were not asked again.
    failures: texts that the chat did not write, and failure: why not the first of them.
    """

    def __init__(
        self,
        chat: Chat,
        neutral: UserTurn | None,
        piece: Piece,
        allow: Allow,
    ) -> None:
        self.chat, self.neutral, self.piece, self.allow = chat, neutral, piece, allow
        self.reserve, self.spare, self.finishing = 0, 0, False
        self.stopped: str | None = None
        self.left: str | None = None
        self.failures, self.failure = 0, ""

    def answers(
        self, requests: Sequence[Request], settings: dict[str, Any], *, steered: bool = False
    ) -> dict[str, list[tuple[str, str]]]:
        """Returns by key n texts and how each ended, "failed" where there is none: another run asks for those again.

        Requests that were left unasked are missing, and `stopped` says why.

        Args:
            settings: those of `Chat.complete`. steered: with the feature and strength of each request.
        """
        self.stopped = None
        known = [request for request in requests if request.key in self.piece]
        self._ask([request for request in requests if request.key not in self.piece], settings, steered)
        unasked = self.stopped
        for number in range(settings["n"]):
            again = [request for request in known if number not in self._answered(request.key)]
            self._ask(again, settings | {"n": 1, "seed": settings["seed"] + number}, steered, number)
        # What comes after a text that failed, and is in the journal, counts all the same.
        self.left, self.stopped = self.left or self.stopped, unasked
        found = {request.key: self._answered(request.key) for request in requests if request.key in self.piece}
        numbers = range(settings["n"])
        return {key: [texts.get(number, ("", "failed")) for number in numbers] for key, texts in found.items()}

    def _ask(self, waiting: Sequence[Request], settings: dict[str, Any], steered: bool, number: int = 0) -> None:
        """Ask for n texts, those from `number` on."""
        from ..chat.endpoint import ChatError

        each = settings["n"] + self.spare
        while waiting and self.stopped is None:
            try:
                with self.allow(each + self.reserve, self.finishing) as room:
                    batch = waiting[: min(_AT_ONCE, (room - self.reserve) // each)]
                    waiting = waiting[len(batch) :]
                    self._journal(batch, self._complete(batch, settings, steered), number)
                    self.reserve += self.spare * len(batch)
            except ChatError as error:
                self._journal(batch, error.completions, number)
                raise
            except Stopped as stop:
                self.stopped = str(stop)

    def _complete(
        self, batch: Sequence[Request], settings: dict[str, Any], steered: bool
    ) -> Sequence[Sequence[Completion]]:
        conversations, begun = [r.conversation for r in batch], [r.begun for r in batch]
        if not steered:
            return self.chat.complete(conversations, begun=begun, **settings)
        return self.neutral.steered.complete(
            conversations, begun=begun, features=[r.feature for r in batch],
            strengths=[r.asked["strength"] for r in batch], **settings,
        )  # fmt: skip

    def _journal(self, batch: Sequence[Request], found: Sequence[Sequence[Completion]], number: int) -> None:
        entries = []
        for request, answers in zip(batch, found, strict=False):
            asked = [(number + i, a) for i, a in enumerate(answers) if not (a.error or "").startswith(NOT_ASKED)]
            failed = [a.error for a in answers if a.finish == "failed"]
            self.failure = self.failure or (failed[0] or "it does not say why" if failed else "")
            self.failures += len(failed)
            if len(asked) < len(answers):
                self.stopped = f"the chat: {failed[-1]}"
            if asked:
                texts = [(i, a.text, a.finish) for i, a in asked if a.finish != "failed"]
                tokens = {name: sum(getattr(a, name) for _, a in asked) for name in TOKENS}
                entries.append((self._free_key(request.key), {"asked": len(asked), "answers": texts, **tokens}))
        self.piece.add(entries)

    def _answered(self, key: str) -> dict[int, tuple[str, str]]:
        """By number the texts of a request, in all entries that there are of it."""
        found, entry, times = {}, key, 0
        while entry in self.piece:
            found |= {number: (text, finish) for number, text, finish in self.piece[entry]["answers"]}
            times += 1
            entry = f"{key}+{times}"
        return found

    def _free_key(self, key: str) -> str:
        entry, times = key, 0
        while entry in self.piece:
            times += 1
            entry = f"{key}+{times}"
        return entry


def neutral_turn(task: Task, steered: SteeredChat) -> UserTurn:
    """Returns what writes a carrier of the task without being told of any feature."""
    from ..steering.steered_chat import UserTurn

    if not task.reads_answers:
        return steered.user_turn()
    request = f"Write {task.parts[task.carrier]}. Answer with that text alone."
    return UserTurn(steered, [{"role": "user", "content": request}], ())
