"""How often texts activate the feature they were written for, beside how often they would by chance.

Texts activate features that nobody asked for. So a share of features filled, or of texts that hit, says something only
beside the share that as many texts written for *other* features reach: features are permuted, texts stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

_RESAMPLES = 1000


class Effect(NamedTuple):
    """Of texts written for m features.

    features, texts: how many there were.
    filled: the share of the features that one of their own texts activates.
    filled_by_chance, filled_interval: the mean share, and the central 95 %, when each feature gets the texts of another
        (1,000 permutations without a fixed point).
    hit_rate: the share of texts that activate the feature they were written for.
    hits_by_chance: the share of pairs of a text and another feature in which the text activates it.
    ratio, ratio_interval: hit_rate / hits_by_chance, and 95 % by a bootstrap over features.
    All are NaN where there is nothing to compare: no text, or one feature.
    """

    features: int
    texts: int
    filled: float
    filled_by_chance: float
    filled_interval: tuple[float, float]
    hit_rate: float
    hits_by_chance: float
    ratio: float
    ratio_interval: tuple[float, float]


def effect(
    features: ArrayLike, written_for: Sequence[int], activates: Sequence[Sequence[int]], *, seed: int = 0
) -> Effect:
    """Returns what texts did for the features.

    Args:
        features: ids, [m]: those asked for, with or without texts.
        written_for: per text, the id it was written for.
        activates: per text, ids that it activates; others than `features` do not count.
    """
    ids = np.unique(np.asarray(features, dtype=np.int64))
    place = {feature: i for i, feature in enumerate(ids.tolist())}
    m, n = len(ids), len(written_for)
    # counts[i, j]: texts written for i that activate j.
    counts, texts = np.zeros((m, m)), np.zeros(m)
    for feature, hits in zip(written_for, activates, strict=True):
        texts[place[feature]] += 1
        for hit in hits:
            if hit in place:
                counts[place[feature], place[hit]] += 1
    nothing = (np.nan, np.nan)
    if n == 0 or m < 2:
        own = float((np.diag(counts) > 0).mean()) if m and n else np.nan
        rate = float(np.trace(counts) / n) if n else np.nan
        return Effect(m, n, own, np.nan, nothing, rate, np.nan, np.nan, nothing)
    rng = np.random.default_rng(seed)
    any_hit = counts > 0
    columns = np.arange(m)
    shares = np.array([any_hit[_derangement(m, rng), columns].mean() for _ in range(_RESAMPLES)])
    rates = _rates(counts, texts)
    ratios = []
    for _ in range(_RESAMPLES):
        drawn = rng.integers(m, size=m)
        own, chance = _rates(counts[np.ix_(drawn, drawn)], texts[drawn], same=drawn[:, None] == drawn[None, :])
        ratios.append(_ratio(own, chance))
    known = [ratio for ratio in ratios if not np.isnan(ratio)]
    return Effect(
        features=m,
        texts=n,
        filled=float(np.diag(any_hit).mean()),
        filled_by_chance=float(shares.mean()),
        filled_interval=_central(shares),
        hit_rate=rates[0],
        hits_by_chance=rates[1],
        ratio=_ratio(*rates),
        ratio_interval=_central(known) if known else nothing,
    )


def _rates(counts: np.ndarray, texts: np.ndarray, same: np.ndarray | None = None) -> tuple[float, float]:
    """The share of texts that hit their own feature, and of pairs with another feature that hit."""
    same = np.eye(len(texts), dtype=bool) if same is None else same
    pairs = (texts[:, None] * ~same).sum()
    own = np.diag(counts).sum() / texts.sum() if texts.sum() else 0.0
    return float(own), float((counts * ~same).sum() / pairs) if pairs else np.nan


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
