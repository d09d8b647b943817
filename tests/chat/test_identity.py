"""Chats whose answers may differ do not share a cache's answers."""

from __future__ import annotations

from hf_fac import EndpointChat
from hf_fac.chat.identity import chat_identity

URL = "http://127.0.0.1:1/v1"


def test_every_setting_of_an_endpoint_that_shapes_answers_tells_it_apart() -> None:
    chats = [
        EndpointChat("m", base_url=URL),
        EndpointChat("other", base_url=URL),
        EndpointChat("m", base_url="http://127.0.0.1:2/v1"),
        EndpointChat("m", base_url=URL, continue_final_message=True),
        EndpointChat("m", base_url=URL, extra_body={"top_k": 5}),
    ]
    assert len({chat_identity(chat) for chat in chats}) == len(chats)
    assert chat_identity(chats[0]) == chat_identity(EndpointChat("m", base_url=URL, max_concurrency=2))
