"""Two feature dictionaries beside each other: the row that stands for both of two, and what moved between them.

In: rows of `FeatureDictionary`, or two dictionaries of one SAE. Out: a merged row, the same in whatever order parts are
joined, or a table of features with the evidence that they moved (after fine-tuning, say).
"""

from __future__ import annotations

import json
from collections import Counter
from decimal import Context
from typing import TYPE_CHECKING, Any

import numpy as np

from .dictionary_schema import RATINGS

if TYPE_CHECKING:
    import pandas as pd

    from .dictionary import FeatureDictionary

_EXACT = Context(prec=60)
_ANNOTATION = (
    "explanation", "explanation_state", "verification", "verification_reason", "detection", "detection_answers",
    "settings",
)  # fmt: skip
_SPAN_SETTINGS = ("spans", "before", "after")


def merge_rows(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """The row of a feature that two dictionaries have.

    Statistics add up exactly, and the strongest spans of both stay, unless both counted the same rows (`data`): then
    they are those of one. Of two annotations stays the one that says most (explained before cannot tell, failed and
    none; then the better verified, the better detected), with its ratings; those for another explanation go.

    Raises: ValueError for spans that were collected in different number or width.
    """
    settings = [json.loads(row["settings"]) for row in (a, b)]
    if different := [key for key in _SPAN_SETTINGS if settings[0].get(key) != settings[1].get(key)]:
        values = "; ".join(f"{key}: {settings[0].get(key)} and {settings[1].get(key)}" for key in different)
        raise ValueError(f"Feature {a['feature']}: the spans of both were collected differently ({values}).")

    def says(row: dict[str, Any]) -> tuple[Any, ...]:
        state, verdict, detection = row["explanation_state"], row["verification"], row["detection"]
        best = ("none", "failed", "cannot tell", "explained").index(state)
        place = RATINGS.index(verdict) if verdict in RATINGS else len(RATINGS)
        text = json.dumps([row[name] for name in _ANNOTATION], sort_keys=True)
        return best, -place, -1.0 if detection is None else detection, text

    merged = dict(a)
    winner = max((a, b), key=says)
    merged |= {name: winner[name] for name in _ANNOTATION}
    kept = [row for row in (a, b) if row["explanation"] == winner["explanation"]]
    merged["ratings"] = _merged_ratings([r for row in kept for r in row["ratings"]])
    merged["spans"] = strongest([*a["spans"], *b["spans"]], settings[0].get("spans"))
    if (a["data"], a["total_rows"]) != (b["data"], b["total_rows"]):
        merged["rows"], merged["total_rows"] = a["rows"] + b["rows"], a["total_rows"] + b["total_rows"]
        merged["activation_sum"] = _EXACT.add(a["activation_sum"], b["activation_sum"])
        merged["max_activation"] = max(a["max_activation"], b["max_activation"])
        merged["frequency"] = merged["rows"] / merged["total_rows"] if merged["total_rows"] else 0.0
        merged["mean_activation"] = float(merged["activation_sum"]) / merged["rows"] if merged["rows"] else 0.0
        merged["data"] = f"{(int(a['data'], 16) + int(b['data'], 16)) % 2**64:016x}"
    return merged


def strongest(spans: list[dict[str, Any]], n: int | None) -> list[dict[str, Any]]:
    """The n strongest spans, each text with its token once, as strong as it is anywhere; by source and row on ties."""
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


def compare(
    before: FeatureDictionary, after: FeatureDictionary, *, significance: float = 0.01, overlap: float = 0.5
) -> pd.DataFrame:
    """A row for each feature of both dictionaries, those that moved most first: feature, moved, frequency,
    other_frequency, p_value, token_overlap, shared_spans, mean_activation, other_mean_activation, explanation,
    other_explanation.

    A feature moved when its frequency did (Fisher's exact test, twice the smaller tail, p_value below `significance`
    divided by the number of features) or its spans: token_overlap, in [0, 1], is what the activating tokens of both
    have in common, weighted by activation, and has moved below `overlap`; it is NaN where one has no spans.
    shared_spans are those with the same text.

    Raises: ValueError for dictionaries of different layers or widths.
    """
    import pandas as pd
    from scipy.stats import hypergeom

    for key in ("d_sae", "layer"):
        if before.measurement.get(key) != after.measurement.get(key):
            found = f"{before.measurement.get(key)} and {after.measurement.get(key)}"
            raise ValueError(f"The dictionaries are not of one SAE ({key}: {found}): their features are not the same.")
    ids = np.intersect1d(before.features, after.features)
    ours, theirs = (list(part.select(ids)) for part in (before, after))
    rows, other, total, other_total = (
        np.array([row[name] for row in part], dtype=np.int64)
        for name in ("rows", "total_rows")
        for part in (ours, theirs)
    )
    test = hypergeom(total + other_total, rows + other, total)
    p = np.minimum(1.0, 2 * np.minimum(test.cdf(rows), test.sf(rows - 1)))
    shares = np.array([_overlap(a["spans"], b["spans"]) for a, b in zip(ours, theirs, strict=True)], dtype=np.float64)
    moved = (p < significance / max(len(ids), 1)) | (shares < overlap)
    table = {
        "feature": ids,
        "moved": moved,
        "frequency": [row["frequency"] for row in ours],
        "other_frequency": [row["frequency"] for row in theirs],
        "p_value": p,
        "token_overlap": shares,
        "shared_spans": [len(_texts(a) & _texts(b)) for a, b in zip(ours, theirs, strict=True)],
        "mean_activation": [row["mean_activation"] for row in ours],
        "other_mean_activation": [row["mean_activation"] for row in theirs],
        "explanation": [row["explanation"] for row in ours],
        "other_explanation": [row["explanation"] for row in theirs],
    }
    frame = pd.DataFrame(table)
    return frame.sort_values(["moved", "p_value", "token_overlap", "feature"], ascending=[False, True, True, True])


def _overlap(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> float:
    shares = []
    for spans in (one, other):
        counts: Counter[str] = Counter()
        for span in spans:
            counts[span["token"].strip().casefold()] += span["activation"]
        shares.append({token: value / counts.total() for token, value in counts.items()})
    if not all(shares):
        return float("nan")
    return float(sum(min(share, shares[1].get(token, 0.0)) for token, share in shares[0].items()))


def _texts(row: dict[str, Any]) -> set[tuple[str, ...]]:
    return {(span["before"], span["token"], span["after"]) for span in row["spans"]}
