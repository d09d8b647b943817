"""Put a data set's coverage on its card on the Hub. In: a `FACReport` or a `FeatureCoverage`, and the data set's repo.
Out: the URL of the commit that adds a section with the figures to the card; the rest of the card is unchanged."""

from __future__ import annotations

import math
from importlib.metadata import version

from ..hub.cards import PAPER, folded, table
from ..hub.repo import update_card
from ..storage.validation import WholeMeasurement, checked
from .coverage import FeatureCoverage
from .report import FACReport

_LIMITS = (
    "FAC is the share of the anchor set's features that at least one row activates. It is no measure of quality, grows "
    "with the number and length of rows, and compares only with figures of the same model, SAE, delta and anchor set."
)


def push_coverage_to_hub(
    coverage: FACReport | FeatureCoverage,
    repo_id: str,
    *,
    anchor: str | None = None,
    sae: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> str:
    """Puts the figures of a report, or of a coverage without an anchor set, into the card of a data set's repo.

    There is one section for each model and layer: a later report of the same replaces it. Returns the commit's URL.

    Args:
        anchor: the anchor set's name on the card, for example that of a Hub data set.
        sae: the SAE's name on the card, as `load_sae` takes it.
        revision, token, commit_message, create_pr: as in `hub.update_card`; create_pr is for someone else's data set.

    Raises:
        HubError: the push was refused or failed, or the repo does not exist.
        ValueError: a coverage or report without its whole measurement (model, layer, ...).
    """
    remedy = "score the rows with FACScorer"
    measurement = checked(WholeMeasurement, coverage.measurement, "the measurement", remedy)
    model, layer = measurement.model, measurement.layer
    is_report = isinstance(coverage, FACReport)
    settings = {
        "model": f"{model}, layer {layer}",
        "SAE": f"{sae + ', ' if sae else ''}{measurement.d_sae:,} features",
        **({"delta": coverage.threshold_source} if is_report else {}),
        "measured": f"activation {measurement.activation}, over {measurement.pool_over} content",
        "fingerprint": measurement.fingerprint,
    }
    parts = [
        f"## Feature Activation Coverage: {model}, layer {layer}",
        _lead(coverage, anchor) if is_report else _lead_without_anchor(coverage),
        table(("figure", "value"), (_of_report(coverage, anchor) if is_report else _of_coverage(coverage)).items()),
        *(["To measure it again:", _how_to_measure(model, sae, repo_id)] if sae else []),
        folded("How it was measured", table(("setting", "value"), settings.items())),
        *([_LIMITS] if is_report else []),
    ]
    return update_card(
        repo_id,
        repo_type="dataset",
        section=f"coverage of {model} layer {layer}",
        body="\n\n".join(parts),
        metadata={"tags": ["hf-fac", "feature-activation-coverage"]},
        revision=revision,
        token=token,
        commit_message=commit_message or "Put feature activation coverage on the card with hf_fac",
        create_pr=create_pr,
    )


def _lead(report: FACReport, anchor: str | None) -> str:
    covered, missing = len(report.covered), len(report.missing)
    return (
        f"Of the {covered + missing:,} features of {report.measurement['model']} that a broad anchor set "
        f"{f'({anchor}) ' if anchor else ''}activates, this data set activates {covered:,}; {missing:,} are missing. "
        f"Features are those of a sparse autoencoder (SAE). Measured by hf-fac {version('hf-fac')} "
        f"([arXiv 2602.10388]({PAPER}))."
    )


def _lead_without_anchor(coverage: FeatureCoverage) -> str:
    live = int((coverage.maximum > 0).sum())
    return (
        f"This data set activates {live:,} of {coverage.d_sae:,} features of a sparse autoencoder (SAE) of "
        f"{coverage.measurement['model']}. Measured by hf-fac {version('hf-fac')} ([arXiv 2602.10388]({PAPER}))."
    )


def _how_to_measure(model: str, sae: str, repo_id: str) -> str:
    return (
        "```python\nfrom datasets import load_dataset\nfrom hf_fac import FACScorer, FeatureCoverage, SAEFeaturizer\n\n"
        f'featurizer = SAEFeaturizer.from_pretrained("{model}", sae="{sae}")\n'
        f'rows = load_dataset("{repo_id}", split="train").map(FACScorer(featurizer), batched=True)\n'
        "coverage = FeatureCoverage.from_dataset(rows)\n```"
    )


def _of_coverage(coverage: FeatureCoverage) -> dict[str, str]:
    live = int((coverage.maximum > 0).sum())
    return {
        "rows": _row_counts(coverage.rows, coverage.rows_without_tokens),
        "features above the floor": f"{live:,} of {coverage.d_sae:,} above {coverage.keep_above:g}",
    }


def _of_report(report: FACReport, anchor: str | None) -> dict[str, str]:
    interval, single = (
        " to ".join("?" if math.isnan(end) else f"{end:.3f}" for end in ends)
        for ends in (report.interval, report.single_interval)
    )
    covered, missing = len(report.covered), len(report.missing)
    fac = "undefined" if math.isnan(report.fac) else f"{report.fac:.3f}"
    some = "" if report.features is None else f", of {len(report.features):,} features looked at"
    match = {
        "cosine of activation frequencies": (report.frequency_cosine, report.frequency_cosine_interval, ""),
        "Jensen-Shannon divergence of activation frequencies": (
            report.jensen_shannon, report.jensen_shannon_interval, " nats",
        ),
        "KL(anchor, data)": (report.kl_divergence, report.kl_interval, " nats"),
    }  # fmt: skip
    return {
        "FAC": f"**{fac}** ({report.confidence:.0%} interval {interval})",
        "FAC of another data set of this kind and size": single,
        "FAC as a share of what such rows can reach": (
            "?" if math.isnan(report.saturation) else f"at most {report.saturation:.0%}"
        ),
        "features of the anchor set": f"{covered + missing:,}: {covered:,} covered, {missing:,} missing{some}",
        **{
            name: "?" if math.isnan(value) else f"{value:.3f}{unit} ({low:.3f} to {high:.3f})"
            for name, (value, (low, high), unit) in match.items()
        },
        "rows": _row_counts(report.rows, report.rows_without_tokens),
        "anchor set": f"{anchor + ', ' if anchor else ''}"
        + _row_counts(report.anchor_rows, report.anchor_rows_without_tokens),
    }


def _row_counts(rows: int, without_tokens: int) -> str:
    return f"{rows:,} rows" + (f", {without_tokens:,} of them without content tokens" if without_tokens else "")
