"""The levels of delta at which coverage counts rows, and fast ways to count at them.

In: a floor and a width. Out: `ActivationGrid`: of activations the level that they exceed, and of numbers of active
features the bucket that they are counted in.
"""

from __future__ import annotations

import numpy as np

_GEOMETRIC = (2.0 ** (np.arange(-24, 41) / 4)).astype(np.float32)  # in the activations' own type


class ActivationGrid:
    """Levels of delta above a floor.

    levels: float64 [levels], rising: the floor, then those of 2**-6 to 2**10 in steps of 2**(1/4) that exceed it.
    bucket_of: int64 [d_sae + 1], by a number of active features its bucket: exact up to 511, then in buckets at most
        0.4 % wide.
    """

    def __init__(self, floor: float, d_sae: int) -> None:
        self.levels = np.append(floor, _GEOMETRIC[_GEOMETRIC.astype(np.float64) > floor])
        active = np.arange(d_sae + 1)
        shift = np.maximum(np.frexp(active)[1] - 9, 0)
        self.bucket_of = 256 * shift + (active >> shift)
        self.n_buckets = int(self.bucket_of[-1]) + 1
        # Positive floats in order of size are their bits in order, and those that share the upper 16 bits differ by
        # less than 1 %: at most one level above the floor lies between them.
        smallest = (np.arange(0x7F80, dtype=np.uint32) << np.uint32(16)).view(np.float32)
        self._level_below = np.maximum(np.searchsorted(self.levels, smallest) - 1, 0)
        self._next_level = np.append(self.levels, np.inf)[self._level_below + 1].astype(np.float32)

    def level_of(self, activations: np.ndarray) -> np.ndarray:
        """Returns int64 [n]: of activations, float32 [n] above the floor, the k with levels[k] < a <= levels[k + 1]."""
        upper_bits = (activations.view(np.uint32) >> np.uint32(16)).astype(np.int64)
        # The bits are in range; clipping spares take a check in another buffer.
        above_next = activations > self._next_level.take(upper_bits, mode="clip")
        return self._level_below.take(upper_bits, mode="clip") + above_next
