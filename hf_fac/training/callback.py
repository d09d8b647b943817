"""`FACSynthesisCallback`: a trainer measures its training set and fills it with what it is missing, as it trains.

In: a trainer of TRL or transformers, a synthesizer, an anchor set. Out: a run on the enlarged set, step for step the
run that the trainer would have made with that set; the new rows, the enlarged set and a report on disk.
"""

from __future__ import annotations

import functools
import math
import os
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from datasets import Dataset, concatenate_datasets
from numpy.typing import ArrayLike
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from ..chat.endpoint import ChatError
from ..coverage.coverage import FeatureCoverage
from ..features.fingerprint import TensorHash
from ..hub.cards import merge_card
from ..storage.cache import content_key
from ..storage.files import write_whole
from ..storage.parquet import rows_digest
from . import checks
from .checks import CallbackSettings
from .coverage_round import SAME_BOUNDS, Bounds, CoverageRound, RoundReport, empty_rows
from .processes import ProcessGroup, preserved, reraise_oom
from .run_folder import (
    FOLDER,
    RECORD,
    CheckpointRecord,
    check_same_run,
    find_rows,
    next_record,
    read_record,
    save_rows,
)
from .summary import log_table, model_card_section, write_enlarged, write_report
from .trainers import training_set_of
from .training_set import FixedLengthDataset, Prepare, PreparedRows

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from ..synthesis.synthesizer import FACSynthesizer


class FACSynthesisCallback(TrainerCallback):
    """Measures a trainer's training set against an anchor set, has the missing features written, trains on all of it.

        trainer = SFTTrainer(model, args=..., train_dataset=ds)
        trainer.add_callback(FACSynthesisCallback(trainer, synthesizer, anchor=anchor))
        trainer.train()

    The run equals that of a trainer which was given the enlarged set: order, steps, schedule, losses and weights. The
    trainer's own rows come first, the new rows after them. It works for SFTTrainer, RewardTrainer, DPOTrainer and the
    plain Trainer (through `prepare`); what it cannot do exactly it refuses when it is made.

    Under `output_dir`/_fac_synthesis it keeps `rows-<hash>.parquet` (new rows with provenance), `enlarged.parquet`,
    `report.json` (a list with one entry for each round), and `work`, from which a killed run goes on; `work` can be
    deleted after training. None of it is pushed to the Hub with the model.
    Checkpoints name the rows by their hash: a run resumed from one trains on the same rows and writes nothing again. A
    second `train()` reuses the rows too. With several processes the folder must lie on a file system that all share.

    Args:
        trainer: whose training set it is; the callback has to be added to it as well.
        synthesizer: measures (`synthesizer.featurizer`, which may read the model in training) and writes. Under ZeRO-3
            and FSDP both need a model of their own. Its max_length should be the trainer's (a UserWarning says so),
            otherwise truncated tokens would count as covered.
        anchor: rows (Dataset), or their FeatureCoverage as this featurizer measures them. Where the synthesizer has no
            threshold it is calibrated on them, where it has no dictionary one is built from the rows.
        train_dataset: the raw rows that the trainer was given; needed where its own set no longer holds them (packing,
            shuffle_dataset, a formatting_func, rows tokenized by you).
        features: the ids that count, F_task; None for all.
        refresh: "start" fills the set once, before the first step. "epoch" measures and fills again before each epoch,
            with the model as it is then if the featurizer reads that one. The set has room for max_samples from the
            first step on, of which each round gets an equal share; free places repeat the trainer's own rows in turn,
            so that steps and schedule never change. Exhausted features are written for again only where the model that
            measures or writes is the one in training.
        every: with "epoch", before every so many epochs.
        max_samples, max_seconds: bounds of all synthesis in the run. max_samples is needed with "epoch".
        on_error: "raise", or "warn" when measuring or writing fails, and train on what was written by then.
        output_dir: by default the trainer's; not a folder inside it, which would be pushed to the Hub with the model.
        log_rows: log the new rows as a table too, where W&B or Trackio are reported to.
        prepare: raw rows (Dataset) to rows as the training set has them; for the plain Trainer, and for rows that you
            tokenized yourself.

    Attributes:
        new_rows: the rows written, with their provenance, before the trainer's filters; None before the first round.
        summary: the numbers that were logged, by name. "fac/before" and "fac/missing" are of the first round, all
            others of the run so far; "fac/after" counts the rows that the trainer keeps, "fac/dropped" are the others;
            a feature is "fac/activated" when a row of its own is kept.

    Raises: ValueError, TypeError for whatever is not supported, with the reason and the remedy.
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
        self.settings = CallbackSettings(
            refresh=refresh, every=every, features=features, max_samples=max_samples, max_seconds=max_seconds,
            on_error=on_error, log_rows=log_rows,
        )  # fmt: skip
        checks.check_types(trainer, synthesizer, anchor)
        if any(isinstance(callback, FACSynthesisCallback) for callback in trainer.callback_handler.callbacks):
            raise ValueError("The trainer has a FACSynthesisCallback already: one is all it takes.")
        self.trainer, self.synthesizer, self._anchor = trainer, synthesizer, anchor
        self.folder = Path(output_dir or trainer.args.output_dir) / FOLDER
        checks.check_output_folder(self.folder.parent, Path(trainer.args.output_dir))
        checks.check_features(features, synthesizer)
        checks.check_models(trainer, synthesizer, anchor, refresh=refresh)
        self.new_rows: Dataset | None = None
        self._kept: list[Dataset] = []  # of each round, the new rows that the trainer keeps
        self._set: Dataset | FixedLengthDataset | None = None  # the trainer's, once the callback has replaced it
        self._checkpoint: Path | None = None  # that train() resumes from
        self._unlogged = False
        with self._preserved():
            self._training_set = training_set_of(
                trainer, synthesizer.task, train_dataset=train_dataset, prepare=prepare
            )
            checks.check_readable(synthesizer, training=self._training_set.content, anchor=anchor)
            self._record = CheckpointRecord.before_first_round(
                self._training_set.digest, self._featurizer_digest(), refresh, max_samples
            )
        if refresh == "epoch":
            checks.check_can_grow(trainer, self._training_set)
        checks.warn_of_cut_rows(trainer, self._training_set, synthesizer.featurizer)
        # The Trainer computes steps, schedule and resumed position from its loader, before any callback is called.
        self._wrap("train", self._train)
        self._wrap("get_train_dataloader", self._get_train_dataloader)
        self._wrap("save_model", self._save_model)
        self._wrap("create_model_card", self._create_model_card)

    @property
    def summary(self) -> dict[str, float]:
        return self._record.summary

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args is not self.trainer.args:
            warnings.warn(
                "This FACSynthesisCallback was made for another trainer and does nothing here: make it with the "
                "trainer that it is added to.",
                stacklevel=2,
            )
        else:
            self._log()  # not all loggers are ready before

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args is not self.trainer.args or self.settings.refresh == "start":
            return
        epoch = int(state.epoch or 0)
        if epoch % self.settings.every == 0 and epoch > self._record.epoch:
            with self._preserved():
                self.trainer.train_dataset.add(self._run_round(epoch).tokenized)
            self._log()

    def _wrap(self, name: str, wrapper: Callable[..., Any]) -> None:
        original = getattr(self.trainer, name)

        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if self in self.trainer.callback_handler.callbacks:
                return wrapper(original, *args, **kwargs)
            if name == "train":
                warnings.warn(
                    "A FACSynthesisCallback was made for this trainer and is not among its callbacks: the training set "
                    "is not enlarged. Add it with trainer.add_callback(callback).",
                    stacklevel=2,
                )
            return original(*args, **kwargs)

        setattr(self.trainer, name, wrapped)

    def _train(
        self, original: Callable[..., Any], resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        checkpoint = resume_from_checkpoint or None
        if resume_from_checkpoint is True:
            checkpoint = get_last_checkpoint(self.trainer.args.output_dir)
        self._checkpoint = None if checkpoint is None else Path(checkpoint)
        return original(resume_from_checkpoint, *args, **kwargs)

    def _get_train_dataloader(self, original: Callable[[], Any]) -> Any:
        if self.trainer.is_in_train:
            self._check_own_set()
            with self._preserved():
                if self._checkpoint is not None:
                    self._resume(self._checkpoint)
                elif self._set is None:
                    self._start()
        return original()

    def _check_own_set(self) -> None:
        if self.trainer.train_dataset is not (self._training_set.tokenized if self._set is None else self._set):
            raise ValueError(
                "The trainer got another training set after the callback was made: make trainer and callback again, "
                "the callback last."
            )

    def _start(self) -> None:
        """Fill the set before the first step, or make room in it for the rounds to come."""
        if self.settings.refresh == "start":
            self._replace_set(self._run_round(0))
        else:
            self._replace_set(self._training_set.prepare(empty_rows(self.synthesizer)))

    def _resume(self, checkpoint: Path) -> None:
        """Fill the set with the rows of a checkpoint."""
        record = read_record(checkpoint)
        check_same_run(record, self._record, checkpoint)
        if self._set is not None and self.settings.refresh == "start":
            if record.rows != self._record.rows:
                raise ValueError(
                    f"{checkpoint} was trained on other new rows than this trainer has already: resume with a new "
                    "trainer."
                )
            return
        rows = find_rows(record, checkpoint, self.folder)
        prepared = self._training_set.prepare(rows)
        if self.trainer.args.process_index == 0:
            save_rows(rows, self.folder)  # beside the checkpoints to come
        self._replace_set(prepared)
        self.new_rows, self._kept, self._record = rows, [prepared.kept], record

    def _replace_set(self, new: PreparedRows) -> None:
        """Give the trainer its set with new rows in it and, where it grows, with room for more."""
        if self.settings.refresh == "start":
            rows = self._training_set.enlarged(new)
        else:
            own = self._training_set.tokenized.select_columns(list(self._training_set.columns))
            rows = FixedLengthDataset(own, self.settings.max_samples)
            rows.add(new.tokenized)
        self.trainer.train_dataset = self._set = rows

    def _run_round(self, epoch: int) -> PreparedRows:
        """Returns the new rows of one coverage round, prepared, the same in every process. By then they are on disk."""
        group, start = ProcessGroup.join(self.folder / "work", self.trainer.args), time.monotonic()
        try:
            with reraise_oom():
                result = self._coverage_round(group).run(self._kept, number=epoch, bounds=self._bounds(epoch))
            if result.report.failure and self.settings.on_error == "raise":
                raise ChatError(f"Synthesis ended by {result.report.failure}. The same run asks for the rest.")
            rows = concatenate_datasets([self.new_rows, result.rows]) if self._n_new else result.rows
            if group.rank == 0:
                save_rows(rows, self.folder)
            seconds = group.barrier({"new rows": rows_digest(rows)}, remedy=SAME_BOUNDS, note=time.monotonic() - start)
        except BaseException as error:
            group.leave(error)
            if self.settings.on_error == "raise" or not isinstance(error, Exception):
                raise
            group.wait_for_all()
            return self._go_on_without_rows(epoch, error)
        group.leave()
        self._kept.append(result.prepared.kept)
        self._end_round(epoch, rows, seconds, result.report, result.report.failure)
        return result.prepared

    def _go_on_without_rows(self, epoch: int, error: Exception) -> PreparedRows:
        none = empty_rows(self.synthesizer)
        rows = self.new_rows if self._n_new else none
        if self.trainer.args.process_index == 0:
            save_rows(rows, self.folder)
        self._end_round(epoch, rows, 0.0, None, f"{type(error).__name__}: {error}")
        return self._training_set.prepare(none)

    def _end_round(
        self, epoch: int, rows: Dataset, seconds: float, report: RoundReport | None, failure: str | None
    ) -> None:
        """Keep what the round came to, and write what a person reads."""
        if failure:
            warnings.warn(f"FAC synthesis failed; the run has {len(rows):,} new rows: {failure}", stacklevel=2)
        self.new_rows = rows
        self._record = next_record(self._record, report, rows=rows, epoch=epoch, seconds=seconds)
        self._unlogged = True
        if self.trainer.args.process_index == 0:
            entry = {"epoch": epoch, "rows": self._record.rows, "seconds": seconds, "failure": failure}
            try:
                write_report(entry | ({} if report is None else report.to_dict()), self.folder / "report.json")
                write_enlarged(self._training_set.raw, rows, self.folder / "enlarged.parquet")
            except Exception as error:
                # Other processes are in the run already, which has all that it needs.
                warnings.warn(f"{self.folder} has no whole report.json and enlarged.parquet: {error!r}", stacklevel=2)

    def _coverage_round(self, group: ProcessGroup) -> CoverageRound:
        # delta stays that of the first round, so that all rounds can be compared.
        given, calibrated = self.synthesizer.threshold, self._record.threshold
        return CoverageRound(
            synthesizer=self.synthesizer, anchor=self._anchor, features=self.settings.features,
            threshold=calibrated if given is None else given, training_set=self._training_set, group=group,
        )  # fmt: skip

    def _bounds(self, epoch: int) -> Bounds:
        settings, last = self.settings, self._record
        samples, seconds = settings.max_samples, settings.max_seconds
        if settings.refresh == "epoch":  # an equal share for each round that is left
            rounds = len(range(epoch, math.ceil(self.trainer.args.num_train_epochs), settings.every))
            samples = math.ceil((samples - self._n_new) / rounds)
        if seconds is not None:
            seconds = max(1.0, seconds - last.seconds)
        # Nothing has changed for exhausted features, unless the model that measures or writes is in training.
        changes = checks.is_measuring(self.trainer, self.synthesizer) or checks.is_writing(
            self.trainer, self.synthesizer
        )
        return Bounds(max_samples=samples, max_seconds=seconds, skip=() if changes else last.exhausted)

    @property
    def _n_new(self) -> int:
        return 0 if self.new_rows is None else len(self.new_rows)

    def _featurizer_digest(self) -> str:
        """What measures; of the model in training, whose weights change, only the settings and the SAE."""
        featurizer = self.synthesizer.featurizer
        if not checks.is_measuring(self.trainer, self.synthesizer):
            return featurizer.fingerprint()
        names = sorted({*featurizer.measurement} - {"model", "fingerprint"})
        settings = [featurizer.measurement[name] for name in names]
        return content_key(settings, TensorHash()(featurizer.sae.state_dict().items()))

    def _save_model(
        self, original: Callable[..., None], output_dir: str | None = None, *args: Any, **kwargs: Any
    ) -> None:
        # on_save comes later, when a checkpoint is whole and may be on its way to the Hub.
        original(output_dir, *args, **kwargs)
        in_checkpoint = output_dir is not None and Path(output_dir).name.startswith(f"{PREFIX_CHECKPOINT_DIR}-")
        if in_checkpoint and self.new_rows is not None and self.trainer.args.should_save:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            write_whole(Path(output_dir) / RECORD, self._record.model_dump_json())

    def _log(self) -> None:
        if self._unlogged:
            # Not TRL's log, which would average the running metrics with it.
            Trainer.log(self.trainer, dict(self.summary))
            if self.settings.log_rows and self.trainer.is_world_process_zero():
                log_table(self.new_rows, self.trainer.args.report_to)
            self._unlogged = False

    def _create_model_card(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        path = Path(self.trainer.args.output_dir) / "README.md"
        if self.summary and self.trainer.is_world_process_zero() and path.exists():
            section = model_card_section(self.summary)
            card = merge_card(
                path.read_text(encoding="utf-8"), metadata={"tags": ["hf_fac"]}, section="synthesis", body=section
            )
            write_whole(path, card)

    def _preserved(self) -> AbstractContextManager[None]:
        trainer, featurizer = self.trainer, self.synthesizer.featurizer
        models = {id(model): model for model in (trainer.model, featurizer.model)}
        tokenizers = {id(t): t for t in (trainer.processing_class, featurizer.tokenizer)}
        return preserved(list(models.values()), list(tokenizers.values()))
