"""Explanations: a chat model says what a feature's strongest spans share, judges that in a second question, and must
then tell spans that activate the feature from others by the explanation alone.

In: a `FeatureDictionary` with spans, and a `Chat`. Out: the dictionary with explanation, verification and detection.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..chat.identity import chat_name
from ..inputs.token_context import MarkedSpan
from ..storage.terminal import visible
from .asking import CachedChat, Question
from .questions import (
    CANNOT_TELL,
    PROMPT_VERSION,
    PromptFormat,
    ask_detection,
    ask_explanation,
    ask_verification,
    read_detection,
    read_explanation,
    read_rating,
    stop_strings,
)
from .schema import FAILED

if TYPE_CHECKING:
    from ..chat.base import Chat
    from ..tasks.parsing import Answer
    from .dictionary import FeatureDictionary

_FEWEST = 2  # answers about each kind of span, below which there is no detection score
_DRAWS = 100  # for each span of another feature
_TOKENS, _DETECTION_TOKENS = 200, 8


class Detection(NamedTuple):
    """How well spans are told by an explanation.

    score: balanced accuracy, 0.5 is chance; None with fewer than 2 answers on either kind of span.
    answers: how many could be read.
    """

    score: float | None
    answers: int


def explain(
    dictionary: FeatureDictionary,
    chat: Chat,
    *,
    features: Iterable[int] | None = None,
    spans: int = 10,
    held_out: int = 5,
    prompt_format: PromptFormat = "json",
    seed: int = 0,
    cache_dir: str | os.PathLike[str] | None = None,
    attempts: int = 3,
    batch_size: int = 64,
) -> FeatureDictionary:
    """Returns the dictionary with new explanations of the features; ratings for the old explanations are removed.

    The explanation is drawn from every other span, the strongest first, at most `spans` of them; the verification
    shows all of these and those between, which are also what detection is measured on. So a dictionary with 20 spans is
    explained from 10, as in arXiv 2602.10388, and one with 10 from 5. See `detect` for the detection score.

    Args:
        features: ids; None is all that have spans.
        held_out: the most spans kept for the detection score; 0 keeps none, measures none, and explains from the top.
        prompt_format: "json", or "text" for a chat model too small to write JSON.
        cache_dir: a folder for the chat's answers. What it holds is not asked again; other questions are added to it.
        attempts: how often an answer that cannot be read is asked for; then explanation or verification is "failed".
        batch_size: questions put to the chat at once, and what a kill can cost.

    Raises: KeyError for a feature that is not there; ChatError when the chat cannot answer anything. Warns
        (UserWarning) of how many failed, and why the first did.
    """
    asked = CachedChat(chat, cache_dir, seed=seed, attempts=attempts, batch_size=batch_size)
    most = 2 * spans if held_out else spans
    seen = {i: part[:most] for i in features_to_ask(dictionary, features) if (part := dictionary.spans(i))}
    shown = {i: part[::2] if held_out else part for i, part in seen.items()}
    explanations = _explanations(asked, shown, prompt_format)
    texts = {i: answer.value for i, answer in explanations.items() if answer.value not in (None, CANNOT_TELL)}
    verifications = _verifications(asked, texts, seen, prompt_format)
    kept = {i: dictionary.spans(i)[1::2][:held_out] for i in texts} if held_out else {}
    detections = _detections(asked, dictionary, texts, kept)
    how = {"chat": chat_name(chat), "prompt_version": PROMPT_VERSION, "prompt_format": prompt_format, "seed": seed}
    how |= {"spans": spans, "held_out": held_out}
    return dictionary.updated(
        {
            i: _columns(explanations[i], verifications.get(i), detections.get(i))
            | {"settings": with_settings(dictionary[i]["settings"], explain=how, rate=None)}
            for i in seen
        }
    )


def detect(
    dictionary: FeatureDictionary,
    chat: Chat,
    *,
    features: Iterable[int] | None = None,
    held_out: int = 5,
    shuffled: bool = False,
    seed: int = 0,
    cache_dir: str | os.PathLike[str] | None = None,
    attempts: int = 3,
    batch_size: int = 64,
) -> dict[int, Detection]:
    """Returns how well the chat model tells spans by the explanation alone, for each explained feature asked for.

    It sees one span at a time, without marks: up to `held_out` spans that the explanation was not drawn from (the 2nd,
    4th ... strongest), and as many spans of other features, drawn at random from rows that are not among the feature's
    own spans. These are not known to leave the feature inactive: of a feature active in a share p of the rows about
    that share of them may activate it, so the score errs on the low side by up to p / 2.

    Args:
        shuffled: give each feature the explanation of another, as a baseline: the score of explanations that say
            nothing about their feature.
        others: as in `explain`.

    Raises: as `explain`; ValueError when there are no two explanations to shuffle.
    """
    rows = {i: dictionary[i] for i in features_to_ask(dictionary, features)}
    texts = {i: row["explanation"] for i, row in rows.items() if row["explanation"] is not None}
    if shuffled:
        if len(texts) < 2:
            raise ValueError(f"{len(texts)} of the features are explained: to shuffle explanations takes two or more.")
        order = np.random.default_rng(seed).permutation(list(texts)).tolist()
        texts = {i: texts[other] for i, other in zip(order, [*order[1:], *order[:1]], strict=True)}
    kept = {i: _not_shown(rows[i], dictionary.spans(i))[:held_out] for i in texts}
    asked = CachedChat(chat, cache_dir, seed=seed, attempts=attempts, batch_size=batch_size)
    return _detections(asked, dictionary, texts, kept)


def _explanations(
    chat: CachedChat, shown: Mapping[int, list[MarkedSpan]], prompt_format: PromptFormat
) -> dict[int, Answer]:
    questions = [
        Question(ask_explanation(spans, prompt_format), lambda text: read_explanation(text, prompt_format))
        for spans in shown.values()
    ]
    answers = chat.ask(questions, max_tokens=_TOKENS, stop=stop_strings(prompt_format))
    _warn_of_failed("explanations", shown, answers)
    return dict(zip(shown, answers, strict=True))


def _verifications(
    chat: CachedChat, texts: Mapping[int, str], seen: Mapping[int, list[MarkedSpan]], prompt_format: PromptFormat
) -> dict[int, Answer]:
    questions = [
        Question(ask_verification(text, seen[i], prompt_format), lambda answer: read_rating(answer, prompt_format))
        for i, text in texts.items()
    ]
    answers = chat.ask(questions, max_tokens=_TOKENS, stop=stop_strings(prompt_format))
    _warn_of_failed("verifications", texts, answers)
    return dict(zip(texts, answers, strict=True))


def _detections(
    chat: CachedChat, dictionary: FeatureDictionary, texts: Mapping[int, str], kept: Mapping[int, list[MarkedSpan]]
) -> dict[int, Detection]:
    """`kept`: by feature the spans that activate it."""
    others = _OtherSpans(dictionary, chat.seed)
    asked = [
        (i, is_active, span)
        for i, spans in kept.items()
        for is_active, part in ((True, spans), (False, others.draw(i, len(spans))))
        for span in part
    ]
    questions = [Question(ask_detection(texts[i], span), read_detection) for i, _, span in asked]
    answers = chat.ask(questions, max_tokens=_DETECTION_TOKENS, accept_truncated=True)
    _warn_of_failed("answers about spans", [i for i, _, _ in asked], answers)
    right: dict[int, tuple[list[bool], list[bool]]] = {i: ([], []) for i in kept}
    for (i, is_active, _), answer in zip(asked, answers, strict=True):
        if answer.reason is None:
            right[i][is_active].append(answer.value == is_active)
    return {i: _balanced_accuracy(kinds) for i, kinds in right.items()}


def _balanced_accuracy(kinds: tuple[list[bool], list[bool]]) -> Detection:
    score = float(np.mean([np.mean(kind) for kind in kinds])) if min(map(len, kinds)) >= _FEWEST else None
    return Detection(score, sum(map(len, kinds)))


class _OtherSpans:
    """Spans of features at random, by feature the same whatever else is drawn."""

    def __init__(self, dictionary: FeatureDictionary, seed: int) -> None:
        rows = dictionary.dataset.select_columns(["feature", "spans"])
        self.spans = {row["feature"]: row["spans"] for row in rows}
        self.pool = [(i, number) for i, spans in self.spans.items() for number in range(len(spans))]
        self.seed = seed

    def draw(self, feature: int, n: int) -> list[MarkedSpan]:
        own = self.spans[feature]
        taken = {(s["source"], s["row"]) for s in own} | {s["before"] + s["token"] + s["after"] for s in own}
        drawn: list[MarkedSpan] = []
        random = np.random.default_rng([self.seed, feature])
        for place in random.integers(len(self.pool), size=_DRAWS * n).tolist():
            other, number = self.pool[place]
            span = self.spans[other][number]
            text, row = span["before"] + span["token"] + span["after"], (span["source"], span["row"])
            if other != feature and not {text, row} & taken:
                taken |= {text, row}
                drawn.append(MarkedSpan(span["before"], span["token"], span["after"]))
            if len(drawn) == n:
                break
        return drawn


def features_to_ask(dictionary: FeatureDictionary, features: Iterable[int] | None) -> list[int]:
    """Returns the ids, rising; None is all that have spans. Raises: KeyError for one that is not in the dictionary."""
    if features is not None:
        return dictionary.select(list(features)).features.tolist()
    return [row["feature"] for row in dictionary.dataset.select_columns(["feature", "spans"]) if row["spans"]]


def with_settings(settings: str, **changes: Any) -> str:
    """Returns the JSON of a row's settings with these values; None removes one."""
    merged = json.loads(settings) | changes
    return json.dumps({key: value for key, value in merged.items() if value is not None}, sort_keys=True)


def rating_of(answer: Answer) -> tuple[str, str]:
    """Returns a rating and its reason; "failed" and why where none could be read."""
    return answer.value if answer.reason is None else (FAILED, answer.reason)


def _columns(explanation: Answer, verification: Answer | None, detection: Detection | None) -> dict[str, Any]:
    state = FAILED if explanation.value is None else "explained"
    if explanation.value == CANNOT_TELL:
        state = CANNOT_TELL
    verdict, why = (None, None) if verification is None else rating_of(verification)
    return {
        "explanation": explanation.value if state == "explained" else None, "explanation_state": state,
        "verification": verdict, "verification_reason": why,
        "detection": detection and detection.score, "detection_answers": detection and detection.answers,
        "ratings": [],
    }  # fmt: skip


def _not_shown(row: dict[str, Any], spans: list[MarkedSpan]) -> list[MarkedSpan]:
    """The spans that `explain` did not draw the row's explanation from."""
    how = json.loads(row["settings"]).get("explain", {"held_out": True})
    return spans[1::2] if how["held_out"] else spans[how["spans"] :]


def _warn_of_failed(what: str, features: Iterable[int], answers: list[Answer]) -> None:
    failed = [(i, answer.reason) for i, answer in zip(features, answers, strict=True) if answer.reason is not None]
    if failed:
        first = visible(f"the first, of feature {failed[0][0]}: {failed[0][1]}")
        warnings.warn(f"{len(failed):,} of {len(answers):,} {what} failed; {first}", stacklevel=4)
