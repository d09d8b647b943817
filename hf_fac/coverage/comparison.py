"""Several data sets against one anchor set, at one delta: FAC of each, what it alone covers, how much they overlap.

In: coverages by name, and the anchor's. Out: `Comparison`, a report for each, a table and a page of all.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from ..storage.files import write_whole
from .coverage import FeatureCoverage
from .metrics import FAR
from .report import FACReport

if TYPE_CHECKING:
    import pandas as pd

    from ..report.content import Metric


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

    def to_html(
        self,
        path: str | os.PathLike[str],
        *,
        diversity: Mapping[str, pd.DataFrame] | None = None,
        title: str = "Data sets beside one anchor set",
    ) -> None:
        """Writes the comparison as a page to look at: one HTML file that loads nothing, whole or not at all.

        Args:
            diversity: by name of data set, what `hf_fac.diversity` returns for it.

        Raises: ValueError for a name in `diversity` that no data set has.
        """
        from ..report.content import ComparedSet, ComparisonContent
        from ..report.page import comparison_page
        from .page import curve, settings_of

        if strange := [name for name in diversity or {} if name not in self.reports]:
            raise ValueError(f"diversity has {strange[0]!r}; expected names of data sets: {', '.join(self.reports)}")
        table, first = self.to_pandas(), next(iter(self.reports.values()))
        most = max(report.rows for report in self.reports.values())
        grid = np.unique(np.arange(1, 21) * most // 20)
        sizes = {name: np.union1d(grid[grid <= 2 * r.rows], r.rows) for name, r in self.reports.items()}
        content = ComparisonContent(
            title=title,
            confidence=first.confidence,
            anchor_rows=first.anchor_rows,
            n_features=len(first.covered) + len(first.missing),
            n_together=len(self._covered_by_some()),
            n_by_all=len(self._covered_by_all()),
            sets=[
                ComparedSet(
                    name=name,
                    rows=report.rows,
                    mean_tokens=report.mean_tokens,
                    fac=report.fac,
                    interval=report.interval,
                    single_interval=report.single_interval,
                    n_covered=len(report.covered),
                    alone=int(table.loc[name, "alone"]),
                    saturation=report.saturation,
                    frequency_cosine=report.frequency_cosine,
                    overlap={other: float(table.loc[name, f"jaccard {other}"]) for other in self.reports},
                    over_rows=curve(report.rarefaction(sizes[name]), "rows") if report.table else None,
                )
                for name, report in self.reports.items()
            ],
            metrics=_compared_metrics(diversity or {}),
            problems=list(dict.fromkeys(problem for report in self.reports.values() for problem in report.problems())),
            settings={"Delta": first.threshold_source} | settings_of(first.measurement),
        )
        write_whole(path, comparison_page(content))

    def _covered_by_some(self) -> set[int]:
        return set().union(*(report.covered.tolist() for report in self.reports.values()))

    def _covered_by_all(self) -> set[int]:
        return set.intersection(*(set(report.covered.tolist()) for report in self.reports.values()))

    def __str__(self) -> str:
        return f"{self._heading()}\n{self.to_pandas().to_string(float_format='{:.3f}'.format)}"

    def _repr_html_(self) -> str:
        from html import escape

        return f"<p>{escape(self._heading())}</p>{self.to_pandas().to_html(float_format='{:.3f}'.format)}"

    def _heading(self) -> str:
        first = next(iter(self.reports.values()))
        together = len(self._covered_by_some())
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


def _compared_metrics(tables: Mapping[str, pd.DataFrame]) -> list[Metric]:
    """Returns the metrics of `diversity` side by side; its tables by name of data set."""
    from ..report.content import Metric

    found = []
    for name, row in next(iter(tables.values())).iterrows() if tables else ():
        values = {each: float(table.loc[name, "value"]) for each, table in tables.items()}
        known = [value for value in values.values() if not math.isnan(value)]
        if not known:
            continue
        best = (min if row["higher_is"] == FAR else max)(known)
        names = {each for each, value in values.items() if value == best} if len(known) > 1 else set()
        found.append(Metric(name, row["higher_is"], values, names, row["source"]))
    return found


def _jaccard(one: set[int], other: set[int]) -> float:
    return len(one & other) / len(one | other) if one | other else float("nan")
