"""What a synthesis brought: the samples in order, FAC before and after, each method beside the baseline, the cost.

In: the loop's progress, and the report of the coverage that the features were missing from. Out: `SynthesisResult`.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from pydantic import ConfigDict

from ..coverage.report import AddedRows, FACReport
from ..storage.files import try_output, write_whole
from ..storage.parquet import read_parquet, write_parquet
from ..storage.terminal import visible
from ..storage.validation import Ids, Number, Numbers, checked
from .baseline import PermutationBaseline, compare_with_permutations
from .candidates import Candidate, Rejection, Status
from .settings import METHODS

if TYPE_CHECKING:
    from datasets import Dataset
    from scipy.sparse import csr_array

    from ..features.featurizer import SAEFeaturizer
    from ..tasks.task import Task
    from .rounds import Progress
    from .settings import SynthesisSettings
    from .text_source import TextSource

_SAMPLES, _DROPPED, _REPORT = "samples.parquet", "dropped.parquet", "report.json"


@dataclass(frozen=True, eq=False)
class SynthesisReport:
    """What came of writing for features. It is a flat record of results, hence its many fields; their types say how
    `SynthesisResult.load` reads them.

    features: int64 ids, all that were asked for. activated: those with a sample. exhausted: those for which all rounds
        were tried in vain. The rest was left: something ended the loop, or the dictionary does not describe them.
    samples: accepted rows.
    fac_before, fac_after: FAC of the data, and of the data and the samples, against the anchor of the `FACReport` that
        was given; NaN where ids were given. Samples may activate missing features that they were not written for.
    covered: int64 ids, the anchor's features that the data or the samples activate; where ids were given, those of
        them that the samples activate.
    curve: float64 [samples + 1], FAC after each sample in order; where ids were given, the share of them activated.
    kl_before, kl_after, frequency_cosine_before, frequency_cosine_after, jensen_shannon_before,
        jensen_shannon_after: how often features are active beside the anchor (see `FACReport`), or NaN.
    methods: by method, and "all" for all of them, the hit rates of their texts beside the permutation baseline. Flawed
        texts (truncated, copies of spans, ...) and those for pairs only are left out; near-duplicates count, and so do
        texts whose row was dropped.
    copied: share of the texts that activate their feature that copy a span.
    dropped: number of rejected candidates by reason.
    requests, prompt_tokens, completion_tokens: completions asked for and their tokens, those in the cache included.
    seconds: of this call.
    ended: what ended the loop before all rounds were tried, else None. chat_failed: whether that was the chat, which
        took no more requests; single texts that it did not write are counted in `dropped`.
    """

    __pydantic_config__ = ConfigDict(strict=True)

    features: Ids
    activated: Ids
    exhausted: Ids
    samples: int
    fac_before: Number
    fac_after: Number
    covered: Ids
    curve: Numbers
    kl_before: Number
    kl_after: Number
    frequency_cosine_before: Number
    frequency_cosine_after: Number
    jensen_shannon_before: Number
    jensen_shannon_after: Number
    methods: dict[str, PermutationBaseline]
    copied: float
    dropped: dict[str, int]
    requests: int
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    ended: str | None
    chat_failed: bool

    def to_dict(self) -> dict[str, Any]:
        """Returns all fields as JSON values: arrays become lists, NaN becomes None."""
        values = vars(self) | {"methods": {name: method._asdict() for name, method in self.methods.items()}}
        text = json.dumps(values, default=np.ndarray.tolist)
        return json.loads(text, parse_constant=lambda name: None if name == "NaN" else name)

    def __str__(self) -> str:
        lines = [
            f"{self.samples:,} samples activate {len(self.activated):,} of {len(self.features):,} features; "
            f"{len(self.exhausted):,} could not be activated"
        ]
        if not math.isnan(self.fac_before):
            lines.append(f"FAC {self.fac_before:.3f} before, {self.fac_after:.3f} after")
            lines.append(
                "how often, beside the anchor: "
                f"cosine {self.frequency_cosine_before:.3f} before, {self.frequency_cosine_after:.3f} after; "
                f"Jensen-Shannon {self.jensen_shannon_before:.3f}, {self.jensen_shannon_after:.3f} nats; "
                f"KL {self.kl_before:.3f}, {self.kl_after:.3f} nats"
            )
        lines += [f"{name}: {method}" for name, method in self.methods.items()]
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.items())
        lines.append(
            f"dropped: {reasons or 'none'}; {self.copied:.0%} of the texts that activate their feature copy a span"
        )
        lines.append(
            f"cost: {self.requests:,} completions, {self.prompt_tokens:,} prompt tokens and "
            f"{self.completion_tokens:,} written, {self.seconds:.0f} s"
            + (f"; ended by {self.ended}" if self.ended else "")
        )
        return visible("\n".join(lines))


@dataclass(frozen=True)
class SynthesisResult:
    """What was written.

    dataset: rows of the task's TRL type, the pool's rows, then all first samples of features, then all second ones,
        with the columns fac_feature (int32: the feature that the row was written for), fac_activation (float32),
        fac_method (the method that wrote it, or "pool") and fac_provenance (JSON: chat, seed, round, ...).
    report: see `SynthesisReport`.
    dropped: rejected candidates: fac_feature, fac_method, fac_activation, text, reason.
    """

    dataset: Dataset
    report: SynthesisReport
    dropped: Dataset

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes samples.parquet, dropped.parquet and report.json into a folder, each whole or not at all."""
        folder = Path(folder)
        try_output(folder, folder=True)
        write_parquet(self.dataset, folder / _SAMPLES)
        write_parquet(self.dropped, folder / _DROPPED)
        write_whole(folder / _REPORT, json.dumps(self.report.to_dict(), indent=1))

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Self:
        """Returns what `save` or `hf-fac synthesize` wrote. Raises: ValueError for a folder with something else."""
        folder, remedy = Path(folder), "give a folder that SynthesisResult.save or `hf-fac synthesize` wrote"
        if absent := [name for name in (_SAMPLES, _DROPPED, _REPORT) if not (folder / name).is_file()]:
            raise ValueError(f"{folder} has no {absent[0]}: {remedy}.")
        report = checked(SynthesisReport, (folder / _REPORT).read_bytes(), str(folder / _REPORT), remedy)
        return cls(read_parquet(folder / _SAMPLES), report, read_parquet(folder / _DROPPED))


def make_result(
    progress: Progress,
    source: TextSource,
    *,
    settings: SynthesisSettings,
    featurizer: SAEFeaturizer,
    missing: FACReport | None,
    wanted: np.ndarray,
    delta: np.ndarray,
    bound: str | None,
    provenance: Mapping[str, Mapping[str, Any]],
) -> SynthesisResult:
    """Returns the samples with their report.

    Args:
        source: where the texts are from; it knows what they cost.
        featurizer: pools the samples as the data.
        missing: the report that names the features, None where ids were given.
        wanted: int64 ids, all that were asked for. delta: float64 [d_sae].
        bound: the one that ended the loop, if one did.
        provenance: what is recorded with the samples, by origin.
    """
    candidates = progress.all()
    samples = in_order([c for c in candidates if c.status is Status.ACCEPTED])[: source.budget.max_samples]
    activations = _activations(samples, settings.task, featurizer)
    added = _added(wanted, delta, activations) if missing is None else missing.with_added(activations)
    activated = {c.feature for c in samples} | {f for c in samples for f in c.provenance.get("fills", [])}
    written = [c for c in candidates if c.method != "pool"]
    activating = [c for c in written if c.score is not None and c.feature in c.score.activates]
    rejected = [c for c in candidates if c.status is Status.REJECTED]
    in_vain = set(progress.exhausted(settings.schedule())) - activated
    report = SynthesisReport(
        features=wanted,
        activated=np.array([f for f in wanted.tolist() if f in activated], np.int64),
        exhausted=np.array([f for f in wanted.tolist() if f in in_vain], np.int64),
        samples=len(samples),
        fac_before=math.nan if missing is None else missing.fac,
        fac_after=added.fac,
        covered=added.covered,
        curve=added.curve,
        kl_before=math.nan if missing is None else missing.kl_divergence,
        kl_after=added.kl_divergence,
        frequency_cosine_before=math.nan if missing is None else missing.frequency_cosine,
        frequency_cosine_after=added.frequency_cosine,
        jensen_shannon_before=math.nan if missing is None else missing.jensen_shannon,
        jensen_shannon_after=added.jensen_shannon,
        methods=by_method(written, seed=settings.seed),
        copied=sum(c.rejection is Rejection.COPY for c in activating) / len(activating) if activating else 0.0,
        dropped=dict(Counter(c.category for c in rejected).most_common()),
        requests=source.budget.requests,
        prompt_tokens=source.budget.prompt_tokens,
        completion_tokens=source.budget.completion_tokens,
        seconds=time.monotonic() - source.budget.started,
        ended=bound if source.gave_up is None else f"the chat: {source.gave_up}",
        chat_failed=source.gave_up is not None,
    )
    return SynthesisResult(_dataset(settings.task, samples, provenance), report, _dropped(rejected))


def in_order(samples: Sequence[Candidate]) -> list[Candidate]:
    """Returns the pool's rows, then the strongest sample of each feature, then the second strongest, and so on."""
    pool = [c for c in samples if c.method == "pool"]
    rank: Counter[int] = Counter()
    ranks = {}
    for candidate in sorted(samples, key=lambda c: -c.activation):
        ranks[id(candidate)] = rank[candidate.feature]
        rank[candidate.feature] += 1
    return pool + sorted((c for c in samples if c.method != "pool"), key=lambda c: ranks[id(c)])


def by_method(candidates: Sequence[Candidate], *, seed: int = 0) -> dict[str, PermutationBaseline]:
    """Returns by method, and for "all" where there are several, what its texts did for the features."""
    found = {}
    names = [name for name in METHODS if any(c.method == name for c in candidates)]
    for name in [*names, "all"] if len(names) > 1 else names:
        texts = [c for c in candidates if name in (c.method, "all")]
        sound = [c for c in texts if c.counts_in_rates]
        found[name] = compare_with_permutations(
            [c.feature for c in texts], [c.feature for c in sound], [c.score.activates for c in sound], seed=seed
        )
    return found


def _dataset(task: Task, samples: Sequence[Candidate], provenance: Mapping[str, Mapping[str, Any]]) -> Dataset:
    parts = task.features()
    columns = {name: [c.row[name] for c in samples] for name in parts} | {
        "fac_feature": [c.feature for c in samples],
        "fac_activation": [c.activation for c in samples],
        "fac_method": [c.method for c in samples],
        "fac_provenance": [json.dumps({**provenance[c.method], **c.provenance}) for c in samples],
    }
    return _table(columns, parts)


def _dropped(rejected: Sequence[Candidate]) -> Dataset:
    columns = {
        "fac_feature": [c.feature for c in rejected],
        "fac_method": [c.method for c in rejected],
        "fac_activation": [c.activation for c in rejected],
        "text": [c.text for c in rejected],
        "reason": [c.reason for c in rejected],
    }
    return _table(columns, {})


def _table(columns: dict[str, list[Any]], types: Mapping[str, Any]) -> Dataset:
    from datasets import Dataset, Features, Value

    own = {"fac_feature": Value("int32"), "fac_activation": Value("float32"), **types}
    return Dataset.from_dict(columns, Features({name: own.get(name, Value("string")) for name in columns}))


def _activations(samples: Sequence[Candidate], task: Task, featurizer: SAEFeaturizer) -> csr_array:
    """What the samples activate, pooled as the data are: [n_samples, d_sae]."""
    from scipy.sparse import csr_array

    if not samples:
        return csr_array((0, featurizer.d_sae))
    return featurizer([task.featurizer_row(c.row, featurizer.reader.pool_over) for c in samples])


def _added(features: np.ndarray, delta: np.ndarray, activations: csr_array) -> AddedRows:
    """What samples add for features that no report names: the share of them, in place of FAC."""
    active = np.zeros((activations.shape[0] + 1, len(features)), bool)
    active[1:] = np.logical_or.accumulate(activations[:, features].toarray() > delta[features])
    return AddedRows(math.nan, active.mean(axis=1), np.sort(features[active[-1]]), math.nan)
