"""Texts written for features, from first candidates to whole rows: the two steps of FAC Synthesis and steering.

In: features, what writes (a chat, a steered chat), what measures (`Gauge`), a piece of the journal. Out: rows that
activate their features, and what became of every text. Every answer and measurement is journaled before the next
request, and all else follows from them, so that a run started again goes through the same steps without asking twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..inputs.token_context import MarkedSpan
from ..storage.journal import digest
from .candidates import Allow, Asker, Candidate, Request, Settings, Stopped, neutral_turn
from .completion import RowWriter
from .filters import NearDuplicates, copied_run, unfit, whole_sentences
from .verification import Gauge, Measured

if TYPE_CHECKING:
    from ..chat.local import Chat
    from ..dictionary.dictionary import FeatureDictionary
    from ..steering.steered_chat import SteeredChat
    from ..storage.journal import Piece

SHOWN = 5  # spans in a prompt
_WARMER = 0.15  # what each round adds to the temperature
_HOTTEST = 1.3
STEERING_ROUNDS = 3
ENOUGH, _MORE = "enough samples", "more"
PROBES = 2  # texts of each feature by which a form is judged
# Of the mean norm of hidden states. Measured on SmolLM2-135M: below 0.4 little comes, above 0.8 word salad.
_FIRST_STRENGTH, _STRONGER, _WEAKER = 0.5, 1.25, 0.8
_MAX_PERPLEXITY = 150.0  # without steering; instructions that people wrote have a median of 71 and a 9th decile of 161


class SampleWriter:
    """Writes samples for the features of one piece.

    Args:
        known: texts that no sample may nearly repeat.
        allow: see `Allow`.
    """

    def __init__(
        self,
        chat: Chat,
        steered: SteeredChat | None,
        gauge: Gauge,
        dictionary: FeatureDictionary,
        settings: Settings,
        form: str,
        piece: Piece,
        known: NearDuplicates,
        allow: Allow,
    ) -> None:
        self.steered, self.gauge, self.dictionary = steered, gauge, dictionary
        self.settings, self.form, self.piece, self.known = settings, form, piece, known
        self.task = settings.task
        self.neutral = None if steered is None else neutral_turn(self.task, steered)
        self.asker = Asker(chat, self.neutral, piece, allow)
        self.rows = RowWriter(self.asker, gauge, settings, piece)
        self.candidates: dict[int, list[Candidate]] = {}
        self.known_samples = NearDuplicates()
        self.round = 0

    def write(self, features: Sequence[int], *, enough: int | None = None) -> str | None:
        """Fill `candidates` round by round, those that are samples marked as chosen: a hit that makes no row leaves its
        feature open. Returns what ended it before all was tried, None when nothing did.

        Args:
            enough: no more samples than so many are made; when they are there, that is what ended it (ENOUGH).
        """
        while True:
            ended = self._step(features)
            cut = self._finish(features, enough)
            if enough is not None and self._chosen() >= enough:
                return ENOUGH
            if cut is not None:
                return cut
            if ended != _MORE:
                return ended or self.asker.left

    def search(self, features: Sequence[int]) -> None:
        """Fill `candidates` in all rounds, without making rows."""
        while self._step(features) == _MORE:
            pass

    def _step(self, features: Sequence[int]) -> str | None:
        """One more round. Returns _MORE, what stopped it, or None when there is nothing left to try."""
        self.candidates = self.candidates or {feature: [] for feature in features}
        most, rounds = self.settings.samples_per_feature, self.rounds()
        hits = {feature: self._hits(feature)[:most] for feature in features}
        waiting = [feature for feature in features if len(hits[feature]) < most]
        if not waiting or self.round == len(rounds):
            return None
        way, others = rounds[self.round], len(self.task.parts) - 1
        self.asker.reserve = sum(c.row is None for own in hits.values() for c in own) * others
        self.asker.spare = 0 if self.form == "json" and way != "steering" else others
        try:
            self._round(self.round, way, waiting, n=self.settings.candidates)
        except Stopped as stop:
            return str(stop)
        self.round += 1
        return _MORE

    def probe(self, features: Sequence[int]) -> tuple[float, float]:
        """Returns the shares of first texts that would be kept, and that could be read. Raises: Stopped."""
        self.candidates = {feature: [] for feature in features}
        self._round(0, "words", features, n=PROBES)
        texts = [c for own in self.candidates.values() for c in own]
        # A form is chosen for good: not on what the chat happened to lose.
        if 2 * self.asker.failures > len(texts):
            raise Stopped(f"the chat: {self.asker.failure}")
        kept = sum(len(self._hits(feature)) for feature in features)
        return kept / (PROBES * len(features)), sum(bool(c.text) for c in texts) / (PROBES * len(features))

    def rounds(self) -> list[str]:
        rounds = self.settings.rounds
        plan = {
            "one_step": ["words"] * (rounds + 1), "two_step": ["words"] + ["two_step"] * rounds,
            "steering": ["steering"] * STEERING_ROUNDS,
        }  # fmt: skip
        return [way for name in self.settings.ways for way in plan[name]]

    def _round(self, number: int, way: str, features: Sequence[int], *, n: int) -> None:
        requests = [self._request(number, way, f) for f in features if way == "steering" or self.is_known(f)]
        step = max(0, number - self.rounds().index(way))
        temperature = min(self.settings.temperature + _WARMER * step, _HOTTEST)
        if way == "steering":
            temperature = self.settings.temperature
        answers = self._ask(requests, number, temperature, n, steered=way == "steering")
        new = [
            self._read(request, way, i, text, finish)
            for request in requests
            for i, (text, finish) in enumerate(answers.get(request.key, []))
        ]
        self._measure(new)
        for candidate in new:
            self.candidates[candidate.feature].append(candidate)
        if self.asker.stopped is not None:
            raise Stopped(self.asker.stopped)

    def is_known(self, feature: int) -> bool:
        """Whether the dictionary says in words or spans what the feature is."""
        if feature not in self.dictionary:
            return False
        return bool(self.dictionary[feature]["spans"] or self.dictionary[feature]["explanation"])

    def _request(self, number: int, way: str, feature: int) -> Request:
        key, asked = f"{number}:{way}:{feature}", {"form": self.form}
        if way == "steering":
            strength = self._strength(feature)
            return Request(key, feature, self.neutral.conversation, None, {"strength": strength})
        spans, explanation = self.dictionary.spans(feature), self.dictionary[feature]["explanation"]
        shown, positive, negative = spans[:SHOWN], None, None
        if number and len(spans) > SHOWN:
            rng = np.random.default_rng([self.settings.seed, number, feature])
            shown = [spans[i] for i in sorted(rng.choice(len(spans), SHOWN, replace=False))]
        if way == "two_step":
            positive, negative, asked["positive"] = self._pair(feature, spans)
        if self.form == "list":
            *conversation, begun = self.task.begin(explanation, shown, positive)
            return Request(key, feature, conversation, begun["content"], asked)
        variant = number if way == "words" else number - 1
        conversation = self.task.ask(explanation, shown, positive, negative, form=self.form, variant=variant)
        return Request(key, feature, conversation, None, asked)

    def _pair(self, feature: int, spans: list[MarkedSpan]) -> tuple[MarkedSpan | None, MarkedSpan | None, str]:
        """Positive, negative, and whose the positive is: the strongest of the feature's texts and the weakest; where
        nothing activates it, the strongest span stands in (PAPER.md, Pipeline 6)."""
        texts = [c for c in self.candidates[feature] if c.measured and c.refused is None]
        texts.sort(key=lambda c: c.measured.activation)
        negative = None
        if texts and texts[0].measured.activation <= self.gauge.delta[feature]:
            negative = MarkedSpan("", texts[0].text, "", texts[0].measured.activation)
        if not texts or texts[-1].measured.activation <= 0:
            return (spans[0] if spans else None), negative, "borrowed"
        if texts[0].text == texts[-1].text:
            negative = None
        return MarkedSpan(*texts[-1].measured.span, texts[-1].measured.activation), negative, "own"

    def _strength(self, feature: int) -> float:
        """The last strength that was tried, more where the feature stayed silent, less where the text broke."""
        tried = [c for c in self.candidates[feature] if c.way == "steering"]
        if not tried:
            return _FIRST_STRENGTH
        strength = tried[-1].asked["strength"]
        last = [c for c in tried if c.asked["strength"] == strength]
        if any(self._is_hit(c) for c in last):
            return strength
        broken = sum(c.refused is not None for c in last)
        return strength * (_WEAKER if 2 * broken > len(last) else _STRONGER)

    def _ask(
        self, requests: Sequence[Request], number: int, temperature: float, n: int, *, steered: bool
    ) -> dict[str, list[tuple[str, str]]]:
        """By key the texts and how each ended; what failed is asked again by the next run."""
        settings = {"n": n, "temperature": temperature, "seed": 1000 * self.settings.seed + 100 * number}
        settings["max_tokens"] = self.most_tokens(steered=steered)
        settings["stop"] = self.neutral.stop if steered else ("\n",) if self.form == "list" else ()
        return self.asker.answers(requests, settings, steered=steered)

    def most_tokens(self, *, steered: bool) -> int:
        whole = self.form == "json" and not steered
        return self.settings.max_tokens + (self.settings.answer_tokens if whole else 0)

    def _read(self, request: Request, way: str, i: int, text: str, finish: str) -> Candidate:
        candidate = Candidate(request.feature, way, request.key, i, "", request.asked)
        if finish == "failed":
            candidate.refused = "the chat failed"
            return candidate
        form = "text" if way == "steering" else self.form
        if form == "json":
            row, problem = self.task.read(text)
            if row is not None:
                candidate.row, candidate.text = row, self.task.carried_by(row)
        elif form == "list":
            begun = [{"role": "assistant", "content": request.begun}]
            entries = self.task.read_list(begun, text, ended=finish != "length")
            candidate.text, problem = entries[0].value or "", entries[0].reason
        else:
            # What was cut off ends with its last whole sentence, and is measured so.
            value, problem = self.task.read_part(
                self.task.carrier, whole_sentences(text) if finish == "length" else text
            )
            candidate.text = value or ""
        if problem is not None and finish == "length":
            candidate.refused = "cut off"
        elif problem is not None:
            candidate.refused = f"unreadable: {problem}"[:80]
        else:
            candidate.refused = unfit(candidate.text)
        return candidate

    def _measure(self, candidates: Sequence[Candidate]) -> None:
        """What each text activates, how much of it is copied, and whether it is refused for that."""
        readable = [c for c in candidates if c.text]
        key = f"measured:{digest([[c.request, c.number, c.text] for c in readable])}"
        if key not in self.piece:
            rows = [c.row for c in readable]
            features = [c.feature for c in readable]
            whole = bool(rows) and rows[0] is not None
            found = self.gauge.rows(rows, features) if whole else self.gauge.texts([c.text for c in readable], features)
            surprise = [None] * len(readable)
            if readable and readable[0].way == "steering":
                surprise = np.nan_to_num(self.steered.perplexity([c.text for c in readable]), nan=np.inf).tolist()
            self.piece.add(
                [(key, [[*m, p if p is None or p < np.inf else -1.0] for m, p in zip(found, surprise, strict=True)])]
            )
        for candidate, (*values, perplexity) in zip(readable, self.piece[key], strict=True):
            candidate.measured = measured = Measured(*values)
            shown = self.dictionary.spans(candidate.feature) if candidate.feature in self.dictionary else []
            candidate.copied = copied_run(candidate.text, ["".join(span[:3]) for span in shown])
            if perplexity is not None:
                candidate.asked = {**candidate.asked, "perplexity": perplexity}
            if candidate.refused is not None:
                continue
            if measured.problem is not None:
                candidate.refused = f"unreadable: {measured.problem}"[:80]
            elif perplexity is not None and not 0 <= perplexity <= _MAX_PERPLEXITY:
                candidate.refused = "not fluent"
            elif candidate.copied > self.settings.max_copied_words:
                candidate.refused = "copy of what the prompt showed"
            elif not self._is_hit(candidate):
                continue  # it may still be the negative of a pair
            elif source := self.known.source_of(candidate.text):
                candidate.refused = f"near-duplicate of {source}"

    def _chosen(self) -> int:
        return sum(candidate.chosen for own in self.candidates.values() for candidate in own)

    def _is_hit(self, candidate: Candidate) -> bool:
        if candidate.refused is not None or candidate.measured is None:
            return False
        return candidate.measured.activation > self.gauge.delta[candidate.feature]

    def _hits(self, feature: int) -> list[Candidate]:
        """Strongest first; of equal texts the first."""
        found = {c.text: c for c in reversed(self.candidates[feature]) if self._is_hit(c)}
        return sorted(found.values(), key=lambda c: -c.measured.activation)

    def _finish(self, features: Sequence[int], enough: int | None) -> str | None:
        """Make rows of the strongest hits: all first samples, then all second ones. Returns why some were left."""
        self.asker.reserve, self.asker.spare, self.asker.finishing = 0, 0, True
        try:
            most = max((len(self._hits(feature)) for feature in features), default=0)
            for rank in range(min(self.settings.samples_per_feature, most)):
                while new := self._begin(features, rank, enough):
                    self.rows.make(new)
                    for candidate in new:
                        if candidate.chosen:
                            self.known_samples.add(candidate.text, "another sample")
        except Stopped as stop:
            return str(stop)
        finally:
            self.asker.finishing = False
        return None

    def _begin(self, features: Sequence[int], rank: int, enough: int | None) -> list[Candidate]:
        """The next candidates that rows are made of: one for each feature without so many, no two nearly the same."""
        begun, new = NearDuplicates(), []
        left = math.inf
        if enough is not None:
            left = enough - self._chosen()
        for feature in features:
            if len(new) < left and (candidate := self._next(feature, rank, begun)) is not None:
                begun.add(candidate.text, "")
                new.append(candidate)
        return new

    def _next(self, feature: int, rank: int, begun: NearDuplicates) -> Candidate | None:
        hits = self._hits(feature)
        if sum(c.chosen for c in hits) > rank:
            return None
        for candidate in hits:
            if candidate.chosen:
                continue
            if source := self.known_samples.source_of(candidate.text):
                candidate.refused = f"near-duplicate of {source}"
            # A near-duplicate of what is begun waits until that is a sample, or is none.
            elif begun.source_of(candidate.text) is None:
                return candidate
        return None
