"""What each row of a data set adds, and which row activates a feature most.

In: a scored data set, and what counts as active: delta of each feature and F(anchor). Out: a data frame, which
`row_contributions` explains; the strongest row by feature. The data set is read a few rows at a time, for the data
frame twice: once to count the rows of each feature, once for the figures.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..storage.scored_rows import scored_batches
from .activations import check_scored, measurement_of

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset, IterableDataset

_BATCH = 1024  # rows at a time


class ActiveWhen(NamedTuple):
    """What counts as active: delta, float64 [d_sae], infinite for features that are not looked at; F(anchor) as
    in_anchor, bool [d_sae]; how rows must have been measured."""

    delta: np.ndarray
    in_anchor: np.ndarray
    measurement: dict[str, Any]


class ActiveFeatures(NamedTuple):
    """Of some rows what they activate above delta: int64 [n_active] ids, the index of each one's row, its activation.

    first_row: the number of the first row. tokens: int32 [n_rows].
    """

    first_row: int
    ids: np.ndarray
    row: np.ndarray
    activations: np.ndarray
    tokens: np.ndarray


class Strongest(NamedTuple):
    """The row that activates a feature most: its number, and the activation."""

    row: int
    activation: float


def row_shares(dataset: Dataset | IterableDataset, when: ActiveWhen) -> pd.DataFrame:
    """Returns the table of `row_contributions`. Raises: ValueError as `active_features` does."""
    import pandas as pd

    d_sae, in_anchor = len(when.delta), when.in_anchor
    support = np.zeros(d_sae, np.int64)
    for part in active_features(dataset, when):
        support += np.bincount(part.ids, minlength=d_sae)
    credit = np.zeros(d_sae)
    np.divide(1, support, out=credit, where=in_anchor & (support > 0))
    is_unique = in_anchor & (support == 1)
    columns = {name: [] for name in ("tokens", "features", "anchor_features", "unique", "share")}
    for part in active_features(dataset, when):
        n = len(part.tokens)
        columns["tokens"].append(part.tokens)
        columns["features"].append(np.bincount(part.row, minlength=n))
        columns["anchor_features"].append(np.bincount(part.row[in_anchor[part.ids]], minlength=n))
        columns["unique"].append(np.bincount(part.row[is_unique[part.ids]], minlength=n))
        columns["share"].append(np.bincount(part.row, weights=credit[part.ids], minlength=n))
    table = pd.DataFrame({name: np.concatenate(parts) if parts else [] for name, parts in columns.items()})
    return table.assign(redundancy=1 - table["share"] / table["anchor_features"].where(table["anchor_features"] > 0))


def strongest_rows(dataset: Dataset | IterableDataset, features: np.ndarray, when: ActiveWhen) -> dict[int, Strongest]:
    """Returns, by feature, the row that activates it most, of several such rows the first. Features that no row
    activates are left out. Raises: ValueError as `active_features` does."""
    row, activation = np.zeros(len(when.delta), np.int64), np.zeros(len(when.delta))
    for part in active_features(dataset, when):
        order = np.lexsort((-part.row, part.activations))  # of several entries of a feature the last is kept
        ids, rows = part.ids[order], part.first_row + part.row[order]
        its_activation, its_row = np.zeros_like(activation), np.zeros_like(row)
        its_activation[ids], its_row[ids] = part.activations[order], rows
        is_stronger = its_activation > activation
        row[is_stronger], activation[is_stronger] = its_row[is_stronger], its_activation[is_stronger]
    active = features[activation[features] > 0]
    return {i: Strongest(int(row[i]), float(activation[i])) for i in active.tolist()}


def active_features(dataset: Dataset | IterableDataset, when: ActiveWhen) -> Iterator[ActiveFeatures]:
    """Yields what the rows activate, some rows at a time.

    Raises: ValueError, with row and remedy, for rows that are not scored or were measured differently.
    """
    for rows in scored_batches(dataset, batch_size=_BATCH):
        measurement_of(rows, when.measurement, problem="the report's rows and {} were measured differently")
        index = np.repeat(np.arange(len(rows.tokens)), np.diff(rows.starts))
        check_scored(rows, d_sae=len(when.delta), keep_above=when.measurement["keep_above"])
        is_above = rows.activations > when.delta[rows.features]
        ids = rows.features[is_above].astype(np.int64)
        yield ActiveFeatures(rows.first_row, ids, index[is_above], rows.activations[is_above], rows.tokens)
