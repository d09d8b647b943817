"""Several data sets against one anchor set, at one delta: FAC of each, what it alone covers, how much they overlap.

In: coverages by name, and the anchor's. Out: `Comparison`, a report for each and a table of all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from .coverage import FeatureCoverage
from .report import FACReport

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Comparison:
    """Data sets against one anchor set.

    reports: by name, a report of each, all with the same features and delta.
    """

    reports: dict[str, FACReport]

    def to_pandas(self) -> pd.DataFrame:
        """Returns a row for each data set, by name.

        Columns: rows; mean_tokens; active_features; fac; low and high, its `interval`; single_low and single_high, its
        `single_interval`; saturation; frequency_cosine and jensen_shannon, the match with the anchor; covered; missing;
        alone, features that of these data sets it alone covers; and for each data set, as "jaccard" with its name, the
        overlap |A & B| / |A | B| of the features that both cover, NaN where neither covers any.
        """
        import pandas as pd

        covered = {name: set(report.covered.tolist()) for name, report in self.reports.items()}
        table = pd.DataFrame.from_dict(
            {
                name: {
                    "rows": report.rows, "mean_tokens": report.mean_tokens, "active_features": report.active_features,
                    "fac": report.fac, "low": report.interval[0], "high": report.interval[1],
                    "single_low": report.single_interval[0], "single_high": report.single_interval[1],
                    "saturation": report.saturation, "frequency_cosine": report.frequency_cosine,
                    "jensen_shannon": report.jensen_shannon, "covered": len(report.covered),
                    "missing": len(report.missing),
                    "alone": len(covered[name].difference(*(covered[other] for other in covered if other != name))),
                } | {f"jaccard {other}": _jaccard(covered[name], covered[other]) for other in covered}
                for name, report in self.reports.items()
            },
            orient="index",
        )  # fmt: skip
        counts = ["rows", "active_features", "covered", "missing", "alone"]
        return table.astype(dict.fromkeys(counts, np.int64))

    def __str__(self) -> str:
        return f"{self._heading()}\n{self.to_pandas().to_string(float_format='{:.3f}'.format)}"

    def _repr_html_(self) -> str:
        from html import escape

        return f"<p>{escape(self._heading())}</p>{self.to_pandas().to_html(float_format='{:.3f}'.format)}"

    def _heading(self) -> str:
        first = next(iter(self.reports.values()))
        together = len(set().union(*(report.covered.tolist() for report in self.reports.values())))
        return (
            f"{len(self.reports)} data sets against {first.anchor_rows:,} anchor rows; together they cover "
            f"{together:,} of {len(first.covered) + len(first.missing):,} features.\ndelta: {first.threshold_source}"
        )


def compare(
    coverages: Mapping[str, FeatureCoverage],
    anchor: FeatureCoverage,
    *,
    features: ArrayLike | None = None,
    threshold: float | ArrayLike | None = None,
    relative: float | None = None,
) -> Comparison:
    """Returns FAC of several data sets against one anchor set, at one delta: `compare({"a": a, "b": b}, anchor)`.

    Data sets of unlike size are compared at the same size by each report's `rarefaction`.

    Args:
        coverages: by name.
        features, threshold, relative: as in `FeatureCoverage.compare`; a calibrated delta depends on the anchor alone.

    Raises: ValueError for no data sets, TypeError for what is no coverage, and what `FeatureCoverage.compare` raises.
    """
    if not coverages:
        raise ValueError("coverages is empty: give one data set's coverage or more, by name")
    for name, coverage in coverages.items():
        if not isinstance(coverage, FeatureCoverage):
            raise TypeError(f"{name} is a {type(coverage).__name__}: pass FeatureCoverage.from_dataset(dataset)")
    return Comparison(
        {
            str(name): coverage.compare(anchor, features=features, threshold=threshold, relative=relative)
            for name, coverage in coverages.items()
        }
    )


def _jaccard(one: set[int], other: set[int]) -> float:
    return len(one & other) / len(one | other) if one | other else float("nan")
