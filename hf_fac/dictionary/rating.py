"""Which features matter for a task: a chat model rates each explained and verified feature by the task's guideline.

In: a `FeatureDictionary` with explanations, a task, a `Chat`. Out: the dictionary with a rating and its reason for
each; `dictionary.task_features(task)` are then F_task (arXiv 2602.10388).
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ..chat.identity import chat_name
from ..storage.terminal import visible
from ..tasks.task import Task, get_task
from .asking import CachedChat
from .explanation import features_to_ask, rating_of, with_settings
from .questions import PROMPT_VERSION, PromptFormat, ask_rating, read_rating
from .schema import FAILED, RATINGS

if TYPE_CHECKING:
    from ..chat.base import Chat
    from ..tasks.parsing import Answer
    from .dictionary import FeatureDictionary

_SPANS = 5  # shown beside the explanation


def rate(
    dictionary: FeatureDictionary,
    *,
    task: Task | str | os.PathLike[str],
    chat: Chat,
    features: Iterable[int] | None = None,
    prompt_format: PromptFormat = "json",
    seed: int = 0,
    cache_dir: str | os.PathLike[str] | None = None,
    attempts: int = 3,
    batch_size: int = 64,
) -> FeatureDictionary:
    """Returns the dictionary with ratings for the task: yes, probably, maybe or no, and the reason.

    Features are rated whose explanation was verified with yes, probably or maybe.

    Args:
        task: a `Task`, the name of a built-in one, or the path of a YAML file.
        features: ids; None is all that have spans. Others than the above are skipped, and counted in a warning.
        others: as in `explain`.

    Raises: KeyError for a feature that is not there; ValueError for no such task; ChatError when the chat cannot answer
        anything. Warns (UserWarning) of how many were skipped or failed.
    """
    task = get_task(task)
    rows = {i: dictionary[i] for i in features_to_ask(dictionary, features)}
    skipped = {i: why for i, row in rows.items() if (why := _why_not_rated(row))}
    rated = {i: row for i, row in rows.items() if i not in skipped}
    asked = CachedChat(chat, cache_dir, seed=seed, attempts=attempts, batch_size=batch_size)
    questions = {
        i: ask_rating(task.name, task.guideline, row["explanation"], dictionary.spans(i)[:_SPANS], prompt_format)
        for i, row in rated.items()
    }
    answers = asked.ask_by_feature(questions, read_rating, prompt_format)
    _warn_of_unrated(task.name, skipped, answers)
    how = {
        "guideline": hashlib.sha256(task.guideline.encode()).hexdigest()[:16], "chat": chat_name(chat),
        "prompt_version": PROMPT_VERSION, "prompt_format": prompt_format, "seed": seed,
    }  # fmt: skip
    return dictionary.updated({i: _columns(rated[i], task.name, answer, how) for i, answer in answers.items()})


def _columns(row: dict[str, Any], task: str, answer: Answer, how: dict[str, Any]) -> dict[str, Any]:
    """The row's ratings and settings with those for the task."""
    rating, why = rating_of(answer)
    others = [other for other in row["ratings"] if other["task"] != task]
    ratings = sorted([*others, {"task": task, "rating": rating, "reason": why}], key=lambda r: r["task"])
    recorded = json.loads(row["settings"]).get("rate", {}) | {task: how}
    return {"ratings": ratings, "settings": with_settings(row["settings"], rate=recorded)}


def _warn_of_unrated(task: str, skipped: Mapping[int, str], answers: Mapping[int, Answer]) -> None:
    failed = [answer.reason for answer in answers.values() if answer.reason is not None]
    notes = []
    if skipped:
        reasons = ", ".join(f"{count:,} {why}" for why, count in Counter(skipped.values()).most_common())
        notes.append(f"{len(skipped):,} skipped ({reasons})")
    if failed:
        notes.append(f"{len(failed):,} failed (the first: {visible(failed[0])})")
    if notes:
        warnings.warn(f"{task}: of {len(skipped) + len(answers):,} features {' and '.join(notes)}", stacklevel=3)


def _why_not_rated(row: dict[str, Any]) -> str | None:
    state, verdict = row["explanation_state"], row["verification"]
    if state != "explained":
        return {"none": "not explained", FAILED: "with a failed explanation"}.get(state, "that cannot be told")
    if verdict is None:
        return "whose explanation was not verified"
    if verdict not in RATINGS[:-1]:
        return "whose verification " + ("failed" if verdict == FAILED else "was no")
    return None
