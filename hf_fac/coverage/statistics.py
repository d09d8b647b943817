"""The statistics of a comparison, from counts: FAC, divergence and interval. In: arrays. Out: numbers."""

from __future__ import annotations

import math

import numpy as np

CONFIDENCE = 0.95
_DEVIATIONS = 1.96  # of a normal distribution, for this confidence


def fac(covered: np.ndarray) -> float:
    """Returns FAC, |F(D) & F(anchor)| / |F(anchor)| (arXiv 2602.10388); NaN where F(anchor) is empty.

    Args:
        covered: bool [|F(anchor)|], whether the data activates each feature of the anchor.
    """
    return np.count_nonzero(covered) / (len(covered) or math.nan)


def fac_curve(covered_after: np.ndarray, n_rows: int) -> np.ndarray:
    """Returns `fac` before and after each of n rows: float64 [n_rows + 1].

    Args:
        covered_after: int [|F(anchor)|], the number of rows after which each feature of the anchor is covered: 0 before
            the first, more than n_rows where no row activates it.
    """
    newly_covered = np.bincount(covered_after[covered_after <= n_rows], minlength=n_rows + 1)
    return np.cumsum(newly_covered) / (len(covered_after) or math.nan)


def kl_divergence(anchor_support: np.ndarray, data_support: np.ndarray) -> float:
    """Returns KL(anchor || data) in nats (arXiv 2602.10388, Eq. 3); NaN where neither set activates a feature.

    Args:
        anchor_support, data_support: int64 [n_features], rows that activate each feature. p_i ~ rows + 1/2, over the
            features active in either set: smoothing those of neither would only measure the width of the SAE.
    """
    is_active = anchor_support + data_support > 0
    if not is_active.any():
        return math.nan
    p, q = ((rows[is_active] + 0.5) / np.sum(rows[is_active] + 0.5) for rows in (anchor_support, data_support))
    return float(np.sum(p * np.log(p / q)))


def jackknife_interval(center: float, lost: np.ndarray, n_features: int, n_rows: int) -> tuple[float, float]:
    """Returns the interval of the mean FAC of data sets of this size, clipped to [0, 1]; NaN below 2 rows.

    FAC +- 1.96 deviations by the delete-1 jackknife over rows (Heltshe & Forrester 1983), whose variance errs on the
    large side (Efron & Stein 1981).

    Args:
        center: FAC of the data set.
        lost: for each row that alone activates some features of the anchor: how many.
    """
    if n_rows < 2 or not n_features:
        return math.nan, math.nan
    variance = (n_rows - 1) / n_rows * (np.sum(lost**2) - np.sum(lost) ** 2 / n_rows) / n_features**2
    half = _DEVIATIONS * math.sqrt(variance)
    return max(0.0, center - half), min(1.0, center + half)
