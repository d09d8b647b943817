"""FAC Synthesis: write the samples that activate the features a data set misses (PAPER.md, Pipeline 6 and 7).

In: missing features, a dictionary that says by spans or explanations what they are, and a chat model. Out: a data set
of the task's TRL type in which every row was measured to activate the feature it was written for, and a report.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from ..coverage.coverage import FACReport, check_threshold
from ..inputs.rows import RowError
from ..storage.differences import differences
from ..storage.journal import Journal, digest
from ..storage.terminal import visible
from ..storage.validation import check_counts
from ..tasks.prompts import HINTS
from ..tasks.prompts import PROMPT_VERSION as PROMPTS
from ..tasks.task import Task, get_task
from .candidates import Allow, Settings
from .filters import NearDuplicates, texts_of
from .piecework import FORMS, Bounds, PieceWork, unbounded
from .verification import Gauge
from .writing import SampleWriter

if TYPE_CHECKING:
    from datasets import Dataset

    from ..chat.local import Chat
    from ..dictionary.dictionary import FeatureDictionary
    from ..features.featurizer import SAEFeaturizer
    from .plan import SynthesisPlan
    from .pool import FromPool
    from .report import SynthesisResult

VERSION = 2  # changes when the same settings and answers would give other samples
WAYS = ("one_step", "two_step", "steering")
_PIECE = 32  # features that are written for at the same time, and that one process claims


class FACSynthesizer:
    """Writes samples for missing features and keeps those that activate them.

        synthesizer = FACSynthesizer(chat, featurizer, dictionary, task="instruction_following",
                                     threshold=report.threshold, samples_per_feature=2)
        result = synthesizer.synthesize(report, journal="runs/first")

    First candidates come from a feature's explanation, if it has one, and its spans; the strongest and the weakest then
    are the contrastive pair of the second step. Features that resist are asked for again, hotter and with other words
    and spans, and at last written by the steered model.

    Args:
        chat: what writes words, a `LocalChat` or an `EndpointChat`.
        featurizer: what measures; where it pools otherwise than the task, samples are measured as the task says.
        dictionary: of the same model and SAE; explanations are not needed.
        task: a `Task`, the name of a built-in one, or the path of a YAML file.
        threshold: delta, in the SAE's units: one number or [d_sae]. A sample is kept when g_i(x) > delta.
        samples_per_feature: the most samples kept for one feature, the strongest first.
        ways: in this order, each for what the one before left open: "two_step" (PAPER.md), "one_step" (the same number
            of texts without pairs), "steering". None is two_step and, where the featurizer's model can write, steering.
        form: how words are asked for: "json" (whole samples), "text" (the carrier alone, the other parts after it),
            "list" (the model continues a list of spans). None tries each on a few features and takes the one whose
            texts are kept most often.
        candidates: texts asked for at a time for each feature. rounds: of the second step.
        temperature: of the first round; each further round is 0.15 hotter.
        max_tokens, answer_tokens: the most tokens of a carrier, and of each other part (with "json": of all the others
            together).
        avoid: data that no sample may nearly repeat, by name: {"seed": rows, "evaluation": rows}.
        max_copied_words: a text that shares more consecutive words with a span of its feature is dropped.
        keep: the caller's own filter, a function of a row; rows for which it is false are dropped.

    Raises: ValueError for arguments out of range, and a dictionary of another model or SAE than the featurizer's.
    """

    def __init__(
        self,
        chat: Chat,
        featurizer: SAEFeaturizer,
        dictionary: FeatureDictionary,
        *,
        task: Task | str | os.PathLike[str],
        threshold: float | ArrayLike,
        samples_per_feature: int = 2,
        ways: Sequence[str] | None = None,
        form: str | None = None,
        candidates: int = 4,
        rounds: int = 3,
        temperature: float = 0.8,
        max_tokens: int = 64,
        answer_tokens: int = 256,
        avoid: Mapping[str, Iterable[Any]] | None = None,
        max_copied_words: int = 3,
        keep: Callable[[Mapping[str, Any]], bool] | None = None,
        seed: int = 0,
    ) -> None:
        self.chat, self.featurizer, self.dictionary = chat, featurizer, dictionary
        self.task, self.threshold, self.form = get_task(task), threshold, form
        dictionary.check(featurizer)
        check_threshold(threshold, featurizer.d_sae)
        try:
            featurizer.reader([self.task.as_read(self.task.example(), featurizer.reader.pool_over)])
        except RowError as error:
            raise ValueError(
                f"The featurizer reads pool_over={featurizer.reader.pool_over!r}, rows of task {self.task.name!r} have "
                f"no such part ({error}): make it with pool_over={self.task.pool_over!r}."
            ) from error
        if ways is None:
            ways = ("two_step", "steering") if _can_write(featurizer) else ("two_step",)
        if not ways or any(way not in WAYS for way in ways) or len(set(ways)) < len(ways):
            raise ValueError(f"ways is {ways!r}; give one or more of {', '.join(WAYS)}, each once.")
        if form not in (*FORMS, None):
            raise ValueError(f"form is {form!r}; it must be one of {', '.join(FORMS)}, or None to try them.")
        for name, value, least in (
            ("samples_per_feature", samples_per_feature, 1), ("candidates", candidates, 1), ("rounds", rounds, 0),
            ("max_tokens", max_tokens, 1), ("answer_tokens", answer_tokens, 1),
            ("max_copied_words", max_copied_words, 0),
        ):  # fmt: skip
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}.")
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature is {temperature}; it must be above 0: at 0 all candidates are the same.")
        self.settings = Settings(
            task=self.task, ways=tuple(ways), samples_per_feature=samples_per_feature, candidates=candidates,
            rounds=rounds, temperature=temperature, max_tokens=max_tokens, answer_tokens=answer_tokens,
            max_copied_words=max_copied_words, seed=seed, keep=keep,
        )  # fmt: skip
        avoided = {name: list(texts_of(rows)) for name, rows in (avoid or {}).items()}
        self._avoided = digest(avoided)
        self._known = NearDuplicates(avoided)
        self._steered: Any = None

    def _describe(self) -> dict[str, Any]:
        """All that shapes results, as JSON values."""
        from ..dictionary.asking import chat_name

        settings = vars(self.settings) | {"task": asdict(self.task), "keep": self.settings.keep is not None}
        delta = np.asarray(self.threshold, np.float64)
        return {
            **settings, "version": VERSION, "prompts": PROMPTS, "hints": len(HINTS), "form": self.form,
            "chat": chat_name(self.chat), "avoid": self._avoided, "measured_by": self.featurizer.fingerprint(),
            "threshold": float(delta) if not delta.ndim else digest(delta.tolist()),
            "dictionary": _digest_of(self.dictionary),
        }  # fmt: skip

    def fingerprint(self) -> str:
        """Returns a hash of all settings that shape results; the weights of the model that measures are among them."""
        return hashlib.sha256(json.dumps(self._describe(), sort_keys=True, default=str).encode()).hexdigest()[:32]

    def plan(self, missing: FACReport | ArrayLike) -> SynthesisPlan:
        """Returns what `synthesize(missing)` costs at most, if every feature resists to the end."""
        from .plan import make_plan

        features = self._wanted(missing)
        gauge, piece = self._gauge(features), Journal(None, {}).read("plan")
        forms = FORMS if self._form() is None else (self._form(),)
        writers = [self._writer(gauge, form, piece, unbounded) for form in forms]
        return make_plan(self.chat, writers, features, self.featurizer.tokenizer)

    def synthesize(
        self,
        missing: FACReport | ArrayLike,
        *,
        features: ArrayLike | None = None,
        journal: str | os.PathLike[str] | None = None,
        pool: Dataset | None = None,
        max_samples: int | None = None,
        max_requests: int | None = None,
        max_seconds: float | None = None,
        stop: Callable[[], None] | None = None,
    ) -> SynthesisResult:
        """Write samples for the features and return those that activate them.

        Args:
            missing: a `FACReport`, whose missing features are written for and whose FAC is brought up to date, or ids.
            features: write for these of the missing features only.
            journal: a folder where every answer, measurement and decision is kept as it comes; the same call goes on
                there, in other processes at the same time too, and all get the same samples. None keeps nothing.
            pool: rows of the task's type, scored by `FACScorer`: of these the ones that activate most missing features
                are taken first (`select`), but for those that `avoid` or `keep` rules out, and what they fill is not
                written for.
            max_samples, max_requests, max_seconds: bounds on samples, texts asked for, and time: once one is reached
                nothing new is begun (rows begun are finished, within max_requests). The same call then
                gives the same result; raise a bound to go on. How many processes share the work shapes what
                max_samples and max_seconds leave of it.
            stop: called between requests and while waiting for other processes; what it raises ends the call.

        Where the chat leaves texts unwritten (a server that fails, a cap of tokens) the rest comes with a warning,
        and the same call asks for them again.

        Raises: ValueError for features out of range, a bound below 1, a FACReport or pool measured otherwise, a higher
            delta in the report, a journal begun under other settings or for other features; ChatError when the chat
            cannot answer anything: what it answered is kept in the journal, and max_requests=1 returns what came of it.
        """
        from .report import make_result

        check_counts(max_samples=max_samples, max_requests=max_requests)
        if max_seconds is not None and not max_seconds >= 0:
            raise ValueError(f"max_seconds is {max_seconds}; it must not be negative.")
        begun = time.perf_counter()
        wanted = self._wanted(missing)
        if features is not None:
            if (others := np.setdiff1d(_ids(features), wanted)).size:
                raise ValueError(f"feature {others[0]} is none of the {len(wanted):,} missing features")
            wanted = _ids(features)
        taken, refused, features = [], [], wanted
        if pool is not None:
            taken, refused, features = self._from_pool(pool, wanted)
        settings = {**self._describe(), "missing": digest(features.tolist())}
        record, gauge = Journal(journal, settings), self._gauge(features)
        pieces = {f"piece-{i // _PIECE:05d}": features[i : i + _PIECE] for i in range(0, len(features), _PIECE)}
        work = PieceWork(
            lambda form, piece, allow: self._writer(gauge, form, piece, allow),
            record,
            pieces,
            Bounds(max_samples, max_requests, max_seconds),
            n_per_feature=self.settings.samples_per_feature,
            n_taken=len(taken),
            stop=stop or (lambda: None),
        )
        outcomes = work.run(self._form())
        if work.failures and work.ended is not None:
            ended = work.ended.rstrip(".")
            warnings.warn(visible(f"Synthesis ended by {ended}. The same call asks for them again."), stacklevel=2)
        seconds = time.perf_counter() - begun
        pool_rows = [*taken, *refused]
        return make_result(
            self, missing, wanted, pool_rows, outcomes, work.ended, seconds=seconds, max_samples=max_samples
        )

    def _wanted(self, missing: FACReport | ArrayLike) -> np.ndarray:
        if isinstance(missing, FACReport):
            if found := differences(missing.measurement, self.featurizer.measurement):
                raise ValueError(
                    f"The FACReport was measured otherwise than by this featurizer ({found}): compare with it again."
                )
            if np.any(np.asarray(self.threshold) < missing.threshold):
                raise ValueError(
                    f"The FACReport's delta is {missing.threshold!s:.100}, the synthesizer keeps what exceeds "
                    f"{self.threshold!s:.100}: samples would not cover what they are written for. Pass "
                    "threshold=report.threshold."
                )
        return _ids(missing)

    def _form(self) -> str | None:
        return "text" if set(self.settings.ways) == {"steering"} else self.form

    def _gauge(self, features: np.ndarray) -> Gauge:
        return Gauge(self.featurizer, self.task, features, self.threshold)

    def _writer(self, gauge: Gauge, form: str, piece: Any, allow: Allow) -> SampleWriter:
        steered = self._steering() if "steering" in self.settings.ways else None
        return SampleWriter(self.chat, steered, gauge, self.dictionary, self.settings, form, piece, self._known, allow)

    def _steering(self) -> Any:
        from ..chat.local import LocalChat
        from ..steering.steered_chat import SteeredChat

        if self._steered is None:
            own, chat = self.featurizer, self.chat
            if not isinstance(chat, LocalChat) or chat.model is not own.model:
                chat = LocalChat(own.model, own.tokenizer)
            self._steered = SteeredChat(chat, own.sae, layer=own.layer)
        return self._steered

    def _from_pool(self, pool: Dataset, features: np.ndarray) -> FromPool:
        from .pool import take_from_pool

        return take_from_pool(
            pool,
            features,
            self._gauge(features),
            measurement=self.featurizer.measurement,
            known=self._known,
            keep=self.settings.keep,
        )


def _ids(missing: FACReport | ArrayLike) -> np.ndarray:
    ids = np.asarray(getattr(missing, "missing", missing))
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise ValueError(f"missing must be a FACReport or a list of integer ids, got {missing!r:.100}")
    if len(np.unique(ids)) < len(ids):
        raise ValueError("missing holds a feature twice; give each id once")
    return ids.astype(np.int64)


def _can_write(featurizer: SAEFeaturizer) -> bool:
    from ..inputs.hidden_states import is_causal

    model = featurizer.model
    return model.get_output_embeddings() is not None and is_causal(model, featurizer.layer)


def _digest_of(dictionary: FeatureDictionary) -> str:
    found = hashlib.sha256()
    for row in dictionary:
        words = [row["feature"], row["explanation"], [(s["before"], s["token"], s["after"]) for s in row["spans"]]]
        found.update(json.dumps(words).encode())
    return found.hexdigest()[:16]
