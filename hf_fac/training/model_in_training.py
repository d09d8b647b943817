"""The model in training: whether it also measures or writes, and how it is left as it was."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ..features.fingerprint import TensorHash
from ..inputs.hidden_states import evaluation_mode
from ..storage.cache import content_key

if TYPE_CHECKING:
    from transformers import Trainer

    from ..features.featurizer import SAEFeaturizer
    from ..synthesis.synthesizer import FACSynthesizer


def is_measuring(trainer: Trainer, synthesizer: FACSynthesizer) -> bool:
    """Whether the featurizer reads the model in training."""
    return _is_in_training(trainer, synthesizer.featurizer.model)


def is_writing(trainer: Trainer, synthesizer: FACSynthesizer) -> bool:
    """Whether the model in training writes the samples."""
    return _is_in_training(trainer, getattr(synthesizer.chat, "model", None))  # an endpoint has a name there


def _is_in_training(trainer: Trainer, model: Any) -> bool:
    trained = {id(parameter) for parameter in trainer.model.parameters()}
    return isinstance(model, nn.Module) and any(id(parameter) in trained for parameter in model.parameters())


def featurizer_digest(trainer: Trainer, synthesizer: FACSynthesizer) -> str:
    """Returns a hash of what measures; of the model in training, whose weights change, only the settings and SAE."""
    featurizer = synthesizer.featurizer
    if not is_measuring(trainer, synthesizer):
        return featurizer.fingerprint()
    names = sorted({*featurizer.measurement} - {"model", "fingerprint"})
    settings = [featurizer.measurement[name] for name in names]
    return content_key(settings, TensorHash()(featurizer.sae.state_dict().items()))


@contextmanager
def preserved(trainer: Trainer, featurizer: SAEFeaturizer) -> Iterator[None]:
    """While it lasts the models of trainer and featurizer are in evaluation mode, without gradients. Afterwards their
    modes and the random state of Python, NumPy and torch are as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(range(torch.cuda.device_count())))
            for model in {id(model): model for model in (trainer.model, featurizer.model)}.values():
                stack.enter_context(evaluation_mode(model))
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def reraise_oom() -> Iterator[None]:
    """Raise RuntimeError where measuring or writing runs out of memory. With auto_find_batch_size accelerate would take
    the original error for one of training, shrink the training batch and start again."""
    from accelerate.utils.memory import should_reduce_batch_size

    try:
        yield
    except Exception as error:
        if not should_reduce_batch_size(error):
            raise
        raise RuntimeError(  # in words that accelerate does not look for
            "Measuring rows or writing samples, not training, ran out of memory: make the SAEFeaturizer with a lower "
            "batch_tokens, the LocalChat with a lower batch_size, or let another device or an EndpointChat write."
        ) from error
