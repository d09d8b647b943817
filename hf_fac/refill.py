"""Measure a set of rows against an anchor set and have written what it misses: one refill of a training set.

All processes of a run do it together: each measures its share and writes pieces of the journal, all end with the same
rows in the same order. What was measured and written stays in the folder they share, so that a run that died goes on.
"""

from __future__ import annotations

import functools
import hashlib
import json
import operator
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
from datasets import Dataset
from numpy.typing import ArrayLike

from .conversations import RowError
from .coverage import FACReport, FeatureCoverage
from .journal import digest
from .run_state import Ranks

if TYPE_CHECKING:
    from .featurizer import SAEFeaturizer
    from .synthesis import FACSynthesizer
    from .tasks import Task

_CHUNK = 1000  # rows read at a time


@dataclass(frozen=True)
class Refill:
    """What writes, what against, and which features count (None: all)."""

    synthesizer: FACSynthesizer
    anchor: Dataset | FeatureCoverage
    features: ArrayLike | None

    def check(self, seed: Dataset) -> None:
        """Raises: ValueError for what would only be found when all is measured: features and threshold out of range,
        rows that cannot be read (the first of each set stands for the others)."""
        featurizer, task = self.synthesizer.featurizer, self.synthesizer.task
        if self.features is not None:
            ids = np.asarray(self.features)
            if not ids.size or ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= featurizer.d_sae:
                raise ValueError(f"features must be ids in [0, {featurizer.d_sae:,}), one or more: {ids!r:.100}")
        if np.min(self.synthesizer.threshold) < featurizer.keep_above:
            raise ValueError(
                f"The synthesizer's threshold {np.min(self.synthesizer.threshold):g} is below the featurizer's "
                f"keep_above {featurizer.keep_above:g}: raise it, or make the featurizer with a lower floor."
            )
        for name, rows in (("training", seed), ("anchor", self.anchor)):
            if isinstance(rows, Dataset):
                try:
                    featurizer.reader([_as_read(task, rows[0])])
                except RowError as error:
                    raise RowError(f"The {name} set: {error}") from error

    def none(self) -> Dataset:
        """Returns new rows, of which there are none yet."""
        features = self.synthesizer.task.features()
        return Dataset.from_dict({name: [] for name in features}, features=features)

    def run(
        self, seed: Dataset, before: Dataset, ranks: Ranks, *, turn: int, max_samples: int | None,
        max_seconds: float | None,
    ) -> tuple[Dataset, dict[str, Any]]:  # fmt: skip
        """Returns the rows that were added and a report for JSON, whose "numbers" are what is logged.

        Args:
            seed: rows as the featurizer reads them. before: new rows of earlier turns, they count as theirs.
            turn: another one has a journal of its own, as what writes may have been trained on in between.
        """
        synthesizer = self.synthesizer
        measured = functools.partial(_measured, synthesizer.featurizer, synthesizer.task, ranks=ranks)
        compare = functools.partial(
            FeatureCoverage.compare,
            anchor=self.anchor if isinstance(self.anchor, FeatureCoverage) else measured(self.anchor),
            features=self.features,
            threshold=synthesizer.threshold,
        )
        columns = list(synthesizer.task.features())
        data = measured(seed)
        if len(before):
            data |= measured(before.select_columns(columns))
        found = after = compare(data)
        fingerprint, added, written = synthesizer.fingerprint(), before.select([]), None
        ranks.compare("synthesizer", fingerprint)
        if len(found.missing) and max_samples != 0:
            journal = ranks.folder / f"journal-{digest([fingerprint, found.missing.tolist(), turn])}"
            journal.mkdir(exist_ok=True)
            result = synthesizer.synthesize(
                found, journal=journal, max_samples=max_samples, max_seconds=max_seconds, stop=ranks.check
            )
            added, written = result.dataset, result.report
        if len(added):
            data |= measured(added.select_columns(columns))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # an FAC near 1 is what this is for
                after = compare(data)
        report = {
            "before": found.to_dict(), "after": after.to_dict(), "synthesizer": fingerprint,
            "synthesis": None if written is None else written.to_dict(), "numbers": _numbers(found, after),
        }  # fmt: skip
        if written is not None:
            report["numbers"] |= {
                "fac/synthesized": len(added), "fac/filled": len(written.filled), "fac/resisted": len(written.resisted),
                "fac/requests": written.requests, "fac/completion_tokens": written.completion_tokens,
            }  # fmt: skip
        return added, report


def rows_digest(rows: Dataset) -> str:
    """Returns a hash of the rows' content, whatever they lie in."""
    found = hashlib.sha256()
    for start in range(0, len(rows), _CHUNK):
        for row in rows.select(range(start, min(start + _CHUNK, len(rows)))).to_list():
            found.update(json.dumps(row, sort_keys=True, default=repr).encode() + b"\n")
    return found.hexdigest()[:32]


def write_parquet(rows: Dataset, path: Path) -> None:
    """Write a file that is whole or not there."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    schema = rows.features.arrow_schema
    with pq.ParquetWriter(partial, schema) as writer:
        for table in rows.with_format("arrow").iter(batch_size=10 * _CHUNK):
            writer.write_table(table.cast(schema))
    os.replace(partial, path)


def read_parquet(path: Path) -> Dataset:
    """Returns what `write_parquet` wrote; datasets' own way would keep a copy in the cache."""
    return Dataset(pq.read_table(path))


def _measured(featurizer: SAEFeaturizer, task: Task, rows: Dataset, *, ranks: Ranks) -> FeatureCoverage:
    """The coverage of all rows. Each process measures its share, from where an earlier run of as many stopped."""
    name = f"coverage-{digest([featurizer.measurement, task.name, rows_digest(rows)])}"
    path, share = ranks.folder / f"{name}.safetensors", ranks.share(len(rows))
    parts = [ranks.folder / f"{name}.{rank}-of-{ranks.world_size}" for rank in range(ranks.world_size)]
    own = parts[ranks.rank]
    if not own.exists() and not path.exists():
        begun = own.with_name(f"{own.name}.begun")
        coverage = FeatureCoverage.load(begun) if begun.exists() else FeatureCoverage(featurizer.measurement)
        for start in range(share.start + coverage.rows, share.stop, _CHUNK):
            ranks.check()
            chunk = rows.select(range(start, min(start + _CHUNK, share.stop))).to_list()
            try:
                reading = featurizer.read([_as_read(task, row) for row in chunk])
            except RowError as error:
                raise RowError(f"In rows from {start} on: {error}") from error
            coverage |= FeatureCoverage.from_activations(
                reading.activations, measurement=featurizer.measurement, tokens=reading.tokens
            )
            coverage.save(begun)
        coverage.save(own)
        begun.unlink(missing_ok=True)
    if ranks.rank == 0 and not path.exists():
        ranks.wait(lambda: all(part.exists() for part in parts))
        functools.reduce(operator.or_, map(FeatureCoverage.load, parts)).save(path)
        for part in parts:  # last: who finds its part gone finds the whole
            part.unlink()
    ranks.wait(path.exists)
    return FeatureCoverage.load(path)


def _as_read(task: Task, row: dict[str, Any]) -> Any:
    # Only of a labelled task's rows, which are plain text, is it for the task to say; an anchor set may be of any type.
    return task.as_read(row) if "text" in row else row


def _numbers(before: FACReport, after: FACReport) -> dict[str, float]:
    return {
        "fac/before": before.fac,
        "fac/after": after.fac,
        "fac/covered": len(after.covered),
        "fac/missing": len(before.missing),
    }
