"""Coverage of a data set in a model's feature space, and Feature Activation Coverage (FAC) against an anchor set.

In: rows scored by `FACScorer`, or a sparse matrix of activations. Out: `FeatureCoverage`, a summary that merges in any
order and answers any delta and feature subset without rows or model, and from two of them a `FACReport`. Arguments
call delta `threshold`, and the floor, below which scoring keeps no activations, `keep_above`.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike
from pydantic import BaseModel, Json, NonNegativeInt

from ..storage.files import whole_file
from ..storage.scored_rows import REMEDY, ScoredRows, parquet_batches, scored_batches
from ..storage.validation import Measurement, checked
from .activations import agreed, check_scored, matrix_rows, measurement_of, parts_of
from .frequency import Frequencies, frequency_match
from .grid import ActivationGrid
from .rarefaction import unseen
from .relevant_features import chosen_ids
from .report import FACReport
from .statistics import fac, mean_interval, single_interval, standard_error
from .threshold import choose_threshold

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from scipy.sparse import csr_array

VERSION = "3"  # of the files of coverages
_ARRAYS = ("grid", "maximum", "second_maximum", "maximum_row_hash", "group_counts", "group_rows", "active_counts")
_METADATA = ("measurement", "rows", "rows_without_tokens", "tokens")
_GROUPS = 10  # of rows, for intervals: more would narrow them little and take more memory
_BATCH = 256  # rows read at a time: enough to be fast, few enough for dense rows of a wide SAE
_READ = 1 << 19  # activations read from a file at a time
_ACTIVATIONS = 1 << 16  # counted at a time: the arrays of so many stay in the cache of a processor


class _Saved(BaseModel):
    """The metadata of a saved coverage: texts of JSON."""

    measurement: Json[Measurement]
    rows: Json[NonNegativeInt]
    rows_without_tokens: Json[NonNegativeInt]
    tokens: Json[NonNegativeInt | None]


class FeatureCoverage:
    """What a data set activates: `a | b` is the coverage of the rows of both.

    Coverages of parts merge in any order to the same result, bit for bit. Parts with different `measurement`s refuse
    to merge or compare.

    measurement: how the rows were measured. d_sae: the SAE's width. keep_above: the floor; every stored activation is
        above it.
    rows, rows_without_tokens: numbers of rows. tokens: content tokens of all rows, None where they are not known.
    maximum, second_maximum: float32 [d_sae], the two largest activations over rows; 0 is none.
    maximum_row_hash: uint64 [d_sae], a content hash of the row with the largest, on ties the smallest hash. With the
        maxima it gives the delete-1 jackknife at any delta: it is known which features only one row activates, and
        which row.
    group_counts: int32 [groups, levels, d_sae], rows of each group whose activation is in (grid[k], grid[k + 1]]:
        170 MB for 65,536 features. A row's group follows from the ids of its features, so that it does not depend on
        an order; leaving out one group at a time gives intervals (`frequency_match`).
    group_rows: int64 [groups], rows of each group that activate anything.
    active_counts: int64 [levels, buckets], rows by the number of their features above grid[k], in buckets of
        `ActivationGrid`.
    """

    def __init__(self, measurement: dict[str, Any]) -> None:
        """Make the coverage of no rows, neutral in `|`. Raises: ValueError without a usable d_sae and keep_above."""
        self.measurement: dict[str, Any] = json.loads(json.dumps(measurement))
        found = checked(Measurement, self.measurement, "the measurement", REMEDY)
        self.d_sae = d_sae = found.d_sae
        self.rows = self.rows_without_tokens = 0
        self.tokens: int | None = 0
        self._grid = ActivationGrid(found.keep_above, d_sae)
        self.maximum, self.second_maximum = np.zeros((2, d_sae), np.float32)
        self.maximum_row_hash = np.zeros(d_sae, np.uint64)
        self.group_counts = np.zeros((_GROUPS, len(self.grid), d_sae), np.int32)
        self.group_rows = np.zeros(_GROUPS, np.int64)
        self.active_counts = np.zeros((len(self.grid), self._grid.n_buckets), np.int64)

    @property
    def grid(self) -> np.ndarray:
        """The levels of delta, float64 [levels], at which numbers of rows are exact: rising, the floor first."""
        return self._grid.levels

    @property
    def keep_above(self) -> float:
        """The floor of the measurement."""
        return float(self.grid[0])

    @classmethod
    def from_dataset(cls, ds: Dataset | IterableDataset, *, measurement: dict[str, Any] | None = None) -> Self:
        """Returns the coverage of a scored data set. `measurement` is read from the rows; needed only where the
        data set may be empty.

        Raises: ValueError, with row and remedy, for missing columns, nulls, rows measured differently and what
        `from_activations` refuses; TypeError for a DatasetDict.
        """
        coverage = None if measurement is None else cls(measurement)
        return _require_rows(cls._with_rows(coverage, scored_batches(ds, batch_size=_BATCH)))

    @classmethod
    def from_parquet(
        cls, files: Iterable[str | os.PathLike[str]], *, measurement: dict[str, Any] | None = None
    ) -> Self:
        """Returns the coverage of Parquet files of scored rows, such as those of `score_shards`, read in small batches.

        Raises: ValueError, with file, row and remedy, as `from_dataset` does; FileNotFoundError.
        """
        coverage = None if measurement is None else cls(measurement)
        for file in files:
            try:
                coverage = cls._with_rows(coverage, parquet_batches(file, activations=_READ))
            except ValueError as error:
                raise ValueError(f"{os.fspath(file)}: {error}") from error
        return _require_rows(coverage)

    @classmethod
    def _with_rows(cls, coverage: Self | None, batches: Iterable[ScoredRows]) -> Self | None:
        for rows in batches:
            measurement = measurement_of(rows, None if coverage is None else coverage.measurement)
            coverage = cls(measurement) if coverage is None else coverage
            coverage.measurement = measurement
            coverage._add(rows)
        return coverage

    @classmethod
    def from_activations(cls, acts: csr_array, *, measurement: dict[str, Any], tokens: ArrayLike | None = None) -> Self:
        """Returns the coverage of activations [n, d_sae] float32, as `SAEFeaturizer` returns them.

        Args:
            tokens: [n], content tokens of each row; without it no row counts as one without tokens, and how many there
                are is not known.

        Raises: ValueError, naming the row, for an id out of [0, d_sae) or twice in a row, activations that are NaN,
            infinite or not above the floor, and features in a row without tokens.
        """
        from scipy.sparse import csr_array

        coverage, acts = cls(measurement), csr_array(acts, dtype=np.float32)
        tokens_of_row = np.ones(acts.shape[0]) if tokens is None else np.asarray(tokens)
        if (expected := (len(tokens_of_row), coverage.d_sae)) != acts.shape:
            raise ValueError(f"activations have shape {acts.shape}, tokens and the measurement say {expected}")
        for start in range(0, len(tokens_of_row), _BATCH):
            rows = matrix_rows(acts, start, start + _BATCH)
            coverage._add(rows._replace(tokens=tokens_of_row[start : start + _BATCH]))
        if tokens is None:
            coverage.tokens = None
        return coverage

    def _add(self, rows: ScoredRows) -> None:
        for part in parts_of(rows, most=_ACTIVATIONS):
            self._add_part(part)

    def _add_part(self, part: ScoredRows) -> None:
        check_scored(part, d_sae=self.d_sae, keep_above=self.keep_above)
        ids, acts, lengths = part.features.astype(np.intp), part.activations, np.diff(part.starts)
        self.rows += len(lengths)
        self.rows_without_tokens += int(np.count_nonzero(part.tokens == 0))
        self.tokens = None if self.tokens is None else self.tokens + int(part.tokens.sum())
        group = _groups(ids, part.starts, self.d_sae)
        self.group_rows += np.bincount(group[lengths > 0], minlength=_GROUPS)
        self._count(ids, self._grid.level_of(acts), lengths, group)
        # What is below the second maximum changes nothing, so that soon few activations are left to sort. Only a row
        # with a maximum needs its hash.
        strong = np.flatnonzero(acts >= self.second_maximum.take(ids, mode="clip"))
        row = np.searchsorted(part.starts, strong, side="right") - 1
        is_hashed = np.zeros(len(lengths), bool)
        is_hashed[row[acts[strong] >= self.maximum[ids[strong]]]] = True
        entries = np.repeat(is_hashed, lengths)
        row_hash = np.zeros(len(lengths), np.uint64)
        row_hash[is_hashed] = _row_hashes(ids[entries], acts[entries], lengths[is_hashed])
        self._raise_maxima(*_top_two_by_feature(ids[strong], acts[strong], row_hash[row]))

    def _count(self, ids: np.ndarray, level: np.ndarray, lengths: np.ndarray, group: np.ndarray) -> None:
        levels, buckets = self.active_counts.shape
        cell = np.repeat(group * levels, lengths)
        cell += level
        cell *= self.d_sae
        cell += ids
        np.add.at(self.group_counts.reshape(-1), cell, np.int32(1))  # of another type it is far slower
        # Of each row, how many features it activates above each level: a histogram over levels, summed from the top.
        cell = np.repeat(np.arange(len(lengths)) * levels, lengths)
        cell += level
        in_level = np.bincount(cell, minlength=len(lengths) * levels).reshape(-1, levels)
        above = np.cumsum(in_level[:, ::-1], axis=1)[:, ::-1]
        cell = self._grid.bucket_of[above] + np.arange(levels) * buckets
        np.add.at(self.active_counts.reshape(-1), cell.reshape(-1), 1)

    def _raise_maxima(
        self, i: np.ndarray | slice, maximum: np.ndarray, second: np.ndarray, row_hash: np.ndarray
    ) -> None:
        old, old_hash = self.maximum[i], self.maximum_row_hash[i]
        larger = np.where(old > maximum, old_hash, row_hash)
        self.maximum_row_hash[i] = np.where(old == maximum, np.minimum(old_hash, row_hash), larger)
        self.second_maximum[i] = np.maximum(np.minimum(old, maximum), np.maximum(self.second_maximum[i], second))
        self.maximum[i] = np.maximum(old, maximum)  # last, as a slice makes old a view of it

    def __or__(self, other: FeatureCoverage) -> FeatureCoverage:
        measurement = agreed(self.measurement, other.measurement, "parts measured differently do not merge")
        merged = FeatureCoverage(measurement)
        for part in (self, other):
            merged._raise_maxima(slice(None), part.maximum, part.second_maximum, part.maximum_row_hash)
        for name in ("rows", "rows_without_tokens", "group_counts", "group_rows", "active_counts"):
            setattr(merged, name, getattr(self, name) + getattr(other, name))
        known = self.tokens is not None and other.tokens is not None
        merged.tokens = self.tokens + other.tokens if known else None
        return merged

    def __eq__(self, other: object) -> bool:
        same = (np.array_equal(getattr(self, name), getattr(other, name)) for name in _METADATA + _ARRAYS)
        return isinstance(other, FeatureCoverage) and all(same)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, whole or not at all.

        Of `group_counts` it holds what is not 0 (`counts`), and where that is in the flat array (`cells`).
        """
        from safetensors import numpy as safetensors

        metadata = {name: json.dumps(getattr(self, name)) for name in _METADATA}
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        counts = arrays.pop("group_counts").reshape(-1)
        arrays["cells"] = np.flatnonzero(counts).astype(np.uint32 if counts.size < 1 << 32 else np.uint64)
        arrays["counts"] = counts[arrays["cells"]]
        with whole_file(path) as partial:
            safetensors.save_file(arrays, partial, {"hf_fac.coverage": VERSION} | metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Returns the coverage that `save` wrote. Raises: ValueError for any other file, and for another version."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file ({error}): save the coverage again") from error
        if (found := metadata.pop("hf_fac.coverage", None)) != VERSION:
            raise ValueError(
                f"{path}: expected a coverage of version {VERSION}, found {found}: make it of the scored rows again "
                "(FeatureCoverage.from_dataset), and save it"
            )
        remedy = "save the coverage again"
        saved = checked(_Saved, metadata, os.fspath(path), remedy)
        coverage = cls(json.loads(metadata["measurement"]))
        arrays["group_counts"] = coverage._counts_of(arrays.pop("cells", None), arrays.pop("counts", None))
        for name in _ARRAYS:
            held, array = getattr(coverage, name), arrays.get(name)
            if array is None or (array.shape, array.dtype) != (held.shape, held.dtype):
                raise ValueError(f"{path}: {name} is absent, or of another shape or type; {remedy}")
        if not np.array_equal(arrays.pop("grid"), coverage.grid):
            raise ValueError(f"{path}: grid has other levels than this version of hf_fac counts at; {remedy}")
        vars(coverage).update(arrays, **saved.model_dump(exclude={"measurement"}))
        return coverage

    def _counts_of(self, cells: np.ndarray | None, counts: np.ndarray | None) -> np.ndarray | None:
        """`group_counts` of what `save` wrote in its place; None for anything else."""
        found = np.zeros_like(self.group_counts)
        if cells is None or counts is None or cells.shape != (counts.size,) or counts.dtype != found.dtype:
            return None
        if cells.dtype.kind != "u" or cells.max(initial=0) >= found.size:
            return None
        found.reshape(-1)[cells] = counts
        return found

    def compare(
        self,
        anchor: FeatureCoverage,
        *,
        features: ArrayLike | None = None,
        threshold: float | ArrayLike | None = None,
        relative: float | None = None,
    ) -> FACReport:
        """Returns FAC of this data set against `anchor`, |F(D) & F(anchor)| / |F(anchor)| (arXiv 2602.10388).

        A set activates feature i when its maximum exceeds delta. With neither `threshold` nor `relative` delta is
        calibrated: the smallest level of the grid above the floor at which the median anchor row activates at most 1 %
        (at least one) of the features that are live in the anchor, that is above the floor. `threshold_source` says how
        delta was chosen.

        Args:
            features: ids, F_task; None is all.
            threshold: delta in the SAE's units, one number or [d_sae].
            relative: delta as a share of the anchor's maximum of each feature, but not below the floor.

        Raises: ValueError for another measurement; a delta negative, not finite or below the floor; an empty list of
            features, ids out of range or not integers, or relevant ones of another SAE; a calibration that finds no
            level. Warns (UserWarning) where FAC says nothing: F(anchor) is empty, FAC is above 0.98, or the median
            anchor row activates over 10 % of features.
        """
        if not isinstance(anchor, FeatureCoverage):
            raise TypeError(f"anchor is a {type(anchor).__name__}: pass FeatureCoverage.from_dataset(anchor)")
        agreed(self.measurement, anchor.measurement, "data and anchor were measured differently")
        if features is not None:
            features = chosen_ids(features, self.measurement)
        delta, source = choose_threshold(
            threshold,
            relative,
            keep_above=anchor.keep_above,
            anchor_maximum=anchor.maximum,
            levels=anchor.grid,
            median_active=np.array([anchor._median_active(level) for level in anchor.grid]),
            anchor_rows=anchor.rows,
        )
        report = self._report(anchor, features, delta, source)
        report.warn(stacklevel=3)
        return report

    def _report(
        self, anchor: FeatureCoverage, features: np.ndarray | None, delta: np.ndarray, source: str
    ) -> FACReport:
        wanted = np.arange(self.d_sae) if features is None else features
        own, others = self._frequencies(delta), anchor._frequencies(delta)
        data_support, anchor_support = own.support, others.support
        in_anchor = wanted[(anchor.maximum > delta)[wanted]]
        data_only = wanted[((anchor.maximum <= delta) & (self.maximum > delta))[wanted]]
        covered = (self.maximum > delta)[in_anchor]
        missing = in_anchor[~covered]
        missing = missing[np.lexsort((missing, -anchor.maximum[missing], -anchor_support[missing]))]
        columns = {
            "anchor_max": anchor.maximum, "anchor_support": anchor_support, "data_max": self.maximum,
            "data_support": data_support, "delta": np.broadcast_to(delta, self.d_sae),
        }  # fmt: skip
        table = {"feature": in_anchor, "covered": covered} | {name: all_[in_anchor] for name, all_ in columns.items()}
        share, lost = fac(covered), self._lost_without_a_row(in_anchor, delta)
        error = standard_error(lost, len(in_anchor), self.rows)
        n_covered, support = int(np.count_nonzero(covered)), data_support[in_anchor]
        reached = n_covered + unseen(support, self.rows)
        return FACReport(
            fac=share,
            interval=mean_interval(share, error),
            single_interval=single_interval(share, error, lost, support),
            standard_error=error,
            saturation=n_covered / reached if reached else math.nan,
            threshold=delta if delta.ndim else float(delta),
            threshold_source=source,
            features=features,
            covered=in_anchor[covered],
            missing=missing,
            missing_support=anchor_support[missing],
            support_exact=bool(np.isin(delta, self.grid).all()),
            **frequency_match(own.of(wanted), others.of(wanted))._asdict(),
            active_features=n_covered + len(data_only),
            mean_tokens=self._mean_tokens(),
            anchor_mean_tokens=anchor._mean_tokens(),
            rows=self.rows,
            rows_without_tokens=self.rows_without_tokens,
            anchor_rows=anchor.rows,
            anchor_rows_without_tokens=anchor.rows_without_tokens,
            active_share=self._active_share(delta),
            anchor_active_share=anchor._active_share(delta),
            measurement=self.measurement,
            table=table,
            data_only={"feature": data_only, "data_support": data_support[data_only]},
            over_threshold=self._over_threshold(anchor, wanted),
        )

    def _over_threshold(self, anchor: FeatureCoverage, wanted: np.ndarray) -> dict[str, np.ndarray]:
        """Returns by level of the grid, up to the last that a feature of the anchor exceeds: numbers of features and
        the standard error of FAC."""
        levels, counts = self.grid[self.grid < anchor.maximum[wanted].max(initial=0)], []
        for level in levels:
            in_anchor = wanted[anchor.maximum[wanted] > level]
            error = standard_error(self._lost_without_a_row(in_anchor, level), len(in_anchor), self.rows)
            counts.append((len(in_anchor), np.count_nonzero(self.maximum[in_anchor] > level), error))
        sizes, covered, errors = np.array(counts).reshape(-1, 3).T
        return {
            "threshold": levels, "anchor_features": sizes.astype(np.int64), "covered": covered.astype(np.int64),
            "standard_error": np.nan_to_num(errors),
        }  # fmt: skip

    def _frequencies(self, delta: np.ndarray) -> Frequencies:
        """The rows that activate each feature, in all and by group: exact on the grid; off it the count at the next
        level above, a lower bound."""
        first = np.searchsorted(self.grid, delta)
        if delta.ndim:
            is_above = np.arange(len(self.grid))[:, None] >= first
            by_group = self.group_counts.sum(axis=1, dtype=np.int64, where=is_above)
        else:
            by_group = self.group_counts[:, first:].sum(axis=1, dtype=np.int64)
        known = (self.maximum > delta).astype(np.int64) + (self.second_maximum > delta)
        return Frequencies(np.maximum(by_group.sum(axis=0), known), by_group, self.group_rows)

    def _mean_tokens(self) -> float:
        return math.nan if self.tokens is None or not self.rows else self.tokens / self.rows

    def _median_active(self, delta: np.ndarray) -> int:
        # The lower median at its bucket's upper end: at least half of the rows activate no more.
        counts = self.active_counts[np.searchsorted(self.grid, delta, side="right") - 1]
        bucket = np.searchsorted(np.cumsum(counts), (self.rows + 1) // 2)
        return int(np.searchsorted(self._grid.bucket_of, bucket, side="right")) - 1

    def _active_share(self, delta: np.ndarray) -> float:
        return math.nan if delta.ndim else self._median_active(delta) / self.d_sae

    def _lost_without_a_row(self, features: np.ndarray, delta: np.ndarray) -> np.ndarray:
        """For each row that alone activates some of the features: how many."""
        by_one_row = features[((self.maximum > delta) & (self.second_maximum <= delta))[features]]
        return np.unique(self.maximum_row_hash[by_one_row], return_counts=True)[1]


def _require_rows(coverage: FeatureCoverage | None) -> FeatureCoverage:
    if coverage is None:
        raise ValueError("an empty data set does not say how it was measured: pass measurement=")
    return coverage


def _top_two_by_feature(
    ids: np.ndarray, acts: np.ndarray, row_hash: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns, of each feature that occurs: its id, its largest and second largest activation, and the hash of the row
    with the largest.

    The second is 0 where there is one activation only. Of rows with the same activation the smallest hash counts.
    """
    order = np.lexsort((row_hash, -acts, ids))
    ids, acts = ids[order], acts[order]
    largest = np.flatnonzero(np.diff(ids, prepend=-1))
    has_second = np.diff(largest, append=len(ids)) > 1
    second = np.zeros(len(largest), np.float32)
    second[has_second] = acts[largest[has_second] + 1]
    return ids[largest], acts[largest], second, row_hash[order][largest]


def _groups(ids: np.ndarray, starts: np.ndarray, d_sae: int) -> np.ndarray:
    """Returns the group of each row, int64: equal rows share one.

    Activations play no part, as their last bits depend on the batch that a row was read in.
    """
    total, is_active = np.zeros(len(starts) - 1, np.uint64), np.diff(starts) > 0
    if len(ids):
        total[is_active] = np.add.reduceat(_hashes(d_sae).take(ids, mode="clip"), starts[:-1][is_active])
    return (total % np.uint64(_GROUPS)).astype(np.int64)


@functools.cache
def _hashes(n: int) -> np.ndarray:
    """Hashes of the numbers below n, uint64 [n]."""
    from pandas.util import hash_array

    return hash_array(np.arange(n, dtype=np.uint64))


def _row_hashes(ids: np.ndarray, acts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Returns a content hash of each row, uint64: a sum over its activations, in any order."""
    from pandas.util import hash_array

    hashes = hash_array((ids.astype(np.uint64) << np.uint64(32)) | acts.view(np.uint32))
    total, ends = np.append(np.uint64(0), np.cumsum(hashes)), np.cumsum(lengths)
    return total[ends] - total[ends - lengths]
