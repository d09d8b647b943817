"""The permutation baseline: how often texts activate the feature they were written for, and how often by chance.

Texts activate features that nobody asked for. So a share of activated features, or a hit rate, means something only
beside the share that as many texts written for *other* features reach: features are permuted, texts stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ..storage.validation import Interval, Number

_RESAMPLES = 1000


class PermutationBaseline(NamedTuple):
    """Of texts written for m features.

    features, texts: how many there were.
    activated: the share of the features that one of their own texts activates.
    activated_by_chance, activated_interval: the mean share, and the central 95 %, when each feature gets the texts of
        another (1,000 permutations without a fixed point).
    hit_rate: the share of texts that activate the feature they were written for.
    hit_rate_by_chance: the share of pairs of a text and another feature in which the text activates it.
    ratio, ratio_interval: hit_rate / hit_rate_by_chance, and 95 % by a bootstrap over features.
    All are NaN where there is nothing to compare: no text, or one feature.
    """

    features: int
    texts: int
    activated: Number
    activated_by_chance: Number
    activated_interval: Interval
    hit_rate: Number
    hit_rate_by_chance: Number
    ratio: Number
    ratio_interval: Interval

    def __str__(self) -> str:
        low, high = self.activated_interval
        return (
            f"{self.texts:,} texts for {self.features:,} features activate {self.activated:.2f} of them (by chance "
            f"{self.activated_by_chance:.2f}, {low:.2f} to {high:.2f}); hit rate {self.hit_rate:.3f} (by chance "
            f"{self.hit_rate_by_chance:.4f}: {self.ratio:.1f} x, {self.ratio_interval[0]:.1f} to "
            f"{self.ratio_interval[1]:.1f})"
        )


def compare_with_permutations(
    features: ArrayLike, written_for: Sequence[int], activates: Sequence[Sequence[int]], *, seed: int = 0
) -> PermutationBaseline:
    """Returns what texts did for the features.

    Args:
        features: ids, [m]: those asked for, with or without texts.
        written_for: per text, the id it was written for.
        activates: per text, ids that it activates; others than `features` do not count.
    """
    ids = np.unique(np.asarray(features, dtype=np.int64))
    place = {feature: i for i, feature in enumerate(ids.tolist())}
    m, n = len(ids), len(written_for)
    texts = np.bincount(np.array([place[feature] for feature in written_for], dtype=np.int64), minlength=m)
    hits, own = _hits(place, written_for, activates)
    activated = float((own > 0).mean()) if m and n else np.nan
    nothing = (np.nan, np.nan)
    if n == 0 or m < 2:
        rate = float(own.sum() / n) if n else np.nan
        return PermutationBaseline(m, n, activated, np.nan, nothing, rate, np.nan, np.nan, nothing)
    rng = np.random.default_rng(seed)
    # Column j gets the texts of order[j], never its own.
    shares = np.array([(_derangement(m, rng)[hits.column] == hits.row).sum() / m for _ in range(_RESAMPLES)])
    rates = _rates(texts, own, hits, np.ones(m, dtype=np.int64))
    draws = (np.bincount(rng.integers(m, size=m), minlength=m) for _ in range(_RESAMPLES))
    ratios = [_ratio(*_rates(texts, own, hits, times)) for times in draws]
    defined = [ratio for ratio in ratios if not np.isnan(ratio)]
    return PermutationBaseline(
        features=m,
        texts=n,
        activated=activated,
        activated_by_chance=float(shares.mean()),
        activated_interval=_central(shares),
        hit_rate=rates[0],
        hit_rate_by_chance=rates[1],
        ratio=_ratio(*rates),
        ratio_interval=_central(defined) if defined else nothing,
    )


class _Hits(NamedTuple):
    """Pairs of different features that a text hits, by place: `count` texts written for `row` activate `column`."""

    row: np.ndarray
    column: np.ndarray
    count: np.ndarray


def _hits(
    place: dict[int, int], written_for: Sequence[int], activates: Sequence[Sequence[int]]
) -> tuple[_Hits, np.ndarray]:
    """The hits of other features, and per feature the texts of its own that hit it."""
    m = len(place)
    cells = (
        place[feature] * m + place[hit]
        for feature, hits in zip(written_for, activates, strict=True)
        for hit in hits
        if hit in place
    )
    cell, count = np.unique(np.fromiter(cells, dtype=np.int64), return_counts=True)
    row, column = np.divmod(cell, max(m, 1))
    other = row != column
    own = np.zeros(m, dtype=np.int64)
    own[row[~other]] = count[~other]
    return _Hits(row[other], column[other], count[other]), own


def _rates(texts: np.ndarray, own: np.ndarray, hits: _Hits, times: np.ndarray) -> tuple[float, float]:
    """The share of texts that hit their own feature, and of pairs with another feature that hit; NaN without a pair.

    Args:
        times: how often each feature is drawn, [m]; two draws of one feature are no pair.
    """
    pairs = (times * texts) @ (times.sum() - times)
    if not pairs:
        return np.nan, np.nan
    hit = (times[hits.row] * times[hits.column]) @ hits.count
    return float(times @ own / (times @ texts)), float(hit / pairs)


def _ratio(own: float, chance: float) -> float:
    if chance == 0:
        return np.inf if own else np.nan
    return own / chance


def _derangement(m: int, rng: np.random.Generator) -> np.ndarray:
    """A permutation without a fixed point: about one in e of all is one."""
    while True:
        order = rng.permutation(m)
        if not (order == np.arange(m)).any():
            return order


def _central(values: ArrayLike) -> tuple[float, float]:
    # Not interpolated: between infinite ratios there is nothing to interpolate.
    low, high = np.quantile(values, [0.025, 0.975], method="nearest")
    return float(low), float(high)
