"""Coverage and FAC against slow references written from the paper's definitions, and what must hold of any merge."""

import json
import math
import subprocess
import sys
import warnings
from functools import reduce
from operator import or_

import datasets
import numpy as np
import pytest
from coverages import GRID, cover, measurement, quiet, random_rows, scored
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from hf_fac.coverage.coverage import FeatureCoverage
from hf_fac.coverage.report import FACReport


def activated(rows, delta, features):
    """F(D), and the number of rows that activate each feature, one number at a time."""
    counts = {i: sum(float(row[i]) > delta[i] for row in rows) for i in features}
    return {i for i in features if counts[i]}, counts


def reference(data, anchor, delta, features):
    delta = [float(x) for x in np.broadcast_to(delta, data.shape[1])]
    (own, own_rows), (wanted, anchor_rows) = activated(data, delta, features), activated(anchor, delta, features)
    union = sorted(own | wanted)
    p_total, q_total = (sum(rows[i] + 0.5 for i in union) for rows in (anchor_rows, own_rows))
    ratios = [((anchor_rows[i] + 0.5) / p_total, (own_rows[i] + 0.5) / q_total) for i in union]
    return {
        "fac": len(own & wanted) / len(wanted) if wanted else math.nan,
        "covered": sorted(own & wanted),
        "missing": sorted(wanted - own, key=lambda i: (-anchor_rows[i], -anchor[:, i].max(), i)),
        "own_rows": own_rows,
        "anchor_rows": anchor_rows,
        "kl": sum(p * math.log(p / q) for p, q in ratios) if union else math.nan,
    }


@pytest.mark.parametrize("d_sae", [500, 100_000])
def test_rows_with_more_activations_than_are_counted_at_a_time_give_the_same_as_single_rows(d_sae):
    rng = np.random.default_rng(0)
    n_active = [*rng.integers(0, 400, 300).tolist(), *([] if d_sae < 1000 else [40_000, 0, 70_000])]
    ids = [np.sort(rng.choice(d_sae, n, replace=False)) for n in n_active]
    starts = np.append(0, np.cumsum(n_active))
    acts = rng.choice(np.float32([0.3, 1, 2.5, 40]), starts[-1]) + rng.random(starts[-1], np.float32)
    rows = csr_array((acts, np.concatenate(ids), starts), shape=(len(ids), d_sae))
    coverage = FeatureCoverage.from_activations(rows, measurement=measurement(d_sae))
    maxima = -np.sort(-rows[:300].toarray(), axis=0)[:2]
    if d_sae < 1000:
        np.testing.assert_array_equal([coverage.maximum, coverage.second_maximum], maxima)
    level = np.searchsorted(GRID, acts) - 1
    counts = np.zeros((len(GRID), d_sae), np.int64)
    np.add.at(counts, (level, np.concatenate(ids)), 1)
    np.testing.assert_array_equal(coverage.group_counts.sum(axis=0), counts)
    assert (coverage.active_counts.sum(axis=1) == len(ids)).all()
    parts = [slice(0, 1), slice(301, None), slice(1, 150), slice(150, 301)]
    assert coverage == reduce(
        or_, (FeatureCoverage.from_activations(rows[part], measurement=measurement(d_sae)) for part in parts)
    )


@pytest.mark.parametrize("seed", range(6))
def test_the_report_follows_the_definition_for_any_delta_and_subset(seed):
    rng = np.random.default_rng(seed)
    data, anchor = random_rows(rng), random_rows(rng, n=50)
    coverage, anchor_coverage = cover(data), cover(anchor)
    for delta in [0.0, 1e-9, GRID[10], 0.3, GRID[24], 1.7, GRID[30], 3000.0]:
        for features in [None, [3], rng.permutation(40)[:15], [7, 7, 2]]:
            report = quiet(coverage, anchor_coverage, features=features, threshold=delta)
            expected = reference(data, anchor, delta, range(40) if features is None else sorted(set(features)))
            assert report.fac == pytest.approx(expected["fac"], nan_ok=True)
            assert report.covered.tolist() == expected["covered"]
            assert report.covered.dtype == report.missing.dtype == np.int64
            assert report.threshold == delta
            assert report.support_exact == (delta in GRID)
            anchor_rows = [expected["anchor_rows"][i] for i in report.missing.tolist()]
            if delta in GRID:
                assert report.missing.tolist() == expected["missing"]
                assert report.missing_support.tolist() == anchor_rows
                assert report.kl_divergence == pytest.approx(expected["kl"], nan_ok=True)
                assert report.active_share == np.sort((data > delta).sum(axis=1))[14] / 40
                assert report.anchor_active_share == np.sort((anchor > delta).sum(axis=1))[24] / 40
            else:
                assert sorted(report.missing.tolist()) == sorted(expected["missing"])
                assert (report.missing_support >= 1).all()
                assert (report.missing_support <= anchor_rows).all()


@pytest.mark.parametrize("seed", range(3))
def test_a_relative_delta_is_a_share_of_each_features_maximum_in_the_anchor(seed):
    rng = np.random.default_rng(seed)
    data, anchor = random_rows(rng), random_rows(rng, n=50)
    report = quiet(cover(data), cover(anchor), relative=0.5)
    assert report.threshold.tolist() == (0.5 * anchor.max(axis=0).astype(np.float64)).tolist()
    expected = reference(data, anchor, report.threshold, range(40))
    assert report.fac == expected["fac"]
    assert report.covered.tolist() == expected["covered"]
    assert "0.5 of each feature's maximum" in report.threshold_source
    assert math.isnan(report.active_share)
    given = quiet(cover(data), cover(anchor), threshold=report.threshold)
    assert given.missing.tolist() == report.missing.tolist()
    assert given.fac == report.fac
    assert "one for each feature, as given" in given.threshold_source


def test_a_relative_delta_stops_at_the_floor_and_says_for_how_many_features():
    rows = np.float32([[2.0, 0.3, 0.0], [4.0, 0.3, 0.0]])
    report = quiet(cover(rows, 0.25), cover(rows, 0.25), relative=0.5)
    assert report.threshold.tolist() == [2.0, 0.25, 0.25]
    assert "the floor 0.25 for 1 of 2 features" in report.threshold_source


def test_a_saved_report_is_read_back_as_it_was_and_without_a_table_from_json(tmp_path):
    rng = np.random.default_rng(0)
    of = {"activation": "native", "pool_over": "all", "side": "chosen", "fingerprint": "f"}
    data, anchor = cover_as(random_rows(rng, density=0.05), **of), cover_as(random_rows(rng, n=50), **of)
    for options in ({"threshold": 1.0, "features": np.arange(30)}, {"relative": 0.5}, {"threshold": 5000.0}):
        report = quiet(data, anchor, **options)
        report.save(tmp_path / "report.json")
        loaded = FACReport.load(tmp_path / "report.json")
        assert vars(loaded).keys() == vars(report).keys()
        np.testing.assert_equal(vars(loaded), vars(report))
        assert loaded.missing.dtype == np.int64
        (tmp_path / "printed.json").write_text(json.dumps(report.to_dict()))
        assert str(FACReport.load(tmp_path / "printed.json")) == str(report)
        assert FACReport.load(tmp_path / "printed.json").table == {}
    (tmp_path / "report.json").write_text('{"fac": 1}')
    with pytest.raises(ValueError, match=r"report\.json is no report of hf_fac: interval: Field required"):
        FACReport.load(tmp_path / "report.json")


@pytest.mark.parametrize(
    "options",
    [
        {"threshold": GRID[24]},
        {"threshold": 0.0},
        {"threshold": GRID[30], "features": [3, 9, 30, 31]},
        {"threshold": 3000.0},
    ],
)
@pytest.mark.parametrize("saved", [False, True])
def test_added_rows_give_what_comparing_data_and_rows_together_gives(options, saved, tmp_path):
    rng = np.random.default_rng(1)
    data, anchor, added = (
        random_rows(rng, density=0.02),
        random_rows(rng, n=50, density=0.1),
        random_rows(rng, n=9, density=0.05),
    )
    of = {"activation": "native", "pool_over": "all", "side": "chosen", "fingerprint": "f"}
    report = quiet(cover_as(data, **of), cover_as(anchor, **of), **options)
    if saved:
        report.save(tmp_path / "report.json")
        report = FACReport.load(tmp_path / "report.json")
    together = [quiet(cover(np.vstack([data, added[:n]])), cover(anchor), **options) for n in range(10)]
    after = report.with_added(csr_array(added))
    assert after.curve.tolist() == pytest.approx([each.fac for each in together], nan_ok=True)
    assert after.fac == pytest.approx(together[-1].fac, nan_ok=True)
    assert after.covered.tolist() == together[-1].covered.tolist()
    assert after.kl_divergence == pytest.approx(together[-1].kl_divergence, nan_ok=True)
    assert report.with_added([cover(added).maximum]).fac == pytest.approx(after.fac, nan_ok=True)
    none = report.with_added(csr_array((0, 40)))
    assert (none.fac, none.kl_divergence) == pytest.approx((report.fac, report.kl_divergence), nan_ok=True)


def test_added_rows_count_above_a_delta_of_each_feature(tmp_path):
    data, anchor = np.float32([[0, 0, 2]]), np.float32([[4, 8, 0]])
    report = quiet(cover(data), cover(anchor), threshold=[1.0, 5.0, 1.0])
    after = report.with_added(np.float32([[0, 5, 0], [2, 6, 0]]))
    assert (after.curve.tolist(), after.covered.tolist()) == ([0, 0, 1], [0, 1])
    (tmp_path / "printed.json").write_text(
        json.dumps(
            report.to_dict()
            | {"measurement": measurement(3) | dict.fromkeys(("activation", "pool_over", "side", "fingerprint"), "")}
        )
    )
    loaded = FACReport.load(tmp_path / "printed.json").with_added(np.float32([[2, 6, 0]]))
    assert loaded.fac == 1
    assert math.isnan(loaded.kl_divergence), "without the table nobody knows how many rows activate a feature"


def test_the_table_has_a_row_for_each_feature_of_the_anchor():
    rng = np.random.default_rng(0)
    data, anchor = random_rows(rng, density=0.05), random_rows(rng, n=50)
    report = quiet(cover(data), cover(anchor), threshold=GRID[24])
    expected = reference(data, anchor, GRID[24], range(40))
    table = report.to_pandas().set_index("feature")
    assert list(table) == ["covered", "anchor_max", "anchor_support", "data_max", "data_support", "delta"]
    assert sorted(table.index) == sorted(expected["covered"] + expected["missing"])
    for i, row in table.iterrows():
        assert row.covered == (i in expected["covered"])
        assert (row.anchor_max, row.data_max, row.delta) == (anchor[:, i].max(), data[:, i].max(), GRID[24])
        assert (row.anchor_support, row.data_support) == (expected["anchor_rows"][i], expected["own_rows"][i])


entries = st.dictionaries(st.integers(0, 7), st.sampled_from([*GRID[20:30], 0.1, 0.7, 3.0]), max_size=5)


@settings(max_examples=80, deadline=None)
@given(rows=st.lists(entries, min_size=1, max_size=12), data=st.data())
def test_parts_merge_in_any_order_and_grouping_to_the_same_bits(rows, data):
    dense = np.array([[row.get(i, 0) for i in range(8)] for row in rows], np.float32)
    part_of = np.array(data.draw(st.lists(st.integers(0, 4), min_size=len(rows), max_size=len(rows))))
    tokens = (dense > 0).any(axis=1).astype(int)
    parts = [cover(dense[part_of == k], tokens=tokens[part_of == k]) for k in range(5)]
    while len(parts) > 1:
        a = parts.pop(data.draw(st.integers(0, len(parts) - 1)))
        b = parts.pop(data.draw(st.integers(0, len(parts) - 1)))
        parts.append(a | b)
    at_once = cover(dense, tokens=tokens)
    assert parts[0] == at_once
    assert at_once | FeatureCoverage(at_once.measurement) == at_once == cover(dense[::-1], tokens=tokens[::-1])
    assert at_once.rows == len(rows)
    assert at_once.rows_without_tokens == rows.count({})


def test_a_change_of_one_bit_is_another_coverage():
    rows = random_rows(np.random.default_rng(0))
    changed = rows.copy()
    changed[0, 0] = np.nextafter(rows[:, 0].max(), np.float32(np.inf))
    assert cover(rows) != cover(changed)
    assert cover(rows) != cover(rows[:-1])
    assert cover(rows) != cover(rows, tokens=rows.any(axis=1))
    assert cover(rows) != "something else"


@pytest.mark.parametrize("seed", range(4))
def test_the_interval_is_the_delete_1_jackknife_over_rows(seed):
    rng = np.random.default_rng(seed)
    data, anchor = random_rows(rng, density=0.06), random_rows(rng, n=50)
    coverage = reduce(or_, [cover(part) for part in np.array_split(data, 4)])
    for delta in [0.0, 0.4, GRID[24]]:
        for features in [None, np.arange(5, 30)]:
            wanted = range(40) if features is None else features.tolist()
            left_out = np.array(
                [reference(np.delete(data, k, axis=0), anchor, delta, wanted)["fac"] for k in range(len(data))]
            )
            half = 1.96 * math.sqrt((len(data) - 1) / len(data) * np.sum((left_out - left_out.mean()) ** 2))
            report = quiet(coverage, cover(anchor), features=features, threshold=delta)
            assert half > 0
            assert report.confidence == 0.95
            assert report.interval == pytest.approx((max(0, report.fac - half), min(1, report.fac + half)))


def test_the_interval_holds_the_mean_fac_of_samples_of_the_same_size():
    rng = np.random.default_rng(0)
    n, d, topics = 60, 300, 30
    topic_of_feature, topic_of_row = rng.integers(0, topics, d), rng.integers(0, topics, 4000)
    chance = np.where(topic_of_row[:, None] == topic_of_feature, rng.uniform(0, 0.5, d), 0.003)
    pool = rng.exponential(1.0, chance.shape).astype(np.float32) * (rng.random(chance.shape) < chance)
    anchor, active = cover(pool[:1000]), pool[1000:, (pool[:1000] > 0.3).any(axis=0)] > 0.3
    draws = [rng.choice(3000, n, replace=False) for _ in range(600)]
    mean = np.mean([active[draw].any(axis=0).mean() for draw in draws])
    intervals = [quiet(cover(pool[1000:][draw]), anchor, threshold=0.3).interval for draw in draws[:400]]
    assert 0.2 < mean < 0.8
    assert np.mean([low <= mean <= high for low, high in intervals]) >= 0.93
    assert np.mean([high - low for low, high in intervals]) < 0.2


@pytest.mark.parametrize("seed", range(3))
def test_the_calibrated_delta_is_the_smallest_sparse_level_of_the_grid(seed):
    rng = np.random.default_rng(seed)
    anchor = random_rows(rng, n=41, d=1000, density=0.3) * (rng.random(1000) < 0.9).astype(np.float32)
    report = quiet(cover(anchor[:10]), cover(anchor))
    live = int((anchor > 0).any(axis=0).sum())
    medians = {delta: np.median((anchor > delta).sum(axis=1)) for delta in GRID}
    assert report.threshold == min(delta for delta in GRID[1:] if medians[delta] <= live // 100)
    assert medians[0] > live // 100
    for words in ("calibrated on the anchor", f"{live // 100}", f"{live}", "41 rows", f"{report.threshold:.4g}"):
        assert words in report.threshold_source
    assert report.support_exact


def test_a_calibrated_delta_is_above_the_floor_and_lets_a_row_activate_one_feature():
    anchor = cover(np.eye(5, dtype=np.float32))
    report = quiet(anchor, anchor)
    assert report.threshold == GRID[1]
    assert "at most 1 % (1) of its 5 live features; it activates 1" in report.threshold_source


def test_calibration_counts_thousands_of_active_features_to_within_half_a_percent():
    for active in (511, 512, 700, 3000, 5000):
        row = np.zeros((3, 5000), np.float32)
        row[:2, :active] = 1.0
        report = quiet(cover(row), cover(row), threshold=0.5)
        assert active <= report.active_share * 5000 <= 1.004 * active


def test_an_anchor_that_is_never_sparse_must_be_given_a_threshold():
    rows = np.full((3, 200), 5000, np.float32)
    with pytest.raises(ValueError, match=r"even at the highest level .* more than 1 %.*threshold= or relative="):
        cover(rows).compare(cover(rows))


def test_a_scored_data_set_is_read_as_its_activations():
    rng = np.random.default_rng(1)
    rows = np.vstack([random_rows(rng), random_rows(rng, n=600), random_rows(rng, n=5)])
    tokens = 5 * rows.any(axis=1)
    expected = cover(rows, tokens=tokens)
    ds = scored(rows, shuffle=rng)
    assert FeatureCoverage.from_dataset(ds) == expected
    assert FeatureCoverage.from_dataset(ds.shuffle(seed=0)) == expected
    assert FeatureCoverage.from_dataset(ds.to_iterable_dataset(num_shards=3)) == expected
    assert FeatureCoverage.from_dataset(ds, measurement=measurement(40)) == expected

    def typed(row):
        return {"fac_features": np.int32(row["fac_features"]), "fac_activations": np.float32(row["fac_activations"])}

    assert FeatureCoverage.from_dataset(ds.to_iterable_dataset().map(typed)) == expected
    parts = [FeatureCoverage.from_dataset(ds.shard(7, k)) for k in (3, 0, 6, 2, 5, 1, 4)]
    assert reduce(or_, parts) == expected
    assert (expected.rows, expected.rows_without_tokens) == (len(rows), int((tokens == 0).sum()))


def test_rows_without_tokens_count_as_rows_and_are_reported():
    rows = random_rows(np.random.default_rng(0))
    report = quiet(FeatureCoverage.from_dataset(scored(rows)), cover(rows), threshold=1.0)
    assert (report.rows, report.rows_without_tokens) == (30, 2)
    assert (report.anchor_rows, report.anchor_rows_without_tokens) == (30, 0)
    assert "2 without tokens" in str(report)


def test_an_empty_data_set_needs_the_measurement():
    empty = scored(random_rows(np.random.default_rng(0))).select([])
    with pytest.raises(ValueError, match="pass measurement="):
        FeatureCoverage.from_dataset(empty)
    coverage = FeatureCoverage.from_dataset(empty, measurement=measurement(40))
    assert coverage == FeatureCoverage(measurement(40))
    report = coverage.compare(cover(random_rows(np.random.default_rng(0))), threshold=1.0)
    assert report.fac == 0
    assert np.isnan(report.interval).all()


def test_an_empty_anchor_gives_nan_and_a_warning():
    data = cover(random_rows(np.random.default_rng(0)))
    for anchor, options in [(FeatureCoverage(measurement(40)), {}), (data, {"threshold": 5000.0})]:
        with pytest.warns(UserWarning, match="FAC is NaN"):
            report = data.compare(anchor, **options)
        assert math.isnan(report.fac)
        assert np.isnan(report.interval).all()
        assert len(report.missing) == len(report.covered) == len(report.to_pandas()) == 0
        assert report.to_dict()["fac"] is None
        assert "FAC nan" in str(report)


def test_a_fac_that_says_nothing_is_warned_of():
    rng = np.random.default_rng(0)
    rows = random_rows(rng, d=200, density=0.05)
    with pytest.warns(UserWarning, match="too near 1"):
        cover(rows).compare(cover(rows), threshold=0.1)
    dense = random_rows(rng, d=200, density=0.5)
    with pytest.warns(UserWarning, match="median anchor row activates 4.%"):
        cover(rows).compare(cover(dense), threshold=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cover(rows[:10]).compare(cover(rows), threshold=0.1).fac < 0.98


def test_a_saved_coverage_is_read_back_exactly(tmp_path):
    coverage = cover(random_rows(np.random.default_rng(0)))
    cover(random_rows(np.random.default_rng(1))).save(str(tmp_path / "a.safetensors"))
    coverage.save(tmp_path / "a.safetensors")
    loaded = FeatureCoverage.load(tmp_path / "a.safetensors")
    assert loaded == coverage
    assert loaded | coverage == coverage | coverage


def test_a_saved_coverage_takes_no_space_for_what_no_row_activates(tmp_path):
    rng = np.random.default_rng(0)
    coverage = FeatureCoverage(measurement(10_000)) | cover(random_rows(rng, n=50, d=10_000, density=0.01))
    coverage.save(tmp_path / "coverage.safetensors")
    assert FeatureCoverage.load(tmp_path / "coverage.safetensors") == coverage
    assert (tmp_path / "coverage.safetensors").stat().st_size < 0.05 * coverage.group_counts.nbytes


def test_loading_refuses_other_files_and_versions(tmp_path, monkeypatch):
    from safetensors.numpy import save_file

    (tmp_path / "text").write_text("not a coverage at all")
    save_file({"weight": np.zeros(3)}, tmp_path / "weights")
    with monkeypatch.context() as patch:
        patch.setattr("hf_fac.coverage.coverage.VERSION", "0")
        cover(random_rows(np.random.default_rng(0))).save(tmp_path / "old")
    for name, words in [("text", "not a whole safetensors"), ("weights", "found None"), ("old", "found 0")]:
        with pytest.raises(ValueError, match=f"{name}.*{words}"):
            FeatureCoverage.load(tmp_path / name)


def test_a_report_is_written_as_json_and_read_as_text():
    rng = np.random.default_rng(0)
    data, anchor = cover(random_rows(rng, density=0.05)), cover(random_rows(rng, n=50))
    report = quiet(data, anchor, features=np.arange(30), threshold=1.0)
    written = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert written["fac"] == report.fac
    assert written["missing"] == report.missing.tolist()
    assert written["features"] == list(range(30))
    assert written["measurement"] == measurement(40)
    assert written["hf_fac"]
    assert "table" not in written
    text = str(report)
    first, support = report.missing[0], report.missing_support[0]
    for words in (f"FAC {report.fac:.3f}", "95%", "1, as given", f"feature {first}, {support} anchor rows", "nats"):
        assert words in text
    assert "at least" in str(quiet(data, anchor, threshold=1.1))
    json.dumps(quiet(data, anchor, relative=0.5).to_dict(), allow_nan=False)


def test_parts_measured_differently_name_what_differs():
    rows = random_rows(np.random.default_rng(0))
    one, other = (
        FeatureCoverage.from_activations(csr_array(rows), measurement=measurement(40, **extra))
        for extra in ({"layer": 15, "pool_over": "all"}, {"layer": 16})
    )
    for action in (one.__or__, one.compare):
        with pytest.raises(ValueError, match=r"layer: 15 and 16; pool_over: 'all' and 'absent'\): .*same FACScorer"):
            action(other)
    mixed = datasets.concatenate_datasets([scored(rows, layer=15), scored(rows, layer=16)])
    for ds in (mixed, datasets.concatenate_datasets([scored(np.vstack([rows] * 20), layer=15), mixed])):
        with pytest.raises(ValueError, match=r"measured differently.*layer: 15 and 16"):
            FeatureCoverage.from_dataset(ds)
    with pytest.raises(ValueError, match=r"measured differently.*layer: 3 and 15"):
        FeatureCoverage.from_dataset(scored(rows, layer=15), measurement=measurement(40, layer=3))


@pytest.mark.parametrize(
    ("value", "keep_above", "problem"),
    [
        (math.nan, 0.0, "row 300: feature 5 at nan is not finite"),
        (math.inf, 0.0, "row 300: feature 5 at inf is not finite"),
        (-1.0, 0.0, "row 300: feature 5 at -1 is not above the floor keep_above = 0"),
        (0.5, 0.5, "row 300: feature 5 at 0.5 is not above the floor keep_above = 0.5"),
    ],
)
def test_bad_activations_name_row_and_remedy(value, keep_above, problem):
    rows = np.full((400, 8), 1.0, np.float32)
    rows[300, 5] = value
    with pytest.raises(ValueError, match=problem + r".*: score the rows with"):
        cover(rows, keep_above)
    with pytest.raises(ValueError, match=problem + r".*: score the rows with"):
        FeatureCoverage.from_dataset(scored(rows, keep_above=keep_above))


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"fac_features": [1, 40]}, "row 30: feature 40 at 2 is not in .0, 40., the width"),
        ({"fac_features": [-1, 2]}, "row 30: feature -1 at 1 is not in"),
        ({"fac_features": [3, 3]}, "row 30: feature 3 at 1 stands twice"),
        ({"fac_tokens": 0}, "row 30: feature 1 at 1 is in a row without content tokens"),
        ({"fac_features": [1]}, "row 30 has 1 features but 2 activations"),
        ({"fac_features": None}, "row 30 holds a null in fac_features"),
        ({"fac_features": [1, None]}, "row 30 holds a null in fac_features"),
        ({"fac_tokens": None}, "row 30 holds a null in fac_tokens"),
        ({"fac_measurement": None}, "row 30 holds a null in fac_measurement"),
    ],
)
def test_bad_rows_of_a_data_set_name_row_and_remedy(row, problem):
    ds = scored(random_rows(np.random.default_rng(0)))
    good = ds[0] | {"fac_features": [1, 2], "fac_activations": [1.0, 2.0], "fac_tokens": 4}
    bad = datasets.Dataset.from_list([good | row], features=ds.features)
    with pytest.raises(ValueError, match=problem + r".*: score the rows with"):
        FeatureCoverage.from_dataset(datasets.concatenate_datasets([ds, bad]))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("junk", "Invalid JSON"),
        ("3", "Input should be an object"),
        ("null", "Input should be an object"),
        ("[" * 10**5, "Invalid JSON: recursion limit"),
        (json.dumps({"d_sae": 10**12, "keep_above": 0.0}), "d_sae: Input should be less than or equal to 16777216"),
        (json.dumps({"d_sae": "8", "keep_above": 0.0}), "d_sae: Input should be a valid integer, got '8'"),
    ],
)
def test_a_malformed_measurement_names_row_field_and_remedy(text, problem):
    ds = scored(np.ones((3, 8), np.float32)).remove_columns("fac_measurement").add_column("fac_measurement", [text] * 3)
    with pytest.raises(ValueError, match=r"row 0 and after: fac_measurement: .*score the rows with") as found:
        FeatureCoverage.from_dataset(ds)
    assert problem in str(found.value)


def test_a_list_is_refused_as_a_data_set():
    with pytest.raises(TypeError, match=r"got a list: pass a data set .*score the rows with"):
        FeatureCoverage.from_dataset([{"text": "a"}])


def test_another_name_of_the_same_model_is_accepted_and_another_fingerprint_named():
    rows = np.ones((3, 8), np.float32)
    one, other = (cover_as(rows, model=name, fingerprint="f") for name in ("/models/a", "user/a"))
    assert one | other == other | one
    assert quiet(one, other, threshold=0.5).fac == 1.0
    spelled = [cover_as(rows, model=name) for name in ("folder/../model", "./model")]
    assert (spelled[0] | spelled[1]).rows == 6
    trained = cover_as(rows, model="user/a", fingerprint="g")
    with pytest.raises(ValueError, match=r"\(fingerprint: 'f' and 'g': max_length, .* or the SAE differ\)"):
        other | trained


def cover_as(rows, **how):
    return FeatureCoverage.from_activations(csr_array(rows), measurement=measurement(rows.shape[1], **how))


def test_a_saved_coverage_with_other_contents_is_refused(tmp_path):
    from safetensors.numpy import load_file, save_file

    path = tmp_path / "coverage.safetensors"
    cover(np.ones((3, 8), np.float32)).save(path)
    arrays = load_file(path)
    good = {
        "hf_fac.coverage": "3",
        "measurement": json.dumps(measurement(8)),
        "rows": "3",
        "rows_without_tokens": "0",
        "tokens": "12",
    }
    for metadata, tensors, problem in (
        (good | {"measurement": "3"}, arrays, "measurement: "),
        (good | {"rows": "many"}, arrays, "rows: Invalid JSON"),
        ({"hf_fac.coverage": "3"}, arrays, "measurement: Field required"),
        (good, {"grid": arrays["grid"]}, "maximum is absent, or of another shape"),
        (good | {"measurement": json.dumps(measurement(9))}, arrays, "maximum is absent, or of another shape"),
        (good, arrays | {"grid": arrays["grid"] + 1}, "grid has other levels"),
        (good, arrays | {"cells": arrays["cells"] + np.uint32(10**9)}, "group_counts is absent, or of another shape"),
        (good, arrays | {"counts": arrays["counts"][1:]}, "group_counts is absent, or of another shape"),
    ):
        save_file(tensors, path, metadata)
        with pytest.raises(ValueError, match=rf"coverage\.safetensors: {problem}.*; save the coverage again"):
            FeatureCoverage.load(path)


def test_a_data_set_that_was_not_scored_names_the_column_and_the_remedy():
    ds = scored(random_rows(np.random.default_rng(0)))
    with pytest.raises(ValueError, match=r"fac_tokens.*score the rows with ds\.map\(FACScorer"):
        FeatureCoverage.from_dataset(ds.remove_columns("fac_tokens"))
    with pytest.raises(TypeError, match="DatasetDict: pass one split, one of train, test"):
        FeatureCoverage.from_dataset(datasets.DatasetDict(train=ds, test=ds))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"threshold": -1.0}, r"none negative; got -1"),
        ({"threshold": math.nan}, "got nan"),
        ({"threshold": math.inf}, "got inf"),
        ({"threshold": [1.0] * 7}, r"one finite number or 8 of them"),
        ({"threshold": [1.0] * 7 + [0.1]}, r"threshold 0\.1 is below the floor"),
        ({"threshold": 0.1}, r"below the floor keep_above = 0\.25: score the rows again with a lower keep_above"),
        ({"threshold": 1.0, "relative": 0.5}, "not both"),
        ({"threshold": "high"}, "one finite number or 8 of them"),
        ({"threshold": [[1.0], [1.0, 2.0]]}, "one finite number or 8 of them"),
        ({"relative": "a"}, "a number between 0 and 1, got 'a'"),
        ({"relative": 0.0}, "a number between 0 and 1"),
        ({"relative": 1.0}, "a number between 0 and 1"),
        ({"relative": math.nan}, "a number between 0 and 1"),
        ({"features": []}, "at least one"),
        ({"features": [1.5]}, "whole numbers"),
        ({"features": [True, False]}, "whole numbers"),
        ({"features": [[1, 2]]}, "whole numbers"),
        ({"features": [1, 8]}, "feature 8, which does not exist: the SAE has features 0 to 7"),
        ({"features": [-1]}, "feature -1, which does not exist"),
    ],
)
def test_bad_options_are_refused(options, problem):
    coverage = cover(np.full((3, 8), 1.0, np.float32), 0.25)
    with pytest.raises(ValueError, match=problem):
        coverage.compare(coverage, **options)


def test_bad_measurements_shapes_and_anchors_are_refused():
    for bad in (
        {},
        measurement(0),
        measurement(8, -0.1),
        measurement(8, math.nan),
        measurement(8.0),
        measurement(10**12),
    ):
        with pytest.raises(ValueError, match=r"the measurement: (d_sae|keep_above): .*score the rows with"):
            FeatureCoverage(bad)
    rows = np.ones((3, 8), np.float32)
    with pytest.raises(ValueError, match=r"shape \(3, 8\).*\(3, 9\)"):
        FeatureCoverage.from_activations(csr_array(rows), measurement=measurement(9))
    with pytest.raises(ValueError, match=r"shape \(3, 8\).*\(2, 8\)"):
        cover(rows, tokens=[1, 2])
    with pytest.raises(TypeError, match="anchor is a Dataset: pass FeatureCoverage"):
        cover(rows).compare(scored(rows))


def test_a_floor_between_two_levels_is_a_level_of_its_own():
    rows = np.float32([[0.3, 1.1], [0.5, 0.0], [2.0, 0.0]])
    coverage = cover(rows, 0.2501)
    assert coverage.grid[0] == 0.2501
    assert coverage.grid[1:].tolist() == [level for level in GRID if level > 0.2501]
    report = quiet(coverage, FeatureCoverage(coverage.measurement) | coverage, threshold=0.2501)
    assert report.to_pandas().anchor_support.tolist() == [3, 1]


def test_importing_coverage_loads_nothing_heavy():
    heavy = "{'datasets', 'scipy', 'pandas', 'pyarrow', 'safetensors', 'torch', 'transformers'}"
    code = f"import sys, hf_fac.coverage; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
