"""Activations of rows: read into a matrix or cut from one, and checked before they are counted or chosen from."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from ..storage.differences import differences
from ..storage.scored_rows import REMEDY, ScoredRows, scored_batches
from ..storage.validation import read_measurement

if TYPE_CHECKING:
    from datasets import Dataset
    from scipy.sparse import csr_array

_BATCH = 1 << 12


def read_activations(scored: Dataset) -> tuple[csr_array, dict[str, Any]]:
    """Returns the activations of a scored data set, [n_rows, d_sae] float32, and how they were measured.

    Raises: ValueError for rows that are not scored, were measured differently, or hold what `check_scored` refuses.
    """
    from scipy.sparse import csr_array

    measurement, ids, values, sizes = {}, [], [], [np.zeros(1, np.int64)]
    for part in scored_batches(scored, batch_size=_BATCH):
        measurement = measurement_of(part, measurement)
        check_scored(part, d_sae=measurement["d_sae"], keep_above=measurement["keep_above"])
        ids.append(part.features)
        values.append(part.activations)
        sizes.append(np.diff(part.starts))
    if not ids:
        raise ValueError("the data set has no rows")
    starts = np.cumsum(np.concatenate(sizes))
    # SciPy makes both index arrays as wide as the wider one.
    starts = starts.astype(np.int32 if starts[-1] < 2**31 else np.int64)
    shape = (len(starts) - 1, measurement["d_sae"])
    return csr_array((np.concatenate(values), np.concatenate(ids), starts), shape=shape), measurement


def measurement_of(
    rows: ScoredRows, expected: dict[str, Any] | None, *, problem: str = "{}: measured differently"
) -> dict[str, Any]:
    """Returns how the rows were measured: the same as `expected`, where that is known.

    Args:
        problem: what the error says of rows measured differently; {} stands for the rows.
    Raises: ValueError, with row and remedy, for what is no measurement and for rows measured differently.
    """
    for row, text in rows.measurements:
        place = f"row {row:,} and after"
        found = read_measurement(text, f"{place}: fac_measurement", REMEDY)
        expected = agreed(expected, found, problem.format(place)) if expected else found
    return expected


def agreed(one: dict[str, Any], other: dict[str, Any], problem: str) -> dict[str, Any]:
    """Returns the measurement that two equal ones stand for. Raises: ValueError, with what differs, for others."""
    if found := differences(one, other):
        raise ValueError(f"{problem} ({found}): score all rows with the same FACScorer")
    # Equal measurements may name the model differently: keep the alphabetically first, so that merging is independent
    # of order.
    return min(one, other, key=lambda each: json.dumps(each, sort_keys=True))


def parts_of(rows: ScoredRows, *, most: int) -> Iterator[ScoredRows]:
    """Yields the rows in parts of at most `most` activations, but at least one row each. Measurements are left out."""
    start = 0
    while start < len(rows.tokens):
        stop = int(np.searchsorted(rows.starts, rows.starts[start] + most, side="right")) - 1
        stop = max(stop, start + 1)
        entries = slice(rows.starts[start], rows.starts[stop])
        yield ScoredRows(
            rows.first_row + start, rows.features[entries], rows.activations[entries],
            rows.starts[start : stop + 1] - rows.starts[start], rows.tokens[start:stop], [],
        )  # fmt: skip
        start = stop


def matrix_rows(acts: csr_array, start: int, stop: int) -> ScoredRows:
    """Returns rows of activations [n, d_sae]; they say neither tokens nor measurement."""
    starts = acts.indptr[start : stop + 1]
    entries = slice(starts[0], starts[-1])
    return ScoredRows(start, acts.indices[entries], acts.data[entries], starts - starts[0], np.zeros(0, np.int32), [])


def check_activations(rows: ScoredRows, d_sae: int | None) -> None:
    """Raises: ValueError, naming the row, for ids out of [0, d_sae) and activations that are not finite."""
    ids, acts, width = rows.features, rows.activations, d_sae or math.inf
    # Extremes first: they need no memory.
    if len(ids) and (ids.min() < 0 or ids.max() >= width):
        _refuse(rows, (ids < 0) | (ids >= width), f"is not in [0, {width:,}), the width of the SAE")
    if len(acts) and not np.isfinite([acts.min(), acts.max()]).all():
        _refuse(rows, ~np.isfinite(acts), "is not finite (some models overflow in float16)")


def check_scored(rows: ScoredRows, *, d_sae: int, keep_above: float) -> None:
    """As `check_activations`, and also for activations at or below the floor, in a row without tokens, or of a feature
    that stands twice in its row."""
    check_activations(rows, d_sae)
    ids, acts, lengths = rows.features, rows.activations, np.diff(rows.starts)
    # First what needs little memory; arrays of which entry is wrong only where one is.
    if len(acts) and float(acts.min()) <= keep_above:
        _refuse(rows, acts <= np.float64(keep_above), f"is not above the floor keep_above = {keep_above:g}")
    without_tokens = rows.tokens <= 0
    if (lengths[without_tokens] > 0).any():
        _refuse(rows, np.repeat(without_tokens, lengths), "is in a row without content tokens")
    falls = ids[1:] <= ids[:-1]
    falls[rows.starts[(rows.starts > 0) & (rows.starts < len(ids))] - 1] = False
    if falls.any():
        cell = np.repeat(np.arange(len(lengths)), lengths) * d_sae + ids
        order = np.argsort(cell)
        twice = cell[order][1:][np.diff(cell[order]) == 0]
        _refuse(rows, np.isin(cell, twice), "stands twice in its row")


def _refuse(rows: ScoredRows, is_bad: np.ndarray, problem: str) -> None:
    if is_bad.any():
        k = int(np.argmax(is_bad))
        row = rows.first_row + int(np.searchsorted(rows.starts, k, side="right")) - 1
        raise ValueError(f"row {row:,}: feature {rows.features[k]} at {rows.activations[k]:g} {problem}: {REMEDY}")
