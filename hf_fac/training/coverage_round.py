"""One coverage round: measure the training set against the anchor set, write what is missing, prepare the new rows.

All processes of a run take part: each measures its share of the rows and writes its share of the samples, and all end
with the same rows in the same order. Measurements and answers stay in the group's folder, so that a killed run reuses
them.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset
from numpy.typing import ArrayLike

from ..coverage.coverage import FeatureCoverage
from ..coverage.report import FACReport
from ..storage.cache import Processes, content_key
from ..storage.parquet import rows_digest
from .processes import ProcessGroup
from .training_set import PreparedRows, TrainingSet

if TYPE_CHECKING:
    from ..synthesis.report import SynthesisReport, SynthesisResult
    from ..synthesis.synthesizer import FACSynthesizer

SAME_BOUNDS = "Give all processes the same bounds, and an unchanged work folder."
_CHUNK = 1000  # rows measured at a time


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Limits of one round: of samples and seconds, and the features that are not written for."""

    max_samples: int | None = None
    max_seconds: float | None = None
    skip: Collection[int] = ()


@dataclass(frozen=True, kw_only=True)
class RoundReport:
    """What one round found and did.

    before: coverage of the training set. fac_after: FAC with the rows that the trainer keeps.
    synthesis: None when nothing was written. synthesizer: its fingerprint.
    samples, dropped: rows that were written, and how many of them the trainer's filters dropped.
    activated, exhausted: features with a row of their own that the trainer keeps; features tried to the end in vain.
    failure: why the chat stopped answering, None when it did not.
    """

    before: FACReport
    fac_after: float
    synthesis: SynthesisReport | None
    synthesizer: str
    samples: int
    dropped: int
    activated: list[int]
    exhausted: list[int]
    failure: str | None

    @property
    def covered_after(self) -> int:
        """Features of the anchor set that are covered after the round."""
        n = len(self.before.covered) + len(self.before.missing)
        return round(self.fac_after * n) if n else 0

    def numbers(self) -> dict[str, float]:
        """Returns what is logged, by name."""
        return {
            "fac/before": self.before.fac,
            "fac/after": self.fac_after,
            "fac/covered": self.covered_after,
            "fac/missing": len(self.before.missing),
            "fac/synthesized": self.samples,
            "fac/dropped": self.dropped,
            "fac/requests": 0 if self.synthesis is None else self.synthesis.requests,
            "fac/completion_tokens": 0 if self.synthesis is None else self.synthesis.completion_tokens,
        }

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it for JSON."""
        return {
            "before": self.before.to_dict(),
            "after": {"fac": self.fac_after, "covered": self.covered_after},
            "synthesis": None if self.synthesis is None else self.synthesis.to_dict(),
            "synthesizer": self.synthesizer,
            "samples": self.samples,
            "dropped": self.dropped,
            "activated": self.activated,
            "exhausted": self.exhausted,
            "failure": self.failure,
        }


@dataclass(frozen=True)
class RoundResult:
    """What a round adds: all rows that were written, those of them that the trainer keeps in its form, a report."""

    rows: Dataset
    prepared: PreparedRows
    report: RoundReport


@dataclass(frozen=True)
class CoverageRound:
    """A round for one training set.

    Args:
        anchor: rows, or their coverage.
        features: ids that count, None for all.
        threshold: delta; None calibrates it on the anchor set.
        group: the processes that take part.
    """

    synthesizer: FACSynthesizer
    anchor: Dataset | FeatureCoverage
    features: ArrayLike | None
    threshold: float | ArrayLike | None
    training_set: TrainingSet
    group: ProcessGroup

    def run(self, earlier: Sequence[Dataset], *, number: int, bounds: Bounds) -> RoundResult:
        """Measure, have the missing features written, and prepare the new rows.

        Args:
            earlier: new rows of earlier rounds that the trainer keeps.
            number: rounds with other numbers share no answers, as the chat's model may have been trained in between.

        Raises: RuntimeError, in all processes and before anything is measured, when they have other rows, another model
            or another synthesizer; OtherProcessFailed when one of them failed.
        """
        anchor, fingerprint = self.anchor, self.synthesizer.fingerprint()
        rows_given = isinstance(anchor, Dataset)
        anchor_digest = rows_digest(anchor) if rows_given else content_key(anchor.maximum.tolist())
        self._check_same_inputs(anchor_digest, fingerprint)
        if rows_given:
            anchor = self._coverage(anchor, anchor_digest)
        coverage = self._coverage(self.training_set.content, self.training_set.digest)
        for rows in earlier:
            coverage |= self._coverage_of_new(rows)
        before = coverage.compare(anchor, features=self.features, threshold=self.threshold)

        result = self._write(before, fingerprint, number, bounds)
        rows = empty_rows(self.synthesizer) if result is None else result.dataset
        self.group.barrier({"new rows": rows_digest(rows)}, remedy=SAME_BOUNDS)
        prepared = self.training_set.prepare(rows)
        fac_after = self._fac_after(coverage, before, result, prepared.kept)
        return RoundResult(rows, prepared, _report(before, fac_after, result, fingerprint, rows, prepared.kept))

    def _check_same_inputs(self, anchor_digest: str, fingerprint: str) -> None:
        # The processes wait for one another's files, whose names depend on all of this.
        values = {
            "training set": self.training_set.digest,
            "anchor set": anchor_digest,
            "features": None if self.features is None else content_key(np.asarray(self.features).tolist()),
            **{f"featurizer's {name}": value for name, value in self.synthesizer.featurizer.measurement.items()},
            "synthesizer": fingerprint,
        }
        self.group.barrier(
            values,
            remedy="Give all processes the same rows in the same order (shuffle with a seed) and load models from the "
            "same name or path.",
        )

    def _write(self, before: FACReport, fingerprint: str, number: int, bounds: Bounds) -> SynthesisResult | None:
        """What was written for the missing features; None where there is nothing to write for."""
        wanted = before.missing[~np.isin(before.missing, list(bounds.skip))]
        if not len(wanted) or bounds.max_samples == 0:
            return None
        group = self.group
        return self.synthesizer.synthesize(
            before, features=wanted, anchor=self.anchor if isinstance(self.anchor, Dataset) else None,
            cache_dir=group.folder / f"samples-{content_key(fingerprint, number)}", max_samples=bounds.max_samples,
            max_seconds=bounds.max_seconds,
            processes=Processes(group.rank, group.world_size, run=group.token, check=group.check),
        )  # fmt: skip

    def _fac_after(
        self, coverage: FeatureCoverage, before: FACReport, result: SynthesisResult | None, kept: Dataset
    ) -> float:
        if result is None or not len(kept):
            return before.fac
        if len(kept) == len(result.dataset):
            return result.report.fac_after  # each sample was measured when it was written
        # Over the features of the anchor set, above the same delta.
        ids, delta = before.table["feature"], before.table["delta"]
        maximum = (coverage | self._coverage_of_new(kept)).maximum
        return float((maximum[ids] > delta).mean()) if len(ids) else before.fac

    def _coverage_of_new(self, rows: Dataset) -> FeatureCoverage:
        rows = rows.select_columns(list(self.synthesizer.task.features()))
        return self._coverage(rows, rows_digest(rows))

    def _coverage(self, rows: Dataset, rows_hash: str) -> FeatureCoverage:
        """The coverage of all rows, of which each process measures a share; from disk where it is there."""
        featurizer, group = self.synthesizer.featurizer, self.group
        name = f"coverage-{content_key(featurizer.measurement, self.synthesizer.task.name, rows_hash)}"
        whole = group.folder / f"{name}.safetensors"
        parts = [group.folder / f"{name}.{rank}-of-{group.world_size}" for rank in range(group.world_size)]
        own = parts[group.rank]
        if not own.exists() and not whole.exists():
            unfinished = own.with_name(f"{own.name}.unfinished")
            coverage = (
                FeatureCoverage.load(unfinished) if unfinished.exists() else FeatureCoverage(featurizer.measurement)
            )
            share = group.share(len(rows))
            for start in range(share.start + coverage.rows, share.stop, _CHUNK):
                group.check()
                coverage |= measured(
                    self.synthesizer, rows.select(range(start, min(start + _CHUNK, share.stop))), start
                )
                coverage.save(unfinished)
            coverage.save(own)
            unfinished.unlink(missing_ok=True)
        if group.rank == 0 and not whole.exists():
            group.wait(lambda: all(part.exists() for part in parts))
            functools.reduce(operator.or_, map(FeatureCoverage.load, parts)).save(whole)
            for part in parts:  # last, so that a process that finds its part gone finds the whole
                part.unlink()
        group.wait(whole.exists)
        return FeatureCoverage.load(whole)


def measured(synthesizer: FACSynthesizer, rows: Dataset, start: int = 0) -> FeatureCoverage:
    """Returns the coverage of rows, the first of which has the number `start`."""
    featurizer = synthesizer.featurizer
    reading = featurizer.read([featurizer_row(synthesizer, row) for row in rows.to_list()], first_row=start)
    return FeatureCoverage.from_activations(
        reading.activations, measurement=featurizer.measurement, tokens=reading.tokens
    )


def featurizer_row(synthesizer: FACSynthesizer, row: dict[str, Any]) -> Any:
    """Returns a row as the featurizer takes it."""
    # Only a labelled task changes its rows, which are plain text; an anchor set may be of any type.
    if "text" in row:
        return synthesizer.task.featurizer_row(row, synthesizer.featurizer.reader.pool_over)
    return row


def empty_rows(synthesizer: FACSynthesizer) -> Dataset:
    """Returns no new rows, in the task's columns."""
    features = synthesizer.task.features()
    return Dataset.from_dict({name: [] for name in features}, features=features)


def _report(
    before: FACReport, fac_after: float, result: SynthesisResult | None, fingerprint: str, rows: Dataset, kept: Dataset
) -> RoundReport:
    synthesis, activated, exhausted = None, [], []
    if result is not None:
        synthesis = result.report
        own = kept["fac_feature"][:] if len(kept) else []
        activated = np.intersect1d(synthesis.activated, own).astype(int).tolist()
        # A feature whose rows the trainer dropped would lose the next ones too.
        tried = [*synthesis.activated, *synthesis.exhausted]
        exhausted = np.setdiff1d(tried, activated).astype(int).tolist()
    failed = synthesis is not None and synthesis.chat_failed
    return RoundReport(
        before=before, fac_after=fac_after, synthesis=synthesis, synthesizer=fingerprint, samples=len(rows),
        dropped=len(rows) - len(kept), activated=activated, exhausted=exhausted,
        failure=synthesis.ended if failed else None,
    )  # fmt: skip
