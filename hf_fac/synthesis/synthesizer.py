"""FAC Synthesis (arXiv 2602.10388): write the samples that activate the features a data set misses.

In: missing features, a dictionary that describes them by spans or explanations, and a chat model. Out: a data set of
the task's TRL type in which every row was measured to activate the feature it was written for, and a report.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from ..chat.identity import chat_name, model_name
from ..chat.local import LocalChat
from ..coverage.relevant_features import RelevantFeatures
from ..coverage.report import FACReport
from ..coverage.threshold import check_threshold
from ..inputs.rows import RowError
from ..storage.cache import Cache, Processes, content_key
from ..storage.differences import differences
from ..storage.feature_ids import check_feature_ids
from ..storage.parquet import rows_digest
from ..storage.terminal import visible
from ..tasks.prompts import HINTS, PROMPT_VERSION
from ..tasks.task import Task, get_task
from .budget import Budget
from .completion import RowCompleter
from .filters import NearDuplicates, texts_of
from .generation import Generator, unconditional_prompt
from .pool import FromPool, take_from_pool
from .prompt_format import choose_prompt_format
from .report import SynthesisResult, make_result
from .rounds import Progress, SynthesisLoop
from .settings import SynthesisSettings
from .text_source import TextSource
from .verification import SampleScorer, Verifier

if TYPE_CHECKING:
    from pathlib import Path

    from datasets import Dataset

    from ..chat.base import Chat
    from ..dictionary.dictionary import FeatureDictionary
    from ..features.featurizer import SAEFeaturizer
    from ..steering.steered_chat import SteeredChat, UnconditionalPrompt
    from .plan import SynthesisPlan

VERSION = 4  # changes when the same settings and answers would give other samples


class FACSynthesizer:
    """Writes samples for missing features and keeps those that activate them.

        synthesizer = FACSynthesizer(chat, featurizer, dictionary, task="instruction_following", samples_per_feature=2)
        result = synthesizer.synthesize(report, cache_dir="runs/first")

    The first texts come from a feature's explanation, if it has one, and its spans; the strongest and the weakest of
    them are the contrastive pair of the second step. Features that are still missing are asked for again, at a higher
    temperature, with other words and spans, and at last written by the steered model.

    Args:
        chat: writes texts by prompt, a `LocalChat` or an `EndpointChat`; None takes the featurizer's own model.
        featurizer: measures; where it pools other tokens than the task, samples are measured as the task says.
        dictionary: of the same model and SAE; explanations are not needed. None: `synthesize` builds one of the anchor
            rows that it is given.
        task: a `Task`, the name of a built-in one, or the path of a YAML file.
        threshold: delta, in the SAE's units: one number or [d_sae]. A sample is kept when g_i(x) > delta. None takes
            that of the report.
        aim: which features of a report are written for: "missing" (no row activates them), or "deficits" (fewer rows
            do than the anchor's rate says, more than chance explains: those `significant` in `FACReport.deficits`).
        samples_per_feature: the most samples kept for one feature, the strongest first. With aim="deficits" also no
            more than the rows that it falls short, rounded up.
        methods: in this order, each for the features that the one before left without samples. None is two_step and,
            where the featurizer's model can write, steering.
                "two_step": first texts, then texts from contrastive pairs
                "one_step": as many texts without pairs
                "contrastive": the paper's own step 2: first texts serve for pairs only, samples are written from pairs
                "steering": texts that the featurizer's model writes with the feature switched on
        prompt_format: how texts are asked for: "json" (whole samples), "text" (the target field alone, the other parts
            after it), "list" (the model continues a list of spans). None tries each on a few features and takes the one
            whose texts are hits most often.
        candidates: texts asked for at a time for each feature. rounds: of the second step.
        temperature: of a method's first round; each further round of prompts is 0.15 hotter, up to 1.3.
        max_tokens, answer_tokens: the most tokens of a target field, and of each other part (with "json": of all other
            parts together).
        avoid: data that no sample may nearly repeat, by name: {"seed": rows, "evaluation": rows}.
        max_copied_words: a text that shares more consecutive words with a span of its feature is rejected.
        keep: the caller's own filter, a function of a row; rows for which it is false are dropped. A classifier that
            contradicts a row's label, for example: `lambda row: classify(row["text"]) == row["label"]`.

    Raises: TypeError without a featurizer; ValueError for arguments out of range, and a dictionary of another model or
        SAE than the featurizer's.
    """

    def __init__(
        self,
        chat: Chat | None = None,
        featurizer: SAEFeaturizer | None = None,
        dictionary: FeatureDictionary | None = None,
        *,
        task: Task | str | os.PathLike[str],
        threshold: float | ArrayLike | None = None,
        aim: str = "missing",
        samples_per_feature: int = 2,
        methods: Sequence[str] | None = None,
        prompt_format: str | None = None,
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
        if featurizer is None:
            raise TypeError("FACSynthesizer needs featurizer=, the SAEFeaturizer that measures what texts activate.")
        self.featurizer, self.dictionary, self.threshold, self.keep = featurizer, dictionary, threshold, keep
        self.task = get_task(task)
        if dictionary is not None:
            dictionary.check(featurizer)
        if threshold is not None:
            check_threshold(threshold, featurizer.d_sae)
        _check_reads_task(featurizer, self.task)
        if methods is None:
            methods = ("two_step", "steering") if _can_write(featurizer) else ("two_step",)
        self.settings = SynthesisSettings(
            task=self.task, aim=aim, methods=tuple(methods), prompt_format=prompt_format,
            samples_per_feature=samples_per_feature, candidates=candidates, rounds=rounds, temperature=temperature,
            max_tokens=max_tokens, answer_tokens=answer_tokens, max_copied_words=max_copied_words, seed=seed,
        )  # fmt: skip
        self.chat = LocalChat(featurizer.model, featurizer.tokenizer) if chat is None else chat
        self.avoid = {name: list(texts_of(rows)) for name, rows in (avoid or {}).items()}

    @functools.cached_property
    def _avoided(self) -> NearDuplicates:
        return NearDuplicates(self.avoid)

    @functools.cached_property
    def _steered(self) -> SteeredChat:
        from ..steering.steered_chat import SteeredChat

        own, chat = self.featurizer, self.chat
        if not isinstance(chat, LocalChat) or chat.model is not own.model:
            chat = LocalChat(own.model, own.tokenizer)
        return SteeredChat(chat, own.sae, layer=own.layer)

    def fingerprint(self) -> str:
        """Returns a hash of all settings that shape results; the weights of the model that measures are among them."""
        delta = None if self.threshold is None else np.asarray(self.threshold, np.float64).tolist()
        return content_key(
            VERSION, PROMPT_VERSION, len(HINTS), asdict(self.settings), self.keep is not None, self.avoid, delta,
            chat_name(self.chat), self.featurizer.fingerprint(), _digest_of(self.dictionary),
        )  # fmt: skip

    def plan(self, missing: FACReport | ArrayLike) -> SynthesisPlan:
        """Returns what `synthesize(missing)` costs when every round is tried for every feature (see `SynthesisPlan`).

        Raises: ValueError without a dictionary.
        """
        from .plan import make_plan

        features = self.wanted(missing)
        unconditional = self._unconditional_prompt()
        return make_plan(
            self.settings, self._dictionary(None, None), features.tolist(), self.featurizer.tokenizer,
            unconditional=None if unconditional is None else unconditional.conversation,
        )  # fmt: skip

    def synthesize(
        self,
        missing: FACReport | ArrayLike,
        *,
        features: ArrayLike | None = None,
        anchor: Dataset | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        pool: Dataset | None = None,
        max_samples: int | None = None,
        max_requests: int | None = None,
        max_seconds: float | None = None,
        processes: Processes = Processes(),  # noqa: B008
    ) -> SynthesisResult:
        """Write samples for the features and return those that activate them.

        Args:
            missing: a `FACReport`, whose figures are brought up to date, or ids of features. `wanted` returns the
                features of a report that are written for.
            features: ids, or `RelevantFeatures`: of the features of `missing` write only for these, in their order.
            anchor: rows that a dictionary is built from when the synthesizer has none.
            cache_dir: a folder where answers and measurements are kept as they come. The same call after a kill asks
                for nothing again; other settings and bounds use what they share with it.
            pool: rows of the task's type, scored by `FACScorer`. Those that activate most of the features are accepted
                first (`select`), unless `avoid` or `keep` rules them out, and count as samples of what they activate.
            max_samples, max_requests, max_seconds: bounds on samples, completions, and time: once one is reached
                nothing new begins (rows under way are completed, within max_requests). The same call with the same
                bounds on samples or completions gives the same samples; a higher bound continues.
            processes: how processes share this call, used by the trainer's callback; all return the same samples.

        A warning tells of texts that the chat did not write. The same call asks for them again. Answers without text
        (refusals) stay in the cache of an `EndpointChat`; another `seed` asks for new ones. Where the chat takes no
        more requests at all (`report.chat_failed`), the samples made until then are returned.

        Raises: ValueError for features out of range, bounds below 1, a FACReport or pool measured with another
            featurizer, a report with a higher delta than the threshold, no threshold or dictionary; ChatError when the
            chat answered nothing at all.
        """
        budget = Budget(max_samples, max_requests, max_seconds)
        wanted, delta = self._chosen(self.wanted(missing), features), self._delta(missing)
        demand = self._demand(missing, wanted)
        self._check_has_dictionary(anchor)
        cache = Cache(cache_dir, processes)
        scorer = SampleScorer(self.featurizer, self.task, wanted, delta, cache)
        from_pool = FromPool([], [], demand) if pool is None else self._take_from_pool(pool, demand, scorer)
        unconditional = self._unconditional_prompt()
        verifier = Verifier(
            scorer, self._dictionary(anchor, cache.folder), self._avoided, self.settings.max_copied_words,
            None if unconditional is None else self._steered,
        )  # fmt: skip
        source = TextSource(self.chat, unconditional, self.featurizer.feature_fingerprint(), cache, budget)
        progress = self._progress(from_pool)
        bound = self._write(progress, verifier, source)
        if source.error is not None and not (source.answered or from_pool.accepted):
            raise source.error
        self._warn_of_lost_texts(source)
        return make_result(
            progress, source, settings=self.settings, featurizer=self.featurizer,
            missing=missing if isinstance(missing, FACReport) else None, wanted=wanted, delta=delta, bound=bound,
            provenance=self._provenance(),
        )  # fmt: skip

    def _take_from_pool(self, pool: Dataset, demand: dict[int, int], scorer: SampleScorer) -> FromPool:
        measurement = self.featurizer.measurement
        return take_from_pool(pool, demand, scorer, measurement=measurement, known=self._avoided, keep=self.keep)

    def _progress(self, from_pool: FromPool) -> Progress:
        return Progress(
            written={feature: [] for feature in from_pool.left},
            most={} if self.settings.aim == "missing" else from_pool.left,
            pool=from_pool.accepted + from_pool.rejected,
        )

    def _write(self, progress: Progress, verifier: Verifier, source: TextSource) -> str | None:
        """Write for the features of `progress`; returns the bound that ended it, if one did."""
        settings, scorer, prompt_format = self.settings, verifier.scorer, self.settings.prompt_format
        if prompt_format is None:
            features, n_samples = list(progress.written), progress.n_samples()
            prompt_format, bound = choose_prompt_format(settings, verifier, source, features, n_samples)
            if prompt_format is None:
                return bound
        generator = Generator(settings, verifier.dictionary, scorer.delta, prompt_format, source)
        completer = RowCompleter(settings, source, scorer, self.keep)
        return SynthesisLoop(progress, source, generator, verifier, completer).run()

    @staticmethod
    def _warn_of_lost_texts(source: TextSource) -> None:
        if source.gave_up is not None:
            problem = f"The chat takes no more requests: {source.gave_up}"
        elif source.lost:
            problem = f"The chat did not write {source.lost:,} texts (the first: {source.first_loss})"
        else:
            return
        remedy = (
            "The same call asks for the missing texts again. An EndpointChat keeps answers without text (refusals) in "
            "its cache: another seed asks for new ones."
        )
        warnings.warn(visible(f"{problem}. {remedy}"), stacklevel=3)

    def wanted(self, missing: FACReport | ArrayLike) -> np.ndarray:
        """Returns the features of a report that `synthesize` writes for, or the ids given: int64, the first are the
        missing features of most anchor rows, or those that fall short by most rows.

        Raises: ValueError for a report measured with another featurizer, ids out of range, and ids with
            aim="deficits".
        """
        if isinstance(missing, FACReport) and (found := differences(missing.measurement, self.featurizer.measurement)):
            raise ValueError(
                f"The FACReport was computed with another featurizer ({found}); recompute it with this one."
            )
        if self.settings.aim == "deficits":
            if not isinstance(missing, FACReport):
                raise ValueError("aim='deficits' needs a FACReport: ids do not say by how many rows they fall short.")
            ids = missing.deficits().query("significant")["feature"].to_numpy()
        else:
            ids = missing.missing if isinstance(missing, FACReport) else missing
        return check_feature_ids(ids, self.featurizer.d_sae, name="missing", may_be_empty=True)

    def _chosen(self, wanted: np.ndarray, features: ArrayLike | None) -> np.ndarray:
        if features is None:
            return wanted
        if isinstance(features, RelevantFeatures):
            features.check(self.featurizer.measurement)
        chosen = check_feature_ids(features, self.featurizer.d_sae, may_be_empty=True)
        return chosen[np.isin(chosen, wanted)]

    def _demand(self, missing: FACReport | ArrayLike, wanted: np.ndarray) -> dict[int, int]:
        """How many rows of a pool are to activate each feature; with aim="deficits" also the most samples of each."""
        if self.settings.aim == "missing":
            return dict.fromkeys(wanted.tolist(), 1)
        rows = missing.deficits().set_index("feature")["deficit"].loc[wanted]
        short = np.minimum(np.ceil(rows).astype(int), self.settings.samples_per_feature)
        return dict(zip(wanted.tolist(), short.tolist(), strict=True))

    def _delta(self, missing: FACReport | ArrayLike) -> np.ndarray:
        """The activation threshold of every feature, float64 [d_sae]."""
        told = missing.threshold if isinstance(missing, FACReport) else None
        threshold = told if self.threshold is None else self.threshold
        if threshold is None:
            raise ValueError("A list of ids carries no threshold: give FACSynthesizer threshold=, or pass a FACReport.")
        if told is not None and np.any(np.asarray(threshold) < told):
            raise ValueError(
                f"The FACReport's threshold is {told!s:.100}, the synthesizer's {threshold!s:.100}: samples would not "
                "cover what they are written for. Pass threshold=report.threshold, or leave it out."
            )
        return np.broadcast_to(check_threshold(threshold, self.featurizer.d_sae), self.featurizer.d_sae)

    def _check_has_dictionary(self, anchor: Dataset | None) -> None:
        if self.dictionary is None and anchor is None:
            raise ValueError(
                "The synthesizer has no dictionary: make it with dictionary= (build_dictionary(featurizer, rows) makes "
                "one), or pass synthesize(..., anchor=rows) to build one of these rows."
            )

    def _dictionary(self, anchor: Dataset | None, folder: Path | None) -> FeatureDictionary:
        """The synthesizer's, or one of the anchor rows, which is kept in the folder of the cache."""
        self._check_has_dictionary(anchor)
        if self.dictionary is not None:
            return self.dictionary
        from ..dictionary.build import build_dictionary
        from ..dictionary.dictionary import FeatureDictionary

        if folder is None:
            return build_dictionary(self.featurizer, anchor, rank=0, world_size=1)
        folder = folder / f"dictionary-{content_key(self.featurizer.fingerprint(), rows_digest(anchor))}"
        if not folder.exists():
            build_dictionary(self.featurizer, anchor, rank=0, world_size=1).save(folder)
        return FeatureDictionary.load(folder)

    def _unconditional_prompt(self) -> UnconditionalPrompt | None:
        """What the steered model continues, None without steering."""
        return unconditional_prompt(self.task, self._steered) if "steering" in self.settings.methods else None

    def _provenance(self) -> dict[str, dict[str, Any]]:
        """What is recorded with the samples, by fac_method."""
        shared = {"task": self.task.name, "seed": self.settings.seed, "prompt_version": PROMPT_VERSION}
        by_prompt = {**shared, "chat": chat_name(self.chat)}
        steered = {**shared, "chat": model_name(self.featurizer.model)}
        return dict.fromkeys(self.settings.methods, by_prompt) | {"pool": shared, "steering": steered}


def _check_reads_task(featurizer: SAEFeaturizer, task: Task) -> None:
    pool_over = featurizer.reader.pool_over
    try:
        featurizer.reader([task.featurizer_row(task.example(), pool_over)])
    except RowError as error:
        raise ValueError(
            f"The featurizer reads pool_over={pool_over!r}, but rows of task {task.name!r} have no such part "
            f"({error}): make it with pool_over={task.pool_over!r}."
        ) from error


def _can_write(featurizer: SAEFeaturizer) -> bool:
    from ..inputs.hidden_states import is_causal

    model = featurizer.model
    return model.get_output_embeddings() is not None and is_causal(model, featurizer.layer)


def _digest_of(dictionary: FeatureDictionary | None) -> str | None:
    if dictionary is None:
        return None
    digest = hashlib.sha256()
    for row in dictionary:
        words = [row["feature"], row["explanation"], [(s["before"], s["token"], s["after"]) for s in row["spans"]]]
        digest.update(json.dumps(words).encode())
    return digest.hexdigest()[:16]
