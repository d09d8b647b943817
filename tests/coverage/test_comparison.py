"""Several data sets against one anchor set."""

import math

import numpy as np
import pytest
from coverages import cover, quiet, random_rows

from hf_fac import compare


def three_sets():
    rng = np.random.default_rng(0)
    rows = random_rows(rng, d=300, n=60, density=0.03)
    return {"a": rows[:20], "b": rows[10:40], "none": np.zeros((3, 300), np.float32)}, random_rows(rng, d=300, n=50)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("options", [{}, {"threshold": 1.0, "features": np.arange(200)}, {"relative": 0.3}])
def test_each_is_compared_as_alone_and_with_the_others(options):
    sets, anchor = three_sets()
    comparison = compare({name: cover(rows) for name, rows in sets.items()}, cover(anchor), **options)
    table = comparison.to_pandas()
    assert table.index.tolist() == ["a", "b", "none"]
    alone = {name: quiet(cover(rows), cover(anchor), **options) for name, rows in sets.items()}
    covered = {name: set(report.covered.tolist()) for name, report in alone.items()}
    for name, report in alone.items():
        row = table.loc[name]
        assert comparison.reports[name].to_dict() == report.to_dict()
        assert (row["rows"], row["fac"]) == (len(sets[name]), report.fac)
        match = (report.frequency_cosine, report.jensen_shannon, report.active_features)
        assert (row["frequency_cosine"], row["jensen_shannon"], row["active_features"]) == pytest.approx(
            match, nan_ok=True
        )
        assert (row["low"], row["high"]) == pytest.approx(report.interval)
        assert (row["single_low"], row["single_high"]) == pytest.approx(report.single_interval)
        assert (row["covered"], row["missing"]) == (len(report.covered), len(report.missing))
        others = set().union(*(covered[other] for other in sets if other != name))
        assert row["alone"] == len(covered[name] - others)
        for other in sets:
            union = covered[name] | covered[other]
            expected = len(covered[name] & covered[other]) / len(union) if union else math.nan
            assert row[f"jaccard {other}"] == pytest.approx(expected, nan_ok=True)
    assert table["alone"].any()


def test_it_prints_a_line_for_each_and_escapes_names_in_a_notebook():
    sets, anchor = three_sets()
    comparison = compare({"<b>x</b>": cover(sets["a"]), "b": cover(sets["b"])}, cover(anchor), threshold=1.0)
    together = np.union1d(*(report.covered for report in comparison.reports.values()))
    text, html = str(comparison), comparison._repr_html_()
    assert f"2 data sets against 50 anchor rows; together they cover {len(together)} of" in text
    assert f"{comparison.reports['b'].fac:.3f}" in text
    assert "delta: 1, as given" in text
    assert "<b>x" not in html
    assert "&lt;b&gt;x" in html


def test_what_is_no_coverage_is_refused():
    sets, anchor = three_sets()
    with pytest.raises(ValueError, match="coverages is empty"):
        compare({}, cover(anchor))
    with pytest.raises(TypeError, match=r"a is a ndarray: pass FeatureCoverage\.from_dataset"):
        compare(sets, cover(anchor))
