"""How often features are active in a data set beside an anchor set: Eq. 3 of arXiv 2602.10388 beyond its binary form.

In: supports, the numbers of rows that activate each feature, of the whole sets and of groups of their rows. Out: the
match of the two with intervals (`frequency_match`), and how many rows each feature falls short (`deficits`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .statistics import CONFIDENCE, kl_divergence

Interval = tuple[float, float]


class Frequencies(NamedTuple):
    """How often features are active in a set of rows.

    support: int64 [n_features], rows that activate each feature.
    by_group: int64 [groups, n_features], the same by groups of rows. Equal rows are in the same group.
    group_rows: int64 [groups], rows of each group that activate anything.
    """

    support: np.ndarray
    by_group: np.ndarray
    group_rows: np.ndarray

    def of(self, features: np.ndarray) -> Frequencies:
        """Returns the frequencies of these features alone."""
        return Frequencies(self.support[features], self.by_group[:, features], self.group_rows)


class FrequencyMatch(NamedTuple):
    """Measures of how alike the frequencies of data and anchor are, each with its interval; NaN where undefined."""

    frequency_cosine: float
    frequency_cosine_interval: Interval
    jensen_shannon: float
    jensen_shannon_interval: Interval
    kl_divergence: float
    kl_interval: Interval


def frequency_cosine(data_support: np.ndarray, anchor_support: np.ndarray) -> float:
    """Returns sum(q p q) / sqrt(sum(q p^2) sum(q q^2)), in [0, 1]: 1 where the rates of data and anchor are in
    proportion.

    p and q are the shares of data and anchor rows that activate each feature. The weights q leave out what the anchor
    does not activate, and numbers of rows serve as well as shares. NaN where the anchor activates nothing, 0 where the
    data activate nothing of it.

    Args:
        data_support, anchor_support: int64 [n_features], rows that activate each feature.
    """
    p, q = data_support.astype(np.float64), anchor_support.astype(np.float64)
    if not q.any():
        return math.nan
    norm = math.sqrt(np.sum(q * p**2)) * math.sqrt(np.sum(q**3))
    return float(np.sum(q * p * q) / norm) if norm else 0.0


def jensen_shannon(data_support: np.ndarray, anchor_support: np.ndarray) -> float:
    """Returns the Jensen-Shannon divergence (Lin 1991, doi:10.1109/18.61115) in nats, in [0, ln 2 = 0.693].

    It compares the distributions of activations over features, p_i ~ rows that activate i, without smoothing. NaN where
    one of the sets activates nothing.

    Args:
        data_support, anchor_support: int64 [n_features], rows that activate each feature.
    """
    if not (data_support.any() and anchor_support.any()):
        return math.nan
    p, q = (support / support.sum() for support in (data_support, anchor_support))
    middle = (p + q) / 2
    parts = [each[each > 0] * np.log(each[each > 0] / middle[each > 0]) for each in (p, q)]
    return max(0.0, float(sum(part.sum() for part in parts)) / 2)


def frequency_match(data: Frequencies, anchor: Frequencies) -> FrequencyMatch:
    """Returns the measures of the match with 95 % intervals, see `jackknife_by_groups`."""

    def interval(measure: Callable[[np.ndarray, np.ndarray], float], center: float, most: float) -> Interval:
        low, high = np.clip(jackknife_by_groups(measure, center, data, anchor), 0.0, most)  # NaN stays
        return float(low), float(high)

    cosine = frequency_cosine(data.support, anchor.support)
    shannon = jensen_shannon(data.support, anchor.support)
    kl = kl_divergence(anchor.support, data.support)
    return FrequencyMatch(
        frequency_cosine=cosine,
        frequency_cosine_interval=interval(frequency_cosine, cosine, 1.0),
        jensen_shannon=shannon,
        jensen_shannon_interval=interval(jensen_shannon, shannon, math.log(2)),
        kl_divergence=kl,
        kl_interval=interval(lambda data, anchor: kl_divergence(anchor, data), kl, math.inf),
    )


def jackknife_by_groups(
    measure: Callable[[np.ndarray, np.ndarray], float], center: float, data: Frequencies, anchor: Frequencies
) -> Interval:
    """Returns the 95 % interval of the mean of `measure` over data and anchor sets of these sizes and sources.

    Variances of data and anchor add up, each by the delete-a-group jackknife for groups of unequal size (Busing, Meijer
    & van der Leeden 1999, doi:10.1023/A:1008800423698), which counts equal rows as one draw. The deviations are those
    of Student's t, with the degrees of freedom of Welch and Satterthwaite. NaN where a set has fewer than two groups.

    Args:
        measure: of data_support and anchor_support, int64 [n_features].
        center: of the whole sets.
    """
    from scipy.special import stdtrit

    variances, degrees = [], []
    for of, left_out in ((data, lambda d: measure(d, anchor.support)), (anchor, lambda a: measure(data.support, a))):
        used = np.flatnonzero(of.group_rows)
        if len(used) < 2:
            return math.nan, math.nan
        without = np.array([left_out(of.support - of.by_group[group]) for group in used])
        times = of.group_rows.sum() / of.group_rows[used]  # the set is so many times as large as the group
        pseudo = times * center - (times - 1) * without
        estimate = len(used) * center - np.sum((1 - 1 / times) * without)
        variances.append(float(np.mean((pseudo - estimate) ** 2 / (times - 1))))
        degrees.append(len(used) - 1)
    total = sum(variances)
    if not total > 0:
        return (center, center) if total == 0 else (math.nan, math.nan)
    freedom = total**2 / sum(v**2 / d for v, d in zip(variances, degrees, strict=True))
    half = float(stdtrit(freedom, (1 + CONFIDENCE) / 2)) * math.sqrt(total)
    return center - half, center + half


class Deficits(NamedTuple):
    """How many rows features fall short of the anchor's rate in data of this size; arrays of [n_features].

    deficit: float64, n q - m: expected rows at the anchor's rate q less the m of n rows that activate the feature. It
        is negative where the data activate it more often.
    standard_error: float64, of the deficit: n sqrt(q (1 - q) / N + p (1 - p) / n), with p = m / n.
    low, high: float64, its 95 % interval by Newcombe's hybrid score method, which holds at rates of 0 and 1 too (1998,
        doi:10.1002/(SICI)1097-0258(19980430)17:8<873::AID-SIM779>3.0.CO;2-I, method 10).
    p_value: float64, one-sided, of Fisher's exact test: were the rates the same, so many rows of the anchor, or more.
    significant: bool, of all features given, with at most 5 % false discoveries (Benjamini & Hochberg 1995).
    """

    deficit: np.ndarray
    standard_error: np.ndarray
    low: np.ndarray
    high: np.ndarray
    p_value: np.ndarray
    significant: np.ndarray


def deficits(data_support: np.ndarray, n_rows: int, anchor_support: np.ndarray, n_anchor_rows: int) -> Deficits:
    """Returns how many rows each feature falls short of the anchor's rate, with uncertainty from both sets' sizes.

    Args:
        data_support, anchor_support: int64 [n_features], rows that activate each feature.
        n_rows, n_anchor_rows: rows of the sets, at least 1.
    """
    from scipy.stats import false_discovery_control, hypergeom

    p, q = data_support / n_rows, anchor_support / n_anchor_rows
    (p_low, p_high), (q_low, q_high) = _wilson(data_support, n_rows), _wilson(anchor_support, n_anchor_rows)
    both = data_support + anchor_support
    p_value = np.clip(hypergeom.sf(anchor_support - 1, n_rows + n_anchor_rows, both, n_anchor_rows), 0.0, 1.0)
    return Deficits(
        deficit=n_rows * q - data_support,
        standard_error=n_rows * np.sqrt(q * (1 - q) / n_anchor_rows + p * (1 - p) / n_rows),
        low=n_rows * (q - p - np.hypot(q - q_low, p_high - p)),
        high=n_rows * (q - p + np.hypot(q_high - q, p - p_low)),
        p_value=p_value,
        significant=false_discovery_control(p_value) <= 1 - CONFIDENCE if len(p_value) else np.zeros(0, bool),
    )


def _wilson(support: np.ndarray, n_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """The 95 % score interval of a rate (Wilson 1927)."""
    from scipy.special import ndtri

    z = ndtri((1 + CONFIDENCE) / 2)
    rate = support / n_rows
    middle, size = rate + z**2 / (2 * n_rows), 1 + z**2 / n_rows
    half = z * np.sqrt(rate * (1 - rate) / n_rows + z**2 / (4 * n_rows**2))
    return (middle - half) / size, (middle + half) / size
