"""A `Chat` for tests that writes sentences of random words in the format it is asked for."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import signal
import time
from collections.abc import Collection

from tiny import CORPUS

from hf_fac.chat.base import Completion
from hf_fac.chat.endpoint import ChatError

WORDS = sorted({word.strip(".,?") for text in CORPUS[:5] for word in text.split() if word.isascii() and word.isalpha()})


def sentence(rng: random.Random, *, n: int = 9) -> str:
    return " ".join(rng.choices(WORDS, k=n)).capitalize() + "."


class WritingChat:
    """Its completions depend on conversation, prefill, seed and number only.

    Args:
        dies_after: kill the process once so many texts were written.
        wrong: the share of completions that are cut off, empty, about the request, a copy of their prompt, or failed.
        gives_up_after: raise ChatError in the call that answers the conversation of this number, with three answers.
        seconds: each call takes at least as long.
        at_most: the number of texts written; others are "not_asked".
        loses: numbers of texts, in the order asked for, that fail.

    asked: every conversation and prefill, with its seed.
    """

    identity = "random words"

    def __init__(
        self,
        *,
        dies_after: int | None = None,
        wrong: float = 0.0,
        gives_up_after: int | None = None,
        seconds: float = 0.0,
        at_most: float = float("inf"),
        loses: Collection[int] = (),
    ) -> None:
        self.dies_after, self.wrong, self.gives_up_after = dies_after, wrong, gives_up_after
        self.seconds, self.at_most, self.loses = seconds, at_most, loses
        self.asked: list[tuple[str, int]] = []
        self.texts = 0

    def complete(self, conversations, *, n=1, seed=0, prefill=None, max_tokens=256, **settings):
        done = []
        time.sleep(self.seconds)
        for number, conversation in enumerate(conversations):
            before = (prefill or [None] * len(conversations))[number]
            key = json.dumps([conversation, before])
            self.asked.append((key, seed))
            # Text i of n is the one that n=1 with seed + i asks for.
            answers = [self._answer(key, seed + i, 0, conversation[-1]["content"], before) for i in range(n)]
            done.append([self._unless_lost(answer) for answer in answers])
            if self.dies_after is not None and self.texts >= self.dies_after:
                os.kill(os.getpid(), signal.SIGKILL)
        if self.gives_up_after is not None and len(self.asked) >= self.gives_up_after:
            error = ChatError("no credit left")
            error.completions = done[:3] + [[Completion("", "not_asked", "no credit", 0, 0)]] * (len(done) - 3)
            raise error
        return done

    def _unless_lost(self, answer: Completion) -> Completion:
        if self.texts >= self.at_most:
            return Completion("", "not_asked", "max_tokens_total is reached", 0, 0)
        self.texts += 1
        return Completion("", "failed", "the server is gone", 0, 0) if self.texts - 1 in self.loses else answer

    def _answer(self, key: str, seed: int, i: int, request: str, before: str | None) -> Completion:
        digest = hashlib.sha256(f"{key} {seed} {i}".encode()).digest()
        rng = random.Random(digest)
        text = sentence(rng)
        if rng.random() < self.wrong:
            kind = rng.choice(["length", "failed", "empty", "talk", "copy"])
            finish = kind if kind in ("length", "failed") else "stop"
            error = "the server is gone" if kind == "failed" else None
            text = {"failed": "", "empty": "", "talk": "Sure, here is the pattern: a sample."}.get(kind, text)
            if kind == "copy" and before is not None:
                text = before.splitlines()[0].partition(" ")[2] + " " + text
            return Completion(text, finish, error, 10, 5)
        if before is not None:
            text = " " + text
        elif "JSON object" in request:
            keys = re.search(r"the keys (.*), each with a string", request)[1]
            parts = {name: sentence(rng) for name in re.findall(r'"(\w+)"', keys)}
            if labels := re.search(r'"label" is one of: ([^.]*)\.', request):
                parts["label"] = rng.choice(labels[1].split(", "))
            text = json.dumps(parts)
        elif labels := re.match(r".*Which label fits: (.*)\? \(", request, re.DOTALL):
            text = rng.choice(labels[1].split(" or "))
        return Completion(text, "stop", None, 10, 5)
