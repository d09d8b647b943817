"""How each supported trainer prepares its rows: one `TrainingSet` a trainer.

Only this module knows TRL's private preparation. What it does not know is refused when the callback is made. Another
trainer of TRL (KTOTrainer, for example) takes a subclass of `TrainingSet` here and a line in `_SUPPORTED`.
"""

from __future__ import annotations

import copy
import inspect
from typing import TYPE_CHECKING, Any, NamedTuple

from datasets import ClassLabel, Dataset, Features, Value, concatenate_datasets

from .training_set import KINDS, NUMBER, Kind, Prepare, PreparedRows, TrainingSet, kind_of

if TYPE_CHECKING:
    from transformers import Trainer

    from ..tasks.task import Task


class SftTrainingSet(TrainingSet):
    """Of SFTTrainer, whose rows keep their order. Preparation leaves the raw columns beside the ids."""

    columns = ("input_ids", "labels")

    def _check_settings(self) -> None:
        _refuse_images(self.trainer)
        self._check_packing()
        self._check_raw_rows_given()
        _refuse_length_column(self.trainer)

    def _check_packing(self) -> None:
        if "seq_lengths" in self.tokenized.column_names and not (self._trainer_prepares and self.trainer.args.packing):
            raise ValueError(
                "The training set was packed (seq_lengths) before the trainer got it, and new rows cannot be packed "
                "among those that are there: give the trainer raw rows and packing=True, or rows that are not packed."
            )

    def _check_raw_rows_given(self) -> None:
        trainer, prepares = self.trainer, self._trainer_prepares
        causes = {
            "packing": prepares and trainer.args.packing,
            "shuffle_dataset": prepares and trainer.args.shuffle_dataset,
            "a formatting_func": prepares and trainer._formatting_func is not None,
            "skip_prepare_dataset": not prepares,
        }
        cause = next((name for name, found in causes.items() if found), None)
        if cause and self._given is None:
            raise ValueError(
                f"With {cause} the trainer's training set no longer holds the raw rows: pass train_dataset=, the rows "
                "that the trainer was given."
            )
        if not prepares and self._prepare is None:
            raise ValueError("With skip_prepare_dataset you prepared the rows: pass prepare=, the function that does.")
        if self._prepare is None and not trainer.args.packing and kind_of(self.tokenized.features) is None:
            raise ValueError(
                "The training set was tokenized before the trainer got it: pass train_dataset=, its raw rows, and "
                "prepare=, the function that tokenized them."
            )
        if self.is_reordered and self._prepare is not None:
            raise ValueError(f"With {cause} the trainer has to prepare all rows itself: leave prepare= out.")

    @property
    def _trainer_prepares(self) -> bool:
        return not self.trainer._skip_prepare_dataset

    def _check_format(self) -> None:
        super()._check_format()
        field = self.trainer.args.dataset_text_field
        if kind_of(self.raw.features) == (("text",), False) and field != "text":
            raise ValueError(f"dataset_text_field is {field!r}, new rows have their text in 'text': rename the column.")

    def _tokenize(self, rows: Dataset) -> Dataset:
        if self._prepare is not None:
            return self._prepare(rows)
        return self._prepare_with(self.trainer.args, rows, packing=self.trainer.args.packing)

    def _prepare_with(self, args: Any, rows: Dataset, *, packing: bool) -> Dataset:
        trainer = self.trainer
        return trainer._prepare_dataset(
            rows, trainer.processing_class, args, packing, trainer._formatting_func, "train"
        )

    def _can_number(self) -> bool:
        # A formatting function may use every column that it is given.
        return super()._can_number() and self.trainer._formatting_func is None


class ReorderedSftTrainingSet(SftTrainingSet):
    """Of SFTTrainer with packing or shuffle_dataset: with new rows the whole set is prepared again."""

    is_reordered = True

    def prepare(self, rows: Dataset) -> PreparedRows:
        if not len(rows):
            return PreparedRows(rows, self.tokenized)
        seed = self._numbered(self.raw, [-1] * len(self.raw))
        new = self._numbered(rows.select_columns(self._task_columns), range(len(rows)))
        prepared = self._tokenize(_joined(seed, new))
        # Packing drops no rows.
        n_left = len(rows) if self.trainer.args.packing else len(prepared) - len(self.tokenized)
        kept = self._kept(rows, prepared, n_left=n_left)
        if NUMBER in prepared.column_names:
            prepared = prepared.remove_columns(NUMBER)
        return PreparedRows(rows.select(kept), self._formatted(prepared))

    def enlarged(self, new: PreparedRows) -> Dataset:
        return new.tokenized

    def _check_rows(self, first: dict[str, Any] | None) -> None:
        again = self._tokenize(self.raw)
        tables = (rows.select_columns("input_ids").with_format("arrow").iter(1000) for rows in (self.tokenized, again))
        if len(again) != len(self.tokenized) or any(one != other for one, other in zip(*tables, strict=True)):
            raise self._other_rows(
                f"its {len(self.raw):,} rows make {len(again):,}, the trainer has {len(self.tokenized):,}, or others"
            )

    def _tokenized_row(self, columns: list[str], *, as_new: bool = False, last: bool = False) -> dict[str, Any] | None:
        # After a raw row, like new rows, but neither packed nor shuffled nor truncated.
        args, row = copy.copy(self.trainer.args), self.raw.select([0])
        args.max_length, args.shuffle_dataset = None, False
        prepared = self._prepare_with(args, _joined(row, row.select_columns(columns)), packing=False)
        return prepared.with_format(None).select_columns(list(self.columns))[-1]


class RewardTrainingSet(TrainingSet):
    """Of RewardTrainer, which puts the prompt before both completions, in the raw columns too."""

    columns = ("chosen_ids", "rejected_ids")

    def _check_settings(self) -> None:
        strategy = self.trainer.args.train_sampling_strategy
        if strategy in ("group_by_length", "batch_rebalance"):
            raise ValueError(
                f"train_sampling_strategy is {strategy!r}, which RewardTrainer's rows have no lengths for: take "
                '"random" or "sequential".'
            )
        if "margin" in self.tokenized.column_names:
            raise ValueError("The training set has a margin for each pair, new pairs have none: remove the column.")

    def _raw_rows(self) -> Dataset:
        rows = super()._raw_rows()
        if self._given is not None or "prompt" not in rows.column_names:
            return rows
        # In memory: processes would write to the same file of the cache.
        return rows.map(
            _without_prompt, desc="Removing prompts from completions", keep_in_memory=True, load_from_cache_file=False
        )


class DpoTrainingSet(TrainingSet):
    """Of DPOTrainer, which takes a prompt that both completions start with off them."""

    columns = ("prompt_ids", "chosen_ids", "rejected_ids")

    def _check_settings(self) -> None:
        _refuse_images(self.trainer)
        if self.trainer.args.precompute_ref_log_probs:
            raise ValueError(
                "precompute_ref_log_probs computed the reference for the rows that are there, when the trainer was "
                "made: new rows have none. Set precompute_ref_log_probs=False."
            )
        _refuse_length_column(self.trainer)

    def _fits(self, ours: Kind | None, theirs: Kind) -> bool:
        # Pairs with a prompt and without one are trained on the same way.
        pairs = KINDS[:2]
        return ours == theirs or (ours is not None and ours[0] in pairs and theirs[0] in pairs and ours[1] == theirs[1])

    def _shared_columns(self) -> list[str]:
        # Where the trainer split its pairs, the raw rows have another type than the task.
        return list(kind_of(self.raw.features)[0])


class PlainTrainingSet(TrainingSet):
    """Of transformers' own Trainer, whose rows the user prepares."""

    @property
    def content(self) -> Dataset:
        return self.raw.select_columns(self._task_columns)

    def _check_settings(self) -> None:
        trainer = self.trainer
        if self._prepare is None:
            raise ValueError(
                f"{type(trainer).__name__} leaves preparing rows to you: pass prepare=, the function that made its "
                "training set of raw rows (a datasets.Dataset in, a datasets.Dataset out)."
            )
        names = self.tokenized.column_names
        if trainer.args.remove_unused_columns:
            trainer._set_signature_columns_if_needed()
            names = [name for name in names if name in trainer._signature_columns]
        self.columns = tuple(names)
        _refuse_length_column(trainer)

    def _check_format(self) -> None:
        missing = [name for name in self._task_columns if name not in self.raw.column_names]
        if missing:
            raise ValueError(
                f"The training set has no column {', '.join(missing)}, which the rows of task {self.task.name!r} have: "
                "pass train_dataset=, the raw rows that it was made from, in these columns."
            )
        if "label" in self._task_columns:
            self._check_labels(self.raw.features["label"], list(self.task.labels))

    def _check_labels(self, kind: Any, labels: list[str]) -> None:
        remedy = (
            f"train on rows whose label is the index into {labels}, or write with a variant of the task that has the "
            "training set's labels in their order, dataclasses.replace(task, labels=...)."
        )
        if isinstance(kind, ClassLabel):
            if kind.names != labels:
                raise ValueError(f"The training set's labels are {kind.names}, the task's {labels}: {remedy}")
        elif not isinstance(kind, Value) or not kind.dtype.startswith(("int", "uint")):
            raise ValueError(f"The training set's label is {kind}, that of new rows a whole number: {remedy}")

    def _like_new(self, rows: Dataset) -> Dataset:
        # A function that looks up the names of labels finds none in the task's types.
        return Dataset.from_list(rows.to_list(), features=Features({**rows.features, **self.task.features()}))


class _Supported(NamedTuple):
    """A trainer of TRL: the class of its training set, and the arguments of its `_prepare_dataset` as known here."""

    training_set: type[TrainingSet]
    arguments: tuple[str, ...]


_SUPPORTED = {
    "SFTTrainer": _Supported(
        SftTrainingSet, ("dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name")
    ),
    "RewardTrainer": _Supported(RewardTrainingSet, ("dataset", "processing_class", "args", "dataset_name")),
    "DPOTrainer": _Supported(DpoTrainingSet, ("dataset", "processing_class", "args", "dataset_name")),
}


def training_set_of(
    trainer: Trainer, task: Task, *, train_dataset: Dataset | None = None, prepare: Prepare | None = None
) -> TrainingSet:
    """Returns the training set of a trainer. Arguments and errors are those of `TrainingSet`."""
    for name, rows in (("train_dataset", train_dataset), ("the trainer's training set", trainer.train_dataset)):
        if rows is None and name == "train_dataset":
            continue
        if not isinstance(rows, Dataset):
            raise ValueError(
                f"{name} is a {type(rows).__name__}; rows can be added to a datasets.Dataset only (an IterableDataset "
                "has no length to plan steps by: take a part of it, or write it to disk first)."
            )
        if not len(rows):
            raise ValueError(f"{name} has no rows, which the trainer's own filters may have dropped.")
    return _training_set_class(trainer)(trainer, task, train_dataset, prepare)


def _training_set_class(trainer: Trainer) -> type[TrainingSet]:
    name = next((kind.__name__ for kind in type(trainer).__mro__ if kind.__module__.split(".")[0] == "trl"), None)
    if name is None:
        return PlainTrainingSet
    if name not in _SUPPORTED:
        raise ValueError(f"{name} is not supported; supported are {', '.join(_SUPPORTED)} and the plain Trainer.")
    training_set, known = _SUPPORTED[name]
    found = tuple(inspect.signature(type(trainer)._prepare_dataset).parameters)[1:]
    if found != known:
        from trl import __version__

        raise ValueError(
            f"{type(trainer).__name__}._prepare_dataset of trl {__version__} takes {', '.join(found)}; known is "
            f"{', '.join(known)}. How it prepares rows cannot be followed: install the trl that this release names, "
            "or pass the enlarged set to the trainer yourself."
        )
    args = trainer.args
    if training_set is SftTrainingSet and not trainer._skip_prepare_dataset and (args.packing or args.shuffle_dataset):
        return ReorderedSftTrainingSet
    return training_set


def _refuse_images(trainer: Trainer) -> None:
    if trainer._is_vision_dataset:
        raise ValueError("The training set has images, whose rows are not prepared beforehand: not supported.")


def _refuse_length_column(trainer: Trainer) -> None:
    args = trainer.args
    if (
        args.train_sampling_strategy in ("group_by_length", "batch_rebalance")
        and args.length_column_name in trainer.train_dataset.column_names
    ):
        raise ValueError(
            f"The training set has its rows' lengths in column {args.length_column_name!r}, new rows do not: remove "
            "it, then the trainer measures them."
        )


def _joined(seed: Dataset, new: Dataset) -> Dataset:
    new = new.cast(Features({name: seed.features[name] for name in new.column_names}))
    return concatenate_datasets([seed, new])


def _without_prompt(row: dict[str, Any]) -> dict[str, Any]:
    prompt = row["prompt"]
    sides = {side: row[side] for side in ("chosen", "rejected")}
    return {side: text[len(prompt) :] if text[: len(prompt)] == prompt else text for side, text in sides.items()}
