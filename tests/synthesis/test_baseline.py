"""Filled and hit beside chance: exact where it can be counted, blind to what is not there."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_fac.synthesis.baseline import PermutationBaseline, compare_with_permutations


def slow_effect(features, written_for, activates, *, seed):
    """From the definitions, with whole matrices: a permutation moves rows, a bootstrap draws rows and columns."""
    ids = sorted(set(features))
    place = {feature: i for i, feature in enumerate(ids)}
    m, n = len(ids), len(written_for)
    counts, texts = np.zeros((m, m)), np.zeros(m)
    for feature, hits in zip(written_for, activates, strict=True):
        texts[place[feature]] += 1
        for hit in hits:
            if hit in place:
                counts[place[feature], place[hit]] += 1
    nan = (np.nan, np.nan)
    if n == 0 or m < 2:
        filled, rate = (float((np.diag(counts) > 0).mean()), float(np.trace(counts) / n)) if n else nan
        return PermutationBaseline(m, n, filled, np.nan, nan, rate, np.nan, np.nan, nan)

    def rates(counts, texts, same):
        pairs = (texts[:, None] * ~same).sum()
        own = np.trace(counts) / texts.sum() if texts.sum() else 0.0
        return own, (counts * ~same).sum() / pairs if pairs else np.nan

    def ratio(own, chance):
        return (np.inf if own else np.nan) if chance == 0 else own / chance

    def central(values):
        return tuple(np.quantile(values, [0.025, 0.975], method="nearest")) if len(values) else nan

    rng = np.random.default_rng(seed)
    shares, ratios = [], []
    while len(shares) < 1000:
        order = rng.permutation(m)
        if not (order == np.arange(m)).any():
            shares.append((counts[order, np.arange(m)] > 0).mean())
    for _ in range(1000):
        drawn = rng.integers(m, size=m)
        ratios.append(ratio(*rates(counts[np.ix_(drawn, drawn)], texts[drawn], drawn[:, None] == drawn[None, :])))
    own, chance = rates(counts, texts, np.eye(m, dtype=bool))
    filled = (np.diag(counts) > 0).mean()
    interval = central([r for r in ratios if not np.isnan(r)])
    return PermutationBaseline(
        m, n, filled, np.mean(shares), central(shares), own, chance, ratio(own, chance), interval
    )


def cases():
    """Features, some of them twice, and texts: what each was written for, what it activates (asked for or not)."""
    return st.lists(st.integers(0, 12), min_size=1, max_size=9).flatmap(
        lambda features: st.tuples(
            st.just(features),
            st.lists(st.tuples(st.sampled_from(features), st.lists(st.integers(0, 14), max_size=6)), max_size=12),
        )
    )


@settings(max_examples=60, deadline=None)
@given(cases(), st.integers(0, 9))
@example(([], []), 0)  # nothing asked for
@example(([1, 2], []), 0)  # no text
@example(([4], [(4, [4, 5]), (4, [])]), 0)  # one feature: nothing to compare
@example(([1, 2, 3], [(1, []), (1, [])]), 0)  # no hit
@example(([1, 2, 3, 4], [(1, [1]), (2, [2, 9])]), 1)  # only own hits: times infinity
@example(([1, 2], [(1, [1, 2])]), 0)  # a feature without texts
@example(([1, 2, 3], [(3, [3, 3, 1, 1])]), 0)  # the same hit twice
def test_what_is_found_equals_a_slow_reference(case, seed):
    features, texts = case
    written_for, activates = [feature for feature, _ in texts], [hits for _, hits in texts]
    found = compare_with_permutations(features, written_for, activates, seed=seed)
    np.testing.assert_equal(tuple(found), tuple(slow_effect(features, written_for, activates, seed=seed)))


def test_random_texts_for_many_features_equal_a_slow_reference():
    rng = np.random.default_rng(0)
    features = rng.permutation(5000)[:80]
    written_for = rng.choice(features[:60], 300).tolist()
    activates = [[own, *rng.choice(5000, 20).tolist()][rng.integers(3) :] for own in written_for]
    found = compare_with_permutations(features, written_for, activates, seed=3)
    assert found.ratio_interval[0] < found.ratio < found.ratio_interval[1]
    np.testing.assert_equal(tuple(found), tuple(slow_effect(features.tolist(), written_for, activates, seed=3)))


def test_memory_grows_with_hits_not_with_pairs_of_features():
    features = list(range(3000))
    tracemalloc.start()
    found = compare_with_permutations(features, features, [[f, (f + 1) % 3000] for f in features])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (found.activated, found.hit_rate_by_chance) == (1.0, 1 / 2999)
    assert peak < 3000 * 3000  # less than a byte a pair


def test_a_text_for_a_feature_that_was_not_asked_for_is_refused():
    with pytest.raises(KeyError):
        compare_with_permutations([1, 2], [3], [[]])


def test_texts_that_activate_everything_are_no_better_than_chance():
    found = compare_with_permutations([1, 2, 3], [1, 2, 3], [[1, 2, 3]] * 3)
    assert (found.activated, found.activated_by_chance) == (1.0, 1.0)
    assert (found.hit_rate, found.hit_rate_by_chance, found.ratio) == (1.0, 1.0, 1.0)
    assert found.activated_interval == found.ratio_interval == (1.0, 1.0)


def test_rates_are_counted_by_hand():
    # Texts for 1: two, one hits 1, both hit 2. Text for 2: hits none. Text for 3: hits 3 and 1; 9 is not asked for.
    found = compare_with_permutations([1, 2, 3], [1, 1, 2, 3], [[1, 2], [2], [], [1, 3, 9]])
    assert found.texts == 4
    assert found.activated == pytest.approx(2 / 3)
    assert found.hit_rate == pytest.approx(2 / 4)
    assert found.hit_rate_by_chance == pytest.approx(3 / 8)
    assert found.ratio == pytest.approx((2 / 4) / (3 / 8))
    # The two derangements of three give texts of (2, 3, 1) and of (3, 1, 2): 1/3 or 2/3 are filled.
    assert set(found.activated_interval) <= {0.0, 1 / 3, 2 / 3}


def test_chance_of_independent_texts_is_their_rate():
    rng = np.random.default_rng(0)
    features = list(range(40))
    written_for = [f for f in features for _ in range(5)]
    activates = [np.flatnonzero(rng.random(40) < 0.2).tolist() for _ in written_for]
    found = compare_with_permutations(features, written_for, activates)
    low, high = found.ratio_interval
    assert low < 1 < high
    assert low < found.ratio < high
    assert found.hit_rate_by_chance == pytest.approx(0.2, abs=0.02)
    assert found.activated_by_chance == pytest.approx(1 - 0.8**5, abs=0.05)
    assert found.activated_interval[0] <= found.activated <= found.activated_interval[1]


def test_texts_for_their_own_features_are_clear_of_chance():
    rng = np.random.default_rng(0)
    features = list(range(30))
    written_for = [f for f in features for _ in range(6)]
    activates = [[f for f in features if rng.random() < (0.4 if f == own else 0.04)] for own in written_for]
    found = compare_with_permutations(features, written_for, activates)
    assert found.ratio_interval[0] > 3
    assert found.activated > found.activated_interval[1]


@pytest.mark.parametrize(("features", "written", "hits"), [([], [], []), ([1], [1], [[1]]), ([1, 2], [], [])])
def test_nothing_to_compare_is_nan(features, written, hits):
    found = compare_with_permutations(features, written, hits)
    assert np.isnan(found.ratio)
    assert np.isnan(found.activated_by_chance)
