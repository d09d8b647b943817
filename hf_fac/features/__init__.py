"""Rows in, sparse activations out."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "featurizer": ["SAEFeaturizer"],
        "scoring": ["FACScorer"],
        "shards": ["score_shards"],
    },
)
