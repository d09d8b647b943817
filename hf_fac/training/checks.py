"""What `FACSynthesisCallback` refuses, or warns of, when it is made, and not in the third hour."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset

from ..coverage.coverage import FeatureCoverage
from ..storage.validation import check_counts

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback

    from ..features.featurizer import SAEFeaturizer
    from .training_set import TrainerData


def check_arguments(callback: Any, kind: type[TrainerCallback]) -> None:
    """Raises: ValueError, TypeError for arguments that do not fit each other or the trainer.

    Args:
        kind: of which a trainer takes one.
    """
    trainer, anchor, featurizer = callback.trainer, callback.anchor, callback.synthesizer.featurizer

    def need(condition: bool, problem: str) -> None:
        if not condition:
            raise ValueError(problem)

    refresh, every = callback.refresh, callback.every
    need(refresh in ("start", "epoch"), f'refresh is {refresh!r}; it must be "start" or "epoch".')
    check_counts(every=every, max_samples=callback.max_samples)
    need(every == 1 or refresh == "epoch", f'every is {every}, which counts epochs: it goes with refresh="epoch".')
    need(callback.on_error in ("raise", "warn"), f'on_error is {callback.on_error!r}; it must be "raise" or "warn".')
    seconds = callback.max_seconds
    need(seconds is None or seconds > 0, f"max_seconds is {seconds}; it must be positive, or None for no bound.")
    need(
        refresh == "start" or callback.max_samples is not None,
        'refresh="epoch" fixes the length of the training set before the first step: pass max_samples=.',
    )
    others = [c for c in trainer.callback_handler.callbacks if isinstance(c, kind)]
    need(not others, "The trainer has a FACSynthesisCallback already: one is all it takes.")
    if not isinstance(anchor, Dataset | FeatureCoverage):
        raise TypeError(f"anchor is a {type(anchor).__name__}; it must be a datasets.Dataset or a FeatureCoverage.")
    need(not isinstance(anchor, Dataset) or len(anchor) > 0, "The anchor set has no rows.")
    _check_folders(Path(trainer.args.output_dir).resolve(), callback.folder.parent.resolve(), need)
    reads, writes = (is_in_training(trainer, part) for part in (featurizer.model, callback.synthesizer.chat))
    plugin = trainer.accelerator.state.deepspeed_plugin
    in_parts = (
        trainer.is_fsdp_enabled
        or (plugin is not None and plugin.zero_stage == 3)
        # Of transformers 5.23 and later.
        or getattr(trainer, "is_distributed_loading_by_transformers", False)
    )
    need(
        not (in_parts and (reads or writes)),
        "Under ZeRO-3, FSDP and where a model is loaded in shards each process holds a part of the model in training: "
        "measure and write with a model of its own (SAEFeaturizer.from_pretrained, LocalChat.from_pretrained).",
    )
    need(
        refresh == "start" or trainer.model_init is None or not (reads or writes),
        'refresh="epoch": with model_init each train() makes a new model, which is not the one that the synthesizer '
        "has: pass the trainer a model, or let a model of its own measure and write.",
    )
    if isinstance(anchor, FeatureCoverage):
        need(
            refresh == "start" or not reads,
            "The model in training measures again each time, so the anchor set has to be measured again too: pass its "
            "rows as anchor=.",
        )
        # Now, and not when all else has been computed.
        FeatureCoverage(featurizer.measurement) | anchor


def check_can_grow(trainer: Trainer, data: TrainerData) -> None:
    """Raises: ValueError where steps would change with the set, or new rows not be seen."""
    args = trainer.args
    problems = {
        "a run of one epoch has no second one: train longer": args.max_steps <= 0 and args.num_train_epochs <= 1,
        "max_steps leaves open how many epochs there are: set num_train_epochs": args.max_steps > 0,
        "packing and shuffle_dataset arrange all rows anew: leave them out": data.arranged,
        f"train_sampling_strategy={args.train_sampling_strategy!r} sorts by lengths that change": (
            args.train_sampling_strategy in ("group_by_length", "batch_rebalance")
        ),
        "persistent workers never see the new rows: set dataloader_persistent_workers=False": (
            args.dataloader_persistent_workers and args.dataloader_num_workers > 0
        ),
    }
    for problem, found in problems.items():
        if found:
            raise ValueError(f'refresh="epoch": {problem}, or take refresh="start".')


def warn_of_cut_rows(trainer: Trainer, data: TrainerData, featurizer: SAEFeaturizer) -> None:
    """Warn (UserWarning) where the trainer cuts a row of its set that is measured further."""
    import pyarrow.compute as pc

    reader, limit = featurizer.reader, getattr(trainer.args, "max_length", None)
    measured = reader.max_length if reader.stride is None else None
    ids = [name for name in ("input_ids", "prompt_ids", "chosen_ids") if name in data.columns]
    drops = ids == ["chosen_ids"]  # RewardTrainer
    splits = data.arranged and trainer.args.packing and trainer.args.packing_strategy != "bfd"
    if limit is None or drops or splits or (measured is not None and measured <= limit):
        return
    # SFTTrainer cuts them when it prepares them, so that only the limit is left; DPOTrainer later.
    for table in data.base.select_columns(ids).with_format("arrow").iter(batch_size=1000):
        if (sum(pc.list_value_length(column).to_numpy() for column in table.columns) >= limit).any():
            warnings.warn(
                f"The trainer cuts rows at max_length={limit:,} tokens, the featurizer measures "
                f"{'all' if measured is None else f'{measured:,}'}: what is not trained on counts as covered. Make "
                f"the featurizer with max_length={limit}.",
                stacklevel=3,
            )
            return


def is_in_training(trainer: Trainer, model: Any) -> bool:
    """Whether a model, or that of a chat (an endpoint has none), shares parameters with the trainer's."""
    from torch import nn

    if not isinstance(model, nn.Module):
        model = getattr(model, "model", None)
    trained = {id(parameter) for parameter in trainer.model.parameters()}
    return isinstance(model, nn.Module) and any(id(parameter) in trained for parameter in model.parameters())


def _check_folders(trainers: Path, ours: Path, need: Callable[[bool, str], None]) -> None:
    """Of the trainer's folder all goes to the Hub but what begins with "_" at its top."""
    inside = ours.relative_to(trainers).parts if ours.is_relative_to(trainers) else ()
    need(
        not inside or inside[0].startswith("_"),
        f"output_dir is {ours}, inside the trainer's: with push_to_hub the training set would be pushed with the "
        f"model. Take a folder outside {trainers}, or one in it that begins with '_'.",
    )
