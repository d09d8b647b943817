"""What a page shows, as plain data: filled in by whoever has the figures, read by templates and plots.

NaN stands for what is not known, None for a part that a page leaves out. Texts are as they were found: pages escape
them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

Interval = tuple[float, float]


class Curve(NamedTuple):
    """Points of a line, arrays of [n]: y over x, with an interval (NaN: none). extrapolated: bool, beyond the data."""

    x: np.ndarray
    y: np.ndarray
    low: np.ndarray
    high: np.ndarray
    extrapolated: np.ndarray

    def points(self) -> list[tuple[float, float, float, float, bool]]:
        return list(zip(*(values.tolist() for values in self), strict=True))


class Frequencies(NamedTuple):
    """How often each feature of the anchor is active: int64 [n_features] of rows, and the numbers of all rows."""

    data_support: np.ndarray
    anchor_support: np.ndarray
    rows: int
    anchor_rows: int


class Charts(NamedTuple):
    """What the figures of a report show. rows and threshold say where the data set stands in them; a threshold of NaN
    is one for each feature."""

    rows: int
    threshold: float
    over_rows: Curve | None
    over_threshold: Curve | None
    frequencies: Frequencies | None


class TextSpan(NamedTuple):
    """A text with its most activating token. strength: activation by the feature's largest, 0 to 1. A row of which the
    token is not known has its text in `before`."""

    before: str
    token: str = ""
    after: str = ""
    activation: float = math.nan
    strength: float = 0.0


class FeatureEntry(NamedTuple):
    """A feature that no row activates, or too few. deficit: rows short of the anchor's rate, with its interval."""

    feature: int
    is_missing: bool
    anchor_rows: int
    data_rows: int
    deficit: float
    interval: Interval
    explanation: str = ""
    verification: str = ""
    ratings: tuple[tuple[str, str], ...] = ()
    spans: tuple[TextSpan, ...] = ()


class RowEntry(NamedTuple):
    """A row of the data; figures as in `row_contributions`."""

    number: int
    tokens: int
    anchor_features: int
    unique: int
    share: float
    redundancy: float
    text: str


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What single rows add. half: how many rows, the best first, bring half of the coverage. without_unique: rows of
    which each could go without a loss of FAC."""

    best: list[RowEntry]
    redundant: list[RowEntry]
    half: int
    without_unique: int


class Sample(NamedTuple):
    """A new row, beside the explanation and the strongest span of the feature that it was written for."""

    feature: int
    method: str
    activation: float
    text: str
    explanation: str
    spans: tuple[TextSpan, ...]


@dataclass(frozen=True, kw_only=True)
class Synthesis:
    """What a synthesis brought. report: that of the synthesis, by `to_dict()`. curve: FAC after each sample.
    dropped: examples of rejected texts, (reason, feature, text)."""

    report: dict[str, Any]
    curve: Curve | None
    samples: list[Sample]
    dropped: list[tuple[str, int, str]]


@dataclass(frozen=True, kw_only=True)
class ReportContent:
    """A report. The match of frequencies: by name its value and interval. settings: by name, in words.

    gains: how many missing features as many further rows, and further rows without end, are expected to cover.
    n_missing, n_rare: how many there are of the two kinds of entries in `features`, which may hold fewer.
    """

    title: str
    fac: float
    interval: Interval
    single_interval: Interval
    confidence: float
    n_covered: int
    n_missing: int
    n_rare: int
    rows: int
    anchor_rows: int
    mean_tokens: float
    anchor_mean_tokens: float
    saturation: float
    match: dict[str, tuple[float, Interval]]
    problems: list[str]
    support_exact: bool
    charts: Charts
    gains: tuple[float, float] | None
    features: list[FeatureEntry]
    row_figures: Rows | None
    synthesis: Synthesis | None
    settings: dict[str, str]


class ComparedSet(NamedTuple):
    """One of several data sets. alone: features that it alone covers. overlap: by name, |A & B| / |A | B|."""

    name: str
    rows: int
    mean_tokens: float
    fac: float
    interval: Interval
    single_interval: Interval
    n_covered: int
    alone: int
    saturation: float
    frequency_cosine: float
    overlap: dict[str, float]
    over_rows: Curve | None


class Metric(NamedTuple):
    """A rival metric: its value by data set, and what a higher value says. best: the names of the best sets by it."""

    name: str
    higher_is: str
    values: dict[str, float]
    best: set[str]
    source: str


@dataclass(frozen=True, kw_only=True)
class ComparisonContent:
    """Several data sets. n_features: of the anchor; n_together: of them, covered by one of the sets or more;
    n_by_all: covered by each."""

    title: str
    confidence: float
    anchor_rows: int
    n_features: int
    n_together: int
    n_by_all: int
    sets: list[ComparedSet]
    metrics: list[Metric] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    settings: dict[str, str] = field(default_factory=dict)
