"""A chat-completions server on 127.0.0.1 for tests, with the standard library only, that fails in every way servers do.

Its answers depend on the request only, so a flaky run can be compared with a healthy one; what fails, and how, depends
on the request and how often it came.
"""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import threading
import time
from collections import Counter
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random
from typing import Any

FAULTS = (
    "429",
    "429 with Retry-After",
    "429 with a date",
    "500",
    "500 with a list",
    "502",
    "503",
    "reset before",
    "reset in the middle",
    "hang",
    "drip",
    "half a JSON",
    "HTML",
    "not UTF-8",
    "wrong shape",
    "no choices",
    "an error with 200",
    "content is a number",
    "no body",
)
WORDS = ("river", "hill", "stone", "bread", "window", "letter", "north", "winter", "copper", "garden")


class FlakyServer:
    """A context manager. A share `rate` of the requests fails, each fault as often as the others.

    Args:
        key: the bearer token required; None requires none.
        hang: seconds before a reply that hangs is reset.
        statuses: the status of every reply to a request whose last message has this content.
        messages: the choice in every such reply.
        usage: the usage in every reply; True for the right figures, False for none.
        redirect: the address to which every request is redirected.
    """

    def __init__(
        self,
        *,
        rate: float = 0.0,
        faults: tuple[str, ...] = FAULTS,
        key: str | None = None,
        hang: float = 5.0,
        statuses: dict[str, int] | None = None,
        messages: dict[str, dict[str, Any]] | None = None,
        usage: Any = True,
        redirect: str | None = None,
    ):
        self.rate, self.faults, self.key, self.hang = rate, faults, key, hang
        self.statuses, self.messages, self.usage = statuses or {}, messages or {}, usage
        self.retry_after, self.redirect = "0", redirect
        self.came: Counter[str] = Counter()  # requests, by body
        self.paid: Counter[str] = Counter()  # replies without a fault, by body
        self.failed: Counter[str] = Counter()  # replies with a fault, by fault
        self.keys: list[str | None] = []  # the Authorization of every request
        self.most_at_once = self.at_once = 0
        self.answered = threading.Semaphore(0)  # released once for each reply without a fault
        self.lock = threading.Lock()
        flaky = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                with flaky.lock:
                    flaky.keys.append(self.headers.get("Authorization"))
                    flaky.at_once += 1
                    flaky.most_at_once = max(flaky.most_at_once, flaky.at_once)
                try:
                    flaky.answer(self, body)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True
                finally:
                    with flaky.lock:
                        flaky.at_once -= 1

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def __enter__(self) -> FlakyServer:
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    def answer(self, call: BaseHTTPRequestHandler, body: bytes) -> None:
        authorization = call.headers.get("Authorization")
        if call.path != "/v1/chat/completions":
            return send(call, 404, {"detail": "Not Found"})
        if self.key is not None and authorization != f"Bearer {self.key}":
            return send(call, 401, {"error": {"message": f"Incorrect API key provided: {authorization}"}})
        asked = json.loads(body)
        if status := self.statuses.get(asked["messages"][-1]["content"]):
            return send(call, status, {"error": {"message": f"the server says {status} to {authorization}"}})
        if self.redirect:
            return send(call, 307, b"", Location=self.redirect)
        name = json.dumps(asked, sort_keys=True)
        with self.lock:
            self.came[name] += 1
            luck = Random(f"{self.came[name]} {name}")
        if luck.random() < self.rate:
            fault = luck.choice(self.faults)
            with self.lock:
                self.failed[fault] += 1
            return self.fail(call, fault, self.proper(asked))
        send(call, 200, self.proper(asked))
        with self.lock:
            self.paid[name] += 1
        self.answered.release()

    def proper(self, asked: dict[str, Any]) -> dict[str, Any]:
        luck = Random(hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest())
        words = [luck.choice(WORDS) for _ in range(luck.randint(1, 12))]
        cut = len(words) > asked["max_tokens"]
        words = words[: asked["max_tokens"]]
        choice = {
            "message": {"role": "assistant", "content": " ".join(words)},
            "finish_reason": "length" if cut else "stop",
        }
        choice = {"index": 0, **choice, **self.messages.get(asked["messages"][-1]["content"], {})}
        read = sum(len(message["content"].split()) for message in asked["messages"])
        usage = {"prompt_tokens": read, "completion_tokens": len(words), "total_tokens": read + len(words)}
        reply = {"id": "1", "object": "chat.completion", "created": 0, "model": asked["model"], "choices": [choice]}
        return {**reply, "usage": usage if self.usage is True else self.usage} if self.usage else reply

    def fail(self, call: BaseHTTPRequestHandler, fault: str, proper: dict[str, Any]) -> None:
        whole = json.dumps(proper).encode()
        match fault:
            case "429":
                send(call, 429, {"error": {"message": "slow down"}})
            case "429 with Retry-After":
                send(call, 429, {"error": "slow down"}, **{"Retry-After": self.retry_after})
            case "429 with a date":
                send(call, 429, {"error": "slow down"}, **{"Retry-After": formatdate(usegmt=True)})
            case "500" | "502" | "503":
                send(call, int(fault), b"<html><body>Bad Gateway</body></html>", kind="text/html")
            case "500 with a list":
                send(call, 500, ["it", "broke"])
            case "reset before":
                reset(call)
            case "reset in the middle":
                head(call, 200, len(whole))
                call.wfile.write(whole[: len(whole) // 2])
                call.wfile.flush()
                reset(call)
            case "hang":
                time.sleep(self.hang)
                reset(call)
            case "drip":
                for _ in range(int(self.hang / 0.05)):
                    call.wfile.write(b"H" if call.close_connection else b"HTTP/1.1 200 OK\r\nX-Drip: ")
                    call.close_connection = True
                    time.sleep(0.05)
            case "half a JSON":
                send(call, 200, whole[: len(whole) // 2])
            case "HTML":
                send(call, 200, b"<html><body>Please log in</body></html>", kind="text/html")
            case "not UTF-8":
                send(call, 200, b'{"choices": "\xff\xfe"}')
            case "wrong shape":
                send(call, 200, [{"generated_text": "something"}])
            case "no choices":
                send(call, 200, {**proper, "choices": []})
            case "an error with 200":
                send(call, 200, {"error": {"message": "overloaded", "code": 529}})
            case "content is a number":
                send(call, 200, {**proper, "choices": [{"message": {"role": "assistant", "content": 7}}]})
            case "echo":
                send(call, 422, {"error": {"message": f"the server says {call.headers['Authorization']}"}})
            case "no body":
                send(call, 200, b"")


class SlowServer(FlakyServer):
    """Replies to nothing until `open` is set; `waiting` is released once for each request received."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.waiting = threading.Event(), threading.Semaphore(0)

    def answer(self, *call: Any) -> None:
        self.waiting.release()
        self.open.wait()
        super().answer(*call)


def head(
    call: BaseHTTPRequestHandler, status: int, length: int, kind: str = "application/json", **headers: str
) -> None:
    call.send_response(status)
    for name, value in {"Content-Type": kind, "Content-Length": str(length), **headers}.items():
        call.send_header(name, value)
    call.end_headers()


def send(call: BaseHTTPRequestHandler, status: int, body: Any, kind: str = "application/json", **headers: str) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head(call, status, len(data), kind, **headers)
    call.wfile.write(data)
    call.wfile.flush()


def reset(call: BaseHTTPRequestHandler) -> None:
    """Close with RST, not FIN."""
    call.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    call.rfile.close()  # it holds the socket open
    call.connection.close()
    call.close_connection = True
