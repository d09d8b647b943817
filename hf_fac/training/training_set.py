"""A trainer's training set and how new rows join it.

In: a trainer, the task that new rows are written for, raw rows. Out: the set that the trainer would have made of its
own rows and the new ones together, row by row the same. `trainers` has a subclass for each kind of trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from datasets import Dataset, Features, Value, concatenate_datasets

from ..inputs.rows import ROW_TYPES
from ..storage.parquet import rows_digest

if TYPE_CHECKING:
    from transformers import Trainer

    from ..tasks.task import Task

Prepare = Callable[[Dataset], Dataset]
Kind = tuple[tuple[str, ...], bool]  # the columns that tell the type, and whether they hold conversations

# TRL's types that can be trained on. Where columns of several are there, TRL looks for a prompt before messages.
KINDS = tuple(sorted((columns for name, columns in ROW_TYPES.items() if name != "prompt"), key=len, reverse=True))
# Columns that preparation adds to raw rows.
_PREPARED = {"input_ids", "labels", "seq_lengths", "attention_mask", "token_type_ids", "prompt_ids", "chosen_ids",
             "rejected_ids"}  # fmt: skip

NUMBER = "fac_row"  # column with a new row's number; -1 in the trainer's own rows


class PreparedRows(NamedTuple):
    """New rows after the trainer's preparation.

    kept: the raw rows that the trainer's filters leave.
    tokenized: these rows as rows of the trainer's set; of a set that is reordered, the whole set with them in it.
    """

    kept: Dataset
    tokenized: Dataset


class TrainingSet:
    """A trainer's training set, its rows before preparation, and how new rows join it.

    Args:
        task: new rows have the columns of `task.features()`, and columns that begin with "fac_", which stay out.
        train_dataset: the raw rows of the trainer's set; None where the set still holds them.
        prepare: from raw rows to rows of the trainer's set; None where the trainer prepares them itself.

    Attributes:
        tokenized: the set as the trainer has it.
        raw: its rows before the trainer prepared them.
        columns: the columns of `tokenized` that are trained on.
        is_reordered: whether a row's place depends on all other rows (packing, a shuffle), so that the set has to be
            prepared again as a whole when rows join it.

    Raises: ValueError for a trainer, a setting or a format with which new rows would be prepared differently from the
        rows that are there; it names the cause and the remedy.
    """

    columns: tuple[str, ...] = ()
    is_reordered = False

    def __init__(self, trainer: Trainer, task: Task, train_dataset: Dataset | None, prepare: Prepare | None) -> None:
        self.trainer, self.task, self.tokenized = trainer, task, trainer.train_dataset
        self._given, self._prepare = train_dataset, prepare
        self._task_columns = list(task.features())
        self._check_settings()
        self.raw = self._raw_rows()
        self._check_format()
        self._check_preparation()

    @property
    def content(self) -> Dataset:
        """The columns of `raw` that a featurizer reads."""
        kind = kind_of(self.raw.features)
        names = [name for name in (*kind[0], "tools", "chat_template_kwargs") if name in self.raw.column_names]
        return self.raw.select_columns(names)

    @cached_property
    def digest(self) -> str:
        """A hash of `content`."""
        return rows_digest(self.content)

    def prepare(self, rows: Dataset) -> PreparedRows:
        """Returns new rows as the trainer prepares and filters them."""
        if not len(rows):
            return PreparedRows(rows, self._formatted(self.tokenized.select([]).select_columns(list(self.columns))))
        prepared = self._tokenize(self._numbered(rows.select_columns(self._task_columns), range(len(rows))))
        kept = self._kept(rows, prepared, n_left=len(prepared))
        return PreparedRows(rows.select(kept), self._formatted(self._in_own_types(prepared)))

    def enlarged(self, new: PreparedRows) -> Dataset:
        """Returns the trainer's set with new rows at its end."""
        if not len(new.kept):
            return self.tokenized
        parts = [self.tokenized.with_format(None), new.tokenized.with_format(None)]
        return self._formatted(concatenate_datasets(parts))

    def _tokenize(self, rows: Dataset) -> Dataset:
        """The trainer's own preparation."""
        if self._prepare is not None:
            return self._prepare(rows)
        trainer = self.trainer
        return trainer._prepare_dataset(rows, trainer.processing_class, trainer.args, "train")

    def _can_number(self) -> bool:
        # A user's function may use every column that it is given.
        return self._prepare is None

    def _numbered(self, rows: Dataset, numbers: Iterable[int]) -> Dataset:
        """Rows with a column that says, after the trainer's filters, which of them are left."""
        return rows.add_column(NUMBER, list(numbers)) if self._can_number() else rows

    def _kept(self, rows: Dataset, prepared: Dataset, *, n_left: int) -> list[int]:
        """Which new rows are among the prepared ones, which hold `n_left` of them."""
        if NUMBER in prepared.column_names:
            return sorted(number for number in prepared.with_format(None)[NUMBER] if number >= 0)
        if n_left >= len(rows):
            return list(range(len(rows)))
        rows = rows.select_columns(self._task_columns)
        return [number for number in range(len(rows)) if len(self._tokenize(rows.select([number])))]

    def _formatted(self, rows: Dataset) -> Dataset:
        names, settings = self.tokenized.column_names, self.tokenized.format
        columns = [name for name in settings["columns"] if name in rows.column_names]
        return rows.with_format(
            settings["type"], columns=None if set(settings["columns"]) == set(names) else columns,
            output_all_columns=settings["output_all_columns"], **settings["format_kwargs"],
        )  # fmt: skip

    def _in_own_types(self, prepared: Dataset) -> Dataset:
        """The columns that are trained on, in the types of the trainer's set."""
        features = self.tokenized.features
        _need_columns(prepared.column_names, self.columns, self.tokenized.column_names)
        types = Features({name: features[name] for name in self.columns})
        return prepared.with_format(None).select_columns(list(self.columns)).cast(types)

    def _check_settings(self) -> None:
        raise NotImplementedError

    def _raw_rows(self) -> Dataset:
        if self._given is not None:
            return self._given.with_format(None)
        names = [name for name in self.tokenized.column_names if name not in _PREPARED]
        return self.tokenized.with_format(None).select_columns(names)

    def _check_format(self) -> None:
        """New rows of another type could be trained on too, but differently: prompts without a mask, for example."""
        ours, theirs = kind_of(self.task.features()), kind_of(self.raw.features)
        if theirs is None:
            raise ValueError(
                f"The training set has the columns {', '.join(self.raw.column_names) or 'of token ids only'}, none of "
                "TRL's types: pass train_dataset=, the raw rows that it was made from."
            )
        if not self._fits(ours, theirs):
            raise ValueError(
                f"The trainer's rows are {_words(theirs)}, the rows of task {self.task.name!r} {_words(ours)}: the two "
                "are not trained on the same way. Take a task of the trainer's type, or convert the training set."
            )

    def _fits(self, ours: Kind | None, theirs: Kind) -> bool:
        return ours == theirs

    def _check_preparation(self) -> None:
        """The trainer's own rows, reduced to the columns of new rows, must come out as they are in its set."""
        there, ours = self.raw.column_names, self._shared_columns()
        missing = [name for name in ours if name not in there]
        if missing:
            raise ValueError(f"The training set has no column {', '.join(missing)}, which the task's rows have.")
        first = self._tokenized_row(there)
        self._check_rows(first)
        if self._prepare is None and set(ours) == set(there):
            return
        problem, others = self._problem(ours, first), [name for name in there if name not in ours]
        if problem:
            read = [name for name in others if self._problem([n for n in there if n != name], first)] or others
            raise ValueError(
                f"New rows have the columns {', '.join(ours)}. Reduced to them, the training set's first row {problem}"
                f"{' without ' if read else ''}{', '.join(read)}: new rows would be prepared differently from those "
                "that are there. Remove what new rows do not have, and make the trainer again: what all rows share "
                "can stand in the chat template, formatting_func or prepare=."
            )

    def _shared_columns(self) -> list[str]:
        return self._task_columns

    def _check_rows(self, first: dict[str, Any] | None) -> None:
        """The raw rows, prepared, must start and end like the trainer's set."""
        tokenized = self.tokenized.with_format(None).select_columns(list(self.columns))
        same = first == tokenized[0]
        if same and self._given is not None:
            same = self._tokenized_row(self.raw.column_names, last=True) == tokenized[-1]
            if self._prepare is None:  # a user's function may make several rows of one
                same = same and len(tokenized) <= len(self.raw)
        if not same:
            raise self._other_rows(
                f"its {len(self.raw):,} rows do not start and end like the trainer's {len(tokenized):,}"
            )

    def _other_rows(self, problem: str) -> ValueError:
        name = "The training set" if self._given is None else "train_dataset="
        return ValueError(
            f"{name} is not what the trainer was given: prepared, {problem}. Pass as train_dataset= the raw rows that "
            "the trainer was given, in their order, and where you tokenized them the function that did as prepare= "
            "(which must not depend on what else is in the set, as padding to the longest row does)."
        )

    def _problem(self, columns: list[str], expected: dict[str, Any] | None) -> str | None:
        """What happens to the first row with only these columns, if it does not come out as expected."""
        try:
            return None if self._tokenized_row(columns, as_new=True) == expected else "comes out differently"
        except Exception as error:
            return f"cannot be prepared ({error!r:.200})"

    def _tokenized_row(self, columns: list[str], *, as_new: bool = False, last: bool = False) -> dict[str, Any] | None:
        """The first or last raw row that the trainer's filters leave, with these columns, prepared."""
        n, size = len(self.raw), 1
        while True:
            rows = self.raw.select(range(n - size, n) if last else range(size)).select_columns(columns)
            prepared = self._in_own_types(self._tokenize(self._like_new(rows) if as_new else rows))
            if len(prepared) or size == n:
                return prepared[-1 if last else 0] if len(prepared) else None
            size = min(n, 10 * size)

    def _like_new(self, rows: Dataset) -> Dataset:
        """Raw rows in the types of new ones."""
        return rows


class FixedLengthDataset(torch.utils.data.Dataset):
    """A training set with places for new rows. Its length never changes: free places repeat its own rows in turn."""

    def __init__(self, rows: Dataset, places: int) -> None:
        self.rows, self.places = rows, places
        self._filled = torch.utils.data.ConcatDataset([rows])

    def add(self, rows: Dataset) -> None:
        """Put rows into the next free places. Raises: ValueError when there are too few."""
        free = len(self) - len(self._filled)
        if len(rows) > free:
            raise ValueError(f"{len(rows)} new rows for {free} free places: max_samples was not kept.")
        self._filled = torch.utils.data.ConcatDataset([*self._filled.datasets, rows])

    def __len__(self) -> int:
        return len(self.rows) + self.places

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index < len(self._filled):
            return self._filled[index]
        return self.rows[(index - len(self._filled)) % len(self.rows)]


def kind_of(features: Features) -> Kind | None:
    """Returns the TRL type of rows with these columns."""
    for names in KINDS:
        if set(names) <= set(features):
            return names, not isinstance(features[names[-1]], Value)
    return None


def _words(kind: Kind | None) -> str:
    if kind is None:
        return "of no type that TRL knows"
    return f"{'conversations' if kind[1] else 'plain text'} with the columns {', '.join(kind[0])}"


def _need_columns(found: Iterable[str], wanted: Iterable[str], there: Iterable[str]) -> None:
    for names, problem in ((found, "preparing a row gives"), (there, "the training set has")):
        missing = [name for name in wanted if name not in names]
        if missing:
            raise ValueError(f"{problem} the columns {', '.join(names)}; {', '.join(missing)} is trained on.")
