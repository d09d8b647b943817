"""`FACSynthesisCallback`: a trainer whose training set is measured, and filled with what it is missing, as it trains.

In: a trainer of TRL or transformers, a synthesizer, an anchor set. Out: a run on the enlarged set, step for step the
one that the trainer would have made had it been given that set; the new rows, the enlarged set and a report on disk.
"""

from __future__ import annotations

import functools
import json
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

from ..coverage.coverage import FeatureCoverage
from ..hub.cards import merge_card
from ..storage.files import write_whole
from ..storage.parquet import read_parquet, rows_digest, write_parquet
from .checks import check_arguments, check_can_grow, is_in_training, warn_of_cut_rows
from .coverage_round import Refill
from .processes import Ranks, never_a_smaller_batch, preserved
from .summary import log_table, paragraph, summed_up, write_enlarged, write_report
from .trainers import trainer_data
from .training_set import PlannedRows, Prepare

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from ..synthesis.synthesizer import FACSynthesizer

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
    `report.json` (a list, an entry each time that the set was filled), and `work`, from which a run that died goes on;
    `work` can be deleted once training has ended. None of it is pushed to the Hub with the model.
    Checkpoints name the rows by their hash: resuming from one restores them, nothing is written again. Nor is it by a
    second `train()`. With several processes that folder must lie on a file system that all of them share.

    Args:
        trainer: whose training set it is; the callback has to be added to it as well.
        synthesizer: what measures (`synthesizer.featurizer`, which may read the model in training) and writes. Under
            ZeRO-3 and FSDP both need a model of their own. Its max_length should be the trainer's: what is cut off for
            training is measured else (a UserWarning says so).
        anchor: rows (Dataset), or their FeatureCoverage as this featurizer measures them.
        train_dataset: the raw rows that the trainer was given; needed where its own set no longer holds them (packing,
            shuffle_dataset, a formatting_func, rows tokenized by you).
        features: the ids that count, F_task; None for all.
        refresh: "start" fills the set once, before the first step. "epoch" measures and fills again before each epoch,
            with the model as it then is if that is what the featurizer reads. The set has room for max_samples from
            the first step on, of which each time gets an equal share; open places repeat seed rows in turn, so that
            steps and schedule never change. What resisted is not written for again, but where the model that measures
            or writes is the one in training.
        every: with "epoch", before every so many epochs.
        max_samples, max_seconds: bounds of all synthesis in the run. max_samples is needed with "epoch".
        on_error: "raise", or "warn" when measuring or writing fails, and train on what was written by then.
        output_dir: by default the trainer's; not a folder inside it, which would be pushed to the Hub with the model.
        log_rows: log the new rows as a table too, where W&B or Trackio are reported to.
        prepare: raw rows (Dataset) to rows as the training set has them; for the plain Trainer, and for rows that you
            tokenized yourself.

    Attributes:
        new_rows: the rows written, with their provenance, before the trainer's filters; None until then.
        summary: the numbers that were logged, by name. "fac/before" and "fac/missing" are of the first measurement,
            all others of the run up to now; "fac/after" counts the rows that the trainer keeps, a feature is filled
            when one of its own is among them, "fac/dropped" are the others.

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
        for name, value in (("trainer", trainer), ("synthesizer", synthesizer), ("anchor", anchor)):
            if value is None:
                raise TypeError(f"{name} is None: FACSynthesisCallback needs trainer, synthesizer and anchor.")
        self.trainer, self.synthesizer, self.anchor = trainer, synthesizer, anchor
        self._refill = Refill(synthesizer, anchor, features)
        self.refresh, self.every, self.on_error = refresh, every, on_error
        self.max_samples, self.max_seconds, self.log_rows = max_samples, max_seconds, log_rows
        self.folder = Path(output_dir or trainer.args.output_dir) / _FOLDER
        self.new_rows: Dataset | None = None
        self.summary: dict[str, float] = {}
        self._record: dict[str, Any] = {}  # what checkpoints carry; empty until there are new rows
        self._set: Dataset | PlannedRows | None = None  # the training set, once it is the callback's
        self._checkpoint: str | None = None
        self._unlogged = False
        check_arguments(self, FACSynthesisCallback)
        with self._preserved():
            self._data = trainer_data(trainer, synthesizer.task, train_dataset=train_dataset, prepare=prepare)
            self._refill.check(self._data.readable)
        if refresh == "epoch":
            check_can_grow(trainer, self._data)
        warn_of_cut_rows(trainer, self._data, synthesizer.featurizer)
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
        if self.refresh == "start" or epoch % self.every or epoch <= self._record.get("epoch", -1):
            return
        with self._preserved():
            rows, report = self._filled(epoch)
            prepared = self._fill_places(rows)
        self._keep(rows, report, dropped=len(rows) - prepared, epoch=epoch)
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
            if self.trainer.train_dataset is not (self._data.base if self._set is None else self._set):
                raise ValueError(
                    "The trainer got another training set after the callback was made: make trainer and callback anew, "
                    "the callback last."
                )
            record = None if self._checkpoint is None else self._read_record(Path(self._checkpoint))
            with self._preserved():
                if self.refresh == "epoch":
                    self._plan(record)
                elif self._set is None:
                    self._enlarge(record)
            if record is not None and record["rows"] != self._record["rows"]:
                raise ValueError(
                    f"{self._checkpoint} was trained on other new rows than this trainer has already: resume with a "
                    "new trainer."
                )
        return original()

    def _enlarge(self, record: dict[str, Any] | None) -> None:
        rows, report = self._filled(0) if record is None else (self._restored(record), {})
        enlarged, dropped = self._data.enlarged(rows)
        self._replace_set(enlarged)
        if record is None:
            self._keep(rows, report, dropped=dropped, epoch=0)
        else:
            self._remember(rows, record)

    def _plan(self, record: dict[str, Any] | None) -> None:
        if self._set is None:
            seed = self.trainer.train_dataset.select_columns(list(self._data.columns))
            self._replace_set(PlannedRows(seed, self.max_samples))
        if record is not None:
            rows = self._restored(record)
            self._fill_places(rows)
            self._remember(rows, record)

    def _replace_set(self, rows: Dataset | PlannedRows) -> None:
        self.trainer.train_dataset = self._set = rows

    def _fill_places(self, rows: Dataset) -> int:
        """How many rows are left to train on."""
        prepared = self._data.prepared(rows) if len(rows) else None
        self._set.fill(prepared)
        return 0 if prepared is None else len(prepared)

    def _trained_on(self, rows: Dataset) -> Dataset:
        """The rows that the trainer's filters leave."""
        if self._data.arranged and self.trainer.args.packing:
            return rows  # packing drops none, and what it makes of them is not to be counted

        def left(start: int, stop: int) -> list[int]:
            n = len(self._data.prepared(rows.select(range(start, stop))))
            if n == 0 or n >= stop - start:
                return list(range(start, stop)) if n else []
            middle = (start + stop) // 2
            return left(start, middle) + left(middle, stop)

        return rows.select(left(0, len(rows)) if len(rows) else [])

    def _filled(self, epoch: int) -> tuple[Dataset, dict[str, Any]]:
        """All new rows, those of before first, the same in every process, and a report; the rows are on disk then."""
        before = self._refill.none() if self.new_rows is None else self.new_rows
        start = time.monotonic()
        try:
            return self._turn(before, epoch, start)
        except Exception as error:
            if self.on_error == "raise":
                raise
            problem = error
        try:
            # Of one request the synthesizer makes nothing: this is what was written, and paid for, until it failed.
            rows, report = self._turn(before, epoch, start, max_requests=1)
            report["resisted"] = []  # not all of the ways were tried
        except Exception:
            rows, report = before, {"seconds": 0.0}
            self._save_rows(rows)
        warnings.warn(f"FAC synthesis failed; the run has {len(rows):,} new rows: {problem}", stacklevel=2)
        return rows, report | {"error": f"{type(problem).__name__}: {problem}"}

    def _turn(
        self, before: Dataset, epoch: int, start: float, *, max_requests: int | None = None
    ) -> tuple[Dataset, dict[str, Any]]:
        """What `_filled` returns, or an error in all processes."""
        ranks = Ranks.meet(self.folder / "work", self.trainer.args)
        models, spent = (self.synthesizer.featurizer.model, self.synthesizer.chat), self._record.get("seconds", 0.0)
        # Nothing has changed for what resisted, unless the model that reads or writes is being trained.
        changes = any(is_in_training(self.trainer, model) for model in models)
        try:
            with never_a_smaller_batch():
                added, report = self._refill.run(
                    self._data.readable,
                    self._trained_on(before),
                    ranks,
                    turn=epoch,
                    trained_on=self._trained_on,
                    leave_out=() if changes else self._record.get("resisted", ()),
                    max_samples=self._budget(len(before), epoch),
                    max_requests=max_requests,
                    max_seconds=None if self.max_seconds is None else max(1.0, self.max_seconds - spent),
                )
                rows = concatenate_datasets([before, added]) if len(before) else added
                self._save_rows(rows)
            report["seconds"] = ranks.agree(rows_digest(rows), time.monotonic() - start)
        except BaseException as error:
            ranks.fail(error)
            if self.on_error == "warn" and isinstance(error, Exception):
                ranks.wait_for_all()
            raise
        return rows, report

    def _budget(self, n: int, epoch: int) -> int | None:
        """How many samples may be written now: an equal share for each time that is left."""
        if self.max_samples is None or self.refresh == "start":
            return self.max_samples
        times = len(range(epoch, math.ceil(self.trainer.args.num_train_epochs), self.every))
        return math.ceil((self.max_samples - n) / times)

    def _save_rows(self, rows: Dataset) -> None:
        if self.trainer.args.process_index == 0:
            write_parquet(rows, self.folder / f"rows-{rows_digest(rows)}.parquet")

    def _keep(self, rows: Dataset, report: dict[str, Any], *, dropped: int, epoch: int) -> None:
        """What the rows are called in checkpoints, what is logged of them, and both with the whole set on disk."""
        numbers, seconds = report.pop("numbers", {}), report["seconds"] + self._record.get("seconds", 0.0)
        filled = {*self._record.get("filled", ()), *report.get("filled", ())}
        resisted = {*self._record.get("resisted", ()), *report.get("resisted", ())} - filled
        summary = summed_up(self.summary, numbers) | {
            "fac/filled": len(filled), "fac/resisted": len(resisted), "fac/new_rows": len(rows),
            "fac/dropped": dropped, "fac/seconds": seconds,
        }  # fmt: skip
        record = {
            "rows": rows_digest(rows), "epoch": epoch, "refresh": self.refresh, "max_samples": self.max_samples,
            "seconds": seconds, "summary": summary, "filled": sorted(filled), "resisted": sorted(resisted),
        }  # fmt: skip
        self._remember(rows, record)
        self._unlogged = True
        if self.trainer.args.process_index == 0:
            try:
                turn = {"epoch": epoch, "rows": record["rows"], "dropped": dropped, **report}
                write_report(turn, self.folder / "report.json")
                write_enlarged(self._data.seed, rows, self.folder / "enlarged.parquet")
            except Exception as error:
                # Other processes are in the run already, which has all that it needs.
                warnings.warn(f"{self.folder} has no whole report.json and enlarged.parquet: {error!r}", stacklevel=2)

    def _remember(self, rows: Dataset, record: dict[str, Any]) -> None:
        self.new_rows, self._record, self.summary = rows, record, record["summary"]

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
        return rows

    def _save_model(
        self, original: Callable[..., None], output_dir: str | None = None, *args: Any, **kwargs: Any
    ) -> None:
        # on_save comes later, when a checkpoint is whole, and may be on its way to the Hub.
        original(output_dir, *args, **kwargs)
        in_checkpoint = output_dir is not None and Path(output_dir).name.startswith(f"{PREFIX_CHECKPOINT_DIR}-")
        if in_checkpoint and self._record and self.trainer.args.should_save:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            write_whole(Path(output_dir) / RECORD, json.dumps(self._record))

    def _log(self) -> None:
        if self._unlogged:
            # Not the trainer's own: TRL's would close its running averages with it.
            Trainer.log(self.trainer, dict(self.summary))
            if self.log_rows and self.trainer.is_world_process_zero():
                log_table(self.new_rows, self.trainer.args.report_to)
            self._unlogged = False

    def _create_model_card(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        path = Path(self.trainer.args.output_dir) / "README.md"
        if self.summary and self.trainer.is_world_process_zero() and path.exists():
            card = merge_card(path.read_text(encoding="utf-8"), metadata={"tags": ["hf_fac"]}, section="synthesis",
                              body=paragraph(self.summary))  # fmt: skip
            write_whole(path, card)

    def _preserved(self) -> AbstractContextManager[None]:
        trainer, featurizer = self.trainer, self.synthesizer.featurizer
        models = {id(model): model for model in (trainer.model, featurizer.model)}
        tokenizers = {id(t): t for t in (trainer.processing_class, featurizer.tokenizer)}
        return preserved(list(models.values()), list(tokenizers.values()))
