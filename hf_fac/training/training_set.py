"""A trainer's training set and how new rows join it, whatever the trainer: what it trains on, how it prepared the rows
it has, and where those are raw.

In: a trainer, the task that new rows are written for, raw rows. Out: the set that the trainer would have made of seed
and new rows together, row by row the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, Features, Value, concatenate_datasets

from ..inputs.rows import ROW_TYPES

if TYPE_CHECKING:
    from transformers import Trainer

    from ..tasks.task import Task

Prepare = Callable[[Dataset], Dataset]
Kind = tuple[tuple[str, ...], bool]  # the columns that say it, and whether they are conversations

# TRL's types that can be trained on. Where columns of several are there, TRL looks for a prompt before messages.
KINDS = tuple(sorted((columns for name, columns in ROW_TYPES.items() if name != "prompt"), key=len, reverse=True))
# What preparing adds to raw rows.
_PREPARED = {"input_ids", "labels", "seq_lengths", "attention_mask", "token_type_ids", "prompt_ids", "chosen_ids",
             "rejected_ids"}  # fmt: skip


class TrainerData:
    """A trainer's training set, `base`, its rows as they were before the trainer prepared them, `seed`, and how new
    rows join it.

    Args:
        task: new rows have the columns of `task.features()`, and columns that begin with "fac_", which stay out.
        train_dataset: the raw rows of the trainer's set, None where that still holds them.
        prepare: from raw rows to rows of the trainer's set, None where the trainer prepares them itself.

    Raises: ValueError for a trainer, a setting or a format with which new rows would be trained on otherwise than the
        rows that are there; it says which and what to do.
    """

    columns: tuple[str, ...] = ()  # what the trainer trains on
    arranged = False  # whether where a row goes depends on all others, so that preparing begins anew with new rows

    def __init__(self, trainer: Trainer, task: Task, train_dataset: Dataset | None, prepare: Prepare | None) -> None:
        self.trainer, self.task, self.base = trainer, task, trainer.train_dataset
        self._given, self._prepare_rows = train_dataset, prepare
        self._task_columns = list(task.features())
        self._check_settings()
        self.seed = self._raw_rows()
        self._check_format()
        self._check_preparation()

    @property
    def readable(self) -> Dataset:
        """The columns of `seed` that say what a row reads like."""
        kind = kind_of(self.seed.features)
        names = [name for name in (*kind[0], "tools", "chat_template_kwargs") if name in self.seed.column_names]
        return self.seed.select_columns(names)

    def enlarged(self, rows: Dataset) -> tuple[Dataset, int]:
        """Returns the trainer's set with the new rows at its end, and how many of them its own filters dropped."""
        if not len(rows):
            return self.base, 0
        prepared = self.prepared(rows)
        joined = concatenate_datasets([self.base.with_format(None), prepared.with_format(None)])
        return self._formatted(joined), len(rows) - len(prepared)

    def prepared(self, rows: Dataset) -> Dataset:
        """Returns new rows as rows of the trainer's set: the columns that it trains on, in its own types and format."""
        return self._formatted(self._trained_on(rows.select_columns(self._task_columns)))

    def _formatted(self, rows: Dataset) -> Dataset:
        names, settings = self.base.column_names, self.base.format
        columns = [name for name in settings["columns"] if name in rows.column_names]
        return rows.with_format(
            settings["type"], columns=None if set(settings["columns"]) == set(names) else columns,
            output_all_columns=settings["output_all_columns"], **settings["format_kwargs"],
        )  # fmt: skip

    def _trained_on(self, rows: Dataset) -> Dataset:
        features, prepared = self.base.features, self._prepared(rows).with_format(None)
        _need_columns(prepared.column_names, self.columns, self.base.column_names)
        return prepared.select_columns(list(self.columns)).cast(
            Features({name: features[name] for name in self.columns})
        )

    def _prepared(self, rows: Dataset) -> Dataset:
        if self._prepare_rows is not None:
            return self._prepare_rows(rows)
        trainer = self.trainer
        return trainer._prepare_dataset(rows, trainer.processing_class, trainer.args, "train")

    def _check_settings(self) -> None:
        raise NotImplementedError

    def _raw_rows(self) -> Dataset:
        if self._given is not None:
            return self._given.with_format(None)
        base = self.base
        return base.with_format(None).select_columns([name for name in base.column_names if name not in _PREPARED])

    def _check_format(self) -> None:
        """New rows of another kind may train too, but another way: prompts without a mask, say."""
        ours, theirs = kind_of(self.task.features()), kind_of(self.seed.features)
        if theirs is None:
            raise ValueError(
                f"The training set has the columns {', '.join(self.seed.column_names) or 'of token ids only'}, none of "
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
        """A row that is there goes the way of the new ones: the same must come out."""
        there, ours = self.seed.column_names, self._shared_columns()
        missing = [name for name in ours if name not in there]
        if missing:
            raise ValueError(f"The training set has no column {', '.join(missing)}, which the task's rows have.")
        first = self._probed(there)
        self._check_rows(first)
        if self._prepare_rows is None and set(ours) == set(there):
            return
        problem, others = self._problem(ours, first), [name for name in there if name not in ours]
        if problem:
            read = [name for name in others if self._problem([n for n in there if n != name], first)] or others
            raise ValueError(
                f"New rows have the columns {', '.join(ours)}. As such a row, the training set's first one {problem}"
                f"{', for want of ' if read else ''}{', '.join(read)}: new rows would be trained on otherwise than "
                "those that are there. Take out what new rows do not have, and make the trainer anew: what all rows "
                "share can stand in the chat template, formatting_func or prepare=."
            )

    def _shared_columns(self) -> list[str]:
        return self._task_columns

    def _check_rows(self, first: dict[str, Any] | None) -> None:
        base = self.base.with_format(None).select_columns(list(self.columns))
        same = first == base[0]
        if same and self._given is not None:
            same = self._probed(self.seed.column_names, last=True) == base[-1]
            if self._prepare_rows is None:  # which may make several rows of one
                same = same and len(base) <= len(self.seed)
        if not same:
            raise self._other_rows(f"its {len(self.seed):,} rows do not begin and end as the trainer's {len(base):,}")

    def _other_rows(self, problem: str) -> ValueError:
        name = "The training set" if self._given is None else "train_dataset="
        return ValueError(
            f"{name} is not what the trainer was given: prepared, {problem}. Pass as train_dataset= the raw rows that "
            "the trainer was given, in their order, and where you tokenized them the function that did as prepare= "
            "(which must not depend on what else is in the set, as padding to the longest row does)."
        )

    def _problem(self, columns: list[str], expected: dict[str, Any] | None) -> str | None:
        """What becomes of the first row with no more than these columns, if it is not as expected."""
        try:
            return None if self._probed(columns, new=True) == expected else "comes out otherwise"
        except Exception as error:
            return f"cannot be prepared ({error!r:.200})"

    def _probed(self, columns: list[str], *, new: bool = False, last: bool = False) -> dict[str, Any] | None:
        """The first or last row of the seed that the trainer's own filters leave, with these columns, prepared."""
        n, size = len(self.seed), 1
        while True:
            rows = self.seed.select(range(n - size, n) if last else range(size))
            rows = rows.select_columns(columns)
            prepared = self._trained_on(self._as_new(rows) if new else rows)
            if len(prepared) or size == n:
                return prepared[-1 if last else 0] if len(prepared) else None
            size = min(n, 10 * size)

    def _as_new(self, rows: Dataset) -> Dataset:
        return rows


class PlannedRows(torch.utils.data.Dataset):
    """A seed set with room for new rows: its length is fixed, and open places repeat seed rows in turn."""

    def __init__(self, seed: Dataset, places: int) -> None:
        self.seed, self.places = seed, places
        self.new: Dataset | None = None

    def fill(self, rows: Dataset | None) -> None:
        """Put these rows, all so far, into the first places. Raises: ValueError when there are not so many."""
        if rows is not None and len(rows) > self.places:
            raise ValueError(f"{len(rows)} new rows for {self.places} places: max_samples was not kept to.")
        self.new = rows

    def __len__(self) -> int:
        return len(self.seed) + self.places

    def __getitem__(self, index: int) -> dict[str, Any]:
        filled, place = 0 if self.new is None else len(self.new), index - len(self.seed)
        if 0 <= place < filled:
            return self.new[place]
        return self.seed[index if place < 0 else (place - filled) % len(self.seed)]


def kind_of(features: Features) -> Kind | None:
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
