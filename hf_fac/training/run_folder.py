"""What a run with the callback keeps on disk, so that a resumed run trains on the same rows.

New rows lie in `rows-<hash>.parquet` in the run's folder. Every checkpoint holds `fac_synthesis.json`, a
`CheckpointRecord`, which names them by their hash and says which training set and featurizer they were written for.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pyarrow as pa
from datasets import Dataset
from pydantic import ConfigDict, Field

from ..storage.parquet import read_parquet, rows_digest, write_parquet
from ..storage.validation import Strict, checked

if TYPE_CHECKING:
    from .coverage_round import RoundResult

RECORD = "fac_synthesis.json"
FOLDER = "_fac_synthesis"  # a name that starts with "_" is not pushed to the Hub with the model
_FIRST = ("fac/before", "fac/missing")  # of the first round; later ones find less
_SUMMED = ("fac/synthesized", "fac/dropped", "fac/requests", "fac/completion_tokens")


class CheckpointRecord(Strict):
    """What a checkpoint says of the new rows that the run trains on.

    rows: hash of the new rows, in order. training_set, featurizer: hashes of what the rows were written for.
    epoch: of the last coverage round; -1 if there was none. seconds: spent on all rounds.
    threshold: delta; None before the first round and where each feature has its own.
    activated, exhausted: features with a row of their own that the trainer kept, and those without one after all tries.
    summary: the numbers that were logged, by name.
    """

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")

    rows: str = ""
    training_set: str
    featurizer: str
    refresh: Literal["start", "epoch"]
    max_samples: int | None
    epoch: int = -1
    seconds: float = 0.0
    threshold: float | None = None
    activated: list[int] = Field(default_factory=list)
    exhausted: list[int] = Field(default_factory=list)
    summary: dict[str, int | float] = Field(default_factory=dict)

    @property
    def has_round(self) -> bool:
        """Whether a coverage round ran."""
        return self.epoch >= 0


def read_record(checkpoint: Path) -> CheckpointRecord:
    """Returns the record of a checkpoint.

    Raises: FileNotFoundError when it has none; ValueError, naming file and field, for other content.
    """
    path = checkpoint / RECORD
    if not path.exists():
        raise FileNotFoundError(
            f"{checkpoint} does not say which new rows it was trained on ({RECORD} is not there): resume without the "
            "callback, or from a checkpoint that was saved with it."
        )
    remedy = "the file is damaged or of another version: resume from another checkpoint, or start again"
    return checked(CheckpointRecord, path.read_bytes(), str(path), remedy)


def check_same_run(record: CheckpointRecord, current: CheckpointRecord, checkpoint: Path) -> None:
    """Raises: ValueError when a checkpoint was saved by a run on other data, or with other settings, than this one."""
    remedies = {
        "training_set": "give the trainer the rows that it had then, in the same order",
        "featurizer": "make the featurizer with the model, SAE and settings that it had then",
        "refresh": f"pass refresh={record.refresh!r}",
    }
    if current.refresh == "epoch":
        remedies["max_samples"] = f"pass max_samples={record.max_samples}"
    for name, remedy in remedies.items():
        saved, now = getattr(record, name), getattr(current, name)
        if saved != now:
            raise ValueError(
                f"{checkpoint} was saved with another {name} ({saved!r}; now {now!r}), so the run could not go on "
                f"as it was: {remedy}, or start again without resuming."
            )


def next_record(
    last: CheckpointRecord, result: RoundResult | None, *, rows: Dataset, epoch: int, seconds: float
) -> CheckpointRecord:
    """Returns the record after one more round, which has no result when it failed. `rows`: all new rows by then."""
    numbers = {}
    threshold = last.threshold
    activated = {*last.activated}
    exhausted = {*last.exhausted}
    if result is not None:
        numbers = result.numbers()
        threshold = result.before.threshold if isinstance(result.before.threshold, float) else None
        activated |= {*result.activated}
        exhausted = (exhausted | {*result.exhausted}) - activated
    summary = {
        **last.summary,
        **numbers,
        **{name: last.summary[name] for name in _FIRST if name in last.summary},
        **{name: last.summary.get(name, 0) + numbers.get(name, 0) for name in _SUMMED},
        "fac/activated": len(activated),
        "fac/exhausted": len(exhausted),
        "fac/new_rows": len(rows),
        "fac/seconds": last.seconds + seconds,
    }
    changes = {
        "rows": rows_digest(rows),
        "epoch": epoch,
        "seconds": last.seconds + seconds,
        "threshold": threshold,
        "activated": sorted(activated),
        "exhausted": sorted(exhausted),
        "summary": summary,
    }
    return last.model_copy(update=changes)


def save_rows(rows: Dataset, folder: Path) -> None:
    """Write new rows under the name of their hash."""
    folder.mkdir(parents=True, exist_ok=True)
    write_parquet(rows, folder / _rows_name(rows_digest(rows)))


def find_rows(record: CheckpointRecord, checkpoint: Path, folder: Path) -> Dataset:
    """Returns the new rows of a checkpoint, from the run's folder or from the one beside the checkpoint.

    Raises: FileNotFoundError when they are in neither; ValueError when it has other content.
    """
    name = _rows_name(record.rows)
    in_folder = folder / name
    beside = checkpoint.parent / FOLDER / name
    path = in_folder if in_folder.exists() else beside
    if not path.exists():
        raise FileNotFoundError(
            f"{checkpoint} was trained on new rows that are not there: {name} is neither in {in_folder.parent} nor in "
            f"{beside.parent}. Copy it there, or start again without resuming."
        )
    try:
        rows = read_parquet(path)
    except (pa.ArrowException, OSError):
        rows = None
    if rows is None or rows_digest(rows) != record.rows:
        raise ValueError(
            f"{path} does not hold the rows that {checkpoint} was trained on: copy the file that the run wrote to "
            f"{path.parent}, or start again without resuming."
        )
    return rows


def _rows_name(digest: str) -> str:
    return f"rows-{digest}.parquet"
