"""FAC over data-set size and delta, saturation and weights: against enumeration, recomputation and simulation."""

import json
import math
from itertools import combinations

import numpy as np
import pytest
from coverages import GRID, cover, quiet, random_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t

from hf_fac.coverage.rarefaction import expected_covered, expected_gain, unseen
from hf_fac.coverage.report import FACReport

DELTA = GRID[24]


def report_of(seed, *, n=30, threshold=DELTA, **options):
    rng = np.random.default_rng(seed)
    data, anchor = random_rows(rng, n=n, density=0.06), random_rows(rng, n=50)
    return data, anchor, quiet(cover(data), cover(anchor), threshold=threshold, **options)


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=8))
def test_the_expected_coverage_of_a_size_is_the_mean_over_all_subsets(rows):
    rows = np.array(rows)
    sizes = np.arange(len(rows) + 1)
    expected = [
        np.mean([rows[list(chosen)].any(axis=0).sum() for chosen in combinations(range(len(rows)), k)]) for k in sizes
    ]
    assert expected_covered(rows.sum(axis=0), len(rows), sizes) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("features", [None, np.arange(5, 30)])
def test_rarefaction_is_the_mean_fac_of_subsets_and_ends_at_the_reports_own_figures(features):
    data, anchor, report = report_of(0, features=features)
    curve = report.rarefaction([0, 1, 2, 30])
    wanted = np.arange(40) if features is None else features
    active = (data > DELTA)[:, wanted[(anchor > DELTA).any(axis=0)[wanted]]]
    pairs = np.mean([(one | other).mean() for one, other in combinations(active, 2)])
    assert curve["fac"].tolist() == pytest.approx([0, active.mean(), pairs, report.fac])
    assert curve[["low", "high"]].to_numpy()[-1] == pytest.approx(report.interval)
    assert (curve["low"] <= curve["fac"]).all()
    assert (curve["fac"] <= curve["high"]).all()
    assert not curve["extrapolated"].any()


def test_rarefaction_goes_on_beyond_the_rows_and_is_the_same_for_merged_parts():
    data, anchor, report = report_of(1)
    curve = report.rarefaction()
    assert curve["rows"].tolist() == list(range(3, 61, 3))
    assert curve["fac"].is_monotonic_increasing
    assert curve["extrapolated"].tolist() == (curve["rows"] > 30).tolist() == curve["low"].isna().tolist()
    assert report.rarefaction([36])["fac"][0] == pytest.approx(
        (len(report.covered) + report.expected_gain(6)) / (len(report.covered) + len(report.missing))
    )
    parts = quiet(cover(data[20:]) | cover(data[:20]), cover(anchor), threshold=DELTA)
    assert parts.rarefaction().equals(curve)


def test_off_the_grid_the_expected_fac_of_fewer_rows_is_a_lower_bound():
    rng = np.random.default_rng(2)
    data, anchor = random_rows(rng, density=0.4), random_rows(rng, n=50)
    report = quiet(cover(data), cover(anchor), threshold=1.75)
    active = (data > 1.75)[:, (anchor > 1.75).any(axis=0)]
    exact = expected_covered(active.sum(axis=0), 30, np.arange(31)) / active.shape[1]
    curve = report.rarefaction(np.arange(31))["fac"].to_numpy()
    assert not report.support_exact
    assert (curve <= exact + 1e-12).all()
    assert curve[-1] == pytest.approx(exact[-1])
    assert (curve < exact - 1e-6).any()


def test_a_million_rows_are_rarefied_to_six_digits():
    n, k = 1_000_000, 250_000
    support = np.array([0, 1, 2, 5, n - k, n])
    expected = 1 - np.array([np.prod((n - k - np.arange(m)) / (n - np.arange(m))) for m in (0, 1, 2, 5)])
    for m, value in zip(support[:4], expected, strict=True):
        assert expected_covered(np.array([m]), n, np.array([k]))[0] == pytest.approx(value, abs=1e-6)
    assert expected_covered(support[4:], n, np.array([k]))[0] == pytest.approx(2)


def draws_of(rates, n, rng, repeats=200):
    """Supports of `repeats` data sets of n rows, in which features are independent: int [repeats, n_features]."""
    return rng.binomial(n, rates, (repeats, len(rates)))


@pytest.mark.parametrize(("spread", "low", "high"), [(0.0, 0.97, 1.03), (1.0, 0.6, 0.95)])
def test_unseen_features_are_estimated_where_rates_are_equal_and_bounded_from_below_where_they_differ(
    spread, low, high
):
    rng = np.random.default_rng(0)
    rates = np.exp(rng.normal(-4.0, spread, 2000))
    supports = draws_of(rates, 60, rng)
    never = [0] * 2000  # features of the anchor that this source cannot activate
    found = [unseen(np.append(support, never), 60) for support in supports]
    ratio = np.mean(found) / np.mean((supports == 0).sum(axis=1))
    assert low < ratio < high


def test_unseen_features_are_at_most_the_missing_ones_and_none_without_rows():
    assert unseen(np.array([1] * 20 + [0] * 3), 10) == 3
    assert unseen(np.array([1] * 20), 10) == 0
    assert unseen(np.array([0, 0]), 0) == 0
    assert unseen(np.array([1, 1, 1, 2, 0, 0, 0]), 10) == pytest.approx(0.9 * 3 * 2 / (2 * 2))


@pytest.mark.parametrize("further", [15, 60])
def test_the_expected_gain_is_what_further_rows_bring(further):
    rng = np.random.default_rng(1)
    rates = np.exp(rng.normal(-4.0, 0.7, 2000))
    first, more = draws_of(rates, 60, rng), draws_of(rates, further, rng)
    gained = np.mean(((first == 0) & (more > 0)).sum(axis=1))
    expected = np.mean([expected_gain(support, 60, further) for support in first])
    assert expected == pytest.approx(gained, rel=0.1)


def test_gain_rises_from_none_to_the_unseen_and_gives_saturation():
    _, _, report = report_of(3)
    gains = [report.expected_gain(g) for g in (0, 1, 10, 100, 10**9, math.inf)]
    assert gains == sorted(gains)
    assert gains[0] == 0
    assert gains[-1] == gains[-2] == pytest.approx(unseen(report.to_pandas()["data_support"].to_numpy(), 30))
    assert report.saturation == pytest.approx(len(report.covered) / (len(report.covered) + gains[-1]))
    assert 0 < report.saturation < 1
    assert f"{report.saturation:.0%} of the way to saturation" in str(report)


def test_a_source_that_is_exhausted_is_saturated_and_an_empty_one_is_undefined():
    anchor = cover(np.eye(4, dtype=np.float32))
    report = quiet(cover(np.float32([[1, 1, 0, 0]] * 9)), anchor, threshold=0.5)
    assert (report.fac, report.saturation, report.expected_gain(math.inf)) == (0.5, 1.0, 0.0)
    assert report.single_interval == report.interval == (0.5, 0.5)
    empty = quiet(cover(np.zeros((0, 4), np.float32)), anchor, threshold=0.5)
    assert math.isnan(empty.saturation)
    assert empty.rarefaction([0, 5])["fac"].tolist() == [0, 0]
    nothing = quiet(anchor, cover(np.zeros((2, 4), np.float32)), threshold=0.5)
    assert nothing.rarefaction([1])["fac"].isna().all()
    assert len(nothing.fac_over_threshold()) == 0


def test_the_single_interval_is_as_it_is_defined():
    rng = np.random.default_rng(3)
    data, anchor = random_rows(rng, n=30, density=0.05), random_rows(rng, n=50)
    report = quiet(cover(data), cover(anchor), threshold=0.5)
    active = data[:, (anchor > 0.5).any(axis=0)] > 0.5
    support = active.sum(axis=0)
    u = active[:, support == 1].sum(axis=1)
    s = math.sqrt(29 / 30 * (np.sum(u**2) - np.sum(u) ** 2 / 30)) / len(support)
    r = 2 * np.sum(support == 2) / np.sum(support == 1)
    quantile = t.ppf(0.975, 2 * np.sum(u**2) ** 2 / np.sum(u**4))
    half = quantile * math.sqrt(2) * s * ((1 - math.exp(-r)) / r) ** 0.25
    assert 0 < report.fac - half < report.fac + half < 1
    assert report.single_interval == pytest.approx((report.fac - half, report.fac + half))


@pytest.mark.parametrize("n", [25, 100])
def test_the_single_interval_holds_fac_of_another_data_set_of_this_kind_and_size(n):
    rng = np.random.default_rng(n)
    blocks, within = np.exp(rng.normal(-3.5, 1.2, 60)).clip(0, 0.5), 0.7  # rows activate several rare features at once
    active = np.repeat(rng.random((4000, 60)) < blocks, 6, axis=1) & (rng.random((4000, 360)) < within)
    rows = active.astype(np.float32)
    anchor, pool = cover(rows[:1000]), rows[1000:]
    draws = [pool[rng.choice(3000, n, replace=False)] for _ in range(240)]
    in_anchor = rows[:1000].any(axis=0)
    facs = np.array([draw.any(axis=0)[in_anchor].mean() for draw in draws])
    reports = [quiet(cover(draw), anchor, threshold=0.5) for draw in draws[:80]]
    low, high = np.array([report.single_interval for report in reports]).T
    inside = np.mean((low[:, None] <= facs) & (facs <= high[:, None]))
    of_mean = np.mean([report.interval[0] <= other <= report.interval[1] for report in reports for other in facs])
    assert 0.92 <= inside <= 0.98
    assert of_mean < inside - 0.02, "the interval of the mean is not one of a single data set"


def test_fac_over_threshold_is_what_comparing_at_each_level_gives():
    for features in (None, np.arange(5, 30)):
        data, anchor, report = report_of(4, features=features)
        table = report.fac_over_threshold()
        assert list(table) == ["threshold", "fac", "low", "high", "anchor_features", "covered"]
        live = anchor if features is None else anchor[:, features]
        assert table["threshold"].tolist() == [level for level in GRID if level < live.max()]
        for row in table.itertuples():
            there = quiet(cover(data), cover(anchor), threshold=row.threshold, features=features)
            assert row.fac == there.fac
            assert (row.low, row.high) == pytest.approx(there.interval)
            assert (row.covered, row.anchor_features) == (len(there.covered), len(there.covered) + len(there.missing))


def test_weighted_fac_is_the_covered_share_of_the_weight():
    _, _, report = report_of(5)
    table = report.to_pandas()
    for column in ("anchor_support", "anchor_max"):
        expected = table[column][table["covered"]].sum() / table[column].sum()
        assert report.weighted_fac(column) == pytest.approx(expected)
    assert report.weighted_fac() == report.weighted_fac("anchor_support") != report.fac
    assert report.weighted_fac(np.ones(40)) == pytest.approx(report.fac)
    covered, missing = int(report.covered[0]), int(report.missing[0])
    by_feature = {covered: 1.0, missing: 3.0}
    assert report.weighted_fac(by_feature) == 0.25
    assert report.weighted_fac(table.set_index("feature")["anchor_max"]) == report.weighted_fac("anchor_max")
    assert math.isnan(report.weighted_fac({}))


def test_arguments_that_mean_nothing_are_refused():
    _, _, report = report_of(6)
    for sizes in ([-1], [0.5], 3, [[1]]):
        with pytest.raises(ValueError, match="sizes must be a list of numbers of rows"):
            report.rarefaction(sizes)
    for rows in (-1, math.nan):
        with pytest.raises(ValueError, match=r"rows is .*; it must be 0 or more"):
            report.expected_gain(rows)
    for weights, problem in (
        (dict.fromkeys(range(40), math.nan), "finite and not negative"),
        (np.full(40, -1.0), "finite and not negative"),
        (np.ones(7), r"weights has shape \(7,\); expected \(40,\)"),
        ("fac", "weights is 'fac'; expected anchor_support or anchor_max"),
    ):
        with pytest.raises(ValueError, match=problem):
            report.weighted_fac(weights)


def test_a_report_of_an_earlier_release_is_read_and_says_what_it_lacks(tmp_path):
    of = {"activation": "native", "pool_over": "all", "side": "chosen", "fingerprint": "f"}
    _, _, report = report_of(7)
    report.measurement.update(of)
    report.save(tmp_path / "report.json")
    saved = json.loads((tmp_path / "report.json").read_text())
    loaded = FACReport.load(tmp_path / "report.json")
    assert loaded.rarefaction().equals(report.rarefaction())
    assert loaded.fac_over_threshold().equals(report.fac_over_threshold())
    for name in ("single_interval", "standard_error", "saturation", "over_threshold"):
        del saved[name]
    (tmp_path / "old.json").write_text(json.dumps(saved))
    old = FACReport.load(tmp_path / "old.json")
    assert (old.fac, old.interval) == (report.fac, report.interval)
    assert "saturation" not in str(old)
    assert old.expected_gain(5) == report.expected_gain(5)
    with pytest.raises(ValueError, match="read without its tables"):
        old.fac_over_threshold()
    del saved["table"]
    (tmp_path / "old.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="read without its tables: load what its `save` wrote"):
        FACReport.load(tmp_path / "old.json").rarefaction()


def test_a_notebook_shows_the_report_escaped():
    _, _, report = report_of(8)
    object.__setattr__(report, "threshold_source", "<script>alert(1)</script>")
    html = report._repr_html_()
    assert f"<b>FAC {report.fac:.3f}" in html
    assert "&lt;script&gt;" in html
    assert "<script>" not in html
    assert f"<td>{report.missing[0]}</td>" in html
