"""Which features matter for a task: a chat model rates each explained and verified feature by the task's guideline.

In: a `FeatureDictionary` with explanations, a task, a `Chat`. Out: the dictionary with a rating and its reason for
each; `dictionary.task_features(task)` are then F_task (PAPER.md).
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..chat.identity import chat_name
from ..tasks.task import Task, get_task
from .asking import Journal, Question, ask
from .explanation import asked_features, with_settings
from .questions import PROMPT_VERSION, Form, ask_rating, read_rating
from .schema import FAILED, RATINGS

if TYPE_CHECKING:
    from ..chat.base import Chat
    from .dictionary import FeatureDictionary

_SPANS = 5  # shown beside the explanation
_TOKENS = 200


def rate(
    dictionary: FeatureDictionary,
    *,
    task: Task | str | os.PathLike[str],
    chat: Chat,
    features: Iterable[int] | None = None,
    form: Form = "json",
    seed: int = 0,
    journal: str | os.PathLike[str] | None = None,
    attempts: int = 3,
    batch_size: int = 64,
) -> FeatureDictionary:
    """The dictionary with a rating for the task, yes, probably, maybe or no, and the reason, of each feature that can
    be rated: its explanation is there, and was verified (not with no).

    Args:
        task: a `Task`, the name of a built-in one, or the path of a YAML file.
        features: ids; None is all that have spans. Those that cannot be rated are skipped, and counted in a warning.
        form: "json", or "text" for a chat model too small to write JSON.
        journal: a JSONL file for every answer. The same call goes on from it and asks nothing that it holds; other
            features may be asked for, other settings are refused.
        attempts: how often an answer that cannot be read is asked for; then the rating is "failed".
        batch_size: questions put to the chat at once, and what a kill can cost.

    Raises: KeyError for a feature that is not there; ValueError for a journal of another job, or no such task;
        ChatError when the chat cannot answer anything. Warns (UserWarning) of how many were skipped or failed.
    """
    task = get_task(task)
    settings = {
        "job": "rate", "task": task.name, "guideline": hashlib.sha256(task.guideline.encode()).hexdigest()[:16],
        "chat": chat_name(chat), "prompt_version": PROMPT_VERSION, "form": form, "seed": seed,
        "fingerprint": dictionary.measurement.get("fingerprint"),
    }  # fmt: skip
    opened = Journal(journal, settings)
    rows = {i: dictionary[i] for i in asked_features(dictionary, features)}
    skipped = {i: why for i, row in rows.items() if (why := _why_not(row))}
    questions = [
        Question(
            f"rate {i}",
            ask_rating(task.name, task.guideline, row["explanation"], dictionary.spans(i)[:_SPANS], form),
            lambda text: read_rating(text, form),
        )
        for i, row in rows.items()
        if i not in skipped
    ]
    stop = ("\n",) if form == "text" else ()
    limits = {"max_tokens": _TOKENS, "stop": stop, "attempts": attempts, "batch_size": batch_size}
    read = ask(chat, questions, journal=opened, seed=seed, **limits)
    recorded = {key: value for key, value in settings.items() if key not in ("job", "task", "fingerprint")}
    changes: dict[int, dict[str, Any]] = {}
    for i, row in rows.items():
        if i not in skipped:
            value, reason = read[f"rate {i}"]
            rating, why = value if reason is None else (FAILED, reason)
            others = [other for other in row["ratings"] if other["task"] != task.name]
            ratings = sorted([*others, {"task": task.name, "rating": rating, "reason": why}], key=lambda r: r["task"])
            how = json.loads(row["settings"]).get("rate", {}) | {task.name: recorded}
            changes[i] = {"ratings": ratings, "settings": with_settings(row["settings"], rate=how)}
    failed = [answer.reason for answer in read.values() if answer.reason is not None]
    if skipped or failed:
        reasons = ", ".join(f"{count:,} {why}" for why, count in Counter(skipped.values()).most_common())
        notes = [f"{len(skipped):,} skipped ({reasons})"] if skipped else []
        notes += [f"{len(failed):,} failed (the first: {failed[0]})"] if failed else []
        warnings.warn(f"{task.name}: of {len(rows):,} features {' and '.join(notes)}", stacklevel=2)
    return dictionary.updated(changes)


def _why_not(row: dict[str, Any]) -> str | None:
    state, verdict = row["explanation_state"], row["verification"]
    if state != "explained":
        return {"none": "not explained", FAILED: "with a failed explanation"}.get(state, "that cannot be told")
    if verdict not in RATINGS[:-1]:
        return (
            "whose explanation was not verified"
            if verdict is None
            else "whose verification " + ("failed" if verdict == FAILED else "was no")
        )
    return None
