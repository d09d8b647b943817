"""Coverage of a data set in a model's feature space, and Feature Activation Coverage (FAC) against an anchor set.

In: rows scored by `FACScorer`, or a sparse matrix of activations. Out: `FeatureCoverage`, a summary that merges in any
order and answers any delta and feature subset without rows or model, and `FACReport`: FAC and the missing features.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated, Any, Self

import numpy as np
from numpy.typing import ArrayLike
from pydantic import BaseModel, Field, Json, NonNegativeInt

from ..storage.differences import differences
from ..storage.feature_ids import check_feature_ids
from ..storage.files import whole_file
from ..storage.scored_rows import REMEDY, scored_batches
from ..storage.validation import Measurement, Strict, WholeMeasurement, checked, read_measurement

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset, IterableDataset
    from scipy.sparse import csr_array

_VERSION = "1"
_ARRAYS = ("grid", "maximum", "second_maximum", "maximum_row", "level_counts", "active_counts")
_METADATA = ("measurement", "rows", "rows_without_tokens")
_GEOMETRIC = (2.0 ** (np.arange(-24, 41) / 4)).astype(np.float32)  # levels of delta in the activations' own type
_BATCH = 256  # rows at a time: enough to be fast, few enough for dense rows of a wide SAE


class _Saved(BaseModel):
    """The metadata of a saved coverage: texts of JSON."""

    measurement: Json[Measurement]
    rows: Json[NonNegativeInt]
    rows_without_tokens: Json[NonNegativeInt]


class SavedReport(Strict):
    """`FACReport.to_dict()`, as it is read back."""

    fac: float | None
    interval: Annotated[list[float | None], Field(min_length=2, max_length=2)]
    confidence: float
    threshold: float | list[float]
    threshold_source: str
    features: list[NonNegativeInt] | None
    covered: list[NonNegativeInt]
    missing: list[NonNegativeInt]
    kl_divergence: float | None
    rows: NonNegativeInt
    rows_without_tokens: NonNegativeInt
    anchor_rows: NonNegativeInt
    anchor_rows_without_tokens: NonNegativeInt
    measurement: WholeMeasurement


class FeatureCoverage:
    """What a data set activates, a commutative monoid over its rows: `a | b` is the coverage of both.

    Every attribute is bit for bit the same for any order of rows and merges. Parts with different `measurement`s refuse
    to merge or compare; `d_sae` and the floor that all kept activations exceed, `keep_above`, are read from it.
    """

    def __init__(self, measurement: dict[str, Any]) -> None:
        """The coverage of no rows, neutral in `|`. Raises ValueError without a usable d_sae and keep_above."""
        self.measurement: dict[str, Any] = json.loads(json.dumps(measurement))
        found = checked(Measurement, self.measurement, "the measurement", REMEDY)
        self.d_sae, self.keep_above = d_sae, _ = found.d_sae, found.keep_above
        self.rows = self.rows_without_tokens = 0
        # float64 [levels]: the floor, then those of 2**-6 to 2**10 in steps of 2**(1/4) that exceed it.
        self.grid = np.append(self.keep_above, _GEOMETRIC[_GEOMETRIC.astype(np.float64) > self.keep_above])
        # The two largest activations over rows (0: none), and a content hash of the row with the largest (on ties the
        # smallest hash). They give the delete-1 jackknife at any delta: which features hang on one row, and on which.
        self.maximum, self.second_maximum = np.zeros((2, d_sae), np.float32)
        self.maximum_row = np.zeros(d_sae, np.uint64)
        # Rows whose activation is in (grid[k], grid[k + 1]]: 35 MB for 65,536 features.
        self.level_counts = np.zeros((len(self.grid), d_sae), np.int64)
        # Rows by the number of their features above grid[k]: exact up to 511, then in buckets at most 0.4 % wide.
        active = np.arange(d_sae + 1)
        shift = np.maximum(np.frexp(active)[1] - 9, 0)
        self._bucket = 256 * shift + (active >> shift)
        self.active_counts = np.zeros((len(self.grid), self._bucket[-1] + 1), np.int64)
        # The 16 leading bits of a positive float32 give its size to 2**-8: at most one level lies in such a cell.
        ends = (np.arange(1, 0xFF01, dtype=np.uint32) << np.uint32(15)).view(np.float32)
        self._level_of_cell = np.searchsorted(self.grid[1:], ends)

    @classmethod
    def from_dataset(cls, ds: Dataset | IterableDataset, *, measurement: dict[str, Any] | None = None) -> Self:
        """The coverage of a scored data set. `measurement` is read from the rows, and needed only when there are none.

        Raises ValueError, with row and remedy, for missing columns, nulls, rows measured differently and what
        `from_activations` refuses; TypeError for a DatasetDict.
        """
        from datasets import Dataset, IterableDataset

        if isinstance(ds, dict):
            raise TypeError(f"got a {type(ds).__name__}: pass one split, one of {', '.join(ds)}")
        if not isinstance(ds, Dataset | IterableDataset):
            raise TypeError(f"got a {type(ds).__name__}: pass a data set (Dataset.from_list makes one); {REMEDY}")
        coverage = None if measurement is None else cls(measurement)
        for rows in scored_batches(ds, batch_size=_BATCH):
            for row, text in rows.measurements:
                found = read_measurement(text, f"row {row:,} and after: fac_measurement", REMEDY)
                coverage = coverage or cls(found)
                coverage.measurement = _agreed(
                    coverage.measurement, found, f"row {row:,} and after: measured differently"
                )
            coverage._add(rows.first_row, rows.features, rows.activations, np.diff(rows.starts), rows.tokens)
        if coverage is None:
            raise ValueError("an empty data set does not say how it was measured: pass measurement=")
        return coverage

    @classmethod
    def from_activations(cls, acts: csr_array, *, measurement: dict[str, Any], tokens: ArrayLike | None = None) -> Self:
        """The coverage of `acts` [n, d_sae] float32, as `SAEFeaturizer` returns them; `tokens` [n]: content tokens.

        Without `tokens` no row counts as one without. Raises ValueError, naming the row, for an id out of [0, d_sae)
        or twice in a row, activations that are NaN, infinite or not above the floor, and features without tokens.
        """
        from scipy.sparse import csr_array

        coverage, acts = cls(measurement), csr_array(acts, dtype=np.float32)
        tokens = np.ones(acts.shape[0]) if tokens is None else np.asarray(tokens)
        if (expected := (len(tokens), coverage.d_sae)) != acts.shape:
            raise ValueError(f"activations have shape {acts.shape}, tokens and the measurement say {expected}")
        for row in range(0, len(tokens), _BATCH):
            part = acts[row : row + _BATCH]
            coverage._add(row, part.indices, part.data, np.diff(part.indptr), tokens[row : row + _BATCH])
        return coverage

    def _add(self, row: int, ids: np.ndarray, acts: np.ndarray, lengths: np.ndarray, tokens: np.ndarray) -> None:
        ids, rows = ids.astype(np.int64, copy=False), np.repeat(np.arange(len(lengths)), lengths)
        self._refuse_bad(row, rows, ids, acts, tokens)
        self.rows += len(lengths)
        self.rows_without_tokens += int(np.count_nonzero(tokens == 0))
        level = self._level_of_cell[acts.view(np.uint32) >> np.uint32(15)]
        level -= acts <= self.grid[level]
        np.add.at(self.level_counts.reshape(-1), level * self.d_sae + ids, 1)
        levels, buckets = self.active_counts.shape
        in_level = np.bincount(rows * levels + level, minlength=len(lengths) * levels).reshape(-1, levels)
        bucket = self._bucket[np.cumsum(in_level[:, ::-1], axis=1)[:, ::-1]] + np.arange(levels) * buckets
        np.add.at(self.active_counts.reshape(-1), bucket.reshape(-1), 1)

        # What is below the second maximum changes nothing, so that soon few activations are left to sort.
        rivals = np.flatnonzero(acts >= self.second_maximum[ids])
        row_hash = _row_hashes(ids, acts, lengths)[rows[rivals]]
        order = np.lexsort((row_hash, -acts[rivals], ids[rivals]))
        i, a = ids[rivals][order], acts[rivals][order]
        first = np.flatnonzero(np.diff(i, prepend=-1))
        second = np.append(a, np.float32(0))[first + 1] * (np.append(i, -1)[first + 1] == i[first])
        self._raise_maxima(i[first], a[first], second, row_hash[order][first])

    def _refuse_bad(self, row: int, rows: np.ndarray, ids: np.ndarray, acts: np.ndarray, tokens: np.ndarray) -> None:
        def refuse(bad: np.ndarray, problem: str) -> None:
            if bad.any():
                k = int(np.argmax(bad))
                raise ValueError(f"row {row + rows[k]:,}: feature {ids[k]} at {acts[k]:g} {problem}: {REMEDY}")

        refuse((ids < 0) | (ids >= self.d_sae), f"is not in [0, {self.d_sae:,}), the width of the SAE")
        refuse(~np.isfinite(acts), "is not finite (some models overflow in float16)")
        refuse(acts <= np.float64(self.keep_above), f"is not above the floor keep_above = {self.keep_above:g}")
        refuse(tokens[rows] <= 0, "is in a row without content tokens")
        key = rows * self.d_sae + ids
        if (np.diff(key) <= 0).any():
            order = np.argsort(key)
            refuse(np.isin(key, key[order][1:][np.diff(key[order]) == 0]), "stands twice in its row")

    def _raise_maxima(self, i: np.ndarray | slice, maximum: np.ndarray, second: np.ndarray, row: np.ndarray) -> None:
        old, old_row = self.maximum[i], self.maximum_row[i]
        larger = np.where(old > maximum, old_row, row)
        self.maximum_row[i] = np.where(old == maximum, np.minimum(old_row, row), larger)
        self.second_maximum[i] = np.maximum(np.minimum(old, maximum), np.maximum(self.second_maximum[i], second))
        self.maximum[i] = np.maximum(old, maximum)  # last, as a slice makes old a view of it

    def __or__(self, other: FeatureCoverage) -> FeatureCoverage:
        agreed = _agreed(self.measurement, other.measurement, "parts measured differently do not merge")
        merged = FeatureCoverage(agreed)
        for part in (self, other):
            merged._raise_maxima(slice(None), part.maximum, part.second_maximum, part.maximum_row)
            for name in ("rows", "rows_without_tokens", "level_counts", "active_counts"):
                setattr(merged, name, getattr(merged, name) + getattr(part, name))
        return merged

    def __eq__(self, other: object) -> bool:
        same = (np.array_equal(getattr(self, name), getattr(other, name)) for name in _METADATA + _ARRAYS)
        return isinstance(other, FeatureCoverage) and all(same)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, whole or not at all."""
        from safetensors import numpy as safetensors

        metadata = {name: json.dumps(getattr(self, name)) for name in _METADATA}
        with whole_file(path) as partial:
            safetensors.save_file(
                {n: getattr(self, n) for n in _ARRAYS}, partial, {"hf_fac.coverage": _VERSION} | metadata
            )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """The coverage that `save` wrote. Raises ValueError for any other file, and for another version."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file ({error}): save the coverage again") from error
        if (found := metadata.pop("hf_fac.coverage", None)) != _VERSION:
            raise ValueError(f"{path}: expected a coverage of version {_VERSION}, found {found}: save it again")
        remedy = "save the coverage again"
        saved = checked(_Saved, metadata, os.fspath(path), remedy)
        coverage = cls(json.loads(metadata["measurement"]))
        for name in _ARRAYS:
            held, array = getattr(coverage, name), arrays.get(name)
            if array is None or (array.shape, array.dtype) != (held.shape, held.dtype):
                raise ValueError(f"{path}: {name} is absent, or of another shape or type; {remedy}")
        vars(coverage).update(arrays, rows=saved.rows, rows_without_tokens=saved.rows_without_tokens)
        return coverage

    def compare(
        self,
        anchor: FeatureCoverage,
        *,
        features: ArrayLike | None = None,
        threshold: float | ArrayLike | None = None,
        relative: float | None = None,
    ) -> FACReport:
        """FAC of this data set against `anchor`, |F(D) & F(anchor)| / |F(anchor)|, over the ids `features` (None: all).

        A set activates feature i when its maximum exceeds delta (PAPER.md, Definitions). delta is `threshold`, in the
        SAE's units, one number or [d_sae]; or `relative` times the anchor's maximum of i, but not below the floor; or,
        with neither, is calibrated: the smallest level of the grid above the floor at which the median anchor row
        activates at most 1 % (at least one) of the features live in the anchor, that is above the floor.
        `threshold_source` says which.

        Raises ValueError for another measurement; a delta negative, not finite or below the floor; features that are
        out of range, not integers, or none; a calibration that finds no level. Warns (UserWarning) where F(anchor) is
        empty, FAC is above 0.98, or the median anchor row activates over 10 % of all features: there FAC says nothing.
        """
        if not isinstance(anchor, FeatureCoverage):
            raise TypeError(f"anchor is a {type(anchor).__name__}: pass FeatureCoverage.from_dataset(anchor)")
        _agreed(self.measurement, anchor.measurement, "data and anchor were measured differently")
        wanted = np.arange(self.d_sae)
        if features is not None:
            wanted = np.unique(check_feature_ids(np.atleast_1d(features), self.d_sae, may_repeat=True))
        delta, source = anchor._choose_threshold(threshold, relative)
        data_rows, anchor_rows = self._rows_above(delta), anchor._rows_above(delta)
        ids = wanted[(anchor.maximum > delta)[wanted]]  # F(anchor)
        covered = (self.maximum > delta)[ids]
        missing = ids[~covered]
        missing = missing[np.lexsort((missing, -anchor.maximum[missing], -anchor_rows[missing]))]
        # Features of neither set stay out of the divergence: smoothing them would only measure the width of the SAE.
        p, q = (rows[wanted][(anchor_rows + data_rows)[wanted] > 0] + 0.5 for rows in (anchor_rows, data_rows))
        fac = float(covered.mean()) if ids.size else math.nan
        share, anchor_share = (math.nan if delta.ndim else c._median_active(delta) / c.d_sae for c in (self, anchor))
        if not ids.size:
            warnings.warn("FAC is NaN: the anchor activates none of the features; lower the threshold", stacklevel=2)
        if anchor_share > 0.10:
            problem = f"the median anchor row activates {anchor_share:.0%} of all features above delta"
            warnings.warn(f"FAC says nothing: {problem}; raise the threshold", stacklevel=2)
        if fac > 0.98:
            warnings.warn(f"FAC {fac:.3f} is too near 1 to tell data sets apart: raise the threshold", stacklevel=2)
        columns = [anchor.maximum, anchor_rows, self.maximum, data_rows, np.broadcast_to(delta, self.d_sae)]
        names = ["anchor_max", "anchor_rows", "data_max", "data_rows", "delta"]
        return FACReport(
            fac=fac,
            interval=self._interval(ids, delta, fac),
            threshold=delta if delta.ndim else float(delta),
            threshold_source=source,
            features=None if features is None else wanted,
            covered=ids[covered],
            missing=missing,
            missing_support=anchor_rows[missing],
            support_exact=bool(np.isin(delta, anchor.grid).all()),
            kl_divergence=float(np.sum(p / p.sum() * np.log(p / p.sum() * q.sum() / q))) if p.size else math.nan,
            rows=self.rows,
            rows_without_tokens=self.rows_without_tokens,
            anchor_rows=anchor.rows,
            anchor_rows_without_tokens=anchor.rows_without_tokens,
            active_share=share,
            anchor_active_share=anchor_share,
            measurement=self.measurement,
            table={"feature": ids, "covered": covered} | {n: c[ids] for n, c in zip(names, columns, strict=True)},
        )

    def _choose_threshold(self, threshold: float | ArrayLike | None, relative: float | None) -> tuple[np.ndarray, str]:
        floor, live = self.keep_above, np.count_nonzero(self.maximum)
        if threshold is not None and relative is not None:
            raise ValueError("give threshold or relative, not both")
        if threshold is not None:
            delta = check_threshold(threshold, self.d_sae)
            if (least := delta.min()) < floor:
                remedy = "score both data sets again with a lower keep_above, or raise the threshold"
                raise ValueError(f"threshold {least:g} is below the floor keep_above = {floor:g}: {remedy}")
            values = f"{least:.4g}" if not delta.ndim else f"{least:.4g} to {delta.max():.4g}, one for each feature"
            return delta, f"{values}, as given"
        if relative is not None:
            if not isinstance(relative, int | float | np.number) or not 0 < relative < 1:
                raise ValueError(f"relative must be a number between 0 and 1, got {relative!r:.100}")
            delta = relative * self.maximum.astype(np.float64)
            raised = np.count_nonzero((delta < floor) & (self.maximum > 0))
            note = f", but the floor {floor:g} for {raised:,} of {live:,} features that it exceeds" if raised else ""
            return np.maximum(delta, floor), f"{relative:g} of each feature's maximum in the anchor{note}"
        limit = f"at most 1 % ({(allowed := max(1, live // 100)):,}) of its {live:,} live features"
        for delta in self.grid[1:]:
            if (median := self._median_active(delta)) <= allowed:
                source = "calibrated on the anchor: the smallest level of the grid above the floor"
                rows = f"the median of its {self.rows:,} rows activates {limit}; it activates {median:,}"
                return np.array(delta), f"{delta:.4g}, {source} {floor:g} at which {rows}"
        raise ValueError(f"the median anchor row never activates {limit}: give threshold= or relative=")

    def _rows_above(self, delta: np.ndarray) -> np.ndarray:
        """int64 [d_sae], exact where delta is on the grid, else a lower bound: the count at the next level above."""
        above = np.vstack([np.cumsum(self.level_counts[::-1], axis=0)[::-1], np.zeros(self.d_sae, np.int64)])
        at_next_level = above[np.searchsorted(self.grid, delta), np.arange(self.d_sae)]
        return np.maximum(at_next_level, (self.maximum > delta).astype(np.int64) + (self.second_maximum > delta))

    def _median_active(self, delta: np.ndarray) -> int:
        # The lower median at its bucket's upper end: at least half of the rows activate no more.
        counts = self.active_counts[np.searchsorted(self.grid, delta, side="right") - 1]
        bucket = np.searchsorted(np.cumsum(counts), (self.rows + 1) // 2)
        return int(np.searchsorted(self._bucket, bucket, side="right")) - 1

    def _interval(self, ids: np.ndarray, delta: np.ndarray, fac: float) -> tuple[float, float]:
        if self.rows < 2 or not ids.size:
            return math.nan, math.nan
        # Without a row FAC loses just the features that this row alone activates.
        alone = ids[((self.maximum > delta) & (self.second_maximum <= delta))[ids]]
        lost = np.unique(self.maximum_row[alone], return_counts=True)[1]
        variance = (self.rows - 1) / self.rows * (np.sum(lost**2) - np.sum(lost) ** 2 / self.rows) / ids.size**2
        return max(0.0, fac - 1.96 * math.sqrt(variance)), min(1.0, fac + 1.96 * math.sqrt(variance))


@dataclass(frozen=True, eq=False)
class FACReport:
    """FAC of a data set against an anchor set: what is covered, what is missing, above which delta.

    interval is for the mean FAC of data sets of this size from the same source, with this anchor set: fac +- 1.96
    deviations by the delete-1 jackknife over rows (Heltshe & Forrester 1983), whose variance errs on the large side
    (Efron & Stein 1981), clipped to [0, 1]. It has no width where each feature has two rows or none; NaN below 2 rows.
    All is exact at any delta but numbers of rows that activate a feature, and with them the order of missing and the KL
    divergence: off the grid they are lower bounds, the count at the next level above; active shares are upper bounds.
    """

    fac: float  # |F(D) & F(anchor)| / |F(anchor)|; NaN where F(anchor) is empty
    interval: tuple[float, float]
    threshold: float | np.ndarray  # delta in the SAE's units; float64 [d_sae] with relative=, or where given so
    threshold_source: str
    features: np.ndarray | None  # int64, rising: the subset F_task; None for all features
    covered: np.ndarray  # int64 ids, rising
    missing: np.ndarray  # int64 ids, by anchor rows above delta and then anchor maximum, strongest first
    missing_support: np.ndarray  # int64: anchor rows above delta of each of missing
    support_exact: bool  # delta is on FeatureCoverage.grid, so that numbers of rows are exact
    kl_divergence: float  # Eq. 3 in nats, KL(anchor || data), p_i ~ rows above delta + 1/2, i active in either set
    rows: int
    rows_without_tokens: int
    anchor_rows: int
    anchor_rows_without_tokens: int
    active_share: float  # features above delta in the median row, of d_sae; NaN where delta is [d_sae]
    anchor_active_share: float
    measurement: dict[str, Any]
    table: dict[str, np.ndarray] = field(repr=False)
    confidence: float = 0.95

    def to_pandas(self) -> pd.DataFrame:
        """A row a feature of F(anchor): feature, covered, anchor_max, anchor_rows, data_max, data_rows, delta."""
        import pandas as pd

        return pd.DataFrame(self.table)

    def to_dict(self) -> dict[str, Any]:
        """All but the table, and hf_fac's version, for JSON: arrays become lists, NaN None."""
        values = {"hf_fac": version("hf-fac")} | {name: v for name, v in vars(self).items() if name != "table"}
        return json.loads(json.dumps(values, default=np.ndarray.tolist), parse_constant=lambda _: None)

    def __str__(self) -> str:
        covered, missing, least = len(self.covered), len(self.missing), "" if self.support_exact else "at least "
        strongest = zip(self.missing[:5].tolist(), self.missing_support.tolist(), strict=False)
        return (
            f"FAC {self.fac:.3f} ({self.confidence:.0%} interval {self.interval[0]:.3f} to {self.interval[1]:.3f})\n"
            f"of {covered + missing:,} features of the anchor: {covered:,} covered, {missing:,} missing\n"
            f"delta: {self.threshold_source}\n"
            f"rows: {self.rows:,} ({self.rows_without_tokens:,} without tokens), anchor {self.anchor_rows:,} "
            f"({self.anchor_rows_without_tokens:,} without tokens); KL(anchor || data) {self.kl_divergence:.3f} nats"
        ) + "".join(f"\nmissing: feature {i}, {least}{n:,} anchor rows" for i, n in strongest)


def check_threshold(threshold: float | ArrayLike, d_sae: int) -> np.ndarray:
    """Returns delta, float64 [] or [d_sae]. Raises: ValueError where it is negative, not finite or of another shape."""
    try:
        delta = np.array(threshold, np.float64)
    except (TypeError, ValueError):
        delta = np.array(math.nan)
    if delta.shape not in ((), (d_sae,)) or not (np.isfinite(delta) & (delta >= 0)).all():
        raise ValueError(
            f"threshold must be one finite number or {d_sae:,} of them, none negative; got {threshold!r:.100}"
        )
    return delta


def _agreed(one: dict[str, Any], other: dict[str, Any], problem: str) -> dict[str, Any]:
    if found := differences(one, other):
        raise ValueError(f"{problem} ({found}): score all rows with the same FACScorer")
    # Of two names of one model the same one in any order.
    return min(one, other, key=lambda each: json.dumps(each, sort_keys=True))


def _row_hashes(ids: np.ndarray, acts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    # Each (id, bits of the activation) mixed by splitmix64 (Steele, Lea & Flood 2014), and summed: in any order.
    x = (ids.astype(np.uint64) << np.uint64(32)) | acts.view(np.uint32)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    total, ends = np.append(np.uint64(0), np.cumsum(x ^ (x >> np.uint64(31)))), np.cumsum(lengths)
    return total[ends] - total[ends - lengths]
