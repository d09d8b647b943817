"""`LocalChat`: conversations in, n completions each out, written by a causal language model of transformers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np

from ..storage.cache import content_key
from .base import Completion, before_stop, check_arguments, progress_bar

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .batch_generation import Text

_CONTEXT = 8  # tokens decoded before a text: at the very beginning a tokenizer may drop a leading space


class LocalChat:
    """A `Chat` with a causal language model of transformers, many texts in one batch.

        chat = LocalChat.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
        [[first, second]] = chat.complete([[{"role": "user", "content": "Name a river."}]], n=2, max_tokens=20)

    The model is called plainly, so hooks on its blocks work. Its mode and settings, the tokenizer's, and torch's random
    state are left as they were.

    Args:
        tokenizer: with a chat template, it renders conversations; without one (a base model) the contents of the
            messages are joined as they are.
        batch_size: texts written at the same time.
        batch_tokens: the most prompt tokens read in one forward pass; None chooses by device.
        chat_template_kwargs: passed to the chat template, `{"enable_thinking": False}` say.

    Raises: ValueError for a model with a recurrent state, which cannot be moved by rows.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = 64,
        batch_tokens: int | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ):
        from ..inputs.hidden_states import default_batch_tokens
        from .batch_generation import check_can_write

        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
        check_can_write(model)
        self.model, self.tokenizer = model, tokenizer
        self.batch_size = batch_size
        self.batch_tokens = batch_tokens or default_batch_tokens(model.device)
        self.chat_template_kwargs = dict(chat_template_kwargs or {})

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        *,
        revision: str | None = None,
        token: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str = "auto",
        trust_remote_code: bool = False,
        **settings: Any,
    ) -> LocalChat:
        """Returns a chat with the model of that Hub id or folder.

        Args:
            device: by default the GPU if there is one.
            settings: those of `LocalChat`.
        """
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        hub = {"revision": revision, "token": token, "trust_remote_code": trust_remote_code}
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        tokenizer = AutoTokenizer.from_pretrained(model, **hub)
        return cls(AutoModelForCausalLM.from_pretrained(model, dtype=dtype, **hub).to(device), tokenizer, **settings)

    def fingerprint(self) -> str:
        """Returns a hash of all that shapes the texts: the weights, the tokenizer with its template, when texts end."""
        from ..features.fingerprint import TensorHash, tokenizer_settings

        return content_key(
            TensorHash()(self.model.state_dict().items()), tokenizer_settings(self.tokenizer),
            self.chat_template_kwargs, sorted(self._ends(())),
        )  # fmt: skip

    def complete(
        self,
        conversations: Sequence[list[dict]],
        *,
        n: int = 1,
        temperature: float = 0.8,
        top_p: float = 0.9,
        max_tokens: int = 256,
        seed: int = 0,
        prefill: Sequence[str | None] | None = None,
        stop: Sequence[str] = (),
    ) -> list[list[Completion]]:
        """Returns n completions of each conversation; the arguments are those of `Chat.complete`.

        A completion depends on the seed, its number, the conversation and the prefill; on batch_size and on what
        else is asked for only as far as floating-point sums do. A text ends at the end-of-text ids of the model's
        generation config and of the tokenizer; `completion_tokens` counts that token. A prompt that fills the model's
        context fails, and a text ends there with "length".

        Raises: ValueError for an argument out of range, or a conversation that the template cannot render.
        """
        request = {"n": n, "temperature": temperature, "top_p": top_p, "max_tokens": max_tokens, "seed": seed}
        tags = [None] * len(conversations)
        return self.complete_tagged(conversations, tags, nullcontext, prefill=prefill, stop=stop, **request)

    def complete_tagged(
        self,
        conversations: Sequence[list[dict]],
        tags: Sequence[Hashable],
        stepping: Callable[[Sequence[Text | None]], AbstractContextManager[object]],
        *,
        n: int,
        temperature: float,
        top_p: float,
        max_tokens: int,
        seed: int,
        prefill: Sequence[str | None] | None,
        stop: Sequence[str],
    ) -> list[list[Completion]]:
        """Returns what `complete` does, each conversation with a tag on which its completions depend too.

        Args:
            tags: one for each conversation; its `repr` enters the random numbers, and its texts carry it.
            stepping: see `decoding.Writer`.
        """
        from .batch_generation import Text, Writer

        prefill = check_arguments(conversations, n, temperature, top_p, max_tokens, prefill, stop)
        prompts = [self._prompt(k, *pair) for k, pair in enumerate(zip(conversations, prefill, strict=True))]
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        numbers = range(n if temperature else 1)  # the likeliest text is one
        texts: dict[tuple, Text] = {}
        for prompt, tag in dict.fromkeys(zip(prompts, tags, strict=True)):
            room = max_tokens if context is None else max(0, min(max_tokens, context - len(prompt)))
            for i in numbers:
                texts[prompt, tag, i] = text = Text(prompt, _stream(seed, i, prompt, tag, room), room, tag)
                if not prompt:
                    text.end("failed", "The prompt is empty.")
                elif not room:
                    text.end("failed", f"The prompt has {len(prompt)} tokens; the model's context holds {context}.")
        waiting = [text for text in texts.values() if not text.finish]
        with progress_bar(len(waiting)) as bar:
            Writer(
                self.model,
                batch_size=self.batch_size,
                batch_tokens=self.batch_tokens,
                temperature=temperature,
                top_p=top_p,
                ends=self._ends(stop),
                has_stop=lambda text: bool(stop) and self._has_stop(text, stop),
                on_end=bar.update,
                stepping=stepping,
            ).write(waiting)
        completions = {key: self._completion(text, stop) for key, text in texts.items()}
        return [
            [completions[prompt, tag, i if temperature else 0] for i in range(n)]
            for prompt, tag in zip(prompts, tags, strict=True)
        ]

    def _prompt(self, index: int, messages: list[dict], prefill: str | None) -> tuple[int, ...]:
        if not self.tokenizer.chat_template:
            ids = self.tokenizer("".join(message["content"] for message in messages) + (prefill or ""))["input_ids"]
            # Some tokenizers end what they are given; here it goes on.
            return tuple(ids[:-1] if len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id else ids)
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **self.chat_template_kwargs
            )
        except Exception as error:  # a template is a program, and raises what it likes
            raise ValueError(f"Conversation {index} cannot be rendered by the chat template: {error}") from error
        return tuple(self.tokenizer(text + (prefill or ""), add_special_tokens=False)["input_ids"])

    def _ends(self, stop: Sequence[str]) -> set[int]:
        ends = (self.model.generation_config.eos_token_id, self.tokenizer.eos_token_id)
        # Special tokens are not part of the text, where a stop string is looked for.
        special = {i for token, i in self.tokenizer.get_added_vocab().items() if token in stop}
        return special | {i for end in ends for i in (end if isinstance(end, list) else [end]) if i is not None}

    def _has_stop(self, text: Text, stop: Sequence[str]) -> bool:
        # A character has four tokens at most (its bytes), and a new stop string ends in the newest token.
        tail = self._decoded(text, min(len(text.ids), 4 * max(map(len, stop)) + 4))
        return any(string in tail for string in stop)

    def _completion(self, text: Text, stop: Sequence[str]) -> Completion:
        written = before_stop(self._decoded(text, len(text.ids)), stop)
        return Completion(written, text.finish, text.error, len(text.prompt), len(text.ids))

    def _decoded(self, text: Text, last: int) -> str:
        """The last so many tokens of the text, as they read after those before them."""
        ids = [*text.prompt, *text.ids]
        start = len(ids) - last
        context = ids[max(0, start - _CONTEXT) : start]
        settings = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        before = self.tokenizer.decode(context, **settings)
        return self.tokenizer.decode(context + ids[start:], **settings)[len(before) :]


def _stream(seed: int, i: int, prompt: tuple[int, ...], tag: Hashable, length: int) -> np.ndarray:
    """A text's random numbers, float64 [length]."""
    name = f"{seed} {i} {prompt}" if tag is None else f"{seed} {i} {prompt} {tag!r}"
    digest = hashlib.sha256(name.encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big")).random(length)
