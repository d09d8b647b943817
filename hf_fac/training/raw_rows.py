"""Whether raw rows give a trainer's set, and whether new rows can be prepared as they were.

In: a training set, before anything joins it. Out: an error that says what to change, or nothing.
"""

from __future__ import annotations

from typing import Any

from datasets import ClassLabel, Dataset, Value

from .training_set import TrainingSet


def check_raw_rows(training_set: TrainingSet, *, name: str) -> None:
    """Raises: ValueError, with the remedy, where the raw rows, which the error calls `name`, do not give the trainer's
    set, or where rows reduced to the columns of new rows come out differently."""
    first = _prepared_end(training_set, training_set.raw)
    if not _gives_the_set(training_set, first):
        raise ValueError(
            f"{name} is not what the trainer was given: prepared, its {len(training_set.raw):,} rows are not the "
            f"trainer's {len(training_set.prepared):,}. Pass as train_dataset= the raw rows that the trainer was "
            "given, in their order, and where you tokenized them the function that did as prepare= (which must not "
            "depend on what else is in the set, as padding to the longest row does)."
        )
    columns = training_set.raw.column_names
    shared = [column for column in columns if column in training_set.new_columns]
    problem = _problem(training_set, shared, first)
    if problem is None:
        return
    lacking = [column for column in columns if column not in shared]
    needed = [
        column for column in lacking if _problem(training_set, [c for c in columns if c != column], first)
    ] or lacking
    reduced = f"Without {', '.join(needed)}" if needed else "As a new row"
    raise ValueError(
        f"{reduced} the training set's first row {problem}. New rows have only the columns {', '.join(shared)}, so "
        "they would be prepared differently from those that are there. Remove what new rows do not have (other "
        "columns, names of labels) and make the trainer again. What all rows share can stand in the chat "
        "template, formatting_func or prepare=."
    )


def _gives_the_set(training_set: TrainingSet, first: dict[str, Any] | None) -> bool:
    """Whether `raw`, whose first row comes out so, gives the trainer's set: its ends, or where any row may stand
    there all of it."""
    prepared, raw = training_set.prepared, training_set.raw
    if training_set.order == "unchanged":
        n_most = len(raw) if training_set.ignores_columns else len(prepared)  # a user's function may split rows
        there = prepared.with_format(None).select_columns(training_set.columns)
        return len(there) <= n_most and first == there[0] and _prepared_end(training_set, raw, last=True) == there[-1]
    again, there = (
        rows.select_columns("input_ids").with_format("arrow") for rows in (training_set.prepare(raw), prepared)
    )
    return len(again) == len(there) and all(
        one == other for one, other in zip(again.iter(1000), there.iter(1000), strict=True)
    )


def _problem(training_set: TrainingSet, columns: list[str], expected: dict[str, Any] | None) -> str | None:
    """What happens to the first row as a new one with only these columns, if it comes out differently."""
    rows = training_set.raw.select_columns(columns)
    # A function that looks up the names of labels finds none in new rows.
    rows = rows.cast_column("label", Value("int64")) if isinstance(rows.features.get("label"), ClassLabel) else rows
    try:
        return None if _prepared_end(training_set, rows) == expected else "comes out differently"
    except Exception as error:
        return f"cannot be prepared ({error!r:.200})"


def _prepared_end(training_set: TrainingSet, rows: Dataset, *, last: bool = False) -> dict[str, Any] | None:
    """The first (or last) raw row that the trainer's filters leave, as prepared; None when they leave none. It tries 1,
    10, 100, ... rows."""
    prepare = training_set.prepare_single or training_set.prepare
    n = len(rows)
    size = 1
    while True:
        end = rows.select(range(n - size, n) if last else range(size))
        prepared = training_set.in_types_of_set(prepare(end))
        if len(prepared) or size == n:
            return prepared[-1 if last else 0] if len(prepared) else None
        size = min(n, 10 * size)
