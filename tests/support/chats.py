"""Tiny models that generate, the chats made of them, and what several tests ask of a chat."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tiny import byte_level_tokenizer, gpt2_tokenizer, metaspace_tokenizer
from tiny_models import tiny_model
from transformers import PreTrainedModel

from hf_fac.chat.local import LocalChat

TOKENIZERS = {"llama": byte_level_tokenizer(), "gemma2": metaspace_tokenizer(), "gpt2": gpt2_tokenizer()}
CONTEXT = 256  # positions of every model


def generating_model(family: str) -> PreTrainedModel:
    """In float64, so that the order of a sum cannot change a token; every twentieth id ends a text."""
    size = len(TOKENIZERS[family])
    model = tiny_model(family, vocab_size=size, bos_token_id=0, eos_token_id=2, tie_word_embeddings=False).double()
    model.generation_config.eos_token_id = list(range(3, size, 20))
    return model


MODELS = {family: generating_model(family) for family in TOKENIZERS}


def local(family: str = "llama", **options: Any) -> LocalChat:
    return LocalChat(MODELS[family], TOKENIZERS[family], **options)


def user(*contents: str) -> list[list[dict]]:
    """Conversations of one message each."""
    return [[{"role": "user", "content": content}] for content in contents]


@contextmanager
def watched(model: PreTrainedModel) -> Iterator[list[tuple[int, int]]]:
    """The shape of the ids of every forward pass."""
    shapes: list[tuple[int, int]] = []
    handle = model.register_forward_pre_hook(
        lambda _m, _args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        yield shapes
    finally:
        handle.remove()
