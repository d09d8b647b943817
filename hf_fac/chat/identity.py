"""A chat's name, for records, and its identity, which tells its answers from those of other chats."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..storage.cache import content_key
from .base import Chat
from .endpoint import EndpointChat
from .local import LocalChat

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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


def chat_identity(chat: Chat) -> str:
    """Returns a hash of a local model's weights and tokenizer, or of a server's address and model.

    Chats of a caller's own class are told apart by the class alone: give each a cache of its own.
    """
    if isinstance(chat, LocalChat):
        return chat.fingerprint()
    if isinstance(chat, EndpointChat):
        return content_key("endpoint", chat.model, chat.base_url, chat.continue_final_message, chat.extra_body)
    return chat_name(chat)
