"""`FACSynthesisCallback`: a trainer whose training set is measured, and filled with what it is missing, as it trains.

In: a trainer of TRL or transformers, a synthesizer, an anchor set. Out: a run on the enlarged set, step for step the
one that the trainer would have made had it been given that set; the new rows, the enlarged set and a report on disk.
"""

from __future__ import annotations

import functools
import importlib
import json
import math
import os
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from datasets import Dataset, Features, Value, concatenate_datasets
from numpy.typing import ArrayLike
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from .cards import merge_card
from .coverage import FeatureCoverage
from .refill import Refill, read_parquet, rows_digest, write_parquet
from .run_state import Ranks, preserved, replace_text
from .trainer_data import PlannedRows, Prepare, TrainerData, trainer_data

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from .synthesis import FACSynthesizer

RECORD = "fac_synthesis.json"  # in every checkpoint: which new rows the run trains on
_FOLDER = "_fac_synthesis"  # what begins so is not pushed to the Hub with the model: it holds the training set


class FACSynthesisCallback(TrainerCallback):
    """Measures a trainer's training set against an anchor set, has the missing features written, trains on all of it.

        trainer = SFTTrainer(model, args=..., train_dataset=ds)
        trainer.add_callback(FACSynthesisCallback(trainer, synthesizer, anchor=anchor))
        trainer.train()

    The run equals that of a trainer which was given the enlarged set: order, steps, schedule, losses and weights. The
    seed set comes first, the new rows after it. It works for SFTTrainer, RewardTrainer, DPOTrainer and the plain
    Trainer (through `prepare`); what it cannot do exactly it refuses when it is made.

    Under `output_dir`/_fac_synthesis it keeps `rows-<hash>.parquet` (new rows with provenance), `enlarged.parquet`,
    `report.json`, and `work`, from which a run that died goes on; `work` can be deleted once training has ended.
    None of it is pushed to the Hub with the model.
    Checkpoints name the rows by their hash: resuming from one restores them, nothing is written again. Nor is it by a
    second `train()`. With several processes that folder must lie on a file system that all of them share.

    Args:
        trainer: whose training set it is; the callback has to be added to it as well.
        synthesizer: what measures (`synthesizer.featurizer`, which may read the model in training) and writes. Under
            ZeRO-3 and FSDP both need a model of their own.
        anchor: rows (Dataset), or their FeatureCoverage as this featurizer measures them.
        train_dataset: the raw rows that the trainer was given; needed where its own set no longer holds them (packing,
            shuffle_dataset, a formatting_func, rows tokenized by you).
        features: the ids that count, F_task; None for all.
        refresh: "start" fills the set once, before the first step. "epoch" measures and fills again before each epoch,
            with the model as it then is if that is what the featurizer reads. The set has room for max_samples from
            the first step on, of which each time gets an equal share; open places repeat seed rows in turn, so that
            steps and schedule never change.
        every: with "epoch", before every so many epochs.
        max_samples, max_seconds: bounds of all synthesis in the run. max_samples is needed with "epoch".
        on_error: "raise", or "warn" and train on what there is when measuring or writing fails.
        output_dir: by default the trainer's.
        log_rows: log the new rows as a table too, where W&B or Trackio are reported to.
        prepare: raw rows (Dataset) to rows as the training set has them; for the plain Trainer, and for rows that you
            tokenized yourself.

    Attributes:
        new_rows: the rows written, with their provenance, before the trainer's filters; None until then.
        summary: the numbers that were logged, by name.

    Raises: ValueError for whatever is not supported, with the reason and the remedy.
    """

    def __init__(
        self,
        trainer: Trainer,
        synthesizer: FACSynthesizer,
        *,
        anchor: Dataset | FeatureCoverage,
        train_dataset: Dataset | None = None,
        features: ArrayLike | None = None,
        refresh: Literal["start", "epoch"] = "start",
        every: int = 1,
        max_samples: int | None = None,
        max_seconds: float | None = None,
        on_error: Literal["raise", "warn"] = "raise",
        output_dir: str | os.PathLike[str] | None = None,
        log_rows: bool = False,
        prepare: Prepare | None = None,
    ) -> None:
        self.trainer, self.synthesizer, self.anchor = trainer, synthesizer, anchor
        self._refill = Refill(synthesizer, anchor, features)
        self.refresh, self.every, self.on_error = refresh, every, on_error
        self.max_samples, self.max_seconds, self.log_rows = max_samples, max_seconds, log_rows
        self.folder = Path(output_dir or trainer.args.output_dir) / _FOLDER
        self.new_rows: Dataset | None = None
        self.summary: dict[str, float] = {}
        self._record: dict[str, Any] = {}  # what checkpoints carry; empty until there are new rows
        self._report: dict[str, Any] = {}
        self._planned: PlannedRows | None = None
        self._checkpoint: str | None = None
        self._unlogged = False
        _check_arguments(self)
        with self._preserved():
            self._data = trainer_data(trainer, synthesizer.task, train_dataset=train_dataset, prepare=prepare)
            self._refill.check(self._data.readable)
        if refresh == "epoch":
            _check_can_grow(trainer, self._data)
        # The Trainer fixes steps, schedule and the resumed position by its loader, before any callback is called.
        self._wrap("train", self._train)
        self._wrap("get_train_dataloader", self._get_train_dataloader)
        self._wrap("save_model", self._save_model)
        self._wrap("create_model_card", self._create_model_card)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._log()  # earlier not every logger would take it

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        epoch = int(state.epoch or 0)
        if self._planned is None or epoch % self.every or epoch <= self._record.get("epoch", -1):
            return
        with self._preserved():
            rows = self._filled(epoch)
            prepared = self._fill_places(rows)
        self._keep(rows, dropped=len(rows) - prepared, epoch=epoch)
        self._log()

    def _wrap(self, name: str, wrapper: Callable[..., Any]) -> None:
        original = getattr(self.trainer, name)

        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            # A callback that was not added, or was removed, does nothing.
            if self not in self.trainer.callback_handler.callbacks:
                return original(*args, **kwargs)
            return wrapper(original, *args, **kwargs)

        setattr(self.trainer, name, wrapped)

    def _train(
        self, original: Callable[..., Any], resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        self._checkpoint = resume_from_checkpoint or None
        if resume_from_checkpoint is True:
            self._checkpoint = get_last_checkpoint(self.trainer.args.output_dir)
        return original(resume_from_checkpoint, *args, **kwargs)

    def _get_train_dataloader(self, original: Callable[[], Any]) -> Any:
        if self.trainer.is_in_train:
            record = None if self._checkpoint is None else self._read_record(Path(self._checkpoint))
            with self._preserved():
                if self.refresh == "epoch":
                    self._plan(record)
                elif self.new_rows is None:
                    self._enlarge(record)
            if record is not None and record["rows"] != self._record["rows"]:
                raise ValueError(
                    f"{self._checkpoint} was trained on other new rows than this trainer has already: resume with a "
                    "new trainer."
                )
        return original()

    def _enlarge(self, record: dict[str, Any] | None) -> None:
        if self.trainer.train_dataset is not self._data.base:
            raise ValueError(
                "The trainer got another training set after the callback was made: make the callback last."
            )
        rows = self._filled(0) if record is None else self._restored(record)
        self.trainer.train_dataset, dropped = self._data.enlarged(rows)
        if record is None:
            self._keep(rows, dropped=dropped, epoch=0)

    def _plan(self, record: dict[str, Any] | None) -> None:
        if self._planned is None:
            self._planned = PlannedRows(
                self.trainer.train_dataset.select_columns(list(self._data.columns)), self.max_samples
            )
            self.trainer.train_dataset = self._planned
        if record is not None:
            self._fill_places(self._restored(record))

    def _fill_places(self, rows: Dataset) -> int:
        """How many rows are left to train on."""
        prepared = self._data.prepared(rows) if len(rows) else None
        self._planned.fill(prepared)
        return 0 if prepared is None else len(prepared)

    def _filled(self, epoch: int) -> Dataset:
        """All new rows, those of before first, the same in every process; they are on disk then."""
        before = self._refill.none() if self.new_rows is None else self.new_rows
        spent, start = self._record.get("seconds", 0.0), time.monotonic()
        ranks = Ranks.meet(self.folder / "work", self.trainer.args)
        try:
            added, self._report = self._refill.run(
                self._data.readable, before, ranks, turn=epoch,
                max_samples=self._budget(len(before), epoch),
                max_seconds=None if self.max_seconds is None else max(1.0, self.max_seconds - spent),
            )  # fmt: skip
            rows = concatenate_datasets([before, added]) if len(before) else added
            self._save_rows(rows)
            seconds = ranks.agree(rows_digest(rows), time.monotonic() - start)
        except BaseException as error:
            ranks.fail(error)
            if self.on_error == "raise" or not isinstance(error, Exception):
                raise
            ranks.wait_for_all()
            warnings.warn(f"FAC synthesis failed; the run has {len(before):,} new rows: {error}", stacklevel=2)
            rows, seconds, self._report = before, 0.0, {"error": f"{type(error).__name__}: {error}"}
            self._save_rows(rows)
        self._report["seconds"] = spent + seconds
        return rows

    def _budget(self, n: int, epoch: int) -> int | None:
        """How many samples may be written now: an equal share for each time that is left."""
        if self.max_samples is None or self.refresh == "start":
            return self.max_samples
        times = len(range(epoch, math.ceil(self.trainer.args.num_train_epochs), self.every))
        return math.ceil((self.max_samples - n) / times)

    def _save_rows(self, rows: Dataset) -> None:
        if self.trainer.args.process_index == 0:
            write_parquet(rows, self.folder / f"rows-{rows_digest(rows)}.parquet")

    def _keep(self, rows: Dataset, *, dropped: int, epoch: int) -> None:
        """What the rows are called in checkpoints, what is logged of them, and both with the whole set on disk."""
        self.new_rows = rows
        seconds = self._report["seconds"]
        self.summary = self._report.get("numbers", {}) | {
            "fac/new_rows": len(rows), "fac/dropped": dropped, "fac/seconds": seconds
        }  # fmt: skip
        self._record = {
            "rows": rows_digest(rows), "epoch": epoch, "refresh": self.refresh, "max_samples": self.max_samples,
            "seconds": seconds, "summary": self.summary,
        }  # fmt: skip
        self._unlogged = True
        if self.trainer.args.process_index == 0:
            report = {name: value for name, value in self._report.items() if name != "numbers"}
            report |= {"rows": self._record["rows"], "dropped": dropped, "epoch": epoch}
            replace_text(self.folder / "report.json", json.dumps(report, indent=1))
            write_parquet(_all_rows(self._data.seed, rows), self.folder / "enlarged.parquet")

    def _read_record(self, checkpoint: Path) -> dict[str, Any]:
        path = checkpoint / RECORD
        if not path.exists():
            raise FileNotFoundError(
                f"{checkpoint} does not say which new rows it was trained on ({RECORD} is not there): resume without "
                "the callback, or from a checkpoint that was saved with it."
            )
        record = json.loads(path.read_text())
        for name in ("refresh", "max_samples")[: 1 + (self.refresh == "epoch")]:
            if record[name] != getattr(self, name):
                raise ValueError(
                    f"{checkpoint} was saved with {name}={record[name]!r}, the callback has {getattr(self, name)!r}: "
                    "the run could not go on as it was."
                )
        return record

    def _restored(self, record: dict[str, Any]) -> Dataset:
        name = f"rows-{record['rows']}.parquet"
        folders = [self.folder, Path(self._checkpoint).parent / _FOLDER]
        path = next((folder / name for folder in folders if (folder / name).exists()), None)
        if path is None:
            raise FileNotFoundError(
                f"{self._checkpoint} was trained on new rows that are not there: {name} is neither in {folders[0]} nor "
                f"in {folders[1]}. Copy it there, or start again without resuming."
            )
        rows = read_parquet(path)
        if rows_digest(rows) != record["rows"]:
            raise ValueError(f"{path} does not hold the rows that {self._checkpoint} was trained on: it was changed.")
        if path.parent != self.folder:  # the checkpoints to come are beside this one
            self.folder.mkdir(parents=True, exist_ok=True)
            self._save_rows(rows)
        self.new_rows, self._record, self.summary = rows, record, record["summary"]
        return rows

    def _save_model(
        self, original: Callable[..., None], output_dir: str | None = None, *args: Any, **kwargs: Any
    ) -> None:
        # on_save comes later, when a checkpoint is whole, and may be on its way to the Hub.
        original(output_dir, *args, **kwargs)
        in_checkpoint = output_dir is not None and Path(output_dir).name.startswith(f"{PREFIX_CHECKPOINT_DIR}-")
        if in_checkpoint and self._record and self.trainer.args.should_save:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            replace_text(Path(output_dir) / RECORD, json.dumps(self._record))

    def _log(self) -> None:
        if self._unlogged:
            # Not the trainer's own: TRL's would close its running averages with it.
            Trainer.log(self.trainer, dict(self.summary))
            if self.log_rows and self.trainer.is_world_process_zero():
                _log_table(self.new_rows, self.trainer.args.report_to)
            self._unlogged = False

    def _create_model_card(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        path = Path(self.trainer.args.output_dir) / "README.md"
        if self.summary and self.trainer.is_world_process_zero() and path.exists():
            card = merge_card(path.read_text(encoding="utf-8"), metadata={"tags": ["hf_fac"]}, section="synthesis",
                              body=_paragraph(self.summary))  # fmt: skip
            path.write_text(card, encoding="utf-8")

    def _preserved(self) -> AbstractContextManager[None]:
        trainer, featurizer = self.trainer, self.synthesizer.featurizer
        models = {id(model): model for model in (trainer.model, featurizer.model)}
        tokenizers = {id(t): t for t in (trainer.processing_class, featurizer.tokenizer)}
        return preserved(list(models.values()), list(tokenizers.values()))


def _check_arguments(callback: FACSynthesisCallback) -> None:
    trainer, anchor, featurizer = callback.trainer, callback.anchor, callback.synthesizer.featurizer

    def need(condition: bool, problem: str) -> None:
        if not condition:
            raise ValueError(problem)

    refresh, every = callback.refresh, callback.every
    need(refresh in ("start", "epoch"), f'refresh is {refresh!r}; it must be "start" or "epoch".')
    need(every >= 1, f"every is {every}; it must be at least 1.")
    need(every == 1 or refresh == "epoch", f'every is {every}, which counts epochs: it goes with refresh="epoch".')
    need(callback.on_error in ("raise", "warn"), f'on_error is {callback.on_error!r}; it must be "raise" or "warn".')
    for name in ("max_samples", "max_seconds"):
        value = getattr(callback, name)
        need(value is None or value > 0, f"{name} is {value}; it must be positive, or None for no bound.")
    need(
        refresh == "start" or callback.max_samples is not None,
        'refresh="epoch" fixes the length of the training set before the first step: pass max_samples=.',
    )
    others = [c for c in trainer.callback_handler.callbacks if isinstance(c, FACSynthesisCallback)]
    need(not others, "The trainer has a FACSynthesisCallback already: one is all it takes.")
    if not isinstance(anchor, Dataset | FeatureCoverage):
        raise TypeError(f"anchor is a {type(anchor).__name__}; it must be a datasets.Dataset or a FeatureCoverage.")
    need(not isinstance(anchor, Dataset) or len(anchor) > 0, "The anchor set has no rows.")
    trained = {id(parameter) for parameter in trainer.model.parameters()}
    shared = any(id(parameter) in trained for parameter in featurizer.model.parameters())
    plugin = trainer.accelerator.state.deepspeed_plugin
    need(
        not shared or not (trainer.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3)),
        "Under ZeRO-3 and FSDP each process holds a part of the model in training: measure and write with a model of "
        "its own (SAEFeaturizer.from_pretrained).",
    )
    if isinstance(anchor, FeatureCoverage):
        need(
            refresh == "start" or not shared,
            "The model in training measures again each time, so the anchor set has to be measured again too: pass its "
            "rows as anchor=.",
        )
        # Now, and not when all else has been computed.
        FeatureCoverage(featurizer.measurement) | anchor


def _check_can_grow(trainer: Trainer, data: TrainerData) -> None:
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


def _paragraph(summary: dict[str, float]) -> str:
    numbers = {name.removeprefix("fac/"): value for name, value in summary.items()}
    text = f"{numbers['new_rows']:,} rows of the training set were synthesized for features that it did not activate"
    if "before" in numbers:
        text += (
            f": of the {numbers['missing']:,} that it was missing against an anchor set, {numbers.get('filled', 0):,} "
            f"were filled. Feature Activation Coverage (FAC) went from {numbers['before']:.3f} to "
            f"{numbers['after']:.3f}"
        )
    return f"## FAC Synthesis\n\n{text} ([arXiv 2602.10388](https://arxiv.org/abs/2602.10388), hf-fac)."


def _log_table(rows: Dataset, report_to: list[str]) -> None:
    """Log rows to the trackers that have tables, conversations as JSON."""
    table = rows.to_pandas()
    for name, kind in rows.features.items():
        if not isinstance(kind, Value):
            table[name] = [json.dumps(value, ensure_ascii=False) for value in rows[name]]
    for name in ("wandb", "trackio"):
        if name in report_to:
            tracker = importlib.import_module(name)
            tracker.log({"fac/rows": tracker.Table(dataframe=table)})


def _all_rows(seed: Dataset, new: Dataset) -> Dataset:
    """Seed and new rows; where the two say a column differently (more keys in messages), in the seed's way."""
    features = {name: seed.features.get(name, kind) for name, kind in new.features.items()}
    return concatenate_datasets([seed, new.cast(Features(features))])
