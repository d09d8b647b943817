"""What is my training data missing? Feature Activation Coverage and FAC Synthesis (arXiv 2602.10388).

Everything is loaded when first used: importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .callback import FACSynthesisCallback as FACSynthesisCallback
    from .chat import LocalChat as LocalChat
    from .conversations import RowError as RowError
    from .coverage import FACReport as FACReport
    from .coverage import FeatureCoverage as FeatureCoverage
    from .coverage_card import push_coverage_to_hub as push_coverage_to_hub
    from .dictionary import FeatureDictionary as FeatureDictionary
    from .endpoint import ChatError as ChatError
    from .endpoint import EndpointChat as EndpointChat
    from .featurizer import SAEFeaturizer as SAEFeaturizer
    from .hub_errors import HubError as HubError
    from .interpret import detect as detect
    from .interpret import explain as explain
    from .relevance import rate as rate
    from .sae import find_sae as find_sae
    from .sae import load_sae as load_sae
    from .sae import save_sae as save_sae
    from .sae_hub import push_sae_to_hub as push_sae_to_hub
    from .sae_training import train_sae as train_sae
    from .scorer import FACScorer as FACScorer
    from .selection import select as select
    from .shards import score_shards as score_shards
    from .spans import build_dictionary as build_dictionary
    from .steering import SteeredChat as SteeredChat
    from .synthesis import FACSynthesizer as FACSynthesizer
    from .synthesis import SynthesisResult as SynthesisResult
    from .tasks import Task as Task
    from .tasks import get_task as get_task

_HOME = {
    "FACSynthesisCallback": "callback",
    "FACSynthesizer": "synthesis",
    "SteeredChat": "steering",
    "SynthesisResult": "synthesis",
    "ChatError": "endpoint",
    "EndpointChat": "endpoint",
    "FACReport": "coverage",
    "FACScorer": "scorer",
    "FeatureCoverage": "coverage",
    "FeatureDictionary": "dictionary",
    "HubError": "hub_errors",
    "LocalChat": "chat",
    "RowError": "conversations",
    "SAEFeaturizer": "featurizer",
    "Task": "tasks",
    "build_dictionary": "spans",
    "detect": "interpret",
    "explain": "interpret",
    "find_sae": "sae",
    "get_task": "tasks",
    "load_sae": "sae",
    "push_coverage_to_hub": "coverage_card",
    "push_sae_to_hub": "sae_hub",
    "rate": "relevance",
    "save_sae": "sae",
    "score_shards": "shards",
    "select": "selection",
    "train_sae": "sae_training",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'hf_fac' has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
