"""What a featurizer finds out about its model and SAE before their numbers are believed.

Where an SAE has no sink cut-off of its own, one is measured on a few built-in sentences; and on the first 2,000 content
tokens that are read it is checked that the SAE fits the model at all.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..inputs import hidden_states as acts
from ..inputs.rows import ConversationReader
from ..sae.loading import fvu

if TYPE_CHECKING:
    from sae_lens import SAE
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_FIT_TOKENS = 2000
# An SAE without a figure of its own is doubted from here.
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


def calibrate_sinks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    layer: int,
    *,
    prepend_bos: bool = False,
    causal: bool | None = None,
) -> float:
    """Returns 10 x the median norm of the content tokens of the built-in sentences, in three digits.

    Three digits are the same on every machine, the rest depends on the order of its sums.
    Raises: ValueError when no hidden state is finite.
    """
    norms = _content_norms(model, tokenizer, layer, prepend_bos=prepend_bos, causal=causal)
    return float(f"{acts.sink_cutoff(norms):.3g}")


def mean_content_norm(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, layer: int) -> float:
    """Returns the mean norm of the content tokens of the built-in sentences without sinks, in three digits.

    Raises: ValueError when no hidden state is finite.
    """
    norms = _content_norms(model, tokenizer, layer)
    return float(f"{norms[norms <= acts.sink_cutoff(norms)].mean():.3g}")


def _content_norms(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    layer: int,
    *,
    prepend_bos: bool = False,
    causal: bool | None = None,
) -> np.ndarray:
    pieces = ConversationReader(tokenizer, prepend_bos=prepend_bos)(list(_SENTENCES))
    found = []
    for batch in acts.hidden_states(model, pieces.ids, layer, batch_tokens=512, causal=causal):
        for i, hidden in zip(batch.pieces.tolist(), batch.hidden, strict=True):
            found.append(hidden[: len(pieces.ids[i])].float().norm(dim=-1).cpu().numpy()[pieces.content[i]])
    norms = np.concatenate(found)
    norms = norms[np.isfinite(norms)]
    if not len(norms):
        raise ValueError(
            f"All hidden states of {type(model).__name__} at layer {layer} are NaN or infinite: check its weights, or "
            "load it in float32."
        )
    return norms


class FitCheck:
    """The SAE's FVU on the first 2,000 tokens it sees, and a warning where it does not fit.

    Attributes:
        fvu: None until so many tokens were seen.
    """

    def __init__(self, sae: SAE, *, expected: float | None, layer: int) -> None:
        self.fvu: float | None = None
        self._sae, self._expected, self._layer = sae, expected, layer
        self._sample: list[Tensor] | None = []

    def add(self, x: Tensor, counts: Tensor) -> None:
        """Takes hidden states [n, d_in] float32, of which those count that `counts` [n] says."""
        if self._sample is None:
            return
        self._sample.append(x[counts][:_FIT_TOKENS])
        if sum(map(len, self._sample)) < _FIT_TOKENS:
            return
        sample, self._sample = torch.cat(self._sample)[:_FIT_TOKENS], None
        # One token over and over, in the embedding: nothing to explain.
        if (sample == sample[0]).all():
            return
        self.fvu = fvu(self._sae, sample)
        limit = _FIT_LIMIT if self._expected is None else 2 * self._expected
        if self.fvu > limit:
            own = "no figure of its own" if self._expected is None else f"{self._expected:.2f} on its own data"
            warnings.warn(
                f"The SAE leaves {self.fvu:.2f} of the variance of this model's layer {self._layer} unexplained "
                f"({own}): it may belong to another model, layer or precision, and its features may mean little here.",
                stacklevel=5,
            )
