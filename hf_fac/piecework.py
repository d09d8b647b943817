"""A job cut into pieces that several processes may share, through one journal and within bounds.

In: what makes a writer for a piece, the pieces' features. Out: what came of every piece, the same in every process.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .candidates import Stopped
from .journal import Journal, digest, write_whole
from .writing import SampleWriter

FORMS = ("list", "text", "json")
PROBED = 8  # features by which the form of prompts is chosen
_POLL_S = 0.2
_FORM = "form"  # the piece in which a form is chosen


class Bounds(NamedTuple):
    """What may be spent, None for no bound: samples, texts asked for, seconds from the call's beginning."""

    max_samples: int | None = None
    max_requests: int | None = None
    max_seconds: float | None = None


class PieceWork:
    """Claims pieces until all are done or a bound is reached.

    Args:
        make_writer: makes the writer of a piece from a form, a piece of the journal, and what allows requests.
        pieces: the features of each, by name, in the order in which samples are wanted.
        n_per_feature: the most samples of a feature. n_taken: samples that are there already.
        stop: called between requests and while waiting; what it raises ends the work.
    """

    def __init__(
        self,
        make_writer: Callable[[str, Any, Callable[[int, bool], None]], SampleWriter],
        journal: Journal,
        pieces: dict[str, np.ndarray],
        bounds: Bounds,
        *,
        n_per_feature: int,
        n_taken: int,
        stop: Callable[[], None],
    ) -> None:
        self.make_writer, self.journal, self.pieces, self.bounds = make_writer, journal, pieces, bounds
        self.n_per_feature, self.n_taken, self.stop = n_per_feature, n_taken, stop
        self.begun = time.perf_counter()
        self.ended: str | None = None
        self.features = np.concatenate([*pieces.values(), np.zeros(0, np.int64)])
        self.done: dict[str, dict] = {}

    def run(self, form: str | None) -> dict[str, dict]:
        """Returns by piece what came of it: its candidates and what they cost ("form": what choosing one cost). `ended`
        then says which bound ended it.

        Args:
            form: how words are asked for; None tries all.
        """
        from tqdm.auto import tqdm

        outcome = self._stored()
        if outcome is not None:
            return outcome
        form = form or self._form()
        if form is not None:
            with tqdm(desc="Writing samples", unit="feature", leave=False) as bar:
                while self.ended is None and (open_ := self._open()):
                    bar.total = bar.n + sum(len(self.pieces[name]) for name in open_)
                    if not any(self._claim(name, form, bar) for name in open_):
                        self.stop()
                        time.sleep(_POLL_S)
        return self._outcome()

    def _open(self) -> list[str]:
        """The pieces to be worked on: up to the one at which there are samples enough."""
        most, found, open_ = self.bounds.max_samples, self.n_taken, []
        for name in self.pieces:
            if most is not None and found >= most and not open_:
                break
            if name not in self.done and "done" in (piece := self.journal.read(name)):
                self.done[name] = piece["done"]
            if name in self.done:
                found += sum(c["chosen"] for c in self.done[name]["candidates"])
            else:
                open_.append(name)
                if most is not None and found + self._expected(open_) >= most:
                    break
        return open_

    def _expected(self, names: list[str]) -> int:
        return sum(len(self.pieces[name]) for name in names) * self.n_per_feature

    def _claim(self, name: str, form: str, bar: Any) -> bool:
        with self.journal.claim(name) as piece:
            if piece is None:
                return False
            if "done" in piece:
                return True
            writer = self.make_writer(form, piece, self._allow)
            most = self.bounds.max_samples
            enough = None if most is None else most - self.n_taken - self._found_before(name)
            self.ended = writer.write(self.pieces[name].tolist(), enough=enough)
            outcome = {"candidates": [c.record() for own in writer.candidates.values() for c in own], **_cost(piece)}
            key = "done" if self.ended is None else f"stopped:{sum(k.startswith('stopped') for k in piece.values)}"
            piece.add([(key, outcome)])
            bar.update(len(self.pieces[name]))
            return True

    def _found_before(self, name: str) -> int:
        return sum(c["chosen"] for other, o in self.done.items() if other < name for c in o["candidates"])

    def _allow(self, n: int, finishing: bool) -> None:
        """Raises: Stopped when a bound leaves no room for n more requests; rows that were begun may take longer."""
        self.stop()
        _, most, seconds = self.bounds
        if most is not None:
            spent = sum(self._spent(name)["requests"] for name in [*self.pieces, _FORM])
            if spent + n > most:
                raise Stopped(f"max_requests {most:,}")
        if seconds is not None and not finishing and time.perf_counter() - self.begun > seconds:
            raise Stopped(f"max_seconds {seconds:g}")

    def _spent(self, name: str) -> dict[str, int]:
        return self.done.get(name) or _cost(self.journal.read(name))

    def _form(self) -> str | None:
        """The form of prompt whose texts are kept most often, tried on a few features; None when there was no time."""
        features = self.features[:PROBED].tolist()
        if not features:
            return "text"
        while True:
            with self.journal.claim(_FORM) as piece:
                if piece is not None:
                    return self._chosen_form(piece, features)
            self.stop()
            time.sleep(_POLL_S)

    def _chosen_form(self, piece: Any, features: list[int]) -> str | None:
        if "form" not in piece:
            kept = {}
            for form in FORMS:
                writer = self.make_writer(form, _Prefixed(piece, form), self._allow)
                try:
                    kept[form] = writer.probe(features)
                except Stopped as stop:
                    self.ended = str(stop)
                    return None
            best = max(FORMS[::-1], key=lambda form: kept[form])
            piece.add([("form", {"kept": kept, "form": best})])
        return piece["form"]["form"]

    def _stored_at(self) -> Path | None:
        if self.journal.folder is None:
            return None
        return self.journal.folder / f"result-{digest(self.bounds)}.json"

    def _stored(self) -> dict[str, dict] | None:
        """What an equal call ended with when it reached a bound."""
        path = self._stored_at()
        if path is None or not path.exists():
            return None
        stored = json.loads(path.read_text(encoding="utf-8"))
        self.ended = stored["ended"]
        return self._outcomes(stored["pieces"])

    def _outcome(self) -> dict[str, dict]:
        found = {}
        for name in self.pieces:
            if self.ended is not None:
                self._wait_for(name)
            keys = [k for k in self.journal.read(name).values if k == "done" or k.startswith("stopped")]
            if keys:
                found[name] = "done" if "done" in keys else keys[-1]
        path = self._stored_at()
        if self.ended is not None and path is not None:
            write_whole(path, json.dumps({"ended": self.ended, "pieces": found}))
            return self._stored()
        return self._outcomes(found)

    def _outcomes(self, keys: dict[str, str]) -> dict[str, dict]:
        """By piece what stands under its key."""
        outcomes = {name: self.journal.read(name)[key] for name, key in keys.items()}
        return outcomes | {_FORM: {"candidates": [], **_cost(self.journal.read(_FORM))}}

    def _wait_for(self, name: str) -> None:
        """Until no process works on the piece: all have the same bounds."""
        while True:
            with self.journal.claim(name) as piece:
                if piece is not None:
                    return
            self.stop()
            time.sleep(_POLL_S)


class _Prefixed:
    """A piece whose keys begin with a word."""

    def __init__(self, piece: Any, prefix: str) -> None:
        self.piece, self.prefix = piece, prefix

    def __contains__(self, key: str) -> bool:
        return f"{self.prefix}:{key}" in self.piece

    def __getitem__(self, key: str) -> Any:
        return self.piece[f"{self.prefix}:{key}"]

    def add(self, entries: Iterable[tuple[str, Any]]) -> None:
        self.piece.add((f"{self.prefix}:{key}", value) for key, value in entries)


def _cost(piece: Any) -> dict[str, int]:
    answered = [v for v in piece.values.values() if isinstance(v, dict) and "answers" in v]
    return {
        "requests": sum(len(v["answers"]) for v in answered),
        "prompt_tokens": sum(v["prompt_tokens"] for v in answered),
        "completion_tokens": sum(v["completion_tokens"] for v in answered),
    }
