"""Diversity of rows as vectors, alone and beside an anchor set: distances, entropies, nearest neighbours.

In: vectors of length 1, float32 [n, d] (`unit_vectors`). Out: numbers. The distance of two rows is the cosine distance,
1 - cosine. Pairs are computed in blocks, so that memory grows with n and not with its square.
"""

from __future__ import annotations

import math

import numpy as np

from .text_diversity import INSTALL

_CLUSTERS = 20
_NEIGHBOURS, _DENSITY_POWER = 10, 0.5
_SAME = 1e-6  # rounding of the distance of a row to itself
_BLOCK = 2**24  # distances that exist at one time: 64 MB in float32


def unit_vectors(vectors: np.ndarray) -> np.ndarray:
    """Returns the vectors [n, d] in float32, each divided by its norm. Raises: ValueError for a vector of zeros."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not lengths.all():
        raise ValueError(f"row {int(np.argmin(lengths)):,} is a vector of zeros, which has no direction: leave it out")
    return (vectors / lengths).astype(np.float32)


def mean_pairwise_distance(units: np.ndarray) -> float:
    """Returns the mean cosine distance of two different rows, in O(n d); NaN below 2 rows.

    The squared norm of the sum of the vectors is the sum of the cosines of all pairs.
    """
    n = len(units)
    if n < 2:
        return math.nan
    total = units.sum(axis=0, dtype=np.float64)
    own = np.sum(np.square(units, dtype=np.float64))
    return float(1 - (total @ total - own) / (n * (n - 1)))


def semantic_entropy(units: np.ndarray, anchor: np.ndarray | None = None) -> float:
    """Returns the entropy, in nats, of the rows' distribution over clusters: Sem-Ent (Han et al. 2022,
    arXiv 2210.05725).

    k-means makes 20 clusters of the anchor set, or of the rows themselves. At most log(20) = 3.0.
    """
    from sklearn.cluster import KMeans

    # Sorted and with weights instead of duplicates, the order of the rows does not matter.
    distinct, counts = np.unique(units if anchor is None else anchor, axis=0, return_counts=True)
    clusters = KMeans(min(_CLUSTERS, len(distinct)), n_init=4, random_state=0).fit(distinct, sample_weight=counts)
    share = np.bincount(clusters.predict(units)) / len(units)
    return float(-np.sum(share[share > 0] * np.log(share[share > 0])))


def vendi(units: np.ndarray) -> float:
    """Returns the Vendi score: the effective number of different rows (Friedman & Dieng 2023, arXiv 2210.02410).

    It is the exponential of the entropy of the eigenvalues of the cosines / n, in O(n d^2 + d^3).
    Raises: ImportError where vendi-score is not installed.
    """
    try:
        from vendi_score.vendi import score_dual
    except ImportError as error:
        raise ImportError(f"the Vendi score needs vendi-score: {INSTALL}") from error
    return float(score_dual(units.astype(np.float64), normalize=False))


def novel_sum(units: np.ndarray, anchor: np.ndarray | None = None) -> float:
    """Returns NovelSum (Yang et al. 2025, arXiv 2502.17184), as its authors' code computes it, in O(n^2 log n).

    The mean over rows of the weighted mean distance to all rows, the nearest (the row itself) with weight 1, the r-th
    with 1/r, times the row's density to the power 0.5: 1 / its mean distance to the 10 nearest other rows of the
    anchor set. Without an anchor set it has no density, as its authors recommend. Distances are cosine distances in
    both places (their density has squared Euclidean ones, of vectors of any length).
    """
    n = len(units)
    weights = 1 / np.arange(1, n + 1)
    weights = (weights / weights.sum()).astype(np.float32)
    novelty, size = np.empty(n), max(_BLOCK // n, 1)
    for start in range(0, n, size):
        distance = 1 - units[start : start + size] @ units.T
        distance.sort(axis=1)
        novelty[start : start + size] = distance.clip(0) @ weights
    if anchor is not None:
        novelty *= _mean_neighbour_distance(units, anchor) ** -_DENSITY_POWER
    return float(novelty.mean())


def _mean_neighbour_distance(units: np.ndarray, anchor: np.ndarray) -> np.ndarray:
    distinct = np.unique(anchor, axis=0)
    distance, _ = _nearest(units, distinct, min(_NEIGHBOURS + 1, len(distinct)))
    is_itself = (distance[:, :1] <= _SAME) & (distance.shape[1] > 1)
    others = np.where(is_itself, distance[:, 1:].sum(1, keepdims=True), distance[:, :_NEIGHBOURS].sum(1, keepdims=True))
    counted = np.where(is_itself, distance.shape[1] - 1, min(_NEIGHBOURS, distance.shape[1]))
    return (others / counted)[:, 0] + 1e-9


def facility_location(units: np.ndarray, anchor: np.ndarray) -> float:
    """Returns the mean cosine of each row of the anchor set with its nearest data row (Lin & Bilmes 2011, P11-1052)."""
    return float(1 - _nearest(anchor, units)[0].mean())


def mean_shift(units: np.ndarray, anchor: np.ndarray) -> float:
    """Returns the distance of the mean vectors, the MMD with a linear kernel (Gretton et al. 2012, JMLR 13)."""
    return float(np.linalg.norm(units.mean(0, dtype=np.float64) - anchor.mean(0, dtype=np.float64)))


def nearest_neighbour_distance(units: np.ndarray, anchor: np.ndarray) -> float:
    """Returns the mean distance of each data row to the nearest row of the anchor set."""
    return float(_nearest(units, anchor)[0].mean())


def nearest_neighbour_accuracy(
    units: np.ndarray, labels: np.ndarray, anchor: np.ndarray, anchor_labels: np.ndarray
) -> float:
    """Returns the share of the anchor's rows whose nearest data row has their label (Cover & Hart 1967,
    doi:10.1109/TIT.1967.1053964)."""
    _, nearest = _nearest(anchor, units)
    return float(np.mean(labels[nearest[:, 0]] == anchor_labels))


def _nearest(units: np.ndarray, among: np.ndarray, k: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Distances and indices [n, k] of the nearest rows."""
    from sklearn.neighbors import NearestNeighbors

    squared, index = (
        NearestNeighbors(n_neighbors=k, algorithm="brute", metric="sqeuclidean").fit(among).kneighbors(units)
    )
    return squared / 2, index
