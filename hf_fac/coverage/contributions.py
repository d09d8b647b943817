"""What each row of a data set adds to its coverage, to sort it by.

In: the scored data set, and a report, which says delta and F(anchor). Out: a data frame with one row per data row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .report import FACReport, active_when
from .row_shares import row_shares

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset, IterableDataset


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

    Raises: ValueError, with row and remedy, for rows that are not scored or measured differently from the report's.
    """
    return row_shares(dataset, active_when(report))
