"""Parts of a synthesis on a tiny model."""

from __future__ import annotations

import random

import numpy as np
from tiny import byte_level_tokenizer
from tiny_models import tiny_model, tiny_sae
from writing_chat import WritingChat, sentence

from hf_fac.coverage.coverage import FeatureCoverage
from hf_fac.dictionary.build import build_dictionary
from hf_fac.features.featurizer import SAEFeaturizer
from hf_fac.synthesis.synthesizer import FACSynthesizer


def rows(n, *, seed=0):
    rng = random.Random(seed)
    return [{"messages": [{"role": "user", "content": sentence(rng, n=6)}]} for _ in range(n)]


def make_featurizer(**settings):
    return SAEFeaturizer(tiny_model(), byte_level_tokenizer(), tiny_sae(), sink_norm=float("inf"), **settings)


def make_parts():
    """A featurizer, a dictionary and a report that misses features."""
    featurizer = make_featurizer(pool_over="user")
    anchor, data = (
        FeatureCoverage.from_activations(featurizer(part), measurement=featurizer.measurement)
        for part in (rows(150), rows(3, seed=1))
    )
    report = data.compare(anchor, threshold=float(np.quantile(featurizer(rows(50, seed=2)).data, 0.8)))
    return featurizer, build_dictionary(featurizer, rows(60, seed=3), before=3, after=2), report


def synthesizer(featurizer, dictionary, report, *, chat=None, **settings):
    settings = {"task": "instruction_following", "methods": ("two_step",), "prompt_format": "list", **settings}
    return FACSynthesizer(chat or WritingChat(), featurizer, dictionary, threshold=report.threshold, **settings)


def as_dicts(result):
    return result.dataset.to_list(), result.dropped.to_list()
