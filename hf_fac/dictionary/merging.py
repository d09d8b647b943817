"""Merge the rows that two feature dictionaries have of one feature.

In: two rows of `FeatureDictionary`. Out: one row, the same in whatever order parts are merged.
"""

from __future__ import annotations

import json
from typing import Any

from .schema import RATINGS

_ANNOTATION = (
    "explanation", "explanation_state", "verification", "verification_reason", "detection", "detection_answers",
    "settings",
)  # fmt: skip
_SPAN_SETTINGS = ("spans", "before", "after")


def merge_rows(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Returns the row of a feature that two dictionaries have.

    Statistics are added up, unless both counted the same rows (`data`): then they are those of one. The strongest spans
    of both are kept. Of two annotations the one that says most is kept (explained before cannot tell, failed and none;
    then the better verified, then the better detected), with its ratings; those for another explanation are dropped.

    Raises: ValueError for spans that were collected in different number or width.
    """
    settings = [json.loads(row["settings"]) for row in (a, b)]
    if different := [key for key in _SPAN_SETTINGS if settings[0].get(key) != settings[1].get(key)]:
        values = "; ".join(f"{key}: {settings[0].get(key)} and {settings[1].get(key)}" for key in different)
        raise ValueError(f"Feature {a['feature']}: the spans of both were collected differently ({values}).")

    def rank(row: dict[str, Any]) -> tuple[Any, ...]:
        state, verdict, detection = row["explanation_state"], row["verification"], row["detection"]
        best = ("none", "failed", "cannot tell", "explained").index(state)
        place = RATINGS.index(verdict) if verdict in RATINGS else len(RATINGS)
        text = json.dumps([row[name] for name in _ANNOTATION], sort_keys=True)
        return best, -place, -1.0 if detection is None else detection, text

    merged = dict(a)
    winner = max((a, b), key=rank)
    merged |= {name: winner[name] for name in _ANNOTATION}
    kept = [row for row in (a, b) if row["explanation"] == winner["explanation"]]
    merged["ratings"] = _merged_ratings([r for row in kept for r in row["ratings"]])
    merged["spans"] = strongest([*a["spans"], *b["spans"]], settings[0].get("spans"))
    if (a["data"], a["total_rows"]) != (b["data"], b["total_rows"]):
        merged["rows"], merged["total_rows"] = a["rows"] + b["rows"], a["total_rows"] + b["total_rows"]
        merged["activation_sum"] = a["activation_sum"] + b["activation_sum"]
        merged["max_activation"] = max(a["max_activation"], b["max_activation"])
        merged["frequency"] = merged["rows"] / merged["total_rows"] if merged["total_rows"] else 0.0
        merged["mean_activation"] = merged["activation_sum"] / merged["rows"] if merged["rows"] else 0.0
        merged["data"] = f"{(int(a['data'], 16) + int(b['data'], 16)) % 2**64:016x}"
    return merged


def strongest(spans: list[dict[str, Any]], n: int | None) -> list[dict[str, Any]]:
    """Returns the n strongest spans, each text once, at its largest activation; ties in order of source and row."""
    ordered = sorted(spans, key=lambda s: (-s["activation"], s["source"] or "", s["row"], s["before"], s["after"]))
    once: dict[tuple[str, ...], dict[str, Any]] = {}
    for span in ordered:
        once.setdefault((span["before"], span["token"], span["after"]), span)
    return list(once.values())[:n]


def _merged_ratings(ratings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def rank(rating: dict[str, Any]) -> tuple[Any, ...]:
        found = rating["rating"]
        return RATINGS.index(found) if found in RATINGS else len(RATINGS), rating["reason"] or ""

    by_task: dict[str, dict[str, Any]] = {}
    for rating in sorted(ratings, key=rank):
        by_task.setdefault(rating["task"], rating)
    return [by_task[task] for task in sorted(by_task)]
