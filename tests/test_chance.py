"""Filled and hit beside chance: exact where it can be counted, blind to what is not there."""

from __future__ import annotations

import numpy as np
import pytest

from hf_fac.chance import effect


def test_texts_that_activate_everything_are_no_better_than_chance():
    found = effect([1, 2, 3], [1, 2, 3], [[1, 2, 3]] * 3)
    assert (found.filled, found.filled_by_chance) == (1.0, 1.0)
    assert (found.hit_rate, found.hits_by_chance, found.ratio) == (1.0, 1.0, 1.0)
    assert found.filled_interval == found.ratio_interval == (1.0, 1.0)


def test_rates_are_counted_by_hand():
    # Texts for 1: two, one hits 1, both hit 2. Text for 2: hits none. Text for 3: hits 3 and 1; 9 is not asked for.
    found = effect([1, 2, 3], [1, 1, 2, 3], [[1, 2], [2], [], [1, 3, 9]])
    assert found.texts == 4
    assert found.filled == pytest.approx(2 / 3)
    assert found.hit_rate == pytest.approx(2 / 4)
    assert found.hits_by_chance == pytest.approx(3 / 8)
    assert found.ratio == pytest.approx((2 / 4) / (3 / 8))
    # The two derangements of three give texts of (2, 3, 1) and of (3, 1, 2): 1/3 or 2/3 are filled.
    assert set(found.filled_interval) <= {0.0, 1 / 3, 2 / 3}


def test_chance_of_independent_texts_is_their_rate():
    rng = np.random.default_rng(0)
    features = list(range(40))
    written_for = [f for f in features for _ in range(5)]
    activates = [np.flatnonzero(rng.random(40) < 0.2).tolist() for _ in written_for]
    found = effect(features, written_for, activates)
    low, high = found.ratio_interval
    assert low < 1 < high
    assert low < found.ratio < high
    assert found.hits_by_chance == pytest.approx(0.2, abs=0.02)
    assert found.filled_by_chance == pytest.approx(1 - 0.8**5, abs=0.05)
    assert found.filled_interval[0] <= found.filled <= found.filled_interval[1]


def test_texts_for_their_own_features_are_clear_of_chance():
    rng = np.random.default_rng(0)
    features = list(range(30))
    written_for = [f for f in features for _ in range(6)]
    activates = [[f for f in features if rng.random() < (0.4 if f == own else 0.04)] for own in written_for]
    found = effect(features, written_for, activates)
    assert found.ratio_interval[0] > 3
    assert found.filled > found.filled_interval[1]


@pytest.mark.parametrize(("features", "written", "hits"), [([], [], []), ([1], [1], [[1]]), ([1, 2], [], [])])
def test_nothing_to_compare_is_nan(features, written, hits):
    found = effect(features, written, hits)
    assert np.isnan(found.ratio)
    assert np.isnan(found.filled_by_chance)
