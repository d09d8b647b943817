"""What is my training data missing? Feature Activation Coverage and FAC Synthesis (arXiv 2602.10388).

Everything is loaded when first used: importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .conversations import RowError as RowError
    from .coverage import FACReport as FACReport
    from .coverage import FeatureCoverage as FeatureCoverage
    from .featurizer import SAEFeaturizer as SAEFeaturizer
    from .sae import find_sae as find_sae
    from .sae import load_sae as load_sae
    from .sae import save_sae as save_sae
    from .sae_training import train_sae as train_sae
    from .scorer import FACScorer as FACScorer
    from .shards import score_shards as score_shards

_HOME = {
    "FACReport": "coverage",
    "FACScorer": "scorer",
    "FeatureCoverage": "coverage",
    "RowError": "conversations",
    "SAEFeaturizer": "featurizer",
    "find_sae": "sae",
    "load_sae": "sae",
    "save_sae": "sae",
    "score_shards": "shards",
    "train_sae": "sae_training",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'hf_fac' has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
