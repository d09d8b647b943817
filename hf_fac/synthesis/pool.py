"""Rows of a scored pool, accepted as samples before any is written.

In: a data set scored by `FACScorer`, and the missing features. Out: rows of the task's type, each measured to activate
missing features that no row before it activates, or that too few do; the rejected rows; the features that are left.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..coverage.selection import select
from ..inputs.rows import COLUMN_ROLES
from ..storage.differences import differences
from ..storage.scored_rows import ACTIVATIONS, FEATURES, MEASUREMENT
from ..storage.validation import read_measurement
from .candidates import Candidate, Rejection, SampleScore, Status
from .filters import NearDuplicates
from .verification import SampleScorer

if TYPE_CHECKING:
    from datasets import Dataset

    from ..tasks.task import Task

_REMEDY = "score the pool with ds.map(FACScorer(featurizer), batched=True)"
_SELECTIONS = 3  # each for the features that the rejected rows of the one before left open


class FromPool(NamedTuple):
    """What a pool gave: accepted rows in the order of `select`, rejected rows, and by feature how many rows it still
    wants, without those that want none, in the order in which they were asked for."""

    accepted: list[Candidate]
    rejected: list[Candidate]
    left: dict[int, int]


def take_from_pool(
    pool: Dataset,
    demand: Mapping[int, int],
    scorer: SampleScorer,
    *,
    measurement: Mapping[str, Any],
    known: NearDuplicates,
    keep: Callable[[Mapping[str, Any]], bool] | None = None,
) -> FromPool:
    """Returns the rows that activate most of the features (`select`).

    Rejected are rows that cannot be read or do not activate what they were selected for, near-duplicates of known texts
    or of accepted rows, and rows that `keep` drops; other rows are then selected for their features. The number of
    samples wanted plays no part, so the features left are the same for any number.

    Args:
        pool: rows of the task's type; standard columns become conversations, columns of other names are left out.
        demand: by feature, how many rows are to activate it; the scorer measures these features.
        measurement: of the featurizer that the pool has to be scored with.
        keep: the caller's own filter of rows.

    Raises: TypeError for another kind of pool; ValueError for missing columns, rows of another task, a pool measured
        with another featurizer, and what `select` refuses.
    """
    pool = _checked(pool, scorer.task, measurement)
    left, open_, numbers, texts = dict(demand), list(demand), np.arange(len(pool)), NearDuplicates()
    accepted: list[Candidate] = []
    rejected: list[Candidate] = []
    for _ in range(_SELECTIONS):
        if not len(open_):
            break
        wanted = {feature: left[feature] for feature in open_}
        selected = select(
            pool.select(numbers), open_, sum(wanted.values()), demand=list(wanted.values()), threshold=scorer.delta
        )
        rows = pool.select(numbers[selected.rows])
        for number, (row, scores) in zip(numbers[selected.rows].tolist(), _scored(rows, wanted, scorer), strict=True):
            candidate = _candidate(number, row, scores, left, scorer)
            _check(candidate, scores, scorer, known, texts, keep)
            if candidate.rejection is not None:
                rejected.append(candidate)
            elif candidate.feature in left:
                new = sorted(left.keys() & set(candidate.row_score.activates))
                candidate.provenance["fills"], candidate.status = new, Status.ACCEPTED
                left |= {feature: left[feature] - 1 for feature in new}
                left = {feature: rows_left for feature, rows_left in left.items() if rows_left}
                texts.add(candidate.text, "a sample")
                accepted.append(candidate)
        open_ = [f for f in selected.covered.tolist() if f in left]
        numbers = np.delete(numbers, selected.rows)
    return FromPool(accepted, rejected, left)


def _candidate(
    number: int, row: dict[str, Any], scores: dict[int, SampleScore], left: Mapping[int, int], scorer: SampleScorer
) -> Candidate:
    """The row as a candidate for the strongest of its features, one that is still missing if there is such."""
    hits = {f for f, score in scores.items() if score.activation > scorer.delta[f]}
    best = max(hits & left.keys() or scores, key=lambda f: (scores[f].activation, -f))
    text = scorer.task.target_text(row)
    return Candidate(best, "pool", text, {"pool_row": number}, row, row_score=scores[best])


def _check(
    candidate: Candidate,
    scores: dict[int, SampleScore],
    scorer: SampleScorer,
    known: NearDuplicates,
    samples: NearDuplicates,
    keep: Callable[[Mapping[str, Any]], bool] | None,
) -> None:
    if candidate.row_score.problem is not None:
        candidate.reject(Rejection.UNREADABLE, candidate.row_score.problem)
    elif not any(score.activation > scorer.delta[f] for f, score in scores.items()):
        candidate.reject(Rejection.INACTIVE_AS_ROW)
    elif (source := known.source_of(candidate.text)) is not None:
        candidate.reject(Rejection.NEAR_DUPLICATE, source)
    elif samples.source_of(candidate.text) is not None:
        candidate.reject(Rejection.REPEATS_SAMPLE)
    elif keep is not None and not keep(candidate.row):
        candidate.reject(Rejection.FILTERED)


def _checked(pool: Dataset, task: Task, measurement: Mapping[str, Any]) -> Dataset:
    """The pool's columns that are needed, as Python values."""
    from datasets import Dataset

    if not isinstance(pool, Dataset):
        raise TypeError(f"pool is a {type(pool).__name__}; it must be a datasets.Dataset (one split).")
    columns = [*task.features(), FEATURES, ACTIVATIONS, MEASUREMENT]
    if absent := [name for name in columns if name not in pool.column_names]:
        raise ValueError(
            f"The pool has no column {absent[0]!r}; scored rows of the task {task.name!r} have {', '.join(columns)}: "
            f"{_REMEDY}."
        )
    pool = pool.with_format(None).select_columns(columns)
    for text in pool[:1][MEASUREMENT]:
        if found := differences(read_measurement(text or "{}", "The pool: fac_measurement", _REMEDY), measurement):
            raise ValueError(f"The pool was scored with another featurizer ({found}): {_REMEDY}.")
    kinds = {name: getattr(pool.features[name], "dtype", "list") for name in task.features()}
    if not kinds.get("label", "int").startswith("int"):
        raise ValueError(
            f"The pool's labels are of type {kinds['label']}; they must be indices of {', '.join(task.labels)}."
        )
    if task.type == "implicit_preference" and "string" in kinds.values():
        raise ValueError(
            "The pool's chosen and rejected are strings that begin with the prompt; rows of the task "
            f"{task.name!r} hold lists of messages: split them into turns before you score them."
        )
    return pool


def _scored(
    rows: Dataset, demand: Mapping[int, int], scorer: SampleScorer
) -> list[tuple[dict[str, Any], dict[int, SampleScore]]]:
    """Each row as a sample, with its scores for the features that fewer rows before it have than are demanded."""
    open_, samples, first = Counter(demand), [], []
    for row in rows:
        acts = zip(row[FEATURES], row[ACTIVATIONS], strict=True)
        new = [f for f, activation in acts if open_[f] > 0 and activation > scorer.delta[f]]
        open_.subtract(new)
        samples.append(_sample(scorer.task, row))
        first.append(new)
    asked = [(i, f) for i, new in enumerate(first) for f in new]  # equal rows are read once
    found = scorer.score([samples[i] for i, _ in asked], [f for _, f in asked])
    scores: list[dict[int, SampleScore]] = [{} for _ in samples]
    for (i, feature), score in zip(asked, found, strict=True):
        scores[i][feature] = score
    return list(zip(samples, scores, strict=True))


def _sample(task: Task, row: Mapping[str, Any]) -> dict[str, Any]:
    """The row in the columns of the task's type."""
    if task.type == "labelled":
        return {name: row[name] for name in task.features()}
    return {name: _messages(row[name], COLUMN_ROLES.get(name)) for name in task.features()}


def _messages(value: str | Sequence[Mapping[str, Any]], role: str | None) -> list[dict[str, Any]]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    contents = [m["content"] for m in value]
    texts = ["".join(part["text"] for part in c) if isinstance(c, list) else c for c in contents]
    return [{"role": m["role"], "content": text} for m, text in zip(value, texts, strict=True)]
