"""The match of activation frequencies against slow references written from the definitions, and what its intervals
cover."""

import json
import math
import warnings
from functools import reduce
from operator import or_

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array
from scipy.spatial.distance import jensenshannon
from scipy.stats import fisher_exact
from scipy.stats import t as student_t

from hf_fac.coverage.coverage import FeatureCoverage
from hf_fac.coverage.frequency import Frequencies, deficits, frequency_cosine, frequency_match, jensen_shannon
from hf_fac.coverage.report import FACReport
from hf_fac.coverage.statistics import kl_divergence

WHOLE = {"model": "tiny", "layer": 1, "activation": "native", "pool_over": "all", "side": "chosen", "fingerprint": "f"}


def cover(rows, **kwargs):
    measurement = WHOLE | {"d_sae": rows.shape[1], "keep_above": 0.0}
    return FeatureCoverage.from_activations(csr_array(np.float32(rows)), measurement=measurement, **kwargs)


def compare(data, anchor, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return data.compare(anchor, **kwargs)


def random_rows(rng, n, d=40):
    return rng.exponential(1.0, (n, d)) * (rng.random((n, d)) < rng.random(d) ** 3)


def shares(rows, delta):
    return [sum(row[i] > delta for row in rows.tolist()) / len(rows) for i in range(rows.shape[1])]


def slow_cosine(rows, anchor, delta, features):
    p, q = shares(rows, delta), shares(anchor, delta)
    weighted = sum(q[i] * p[i] * q[i] for i in features)
    norms = [math.sqrt(sum(q[i] * x[i] ** 2 for i in features)) for x in (p, q)]
    return weighted / (norms[0] * norms[1])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("features", [None, [1, 4, 7, 8, 20, 39]])
def test_the_measures_follow_their_definitions(seed, features):
    rng = np.random.default_rng(seed)
    data, anchor = random_rows(rng, 30), random_rows(rng, 50)
    report = compare(cover(data), cover(anchor), threshold=0.5, features=features)
    wanted = range(40) if features is None else features
    assert report.frequency_cosine == pytest.approx(slow_cosine(data, anchor, 0.5, wanted))
    p, q = (np.array(shares(rows, 0.5))[list(wanted)] for rows in (data, anchor))
    assert report.jensen_shannon == pytest.approx(jensenshannon(p, q) ** 2)
    assert report.active_features == sum(p > 0)


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=30),
    st.integers(1, 9),
    st.integers(1, 9),
)
def test_rates_in_proportion_match_and_sets_without_a_common_feature_do_not(pairs, a, b):
    data, anchor = np.array(pairs).T
    if anchor.any():
        assert frequency_cosine(a * anchor, b * anchor) == pytest.approx(1)
        assert jensen_shannon(a * anchor, b * anchor) == pytest.approx(0, abs=1e-12)
        assert -1e-12 <= frequency_cosine(data, anchor) <= 1 + 1e-12
        assert frequency_cosine(data * (anchor == 0), anchor) == 0
    if data.any() and anchor.any():
        assert 0 <= jensen_shannon(data, anchor) <= math.log(2) + 1e-12
        apart = np.concatenate([data, 0 * data]), np.concatenate([0 * anchor, anchor])
        assert jensen_shannon(*apart) == pytest.approx(math.log(2))


def test_nothing_active_is_no_match():
    none, some = np.zeros(3, np.int64), np.array([1, 2, 0])
    assert math.isnan(frequency_cosine(some, none))
    assert frequency_cosine(none, some) == 0
    assert math.isnan(jensen_shannon(none, some))
    assert math.isnan(jensen_shannon(some, none))
    empty = compare(cover(np.zeros((0, 3))), cover(np.eye(3)), threshold=0.5)
    assert np.isnan([*empty.frequency_cosine_interval, *empty.jensen_shannon_interval, *empty.kl_interval]).all()
    assert "?" in str(empty)


def slow_interval(measure, data, anchor):
    """Delete-a-group jackknife of lists of groups of rows, by the pseudo-values of Busing et al."""
    center = measure(np.vstack(data), np.vstack(anchor))
    variances, freedom = [], []
    for side in (0, 1):
        groups = (data, anchor)[side]
        n, used = sum(map(len, groups)), [k for k, group in enumerate(groups) if len(group)]
        left_out = {}
        for k in used:
            rest = np.vstack([group for j, group in enumerate(groups) if j != k])
            left_out[k] = measure(np.vstack(data), rest) if side else measure(rest, np.vstack(anchor))
        h = {k: n / len(groups[k]) for k in used}
        estimate = len(used) * center - sum((1 - len(groups[k]) / n) * left_out[k] for k in used)
        pseudo = {k: h[k] * center - (h[k] - 1) * left_out[k] for k in used}
        variances.append(sum((pseudo[k] - estimate) ** 2 / (h[k] - 1) for k in used) / len(used))
        freedom.append(len(used) - 1)
    total = sum(variances)
    degrees = total**2 / sum(v**2 / f for v, f in zip(variances, freedom, strict=True))
    half = student_t.ppf(0.975, degrees) * math.sqrt(total)
    return center - half, center + half


@pytest.mark.parametrize("seed", range(3))
def test_intervals_are_the_delete_a_group_jackknife_over_both_sets(seed):
    rng = np.random.default_rng(seed)
    sides = []
    for n in (60, 90):
        rows = (rng.random((n, 30)) < rng.random(30)).astype(np.int64)
        rows[:, 0] = 1  # no row is empty
        sides.append([rows[rng.permutation(n)[: rng.integers(2, 9)]] for _ in range(7)] + [rows[:0]])
    data, anchor = (
        Frequencies(
            np.vstack(groups).sum(axis=0), np.array([g.sum(axis=0) for g in groups]), np.array([len(g) for g in groups])
        )
        for groups in sides
    )
    found = frequency_match(data, anchor)
    for measure, interval in (
        (lambda a, b: frequency_cosine(a.sum(0), b.sum(0)), found.frequency_cosine_interval),
        (lambda a, b: jensen_shannon(a.sum(0), b.sum(0)), found.jensen_shannon_interval),
        (lambda a, b: kl_divergence(b.sum(0), a.sum(0)), found.kl_interval),
    ):
        low, high = slow_interval(measure, *sides)
        assert interval == pytest.approx((max(0, low), high))


def test_intervals_hold_the_mean_over_data_and_anchor_sets_of_the_same_size():
    rng = np.random.default_rng(0)
    topic, rate = rng.integers(0, 12, 200), rng.beta(0.4, 3, 200)

    def coverage(n, topics):
        chosen = rng.integers(0, topics, n)[:, None]
        chance = np.where(chosen == topic, np.minimum(1, 4 * rate), 0.3 * rate) * rng.uniform(0.3, 1, (n, 1))
        return cover((rng.random((n, 200)) < chance) * rng.uniform(1, 2, (n, 200)))

    reports = [compare(coverage(60, 4), coverage(150, 12), threshold=0.5) for _ in range(150)]
    for name, interval in (
        ("frequency_cosine", "frequency_cosine_interval"),
        ("jensen_shannon", "jensen_shannon_interval"),
        ("kl_divergence", "kl_interval"),
    ):
        mean = np.mean([getattr(report, name) for report in reports])
        covers = [low <= mean <= high for low, high in (getattr(report, interval) for report in reports)]
        assert np.mean(covers) >= 0.91, name


def test_equal_rows_are_in_one_group_and_repeating_them_does_not_narrow_an_interval():
    rng = np.random.default_rng(0)
    rows, anchor = random_rows(rng, 40), cover(random_rows(rng, 100))
    once, often = cover(rows), cover(np.repeat(rows, 20, axis=0))
    assert often.group_rows.tolist() == (20 * once.group_rows).tolist()
    assert (often.group_counts == 20 * once.group_counts).all()
    one, other = (compare(each, anchor, threshold=0.5) for each in (once, often))
    assert one.frequency_cosine_interval == pytest.approx(other.frequency_cosine_interval)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=20), st.randoms(use_true_random=False))
def test_groups_and_tokens_of_parts_merge_in_any_order(part_of, random):
    rng = np.random.default_rng(random.randrange(1000))
    rows, tokens, part_of = random_rows(rng, len(part_of), 9), rng.integers(1, 50, len(part_of)), np.array(part_of)
    tokens[~rows.any(axis=1)] = 0
    parts = [cover(rows[part_of == k], tokens=tokens[part_of == k]) for k in range(4)]
    random.shuffle(parts)
    whole = cover(rows, tokens=tokens)
    assert reduce(or_, parts) == whole
    assert whole.tokens == tokens.sum()
    assert whole.group_rows.sum() == rows.any(axis=1).sum()
    assert (whole | cover(rows)).tokens is None, "of some rows nobody counted them"


def test_the_report_says_rows_length_and_active_features_beside_fac():
    rng = np.random.default_rng(0)
    data, anchor = random_rows(rng, 30), random_rows(rng, 50)
    report = compare(cover(data, tokens=np.full(30, 8)), cover(anchor, tokens=np.full(50, 11)), threshold=0.5)
    assert (report.mean_tokens, report.anchor_mean_tokens) == (8, 11)
    active = ((data > 0.5).any(axis=0)).sum()
    assert f"30 rows, 8.0 (anchor 11.0) tokens a row, {active} active features" in str(report)
    assert math.isnan(compare(cover(data), cover(anchor), threshold=0.5).mean_tokens)


def test_a_report_of_an_earlier_release_is_read_without_a_match(tmp_path):
    rng = np.random.default_rng(0)
    report = compare(cover(random_rows(rng, 30)), cover(random_rows(rng, 50)), threshold=0.5)
    new = ("frequency_", "jensen_", "kl_interval", "active_features", "mean_tokens", "anchor_mean_tokens")
    saved = {name: value for name, value in report.to_dict().items() if not name.startswith(new)}
    (tmp_path / "old.json").write_text(json.dumps(saved))
    old = FACReport.load(tmp_path / "old.json")
    assert math.isnan(old.frequency_cosine)
    assert old.kl_divergence == report.kl_divergence
    assert "cosine nan" in str(old)


def test_added_rows_change_the_match_as_comparing_them_together_does():
    rng = np.random.default_rng(1)
    data, anchor, added = (random_rows(rng, n) for n in (30, 50, 9))
    for features in (None, np.arange(3, 30)):
        report = compare(cover(data), cover(anchor), threshold=0.5, features=features)
        together = compare(cover(np.vstack([data, added])), cover(anchor), threshold=0.5, features=features)
        after = report.with_added(csr_array(np.float32(added)))
        assert after.frequency_cosine == pytest.approx(together.frequency_cosine)
        assert after.jensen_shannon == pytest.approx(together.jensen_shannon)


def test_deficits_are_the_rows_that_each_feature_falls_short_of_the_anchors_rate(tmp_path):
    rng = np.random.default_rng(0)
    data, anchor = random_rows(rng, 30), random_rows(rng, 80)
    report = compare(cover(data), cover(anchor), threshold=0.5)
    table = report.deficits()
    p, q = shares(data, 0.5), shares(anchor, 0.5)
    assert sorted(table.feature) == [i for i in range(40) if q[i]]
    assert table.deficit.is_monotonic_decreasing
    for row in table.itertuples():
        i = row.feature
        assert row.deficit == pytest.approx(30 * (q[i] - p[i]))
        spread = math.sqrt(q[i] * (1 - q[i]) / 80 + p[i] * (1 - p[i]) / 30)
        assert row.standard_error == pytest.approx(30 * spread)
        counts = [[80 * q[i], 80 - 80 * q[i]], [30 * p[i], 30 - 30 * p[i]]]
        assert row.p_value == pytest.approx(fisher_exact(np.rint(counts).astype(int), alternative="greater").pvalue)
        assert row.low <= row.deficit <= row.high
    # Benjamini & Hochberg: the largest k with p_(k) <= 0.05 k / m, and all before it.
    ranked = np.sort(table.p_value)
    passing = [k for k in range(1, len(ranked) + 1) if ranked[k - 1] <= 0.05 * k / len(ranked)]
    assert table.significant.sum() == (max(passing) if passing else 0)
    report.save(tmp_path / "report.json")
    assert FACReport.load(tmp_path / "report.json").deficits().equals(table)
    (tmp_path / "printed.json").write_text(json.dumps(report.to_dict()))
    with pytest.raises(ValueError, match="without its tables"):
        FACReport.load(tmp_path / "printed.json").deficits()


def test_the_interval_of_a_deficit_is_newcombes():
    # Newcombe 1998, table II: 56/70 against 48/80 and 10/10 against 0/20, by method 10.
    for (a, m), (b, n), expected in (
        ((56, 70), (48, 80), (0.0524, 0.3339)),
        ((9, 10), (3, 10), (0.1705, 0.8090)),
        ((10, 10), (0, 20), (0.6791, 1.0)),
    ):
        found = deficits(np.array([b]), n, np.array([a]), m)
        assert (found.low[0] / n, found.high[0] / n) == pytest.approx(expected, abs=1e-4)


def test_the_intervals_of_deficits_hold_the_true_rates_and_few_false_deficits_pass():
    rng = np.random.default_rng(0)
    q = rng.beta(0.5, 8, 4000)
    p = np.where(np.arange(4000) < 400, 0, q)
    data, anchor = rng.binomial(200, p), rng.binomial(1000, q)
    used = anchor > 0
    found = deficits(data[used], 200, anchor[used], 1000)
    true = (200 * (q - p))[used]
    assert 0.93 <= np.mean((found.low <= true) & (true <= found.high)) <= 0.99
    false = found.significant & (true == 0)
    assert found.significant.sum() > 50
    assert false.sum() <= 0.07 * found.significant.sum()
