from __future__ import annotations

import numpy as np
import pytest
from synthesis_parts import make_featurizer, rows

from hf_fac.coverage.coverage import FeatureCoverage
from hf_fac.dictionary.build import build_dictionary


@pytest.fixture(scope="module")
def featurizer():
    return make_featurizer(pool_over="user")


@pytest.fixture(scope="module")
def report(featurizer):
    anchor, data = (
        FeatureCoverage.from_activations(featurizer(part), measurement=featurizer.measurement)
        for part in (rows(150), rows(3, seed=1))
    )
    report = data.compare(anchor, threshold=float(np.quantile(featurizer(rows(50, seed=2)).data, 0.8)))
    assert len(report.missing) > 12
    return report


@pytest.fixture(scope="module")
def dictionary(featurizer):
    return build_dictionary(featurizer, rows(60, seed=3), before=3, after=2)
