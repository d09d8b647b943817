"""`FACSynthesisCallback`: a trainer whose training set is measured, and filled with what it is missing, as it trains.

In: a trainer of TRL or transformers, a synthesizer, an anchor set. Out: a run on the enlarged set, step for step the
one that the trainer would have made had it been given that set; the new rows, the enlarged set and a report on disk.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow.parquet as pq
from datasets import Dataset, Features, concatenate_datasets
from numpy.typing import ArrayLike
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from .cards import merge_card
from .conversations import RowError
from .coverage import FACReport, FeatureCoverage
from .run_state import Ranks, preserved, write_whole
from .trainer_data import PlannedRows, Prepare, trainer_data

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from .featurizer import SAEFeaturizer
    from .synthesis import FACSynthesizer
    from .tasks import Task

RECORD = "fac_synthesis.json"  # in every checkpoint: which new rows the run trains on
_FOLDER = "fac_synthesis"
_CHUNK = 1000  # rows read at a time


class FACSynthesisCallback(TrainerCallback):
    """Measures a trainer's training set against an anchor set, has the missing features written, trains on all of it.

        trainer = SFTTrainer(model, args=..., train_dataset=ds)
        trainer.add_callback(FACSynthesisCallback(trainer, synthesizer, anchor=anchor))
        trainer.train()

    The run equals that of a trainer which was given the enlarged set: order, steps, schedule, losses and weights. The
    seed set comes first, the new rows after it. It works for SFTTrainer, RewardTrainer, DPOTrainer and the plain
    Trainer (through `prepare`); what it cannot do exactly it refuses when it is made.

    Under `output_dir`/fac_synthesis it keeps `rows-<hash>.parquet` (new rows with provenance), `enlarged.parquet`,
    `report.json`, and `work`, from which a run that died goes on; `work` can be deleted once training has ended.
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
            with the model as it then is if that is what the featurizer reads: the set has room for max_samples from
            the first step on, and open places repeat seed rows in turn, so that steps and schedule never change.
        every: with "epoch", before every so many epochs.
        max_samples, max_seconds: bounds of all synthesis in the run. max_samples is needed with "epoch".
        on_error: "raise", or "warn" and train on what there is when measuring or writing fails.
        output_dir: by default the trainer's.
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
        prepare: Prepare | None = None,
    ) -> None:
        self.trainer, self.synthesizer, self.anchor, self.features = trainer, synthesizer, anchor, features
        self.refresh, self.every, self.on_error = refresh, every, on_error
        self.max_samples, self.max_seconds = max_samples, max_seconds
        self.folder = Path(output_dir or trainer.args.output_dir) / _FOLDER
        self.new_rows: Dataset | None = None
        self.summary: dict[str, float] = {}
        self._record: dict[str, Any] = {}  # what checkpoints carry; empty until there are new rows
        self._report: dict[str, Any] = {}
        self._planned: PlannedRows | None = None
        self._checkpoint: str | None = None
        self._trial: Any = None
        self._unlogged = False
        _check_arguments(self)
        with self._preserved():
            self._data = trainer_data(trainer, synthesizer.task, train_dataset=train_dataset, prepare=prepare)
        if refresh == "epoch":
            _check_can_grow(trainer)
        # The Trainer fixes steps, schedule and the resumed position by its loader, before any callback is called.
        self._wrap("train", self._train)
        self._wrap("get_train_dataloader", self._get_train_dataloader)
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

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._record and args.should_save:
            run = Path(self.trainer._get_output_dir(trial=self._trial))
            write_whole(run / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / RECORD, json.dumps(self._record))

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
        self._trial = args[0] if args else kwargs.get("trial")
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
        task = self.synthesizer.task
        before = self.new_rows
        if before is None:
            before = Dataset.from_dict({name: [] for name in task.features()}, features=task.features())
        start = time.monotonic()
        ranks = Ranks.meet(self.folder / "work", self.trainer.args)
        try:
            added, self._report = self._synthesized(before, epoch, ranks)
            rows = concatenate_datasets([before, added]) if len(before) else added
            self._save_rows(rows)
            ranks.agree(_digest(rows))
        except Exception as error:
            ranks.fail(error)
            if self.on_error == "raise":
                raise
            warnings.warn(
                f"FAC synthesis failed, the run trains on the {len(before):,} new rows that it has: {error}",
                stacklevel=2,
            )
            rows, self._report = before, {"error": f"{type(error).__name__}: {error}"}
            self._save_rows(rows)
        self._report["seconds"] = self._record.get("seconds", 0.0) + time.monotonic() - start
        return rows

    def _synthesized(self, before: Dataset, epoch: int, ranks: Ranks) -> tuple[Dataset, dict[str, Any]]:
        synthesizer = self.synthesizer
        measured = functools.partial(_measured, synthesizer.featurizer, synthesizer.task, ranks=ranks)
        anchor = self.anchor if isinstance(self.anchor, FeatureCoverage) else measured(self.anchor)
        data = measured(self._data.seed.select_columns(self._data.read_columns))
        task_columns = list(synthesizer.task.features())
        if len(before):
            data |= measured(before.select_columns(task_columns))
        found = data.compare(anchor, features=self.features, threshold=synthesizer.threshold)
        report = {"before": found.to_dict(), "after": found.to_dict(), "synthesis": None}
        report |= {"synthesizer": synthesizer.fingerprint(), "numbers": _numbers(found, found)}
        budget = self._budget(len(before), epoch)
        if not len(found.missing) or budget == 0:
            return before.select([]), report
        journal = ranks.folder / f"journal-{_hash(synthesizer.fingerprint(), found.missing.tolist())}"
        journal.mkdir(exist_ok=True)
        left = None if self.max_seconds is None else max(1.0, self.max_seconds - self._record.get("seconds", 0.0))
        result = synthesizer.synthesize(
            found.missing, journal=journal, max_samples=budget, max_seconds=left, stop=ranks.check
        )
        with warnings.catch_warnings():
            # An FAC near 1 is what this is for.
            warnings.simplefilter("ignore", UserWarning)
            new = data
            if len(result.dataset):
                new = data | measured(result.dataset.select_columns(task_columns))
            after = new.compare(anchor, features=self.features, threshold=synthesizer.threshold)
        written = result.report
        report |= {"after": after.to_dict(), "synthesis": written.to_dict()}
        report["numbers"] = _numbers(found, after) | {
            "fac/synthesized": len(result.dataset), "fac/filled": len(written.filled),
            "fac/resisted": len(written.resisted), "fac/requests": written.requests,
            "fac/completion_tokens": written.completion_tokens,
        }  # fmt: skip
        return result.dataset, report

    def _budget(self, n: int, epoch: int) -> int | None:
        """How many samples may be written now: an equal share for each time that is left."""
        if self.max_samples is None or self.refresh == "start":
            return self.max_samples
        times = len(range(epoch, math.ceil(self.trainer.args.num_train_epochs), self.every))
        return math.ceil((self.max_samples - n) / times)

    def _save_rows(self, rows: Dataset) -> None:
        if self.trainer.args.process_index == 0:
            path = self.folder / f"rows-{_digest(rows)}.parquet"
            _write_parquet(rows, path)

    def _keep(self, rows: Dataset, *, dropped: int, epoch: int) -> None:
        """What the rows are called in checkpoints, what is logged of them, and both with the whole set on disk."""
        self.new_rows = rows
        seconds = self._report["seconds"]
        self.summary = self._report.get("numbers", {}) | {
            "fac/new_rows": len(rows), "fac/dropped": dropped, "fac/seconds": seconds
        }  # fmt: skip
        self._record = {
            "rows": _digest(rows), "epoch": epoch, "refresh": self.refresh, "max_samples": self.max_samples,
            "seconds": seconds, "summary": self.summary,
        }  # fmt: skip
        self._unlogged = True
        if self.trainer.args.process_index == 0:
            report = {name: value for name, value in self._report.items() if name != "numbers"}
            report |= {"rows": self._record["rows"], "dropped": dropped, "epoch": epoch}
            write_whole(self.folder / "report.json", json.dumps(report, indent=1))
            _write_parquet(_all_rows(self._data.seed, rows), self.folder / "enlarged.parquet")

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
        rows = _read_parquet(path)
        if _digest(rows) != record["rows"]:
            raise ValueError(f"{path} does not hold the rows that {self._checkpoint} was trained on: it was changed.")
        self.new_rows, self._record, self.summary = rows, record, record["summary"]
        return rows

    def _log(self) -> None:
        if self._unlogged:
            # Not the trainer's own: TRL's would close its running averages with it.
            Trainer.log(self.trainer, dict(self.summary))
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


def _check_can_grow(trainer: Trainer) -> None:
    args = trainer.args
    packing = isinstance(trainer.train_dataset, Dataset) and "seq_lengths" in trainer.train_dataset.column_names
    problems = {
        "a run of one epoch has no second one: train longer": args.max_steps <= 0 and args.num_train_epochs <= 1,
        "max_steps leaves open how many epochs there are: set num_train_epochs": args.max_steps > 0,
        "packing arranges all rows anew: leave it out": packing,
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


def _measured(featurizer: SAEFeaturizer, task: Task, rows: Dataset, *, ranks: Ranks) -> FeatureCoverage:
    """The coverage of the rows, each process measuring its share; kept, so that a run that died finds it again."""
    measurement = featurizer.measurement
    path = ranks.folder / f"coverage-{_hash(measurement, task.name, _digest(rows))}.safetensors"
    if path.exists():
        return FeatureCoverage.load(path)
    coverage, share = FeatureCoverage(measurement), ranks.share(len(rows))
    for start in range(share.start, share.stop, _CHUNK):
        chunk = rows.select(range(start, min(start + _CHUNK, share.stop))).to_list()
        try:
            reading = featurizer.read([task.as_read(row) if "text" in row else row for row in chunk])
        except RowError as error:
            raise RowError(f"In rows from {start} on: {error}") from error
        coverage |= FeatureCoverage.from_activations(
            reading.activations, measurement=measurement, tokens=reading.tokens
        )
    parts = [path.with_suffix(f".{ranks.token}-{rank}") for rank in range(ranks.world_size)]
    if ranks.rank > 0:
        coverage.save(parts[ranks.rank])
        ranks.wait(path.exists)
        return FeatureCoverage.load(path)
    ranks.wait(lambda: all(part.exists() for part in parts[1:]))
    for part in parts[1:]:
        coverage |= FeatureCoverage.load(part)
        part.unlink()
    coverage.save(path)
    return coverage


def _numbers(before: FACReport, after: FACReport) -> dict[str, float]:
    return {
        "fac/before": before.fac,
        "fac/after": after.fac,
        "fac/covered": len(after.covered),
        "fac/missing": len(before.missing),
    }


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


def _all_rows(seed: Dataset, new: Dataset) -> Dataset:
    """Seed and new rows; where the two say a column differently (more keys in messages), in the seed's way."""
    features = {name: seed.features.get(name, kind) for name, kind in new.features.items()}
    return concatenate_datasets([seed, new.cast(Features(features))])


def _digest(rows: Dataset) -> str:
    """A hash of the rows' content, whatever they lie in."""
    digest = hashlib.sha256()
    for start in range(0, len(rows), _CHUNK):
        for row in rows.select(range(start, min(start + _CHUNK, len(rows)))).to_list():
            digest.update(json.dumps(row, sort_keys=True, default=repr).encode() + b"\n")
    return digest.hexdigest()[:32]


def _hash(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _write_parquet(rows: Dataset, path: Path) -> None:
    # Not datasets' own way of reading and writing: that keeps a copy in the cache.
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    pq.write_table(rows.with_format("arrow")[:], partial)
    os.replace(partial, path)


def _read_parquet(path: Path) -> Dataset:
    return Dataset(pq.read_table(path))
