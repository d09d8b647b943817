"""`select` against plain greedy, written from the definition of coverage."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Features, List, Value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.sparse import coo_array, csr_array

from hf_fac.coverage import selection
from hf_fac.coverage.coverage import FeatureCoverage
from hf_fac.coverage.selection import select

FEATURES = Features({"fac_features": List(Value("int32")), "fac_activations": List(Value("float32"))})


def plain_greedy(acts, missing, n, weights, threshold, demand=None):
    """The definition: each time the row with the largest gain, the first of those that gain the same.

    A row gains the weights of its features that fewer than the demanded number of chosen rows activate.
    """
    delta = np.broadcast_to(np.asarray(threshold, np.float64), acts.shape[1])
    active = [{f for f in missing if row[f] > delta[f]} for row in acts.astype(np.float64)]
    weight, rows, gains = dict(zip(missing, weights, strict=True)), [], []
    left = dict(zip(missing, demand or [1] * len(missing), strict=True))
    for _ in range(n):
        gain = [
            0 if k in rows else math.fsum(weight[f] for f in features if left[f]) for k, features in enumerate(active)
        ]
        if not gain or max(gain) <= 0:
            break
        rows.append(gain.index(max(gain)))
        gains.append(max(gain))
        left |= {f: max(0, left[f] - 1) for f in active[rows[-1]]}
    return rows, gains, {f for f in missing if left[f]}


def as_dataset(acts):
    columns = {"fac_features": [np.flatnonzero(r) for r in acts], "fac_activations": [r[r > 0] for r in acts]}
    return Dataset.from_dict(columns, features=FEATURES)


@st.composite
def problems(draw, max_rows=14, max_features=9):
    n_rows, width = draw(st.integers(0, max_rows)), draw(st.integers(1, max_features))
    # Few distinct values: ties, and activations that equal a threshold, are common.
    cell = st.sampled_from([0.0, 0.0, 0.1, 0.5, 1.0, 2.0])
    acts = np.array(draw(st.lists(cell, min_size=n_rows * width, max_size=n_rows * width)), np.float32)
    missing = draw(st.lists(st.integers(0, width - 1), unique=True))
    weights = draw(
        st.one_of(
            st.none(),
            st.lists(st.integers(0, 3).map(float), min_size=len(missing), max_size=len(missing)),
            st.lists(st.floats(2**-10, 2**10, width=32), min_size=len(missing), max_size=len(missing)),
        )
    )
    level = st.sampled_from([0.0, 0.1, 0.5, 1.0])
    threshold = draw(st.one_of(level, st.lists(level, min_size=width, max_size=width)))
    return acts.reshape(n_rows, width), missing, draw(st.integers(0, max_rows + 2)), weights, threshold


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    """Blocks and batches of few rows, so that small pools have several of both."""
    patch = pytest.MonkeyPatch()
    patch.setattr(selection, "_BLOCK", 4)
    patch.setattr(selection, "_BATCH", 3)
    yield
    patch.undo()


@settings(max_examples=200, deadline=None)
@given(problems())
def test_equals_plain_greedy(problem):
    acts, missing, n, weights, threshold = problem
    found = select(csr_array(acts), missing, n, weights=weights, threshold=threshold)
    rows, gains, uncovered = plain_greedy(acts, missing, n, weights or [1] * len(missing), threshold)
    assert found.rows.tolist() == rows
    assert found.gains.tolist() == gains
    assert found.covered.tolist() == [f for f in missing if f not in uncovered]
    assert found.uncovered.tolist() == [f for f in missing if f in uncovered]


@settings(max_examples=200, deadline=None)
@given(problems(), st.data())
def test_equals_plain_greedy_for_any_demanded_numbers_of_rows(problem, data):
    acts, missing, n, weights, threshold = problem
    demand = data.draw(st.lists(st.integers(1, 4), min_size=len(missing), max_size=len(missing)))
    found = select(csr_array(acts), missing, n, demand=np.array(demand, int), weights=weights, threshold=threshold)
    rows, gains, uncovered = plain_greedy(acts, missing, n, weights or [1] * len(missing), threshold, demand)
    assert found.rows.tolist() == rows
    assert len(set(rows)) == len(rows)
    assert found.gains.tolist() == gains
    assert found.uncovered.tolist() == [f for f in missing if f in uncovered]


def test_rows_for_deficits_bring_the_frequencies_nearer_to_the_anchors_than_rows_for_missing_features():
    rng = np.random.default_rng(0)
    rate = rng.beta(0.5, 4, 300)
    narrow = np.where(np.arange(300) % 3 > 0, rate / 4, rate)

    def rows(n, rates):
        return np.float32(rng.random((n, 300)) < rates)

    data, anchor, pool = rows(100, narrow), rows(400, rate), csr_array(rows(1000, rate))
    measurement = {"d_sae": 300, "keep_above": 0.0}
    report = FeatureCoverage.from_activations(csr_array(data), measurement=measurement).compare(
        FeatureCoverage.from_activations(csr_array(anchor), measurement=measurement), threshold=0.5
    )
    features, demand = report.demand(40)
    supports = (report.table["anchor_support"], report.table["data_support"])
    expected = {
        i: round(140 * q / 400 - m) for i, q, m in zip(report.table["feature"].tolist(), *supports, strict=True)
    }
    assert dict(zip(features.tolist(), demand.tolist(), strict=True)) == {i: k for i, k in expected.items() if k > 0}
    assert demand.tolist() == sorted(demand, reverse=True)
    aimed = select(pool, features, 40, demand=demand, threshold=report.threshold).rows
    covering = select(pool, report.missing, 40, threshold=report.threshold).rows
    covering = np.concatenate([covering, np.setdiff1d(np.arange(1000), covering)[: 40 - len(covering)]])
    one, other = (report.with_added(pool[chosen]) for chosen in (aimed, covering))
    assert one.frequency_cosine > other.frequency_cosine > report.frequency_cosine
    assert one.jensen_shannon < other.jensen_shannon < report.jensen_shannon


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(problems())
def test_a_data_set_gives_what_its_matrix_gives(problem):
    acts, missing, n, weights, threshold = problem
    one = select(csr_array(acts), missing, n, weights=weights, threshold=threshold)
    two = select(as_dataset(acts), missing, n, weights=weights, threshold=threshold)
    for name in ("rows", "gains", "covered", "uncovered"):
        assert getattr(one, name).tolist() == getattr(two, name).tolist()
        assert getattr(one, name).dtype == getattr(two, name).dtype


def test_equals_plain_greedy_on_thousands_of_rows(monkeypatch):
    monkeypatch.setattr(selection, "_BLOCK", 700)
    monkeypatch.setattr(selection, "_BATCH", 256)
    rng = np.random.default_rng(0)
    acts = (rng.random((3000, 120)) < rng.random(120) ** 6) * rng.random((3000, 120)).astype(np.float32)
    missing = rng.permutation(120)[:90].tolist()
    weights = rng.random(90).tolist()
    found = select(csr_array(acts), missing, 60, weights=weights, threshold=0.25)
    rows, gains, _ = plain_greedy(acts, missing, 60, weights, 0.25)
    assert len(rows) > 10
    assert found.rows.tolist() == rows
    np.testing.assert_allclose(found.gains, gains, rtol=1e-12)


def test_the_first_of_equal_rows_is_chosen_also_across_blocks():
    acts = np.zeros((11, 4), np.float32)
    acts[[3, 5, 10], 0] = acts[[2, 9], 1] = acts[[8, 10], 2] = 1
    assert select(csr_array(acts), [0, 1, 2], 9).rows.tolist() == [10, 2]
    assert select(csr_array(acts), [2], 9).rows.tolist() == [8]
    assert select(csr_array(np.ones((11, 4))), [1], 9).rows.tolist() == [0]


def test_an_activation_that_equals_the_threshold_does_not_count():
    # 0.1 as a float32 is above 0.1 as a float64, and 0.7 is below: compared as they are, as coverage does.
    acts = csr_array(np.array([[0.1, 0.7, 0.5]], np.float32))
    assert select(acts, [0, 1, 2], 1, threshold=0.1).covered.tolist() == [0, 1, 2]
    assert select(acts, [0, 1, 2], 1, threshold=0.5).covered.tolist() == [1]
    assert select(acts, [0, 1, 2], 1, threshold=[0.1, 0.7, 0.5]).covered.tolist() == [0]
    assert select(acts, [2, 0], 1, threshold=np.array([0.0, 0.0, 9.0])).covered.tolist() == [0]


def test_agrees_with_what_coverage_calls_covered():
    from hf_fac.coverage.coverage import FeatureCoverage

    rng = np.random.default_rng(1)
    acts = csr_array((rng.random((60, 40)) * (rng.random((60, 40)) < 0.1)).astype(np.float32))
    measurement = {"d_sae": 40, "keep_above": 0.0}
    found = select(acts, np.arange(40), 60, threshold=0.3)
    chosen = FeatureCoverage.from_activations(acts[found.rows], measurement=measurement)
    everything = FeatureCoverage.from_activations(acts, measurement=measurement)
    assert found.covered.tolist() == np.flatnonzero(chosen.maximum > 0.3).tolist()
    assert found.covered.tolist() == np.flatnonzero(everything.maximum > 0.3).tolist()


def test_a_feature_of_weight_0_is_covered_but_no_row_is_chosen_for_it():
    acts = csr_array(np.array([[0, 1, 0], [1, 1, 0], [0, 0, 1]], np.float32))
    found = select(acts, [0, 1, 2], 3, weights=[2, 0, 0])
    assert (found.rows.tolist(), found.gains.tolist()) == ([1], [2.0])
    assert (found.covered.tolist(), found.uncovered.tolist()) == ([0, 1], [2])
    assert select(acts, [0, 1, 2], 3, weights=[0, 0, 0]).rows.tolist() == []


def test_weights_of_any_size_keep_their_order():
    acts = csr_array(np.eye(3, dtype=np.float32))
    for weights in ([1e-300, 3e-300, 2e-300], [1e307, 3e307, 2e307], [1, 1 + 2**-50, 1 + 2**-51]):
        found = select(acts, [0, 1, 2], 3, weights=weights)
        assert found.rows.tolist() == [1, 2, 0]
        assert found.gains.tolist() == sorted(weights, reverse=True)


def test_an_empty_pool_or_target_gives_an_empty_selection():
    acts = csr_array(np.ones((5, 3), np.float32))
    found = select(acts, [], 3)
    fields = (found.rows, found.gains, found.covered, found.uncovered)
    assert [(len(f), f.dtype) for f in fields] == [(0, np.int64), (0, np.float64), (0, np.int64), (0, np.int64)]
    assert select(acts, [2, 0], 0).uncovered.tolist() == [2, 0]
    assert select(acts[:0], [2, 0], 3).uncovered.tolist() == [2, 0]
    assert select(Dataset.from_dict({"fac_features": [], "fac_activations": []}, FEATURES), [1], 3).rows.tolist() == []


def test_stops_when_nothing_is_gained_even_if_n_exceeds_the_pool():
    acts = csr_array(np.array([[1, 0, 0], [1, 0, 0], [0, 1, 0]], np.float32))
    found = select(acts, [0, 1, 2], 100)
    assert (found.rows.tolist(), found.uncovered.tolist()) == ([0, 2], [2])


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int32, bool])
def test_activations_of_any_type_and_sparse_format(dtype):
    acts = np.array([[0, 1, 0], [1, 0, 1]]).astype(dtype)
    assert select(coo_array(acts), [0, 1, 2], 2, threshold=0.5).rows.tolist() == [1, 0]


def test_a_filtered_and_shuffled_data_set_is_read_by_its_own_order():
    rng = np.random.default_rng(2)
    acts = (rng.random((40, 12)) * (rng.random((40, 12)) < 0.2)).astype(np.float32)
    order = rng.permutation(40)[:25]
    one = select(as_dataset(acts).select(order), np.arange(12), 9, threshold=0.4)
    assert one.rows.tolist() == select(csr_array(acts[order]), np.arange(12), 9, threshold=0.4).rows.tolist()


def test_columns_of_other_widths_and_other_columns_are_read(tmp_path):
    plain = Dataset.from_dict({"text": ["a", "b"], "fac_features": [[5], []], "fac_activations": [[1.5], []]})
    assert plain.features["fac_activations"].feature.dtype == "float64"
    plain.to_parquet(tmp_path / "rows.parquet")
    for pool in (plain, Dataset.from_parquet(str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path))):
        assert select(pool, [5, 70_000], 2).covered.tolist() == [5]


def scored(measurements, activation=1.0):
    row = {"fac_features": [1], "fac_activations": [activation]}
    return Dataset.from_list([row | {"fac_measurement": json.dumps(m)} for m in measurements])


def test_the_measurement_of_the_rows_is_respected():
    pool = scored([{"d_sae": 8, "keep_above": 0.5}] * 2)
    assert select(pool, [1], 2, threshold=0.5).rows.tolist() == [0]
    with pytest.raises(ValueError, match=r"threshold 0\.2 is below the floor keep_above = 0\.5"):
        select(pool, [1], 2, threshold=0.2)
    with pytest.raises(ValueError, match="feature 8, which does not exist: the SAE has features 0 to 7"):
        select(pool, [8], 2, threshold=1)
    mixed = scored([{"d_sae": 8, "keep_above": 0.0}, {"d_sae": 9, "keep_above": 0.0}])
    with pytest.raises(ValueError, match="row 1 of the pool was measured differently"):
        select(mixed, [1], 2)


ACTS = csr_array(np.ones((5, 3), np.float32))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([3], 1), {}, "feature 3, which does not exist: the SAE has features 0 to 2"),
        (([-1], 1), {}, "feature -1, which does not exist"),
        (([0, 1, 0], 1), {}, "feature 0 more than once"),
        (([0.5], 1), {}, "whole numbers"),
        (([[0, 1]], 1), {}, "whole numbers"),
        (([True], 1), {}, "whole numbers"),
        (([0], -1), {}, "n is -1"),
        (([0, 1], 1), {"weights": [1]}, r"weights have shape \(1,\); missing has 2"),
        (([0, 1], 1), {"weights": [1, np.nan]}, r"weights\[1\] is nan"),
        (([0, 1], 1), {"weights": [np.inf, 1]}, r"weights\[0\] is inf"),
        (([0, 1], 1), {"weights": [1, -2]}, r"weights\[1\] is -2"),
        (([0], 1), {"threshold": np.nan}, "one finite number or 3 of them, none negative"),
        (([0], 1), {"threshold": [0, 0, np.inf]}, "one finite number or 3 of them, none negative"),
        (([0], 1), {"threshold": -1}, "one finite number or 3 of them, none negative"),
        (([0], 1), {"demand": [1, 1]}, "demand has shape"),
        (([0], 1), {"demand": [0]}, "whole numbers from 1 up"),
        (([0], 1), {"demand": [1.5]}, "whole numbers from 1 up"),
        (([0], 1), {"threshold": "high"}, "one finite number or 3 of them, none negative"),
        (([0], 1), {"threshold": [0, 0]}, "one finite number or 3 of them, none negative"),
        (([0], 1), {"threshold": [[0, 0, 0]]}, "one finite number or 3 of them, none negative"),
    ],
)
def test_refuses_bad_arguments(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        select(ACTS, *arguments, **options)


def test_refuses_a_threshold_for_fewer_features_than_a_data_set_has():
    with pytest.raises(ValueError, match="threshold is for 2 features; missing holds feature 5"):
        select(as_dataset(np.ones((1, 9))), [5], 1, threshold=[0, 0])


def test_refuses_what_is_no_pool():
    row = {"fac_features": [1], "fac_activations": [1.0]}
    data = Dataset.from_list([row])
    for pool in (np.ones((5, 3)), [row], DatasetDict(train=data), data.to_iterable_dataset(), coo_array(np.ones(3))):
        with pytest.raises(TypeError, match=r"it must be a datasets\.Dataset \(one split\) or a csr_array"):
            select(pool, [0], 1)
    with pytest.raises(TypeError):
        select(ACTS, [0], 1.5)
    with pytest.raises(ValueError, match="no column 'fac_activations'"):
        select(data.remove_columns("fac_activations"), [0], 1)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"fac_features": [1], "fac_activations": [float("nan")]}, "row 5: feature 1 at nan is not finite"),
        ({"fac_features": [1], "fac_activations": [float("inf")]}, "row 5: feature 1 at inf is not finite"),
        ({"fac_features": [1], "fac_activations": [-math.inf]}, "row 5: feature 1 at -inf is not finite"),
        ({"fac_features": [-7], "fac_activations": [2.0]}, "row 5: feature -7 at 2 is not in"),
        ({"fac_features": [1, 2], "fac_activations": [1.0]}, "row 5 has 2 features but 1 activations"),
        ({"fac_features": [1, 2, 1], "fac_activations": [1.0] * 3}, "row 5 of the pool holds a missing feature twice"),
        ({"fac_features": None, "fac_activations": [1.0]}, "row 5 holds a null in fac_features"),
        ({"fac_features": [1], "fac_activations": [None]}, "row 5 holds a null in fac_activations"),
    ],
)
def test_names_the_bad_row(bad, message):
    good = {"fac_features": [0, 1], "fac_activations": [0.5, 0.25]}
    with pytest.raises(ValueError, match=message):
        select(Dataset.from_list([good] * 5 + [bad] + [good] * 5, features=FEATURES), [0, 1], 3)


def test_refuses_a_matrix_whose_ids_leave_its_width():
    acts = csr_array((np.ones(2, np.float32), np.array([0, 2]), np.array([0, 1, 2])), shape=(2, 3))
    acts.indices[1] = 9
    with pytest.raises(ValueError, match=r"row 1: feature 9 at 1 is not in \[0, 3\)"):
        select(acts, [0], 1)
