"""What the page of a report shows beyond the report's own figures: texts of features and rows, and a synthesis.

In: ids and tables of a report, a dictionary's rows, scored data sets, a `SynthesisResult`. Out: plain data of
`report.content`. Numbers of entries are bounded, so that a page opens fast.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..inputs.rows import row_text
from ..report.content import Curve, FeatureEntry, RowEntry, Rows, Sample, Synthesis, TextSpan
from ..storage.differences import differences
from .row_shares import ActiveWhen, row_shares, strongest_rows

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset

MOST_MISSING, MOST_RARE = 500, 200  # entries of a page
_MOST_ROWS, _MOST_SAMPLES, _MOST_DROPPED = 10, 300, 3  # of each kind; of dropped texts for each reason
_MOST_SPANS, _BEFORE, _AFTER = 5, 160, 120  # of a feature; characters of a span beside its token
_FEWEST_FEATURES = 20  # of the anchor, for FAC at a level of delta
_MOST_TEXT = 400  # characters of a row or an explanation


class Dictionary(Protocol):
    """The rows of a `FeatureDictionary`, by feature."""

    measurement: dict[str, Any]
    revision: str | None

    def __contains__(self, feature: int) -> bool: ...
    def __getitem__(self, feature: int) -> dict[str, Any]: ...


class SynthesisOutcome(Protocol):
    """The parts of a `SynthesisResult`."""

    @property
    def dataset(self) -> Dataset: ...
    @property
    def report(self) -> Any: ...
    @property
    def dropped(self) -> Dataset: ...


def check_dictionary(dictionary: Dictionary, measurement: Mapping[str, Any]) -> None:
    """Raises: ValueError, with what differs, for a dictionary of another model, layer or width than a report's.

    Two SAEs of the same model, layer and width are not told apart.
    """
    theirs = dictionary.measurement
    if theirs.get("fingerprint", 1) != measurement.get("fingerprint", 2):
        ours, theirs = ({key: found.get(key) for key in ("model", "layer", "d_sae")} for found in (measurement, theirs))
        if found := differences(ours, theirs):
            raise ValueError(
                f"report and dictionary are of different models or SAEs ({found}): give the dictionary that was built "
                "with the report's featurizer"
            )


def curve(table: pd.DataFrame, x: str) -> Curve:
    """Returns the points of a table with the columns fac, low and high, over the column `x`."""
    beyond = table.get("extrapolated", np.zeros(len(table), bool))
    return Curve(*(np.asarray(table[name], np.float64) for name in (x, "fac", "low", "high")), np.asarray(beyond, bool))


def threshold_curve(table: pd.DataFrame) -> Curve:
    """Returns FAC over delta, without the highest levels: FAC of a few features jumps."""
    enough = min(_FEWEST_FEATURES, table["anchor_features"].max()) if len(table) else 0
    return curve(table[table["anchor_features"] >= enough], "threshold")


def feature_entries(
    table: pd.DataFrame, dictionary: Dictionary | None, anchor: Dataset | None, when: ActiveWhen
) -> list[FeatureEntry]:
    """Returns entries for the rows of a table: feature, is_missing, anchor_support, data_support, deficit, low, high.

    Args:
        anchor: for features without spans, the row of this scored data set that activates it most.
    """
    known = {i: dictionary[i] for i in table["feature"].tolist() if dictionary is not None and i in dictionary}
    without = [i for i in table["feature"].tolist() if not known.get(i, {}).get("spans")]
    rows = {} if anchor is None or not without else _strongest_texts(anchor, np.array(without), when)
    return [
        FeatureEntry(
            feature=row.feature,
            is_missing=row.is_missing,
            anchor_rows=row.anchor_support,
            data_rows=row.data_support,
            deficit=row.deficit,
            interval=(row.low, row.high),
            **_meaning(known.get(row.feature), rows.get(row.feature, ())),
        )
        for row in table.itertuples()
    ]


def row_figures(data: Dataset, when: ActiveWhen) -> Rows:
    """Returns what single rows of a scored data set add: those that bring most, and the most redundant."""
    table = row_shares(data, when)
    best = table[table["anchor_features"] > 0].sort_values(["unique", "share"], ascending=False, kind="stable")
    redundant = table[(table["anchor_features"] > 0) & (table["unique"] == 0)]
    redundant = redundant.sort_values("redundancy", ascending=False, kind="stable")
    shares = np.sort(table["share"])[::-1].cumsum()
    return Rows(
        best=_row_entries(best.head(_MOST_ROWS), data),
        redundant=_row_entries(redundant.head(_MOST_ROWS), data),
        half=int(np.searchsorted(shares, shares[-1] / 2) + 1) if len(shares) and shares[-1] else 0,
        without_unique=int((table["unique"] == 0).sum()),
    )


def synthesis_content(result: SynthesisOutcome, dictionary: Dictionary | None) -> Synthesis:
    """Returns what a page shows of a synthesis."""
    found = result.report.to_dict()
    points = np.array([math.nan if y is None else y for y in found.pop("curve")])
    unknown = np.full(len(points), math.nan)
    is_beyond = np.zeros(len(points), bool)
    samples = [_sample(row, dictionary) for row in _first(result.dataset, _MOST_SAMPLES)]
    return Synthesis(
        report=found,
        curve=Curve(np.arange(len(points)), points, unknown, unknown, is_beyond) if len(points) > 1 else None,
        samples=samples,
        dropped=list(_examples(result.dropped)),
    )


def _strongest_texts(anchor: Dataset, features: np.ndarray, when: ActiveWhen) -> dict[int, tuple[TextSpan, ...]]:
    """For each feature the text of the row of a scored data set that activates it most."""
    return {
        i: (TextSpan(_one_line(row_text(anchor[row]))[:_MOST_TEXT], activation=activation),)
        for i, (row, activation) in strongest_rows(anchor, features, when).items()
    }


def _meaning(row: Mapping[str, Any] | None, spans: tuple[TextSpan, ...]) -> dict[str, Any]:
    """What a dictionary's row says about a feature; `spans` where it has none."""
    if row is None:
        return {"spans": spans}
    most = max((span["activation"] for span in row["spans"]), default=0.0)
    own = tuple(_text_span(span, most) for span in row["spans"][:_MOST_SPANS])
    return {
        "explanation": (row["explanation"] or "")[:_MOST_TEXT],
        "verification": row["verification"] or "",
        "ratings": tuple((rating["task"], rating["rating"]) for rating in row["ratings"]),
        "spans": own or spans,
    }


def _text_span(span: Mapping[str, Any], most: float) -> TextSpan:
    """A dictionary's span, cut; what stands before a token in it, a space as a rule, stands before the mark."""
    token = span["token"].strip() or span["token"]
    lead, _, rest = span["token"].partition(token)
    before, after = _one_line(span["before"] + lead).lstrip(), _one_line(rest + span["after"]).rstrip()
    return TextSpan(
        before=("…" if len(before) > _BEFORE else "") + before[-_BEFORE:],
        token=_one_line(token).strip()[:_AFTER] or "␣",
        after=after[:_AFTER] + ("…" if len(after) > _AFTER else ""),
        activation=span["activation"],
        strength=max(0.0, span["activation"] / most) if most > 0 else 0.0,
    )


def _one_line(text: str) -> str:
    return re.sub(r"\s*\n\s*", " ⏎ ", text)


def _row_entries(table: pd.DataFrame, data: Dataset) -> list[RowEntry]:
    return [
        RowEntry(
            row.Index, row.tokens, row.anchor_features, row.unique, row.share, row.redundancy,
            _one_line(row_text(data[row.Index]))[:_MOST_TEXT],
        )
        for row in table.itertuples()
    ]  # fmt: skip


def _sample(row: dict[str, Any], dictionary: Dictionary | None) -> Sample:
    feature = row["fac_feature"]
    is_known = dictionary is not None and feature in dictionary
    meaning = _meaning(dictionary[feature], ()) if is_known else {"explanation": "", "spans": ()}
    text = _one_line(row_text(row))[:_MOST_TEXT]
    return Sample(feature, row["fac_method"], row["fac_activation"], text, meaning["explanation"], meaning["spans"][:1])


def _examples(dropped: Dataset) -> Iterable[tuple[str, int, str]]:
    """Some of the dropped texts of each reason, which is what stands before the detail."""
    shown: Counter[str] = Counter()
    for row in dropped.select_columns(["reason", "fac_feature", "text"]):
        reason = row["reason"].partition(":")[0]
        shown[reason] += 1
        if shown[reason] <= _MOST_DROPPED:
            yield row["reason"], row["fac_feature"], _one_line(row["text"])[:_MOST_TEXT]


def _first(dataset: Dataset, n: int) -> Dataset:
    return dataset.select(range(min(n, len(dataset))))


def settings_of(measurement: Mapping[str, Any]) -> dict[str, str]:
    """Returns how rows were measured, in words."""
    names = {
        "model": "Model", "layer": "Layer", "d_sae": "Features of the SAE", "activation": "Activation",
        "pool_over": "Tokens that count", "side": "Side of a preference pair",
        "keep_above": "Floor of kept activations", "fingerprint": "Fingerprint of the measurement",
    }  # fmt: skip
    named = {title: measurement[name] for name, title in names.items() if measurement.get(name) is not None}
    rest = {name: value for name, value in measurement.items() if name not in names}
    return {name: _in_words(value) for name, value in (named | rest).items()}


def _in_words(value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:,.6g}" if isinstance(value, float) else f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value)
