"""A server over the wire: a flaky one gives the answers of a healthy one, nothing is paid for twice, no key is seen."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from chats import TOKENIZERS, generating_model, user
from flaky_server import FAULTS, FlakyServer, SlowServer

import hf_fac.chat.endpoint
from hf_fac.chat.endpoint import ChatError, EndpointChat
from hf_fac.chat.local import LocalChat
from hf_fac.chat.server import Server

QUICK_FAULTS = tuple(fault for fault in FAULTS if fault not in ("hang", "drip"))
KEY = "sk-thisKeyMustNotBeSeenAnywhere"
CONVERSATIONS = user(*(f"question {k}" for k in range(60)))


@pytest.fixture(autouse=True)
def no_proxy_and_short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(hf_fac.chat.endpoint, "FIRST_WAIT_S", 0.01)


def endpoint(server: FlakyServer, **options: Any) -> EndpointChat:
    return EndpointChat("m", base_url=server.url, **{"timeout": 30.0, **options})


def test_a_flaky_server_gives_what_a_healthy_one_gives() -> None:
    with FlakyServer() as server:
        healthy = endpoint(server).complete(CONVERSATIONS[:40], n=4, max_tokens=9)
    assert {answer.finish for answers in healthy for answer in answers} == {"stop", "length"}
    with FlakyServer(rate=0.3, faults=QUICK_FAULTS) as server:
        chat = endpoint(server, attempts=12)
        assert chat.complete(CONVERSATIONS[:40], n=4, max_tokens=9) == healthy
    assert len(server.failed) > 12
    assert set(server.paid.values()) == {1}
    assert len(server.paid) == 160
    assert chat.spent.requests == server.came.total() == 160 + server.failed.total()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that_only_fails_is_a_failure_with_a_reason(fault: str) -> None:
    with FlakyServer(rate=1, faults=(fault,), hang=1) as server:
        chat = endpoint(server, attempts=2, timeout=0.2)
        [[answer]] = chat.complete(user("hello"))
    assert answer.finish == "failed"
    assert answer.text == ""
    assert "attempts: 2" in answer.error
    assert server.came.total() == 2
    assert chat.spent.failed == 1


def test_a_server_that_is_gone_is_soon_not_asked_any_more() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        chat = EndpointChat("m", base_url=f"http://127.0.0.1:{unused.getsockname()[1]}/v1", attempts=2)
        with pytest.raises(ChatError, match="requests in a row") as raised:
            chat.complete(CONVERSATIONS)
    assert {answer.finish for [answer] in raised.value.completions} == {"failed", "not_asked"}
    assert chat.spent.requests < 50


@pytest.mark.parametrize("fault", ["hang", "drip"])
def test_a_server_that_never_answers_ends_the_run_after_a_few_timeouts(
    fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    with FlakyServer(rate=1, faults=(fault,), hang=1) as server:
        chat = endpoint(server, timeout=0.2, max_concurrency=4)
        start = time.monotonic()
        with pytest.raises(ChatError, match=r"did not answer within 0\.2 s, 3 times in a row") as raised:
            chat.complete(CONVERSATIONS)
        assert time.monotonic() - start < 5
    assert len(raised.value.completions) == 60
    assert chat.spent.requests <= 3 * 4
    first = caplog.records[0]
    assert first.levelname == "WARNING", "the first failure is told at once"
    assert first.message.startswith("The server did not answer within 0.2 s; again in")


@pytest.mark.parametrize(
    ("status", "todo"), [(401, "token="), (402, "credit"), (403, "may not"), (404, "/v1"), (405, "base_url")]
)
def test_an_error_of_every_request_ends_the_run_and_keeps_the_answers(status: int, todo: str, tmp_path: Path) -> None:
    conversations = user("one", "two", "three", "bad", "four", "five")
    with FlakyServer(statuses={"bad": status}) as server:
        chat = endpoint(server, max_concurrency=1, cache_dir=tmp_path)
        with pytest.raises(ChatError, match=f"{status} .*{todo}") as raised:
            chat.complete(conversations)
        assert chat.spent.requests == 4  # and not one more, nor the refused one again
        finishes = [answer.finish for [answer] in raised.value.completions]
        assert finishes == ["stop"] * 3 + ["not_asked"] * 3
        assert [answer.text for [answer] in chat.complete(conversations[:3])] == [
            answer.text for [answer] in raised.value.completions[:3]
        ]
        assert chat.spent.requests == 4


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_request_fails_alone_and_is_not_repeated(status: int) -> None:
    with FlakyServer(statuses={"bad": status}) as server:
        chat = endpoint(server)
        [[good], [bad], [fine]] = chat.complete(user("good", "bad", "fine"))
    assert (good.finish, bad.finish, fine.finish) == ("stop", "failed", "stop")
    assert str(status) in bad.error
    assert f"the server says {status}" in bad.error
    assert chat.spent.requests == 3


@pytest.mark.parametrize(
    ("choice", "reason"),
    [
        ({"message": {"role": "assistant", "content": ""}}, "no text"),
        ({"message": {"role": "assistant", "content": None}, "finish_reason": "length"}, "raise max_tokens"),
        ({"message": {"role": "assistant", "content": None, "refusal": "I cannot"}}, "refused: I cannot"),
        ({"message": {"role": "assistant", "content": "half"}, "finish_reason": "content_filter"}, "content filter"),
    ],
)
def test_an_answer_without_text_fails_and_is_not_paid_for_again(choice: dict, reason: str, tmp_path: Path) -> None:
    with FlakyServer(messages={"odd": choice}) as server:
        for _ in range(2):
            [[answer]] = endpoint(server, cache_dir=tmp_path).complete(user("odd"))
            assert (answer.text, answer.finish) == ("", "failed")
            assert reason in answer.error
            assert answer.completion_tokens > 0
        assert server.came.total() == 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("x" * 2_000, "2,000 characters, more than max_tokens=5 can hold"),
        ("x" * 2_000_000, "larger than 1,053,696 bytes"),
    ],
)
def test_an_answer_is_no_longer_than_max_tokens_allows(content: str, reason: str) -> None:
    with FlakyServer(messages={"long": {"message": {"role": "assistant", "content": content}}}) as server:
        [[answer]] = endpoint(server).complete(user("long"), max_tokens=5)
    assert (answer.finish, answer.text) == ("failed", "")
    assert reason in answer.error


@pytest.mark.parametrize("tokens", [-5, 10**12, "many", None])
def test_token_counts_that_cannot_be_are_estimated(tokens: Any) -> None:
    content = {"message": {"role": "assistant", "content": "x" * 40}}
    with FlakyServer(
        usage={"prompt_tokens": tokens, "completion_tokens": tokens}, messages={"y" * 80: content}
    ) as server:
        chat = endpoint(server)
        [[answer]] = chat.complete(user("y" * 80))
    assert (answer.finish, answer.prompt_tokens, answer.completion_tokens) == ("stop", 0, 0)
    assert (chat.spent.prompt_tokens, chat.spent.completion_tokens) == (20, 10)


def test_a_redirect_is_refused() -> None:
    with FlakyServer() as other, FlakyServer(redirect=f"{other.url}/chat/completions") as server:
        with pytest.raises(ChatError, match=f"307 .to {other.url}/.*Redirects are not followed"):
            endpoint(server, token=KEY).complete(user("hello"))
        assert not other.keys


def test_a_server_of_ones_own_is_asked_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with FlakyServer() as server:
        assert endpoint(server).complete(user("hello"))[0][0].finish == "stop"
    with pytest.raises(ChatError, match="HF_HUB_OFFLINE is set"):
        EndpointChat("org/m:together", token="hf_x").complete(user("hello"))


def test_requests_run_at_once_up_to_the_limit() -> None:
    with SlowServer() as server:
        asked = threading.Thread(target=endpoint(server, max_concurrency=5).complete, args=(CONVERSATIONS[:12],))
        asked.start()
        for _ in range(5):
            assert server.waiting.acquire(timeout=60)
        server.open.set()
        asked.join()
    assert server.most_at_once == 5


def test_it_can_be_called_where_an_event_loop_runs() -> None:
    async def notebook(chat: EndpointChat) -> list:
        return chat.complete(CONVERSATIONS[:3])

    with FlakyServer() as server:
        assert [answer.finish for [answer] in asyncio.run(notebook(endpoint(server)))] == ["stop"] * 3


def test_answers_in_the_cache_are_not_asked_for_again(tmp_path: Path) -> None:
    with FlakyServer() as server:

        def ask(conversations: list = CONVERSATIONS[:5], *, chat: dict | None = None, **options: Any) -> list:
            settings = {"n": 2, **options}
            return endpoint(server, cache_dir=tmp_path, **(chat or {})).complete(conversations, **settings)

        first = ask()
        assert server.came.total() == 10
        assert ask() == first
        assert ask(CONVERSATIONS[4:0:-1]) == first[4:0:-1]
        assert ask(n=1) == [answers[:1] for answers in first]
        assert server.came.total() == 10
        ask(n=3)
        assert server.came.total() == 15
        # Everything that shapes an answer makes it another one.
        for number, other in enumerate(
            [
                {"temperature": 0.7},
                {"top_p": 0.8},
                {"max_tokens": 99},
                {"seed": 40},
                {"stop": ["."]},
                {"prefill": ["The"]},
                {"chat": {"extra_body": {"repetition_penalty": 1.1}}},
            ]
        ):
            ask(CONVERSATIONS[:1], **other)
            assert server.came.total() == 15 + 2 * (number + 1)
        # The same conversation twice in one call is one request.
        came = server.came.total()
        assert len(set(map(tuple, ask(user("new", "new"))))) == 1
        assert server.came.total() == came + 2


def test_a_pause_that_the_server_asks_for_is_made_by_all_requests() -> None:
    with FlakyServer(rate=1, faults=("429 with Retry-After",)) as server:
        server.retry_after = "0.3"
        start = time.monotonic()
        [[one], [two]] = endpoint(server, attempts=2, max_concurrency=2).complete(user("one", "two"))
        assert 0.3 <= time.monotonic() - start < 30
        assert "429" in one.error
        assert "attempts: 2" in two.error
        server.retry_after = "4000"
        [[answer]] = endpoint(server).complete(user("hello"))
        assert "attempts: 1" in answer.error
        assert "asks to wait 4,000 s, longer than 300 s" in answer.error


@pytest.mark.parametrize("waits", [True, False])
def test_ctrl_c_waits_for_requests_already_sent_and_a_second_one_does_not(waits: bool, tmp_path: Path) -> None:
    script = (
        "import sys; from hf_fac.chat.endpoint import EndpointChat;"
        "chat = EndpointChat('m', base_url=sys.argv[1], cache_dir=sys.argv[2], max_concurrency=3);"
        "chat.complete([[{'role': 'user', 'content': f'question {k}'}] for k in range(60)], max_tokens=9)"
    )
    with SlowServer() as server:
        child = subprocess.Popen(
            [sys.executable, "-c", script, server.url, str(tmp_path)], stderr=subprocess.PIPE, text=True
        )
        for _ in range(3):
            assert server.waiting.acquire(timeout=60)
        child.send_signal(signal.SIGINT)
        said = child.stderr.readline()
        assert said.startswith("Interrupted: waiting for the replies to 3 requests, at most 120 s")
        if waits:
            server.open.set()
        else:
            child.send_signal(signal.SIGINT)
        assert child.stderr.read().rstrip().endswith("KeyboardInterrupt")
        assert child.wait(timeout=20) != 0
        server.open.set()
        chat = endpoint(server, cache_dir=tmp_path)
        chat.complete(CONVERSATIONS, max_tokens=9, top_p=0.9)
        assert chat.spent.from_cache == (3 if waits else 0)


def test_after_kill_9_nothing_is_paid_for_twice(tmp_path: Path) -> None:
    script = (
        "import sys; import hf_fac.chat.endpoint as e; from hf_fac import EndpointChat; e.FIRST_WAIT_S = 0.01;"
        "options = {'cache_dir': sys.argv[2], 'max_concurrency': 4, 'attempts': 12};"
        "chat = EndpointChat('m', base_url=sys.argv[1], **options);"
        "chat.complete([[{'role': 'user', 'content': f'question {k}'}] for k in range(60)], n=2, max_tokens=9)"
    )
    with FlakyServer(rate=0.3, faults=QUICK_FAULTS) as server:
        for _ in range(2):
            child = subprocess.Popen(
                [sys.executable, "-c", script, server.url, str(tmp_path)], stderr=subprocess.DEVNULL
            )
            for _ in range(25):
                assert server.answered.acquire(timeout=60)
            child.kill()
            assert child.wait() == -signal.SIGKILL, "it ended before it was killed"
        chat = endpoint(server, cache_dir=tmp_path, attempts=12, max_concurrency=4)
        answers = chat.complete(CONVERSATIONS, n=2, max_tokens=9)
    assert chat.spent.from_cache >= 2 * (25 - 4)
    # Only the requests in flight when it was killed can have been paid for and lost: 4 each time.
    assert server.paid.total() <= 120 + 2 * 4
    assert len(server.paid) == 120
    with FlakyServer() as healthy:
        assert endpoint(healthy).complete(CONVERSATIONS, n=2, max_tokens=9) == answers


def test_a_bound_stops_spending_and_keeps_the_answers(caplog: pytest.LogCaptureFixture) -> None:
    with FlakyServer() as server:
        chat = endpoint(server, max_tokens_total=50, max_concurrency=2)
        answers = [answer for [answer] in chat.complete(CONVERSATIONS)]
        bought = [answer for answer in answers if answer.finish != "not_asked"]
        used = sum(answer.prompt_tokens + answer.completion_tokens for answer in bought)
        assert used == chat.spent.prompt_tokens + chat.spent.completion_tokens
        assert 50 <= used <= 50 + 2 * 14
        assert server.came.total() == len(bought) == chat.spent.requests
        assert f"{60 - len(bought)} of 60 completions failed; the first: max_tokens_total is 50" in caplog.text
    with FlakyServer(usage=False) as server:  # a server that does not count
        chat = endpoint(server, max_tokens_total=50, max_concurrency=1)
        answers = [answer for [answer] in chat.complete(CONVERSATIONS)]
        assert 0 < sum(answer.finish == "stop" for answer in answers) < 30
        assert {answer.completion_tokens for answer in answers} == {0}


def test_the_key_is_in_no_file_log_repr_or_message(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    said: list[str] = []
    with FlakyServer(
        key=KEY, rate=0.3, faults=QUICK_FAULTS, statuses={"bad": 422, "worse": 403, "busy": 503}
    ) as server:
        chat = endpoint(server, token=KEY, cache_dir=tmp_path, attempts=12)
        chat.complete(CONVERSATIONS[:20])
        assert set(server.keys) == {f"Bearer {KEY}"}
        # This server repeats the key in what it answers.
        said += [str(chat.complete(user("bad")))]
        said += [str(endpoint(server, token=KEY, attempts=2).complete(user("busy")))]
        for conversation, token in (("worse", KEY), ("hello", KEY + "x")):
            with pytest.raises(ChatError) as raised:
                endpoint(server, token=token, attempts=2).complete(user(conversation))
            said += [str(raised.value), repr(raised.value), str(raised.getrepr(style="native"))]
    said += [repr(chat), str(chat), repr(chat.spent), caplog.text]
    said += [file.read_bytes().decode(errors="replace") for file in tmp_path.rglob("*") if file.is_file()]
    assert all("***" in text for text in said[:3])
    assert not any(KEY in text for text in said)


def test_a_key_in_an_answer_is_masked(tmp_path: Path) -> None:
    content = {"message": {"role": "assistant", "content": f"You sent {KEY}."}}
    refusal = {"message": {"role": "assistant", "content": None, "refusal": f"Not for {KEY}"}}
    with FlakyServer(messages={"one": content, "two": refusal}) as server:
        [[one], [two]] = endpoint(server, token=KEY, cache_dir=tmp_path).complete(user("one", "two"))
    assert one.text == "You sent ***."
    assert two.error == "The model refused: Not for ***"
    assert not any(KEY.encode() in file.read_bytes() for file in tmp_path.iterdir())


@pytest.mark.parametrize("token", [f"{KEY}\n", f"  {KEY}\r\n\t"])
def test_white_space_around_a_key_is_not_sent(token: str) -> None:
    with FlakyServer(key=KEY) as server:
        assert endpoint(server, token=token).complete(user("hello"))[0][0].finish == "stop"


@pytest.mark.parametrize("inside", ["\n", " ", "é"])
def test_a_key_that_cannot_be_one_is_refused_and_not_shown(inside: str) -> None:
    with pytest.raises(ValueError, match="copy it again") as raised:
        EndpointChat("m", base_url="http://127.0.0.1:9/v1", token=KEY + inside + KEY)
    assert KEY not in "".join(traceback.format_exception(raised.value))


SAVED = "hf_savedTokenOfTheHub00000000000000000"


class Recorder(ThreadingHTTPServer):
    """A server and a proxy for every other: keeps what came, and answers with refusals."""

    def __init__(self) -> None:
        self.came: list[tuple[str, str]] = []
        came = self.came

        class Handler(BaseHTTPRequestHandler):
            def refuse(self) -> None:
                came.append((self.requestline, str(self.headers)))
                self.send_error(400)

            do_GET = do_HEAD = do_POST = do_CONNECT = refuse

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)

    def __enter__(self) -> Recorder:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


ASK_EVERYWHERE = """
import sys
from hf_fac.chat.endpoint import ChatError, EndpointChat
port, saved = sys.argv[1:]
here = f"127.0.0.1:{port}"
hosts = [here, f"localhost:{port}", "huggingface.co", "x.huggingface.cloud", "huggingface.co.example.com",
         "nothuggingface.co", "huggingface.co.", "me.hf.space", "huggingface.co:80", f"huggingface.co@{here}",
         f"{here}/huggingface.co", f"{here}#.huggingface.co", f"{here}\\.huggingface.co"]
addresses = [f"http://{host}/v1" for host in hosts]
wheres = [{"base_url": one} for one in addresses] + [{"model": one} for one in addresses[:3]]
wheres += [{"model": one} for one in ("org/m", "org/m:together", f"org/m:http://{here}")]
for where in wheres:
    for token in (None, "", " ", "\\n", "\\t \\n"):
        try:
            chat = EndpointChat(**{"model": "org/m", **where}, token=token, attempts=1, timeout=20)
            chat.complete([[{"role": "user", "content": "hello"}]])
        except (ValueError, ChatError) as error:
            assert saved not in str(error)
"""


@pytest.mark.parametrize("place", ["HF_TOKEN", "file"])
def test_the_saved_hub_token_goes_to_no_other_host(place: str, tmp_path: Path) -> None:
    with Recorder() as recorder:
        here = f"http://127.0.0.1:{recorder.server_port}"
        environment = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
        environment |= {"HF_HOME": str(tmp_path), "HF_ENDPOINT": here, "HF_INFERENCE_ENDPOINT": here}
        # What is for other hosts comes here too, readable where it is not encrypted.
        environment |= {"HTTP_PROXY": here, "HTTPS_PROXY": here, "NO_PROXY": "127.0.0.1,localhost"}
        environment |= {"HF_HUB_OFFLINE": "0"}
        environment |= {} if place == "file" else {place: SAVED}
        if place == "file":
            (tmp_path / "token").write_text(SAVED + "\n")
        command = [sys.executable, "-c", ASK_EVERYWHERE, str(recorder.server_port), SAVED]
        subprocess.run(command, check=True, env=environment, capture_output=True, timeout=120)
    lines = [line for line, _ in recorder.came]
    assert lines.count("POST /v1/chat/completions HTTP/1.1") >= 10
    assert lines.count("CONNECT router.huggingface.co:443 HTTP/1.1") == 2 * 5
    assert {line.split()[1] for line in lines if line.startswith("CONNECT")} == {"router.huggingface.co:443"}
    assert any("example.com" in line for line in lines)
    assert not [line for line, headers in recorder.came if "authorization" in headers.lower() or SAVED in headers]


@pytest.mark.parametrize(
    ("address", "gets_it"),
    [
        ("https://router.huggingface.co/v1", True),
        ("https://HUGGINGFACE.co/v1", True),
        ("https://x.us-east-1.endpoints.huggingface.cloud/v1", True),
        ("http://router.huggingface.co/v1", False),
        ("https://huggingface.co.example.com/v1", False),
        ("https://nothuggingface.co/v1", False),
        ("https://me.hf.space/v1", False),
        ("https://127.0.0.1/huggingface.co", False),
    ],
)
def test_the_saved_hub_token_is_for_the_hubs_own_hosts(
    address: str, gets_it: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", SAVED)
    for token in (None, "", " \n"):
        headers = Server("a chat", address, token, timeout=1).client().headers
        assert headers.get("Authorization") == (f"Bearer {SAVED}" if gets_it else None)
    given = Server("a chat", address, KEY, timeout=1).client().headers
    assert given["Authorization"] == f"Bearer {KEY}"


def test_settings_that_do_not_fit_are_refused_without_repeating_a_key() -> None:
    for options, said in (
        ({}, "Give a model"),
        ({"base_url": "h:8000"}, "begin with http"),
        ({"base_url": " "}, "begin with http"),
        ({"base_url": f"http://user:{KEY}@h/v1"}, "Pass a key as token"),
        ({"base_url": f"http://h/v1?key={KEY}"}, "Pass a key as token"),
        ({"model": "m", "max_concurrency": 0}, "max_concurrency is 0; .* from 1 up"),
        ({"model": "m", "timeout": 0}, "above 0 seconds"),
        ({"model": "http://h/v1"}, "give it as base_url"),
        ({"base_url": "http://h\x1b/v1"}, "no address"),
        ({"model": "m:together", "token": KEY}, "provider's address as base_url"),
    ):
        with pytest.raises(ValueError, match=said) as raised:
            EndpointChat(**options)
        assert KEY not in str(raised.value)


def test_a_prefill_is_sent_and_removed_from_an_answer_that_repeats_it() -> None:
    asked: list[dict] = []
    with FlakyServer(
        messages={"1. A": {"message": {"role": "assistant", "content": "1. A stone. END of it"}}}
    ) as server:
        [[repeated]] = endpoint(server).complete(user("list"), prefill=["1. A"], stop=["END"])
        [[kept]] = endpoint(server, continue_final_message=True).complete(user("list"), prefill=["1. A"])
        asked = [json.loads(body) for body in server.came]
    assert repeated.text == " stone. "
    assert kept.text == "1. A stone. END of it"
    assert all(body["messages"][-1] == {"role": "assistant", "content": "1. A"} for body in asked)
    assert [body.get("continue_final_message") for body in asked] == [None, True]
    assert [body.get("stop") for body in asked] == [["END"], None]


def test_text_that_cannot_be_sent_fails_alone() -> None:
    with FlakyServer() as server:
        [[good], [bad]] = endpoint(server).complete(user("good", "half a pair \ud800"))
    assert good.finish == "stop"
    assert "UTF-8" in bad.error


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_transformers_serve_answers_over_the_wire(tmp_path: Path) -> None:
    model = generating_model("llama").float()
    model.generation_config.update(do_sample=True, eos_token_id=2, pad_token_id=0, top_k=0, min_new_tokens=4)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    TOKENIZERS["llama"].save_pretrained(folder)
    port = free_port()
    command = ["-c", "from transformers.cli.transformers import main; main()", "serve", str(folder), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with open(tmp_path / "log", "wb") as log:
        server = subprocess.Popen(
            [sys.executable, *command, "--port", str(port), "--host", "127.0.0.1"],
            stdout=log,
            stderr=log,
            env=environment,
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, tmp_path / "log")
        chat = EndpointChat(
            str(folder), base_url=f"http://127.0.0.1:{port}/v1", cache_dir=tmp_path / "answers", timeout=30
        )
        answers = chat.complete(user("hello", "What is salt?"), n=4, max_tokens=12, temperature=1.0)
        for of_one in answers:
            texts = {answer.text for answer in of_one if answer.finish != "failed"}
            assert len(texts) >= 3
        assert all(answer.error is None or "no text" in answer.error for of_one in answers for answer in of_one)
        assert all(0 < answer.completion_tokens <= 12 for of_one in answers for answer in of_one)
        assert chat.complete(user("hello", "What is salt?"), n=4, max_tokens=12, temperature=1.0) == answers
        assert chat.spent.requests == 8
        greedy = [answers[0] for answers in chat.complete(user("hello"), n=2, max_tokens=12, temperature=0)]
        [[expected]] = LocalChat(model, TOKENIZERS["llama"]).complete(user("hello"), max_tokens=12, temperature=0)
        assert greedy[0].text == expected.text
        with pytest.raises(ChatError, match="/v1"):
            EndpointChat(str(folder), base_url=f"http://127.0.0.1:{port}/v2").complete(user("hello"))
    finally:
        server.kill()
        server.wait()


def wait_for(url: str, server: subprocess.Popen, log: Path) -> None:
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).read()
            return
        except OSError:
            assert server.poll() is None, log.read_text()[-2000:]
            time.sleep(0.1)
