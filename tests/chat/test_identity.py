"""Chats whose answers may differ do not share a cache's answers."""

from __future__ import annotations

from pathlib import Path

import pytest
from chats import local

from hf_fac import EndpointChat
from hf_fac.chat.identity import chat_identity
from hf_fac.storage.cache import Cache, Processes

URL = "http://127.0.0.1:1/v1"
MEMORY = Cache(None)


def test_every_setting_of_an_endpoint_that_shapes_answers_tells_it_apart() -> None:
    chats = [
        EndpointChat("m", base_url=URL),
        EndpointChat("other", base_url=URL),
        EndpointChat("m", base_url="http://127.0.0.1:2/v1"),
        EndpointChat("m", base_url=URL, continue_final_message=True),
        EndpointChat("m", base_url=URL, extra_body={"top_k": 5}),
    ]
    assert len({chat_identity(chat, MEMORY) for chat in chats}) == len(chats)
    same = EndpointChat("m", base_url=URL, max_concurrency=2)
    assert chat_identity(chats[0], MEMORY) == chat_identity(same, MEMORY)


def test_every_setting_of_a_local_chat_that_shapes_answers_tells_it_apart() -> None:
    chats = [local(), local("gpt2"), local(chat_template_kwargs={"enable_thinking": False})]
    assert len({chat_identity(chat, MEMORY) for chat in chats}) == len(chats)
    assert chat_identity(chats[0], MEMORY) == chat_identity(local(batch_size=2), MEMORY)


class OwnChat:
    def __init__(self, identity: str | None = None) -> None:
        if identity is not None:
            self.identity = identity


def test_a_callers_own_chat_is_told_apart_by_the_identity_it_names() -> None:
    hot, cold, again = (chat_identity(OwnChat(name), MEMORY) for name in ("hot", "cold", "hot"))
    assert hot == again != cold


def test_a_callers_own_chat_without_an_identity_shares_nothing_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chat = OwnChat()
    assert chat_identity(chat, MEMORY) != chat_identity(chat, MEMORY)
    assert not caplog.text
    one, two = (chat_identity(chat, Cache(tmp_path, Processes(rank, 2, "run"))) for rank in range(2))
    assert one == two, "processes read one another's answers"
    assert "OwnChat has no attribute `identity`" in caplog.text
