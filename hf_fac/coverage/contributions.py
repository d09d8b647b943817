"""What each row of a data set adds to its coverage, to sort it by.

In: the scored data set, and a report, which says delta and F(anchor). Out: a data frame with one row per data row.
The data set is read twice, a few rows at a time: once to count the rows of each feature, once for the figures.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..storage.differences import differences
from ..storage.scored_rows import REMEDY, scored_batches
from ..storage.validation import read_measurement
from .activations import check_scored
from .report import FACReport

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset, IterableDataset

_BATCH = 1024  # rows at a time


class _Active(NamedTuple):
    """Of some rows what they activate above delta: int64 [n_active] ids, and the index of each one's row."""

    ids: np.ndarray
    row: np.ndarray
    tokens: np.ndarray


def row_contributions(dataset: Dataset | IterableDataset, report: FACReport) -> pd.DataFrame:
    """Returns what each row adds, one row for each of the data set's, in its order. Sort by `share` or `unique`.

    Columns:
        tokens: int32, content tokens of the row.
        features: int64, features above delta; of those that the report looks at.
        anchor_features: int64, those of them that are in F(anchor).
        unique: int64, those of F(anchor) that no other row activates: |F(anchor)| times what FAC loses without the row.
        share: float64, sum of 1 / m_i over the row's features of F(anchor), where m_i rows activate feature i. It
            credits each covered feature evenly to the rows that activate it (the Shapley value of the row), so that
            shares add up to the number of covered features.
        redundancy: float64, mean of 1 - 1 / m_i over the same features: 0 where no other row activates any of them,
            near 1 where many do; NaN in a row without such features.

    Numbers of rows are counted in `dataset`, exact at any delta. A row without any unique feature can go without a loss
    of FAC; two such rows together may not.

    Args:
        dataset: a scored data set, as a rule the one that the report is of; a stream must be readable twice.
        report: its threshold, covered and missing features count.

    Raises: ValueError, with row and remedy, for rows that are not scored or were measured otherwise than the report's.
    """
    import pandas as pd

    d_sae = report.measurement["d_sae"]
    in_anchor = np.zeros(d_sae, bool)
    in_anchor[report.covered], in_anchor[report.missing] = True, True
    support = np.zeros(d_sae, np.int64)
    for part in _active(dataset, report):
        support += np.bincount(part.ids, minlength=d_sae)
    credit = np.zeros(d_sae)
    np.divide(1, support, out=credit, where=in_anchor & (support > 0))
    is_unique = in_anchor & (support == 1)
    columns = {name: [] for name in ("tokens", "features", "anchor_features", "unique", "share")}
    for part in _active(dataset, report):
        n = len(part.tokens)
        columns["tokens"].append(part.tokens)
        columns["features"].append(np.bincount(part.row, minlength=n))
        columns["anchor_features"].append(np.bincount(part.row[in_anchor[part.ids]], minlength=n))
        columns["unique"].append(np.bincount(part.row[is_unique[part.ids]], minlength=n))
        columns["share"].append(np.bincount(part.row, weights=credit[part.ids], minlength=n))
    table = pd.DataFrame({name: np.concatenate(parts) if parts else [] for name, parts in columns.items()})
    return table.assign(redundancy=1 - table["share"] / table["anchor_features"].where(table["anchor_features"] > 0))


def _active(dataset: Dataset | IterableDataset, report: FACReport) -> Iterator[_Active]:
    d_sae, keep_above = report.measurement["d_sae"], report.measurement["keep_above"]
    delta = np.broadcast_to(np.float64(report.threshold), d_sae)
    if report.features is not None:
        delta = np.where(np.isin(np.arange(d_sae), report.features), delta, np.inf)
    for rows in scored_batches(dataset, batch_size=_BATCH):
        for row, text in rows.measurements:
            found = read_measurement(text, f"row {row:,} and after: fac_measurement", REMEDY)
            if differs := differences(found, report.measurement):
                raise ValueError(
                    f"row {row:,} and after: measured otherwise than the report's rows ({differs}): score all rows "
                    "with the same FACScorer"
                )
        index = np.repeat(np.arange(len(rows.tokens)), np.diff(rows.starts))
        check_scored(rows, d_sae=d_sae, keep_above=keep_above)
        is_above = rows.activations > delta[rows.features]
        yield _Active(rows.features[is_above].astype(np.int64), index[is_above], rows.tokens)
