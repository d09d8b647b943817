"""How a trainer's training set takes new rows: what it trains on, how it prepared the rows it has, and where those are
raw.

In: a trainer, the task that new rows are written for, raw rows. Out: the set that the trainer would have made of seed
and new rows together, row by row the same. The one room that knows TRL's private preparation: what it does not know is
refused when it is made, not in the third hour.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, Features, Value, concatenate_datasets

if TYPE_CHECKING:
    from transformers import Trainer

    from .tasks import Task

Prepare = Callable[[Dataset], Dataset]

_SUPPORTED = "SFTTrainer, RewardTrainer, DPOTrainer and the plain Trainer"
# By their columns, the first that fits: TRL's data-set types.
_KINDS = (
    ("prompt", "chosen", "rejected"),
    ("chosen", "rejected"),
    ("prompt", "completion"),
    ("messages",),
    ("text",),
)
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
        kind = _kind(self.seed.features)
        names = [name for name in (*kind[0], "tools", "chat_template_kwargs") if name in self.seed.column_names]
        return self.seed.select_columns(names)

    def enlarged(self, rows: Dataset) -> tuple[Dataset, int]:
        """Returns the trainer's set with the new rows at its end, and how many of them its own filters dropped."""
        base = self.base
        if not len(rows):
            return base, 0
        prepared = self.prepared(rows)
        joined = concatenate_datasets([base.with_format(None), prepared])
        columns = None if set(base.format["columns"]) == set(base.column_names) else base.format["columns"]
        joined = joined.with_format(
            base.format["type"], columns=columns, output_all_columns=base.format["output_all_columns"],
            **base.format["format_kwargs"],
        )  # fmt: skip
        return joined, len(rows) - len(prepared)

    def prepared(self, rows: Dataset) -> Dataset:
        """Returns new rows as rows of the trainer's set: the columns that it trains on, in the set's own types."""
        features = self.base.features
        prepared = self._prepared(rows.select_columns(self._task_columns)).with_format(None)
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
            return self._given
        base = self.base
        return base.with_format(None).select_columns([name for name in base.column_names if name not in _PREPARED])

    def _check_format(self) -> None:
        """New rows of another kind may train too, but another way: prompts without a mask, say."""
        ours, theirs = _kind(self.task.features()), _kind(self.seed.features)
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

    def _fits(self, ours: _Kind | None, theirs: _Kind) -> bool:
        return ours == theirs

    def _check_preparation(self) -> None:
        """A row that is there goes the way of the new ones: what comes out must be what the trainer trains on."""
        probe = self.seed.select([0])
        missing = [name for name in self._task_columns if name not in probe.column_names]
        if missing:
            raise ValueError(f"The training set has no column {', '.join(missing)}, which the task's rows have.")
        prepared = self._prepared(probe.select_columns(self._task_columns))
        _need_columns(prepared.column_names, self.columns, self.base.column_names)


class _Sft(TrainerData):
    columns = ("input_ids", "labels")

    def _check_settings(self) -> None:
        trainer = self.trainer
        if trainer._is_vision_dataset:
            raise ValueError("The training set has images, whose rows are not prepared beforehand: not supported.")
        self._prepares_itself = not trainer._skip_prepare_dataset
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
        if self._prepare_rows is None and not trainer.args.packing and _kind(self.base.features) is None:
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
        new = rows.select_columns(self._task_columns)
        new = new.cast(Features({name: self.seed.features[name] for name in self._task_columns}))
        whole = self._prepared(concatenate_datasets([self.seed, new]))
        packed = self.trainer.args.packing  # drops nothing, and its rows are not ours to count
        return whole, 0 if packed else len(rows) + len(self.base) - len(whole)

    def _check_format(self) -> None:
        super()._check_format()
        field = self.trainer.args.dataset_text_field
        if _kind(self.seed.features) == (("text",), False) and field != "text":
            raise ValueError(f"dataset_text_field is {field!r}, new rows have their text in 'text': rename the column.")

    def _check_preparation(self) -> None:
        if not self.arranged:
            return super()._check_preparation()
        base, again = self.base, self._prepared(self.seed)
        same = len(again) == len(base) and all(
            again[i]["input_ids"] == base[i]["input_ids"] for i in {0, len(base) - 1}
        )
        if not same:
            raise ValueError(
                f"train_dataset= is not what the trainer was given: prepared, its {len(self.seed):,} rows make "
                f"{len(again):,}, the trainer has {len(base):,}, or others."
            )


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

    def _fits(self, ours: _Kind | None, theirs: _Kind) -> bool:
        # The trainer takes a prompt that both completions begin with off them, so the two types train the same way.
        pairs = _KINDS[:2]
        return ours == theirs or (ours is not None and ours[0] in pairs and theirs[0] in pairs and ours[1] == theirs[1])

    def _check_preparation(self) -> None:
        # Where the trainer split its pairs, the seed has another type than the task.
        if _kind(self.seed.features) == _kind(self.task.features()):
            super()._check_preparation()


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


_Kind = tuple[tuple[str, ...], bool]  # the columns that say it, and whether they are conversations
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


def _kind(features: Features) -> _Kind | None:
    for names in _KINDS:
        if set(names) <= set(features):
            return names, not isinstance(features[names[-1]], Value)
    return None


def _words(kind: _Kind | None) -> str:
    if kind is None:
        return "of no type that TRL knows"
    return f"{'conversations' if kind[1] else 'plain text'} with the columns {', '.join(kind[0])}"


def _need_columns(found: Iterable[str], wanted: Iterable[str], there: Iterable[str]) -> None:
    for names, problem in ((found, "preparing a row gives"), (there, "the training set has")):
        missing = [name for name in wanted if name not in names]
        if missing:
            raise ValueError(f"{problem} the columns {', '.join(names)}; {', '.join(missing)} is trained on.")


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
