"""Activations of some rows: cut from a matrix, and checked before they are counted or chosen from."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from ..storage.scored_rows import REMEDY, ScoredRows

if TYPE_CHECKING:
    from scipy.sparse import csr_array


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


def check_scored(rows: ScoredRows, index: np.ndarray, *, d_sae: int, keep_above: float) -> None:
    """As `check_activations`, and also for activations at or below the floor, in a row without tokens, or of a feature
    that stands twice in its row.

    Args:
        index: int64 [n_activations], the index of each activation's row.
    """
    check_activations(rows, d_sae)
    _refuse(rows, rows.activations <= np.float64(keep_above), f"is not above the floor keep_above = {keep_above:g}")
    _refuse(rows, rows.tokens[index] <= 0, "is in a row without content tokens")
    cell = index * d_sae + rows.features
    if (np.diff(cell) <= 0).any():
        order = np.argsort(cell)
        twice = cell[order][1:][np.diff(cell[order]) == 0]
        _refuse(rows, np.isin(cell, twice), "stands twice in its row")


def _refuse(rows: ScoredRows, is_bad: np.ndarray, problem: str) -> None:
    if is_bad.any():
        k = int(np.argmax(is_bad))
        row = rows.first_row + int(np.searchsorted(rows.starts, k, side="right")) - 1
        raise ValueError(f"row {row:,}: feature {rows.features[k]} at {rows.activations[k]:g} {problem}: {REMEDY}")
