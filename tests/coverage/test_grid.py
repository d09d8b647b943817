"""The levels of delta, against their definition."""

from __future__ import annotations

import numpy as np
import pytest

from hf_fac.coverage.grid import ActivationGrid


@pytest.mark.parametrize("floor", [0.0, 1e-30, 0.004, 0.3, float(np.float32(2.0**0.25)), 1.1892, 2.0, 1024.0, 5000.0])
def test_an_activation_is_between_its_level_and_the_next(floor):
    grid = ActivationGrid(floor, d_sae=8)
    rng = np.random.default_rng(0)
    on_levels = grid.levels.astype(np.float32)
    near = [np.nextafter(on_levels, np.float32(toward)) for toward in (0, np.inf)]
    smallest_and_largest = np.float32([1e-45, 1e-38, 3.4e38])
    found = np.concatenate([on_levels, *near, np.exp(rng.normal(0, 4, 5000)).astype(np.float32), smallest_and_largest])
    activations = found[found.astype(np.float64) > floor]
    level = grid.level_of(activations)
    assert (grid.levels[level] < activations).all()
    assert (activations <= np.append(grid.levels, np.inf)[level + 1]).all()
