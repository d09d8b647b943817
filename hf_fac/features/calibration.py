"""Measures the sink cut-off and the mean norm of a model's layer, and checks that an SAE fits the model.

Norms are measured on a few built-in sentences. The fit is checked on the first 2,000 content tokens that are read.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..inputs.hidden_states import sink_cutoff
from ..inputs.rows import ConversationReader
from ..sae.evaluation import content_states
from ..sae.loading import fvu

if TYPE_CHECKING:
    from sae_lens import SAE
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_FIT_TOKENS = 2000
# Above this fraction of variance unexplained, an SAE that states none of its own gets a warning.
_FIT_LIMIT = 0.5
_SENTENCES = (
    "The river rises in the hills north of the town and reaches the sea after about ninety kilometres.",
    "Please send me the invoice for last month and tell me whether the second payment has arrived.",
    "To make the dough, mix the flour with a little salt, add warm water and knead it for ten minutes.",
    "def mean(values):\n    return sum(values) / len(values)",
    "She closed the window, sat down by the lamp and read the letter once more, slowly, from the start.",
    "If a train covers 180 kilometres in two hours, how far does it go in 45 minutes at the same speed?",
    "What is the difference between a virus and a bacterium, and why do antibiotics help against only one?",
    "The court found that the contract had ended in March and that no further notice was needed.",
)


def calibrate_sinks(model: PreTrainedModel, reader: ConversationReader, layer: int, *, causal: bool) -> float:
    """Returns 10 x the median norm of the content tokens of the built-in sentences, in three digits.

    Three digits are the same on every machine; further ones depend on the order of summation.
    Raises: ValueError when no hidden state is finite.
    """
    plain = ConversationReader(reader.tokenizer, prepend_bos=reader.prepend_bos)
    return float(f"{sink_cutoff(_content_norms(model, plain, layer, causal)):.3g}")


def mean_content_norm(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, layer: int) -> float:
    """Returns the mean norm of the content tokens of the built-in sentences without sinks, in three digits.

    Raises: ValueError when no hidden state is finite.
    """
    norms = _content_norms(model, ConversationReader(tokenizer), layer)
    return float(f"{norms[norms <= sink_cutoff(norms)].mean():.3g}")


def _content_norms(
    model: PreTrainedModel, reader: ConversationReader, layer: int, causal: bool | None = None
) -> np.ndarray:
    batches = content_states(model, reader(list(_SENTENCES)), layer, batch_tokens=512, sink_norm=None, causal=causal)
    norms = torch.cat([states.norm(dim=-1) for states in batches]).cpu().numpy()
    norms = norms[np.isfinite(norms)]
    if not len(norms):
        raise ValueError(
            f"All hidden states of {type(model).__name__} at layer {layer} are NaN or infinite: check its weights, or "
            "load it in float32."
        )
    return norms


class FitCheck:
    """Measures the SAE's fraction of variance unexplained on the first 2,000 tokens, and warns when it is high.

    Attributes:
        fvu: None until 2,000 tokens were added.
    """

    def __init__(self, sae: SAE, *, expected: float | None, layer: int) -> None:
        self.fvu: float | None = None
        self._sae, self._expected, self._layer = sae, expected, layer
        self._sample: list[Tensor] | None = []

    def add(self, x: Tensor, is_counted: Tensor) -> None:
        """Adds hidden states [n, d_in] float32; `is_counted` bool [n] says which of them count."""
        if self._sample is None:
            return
        self._sample.append(x[is_counted][:_FIT_TOKENS])
        if sum(map(len, self._sample)) < _FIT_TOKENS:
            return
        sample, self._sample = torch.cat(self._sample)[:_FIT_TOKENS], None
        # The same token over and over, at the embedding, has no variance.
        if (sample == sample[0]).all():
            return
        self.fvu = fvu(self._sae, sample)
        limit = _FIT_LIMIT if self._expected is None else 2 * self._expected
        if self.fvu > limit:
            stated = "the SAE states no value" if self._expected is None else f"{self._expected:.2f} on its own data"
            warnings.warn(
                f"The SAE leaves {self.fvu:.2f} of the variance of this model's layer {self._layer} unexplained "
                f"({stated}): it may belong to another model, layer or precision, and its features mean little here.",
                stacklevel=5,
            )
