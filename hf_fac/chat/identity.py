"""A chat's name, for records, and its identity, which tells its answers from those of other chats."""

from __future__ import annotations

import logging
import secrets
from typing import TYPE_CHECKING

from ..storage.cache import Cache, content_key
from .base import Chat
from .endpoint import EndpointChat
from .local import LocalChat

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def chat_name(chat: Chat) -> str:
    """Returns the name of the chat's model; of a caller's own chat, its class."""
    if isinstance(chat, LocalChat):
        return model_name(chat.model)
    if isinstance(chat, EndpointChat):
        return str(chat.model or chat.base_url)
    return type(chat).__name__


def model_name(model: PreTrainedModel) -> str:
    """Returns the name that the model was loaded by, or its class."""
    return model.config._name_or_path or type(model).__name__


def chat_identity(chat: Chat, cache: Cache) -> str:
    """Returns what the chat's answers are kept under in the cache, the same in all processes: a hash of the chat's own
    `identity`, of a local model's weights and tokenizer, or of a server's address and model.

    For a caller's own chat without an `identity` it is a new one in each call, so no other answers are taken for its.
    """
    if (own := getattr(chat, "identity", None)) is not None:
        return content_key("own", type(chat).__name__, own)
    if isinstance(chat, LocalChat):
        return chat.fingerprint()
    if isinstance(chat, EndpointChat):
        return content_key("endpoint", chat.model, chat.base_url, chat.continue_final_message, chat.extra_body)
    if cache.folder is not None:
        logger.warning(
            "%s has no attribute `identity`, so the answers in %s serve this call only. Give it one: a string that "
            "differs whenever model or settings would give other answers.",
            type(chat).__name__,
            cache.folder,
        )
    return cache.agree("chat", secrets.token_hex(16))
