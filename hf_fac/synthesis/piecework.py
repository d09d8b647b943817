"""A job cut into pieces that several processes may share, through one journal and within bounds.

In: what makes a writer for a piece, the pieces' features. Out: what came of every piece, the same in every process.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..storage.files import write_whole
from ..storage.journal import Journal, Piece, digest
from .candidates import TOKENS, Allow, Asker, Stopped
from .writing import ENOUGH, SampleWriter

FORMS = ("list", "text", "json")
PROBED = 8  # features by which the form of prompts is chosen
_POLL_S = 0.2
_FORM = "form"  # the piece in which a form is chosen
_ASKING = "asking"  # who has this one may ask, where the number of texts is bounded


class Bounds(NamedTuple):
    """What may be spent, None for no bound: samples, texts asked for, seconds from the call's beginning."""

    max_samples: int | None = None
    max_requests: int | None = None
    max_seconds: float | None = None


def unbounded(_least: int, _finishing: bool) -> AbstractContextManager[int]:
    """Allows any number of texts."""
    return nullcontext(sys.maxsize)


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
        make_writer: Callable[[str, Any, Allow], SampleWriter],
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
        self.closed: dict[str, dict] = {}  # what came of pieces that this call is through with
        self.failures, self.failure = 0, ""  # texts that the chat did not write, why not the first

    def run(self, form: str | None) -> dict[str, dict]:
        """Returns by piece what came of it: its candidates, whether all was `tried`, and what it cost ("form": what
        choosing one cost). `ended` then says what ended the work before all was tried.

        Args:
            form: how words are asked for; None tries all.
        """
        from tqdm.auto import tqdm

        stored = self._stored()
        if stored is not None and not stored["again"] and stored["pieces"] == self._latest():
            return self._outcomes(stored)
        if stored is not None:
            # The chat had failed, so ask again; or a call with other bounds went on since.
            self._stored_at().unlink(missing_ok=True)
        form = form or (self._form() if self._open() else "text")
        if form is not None:
            with tqdm(desc="Writing samples", unit="feature", leave=False) as bar:
                while self.ended is None and (open_ := self._open()):
                    bar.total = bar.n + sum(len(self.pieces[name]) for name in open_)
                    if not any(self._claim(name, form, bar) for name in open_):
                        self.stop()
                        time.sleep(_POLL_S)
        if self.ended is None and len(self.closed) < len(self.pieces):
            self.ended = f"max_samples {self.bounds.max_samples:,}"
        if self.ended is None and self.failures:
            self.ended = f"texts that the chat did not write ({self.failures:,}; the first: {self.failure})"
        return self._outcomes(self._settled())

    def _open(self) -> list[str]:
        """The pieces to be worked on: up to the one at which there are samples enough."""
        most, found, open_ = self.bounds.max_samples, self.n_taken, []
        for name in self.pieces:
            if most is not None and found >= most and not open_:
                break
            if name not in self.closed and "done" in (piece := self.journal.read(name)):
                self.closed[name] = piece["done"]
            if name in self.closed:
                found += sum(c["chosen"] for c in self.closed[name]["candidates"])
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
            tried = False
            try:
                ended = writer.write(self.pieces[name].tolist(), enough=enough)
                self.ended = f"max_samples {most:,}" if ended == ENOUGH else ended
                tried = ended is None and not writer.asker.failures
            finally:
                # Also where the chat raised: what was made by then is kept.
                candidates = [c.record() for own in writer.candidates.values() for c in own]
                outcome = {"candidates": candidates, "tried": tried, **_cost(piece)}
                _record(piece, outcome)
                self._note(writer.asker)
            self.closed[name] = outcome
            bar.update(len(self.pieces[name]))
            return True

    def _note(self, asker: Asker) -> None:
        self.failures += asker.failures
        self.failure = self.failure or asker.failure

    def _found_before(self, name: str) -> int:
        return sum(c["chosen"] for other, o in self.closed.items() if other < name for c in o["candidates"])

    @contextmanager
    def _allow(self, least: int, finishing: bool) -> Iterator[int]:
        """Yields how many texts may be asked for; with a bound on them one process asks at a time.

        Raises: Stopped when they are fewer than `least`, or when the time is up, but rows that were begun may take
            longer.
        """
        self.stop()
        _, most, seconds = self.bounds
        if seconds is not None and not finishing and time.perf_counter() - self.begun > seconds:
            raise Stopped(f"max_seconds {seconds:g}")
        if most is None:
            yield sys.maxsize
            return
        with self._turn(_ASKING):
            left = most - sum(self._spent(name)["requests"] for name in [*self.pieces, _FORM])
            if left < least:
                raise Stopped(f"max_requests {most:,}")
            yield left

    @contextmanager
    def _turn(self, name: str) -> Iterator[Piece]:
        """Yields a piece as soon as no other process has it."""
        while True:
            with self.journal.claim(name) as piece:
                if piece is not None:
                    yield piece
                    return
            self.stop()
            time.sleep(_POLL_S)

    def _spent(self, name: str) -> dict[str, int]:
        closed = self.closed.get(name)
        # What was stopped here another process may have gone on with.
        return closed if closed and closed["tried"] else _cost(self.journal.read(name))

    def _form(self) -> str | None:
        """The form of prompt whose texts are kept most often, or else read, tried on a few features; None when there
        was no time."""
        with self._turn(_FORM) as piece:
            if "form" not in piece:
                kept = {}
                for form in FORMS:
                    writer = self.make_writer(form, _Prefixed(piece, form), self._allow)
                    features = [f for f in self.features.tolist() if writer.is_known(f)][:PROBED]
                    if not features:
                        return "text"
                    try:
                        kept[form] = writer.probe(features)
                    except Stopped as stop:
                        self.ended = str(stop)
                        return None
                    finally:
                        self._note(writer.asker)
                best = max(FORMS[::-1], key=lambda form: kept[form])
                piece.add([("form", {"kept": kept, "form": best})])
            return piece["form"]["form"]

    def _stored_at(self) -> Path | None:
        """What an equal call ended with."""
        if self.journal.folder is None:
            return None
        return self.journal.folder / f"result-{digest(self.bounds)}.json"

    def _stored(self) -> dict[str, Any] | None:
        path = self._stored_at()
        try:
            return None if path is None else json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None

    def _settled(self) -> dict[str, Any]:
        """Which of a piece's outcomes count: what one process settles first, all take."""
        if self.ended is not None:
            for name in self.pieces:
                with self._turn(name):
                    pass  # nobody is at work on it: all have the same bounds
        settled = {"ended": self.ended, "again": bool(self.failures), "pieces": self._latest()}
        if (path := self._stored_at()) is not None:
            write_whole(path, json.dumps(settled), keep_first=True)
        return self._stored() or settled

    def _latest(self) -> dict[str, str]:
        """By piece the key of its last outcome."""
        found = {}
        for name in self.pieces:
            piece = self.journal.read(name)
            if "done" in piece:
                found[name] = "done"
            elif n := _stops(piece):
                found[name] = f"stopped:{n - 1}"
        return found

    def _outcomes(self, settled: dict[str, Any]) -> dict[str, dict]:
        """By piece what stands under the key that was settled on."""
        self.ended = settled["ended"]
        outcomes = {name: self.journal.read(name)[key] for name, key in settled["pieces"].items()}
        return outcomes | {_FORM: {"candidates": [], "tried": True, **_cost(self.journal.read(_FORM))}}


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


def _record(piece: Piece, outcome: dict[str, Any]) -> None:
    """Add what came of a piece, unless that is what came of it before."""
    n = _stops(piece)
    if outcome["tried"]:
        piece.add([("done", outcome)])
    elif not n or piece[f"stopped:{n - 1}"] != json.loads(json.dumps(outcome)):
        piece.add([(f"stopped:{n}", outcome)])


def _stops(piece: Piece) -> int:
    return sum(key.startswith("stopped:") for key in piece.values)


def _cost(piece: Piece) -> dict[str, int]:
    answered = [v for v in piece.values.values() if isinstance(v, dict) and "answers" in v]
    tokens = {name: sum(v[name] for v in answered) for name in TOKENS}
    return {"requests": sum(v["asked"] for v in answered), **tokens}
