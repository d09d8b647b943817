"""A trainer's training set and how new rows join it.

In: the set, the raw rows that it was made of and the function that made it; new rows. Out: the set that the trainer
would have made of the raw rows and the new ones together, row by row the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from datasets import ClassLabel, Dataset, Features, Value, concatenate_datasets

from ..storage.parquet import rows_digest

Prepare = Callable[[Dataset], Dataset]

_NUMBER = "fac_row"  # column with a new row's number; -1 in the trainer's own rows


class Joined(NamedTuple):
    """The trainer's set with new rows in it, and those of the raw new rows that the trainer's filters left."""

    prepared: Dataset
    kept_rows: Dataset


@dataclass(frozen=True, kw_only=True)
class TrainingSet:
    """A trainer's training set.

    prepared: the set as the trainer has it. raw: its rows before they were prepared.
    prepare: from raw rows to rows of the set.
    prepare_single: the same for single rows; None where `prepare` does not mix rows.
    columns: the columns of `prepared` that are trained on.
    content_columns: the columns of `raw` that a featurizer reads.
    new_columns: the columns of new rows that are prepared.
    order: of prepared rows: that of the raw rows, shuffled, or several rows packed into one.
    ignores_columns: `prepare` passes over unknown columns, so a numbering column can be added. A user's function may
        use any column.
    """

    prepared: Dataset
    raw: Dataset
    prepare: Prepare
    columns: list[str]
    content_columns: list[str]
    new_columns: list[str]
    prepare_single: Prepare | None = None
    order: Literal["unchanged", "shuffled", "packed"] = "unchanged"
    ignores_columns: bool = True

    @property
    def content(self) -> Dataset:
        """The part of `raw` that a featurizer reads."""
        return self.raw.select_columns(self.content_columns)

    @cached_property
    def digest(self) -> str:
        """A hash of `content`."""
        return rows_digest(self.content)

    def join(self, new: Dataset, *, to: Dataset | None = None) -> Joined:
        """Returns the set with new rows in it: at its end, or where packing or a shuffle puts them.

        Args:
            to: the set with earlier new rows in it, if there are any.

        Raises: ValueError for earlier new rows in a set that is packed or shuffled: their raw form, with which it would
            be prepared again, is not known.
        """
        to = self.prepared if to is None else to
        if not len(new):
            return Joined(to, new)
        if self.order != "unchanged" and to is not self.prepared:
            raise ValueError(f"A {self.order} set is prepared again as a whole: pass all new rows at once, without to.")
        rows, n_own = self._numbered(new.select_columns(self.new_columns), range(len(new))), 0
        if self.order != "unchanged":  # a row's place depends on all rows
            rows = append_rows(self._numbered(self.raw, [-1] * len(self.raw)), rows)
            n_own = len(self.prepared)
        prepared = self.prepare(rows)
        n_left = len(new) if self.order == "packed" else len(prepared) - n_own  # packing drops no rows
        kept = new.select(self._kept(new, prepared, n_left))
        if self.order == "unchanged":
            prepared = concatenate_datasets([to.with_format(None), self._in_types_of_set(prepared)])
        elif _NUMBER in prepared.column_names:
            prepared = prepared.remove_columns(_NUMBER)
        return Joined(self._formatted(prepared), kept)

    def _numbered(self, rows: Dataset, numbers: Iterable[int]) -> Dataset:
        """Rows with a column that says, after the trainer's filters, which of them are left."""
        return rows.add_column(_NUMBER, list(numbers)) if self.ignores_columns else rows

    def _kept(self, new: Dataset, prepared: Dataset, n_left: int) -> list[int]:
        """Which new rows are among the prepared ones, which hold `n_left` of them."""
        if _NUMBER in prepared.column_names:
            return sorted(number for number in prepared.with_format(None)[_NUMBER] if number >= 0)
        if n_left >= len(new):
            return list(range(len(new)))
        rows = new.select_columns(self.new_columns)
        return [number for number in range(len(rows)) if len(self.prepare(rows.select([number])))]

    def _in_types_of_set(self, prepared: Dataset) -> Dataset:
        """The columns that are trained on, in the types of the trainer's set."""
        for rows, problem in ((prepared, "preparing a row gives"), (self.prepared, "the training set has")):
            if missing := [name for name in self.columns if name not in rows.column_names]:
                found = ", ".join(rows.column_names)
                raise ValueError(f"{problem} the columns {found}; {', '.join(missing)} is trained on.")
        types = Features({name: self.prepared.features[name] for name in self.columns})
        return prepared.with_format(None).select_columns(self.columns).cast(types)

    def _formatted(self, rows: Dataset) -> Dataset:
        """Rows in the format of the trainer's set."""
        form = self.prepared.format
        columns = None if set(form["columns"]) == set(self.prepared.column_names) else form["columns"]
        return rows.with_format(
            form["type"], columns=columns, output_all_columns=form["output_all_columns"], **form["format_kwargs"]
        )

    def check(self, *, name: str) -> None:
        """Raises: ValueError, with the remedy, where `raw`, which the error calls `name`, does not give the trainer's
        set, or where rows reduced to the columns of new rows come out differently."""
        first = self._prepared_end(self.raw)
        if self.order == "unchanged":
            n_most = len(self.raw) if self.ignores_columns else len(self.prepared)  # a user's function may split rows
            ends = self.prepared.with_format(None).select_columns(self.columns)
            same = first == ends[0] and self._prepared_end(self.raw, last=True) == ends[-1] and len(ends) <= n_most
        else:  # any row may stand at the ends
            again = self.prepare(self.raw)
            ours, theirs = (rows.select_columns("input_ids").with_format("arrow") for rows in (again, self.prepared))
            same = len(ours) == len(theirs) and all(
                one == other for one, other in zip(ours.iter(1000), theirs.iter(1000), strict=True)
            )
        if not same:
            raise ValueError(
                f"{name} is not what the trainer was given: prepared, its {len(self.raw):,} rows are not the trainer's "
                f"{len(self.prepared):,}. Pass as train_dataset= the raw rows that the trainer was given, in their "
                "order, and where you tokenized them the function that did as prepare= (which must not depend on what "
                "else is in the set, as padding to the longest row does)."
            )
        there = self.raw.column_names
        ours = [column for column in there if column in self.new_columns]
        if problem := self._problem(ours, first):
            others = [column for column in there if column not in ours]
            read = [column for column in others if self._problem([c for c in there if c != column], first)] or others
            raise ValueError(
                f"New rows have the columns {', '.join(ours)}. Reduced to them, the training set's first row {problem}"
                f"{' without ' if read else ''}{', '.join(read)}: new rows would be prepared differently from those "
                "that are there. Remove what new rows do not have, and make the trainer again: what all rows share "
                "can stand in the chat template, formatting_func or prepare=."
            )

    def _problem(self, columns: list[str], expected: dict[str, Any] | None) -> str | None:
        """What happens to the first row as a new one with only these columns, if it comes out differently."""
        rows = self.raw.select_columns(columns)
        # A function that looks up the names of labels finds none in new rows.
        rows = rows.cast_column("label", Value("int64")) if isinstance(rows.features.get("label"), ClassLabel) else rows
        try:
            return None if self._prepared_end(rows) == expected else "comes out differently"
        except Exception as error:
            return f"cannot be prepared ({error!r:.200})"

    def _prepared_end(self, rows: Dataset, *, last: bool = False) -> dict[str, Any] | None:
        """The first or last of raw rows that the trainer's filters leave, prepared; None when they leave none."""
        n, size, prepare = len(rows), 1, self.prepare_single or self.prepare
        while True:
            end = rows.select(range(n - size, n) if last else range(size))
            prepared = self._in_types_of_set(prepare(end))
            if len(prepared) or size == n:
                return prepared[-1 if last else 0] if len(prepared) else None
            size = min(n, 10 * size)


class FixedLengthDataset(torch.utils.data.Dataset):
    """A training set whose length never changes: places that are still free repeat its first rows in turn.

    Args:
        trainer_rows: the trainer's own rows. places: for new rows, which come after them.
    """

    def __init__(self, trainer_rows: Dataset, places: int) -> None:
        self.rows = trainer_rows
        self._n_trainer_rows = len(trainer_rows)
        self._length = len(trainer_rows) + places

    def fill(self, rows: Dataset) -> None:
        """Hold these rows, the trainer's own and all new ones. A loader that exists reads them in its next epoch."""
        self.rows = rows

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index if index < len(self.rows) else (index - len(self.rows)) % self._n_trainer_rows]


def append_rows(raw: Dataset, new: Dataset) -> Dataset:
    """Returns raw rows with new rows after them, in the types of the former."""
    new = new.cast(Features({name: raw.features[name] for name in new.column_names}))
    return concatenate_datasets([raw, new])
