"""`FACReport`: what a data set covers of an anchor set and what it misses, to read, to save and to go on with.

In: the figures that `FeatureCoverage.compare` finds. Out: text, a data frame, JSON, a page, a figure.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike
from pydantic import ConfigDict, NonNegativeInt

from ..storage.files import write_whole
from ..storage.validation import Ids, Interval, Number, WholeMeasurement, checked, from_json
from .frequency import deficits, frequency_cosine, jensen_shannon
from .rarefaction import expected_covered, expected_gain, subset_errors
from .row_shares import ActiveWhen
from .statistics import CONFIDENCE, fac_curve, kl_divergence, mean_interval

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset
    from matplotlib.figure import Figure
    from scipy.sparse import csr_array

    from ..report.content import Charts, ReportContent
    from .page import Dictionary, SynthesisOutcome


_WEIGHTS = ("anchor_support", "anchor_max")
_TABLES = ("table", "data_only", "over_threshold")


_Column = Annotated[np.ndarray, from_json(list[Any], lambda values: np.array(values, None if values else np.int64))]
_Delta = Annotated[np.ndarray, from_json(list[float], np.array)]
_UNKNOWN = (math.nan, math.nan)
_Measured = Annotated[dict[str, Any], from_json(WholeMeasurement, lambda found: found.model_dump(exclude_unset=True))]


class AddedRows(NamedTuple):
    """What a report's figures become when rows are added to the data.

    fac: with all of the rows. curve: float64 [n + 1], FAC before and after each row in order.
    covered: int64 ids, rising, with all of the rows.
    frequency_cosine, jensen_shannon, kl_divergence: with all of the rows; NaN for a report that was read without its
        table.
    """

    fac: float
    curve: np.ndarray
    covered: np.ndarray
    kl_divergence: float
    frequency_cosine: float = math.nan
    jensen_shannon: float = math.nan


@dataclass(frozen=True, eq=False)
class FACReport:
    """FAC of a data set against an anchor set: what is covered, what is missing, above which delta.

    FAC says which features of the anchor set are active at all. It does not say how good the data are: it grows with
    rows, their length and the number of active features, which stand beside it. How often features are active beside
    the anchor, `frequency_cosine` and the divergences, went along with performance in this package's study
    (docs/missing.md), where FAC did not.

    It is a flat record, as wide as what a comparison finds: each figure is read by its name, in Python and in JSON. The
    types say how `load` reads a field.

    FAC, `covered` and the set of `missing` are exact at any delta. Supports (numbers of rows that activate a feature),
    hence the order of `missing` and the KL divergence, are exact only when delta is on the grid. Off it supports are
    lower bounds, the counts at the next level above, and active shares are upper bounds. A calibrated delta is on the
    grid; one that was given, or is relative, seldom is.

    What other data sets are to be expected from holds for independent rows of the same source. `interval` is for the
    mean FAC of data sets of this size, `single_interval` for FAC of one other such data set: it is wider, and the one
    to hold against another data set's FAC. Both are for this anchor set. Where not `support_exact`, `single_interval`
    is a little too narrow and `saturation` a little too high.
    """

    __pydantic_config__ = ConfigDict(strict=True)

    fac: Number  # |F(D) & F(anchor)| / |F(anchor)|; NaN where F(anchor) is empty
    interval: Interval  # of the mean FAC of such data sets, see `mean_interval`; NaN below 2 rows
    threshold: float | _Delta  # delta in the SAE's units; float64 [d_sae] with relative=, or where given so
    threshold_source: str
    features: Ids | None  # int64, rising: the subset F_task; None for all features
    covered: Ids  # int64, rising
    missing: Ids  # int64, those with most anchor rows above delta first, then those of larger anchor maximum
    missing_support: Ids  # int64: anchor rows above delta of each of missing
    support_exact: bool  # delta is on FeatureCoverage.grid
    kl_divergence: Number  # KL(anchor || data) in nats, see `kl_divergence`
    rows: NonNegativeInt
    rows_without_tokens: NonNegativeInt
    anchor_rows: NonNegativeInt
    anchor_rows_without_tokens: NonNegativeInt
    active_share: Number  # features above delta in the median row, of d_sae; NaN where delta is [d_sae]
    anchor_active_share: Number
    measurement: _Measured
    table: dict[str, _Column] = field(default_factory=dict, repr=False)  # see `to_pandas`
    # feature, data_support: what the data activates beyond F(anchor)
    data_only: dict[str, _Column] = field(default_factory=dict, repr=False)
    confidence: float = CONFIDENCE
    # Absent, and NaN, in reports that earlier releases saved:
    single_interval: Interval = _UNKNOWN  # of one other such data set, `single_interval`
    standard_error: Number = math.nan  # of FAC, by the jackknife over rows
    saturation: Number = math.nan  # FAC / what this source would reach without end, which `unseen` bounds from below
    over_threshold: dict[str, _Column] = field(default_factory=dict, repr=False)  # see `fac_over_threshold`
    # How often features are active beside the anchor (coverage/frequency.py), with intervals of the mean over data and
    # anchor sets of these sizes; fewer rows make the divergences larger.
    frequency_cosine: Number = math.nan  # in [0, 1], 1 where the rates are in proportion
    frequency_cosine_interval: Interval = _UNKNOWN
    jensen_shannon: Number = math.nan  # in nats, in [0, 0.693]
    jensen_shannon_interval: Interval = _UNKNOWN
    kl_interval: Interval = _UNKNOWN
    active_features: NonNegativeInt | None = None  # of `features`, those that the data activate
    mean_tokens: Number = math.nan  # content tokens a row; NaN where they are not known
    anchor_mean_tokens: Number = math.nan

    def to_pandas(self) -> pd.DataFrame:
        """Returns a row for each feature of F(anchor).

        Columns: feature, covered, delta, and for anchor and data the maximum (anchor_max, data_max) and the number of
        rows above delta (anchor_support, data_support).
        """
        import pandas as pd

        return pd.DataFrame(self.table)

    def fac_over_threshold(self) -> pd.DataFrame:
        """Returns FAC at each level of `FeatureCoverage.grid` that a feature of the anchor exceeds, one delta for all
        features.

        Columns: threshold; fac, and its interval, low to high, as `interval`; anchor_features, |F(anchor)|; covered.

        Raises: ValueError for a report that was read without its tables.
        """
        import pandas as pd

        by_level = pd.DataFrame(self._held("over_threshold"))
        shares = by_level["covered"] / by_level["anchor_features"]
        errors = by_level.pop("standard_error") if self.rows > 1 else pd.Series(math.nan, by_level.index)
        return _with_interval(by_level[["threshold"]], shares, errors).join(by_level[["anchor_features", "covered"]])

    def rarefaction(self, sizes: ArrayLike | None = None) -> pd.DataFrame:
        """Returns the expected FAC of data sets of other sizes, of rows as those of this data set.

        Up to `rows` it is exact, the mean over all subsets of the data set's rows (`rarefaction.expected_covered`).
        Beyond, it is an estimate up to about twice `rows`, and further a lower bound (`rarefaction.expected_gain`).
        Where not `support_exact`, numbers of rows are lower bounds, and so is expected FAC below `rows`.

        Columns: rows; fac; low and high, the interval of the mean FAC of such data sets, which at `rows` is `interval`
        and beyond NaN; extrapolated.

        Args:
            sizes: numbers of rows. None: 20 up to twice `rows`.

        Raises: ValueError for other sizes, and for a report that was read without its tables.
        """
        import pandas as pd

        support, n = self._held("table")["data_support"], self.rows
        sizes = np.unique(np.arange(1, 21) * n // 10) if sizes is None else np.asarray(sizes)
        if sizes.ndim != 1 or (sizes.size and (sizes.dtype.kind not in "iu" or sizes.min() < 0)):
            raise ValueError(f"sizes must be a list of numbers of rows, each 0 or more, got {sizes!r:.100}")
        sizes, n_features = sizes.astype(np.int64), len(support) or math.nan
        within = np.minimum(sizes, n)
        covered = expected_covered(support, n, within) + expected_gain(support, n, sizes - within)
        errors = np.where(sizes > n, math.nan, subset_errors(support, n, within, self.standard_error))
        table = _with_interval(pd.DataFrame({"rows": sizes}), pd.Series(covered / n_features), pd.Series(errors))
        return table.assign(extrapolated=sizes > n)

    def expected_gain(self, rows: float) -> float:
        """Returns how many missing features this many further rows, of the kind of the data set's, would cover.

        An estimate for up to about as many rows as there are, a lower bound beyond; see `rarefaction.expected_gain`.
        `math.inf` gives what the kind reaches in the end, at least.

        Raises: ValueError for fewer than 0 rows, and for a report that was read without its tables.
        """
        if not rows >= 0:
            raise ValueError(f"rows is {rows}; it must be 0 or more")
        return float(expected_gain(self._held("table")["data_support"], self.rows, rows))

    def weighted_fac(self, weights: str | Mapping[int, float] | ArrayLike = "anchor_support") -> float:
        """Returns the weight of the covered features by that of all features of F(anchor): FAC where all weigh the
        same, NaN where all weigh nothing.

        Args:
            weights: "anchor_support" or "anchor_max", columns of `to_pandas`; or weights by feature id, a dict or a
                pandas Series, in which absent features weigh nothing; or [d_sae].

        Raises: ValueError for weights that are negative or not finite, and for a report that was read without its
            tables.
        """
        import pandas as pd

        table = self._held("table")
        if isinstance(weights, str):
            if weights not in _WEIGHTS:
                raise ValueError(f"weights is {weights!r}; expected {' or '.join(_WEIGHTS)}, or weights of features")
            by_feature = np.asarray(table[weights], np.float64)
        else:
            if not isinstance(weights, Mapping | pd.Series) and np.shape(weights) != (self.measurement["d_sae"],):
                raise ValueError(f"weights has shape {np.shape(weights)}; expected ({self.measurement['d_sae']},)")
            by_feature = pd.Series(weights, dtype=np.float64).reindex(table["feature"], fill_value=0.0).to_numpy()
        if not (np.isfinite(by_feature) & (by_feature >= 0)).all():
            raise ValueError("weights of features must be finite and not negative")
        total = by_feature.sum()
        return float(by_feature[table["covered"].astype(bool)].sum() / total) if total else math.nan

    def deficits(self) -> pd.DataFrame:
        """Returns a row for each feature of F(anchor), those first that fall short by most rows.

        Columns: feature, deficit (rows that the data fall short of the anchor's rate at their size; negative where they
        activate the feature more often), standard_error, low, high, p_value, significant (see `Deficits`),
        anchor_support, data_support. Missing features are the extreme case: no row activates them. Where supports are
        not exact (`support_exact`), all of it is of the lower bounds.

        Raises: ValueError for a report that was read without its table, and where data or anchor have no rows.
        """
        import pandas as pd

        supports = self._supports()
        found = deficits(supports["data_support"], self.rows, supports["anchor_support"], self.anchor_rows)
        table = pd.DataFrame({"feature": self.table["feature"]} | found._asdict() | supports)
        return table.sort_values(["deficit", "feature"], ascending=[False, True], ignore_index=True)

    def demand(self, added: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Returns features of F(anchor) and how many further rows should activate each, for `select(demand=)`.

        int64 ids and int64 numbers, the largest first: the rows at the anchor's rate in data that are larger by `added`
        rows, less those there are, rounded; features whose number is 0 are left out. `deficits` says which of them
        chance may explain.

        Raises: ValueError as `deficits` does.
        """
        supports = self._supports()
        wanted = supports["anchor_support"] * (self.rows + added) / self.anchor_rows - supports["data_support"]
        wanted = np.rint(wanted).astype(np.int64)
        order = np.lexsort((self.table["feature"], -wanted))
        order = order[wanted[order] > 0]
        return self.table["feature"][order], wanted[order]

    def _supports(self) -> dict[str, np.ndarray]:
        table = self._held("table")
        if not (self.rows and self.anchor_rows):
            raise ValueError(f"{self.rows:,} rows and {self.anchor_rows:,} anchor rows: both must be 1 or more")
        return {name: table[name] for name in ("anchor_support", "data_support")}

    def _held(self, name: str) -> dict[str, np.ndarray]:
        if not (table := getattr(self, name)):
            raise ValueError("the report was read without its tables: load what its `save` wrote, or compare again")
        return table

    def with_added(self, activations: csr_array | ArrayLike) -> AddedRows:
        """Returns what FAC and the match become when rows are added to the data, over this report's features and delta.

        On the grid this is what `compare` finds for data and rows together. For FAC alone one row of maxima is enough:
        `report.with_added([coverage.maximum]).fac`.

        Args:
            activations: [n, d_sae], measured as the report's rows were.
        """
        from scipy.sparse import csr_array

        added = csr_array(activations).tocoo()
        n_rows, d_sae = added.shape
        is_above = added.data > np.broadcast_to(np.float64(self.threshold), d_sae)[added.col]
        row, feature = added.row[is_above], added.col[is_above]
        covered_after = np.full(d_sae, n_rows + 1)
        np.minimum.at(covered_after, feature, row + 1)
        covered_after[self.covered] = 0
        in_anchor = np.union1d(self.covered, self.missing)
        curve = fac_curve(covered_after[in_anchor], n_rows)
        return AddedRows(
            fac=float(curve[-1]),
            curve=curve,
            covered=in_anchor[covered_after[in_anchor] <= n_rows],
            **self._match_with(np.bincount(feature, minlength=d_sae)),
        )

    def _match_with(self, added_support: np.ndarray) -> dict[str, float]:
        if not self.table:
            return {"kl_divergence": math.nan}
        anchor_support, data_support = np.zeros((2, len(added_support)), np.int64)
        anchor_support[self.table["feature"]] = self.table["anchor_support"]
        for part in (self.table, self.data_only):
            data_support[part["feature"]] = part["data_support"]
        data_support += added_support
        wanted = slice(None) if self.features is None else self.features
        data, anchor = data_support[wanted], anchor_support[wanted]
        return {
            "kl_divergence": kl_divergence(anchor, data),
            "frequency_cosine": frequency_cosine(data, anchor),
            "jensen_shannon": jensen_shannon(data, anchor),
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all of it as JSON, whole or not at all."""
        tables = {name: getattr(self, name) for name in _TABLES}
        write_whole(path, json.dumps(self.to_dict() | tables, default=np.ndarray.tolist))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Returns the report that `save` or `hf-fac missing --output` wrote.

        Raises: ValueError, with the field, for anything else.
        """
        remedy = "save the report again, or give what `hf-fac missing --output` wrote"
        return checked(cls, Path(path).read_bytes(), f"{path} is no report of hf_fac", remedy)

    def to_dict(self) -> dict[str, Any]:
        """Returns all but the tables, and hf_fac's version, for JSON: arrays become lists, NaN None."""
        values = {"hf_fac": version("hf-fac")} | {name: v for name, v in vars(self).items() if name not in _TABLES}
        return json.loads(json.dumps(values, default=np.ndarray.tolist), parse_constant=lambda _: None)

    def to_html(
        self,
        path: str | os.PathLike[str],
        *,
        dictionary: Dictionary | None = None,
        synthesis: SynthesisOutcome | None = None,
        data: Dataset | None = None,
        anchor: Dataset | None = None,
        title: str = "What the data miss of the anchor set",
    ) -> None:
        """Writes the report as a page to look at: one HTML file that loads nothing, whole or not at all.

        Args:
            dictionary: a `FeatureDictionary`, for explanations, ratings and spans of features.
            synthesis: the `SynthesisResult` of writing for this report's features.
            data: the scored data set, for the rows that bring most and those that are redundant.
            anchor: the scored anchor set, for texts of features that the dictionary has no spans of.

        Raises: ValueError, with row and remedy, for rows that are not scored or measured differently from the
            report's; for a dictionary of another model or SAE.
        """
        from ..report.page import report_page

        content = self._content(title, dictionary=dictionary, synthesis=synthesis, data=data, anchor=anchor)
        write_whole(path, report_page(content))

    def plot(self) -> Figure:
        """Returns a matplotlib figure: FAC over data-set size and over delta, and how often features are active.

        Raises: ImportError, with the command to run, without matplotlib.
        """
        from ..report.plot import plot_report

        return plot_report(self._charts(), title=self.headline())

    def _content(
        self,
        title: str,
        *,
        dictionary: Dictionary | None = None,
        synthesis: SynthesisOutcome | None = None,
        data: Dataset | None = None,
        anchor: Dataset | None = None,
    ) -> ReportContent:
        from ..report.content import ReportContent
        from . import page

        if dictionary is not None:
            page.check_dictionary(dictionary, self.measurement)
        when = active_when(self)
        short, n_rare = self._short_features(page.MOST_MISSING, page.MOST_RARE)
        says_more = self.table and self.rows > 1
        gains = (self.expected_gain(self.rows), self.expected_gain(math.inf)) if says_more else None
        return ReportContent(
            title=title,
            fac=self.fac,
            interval=self.interval,
            single_interval=self.single_interval,
            confidence=self.confidence,
            n_covered=len(self.covered),
            n_missing=len(self.missing),
            n_rare=n_rare,
            rows=self.rows,
            anchor_rows=self.anchor_rows,
            mean_tokens=self.mean_tokens,
            anchor_mean_tokens=self.anchor_mean_tokens,
            saturation=self.saturation if self.rows > 1 else math.nan,
            match={
                "cosine": (self.frequency_cosine, self.frequency_cosine_interval),
                "Jensen-Shannon divergence": (self.jensen_shannon, self.jensen_shannon_interval),
                "KL(anchor ‖ data)": (self.kl_divergence, self.kl_interval),
            },
            problems=self.problems() + self._gaps(),
            support_exact=self.support_exact,
            charts=self._charts(),
            gains=gains,
            features=page.feature_entries(short, dictionary, anchor, when),
            row_figures=None if data is None else page.row_figures(data, when),
            synthesis=None if synthesis is None else page.synthesis_content(synthesis, dictionary),
            settings=self._settings(dictionary),
        )

    def _charts(self) -> Charts:
        from ..report.content import Charts, Frequencies
        from .page import curve, threshold_curve

        has_levels, table = bool(self.over_threshold), self.table
        supports = (table["data_support"], table["anchor_support"]) if table else None
        return Charts(
            rows=self.rows,
            threshold=math.nan if np.ndim(self.threshold) else self.threshold,
            over_rows=curve(self.rarefaction(), "rows") if table and self.rows > 1 else None,
            over_threshold=threshold_curve(self.fac_over_threshold()) if has_levels and self.rows else None,
            frequencies=Frequencies(*supports, self.rows, self.anchor_rows) if supports else None,
        )

    def _short_features(self, most_missing: int, most_rare: int) -> tuple[pd.DataFrame, int]:
        """Missing features, then those that significantly too few rows activate, as of `deficits` with is_missing; and
        how many of the latter there are. Without tables or rows, the missing ones alone."""
        import pandas as pd

        missing = pd.DataFrame({"feature": self.missing, "anchor_support": self.missing_support})[:most_missing]
        if not (self.table and self.rows and self.anchor_rows):
            unknown = dict.fromkeys(("deficit", "low", "high"), math.nan)
            return missing.assign(is_missing=True, data_support=0, **unknown), 0
        all_ = self.deficits().assign(is_missing=lambda table: table["data_support"] == 0)
        rare = all_[all_["significant"] & ~all_["is_missing"]]
        return pd.concat([missing[["feature"]].merge(all_, on="feature"), rare[:most_rare]]), len(rare)

    def _settings(self, dictionary: Dictionary | None) -> dict[str, str]:
        from .page import settings_of

        looked_at = "all" if self.features is None else f"{len(self.features):,}"
        found = {
            "Delta": self.threshold_source,
            "Features looked at": looked_at,
            "Rows without tokens": f"{self.rows_without_tokens:,}; anchor {self.anchor_rows_without_tokens:,}",
        }
        if dictionary is not None and dictionary.revision:
            found["Revision of the dictionary"] = dictionary.revision
        return found | settings_of(self.measurement)

    def __str__(self) -> str:
        least = "" if self.support_exact else "at least "
        most_frequent = zip(self.missing[:5].tolist(), self.missing_support.tolist(), strict=False)
        return "\n".join(
            [self.headline(), *self.facts()]
            + [f"missing: feature {i}, {least}{n:,} anchor rows" for i, n in most_frequent]
        )

    def headline(self) -> str:
        """Returns FAC with its interval, in one line."""
        return f"FAC {self.fac:.3f} ({self.confidence:.0%} interval {self.interval[0]:.3f} to {self.interval[1]:.3f})"

    def facts(self) -> list[str]:
        """Returns the report's other figures, each in a line of words."""
        covered, missing = len(self.covered), len(self.missing)
        lines = [f"of {covered + missing:,} features of the anchor: {covered:,} covered, {missing:,} missing"]
        if not math.isnan(self.single_interval[0]):
            low, high = self.single_interval
            lines.append(f"another data set of this kind and size: {low:.3f} to {high:.3f} ({self.confidence:.0%})")
        if not math.isnan(self.saturation):
            more = covered / self.saturation - covered
            lines.append(
                f"at most {self.saturation:.0%} of the way to saturation: more rows of this kind would cover at least "
                f"some {more:,.0f} of the missing features"
            )
        return [
            *lines,
            f"delta: {self.threshold_source}",
            f"rows: {self.rows:,} ({self.rows_without_tokens:,} without tokens), anchor {self.anchor_rows:,} "
            f"({self.anchor_rows_without_tokens:,} without tokens)",
            *self._match_lines(),
        ]

    def _repr_html_(self) -> str:
        from html import escape

        import pandas as pd

        strongest = pd.DataFrame({"missing feature": self.missing[:10], "anchor rows": self.missing_support[:10]})
        facts = "".join(f"<li>{escape(line)}</li>" for line in self.facts())
        return f"<b>{escape(self.headline())}</b><ul>{facts}</ul>{strongest.to_html(index=False)}"

    def _match_lines(self) -> list[str]:
        """How often features are active beside the anchor, and what FAC grows with."""
        cosine, shannon, kl = (
            f"{value:.3f} ({low:.3f} to {high:.3f})"
            for value, (low, high) in (
                (self.frequency_cosine, self.frequency_cosine_interval),
                (self.jensen_shannon, self.jensen_shannon_interval),
                (self.kl_divergence, self.kl_interval),
            )
        )
        own, others = (
            "?" if math.isnan(mean) else f"{mean:.1f}" for mean in (self.mean_tokens, self.anchor_mean_tokens)
        )
        active = "?" if self.active_features is None else f"{self.active_features:,}"
        return [
            f"how often, beside the anchor: cosine {cosine}; in nats Jensen-Shannon {shannon}, KL(anchor || data) {kl}",
            f"FAC grows with these: {self.rows:,} rows, {own} (anchor {others}) tokens a row, {active} active features",
        ]

    def warn(self, *, stacklevel: int) -> None:
        """Warn (UserWarning) where FAC says nothing."""
        for problem in self.problems():
            warnings.warn(problem, stacklevel=stacklevel)

    def problems(self) -> list[str]:
        """Returns why FAC says nothing, where it does."""
        dense = f"the median anchor row activates {self.anchor_active_share:.0%} of all features above delta"
        found = (
            (math.isnan(self.fac), "FAC is NaN: the anchor activates none of the features; lower the threshold"),
            (self.anchor_active_share > 0.10, f"FAC says nothing: {dense}; raise the threshold"),
            (self.fac > 0.98, f"FAC {self.fac:.3f} is too near 1 to tell data sets apart: raise the threshold"),
        )
        return [problem for applies, problem in found if applies]

    def _gaps(self) -> list[str]:
        """What a page of this report cannot show, or not exactly, and why."""
        found = (
            (not self.rows, "The data set has no rows."),
            (self.rows == 1, "One row gives no interval and says nothing of further rows."),
            (not self.table, "The report was read without its tables: figures that need them are left out."),
            (bool(self.table) and not self.support_exact,
             "Delta is not on the grid: numbers of rows are lower bounds, and so is expected FAC of fewer rows."),
        )  # fmt: skip
        return [gap for applies, gap in found if applies]


def active_when(report: FACReport) -> ActiveWhen:
    """Returns what counts as active for a report."""
    d_sae = report.measurement["d_sae"]
    delta, in_anchor = np.array(np.broadcast_to(np.float64(report.threshold), d_sae)), np.zeros(d_sae, bool)
    if report.features is not None:
        delta[~np.isin(np.arange(d_sae), report.features)] = np.inf
    in_anchor[report.covered], in_anchor[report.missing] = True, True
    return ActiveWhen(delta, in_anchor, report.measurement)


def _with_interval(table: pd.DataFrame, shares: pd.Series, errors: pd.Series) -> pd.DataFrame:
    intervals = [mean_interval(share, error) for share, error in zip(shares, errors, strict=True)]
    low, high = np.array(intervals, np.float64).reshape(-1, 2).T
    return table.assign(fac=shares, low=low, high=high)
