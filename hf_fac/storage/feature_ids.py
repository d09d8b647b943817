"""Ids of an SAE's features as callers give them, checked."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


def check_feature_ids(
    ids: ArrayLike, d_sae: int | None, *, name: str = "features", may_be_empty: bool = False, may_repeat: bool = False
) -> np.ndarray:
    """Returns feature ids as int64 [n], in the order given.

    Args:
        d_sae: width of the SAE; None where it is not known.
        name: what the error calls the ids.
    Raises: ValueError for anything but a list of whole numbers from 0 to d_sae - 1, at least one, each once.
    """
    array = np.asarray(ids)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(f"{name} must be a list of feature ids (whole numbers), got {ids!r:.100}.")
    if not array.size and not may_be_empty:
        raise ValueError(f"{name} must hold at least one feature id, got none.")
    if (wrong := array[(array < 0) | (array >= (np.inf if d_sae is None else d_sae))]).size:
        known = "ids start at 0" if d_sae is None else f"the SAE has features 0 to {d_sae - 1}"
        raise ValueError(f"{name} holds feature {wrong[0]}, which does not exist: {known}.")
    values, counts = np.unique(array, return_counts=True)
    if not may_repeat and len(values) < len(array):
        raise ValueError(f"{name} holds feature {values[counts > 1][0]} more than once; give each id once.")
    return array.astype(np.int64)
