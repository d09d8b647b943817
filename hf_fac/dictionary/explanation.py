"""Explanations: a chat model says what a feature's strongest spans share, judges that in a second question, and must
then tell spans that activate the feature from others by the explanation alone.

In: a `FeatureDictionary` with spans, and a `Chat`. Out: the dictionary with explanation, verification and detection.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..chat.identity import chat_name
from ..inputs.token_context import MarkedSpan
from ..storage.terminal import visible
from .asking import Journal, Question, ask
from .questions import (
    CANNOT_TELL,
    PROMPT_VERSION,
    Form,
    ask_detection,
    ask_explanation,
    ask_verification,
    read_detection,
    read_explanation,
    read_rating,
)
from .schema import FAILED

if TYPE_CHECKING:
    from ..chat.base import Chat
    from ..tasks.parsing import Answer
    from .dictionary import FeatureDictionary

_FEWEST = 2  # answers about each kind of span, below which there is no detection score
_TRIES = 100  # draws for each span of another feature
_TOKENS, _DETECTION_TOKENS = 200, 8


class Detection(NamedTuple):
    """score: balanced accuracy, 0.5 is chance; None with fewer than 2 answers on either kind of span. answers: how many
    could be read."""

    score: float | None
    answers: int


def explain(
    dictionary: FeatureDictionary,
    chat: Chat,
    *,
    features: Iterable[int] | None = None,
    spans: int = 10,
    held_out: int = 5,
    form: Form = "json",
    seed: int = 0,
    journal: str | os.PathLike[str] | None = None,
    attempts: int = 3,
    batch_size: int = 64,
) -> FeatureDictionary:
    """The dictionary with new explanations of the features asked for; ratings for the old ones are gone.

    The explanation is drawn from every other span, the strongest first, at most `spans` of them; the second question
    shows all of these and those between, which are also what detection is measured on. So a dictionary with 20 spans is
    explained from 10, as in the paper, and one with 10 from 5. See `detect` for the detection score.

    Args:
        features: ids; None is all that have spans.
        held_out: the most spans kept for the detection score; 0 keeps none, measures none, and explains from the top.
        form: "json", or "text" for a chat model too small to write JSON.
        journal: a JSONL file for every answer. The same call goes on from it and asks nothing that it holds; other
            features may be asked for, other settings are refused.
        attempts: how often an answer that cannot be read is asked for; then explanation or verification is "failed".
        batch_size: questions put to the chat at once, and what a kill can cost.

    Raises: KeyError for a feature that is not there; ValueError for a journal of another job; ChatError when the chat
        cannot answer anything. Warns (UserWarning) of how many failed, and why first.
    """
    ids = asked_features(dictionary, features)
    settings = {"job": "explain", **_settings(dictionary, chat, form, seed), "spans": spans, "held_out": held_out}
    how = {"journal": Journal(journal, settings), "seed": seed, "attempts": attempts, "batch_size": batch_size}
    stop = ("\n",) if form == "text" else ()
    all_spans = {i: dictionary.spans(i)[: 2 * spans if held_out else spans] for i in ids}
    shown = {i: part[::2] if held_out else part for i, part in all_spans.items() if part}
    first = ask(
        chat,
        [
            Question(f"explain {i}", ask_explanation(part, form), lambda t: read_explanation(t, form))
            for i, part in shown.items()
        ],
        max_tokens=_TOKENS,
        stop=stop,
        **how,
    )
    explanations = {i: first[f"explain {i}"].value for i in shown}
    explained = {i: text for i, text in explanations.items() if text not in (None, CANNOT_TELL)}
    second = ask(
        chat,
        [
            Question(
                f"verify {i}", ask_verification(text, all_spans[i], form), lambda answer: read_rating(answer, form)
            )
            for i, text in explained.items()
        ],
        max_tokens=_TOKENS,
        stop=stop,
        **how,
    )
    kept = {i: dictionary.spans(i)[1::2][:held_out] for i in explained} if held_out else {}
    found = _detect(dictionary, chat, {i: explained[i] for i in kept}, kept, **how)
    _warn("explanations", first)
    _warn("verifications", second)
    recorded = {key: value for key, value in settings.items() if key not in ("job", "fingerprint")}
    changes: dict[int, dict[str, Any]] = {}
    for i in shown:
        verdict, why = (None, None) if i not in explained else _verdict(second[f"verify {i}"])
        changes[i] = {
            "explanation": explained.get(i),
            "explanation_state": (
                "explained" if i in explained else CANNOT_TELL if explanations[i] == CANNOT_TELL else FAILED
            ),
            "verification": verdict,
            "verification_reason": why,
            "detection": found[i].score if i in found else None,
            "detection_answers": found[i].answers if i in found else None,
            "ratings": [],
            "settings": with_settings(dictionary[i]["settings"], explain=recorded, rate=None),
        }
    return dictionary.updated(changes)


def detect(
    dictionary: FeatureDictionary,
    chat: Chat,
    *,
    features: Iterable[int] | None = None,
    held_out: int = 5,
    shuffled: bool = False,
    seed: int = 0,
    journal: str | os.PathLike[str] | None = None,
    attempts: int = 3,
    batch_size: int = 64,
) -> dict[int, Detection]:
    """How well the chat model tells spans by the explanation alone, for each explained feature asked for.

    It sees one span at a time, without marks: up to `held_out` spans that the explanation was not drawn from (the 2nd,
    4th ... strongest), and as many spans of other features, drawn at random from rows that are not among the feature's
    own spans. These are not known to leave the feature inactive: of a feature active in a share p of the rows about
    that share of them may activate it, so the score errs on the low side by up to p / 2.

    Args:
        shuffled: give each feature the explanation of another: what the score is worth when explanations say nothing.
        others: as in `explain`.

    Raises: as `explain`; ValueError when there are no two explanations to shuffle.
    """
    ids = asked_features(dictionary, features)
    texts = {i: dictionary[i]["explanation"] for i in ids}
    texts = {i: text for i, text in texts.items() if text is not None}
    settings = {"job": "detect", **_settings(dictionary, chat, "text", seed), "held_out": held_out}
    opened = Journal(journal, settings | {"shuffled": ids if shuffled else None})
    if shuffled:
        if len(texts) < 2:
            raise ValueError(f"{len(texts)} of the features are explained: to shuffle explanations takes two or more.")
        order = np.random.default_rng(seed).permutation(list(texts)).tolist()
        texts = {i: texts[other] for i, other in zip(order, [*order[1:], *order[:1]], strict=True)}
    how = {"journal": opened, "seed": seed, "attempts": attempts, "batch_size": batch_size}
    kept = {i: _not_shown(dictionary[i], dictionary.spans(i))[:held_out] for i in texts}
    return _detect(dictionary, chat, texts, kept, **how)


def _detect(
    dictionary: FeatureDictionary,
    chat: Chat,
    texts: dict[int, str],
    kept: dict[int, list[MarkedSpan]],
    *,
    seed: int,
    **how: Any,
) -> dict[int, Detection]:
    others = _Others(dictionary, seed)
    questions, is_positive = [], {}
    for i, text in texts.items():
        negative = others.draw(i, len(kept[i]))
        for number, (span, active) in enumerate([*((s, True) for s in kept[i]), *((s, False) for s in negative)]):
            key = f"detect {i} {number}"
            questions.append(Question(key, ask_detection(text, span), read_detection))
            is_positive[key] = i, active
    read = ask(chat, questions, seed=seed, max_tokens=_DETECTION_TOKENS, may_be_cut=True, **how)
    _warn("answers about spans", read)
    right: dict[int, tuple[list[bool], list[bool]]] = {i: ([], []) for i in texts}
    for key, answer in read.items():
        i, active = is_positive[key]
        if answer.reason is None:
            right[i][active].append(answer.value == active)
    return {
        i: Detection(
            float(np.mean([np.mean(kind) for kind in kinds])) if min(map(len, kinds)) >= _FEWEST else None,
            sum(map(len, kinds)),
        )
        for i, kinds in right.items()
    }


class _Others:
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
        for place in random.integers(len(self.pool), size=_TRIES * n).tolist():
            other, number = self.pool[place]
            span = self.spans[other][number]
            text, row = span["before"] + span["token"] + span["after"], (span["source"], span["row"])
            if other != feature and not {text, row} & taken:
                taken |= {text, row}
                drawn.append(MarkedSpan(span["before"], span["token"], span["after"]))
            if len(drawn) == n:
                break
        return drawn


def asked_features(dictionary: FeatureDictionary, features: Iterable[int] | None) -> list[int]:
    """The ids, rising; None is all that have spans. Raises: KeyError for one that is not in the dictionary."""
    if features is not None:
        return dictionary.select(list(features)).features.tolist()
    return [row["feature"] for row in dictionary.dataset.select_columns(["feature", "spans"]) if row["spans"]]


def with_settings(settings: str, **changes: Any) -> str:
    """The JSON of a row's settings with these values; None takes one away."""
    merged = json.loads(settings) | changes
    return json.dumps({key: value for key, value in merged.items() if value is not None}, sort_keys=True)


def _settings(dictionary: FeatureDictionary, chat: Chat, form: Form, seed: int) -> dict[str, Any]:
    return {
        "chat": chat_name(chat),
        "prompt_version": PROMPT_VERSION,
        "form": form,
        "seed": seed,
        "fingerprint": dictionary.measurement.get("fingerprint"),
    }


def _not_shown(row: dict[str, Any], spans: list[MarkedSpan]) -> list[MarkedSpan]:
    """The spans that `explain` did not draw the row's explanation from."""
    how = json.loads(row["settings"]).get("explain", {"held_out": True})
    return spans[1::2] if how["held_out"] else spans[how["spans"] :]


def _verdict(answer: Answer) -> tuple[str, str]:
    return answer.value if answer.reason is None else (FAILED, answer.reason)


def _warn(what: str, read: dict[str, Answer]) -> None:
    failed = [(key, answer.reason) for key, answer in read.items() if answer.reason is not None]
    if failed:
        first = visible(f"the first ({failed[0][0]}): {failed[0][1]}")
        warnings.warn(f"{len(failed):,} of {len(read):,} {what} failed; {first}", stacklevel=3)
