"""Writing for features that too few rows activate: for which, how many samples, and what becomes of the match."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from datasets import Dataset
from synthesis_parts import rows, synthesizer

from hf_fac.coverage.coverage import FeatureCoverage
from hf_fac.features.scoring import FACScorer


def of(featurizer, messages):
    return FeatureCoverage.from_activations(featurizer(messages), measurement=featurizer.measurement)


@pytest.fixture(scope="module")
def narrow():
    """Many rows of one sentence, so that many features are rare and few are missing."""
    text = rows(1, seed=5)[0]["messages"][0]["content"]
    return [{"messages": [{"role": "user", "content": f"{text} {n}"}]} for n in range(30)] + rows(12, seed=6)


@pytest.fixture(scope="module")
def report(featurizer, narrow):
    anchor = of(featurizer, rows(150))
    near = np.quantile(featurizer(rows(50, seed=2)).data, 0.6)
    # On the grid, where added rows are counted as `compare` counts them.
    return of(featurizer, narrow).compare(anchor, threshold=float(anchor.grid[np.searchsorted(anchor.grid, near)]))


def test_features_get_as_many_samples_as_rows_are_lacking_up_to_a_bound(featurizer, dictionary, report, narrow):
    made = synthesizer(featurizer, dictionary, report, aim="deficits", samples_per_feature=3)
    result = made.synthesize(report)
    table = report.deficits().set_index("feature")
    short = table.index[table.significant].tolist()
    assert len(short) > 3
    assert result.report.features.tolist() == made.wanted(report).tolist() == short
    assert set(short) - set(report.missing.tolist()), "they are not only what no row activates"
    written = Counter(result.dataset["fac_feature"])
    assert written.keys() <= set(short)
    assert max(written.values()) > 1
    for feature, number in written.items():
        assert number <= min(3, math.ceil(table.deficit[feature]))

    new = of(featurizer, result.dataset.select_columns(["prompt", "completion"]))
    after = (of(featurizer, narrow) | new).compare(of(featurizer, rows(150)), threshold=report.threshold)
    told = result.report
    assert told.frequency_cosine_before == report.frequency_cosine
    assert told.jensen_shannon_before == report.jensen_shannon
    assert told.frequency_cosine_after == pytest.approx(after.frequency_cosine)
    assert told.jensen_shannon_after == pytest.approx(after.jensen_shannon)
    assert told.frequency_cosine_after > told.frequency_cosine_before
    assert f"cosine {report.frequency_cosine:.3f} before" in str(told)


def test_rows_of_a_pool_count_as_samples_of_all_features_that_they_activate(featurizer, dictionary, report):
    answer = [{"role": "assistant", "content": "Yes."}]
    prompts = [{"prompt": row["messages"], "completion": answer} for row in rows(20, seed=7)]
    pool = Dataset.from_list(prompts).map(FACScorer(featurizer), batched=True)
    made = synthesizer(featurizer, dictionary, report, aim="deficits", samples_per_feature=3)
    result = made.synthesize(report, pool=pool)
    deficit = report.deficits().set_index("feature").deficit
    own = result.dataset.filter(lambda row: row["fac_method"] != "pool", load_from_cache_file=False)
    n_taken = len(result.dataset) - len(own)
    assert n_taken > 1
    taken = [{"messages": prompt} for prompt in result.dataset["prompt"][:n_taken]]
    active = featurizer(taken).toarray() > report.threshold
    written = Counter(own["fac_feature"])
    for feature in made.wanted(report).tolist():
        most = min(3, math.ceil(deficit[feature]))
        assert written[feature] <= max(0, most - active[:, feature].sum())


def test_ids_alone_do_not_say_what_falls_short(featurizer, dictionary, report):
    made = synthesizer(featurizer, dictionary, report, aim="deficits")
    with pytest.raises(ValueError, match="aim='deficits' needs a FACReport"):
        made.synthesize(report.missing)
    enough = next(i for i in report.covered.tolist() if i not in made.wanted(report))
    assert len(made.synthesize(report, features=[enough]).report.features) == 0
    with pytest.raises(ValueError, match="aim is 'all'; it must be one of missing, deficits"):
        synthesizer(featurizer, dictionary, report, aim="all")
    assert made.plan(report).features == len(made.wanted(report))
