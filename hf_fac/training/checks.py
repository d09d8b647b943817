"""What `FACSynthesisCallback` refuses or warns of when it is made, before anything is measured or written."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from datasets import Dataset

from ..coverage.coverage import FeatureCoverage
from ..inputs.rows import RowError
from ..storage.differences import differences
from .model_in_training import is_measuring, is_writing

if TYPE_CHECKING:
    from transformers import Trainer

    from ..features.featurizer import SAEFeaturizer
    from ..synthesis.synthesizer import FACSynthesizer
    from .training_set import TrainingSet


def check_anchor(anchor: Dataset | FeatureCoverage, synthesizer: FACSynthesizer) -> None:
    """Raises: TypeError for an anchor set of another type; ValueError for one without rows, for a coverage that another
    featurizer measured, and for a coverage where a dictionary is to be built from rows."""
    if not isinstance(anchor, Dataset | FeatureCoverage):
        raise TypeError(f"anchor is a {type(anchor).__name__}; it must be a Dataset or a FeatureCoverage.")
    if isinstance(anchor, Dataset):
        _need(len(anchor) > 0, "The anchor set has no rows.")
        return
    found = differences(anchor.measurement, synthesizer.featurizer.measurement)
    _need(not found, f"The anchor set was measured with another featurizer ({found}): pass its rows as anchor=.")
    _need(
        synthesizer.dictionary is not None,
        "Without a dictionary the synthesizer builds one from the anchor set: pass rows as anchor=, or make the "
        "FACSynthesizer with dictionary=.",
    )


def check_readable(synthesizer: FACSynthesizer, **sets: Dataset | FeatureCoverage) -> None:
    """Raises: RowError where the featurizer cannot read the first row of a set."""
    reader = synthesizer.featurizer.reader
    for name, rows in sets.items():
        if isinstance(rows, Dataset):
            try:
                reader([synthesizer.task.featurizer_row(rows[0], reader.pool_over)])
            except RowError as error:
                raise RowError(f"The {name} set: {error}") from error


def check_models(
    trainer: Trainer, synthesizer: FACSynthesizer, anchor: Dataset | FeatureCoverage, *, refresh: str
) -> None:
    """Raises: ValueError where the model in training can neither measure nor write, or no longer match the anchor."""
    measures, writes = is_measuring(trainer, synthesizer), is_writing(trainer, synthesizer)
    plugin = trainer.accelerator.state.deepspeed_plugin
    in_shards = (
        trainer.is_fsdp_enabled
        or (plugin is not None and plugin.zero_stage == 3)
        # Of transformers 5.23 and later.
        or getattr(trainer, "is_distributed_loading_by_transformers", False)
    )
    _need(
        not (in_shards and (measures or writes)),
        "Under ZeRO-3, FSDP and where a model is loaded in shards each process holds a part of the model in training: "
        "measure and write with a model of its own (SAEFeaturizer.from_pretrained, LocalChat.from_pretrained).",
    )
    _need(
        refresh == "start" or not measures or isinstance(anchor, Dataset),
        "The model in training measures again each time, so the anchor set has to be measured again too: pass its "
        "rows as anchor=.",
    )


def check_output_folder(folder: Path, trainer_folder: Path) -> None:
    """Raises: ValueError for a folder whose content the trainer pushes to the Hub: all but what starts with "_"."""
    folder, trainer_folder = folder.resolve(), trainer_folder.resolve()
    inside = folder.relative_to(trainer_folder).parts if folder.is_relative_to(trainer_folder) else ()
    _need(
        not inside or inside[0].startswith("_"),
        f"output_dir is {folder}, inside the trainer's: with push_to_hub the training set would be pushed with the "
        f"model. Take a folder outside {trainer_folder}, or one in it that starts with '_'.",
    )


def check_can_grow(trainer: Trainer, training_set: TrainingSet) -> None:
    """Raises: ValueError where steps would change with the set, or new rows not be seen."""
    args = trainer.args
    problems = {
        "a run of one epoch has no second one: train longer": args.max_steps <= 0 and args.num_train_epochs <= 1,
        "max_steps leaves open how many epochs there are: set num_train_epochs": args.max_steps > 0,
        "packing and shuffle_dataset rearrange all rows: leave them out": training_set.order != "unchanged",
        f"train_sampling_strategy={args.train_sampling_strategy!r} sorts by lengths that change": (
            args.train_sampling_strategy in ("group_by_length", "batch_rebalance")
        ),
        "persistent workers never see the new rows: set dataloader_persistent_workers=False": (
            args.dataloader_persistent_workers and args.dataloader_num_workers > 0
        ),
    }
    for problem, found in problems.items():
        _need(not found, f'refresh="epoch": {problem}, or take refresh="start".')


def warn_of_cut_rows(trainer: Trainer, training_set: TrainingSet, featurizer: SAEFeaturizer) -> None:
    """Warn (UserWarning) where the trainer truncates rows that the featurizer reads further."""
    import pyarrow.compute as pc

    reader = featurizer.reader
    limit = getattr(trainer.args, "max_length", None)
    measured = reader.max_length if reader.stride is None else None
    ids = [name for name in ("input_ids", "prompt_ids", "chosen_ids") if name in training_set.columns]
    drops = ids == ["chosen_ids"]  # RewardTrainer drops long pairs whole
    splits = training_set.order == "packed" and trainer.args.packing_strategy != "bfd"
    if limit is None or drops or splits or (measured is not None and measured <= limit):
        return
    # SFTTrainer truncates when it prepares rows, so that none is longer than the limit; DPOTrainer in its collator.
    for table in training_set.prepared.select_columns(ids).with_format("arrow").iter(batch_size=1000):
        if (sum(pc.list_value_length(column).to_numpy() for column in table.columns) >= limit).any():
            warnings.warn(
                f"The trainer cuts rows at max_length={limit:,} tokens, the featurizer measures "
                f"{'all' if measured is None else f'{measured:,}'}: truncated tokens would count as covered. Make "
                f"the featurizer with max_length={limit}.",
                stacklevel=3,
            )
            return


def _need(condition: bool, problem: str) -> None:
    if not condition:
        raise ValueError(problem)
