"""Steering: a local model writes texts while an SAE's decoder direction is added to its hidden states.

Many features are steered in one batch, and the model need not follow instructions. Fluency is measured by the same
model without steering. A vector is added to the residual stream (Turner et al. 2023, arXiv:2308.10248); its strength is
given in units of the stream's mean norm, which makes it comparable between layers and SAEs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from ..chat.base import Completion
from ..chat.batch_generation import Text
from ..chat.local import LocalChat
from ..features.calibration import mean_content_norm
from ..inputs.hidden_states import check_layer, evaluation_mode, layer_hook, pack
from ..sae.loading import check_sae
from ..storage.feature_ids import check_feature_ids

if TYPE_CHECKING:
    from sae_lens import SAE
    from torch import Tensor

_MARK = "hf_fac"
_LOGITS = 2**26  # elements of [tokens, vocabulary] that exist at one time: 256 MB in float32


class UserTurn(NamedTuple):
    """A prompt for a user's first message: `steered.complete([conversation], stop=stop, ...)` writes one."""

    steered: SteeredChat
    conversation: list[dict]
    stop: tuple[str, ...]


class SteeredChat:
    """A `LocalChat` that writes texts with a feature switched on.

        steered = SteeredChat(LocalChat(model, tokenizer), sae, layer=15)
        request = [{"role": "user", "content": "Write a question."}]
        [[text, other]] = steered.complete([request], features=[123], strengths=[0.4], n=2)

    At the SAE's layer x becomes x + strength * mean_norm * W_dec[f] / ||W_dec[f]||, at the prompt's last token and at
    all tokens that are written. The rest of the prompt is read without steering, once for all features. The model is
    hooked only while it writes.

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
        tags = self._checked(len(conversations), features, strengths)
        known = list(dict.fromkeys(tags))
        number = {tag: row for row, tag in enumerate(known)} | {None: len(known)}
        vectors = self._vectors(known)

        push = _Push()

        def stepping(rows: Sequence[Text | None]) -> AbstractContextManager[None]:
            return push.by(vectors[[number[text.tag if text else None] for text in rows]])

        request = {"n": n, "temperature": temperature, "top_p": top_p, "max_tokens": max_tokens, "seed": seed}
        with layer_hook(self.chat.model, self.layer, push):
            return self.chat.complete_tagged(conversations, tags, stepping, prefill=prefill, stop=stop, **request)

    def user_turn(self) -> UserTurn:
        """Returns a prompt that ends where a user's first message starts, so that the model writes as the user (Magpie,
        Xu et al. 2024, arXiv:2406.08464). A model without a chat template starts a document.

        Raises: ValueError for a template that does not render what a user says.
        """
        tokenizer = copy.deepcopy(self.chat.tokenizer)
        if tokenizer.chat_template:
            asked = [{"role": "user", "content": _MARK}]
            text = tokenizer.apply_chat_template(asked, tokenize=False, **self.chat.chat_template_kwargs)
            before, mark, after = text.partition(_MARK)
            if not mark:
                raise ValueError(
                    "The chat template does not render what a user says, so that no user's turn can be started."
                )
        else:
            before, after = tokenizer.bos_token or tokenizer.eos_token or "", ""
        tokenizer.chat_template = "{{ messages[0]['content'] }}"
        steered, chat = copy.copy(self), copy.copy(self.chat)
        steered.chat, chat.tokenizer = chat, tokenizer
        stop = after.strip() or after
        return UserTurn(steered, [{"role": "user", "content": before}], (stop,) if stop else ())

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
        budget = max(1, min(self.chat.batch_tokens, _LOGITS // model.config.get_text_config().vocab_size))
        with evaluation_mode(model):
            for batch in pack([len(piece) for piece in pieces], budget):
                # Padding stands on the right, where causal attention does not see it, so no mask is needed.
                padded = torch.zeros(len(batch), len(pieces[batch[0]]), dtype=torch.long)
                for place, i in enumerate(batch):
                    padded[place, : len(pieces[i])] = torch.tensor(pieces[i])
                padded = padded.to(model.device)
                logits = model(input_ids=padded, use_cache=False).logits[:, :-1].float()
                losses = logits.logsumexp(-1) - logits.gather(-1, padded[:, 1:, None])[..., 0]
                losses = losses.double().cpu()
                for place, i in enumerate(batch):
                    perplexities[i] = losses[place, len(bos) : len(pieces[i]) - 1].mean().exp()
        return perplexities

    def _checked(self, n: int, features: Sequence[int], strengths: Sequence[float]) -> list[tuple[int, float]]:
        for name, values in (("features", features), ("strengths", strengths)):
            if len(values) != n:
                raise ValueError(f"{name} has {len(values)} entries for {n} conversations; give one for each.")
        ids = check_feature_ids(features, self.sae.cfg.d_sae, may_be_empty=True, may_repeat=True).tolist()
        for index, strength in enumerate(strengths):
            if not 0 <= strength < math.inf:
                raise ValueError(
                    f"Conversation {index} asks for the strength {strength}; it must be a number from 0 up, in units "
                    "of mean_norm (0.5 is usual)."
                )
        return list(zip(ids, map(float, strengths), strict=True))

    def _vectors(self, tags: list[tuple[int, float]]) -> Tensor:
        """The vector added for each tag, and a row of zeros: [n + 1, d_in]."""
        model, d_in = self.chat.model, self.sae.cfg.d_in
        features = [feature for feature, _ in tags]
        directions = self.sae.W_dec.detach()[features].double().cpu()
        norms = directions.norm(dim=-1, keepdim=True)
        for feature, norm in zip(features, norms[:, 0].tolist(), strict=True):
            if not 0 < norm < math.inf:
                raise ValueError(
                    f"The decoder direction of feature {feature} has the norm {norm}: there is nothing to steer "
                    "towards. Leave the feature out."
                )
        lengths = torch.tensor([strength * self.mean_norm for _, strength in tags], dtype=torch.float64)
        vectors = torch.cat([directions / norms * lengths[:, None], torch.zeros(1, d_in, dtype=torch.float64)])
        return vectors.to(model.device, model.dtype)


class _Push:
    """Added to the hidden states of a layer: vectors [rows, d_in], or nothing while prompts are read."""

    vectors: Tensor | None = None

    @contextmanager
    def by(self, vectors: Tensor) -> Iterator[None]:
        self.vectors = vectors
        try:
            yield
        finally:
            self.vectors = None

    def __call__(self, hidden: Tensor) -> Tensor | None:
        return None if self.vectors is None else hidden + self.vectors[:, None].to(hidden)
