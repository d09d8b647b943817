"""What a data set covers, on its card on the Hub. In: a `FACReport` or a `FeatureCoverage`, and the data set's repo;
out: the URL of the commit that puts a section with the figures into its card, all else on the card as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from ..hub.cards import cell
from ..hub.repo import update_card
from ..storage.validation import WholeMeasurement, checked
from .coverage import FACReport, FeatureCoverage, SavedReport


def push_coverage_to_hub(
    coverage: FACReport | FeatureCoverage | Mapping[str, Any],
    repo_id: str,
    *,
    anchor: str | None = None,
    sae: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> str:
    """The URL of the commit that puts the figures of a report, or of a coverage without an anchor set, into the card of
    a data set's repo. One section for each model and layer: another report of the same takes its place.

    Args:
        coverage: a mapping is `FACReport.to_dict()`, as `hf-fac missing --output` writes it.
        anchor: what to call the anchor set, a Hub data set's name say.
        sae: what to call the SAE: the name that `load_sae` takes.
        others: those of `hub.update_card`. create_pr: for the data set of someone else.

    Raises: HubError, also for a repo that does not exist; ValueError for a mapping that is no report, and for a
        coverage that does not say what it was measured with (model, layer, ...).
    """
    problem = "This is no report of hf_fac, nor a coverage of rows that FACScorer scored"
    remedy = "give FACReport.to_dict(), or score the rows"
    if isinstance(coverage, FeatureCoverage):
        rows = _of_coverage(coverage)
        measurement = checked(WholeMeasurement, coverage.measurement, problem, remedy)
    else:
        found = coverage.to_dict() if isinstance(coverage, FACReport) else coverage
        report = checked(SavedReport, found, problem, remedy)
        rows, measurement = _of_report(report, anchor), report.measurement
    model, layer = measurement.model, measurement.layer
    rows |= {
        "model": f"{model}, layer {layer}",
        "SAE": f"{sae + ', ' if sae else ''}{measurement.d_sae:,} features",
        "measured": f"activation {measurement.activation}, over {measurement.pool_over} content",
        "fingerprint": measurement.fingerprint,
    }
    body = "\n".join(
        [
            f"## Feature Activation Coverage: {model}, layer {layer}\n",
            "Which features of the model this data set activates, measured with a sparse autoencoder (hf-fac "
            f"{version('hf-fac')}, arXiv 2602.10388).\n",
            "| | |\n|---|---|",
            *(f"| {name} | {cell(value)} |" for name, value in rows.items()),
        ]
    )
    return update_card(
        repo_id,
        repo_type="dataset",
        section=f"coverage of {model} layer {layer}",
        body=body,
        metadata={"tags": ["hf-fac", "feature-activation-coverage"]},
        revision=revision,
        token=token,
        commit_message=commit_message or "Put feature activation coverage on the card with hf_fac",
        create_pr=create_pr,
    )


def _of_coverage(coverage: FeatureCoverage) -> dict[str, str]:
    live = int((coverage.maximum > 0).sum())
    return {
        "rows": _counted(coverage.rows, coverage.rows_without_tokens),
        "features above the floor": f"{live:,} of {coverage.d_sae:,} above {coverage.keep_above:g}",
    }


def _of_report(report: SavedReport, anchor: str | None) -> dict[str, str]:
    low, high = (f"{end:.3f}" if end is not None else "?" for end in report.interval)
    covered, missing = len(report.covered), len(report.missing)
    fac = f"{report.fac:.3f}" if report.fac is not None else "undefined"
    some = "" if report.features is None else f", of {len(report.features):,} features looked at"
    return {
        "FAC": f"**{fac}** ({report.confidence:.0%} interval {low} to {high})",
        "features of the anchor set": f"{covered + missing:,}: {covered:,} covered, {missing:,} missing{some}",
        "delta": report.threshold_source,
        "rows": _counted(report.rows, report.rows_without_tokens),
        "anchor set": f"{anchor + ', ' if anchor else ''}"
        + _counted(report.anchor_rows, report.anchor_rows_without_tokens),
        "KL(anchor, data)": f"{report.kl_divergence:.3f} nats" if report.kl_divergence is not None else "?",
    }


def _counted(rows: int, without_tokens: int) -> str:
    return f"{rows:,} rows" + (f", {without_tokens:,} of them without tokens" if without_tokens else "")
