"""Measure a set of rows against an anchor set and have written what it misses: one refill of a training set.

All processes of a run do it together: each measures its share and writes pieces of the journal, all end with the same
rows in the same order. What was measured and written stays in the folder they share, so that a run that died goes on.
"""

from __future__ import annotations

import functools
import operator
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset
from numpy.typing import ArrayLike

from ..coverage.coverage import FACReport, FeatureCoverage
from ..inputs.rows import RowError
from ..storage.feature_ids import check_feature_ids
from ..storage.journal import digest
from ..storage.parquet import rows_digest
from .processes import Ranks

if TYPE_CHECKING:
    from ..features.featurizer import SAEFeaturizer
    from ..synthesis.report import SynthesisReport
    from ..synthesis.synthesizer import FACSynthesizer
    from ..tasks.task import Task

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
            check_feature_ids(self.features, featurizer.d_sae, may_repeat=True)
        if np.min(self.synthesizer.threshold) < featurizer.keep_above:
            raise ValueError(
                f"The synthesizer's threshold {np.min(self.synthesizer.threshold):g} is below the featurizer's "
                f"keep_above {featurizer.keep_above:g}: raise it, or make the featurizer with a lower floor."
            )
        for name, rows in (("training", seed), ("anchor", self.anchor)):
            if isinstance(rows, Dataset):
                try:
                    featurizer.reader([_as_read(task, rows[0], featurizer)])
                except RowError as error:
                    raise RowError(f"The {name} set: {error}") from error

    def none(self) -> Dataset:
        """Returns new rows, of which there are none yet."""
        features = self.synthesizer.task.features()
        return Dataset.from_dict({name: [] for name in features}, features=features)

    def run(
        self,
        seed: Dataset,
        before: Dataset,
        ranks: Ranks,
        *,
        turn: int,
        trained_on: Callable[[Dataset], Dataset],
        leave_out: Collection[int] = (),
        max_samples: int | None = None,
        max_requests: int | None = None,
        max_seconds: float | None = None,
    ) -> tuple[Dataset, dict[str, Any]]:
        """Returns the rows that were added and a report for JSON, whose "numbers" are what is logged.

        Args:
            seed: rows as the featurizer reads them. before: new rows of earlier turns, they count as theirs.
            turn: another one has a journal of its own, as what writes may have been trained on in between.
            trained_on: from rows that were written to those that the trainer keeps; only these count. All processes
                call it at the same time, so that they may meet in it.
            leave_out: missing features that are not written for.
            max_samples, max_requests, max_seconds: bounds, as `FACSynthesizer.synthesize` takes them.

        Raises: RuntimeError, in all processes and before anything is measured, when they have other rows, another model
            or another synthesizer; OtherProcessFailed when one failed.
        """
        synthesizer, task = self.synthesizer, self.synthesizer.task
        columns, fingerprint = list(task.features()), synthesizer.fingerprint()
        anchor, own = self.anchor, synthesizer.featurizer.measurement
        digests = {
            "training set": rows_digest(seed),
            "anchor set": rows_digest(anchor) if isinstance(anchor, Dataset) else digest(anchor.maximum.tolist()),
            "features": self.features if self.features is None else digest(np.asarray(self.features).tolist()),
        }
        # They wait for one another's files, which are named by all this.
        ranks.compare(
            {**digests, **{f"featurizer's {name}": value for name, value in own.items()}, "synthesizer": fingerprint},
            "Give all processes the same rows in the same order (shuffle with a seed) and load models from the same "
            "name or path.",
        )
        measured = functools.partial(_measured, synthesizer.featurizer, task, ranks=ranks)
        if isinstance(anchor, Dataset):
            anchor = measured(anchor, digests["anchor set"])
        compare = functools.partial(
            FeatureCoverage.compare, anchor=anchor, features=self.features, threshold=synthesizer.threshold
        )
        data = measured(seed, digests["training set"])
        if len(before):
            data |= measured(before.select_columns(columns))
        found = after = compare(data)
        added = kept = before.select([])
        written, wanted = None, found.missing[~np.isin(found.missing, list(leave_out))]
        if len(wanted) and max_samples != 0:
            journal = ranks.folder / f"journal-{digest([fingerprint, wanted.tolist(), turn])}"
            journal.mkdir(exist_ok=True)
            result = synthesizer.synthesize(
                found,
                features=wanted,
                journal=journal,
                max_samples=max_samples,
                max_requests=max_requests,
                max_seconds=max_seconds,
                stop=ranks.check,
            )
            added, written = result.dataset, result.report
        if len(added):
            ranks.compare({"new rows": rows_digest(added)}, "Give all the same bounds, and an unchanged work folder.")
            kept = trained_on(added)
        if len(kept):
            data |= measured(kept.select_columns(columns))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # an FAC near 1 is what this is for
                after = compare(data)
        return added, _report(found, after, fingerprint, added, kept, written)


def _report(
    found: FACReport, after: FACReport, fingerprint: str, added: Dataset, kept: Dataset, written: SynthesisReport | None
) -> dict[str, Any]:
    """A feature is filled when the trainer kept a row of its own."""
    tried, filled, costs = [], [], {"fac/requests": 0, "fac/completion_tokens": 0}
    if written is not None:
        tried = [*written.filled.tolist(), *written.resisted.tolist()]
        filled = np.intersect1d(written.filled, kept["fac_feature"][:] if len(kept) else []).astype(int).tolist()
        costs = {"fac/requests": written.requests, "fac/completion_tokens": written.completion_tokens}
    return {
        "before": found.to_dict(), "after": after.to_dict(), "synthesizer": fingerprint,
        "synthesis": None if written is None else written.to_dict(),
        "filled": filled, "resisted": sorted(set(tried) - set(filled)),
        "numbers": {
            "fac/before": found.fac, "fac/after": after.fac, "fac/covered": len(after.covered),
            "fac/missing": len(found.missing), "fac/synthesized": len(added), **costs,
        },
    }  # fmt: skip


def _measured(
    featurizer: SAEFeaturizer, task: Task, rows: Dataset, rows_hash: str | None = None, *, ranks: Ranks
) -> FeatureCoverage:
    """The coverage of all rows. Each process measures its share, from where an earlier run of as many stopped."""
    name = f"coverage-{digest([featurizer.measurement, task.name, rows_hash or rows_digest(rows)])}"
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
                reading = featurizer.read([_as_read(task, row, featurizer) for row in chunk])
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


def _as_read(task: Task, row: dict[str, Any], featurizer: SAEFeaturizer) -> Any:
    # Only of a labelled task's rows, which are plain text, is it for the task to say; an anchor set may be of any type.
    return task.as_read(row, featurizer.reader.pool_over) if "text" in row else row
