"""Steering: a local model writes texts while an SAE's decoder direction is added to its hidden states.

Many features are steered in one batch. The fluency of texts is measured by the same model without steering. A vector is
added to the residual stream (Turner et al. 2023, arXiv:2308.10248); its strength is given in units of the stream's mean
norm, which makes it comparable between layers and SAEs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from ..chat.base import Completion
from ..chat.local import LocalChat, Steering
from ..features.calibration import mean_content_norm
from ..inputs.hidden_states import check_layer, evaluation_mode, most_logit_tokens, pack
from ..sae.loading import check_sae
from ..storage.feature_ids import check_feature_ids
from .vectors import feature_directions

if TYPE_CHECKING:
    from sae_lens import SAE
    from torch import Tensor

_PLACEHOLDER = "hf_fac"  # rendered in place of a user's message


class UnconditionalPrompt(NamedTuple):
    """A prompt that names no feature: `steered.complete([conversation], stop=stop, ...)` continues it."""

    steered: SteeredChat
    conversation: list[dict]
    stop: tuple[str, ...]


class SteeredChat:
    """A `LocalChat` that writes texts with a feature switched on.

        steered = SteeredChat(LocalChat(model, tokenizer), sae, layer=15)
        request = [{"role": "user", "content": "Write a question."}]
        [[text, other]] = steered.complete([request], features=[123], strengths=[0.4], n=2)

    At the SAE's layer x becomes x + strength * mean_norm * W_dec[f] / ||W_dec[f]||, at the prompt's last token and at
    all tokens generated. The rest of the prompt is read without steering, once for all features. The model is hooked
    only while it generates.

    Args:
        layer: L is the output of the L-th block, 0 is what enters the first.
        mean_norm: the unit of strength; None takes the mean norm of the content tokens of a few built-in sentences at
            that layer, sinks left out.

    Raises: TypeError for another chat; ValueError for an SAE of another width or kind, a layer that is not there, or a
        mean_norm that is not positive.
    """

    def __init__(self, chat: LocalChat, sae: SAE, *, layer: int, mean_norm: float | None = None):
        if not isinstance(chat, LocalChat):
            raise TypeError(
                f"chat is of type {type(chat).__name__}; steering changes a model's hidden states, so it needs a "
                "LocalChat."
            )
        check_layer(chat.model, layer)
        check_sae(sae, d_in=chat.model.config.get_text_config().hidden_size)
        if mean_norm is not None and not 0 < mean_norm < math.inf:
            raise ValueError(f"mean_norm is {mean_norm}; it must be a positive number, or None to measure it.")
        self.chat, self.sae, self.layer = chat, sae, layer
        self.mean_norm = mean_norm or mean_content_norm(chat.model, chat.tokenizer, layer)

    def complete(
        self,
        conversations: Sequence[list[dict]],
        *,
        features: Sequence[int],
        strengths: Sequence[float],
        n: int = 1,
        temperature: float = 0.8,
        top_p: float = 0.9,
        max_tokens: int = 256,
        seed: int = 0,
        prefill: Sequence[str | None] | None = None,
        stop: Sequence[str] = (),
    ) -> list[list[Completion]]:
        """Returns n completions of each conversation. Other arguments are those of `LocalChat.complete`.

        The same conversation with another feature or strength is written with other random numbers.

        Args:
            features: for each conversation, the feature that is steered.
            strengths: for each conversation, the strength in units of `mean_norm`. 0 does not steer; start with 0.5 to
                0.6 (on the embedded model, 0.3 changes little and 0.8 makes texts incoherent).

        Raises: ValueError for a feature that the SAE does not have or has no direction for, and a strength that is
            negative or not finite; what `LocalChat.complete` raises.
        """
        self._check(len(conversations), features, strengths)
        keys = [(int(feature), float(strength)) for feature, strength in zip(features, strengths, strict=True)]
        return self.chat.complete(
            conversations, n=n, temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed,
            prefill=prefill, stop=stop, steering=Steering(self.layer, self._vectors(keys), keys),
        )  # fmt: skip

    def user_prompt(self) -> UnconditionalPrompt:
        """Returns a prompt that ends where a user's first message starts, so that the model writes as the user (Magpie,
        Xu et al. 2024, arXiv:2406.08464). A model without a chat template starts a document.

        Raises: ValueError for a template that does not render a user's message.
        """
        tokenizer = copy.deepcopy(self.chat.tokenizer)
        if tokenizer.chat_template:
            message = [{"role": "user", "content": _PLACEHOLDER}]
            text = tokenizer.apply_chat_template(message, tokenize=False, **self.chat.chat_template_kwargs)
            before, found, after = text.partition(_PLACEHOLDER)
            if not found:
                raise ValueError("The chat template does not render a user's message, so the model cannot write one.")
        else:
            before, after = tokenizer.bos_token or tokenizer.eos_token or "", ""
        # A chat that continues the text as it is, without a template around it.
        tokenizer.chat_template = "{{ messages[0]['content'] }}"
        steered, chat = copy.copy(self), copy.copy(self.chat)
        steered.chat, chat.tokenizer = chat, tokenizer
        stop = after.strip() or after
        return UnconditionalPrompt(steered, [{"role": "user", "content": before}], (stop,) if stop else ())

    def perplexity(self, texts: Sequence[str]) -> np.ndarray:
        """Returns the perplexity of each text under the model without steering, float64 [n]: exp of the mean negative
        log-likelihood of all tokens except the first; NaN for a text of fewer than two tokens.

        A text is read without chat template or prompt, with a BOS only where the tokenizer adds one. Of a text longer
        than the model's context only the beginning is read.
        """
        model, tokenizer = self.chat.model, self.chat.tokenizer
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        bos = [tokenizer.bos_token_id] if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else []
        pieces = [(bos + piece)[:context] if len(piece) > 1 else [] for piece in ids]
        perplexities = np.full(len(pieces), np.nan)
        budget = min(self.chat.batch_tokens, most_logit_tokens(model))
        with evaluation_mode(model):
            for batch in pack([len(piece) for piece in pieces], budget):
                # Padding stands on the right, where causal attention does not see it, so no mask is needed.
                padded = pad_sequence([torch.tensor(pieces[i]) for i in batch], batch_first=True).to(model.device)
                logits = model(input_ids=padded, use_cache=False).logits[:, :-1].float()
                losses = (logits.logsumexp(-1) - logits.gather(-1, padded[:, 1:, None])[..., 0]).double().cpu()
                for place, i in enumerate(batch):
                    perplexities[i] = losses[place, len(bos) : len(pieces[i]) - 1].mean().exp()
        return perplexities

    def _check(self, n: int, features: Sequence[int], strengths: Sequence[float]) -> None:
        for name, values in (("features", features), ("strengths", strengths)):
            if len(values) != n:
                raise ValueError(f"{name} has {len(values)} entries for {n} conversations; give one for each.")
        check_feature_ids(features, self.sae.cfg.d_sae, may_be_empty=True, may_repeat=True)
        for index, strength in enumerate(strengths):
            if not 0 <= strength < math.inf:
                raise ValueError(
                    f"Conversation {index} asks for the strength {strength}; it must be a number from 0 up, in units "
                    "of mean_norm (0.5 is usual)."
                )

    def _vectors(self, keys: list[tuple[int, float]]) -> Tensor:
        """The vector added for each feature and strength, [n, d_in], in the model's dtype."""
        model = self.chat.model
        directions = feature_directions(self.sae, [feature for feature, _ in keys])
        lengths = torch.tensor([strength * self.mean_norm for _, strength in keys], dtype=torch.float64)
        scales = lengths / directions.norm(dim=-1)
        return (directions * scales[:, None]).to(model.device, model.dtype)
