"""How the trainers of TRL and the plain Trainer prepare rows, one class each.

The one room that knows TRL's private preparation: what it does not know is refused when it is made, not in the third
hour.
"""

from __future__ import annotations

import copy
import inspect
from typing import TYPE_CHECKING, Any

from datasets import ClassLabel, Dataset, Features, Value, concatenate_datasets

from .training_set import KINDS, Kind, Prepare, TrainerData, kind_of

if TYPE_CHECKING:
    from transformers import Trainer

    from ..tasks.task import Task

_SUPPORTED = "SFTTrainer, RewardTrainer, DPOTrainer and the plain Trainer"


class _Sft(TrainerData):
    columns = ("input_ids", "labels")

    def _check_settings(self) -> None:
        trainer = self.trainer
        if trainer._is_vision_dataset:
            raise ValueError("The training set has images, whose rows are not prepared beforehand: not supported.")
        self._prepares_itself = not trainer._skip_prepare_dataset
        if "seq_lengths" in trainer.train_dataset.column_names and not (self._prepares_itself and trainer.args.packing):
            raise ValueError(
                "The training set was packed (seq_lengths) before the trainer got it, and new rows cannot be packed "
                "among those that are there: give the trainer raw rows and packing=True, or rows that are not packed."
            )
        # Packing keeps no rows, a shuffle no order: both are done again, with the new rows among the others.
        self.arranged = self._prepares_itself and (trainer.args.packing or trainer.args.shuffle_dataset)
        reasons = {
            "packing": self._prepares_itself and trainer.args.packing,
            "shuffle_dataset": self._prepares_itself and trainer.args.shuffle_dataset,
            "a formatting_func": self._prepares_itself and trainer._formatting_func is not None,
            "skip_prepare_dataset": not self._prepares_itself,
        }
        reason = next((name for name, found in reasons.items() if found), None)
        if reason and self._given is None:
            raise ValueError(
                f"With {reason} the trainer's training set no longer holds the raw rows: pass train_dataset=, the rows "
                "that the trainer was given."
            )
        if not self._prepares_itself and self._prepare_rows is None:
            raise ValueError("With skip_prepare_dataset you prepared the rows: pass prepare=, the function that does.")
        # The trainer leaves the raw columns beside the ids, but for packed rows.
        if self._prepare_rows is None and not trainer.args.packing and kind_of(self.base.features) is None:
            raise ValueError(
                "The training set was tokenized before the trainer got it: pass train_dataset=, its raw rows, and "
                "prepare=, the function that tokenized them."
            )
        if self.arranged and self._prepare_rows is not None:
            raise ValueError(f"With {reason} the trainer has to prepare all rows itself: leave prepare= out.")
        _check_length_column(trainer)

    def _prepared(self, rows: Dataset) -> Dataset:
        if self._prepare_rows is not None:
            return self._prepare_rows(rows)
        trainer = self.trainer
        return trainer._prepare_dataset(
            rows, trainer.processing_class, trainer.args, trainer.args.packing, trainer._formatting_func, "train"
        )

    def enlarged(self, rows: Dataset) -> tuple[Dataset, int]:
        if not self.arranged or not len(rows):
            return super().enlarged(rows)
        whole = self._prepared(self._joined(self.seed, rows.select_columns(self._task_columns)))
        packed = self.trainer.args.packing  # drops nothing, and its rows are not ours to count
        return self._formatted(whole), 0 if packed else len(rows) + len(self.base) - len(whole)

    def _joined(self, seed: Dataset, new: Dataset) -> Dataset:
        new = new.cast(Features({name: seed.features[name] for name in new.column_names}))
        return concatenate_datasets([seed, new])

    def _check_format(self) -> None:
        super()._check_format()
        field = self.trainer.args.dataset_text_field
        if kind_of(self.seed.features) == (("text",), False) and field != "text":
            raise ValueError(f"dataset_text_field is {field!r}, new rows have their text in 'text': rename the column.")

    def _check_rows(self, first: dict[str, Any] | None) -> None:
        if not self.arranged:
            return super()._check_rows(first)
        base, again = self.base, self._prepared(self.seed)
        tables = (rows.select_columns("input_ids").with_format("arrow").iter(1000) for rows in (base, again))
        if len(again) != len(base) or any(one != other for one, other in zip(*tables, strict=True)):
            raise self._other_rows(
                f"its {len(self.seed):,} rows make {len(again):,}, the trainer has {len(base):,}, or others"
            )

    def _probed(self, columns: list[str], *, new: bool = False, last: bool = False) -> dict[str, Any] | None:
        if not self.arranged:
            return super()._probed(columns, new=new, last=last)
        # Behind a row of the seed, as new rows are, but neither packed nor shuffled nor cut.
        trainer, args, row = self.trainer, copy.copy(self.trainer.args), self.seed.select([0])
        args.max_length, args.shuffle_dataset = None, False
        rows = self._joined(row, row.select_columns(columns))
        prepared = trainer._prepare_dataset(
            rows, trainer.processing_class, args, False, trainer._formatting_func, "train"
        )
        return prepared.with_format(None).select_columns(list(self.columns))[-1]


class _Reward(TrainerData):
    columns = ("chosen_ids", "rejected_ids")

    def _check_settings(self) -> None:
        if self.trainer.args.train_sampling_strategy in ("group_by_length", "batch_rebalance"):
            raise ValueError(
                f"train_sampling_strategy is {self.trainer.args.train_sampling_strategy!r}, which RewardTrainer's rows "
                'have no lengths for: take "random" or "sequential".'
            )
        if "margin" in self.base.column_names:
            raise ValueError("The training set has a margin for each pair, new pairs have none: remove the column.")

    def _raw_rows(self) -> Dataset:
        rows = super()._raw_rows()
        if self._given is not None or "prompt" not in rows.column_names:
            return rows
        # In memory: processes would write to the same file of the cache.
        return rows.map(
            _without_prompt, desc="Taking prompts off the completions", keep_in_memory=True, load_from_cache_file=False
        )


class _Dpo(TrainerData):
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")

    def _check_settings(self) -> None:
        trainer = self.trainer
        if trainer._is_vision_dataset:
            raise ValueError("The training set has images, whose rows are not prepared beforehand: not supported.")
        if trainer.args.precompute_ref_log_probs:
            raise ValueError(
                "precompute_ref_log_probs computed the reference for the rows that are there, when the trainer was "
                "made: new rows have none. Set precompute_ref_log_probs=False."
            )
        _check_length_column(trainer)

    def _fits(self, ours: Kind | None, theirs: Kind) -> bool:
        # The trainer takes a prompt that both completions begin with off them, so the two types train the same way.
        pairs = KINDS[:2]
        return ours == theirs or (ours is not None and ours[0] in pairs and theirs[0] in pairs and ours[1] == theirs[1])

    def _shared_columns(self) -> list[str]:
        # Where the trainer split its pairs, the seed has another type than the task.
        return list(kind_of(self.seed.features)[0])


class _Plain(TrainerData):
    @property
    def readable(self) -> Dataset:
        return self.seed.select_columns(self._task_columns)

    def _check_settings(self) -> None:
        trainer = self.trainer
        if self._prepare_rows is None:
            raise ValueError(
                f"{type(trainer).__name__} leaves preparing rows to you: pass prepare=, the function that made its "
                "training set of raw rows (a datasets.Dataset in, a datasets.Dataset out)."
            )
        names = self.base.column_names
        if trainer.args.remove_unused_columns:
            trainer._set_signature_columns_if_needed()
            names = [name for name in names if name in trainer._signature_columns]
        self.columns = tuple(names)
        _check_length_column(trainer)

    def _check_format(self) -> None:
        missing = [name for name in self._task_columns if name not in self.seed.column_names]
        if missing:
            raise ValueError(
                f"The training set has no column {', '.join(missing)}, which the rows of task {self.task.name!r} have: "
                "pass train_dataset=, the raw rows that it was made from, in these columns."
            )
        if "label" in self._task_columns:
            self._check_labels(self.seed.features["label"], list(self.task.labels))

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

    def _as_new(self, rows: Dataset) -> Dataset:
        # A function that looks names of labels up finds none in the task's types.
        return Dataset.from_list(rows.to_list(), features=Features({**rows.features, **self.task.features()}))


_TRAINERS: dict[str, type[TrainerData]] = {"SFTTrainer": _Sft, "RewardTrainer": _Reward, "DPOTrainer": _Dpo}
_SIGNATURES = {
    "SFTTrainer": ["self", "dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name"],
    "RewardTrainer": ["self", "dataset", "processing_class", "args", "dataset_name"],
    "DPOTrainer": ["self", "dataset", "processing_class", "args", "dataset_name"],
}


def trainer_data(
    trainer: Trainer, task: Task, *, train_dataset: Dataset | None = None, prepare: Prepare | None = None
) -> TrainerData:
    """Returns what knows this trainer's training set. The arguments and errors are those of `TrainerData`."""
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
    name = next((kind.__name__ for kind in type(trainer).__mro__ if kind.__module__.split(".")[0] == "trl"), None)
    if name is None:
        return _Plain(trainer, task, train_dataset, prepare)
    if name not in _TRAINERS:
        raise ValueError(f"{name} is not supported: {_SUPPORTED} are.")
    found = list(inspect.signature(type(trainer)._prepare_dataset).parameters)
    if found != _SIGNATURES[name]:
        from trl import __version__

        raise ValueError(
            f"{type(trainer).__name__}._prepare_dataset of trl {__version__} takes {', '.join(found[1:])}; known is "
            f"{', '.join(_SIGNATURES[name][1:])}. How it prepares rows cannot be followed: install the trl that this "
            "release names, or pass the enlarged set to the trainer yourself."
        )
    return _TRAINERS[name](trainer, task, train_dataset, prepare)


def _check_length_column(trainer: Trainer) -> None:
    args = trainer.args
    if (
        args.train_sampling_strategy in ("group_by_length", "batch_rebalance")
        and args.length_column_name in trainer.train_dataset.column_names
    ):
        raise ValueError(
            f"The training set says its rows' lengths in column {args.length_column_name!r}, new rows do not: remove "
            "it, then the trainer measures them."
        )


def _without_prompt(row: dict[str, Any]) -> dict[str, Any]:
    """RewardTrainer puts the prompt in front of both completions, in the raw columns too."""
    prompt = row["prompt"]
    sides = {side: row[side] for side in ("chosen", "rejected")}
    return {side: text[len(prompt) :] if text[: len(prompt)] == prompt else text for side, text in sides.items()}
