"""Texts on their way to samples, and how a chat is asked for them: once, as what it answered is in the journal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from .gauge import Measured

if TYPE_CHECKING:
    from .chat import Chat, Completion
    from .journal import Piece
    from .steering import SteeredChat, UserTurn
    from .tasks import Task

_AT_ONCE = 64  # conversations put to the chat at once, and what a kill can cost


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
    picked: bool = False
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
        piece: where answers are kept. allow: called before texts are asked for with their number, `reserve` included,
            and whether rows are being finished; raises `Stopped`.

    reserve: texts that are still needed to finish what was found. finishing: no search any more.
    """

    def __init__(self, chat: Chat, neutral: UserTurn | None, piece: Piece, allow: Callable[[int, bool], None]) -> None:
        self.chat, self.neutral, self.piece, self.allow = chat, neutral, piece, allow
        self.reserve, self.finishing = 0, False

    def answers(
        self, requests: Sequence[Request], settings: dict[str, Any], *, steered: bool = False
    ) -> dict[str, list[tuple[str, str]]]:
        """Returns by key the texts and how each ended; those that failed are asked for again by another run.

        Args:
            settings: those of `Chat.complete`. steered: with the feature and strength of each request.
        """
        from .endpoint import ChatError

        waiting = [request for request in requests if request.key not in self.piece]
        failed: dict[str, list[tuple[str, str]]] = {}
        for start in range(0, len(waiting), _AT_ONCE):
            batch = waiting[start : start + _AT_ONCE]
            self.allow(len(batch) * settings["n"] + self.reserve, self.finishing)
            begun = [request.begun for request in batch]
            chat: Any = self.chat
            more = {}
            if steered:
                chat = self.neutral.steered
                more["features"] = [request.feature for request in batch]
                more["strengths"] = [request.asked["strength"] for request in batch]
            try:
                found = chat.complete([r.conversation for r in batch], begun=begun, **settings, **more)
            except ChatError as error:
                self._journal(batch, error.completions)
                raise
            failed |= self._journal(batch, found)
        return failed | {
            r.key: [tuple(a) for a in self.piece[r.key]["answers"]] for r in requests if r.key in self.piece
        }

    def _journal(self, batch: Sequence[Request], found: Sequence[Sequence[Completion]]) -> dict[str, list]:
        whole = [
            (r, answers)
            for r, answers in zip(batch, found, strict=False)
            if answers and not any(a.finish == "failed" for a in answers)
        ]
        self.piece.add(
            (
                r.key,
                {
                    "answers": [(a.text, a.finish) for a in answers],
                    "prompt_tokens": sum(a.prompt_tokens for a in answers),
                    "completion_tokens": sum(a.completion_tokens for a in answers),
                },
            )
            for r, answers in whole
        )
        return {r.key: [(a.text, a.finish) for a in answers] for r, answers in zip(batch, found, strict=False)}


def neutral_turn(task: Task, steered: SteeredChat) -> UserTurn:
    """Returns what writes a carrier of the task without being told of any feature."""
    from .steering import UserTurn

    if not task.reads_answers:
        return steered.user_turn()
    request = f"Write {task.parts[task.carrier]}. Answer with that text alone."
    return UserTurn(steered, [{"role": "user", "content": request}], ())
