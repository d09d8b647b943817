"""Figures on a data set's card, over the wire to the local Hub server."""

from __future__ import annotations

import numpy as np
import pytest
from hub_server import READ_TOKEN, WRITE_TOKEN, HubServer, run_with_hub
from scipy.sparse import csr_array

from hf_fac.coverage.card import _of_report, push_coverage_to_hub
from hf_fac.coverage.coverage import FeatureCoverage

MEASUREMENT = {
    "model": "org/model", "layer": 5, "d_sae": 40, "activation": "native", "pool_over": "all", "side": "chosen",
    "keep_above": 0.0, "fingerprint": "f" * 32,
}  # fmt: skip


def coverage_of(rows: int, *, features: int, seed: int) -> FeatureCoverage:
    random = np.random.default_rng(seed)
    dense = random.exponential(size=(rows, 40)).astype(np.float32) * (random.random((rows, 40)) < 0.3)
    dense[:, features:] = 0
    return FeatureCoverage.from_activations(csr_array(dense), measurement=MEASUREMENT)


def test_a_report_and_a_coverage_have_their_sections_and_replace_their_own(tmp_path) -> None:
    anchor = coverage_of(60, features=40, seed=0)
    data = coverage_of(20, features=25, seed=1)
    report = data.compare(anchor, threshold=1.0)
    old = data.compare(anchor, threshold=2.0)
    data.save(tmp_path / "coverage.safetensors")
    old.save(tmp_path / "old.json")
    report.save(tmp_path / "report.json")
    files = {"README.md": b"---\nlicense: mit\n---\n\n# My rows\n", "rows.jsonl": b"{}\n"}
    with HubServer() as server:
        server.put("user/rows", files, "datasets")
        server.put("user/model", {"README.md": b"# A model"})
        result = run_with_hub(
            server,
            """
from hf_fac.coverage.coverage import FeatureCoverage
from hf_fac.coverage.card import push_coverage_to_hub
from hf_fac.coverage.report import FACReport
from hf_fac.hub.errors import HubError

def refusal(repo, **options):
    try:
        return push_coverage_to_hub(FACReport.load(args["report"]), repo, **options)
    except HubError as error:
        return [error.status, str(error)]

reports = [FACReport.load(args[name]) for name in ("old", "report")]
urls = [push_coverage_to_hub(report, "user/rows", anchor="org/broad", sae="user/sae") for report in reports]
coverage = FeatureCoverage.load(args["coverage"])
coverage.measurement["layer"] = 7
urls.append(push_coverage_to_hub(coverage, "user/rows"))
result = [urls, refusal("user/none"), refusal("user/model"), refusal("user/rows", token=args["read"])]
result.append(refusal("user/rows", create_pr=True, token=args["read"]))
""",
            token=WRITE_TOKEN,
            args={
                "old": str(tmp_path / "old.json"),
                "report": str(tmp_path / "report.json"),
                "coverage": str(tmp_path / "coverage.safetensors"),
                "read": READ_TOKEN,
            },
        )
        urls, absent, model, reader, request = result
        card = server.files("user/rows", "datasets")["README.md"].decode()
        assert urls[-1].endswith(server.repos["datasets", "user/rows"].refs["main"])
    assert "license: mit" in card
    assert "feature-activation-coverage" in card
    assert "# My rows" in card
    assert card.count("## Feature Activation Coverage") == 2
    low, high = report.interval
    assert f"| FAC | **{report.fac:.3f}** (95% interval {low:.3f} to {high:.3f}) |" in card
    low, high = report.single_interval
    assert f"| FAC of another data set of this kind and size | {low:.3f} to {high:.3f} |" in card
    assert f"| FAC as a share of what such rows can reach | at most {report.saturation:.0%} |" in card
    assert 'load_dataset("user/rows", split="train").map(FACScorer(featurizer), batched=True)' in card
    assert f"{len(report.covered)} covered, {len(report.missing)} missing" in card
    assert f"| delta | {report.threshold_source} |" in card
    assert old.threshold_source not in card
    assert "| anchor set | org/broad, 60 rows |" in card
    assert "| SAE | user/sae, 40 features |" in card
    live = int((data.maximum > 0).sum())
    assert f"| features above the floor | {live} of 40 above 0 |" in card
    assert absent[0] == 404
    assert model[0] == 404
    assert "is not a dataset repo" in model[1]
    assert reader[0] == 403
    assert "/discussions/" in request


@pytest.mark.parametrize("absent", ["model", "layer", "fingerprint"])
def test_a_measurement_that_does_not_say_of_what_is_refused(absent: str) -> None:
    coverage = coverage_of(3, features=5, seed=0)
    report = coverage.compare(coverage_of(9, features=40, seed=1), threshold=1.0)
    del report.measurement[absent]
    for found in (coverage, report):
        assert absent not in found.measurement
        with pytest.raises(ValueError, match=f"{absent}: Field required; .*score the rows"):
            push_coverage_to_hub(found, "user/rows")


def test_a_report_without_features_has_a_card_too() -> None:
    empty = coverage_of(3, features=0, seed=0)
    with pytest.warns(UserWarning, match="FAC is NaN"):
        nothing = empty.compare(empty, threshold=1.0)
    assert _of_report(nothing, None)["FAC"] == "**undefined** (95% interval ? to ?)"
