"""Rows of a pool that is already scored, taken as samples before any is written.

In: a data set scored by `FACScorer`, and the features that are missing. Out: rows of the task's type, each measured to
activate features that no row before it does, the rows that were refused and why, and the features that are left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..coverage.selection import select
from ..inputs.rows import COLUMN_ROLES
from ..storage.differences import differences
from ..storage.scored_rows import ACTIVATIONS, FEATURES, MEASUREMENT
from ..storage.validation import read_measurement
from .candidates import Candidate
from .filters import NearDuplicates
from .verification import Gauge, Measured

if TYPE_CHECKING:
    from datasets import Dataset

    from ..tasks.task import Task

_REMEDY = "score the pool with ds.map(FACScorer(featurizer), batched=True)"
_SELECTIONS = 3  # each without the rows of those before, for what the refused ones left open


class FromPool(NamedTuple):
    """What a pool gave: rows taken, in the order of `select`, rows refused, and the features that are left, int64, in
    the order in which they were wanted."""

    taken: list[Candidate]
    refused: list[Candidate]
    left: np.ndarray


def take_from_pool(
    pool: Dataset,
    features: np.ndarray,
    gauge: Gauge,
    *,
    measurement: Mapping[str, Any],
    known: NearDuplicates,
    keep: Callable[[Mapping[str, Any]], bool] | None = None,
) -> FromPool:
    """Returns the rows that activate most of the features (`select`), but for those that are refused: rows that the
    gauge cannot read or finds to activate nothing that they were selected for, near-duplicates of `known` or of a row
    taken before, and what `keep` drops. What these would have filled is selected for again among the other rows.

    Every row is taken that fills a feature, however many samples are wanted: so the features left are the same for
    any number of samples, and with them what is written for under a journal.

    Args:
        pool: rows of the task's type; standard columns become conversations, columns of other names are left out.
        features: int64 ids, each once. gauge: for these features.
        measurement: of the featurizer, which the pool has to be scored with.
        keep: the caller's own filter of rows.

    Raises: TypeError for another kind of pool; ValueError for columns that are absent or no rows of the task, a pool
        measured otherwise, and what `select` refuses.
    """
    pool = _checked(pool, gauge.task, measurement)
    left, open_, numbers, mine = set(features.tolist()), features, np.arange(len(pool)), NearDuplicates()
    taken: list[Candidate] = []
    refused: list[Candidate] = []
    for _ in range(_SELECTIONS):
        if not len(open_):
            break
        found = select(pool.select(numbers), open_, len(open_), threshold=gauge.delta)
        rows = pool.select(numbers[found.rows])
        for number, (row, measured) in zip(numbers[found.rows].tolist(), _measured(rows, open_, gauge), strict=True):
            hits = {f for f, m in measured.items() if m.activation > gauge.delta[f]}
            best = max(hits & left or measured, key=lambda f: (measured[f].activation, -f))
            text = gauge.task.carried_by(row)
            candidate = Candidate(best, "pool", "pool", number, text, {"pool_row": number}, row, measured[best])
            if candidate.measured.problem is not None:
                candidate.refused = f"unreadable: {candidate.measured.problem}"[:80]
            elif not hits:
                candidate.refused = "lost in its row"
            elif source := known.source_of(text) or mine.source_of(text):
                candidate.refused = f"near-duplicate of {source}"
            elif keep is not None and not keep(row):
                candidate.refused = "the caller's own filter"
            elif best in left:
                new = left.intersection(candidate.measured.activates)
                candidate.asked["fills"], candidate.chosen = sorted(new), True
                left -= new
                mine.add(text, "another sample")
                taken.append(candidate)
            if candidate.refused is not None:
                refused.append(candidate)
        open_ = np.array([f for f in found.covered.tolist() if f in left], np.int64)
        numbers = np.delete(numbers, found.rows)
    return FromPool(taken, refused, np.array([f for f in features.tolist() if f in left], np.int64))


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
            raise ValueError(f"The pool was measured otherwise than by this featurizer ({found}): {_REMEDY}.")
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


def _measured(rows: Dataset, features: np.ndarray, gauge: Gauge) -> list[tuple[dict[str, Any], dict[int, Measured]]]:
    """Of each row, as a sample, what the gauge reads for the features that the row is the first to have."""
    open_, samples, first = set(features.tolist()), [], []
    for row in rows:
        acts = zip(row[FEATURES], row[ACTIVATIONS], strict=True)
        new = [f for f, activation in acts if f in open_ and activation > gauge.delta[f]]
        open_ -= set(new)
        samples.append(_sample(gauge.task, row))
        first.append(new)
    # A row that is asked about several features is read once.
    asked = [(i, f) for i, new in enumerate(first) for f in new]
    found = gauge.rows([samples[i] for i, _ in asked], [f for _, f in asked])
    measured: list[dict[int, Measured]] = [{} for _ in samples]
    for (i, feature), reading in zip(asked, found, strict=True):
        measured[i][feature] = reading
    return list(zip(samples, measured, strict=True))


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
