"""Select before you synthesize: rows of a pool that is already scored, chosen to activate what a data set misses.

In: a scored data set or a sparse matrix of activations, and ids of missing features, or of those that fall short and by
how many rows. Out: the rows that greedy maximum coverage chooses, which reach at least 1 - 1/e of what the best choice
gains (Nemhauser, Wolsey & Fisher 1978).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ..storage.feature_ids import check_feature_ids
from ..storage.scored_rows import ACTIVATIONS, FEATURES, MEASUREMENT, REMEDY, ScoredRows, read_scored
from ..storage.validation import read_measurement
from .activations import check_activations, matrix_rows
from .threshold import check_threshold

if TYPE_CHECKING:
    from datasets import Dataset
    from scipy.sparse import csr_array

_BLOCK = 1 << 16  # rows whose bounds are refreshed together: as many as uint16 can number
_BATCH = 1 << 12  # rows read at a time: their temporaries stay in the processor's cache


@dataclass(frozen=True, eq=False)
class Selection:
    """Rows of a pool in the order in which greedy maximum coverage chooses them.

    rows: int64 [k], indices of rows; k <= n, fewer when no other row gains anything.
    gains: float64 [k], the weight of the features that the row activates and that no demanded number of rows before it
        does; without weights, their number.
    covered: int64, the features that as many of `rows` activate as are demanded (one), in the order of `missing`.
    uncovered: int64, the others of `missing`, in the order of `missing`.
    """

    rows: np.ndarray
    gains: np.ndarray
    covered: np.ndarray
    uncovered: np.ndarray


def select(
    pool: Dataset | csr_array,
    missing: ArrayLike,
    n: int,
    *,
    demand: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    threshold: float | ArrayLike = 0.0,
) -> Selection:
    """Choose up to n rows that together activate most of the missing features: those with activation > threshold.

    With `demand` a feature counts until so many of the rows activate it, so that the rows make up for deficits:

        features, demand = report.demand()
        select(pool, features, n, demand=demand, threshold=report.threshold)

    Lazy greedy maximum coverage (Minoux 1978): gains only fall, so an old gain bounds the new one. Bounds are kept by
    blocks of 65,536 rows, and a block is brought up to date, by an inverted index, when its bound leads. The result is
    that of plain greedy; of rows that gain the same the first is chosen. Beside the pool it takes 2 bytes for each
    activation of a missing feature above the threshold, 8 for each row and what one block needs on its way.

    Args:
        pool: rows [n_rows] with FACScorer's columns `fac_features` and `fac_activations`, or activations
            [n_rows, d_sae] (scipy sparse; what is not stored is 0).
        missing: integer ids [m] of features, each once; `FACReport.missing`.
        n: most rows to choose.
        demand: [m], whole numbers from 1 up, beside `missing`: how many rows are to activate each (None: 1 each).
        weights: [m], finite and not negative, beside `missing`: how much each demanded row counts (None: 1). Sums are
            exact in multiples of 2**-62 of m x the largest weight, so that they do not depend on an order.
        threshold: delta in the SAE's units, one number or [d_sae]; `FACReport.threshold`.

    Returns: `Selection`; all fields are empty when `missing` is.
    Raises: TypeError for another kind of pool; ValueError for columns that are absent, hold nulls or differ in length,
        rows measured differently, a feature twice in a row, activations that are not finite, ids out of range, a
        threshold below the floor `keep_above` of the rows, and arguments other than the above.
    """
    n = operator.index(n)
    if n < 0:
        raise ValueError(f"n is {n}; it must be 0 or more")
    pool = _open(pool)
    wanted = check_feature_ids(missing, pool.width, name="missing", may_be_empty=True)
    weight, shift = _integer_weights(weights, len(wanted))
    left = _checked_demand(demand, len(wanted))
    rows, gains = _greedy(pool, _targets(pool, wanted, threshold), weight, left, n)
    is_covered = left == 0
    return Selection(
        rows=np.array(rows, np.int64),
        gains=np.ldexp(np.array(gains, np.float64), -shift),
        covered=wanted[is_covered],
        uncovered=wanted[~is_covered],
    )


def _greedy(
    pool: _Pool, targets: _Targets, weight: np.ndarray, left: np.ndarray, n: int
) -> tuple[list[int], list[int]]:
    """The rows chosen and their gains. Takes each row from `left`, the rows still demanded by feature."""
    blocks = []
    for first in range(0, pool.n_rows if len(weight) else 0, _BLOCK):
        part = range(first, min(first + _BLOCK, pool.n_rows))
        blocks.append(_Block(first, *_activated(pool, part, targets), weight))
    bounds = [block.bound() for block in blocks]
    rows, gains, covered = [], [], []  # covered: places in `missing`, in the order in which their demand was met
    while len(rows) < n and bounds:
        best = min(range(len(blocks)), key=bounds.__getitem__)
        negative, row = bounds[best]
        if negative >= 0:
            break
        if blocks[best].known < len(covered):
            blocks[best].refresh(covered, weight)
            bounds[best] = blocks[best].bound()
            continue
        rows.append(row)
        gains.append(-negative)
        blocks[best].gains[row - blocks[best].first] = 0  # it is not chosen twice, whatever is still demanded
        bounds[best] = blocks[best].bound()
        ids = _activated(pool, range(row, row + 1), targets)[0]
        covered += ids[left[ids] == 1].tolist()
        left[ids] = np.maximum(left[ids] - 1, 0)
    return rows, gains


class _Block:
    """Consecutive rows: which activate a feature, and their gains, int64, exact when `known` features were covered; not
    above 0 for rows that were chosen."""

    def __init__(self, first: int, ids: np.ndarray, starts: np.ndarray, weight: np.ndarray) -> None:
        from scipy.sparse import csr_array

        # SciPy makes both index arrays as wide as the wider one.
        starts = starts.astype(np.int32 if len(ids) < 2**31 else np.int64)
        rows = csr_array((np.ones(len(ids), np.int8), ids, starts), shape=(len(starts) - 1, len(weight)))
        self.first, self.known, self.gains = first, 0, rows @ weight
        columns = rows.tocsc()
        if not columns.has_canonical_format:
            row, column = columns.indices, np.repeat(np.arange(len(weight)), np.diff(columns.indptr))
            twice = np.flatnonzero((np.diff(row) == 0) & (np.diff(column) == 0))[0]
            raise ValueError(f"row {first + row[twice]:,} of the pool holds a missing feature twice: {REMEDY}")
        self.starts, self.rows = columns.indptr, columns.indices.astype(np.uint16)

    def bound(self) -> tuple[int, int]:
        """Minus the largest gain, and the first row that has it. No later bound of the block sorts before this one."""
        best = int(self.gains.argmax())
        return -int(self.gains[best]), self.first + best

    def refresh(self, covered: list[int], weight: np.ndarray) -> None:
        for feature in covered[self.known :]:
            self.gains[self.rows[self.starts[feature] : self.starts[feature + 1]]] -= weight[feature]
        self.known = len(covered)


class _Targets(NamedTuple):
    """The missing features, by id up to the largest, with one place more for all other ids.

    place: int32, in `missing`; -1 for none. limit: what an activation must exceed; infinite for none.
    """

    place: np.ndarray
    limit: np.ndarray


def _targets(pool: _Pool, wanted: np.ndarray, threshold: float | ArrayLike) -> _Targets:
    # np.take(mode="clip") sends every id above the last wanted one to the last place.
    place = np.full(int(wanted.max(initial=-1)) + 2, -1, np.int32)
    place[wanted] = np.arange(len(wanted))
    limit = np.full(len(place), np.inf, np.result_type(pool.read(0, 0).activations, np.float32))
    limit[wanted] = _limits(threshold, wanted, pool, limit.dtype)
    return _Targets(place, limit)


class _Pool(NamedTuple):
    """A pool. width: d_sae, None where it is not known. keep_above: the floor. read: returns rows [start, stop)."""

    n_rows: int
    width: int | None
    keep_above: float
    read: Callable[[int, int], ScoredRows]


def _open(pool: Any) -> _Pool:
    from scipy.sparse import issparse

    if issparse(pool) and pool.ndim == 2:
        return _Pool(*pool.shape, 0.0, partial(matrix_rows, pool.tocsr()))
    from datasets import Dataset

    if not isinstance(pool, Dataset):
        raise TypeError(f"pool is a {type(pool).__name__}; it must be a datasets.Dataset (one split) or a csr_array")
    if absent := [column for column in (FEATURES, ACTIVATIONS) if column not in pool.column_names]:
        raise ValueError(f"the pool has no column {absent[0]!r}: {REMEDY}")
    columns = [column for column in (FEATURES, ACTIVATIONS, MEASUREMENT) if column in pool.column_names]
    table = pool.select_columns(columns).with_format("arrow")
    text = next((text for _, text in read_scored(table[:1], columns=columns).measurements), None)
    measurement = read_measurement(text, "the pool: fac_measurement", REMEDY) if text else {}

    def read(start: int, stop: int) -> ScoredRows:
        part = read_scored(table[start:stop], columns=columns, first_row=start)
        for row, found in part.measurements:
            if found != text:
                raise ValueError(f"row {row:,} of the pool was measured differently from row 0: {REMEDY}")
        return part

    return _Pool(len(table), measurement.get("d_sae"), measurement.get("keep_above", 0.0), read)


def _activated(pool: _Pool, rows: range, targets: _Targets) -> tuple[np.ndarray, np.ndarray]:
    """Of the rows, the places in `missing` of the features that they activate, int32, and where each row starts."""
    found, starts = [np.zeros(0, np.int32)], [np.zeros(1, np.int64)]
    for start in range(rows.start, rows.stop, _BATCH):
        part = pool.read(start, min(start + _BATCH, rows.stop))
        check_activations(part, pool.width)
        kept = np.flatnonzero(part.activations > targets.limit.take(part.features, mode="clip"))
        found.append(targets.place.take(part.features[kept]))
        starts.append(starts[-1][-1] + np.searchsorted(kept, part.starts[1:]))
    return np.concatenate(found), np.concatenate(starts)


def _checked_demand(demand: ArrayLike | None, m: int) -> np.ndarray:
    values = np.ones(m, np.int64) if demand is None else np.array(demand)
    if values.shape != (m,):
        raise ValueError(f"demand has shape {values.shape}; missing has {m:,} features, and needs a number for each")
    if m and (not np.issubdtype(values.dtype, np.integer) or values.min() < 1):
        raise ValueError("demand must be whole numbers from 1 up")
    return values.astype(np.int64)


def _integer_weights(weights: ArrayLike | None, m: int) -> tuple[np.ndarray, int]:
    """The weights x 2**shift, rounded, as int64 whose sum does not overflow: gains and ties are exact."""
    values = np.ones(m) if weights is None else np.asarray(weights, np.float64)
    if values.shape != (m,):
        raise ValueError(f"weights have shape {values.shape}; missing has {m:,} features, and needs a weight for each")
    if (bad := np.flatnonzero(~(np.isfinite(values) & (values >= 0)))).size:
        raise ValueError(f"weights[{bad[0]}] is {values[bad[0]]}; a weight is finite and not negative")
    shift = 62 - int(np.frexp(values.max(initial=0))[1]) - m.bit_length()
    return np.rint(np.ldexp(values, shift)).astype(np.int64), shift


def _limits(threshold: float | ArrayLike, wanted: np.ndarray, pool: _Pool, dtype: np.dtype) -> np.ndarray:
    """Returns [n_wanted]: a feature is activated by what exceeds its limit."""
    delta = check_threshold(threshold, pool.width or np.size(threshold), keep_above=pool.keep_above)
    if delta.ndim and len(wanted) and wanted.max() >= len(delta):
        raise ValueError(f"threshold is for {len(delta):,} features; missing holds feature {wanted.max()}")
    delta = delta[wanted] if delta.ndim else np.broadcast_to(delta, len(wanted))
    if dtype != np.float32:
        return delta
    # For a float32 x, x > delta just when x exceeds the largest float32 that is not above delta.
    rounded = delta.astype(np.float32)
    return np.where(rounded > delta, np.nextafter(rounded, np.float32(-np.inf)), rounded)
