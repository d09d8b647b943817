"""From texts that activate their feature to whole rows of the task's type, each measured again as a row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..storage.journal import digest
from .candidates import Asker, Candidate, Request, Settings, Stopped
from .verification import Gauge, Measured

if TYPE_CHECKING:
    from ..storage.journal import Piece

_ATTEMPTS = 3  # to write the other parts of a row


class RowWriter:
    """Makes rows of candidates: asks for the parts that are not there yet, and drops what is no sample as a whole."""

    def __init__(self, asker: Asker, gauge: Gauge, settings: Settings, piece: Piece) -> None:
        self.asker, self.gauge, self.settings, self.piece = asker, gauge, settings, piece
        self.task = settings.task

    def make(self, candidates: list[Candidate]) -> None:
        """Give each candidate its row and mark it as chosen, or say why it is refused.

        Raises: Stopped when parts were left unasked; what is whole by then is marked.
        """
        open_ = candidates
        for candidate in candidates:
            if candidate.row is None:
                candidate.parts = {self.task.carrier: candidate.text}
        while open_:
            requests = {}
            for c in open_:
                part = self.task.next_part(c.parts) if c.row is None else None
                if part is not None:
                    # The same attempt may answer another prompt once a text that failed was asked for again.
                    key = f"part:{c.request}:{c.number}:{part[0]}:{c.attempts}:{digest(part[1])}"
                    requests[key] = (c, part[0], Request(key, c.feature, part[1], None, {}))
            if requests:
                self._write_parts(requests)
            self._check_rows([c for c in open_ if c.row is not None and c.refused is None])
            if self.asker.stopped is not None:
                raise Stopped(self.asker.stopped)
            open_ = [c for c in open_ if not c.chosen and c.refused is None]

    def _write_parts(self, requests: Mapping[str, tuple[Candidate, str, Request]]) -> None:
        by_attempt: dict[int, list[Request]] = {}
        for candidate, _, request in requests.values():
            by_attempt.setdefault(candidate.attempts, []).append(request)
        for attempt, wanted in by_attempt.items():
            settings = {"n": 1, "temperature": 0.7, "max_tokens": self.settings.answer_tokens, "stop": ()}
            answers = self.asker.answers(wanted, settings | {"seed": 1000 * self.settings.seed + 100 * attempt + 99})
            for request in wanted:
                if request.key not in answers:
                    continue
                candidate, name, _ = requests[request.key]
                [(text, finish)] = answers[request.key]
                value, problem = self.task.read_part(name, text) if finish != "failed" else (None, "the chat failed")
                if finish == "length":
                    value, problem = None, "it is cut off"
                if problem is None:
                    candidate.parts[name] = value
                    if set(candidate.parts) == set(self.task.parts):
                        candidate.row, problem = self.task.row(candidate.parts)
                if problem is not None:
                    self._again(candidate, name, f"{name}: {problem}"[:80])

    def _again(self, candidate: Candidate, part: str, problem: str) -> None:
        candidate.attempts += 1
        candidate.row = None
        candidate.parts.pop(part, None)
        if candidate.attempts == _ATTEMPTS:
            candidate.refused = f"no whole row, {problem}"

    def _check_rows(self, candidates: list[Candidate]) -> None:
        """Drop rows that lost the feature on the way, pairs whose rejected answer has it, and what the caller drops."""
        pairs = "rejected" in self.task.features() and self.task.carrier == "chosen"
        for side in ("chosen", "rejected") if pairs else ("chosen",):
            new = [c for c in candidates if f"{_key(c)}:{side}" not in self.piece]
            found = self.gauge.rows([c.row for c in new], [c.feature for c in new], side=side)
            self.piece.add((f"{_key(c)}:{side}", list(m)) for c, m in zip(new, found, strict=True))
        for c in candidates:
            key = _key(c)
            delta = self.gauge.delta[c.feature]
            c.measured = Measured(*self.piece[f"{key}:chosen"])
            if c.measured.activation <= delta:
                c.refused = "lost in its row"
            elif pairs and self.piece[f"{key}:rejected"][0] > delta:
                problem = "the rejected answer activates the feature too"
                if c.parts:
                    self._again(c, "rejected", problem)
                else:
                    c.refused = problem
            elif self.settings.keep is not None and not self.settings.keep(c.row):
                c.refused = "the caller's own filter"
            else:
                c.chosen = True


def _key(candidate: Candidate) -> str:
    return f"row:{candidate.request}:{candidate.number}:{digest(candidate.row)}"
