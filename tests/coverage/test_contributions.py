"""What each row adds, against a slow reference from the definitions."""

import json
import math

import datasets
import numpy as np
import pytest
from coverages import GRID, cover, quiet, random_rows, scored

from hf_fac import FeatureCoverage, row_contributions
from hf_fac.coverage.report import active_when
from hf_fac.coverage.row_shares import strongest_rows


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("options", [{"threshold": GRID[24]}, {"threshold": 0.3}, {"relative": 0.4}])
@pytest.mark.parametrize("features", [None, np.arange(5, 30)])
def test_a_rows_figures_follow_their_definitions(seed, options, features):
    rng = np.random.default_rng(seed)
    rows, anchor = random_rows(rng, n=1100, density=0.004), random_rows(rng, n=50, density=0.1)
    ds = scored(rows, shuffle=rng)
    report = quiet(FeatureCoverage.from_dataset(ds), cover(anchor), features=features, **options)
    table = row_contributions(ds, report)
    assert list(table) == ["tokens", "features", "anchor_features", "unique", "share", "redundancy"]
    assert len(table) == len(rows)
    delta = np.broadcast_to(np.float64(report.threshold), 40)
    wanted = set(range(40) if features is None else features.tolist())
    active = [{i for i in wanted if row[i] > delta[i]} for row in rows]
    in_anchor = set(report.covered.tolist() + report.missing.tolist())
    support = {i: sum(i in others for others in active) for i in in_anchor}
    for mine, found in zip(active, table.itertuples(), strict=True):
        shares = [1 / support[i] for i in mine & in_anchor]
        assert (found.features, found.anchor_features) == (len(mine), len(shares))
        assert found.unique == sum(support[i] == 1 for i in mine & in_anchor)
        assert found.share == pytest.approx(sum(shares))
        redundancy = np.mean([1 - share for share in shares]) if shares else math.nan
        assert found.redundancy == pytest.approx(redundancy, nan_ok=True)
    assert table["share"].sum() == pytest.approx(len(report.covered))
    assert table["unique"].any()
    assert table["tokens"].tolist() == ds["fac_tokens"][:]


def test_a_features_strongest_row_is_the_first_of_those_that_activate_it_most_above_delta():
    rng = np.random.default_rng(0)
    first, last = (random_rows(rng, n=500, density=0.01) for _ in range(2))
    rows = np.concatenate([first, first, last])  # the second of two batches has rows of `last` alone
    report = quiet(cover(random_rows(rng)), cover(rows), threshold=2.5)
    found = strongest_rows(scored(rows, shuffle=rng), np.arange(39, -1, -1), active_when(report))
    assert list(found) == [i for i in range(39, -1, -1) if rows[:, i].max() > 2.5]
    assert {i: (rows[:, i].argmax(), rows[:, i].max()) for i in found} == found


def test_fac_falls_by_a_rows_unique_features_without_it():
    rng = np.random.default_rng(0)
    rows, anchor = random_rows(rng, density=0.05), cover(random_rows(rng, n=50))
    report = quiet(FeatureCoverage.from_dataset(scored(rows)), anchor, threshold=1.0)
    n_features = len(report.covered) + len(report.missing)
    for row, unique in row_contributions(scored(rows), report)["unique"].items():
        without = quiet(cover(np.delete(rows, row, axis=0)), anchor, threshold=1.0)
        assert (report.fac - without.fac) * n_features == pytest.approx(unique)


def test_a_stream_and_an_empty_data_set_are_read():
    rng = np.random.default_rng(0)
    ds = scored(random_rows(rng))
    report = quiet(FeatureCoverage.from_dataset(ds), cover(random_rows(rng, n=50)), threshold=1.0)
    assert row_contributions(ds.to_iterable_dataset(), report).equals(row_contributions(ds, report))
    assert len(row_contributions(ds.select([]), report)) == 0


def test_rows_that_do_not_fit_the_report_are_refused():
    rng = np.random.default_rng(0)
    rows = random_rows(rng)
    report = quiet(FeatureCoverage.from_dataset(scored(rows)), cover(rows), threshold=1.0)
    with pytest.raises(ValueError, match=r"report's rows and row 0 and after .*layer: 1 and 9.*same FACScorer"):
        row_contributions(scored(rows, layer=9), report)
    with pytest.raises(ValueError, match="no column 'fac_features'"):
        row_contributions(scored(rows).select_columns(["text"]), report)
    with pytest.raises(TypeError, match="DatasetDict: pass one split"):
        row_contributions(datasets.DatasetDict(train=scored(rows)), report)
    wide = scored(rows).map(lambda row: {"fac_measurement": json.dumps({"d_sae": 40, "keep_above": 0.0})})
    with pytest.raises(ValueError, match="measured differently"):
        row_contributions(wide, report)
