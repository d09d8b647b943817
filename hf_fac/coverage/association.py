"""Which features go with an outcome: permutation tests, for all features of an SAE at once.

In: activations of rows, or counts of rows, and an outcome of each row: the classes it is in, or its score. Out: for
each feature and outcome an effect, a z-score and a p-value. In a row that does not store a feature its activation is 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from scipy.sparse import csc_array

_BLOCK = 1 << 20  # activations that are sorted at a time


class Associations(NamedTuple):
    """Tests of features against outcomes, each float64 [n_features, n_outcomes].

    effect: of a class, Cliff's delta, which is 2 AUC - 1: of all pairs of a row of the class and another row, the share
        in which the first has the larger activation, minus the share in which the second has. Of presence it is the
        difference between the shares of rows. Of a score, Spearman's rank correlation. 0 where nothing varies.
    z: the sum of products in standard deviations of its permutation distribution; its sign is that of the effect. Of a
        class it is the z-score of the Mann-Whitney test with ties.
    p_value: of the permutation test; 1 where nothing varies.
    """

    effect: np.ndarray
    z: np.ndarray
    p_value: np.ndarray


def rank_tests(activations: csc_array, outcomes: np.ndarray, parts: Sequence[np.ndarray]) -> list[Associations]:
    """Returns for each part of the rows the two-sided tests of the ranks of activations against the outcomes.

    A tail is the larger of the normal distribution's and that of the Pearson type III distribution, which has the
    skewness of the permutation distribution: features of few rows and small classes have long tails.

    Args:
        activations: [n_rows, n_features] float32; what is stored is above 0.
        outcomes: bool [n_rows, n_classes], or scores, float64 [n_rows, 1].
        parts: each bool [n_rows], with 3 rows or more.
    """
    from scipy.sparse import csr_array

    centred = [_centred_outcomes(outcomes, part) for part in parts]
    n_features = activations.shape[1]
    products = [np.zeros((n_features, outcomes.shape[1])) for _ in parts]
    powers = [np.zeros((2, n_features)) for _ in parts]
    for features, row, key in _sorted_blocks(activations):
        for part, values, product, power in zip(parts, centred, products, powers, strict=True):
            is_in, n = part[row], np.count_nonzero(part)
            column = (key[is_in] >> np.uint64(32)).astype(np.int64)
            active = np.bincount(column, minlength=features.stop - features.start)
            starts = np.append(0, np.cumsum(active))
            # Ranks, centred: the activations of 0 share the lowest ones.
            absent = -active / 2
            rank = _middle_places(key[is_in]) - starts[column] - active[column] + (n - 1) / 2
            above = csr_array((rank - absent[column], row[is_in], starts), shape=(len(active), len(part)))
            product[features] = above @ values
            for k, exponent in enumerate((2, 3)):
                stored = np.bincount(column, rank**exponent, minlength=len(active))
                power[k, features] = stored + (n - active) * absent**exponent
    is_class = outcomes.dtype == bool
    return [
        _tested(product, *power, values[part], is_class=is_class)
        for part, values, product, power in zip(parts, centred, products, powers, strict=True)
    ]


def count_tests(support: np.ndarray, n_rows: int, other_support: np.ndarray, n_other_rows: int) -> Associations:
    """Returns the tests of presence, one-sided: a feature is more frequent in a set of rows than in another.

    The p-values are exact (Fisher's test).

    Args:
        support, other_support: int64 [n_features], rows of each set that activate the feature.
    """
    from scipy.stats import hypergeom

    n, active = n_rows + n_other_rows, support + other_support
    expected = active * (n_rows / n)
    variance = expected * (n_other_rows / n) * (n - active) / (n - 1)
    z = np.divide(support - expected, np.sqrt(variance), out=np.zeros(len(active)), where=variance > 0)
    p_value = np.ones(len(active))
    more = np.flatnonzero(z > 0)
    p_value[more] = hypergeom.sf(support[more] - 1, n, active[more], n_rows)
    effect = support / n_rows - other_support / n_other_rows
    return Associations(effect[:, None], z[:, None], p_value[:, None])


def _centred_outcomes(outcomes: np.ndarray, part: np.ndarray) -> np.ndarray:
    """Classes as 0 and 1, scores as ranks among the rows of the part, minus their mean; 0 for the other rows."""
    from scipy.stats import rankdata

    values = outcomes[part].astype(np.float64) if outcomes.dtype == bool else rankdata(outcomes[part], axis=0)
    centred = np.zeros(outcomes.shape)
    centred[part] = values - values.mean(0)
    return centred


def _sorted_blocks(activations: csc_array) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Yields features, with the rows of their activations and keys, uint64, in the order of the keys: the feature's
    number in the block, then the activation, whose bits rise with it as it is above 0."""
    starts, first = activations.indptr, 0
    while first < activations.shape[1]:
        last = max(int(np.searchsorted(starts, starts[first] + _BLOCK, side="right")) - 1, first + 1)
        entries = slice(starts[first], starts[last])
        column = np.repeat(np.arange(last - first, dtype=np.uint64), np.diff(starts[first : last + 1]))
        key = (column << np.uint64(32)) | activations.data[entries].view(np.uint32)
        order = np.argsort(key)
        yield slice(first, last), activations.indices[entries][order], key[order]
        first = last


def _middle_places(key: np.ndarray) -> np.ndarray:
    """Of sorted keys the places, counted from 1; equal ones share the middle of theirs."""
    first = np.flatnonzero(np.append(True, key[1:] != key[:-1])[: len(key)])
    sizes = np.diff(np.append(first, len(key)))
    return np.repeat(first + (sizes + 1) / 2, sizes)


def _tested(
    product: np.ndarray, second: np.ndarray, third: np.ndarray, values: np.ndarray, *, is_class: bool
) -> Associations:
    """The tests from sums over rows: of rank x outcome, of rank**2 and of rank**3; all are centred.

    Under permutation the sum of products has these moments, which are exact.
    """
    n, squares, cubes = len(values), np.sum(values**2, axis=0), np.sum(values**3, axis=0)
    deviation = np.sqrt(np.outer(second, squares) / (n - 1))
    skewed = np.outer(third, cubes) * n / ((n - 1) * (n - 2))
    scale = np.broadcast_to(n * squares / 2, product.shape) if is_class else np.sqrt(np.outer(second, squares))
    effect, z, skewness = (
        np.divide(part, whole, out=np.zeros_like(product), where=deviation > 0)
        for part, whole in ((product, scale), (product, deviation), (skewed, deviation**3))
    )
    tail = np.minimum(_upper_tail(z, skewness), _upper_tail(-z, -skewness))
    return Associations(effect, z, np.minimum(1.0, 2 * tail))


def _upper_tail(z: np.ndarray, skewness: np.ndarray) -> np.ndarray:
    from scipy.special import gammaincc, ndtr

    normal = ndtr(-z)
    shape = 4 / np.maximum(skewness, 1e-4) ** 2  # below this skewness the two agree
    pearson = gammaincc(shape, np.maximum(shape + z * np.sqrt(shape), 0))
    return np.where(skewness > 1e-4, np.maximum(normal, pearson), normal)
