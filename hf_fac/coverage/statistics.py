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


def standard_error(lost: np.ndarray, n_features: int, n_rows: int) -> float:
    """Returns the standard deviation of FAC over data sets of this size and source; NaN below 2 rows.

    It is that of the delete-1 jackknife over rows (Heltshe & Forrester 1983), whose variance errs on the large side
    (Efron & Stein 1981).

    Args:
        lost: int, for each row that alone activates some features of the anchor: how many.
        n_features: |F(anchor)|.
    """
    if n_rows < 2 or not n_features:
        return math.nan
    return math.sqrt((n_rows - 1) / n_rows * (np.sum(lost**2) - np.sum(lost) ** 2 / n_rows)) / n_features


def mean_interval(center: float, error: float) -> tuple[float, float]:
    """Returns the interval of the mean FAC of data sets of this size and source: FAC +- 1.96 standard errors, clipped
    to [0, 1]."""
    return _clipped(center, _DEVIATIONS * error)


def single_interval(center: float, error: float, lost: np.ndarray, support: np.ndarray) -> tuple[float, float]:
    """Returns the interval of FAC of one other data set of this size and source, clipped to [0, 1].

    Two data sets vary twice as much as one. Of the variance the jackknife's figure errs on the large side. Times
    (1 - exp(-r)) / r, r = 2 Q2 / Q1, it errs on the small side: this is the ratio of the gain that Chao et al. (2014)
    expect from as many rows again, the variance where features are independent, to Q1, the jackknife's. The geometric
    mean of both is taken, and the t distribution with as many degrees of freedom as the jackknife's sum of squares has
    (Satterthwaite 1946). In simulations it holds FAC of the other data set in 94 to 98 % of cases
    (benchmarks/intervals.py).

    Args:
        error: `standard_error`.
        lost: as there.
        support: int [|F(anchor)|], rows that activate each feature; Qk features are activated by k rows.
    """
    from scipy.stats import t

    if math.isnan(error) or not len(lost):
        return _clipped(center, error)
    q1, q2 = (np.count_nonzero(support == k) for k in (1, 2))
    r = 2 * q2 / q1
    too_small = -math.expm1(-r) / r if r else 1.0
    squares = lost.astype(np.float64) ** 2
    freedom = 2 * np.sum(squares) ** 2 / np.sum(squares**2)
    quantile = t.ppf((1 + CONFIDENCE) / 2, freedom)
    return _clipped(center, float(quantile * math.sqrt(2) * error * too_small**0.25))


def _clipped(center: float, half: float) -> tuple[float, float]:
    if math.isnan(half):
        return math.nan, math.nan
    return max(0.0, center - half), min(1.0, center + half)
