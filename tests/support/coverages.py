"""Coverages and scored data sets of random activations, without a model."""

from __future__ import annotations

import json
import warnings

import datasets
import numpy as np
from scipy.sparse import csr_array

from hf_fac.coverage.coverage import FeatureCoverage

GRID = [0.0, *(float(np.float32(2.0 ** (k / 4))) for k in range(-24, 41))]


def measurement(d_sae, keep_above=0.0, **other):
    return {"model": "tiny", "layer": 1, "d_sae": d_sae, "keep_above": keep_above} | other


def random_rows(rng, n=30, d=40, density=0.2):
    """Dense activations [n, d] float32, some of them exactly on the grid, some repeated, with two empty rows."""
    values = rng.exponential(1.0, (n, d)).astype(np.float32)
    on_grid = rng.random((n, d)) < 0.3
    values[on_grid] = rng.choice(np.float32(GRID[1:40]), on_grid.sum())
    rows = values * (rng.random((n, d)) < density)
    rows[n // 2] = rows[0]
    rows[[2, n - 1]] = 0
    return rows


def cover(rows, keep_above=0.0, **kwargs):
    return FeatureCoverage.from_activations(
        csr_array(rows), measurement=measurement(rows.shape[1], keep_above), **kwargs
    )


def scored(rows, shuffle=None, **other):
    """The data set that FACScorer returns for these activations; `shuffle` permutes the features within a row."""
    ids = [np.flatnonzero(row).astype(np.int32) for row in rows]
    ids = [i if shuffle is None else shuffle.permutation(i) for i in ids]
    columns = {
        "text": [f"row {k}" for k in range(len(rows))],
        "fac_features": ids,
        "fac_activations": [row[i] for row, i in zip(rows, ids, strict=True)],
        "fac_tokens": [np.int32(5 if len(i) else 0) for i in ids],
        "fac_measurement": [json.dumps(measurement(rows.shape[1]) | other)] * len(rows),
    }
    int32, float32 = datasets.List(datasets.Value("int32")), datasets.List(datasets.Value("float32"))
    features = datasets.Features(
        text=datasets.Value("string"),
        fac_features=int32,
        fac_activations=float32,
        fac_tokens=datasets.Value("int32"),
        fac_measurement=datasets.Value("string"),
    )
    return datasets.Dataset.from_dict(columns, features=features)


def quiet(data, anchor, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return data.compare(anchor, **kwargs)
