"""FAC over data-set size: what fewer rows would cover, and what further rows of the same kind would add.

In: for each feature of F(anchor) the number of a data set's rows that activate it (its support), and the number of
rows. Out: expected numbers of covered features. Supports of parts add up, so all of it can be asked of a merged
coverage, and no order of rows plays a part. Features are the species of these estimators, rows the sampling units.
"""

from __future__ import annotations

import math

import numpy as np


def expected_covered(support: np.ndarray, n_rows: int, sizes: np.ndarray) -> np.ndarray:
    """Returns the mean number of features that a subset of a data set's rows activates: float64 [n_sizes].

    Sum of 1 - C(n - m_i, k) / C(n, k), exact over all subsets of k of the n rows (Hurlbert 1971; for incidences
    Colwell et al. 2012, doi:10.1093/jpe/rtr044).

    Args:
        support: int [n_features], rows that activate each feature, m_i.
        sizes: int [n_sizes], each from 0 to n_rows.
    """
    values, counts = np.unique(support, return_counts=True)
    return (1 - absent_share(n_rows, values, sizes)) @ counts


def absent_share(n_rows: int, support: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Returns the share of the subsets of k rows in which no row activates a feature: float64 [n_sizes, n_features]."""
    from scipy.special import gammaln

    n, m, k = n_rows, support[None, :], sizes[:, None]
    others = n - m  # rows that do not activate it: all k must be among them
    left = np.maximum(others - k, 0)
    share = np.exp(gammaln(others + 1) - gammaln(left + 1) - gammaln(n + 1) + gammaln(n - k + 1))
    return np.where(k <= others, share, 0.0)


def unseen(support: np.ndarray, n_rows: int) -> float:
    """Returns how many further features of F(anchor) this source of rows would activate, without end: a lower bound.

    Chao2 (Chao 1987, doi:10.2307/2531532) in its bias-corrected form, (n - 1) / n * Q1 (Q1 - 1) / (2 (Q2 + 1)), where
    Qk features are activated by k rows; at most the features of F(anchor) that no row activates.

    Args:
        support: int [|F(anchor)|], rows that activate each feature; 0 for a missing one.
    """
    q0, q1, q2 = (np.count_nonzero(support == k) for k in (0, 1, 2))
    return min(float(q0), (n_rows - 1) / n_rows * q1 * (q1 - 1) / (2 * (q2 + 1))) if n_rows else 0.0


def expected_gain(support: np.ndarray, n_rows: int, further: np.ndarray | float) -> np.ndarray | float:
    """Returns how many further features of F(anchor) are expected from further rows of the same source.

    Q0 (1 - (1 - Q1 / (n Q0 + Q1))^g), with `unseen` as Q0 (Chao et al. 2014, doi:10.1890/13-0133.1). It is an estimate
    for up to about as many further rows as there are rows, and a lower bound beyond.

    Args:
        further: numbers of rows, g.
    """
    q0, q1 = unseen(support, n_rows), np.count_nonzero(support == 1)
    if not q0:
        return 0.0 * np.minimum(further, 1)
    return -q0 * np.expm1(further * math.log1p(-q1 / (n_rows * q0 + q1)))


def subset_errors(support: np.ndarray, n_rows: int, sizes: np.ndarray, error: float) -> np.ndarray:
    """Returns the standard error of the expected FAC of subsets of k rows, as an estimate for the source of the rows:
    float64 [n_sizes], NaN below 2 rows or without features.

    The delete-1 jackknife over rows, in which features are taken as independent, times the one factor that makes it
    `error` for all n rows: rows that activate many rare features at once make both larger.

    Args:
        support: int [|F(anchor)|].
        sizes: int [n_sizes], each from 0 to n_rows.
        error: standard error of FAC of all n rows, by the jackknife over rows.
    """
    if n_rows < 2 or not len(support):
        return np.full(len(sizes), math.nan)
    n, n_features = n_rows, len(support)
    m, counts = np.unique(support[support > 0], return_counts=True)
    k = np.minimum(sizes, n - 1)
    # What leaving out one row that activates the feature, against one that does not, changes.
    change = absent_share(n - 1, m - 1, k) - absent_share(n - 1, np.minimum(m, n - 1), k)
    independent = np.sqrt((n - 1) / n * change**2 @ (counts * m * (n - m) / n)) / n_features
    all_rows = (n - 1) / n * math.sqrt(np.count_nonzero(support == 1)) / n_features
    return independent * (error / all_rows if all_rows else 1.0)
