"""What a synthesis was worth: samples in order, FAC before and after, each way of writing beside chance, the cost.

In: what the journal holds of every text, and the report of the coverage that the features were missing from. Out:
`SynthesisResult`.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..storage.terminal import visible
from .baseline import Effect, effect

if TYPE_CHECKING:
    from datasets import Dataset

    from .candidates import Candidate

# A text that misses its feature, or that was not needed, is sound; one refused for any of these reasons is not.
_SOUND = ("lost in its row", "no whole row", "the rejected answer", "near-duplicate of another sample")


@dataclass(frozen=True, eq=False)
class SynthesisReport:
    """What came of writing for features.

    features, filled, resisted: int64 ids: all, those with a sample of their own, and those for which all was tried in
        vain (the rest was left, as a bound was reached, the chat failed, or the dictionary does not know them).
    samples: rows kept.
    fac_before, fac_after: FAC of the data, and of the data and the samples, against the anchor of the `FACReport` that
        was given; NaN where ids were given. Samples may activate missing features that they were not written for.
    curve: float64 [samples + 1], FAC after each sample in order; without a FACReport the share of `features` that are
        activated.
    kl_before, kl_after: KL(anchor || data) in nats over the features of the anchor (Eq. 3, see `FACReport`), or NaN.
    ways: by way of writing, and for "all" of them, what its texts did beside chance (`chance.Effect`); texts that were
        refused for what they are (cut off, copies, ...) are left out.
    copied: share of the texts that activate their feature that share more words with a span than allowed.
    dropped: how many texts were refused, by reason.
    requests, prompt_tokens, completion_tokens: of all that was asked for, in earlier calls on the journal too.
    seconds: of this call. ended: what ended it before all was tried: a bound, or a chat that failed; else None.
    """

    features: np.ndarray
    filled: np.ndarray
    resisted: np.ndarray
    samples: int
    fac_before: float
    fac_after: float
    curve: np.ndarray
    kl_before: float
    kl_after: float
    ways: dict[str, Effect]
    copied: float
    dropped: dict[str, int]
    requests: int
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    ended: str | None

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it for JSON: arrays become lists, NaN None."""
        values = vars(self) | {"ways": {name: way._asdict() for name, way in self.ways.items()}}
        text = json.dumps(values, default=np.ndarray.tolist)
        return json.loads(text, parse_constant=lambda name: None if name == "NaN" else name)

    def __str__(self) -> str:
        m = len(self.features)
        lines = [
            f"{self.samples:,} samples fill {len(self.filled):,} of {m:,} features; {len(self.resisted):,} resisted"
        ]
        if not math.isnan(self.fac_before):
            lines.append(
                f"FAC {self.fac_before:.3f} before, {self.fac_after:.3f} after; "
                f"KL {self.kl_before:.3f} before, {self.kl_after:.3f} after"
            )
        for name, way in self.ways.items():
            lines.append(
                f"{name}: {way.texts:,} texts for {way.features:,} features fill {way.filled:.2f} of them (by chance "
                f"{way.filled_by_chance:.2f}, {way.filled_interval[0]:.2f} to {way.filled_interval[1]:.2f}); "
                f"{way.hit_rate:.3f} of texts hit (by chance {way.hits_by_chance:.4f}: {way.ratio:.1f} x, "
                f"{way.ratio_interval[0]:.1f} to {way.ratio_interval[1]:.1f})"
            )
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.items())
        lines.append(f"dropped: {reasons or 'none'}; {self.copied:.0%} of the texts that hit copy a span")
        lines.append(
            f"cost: {self.requests:,} texts, {self.prompt_tokens:,} tokens of prompts and {self.completion_tokens:,} "
            f"written, {self.seconds:.0f} s" + (f"; ended by {self.ended}" if self.ended else "")
        )
        return visible("\n".join(lines))


@dataclass(frozen=True)
class SynthesisResult:
    """What was written.

    dataset: rows of the task's TRL type, all first samples of features and then all second ones, with the columns
        fac_feature (int32: what the row was written for), fac_activation (float32), fac_way ("pool", "words",
        "two_step", "steering") and fac_provenance (JSON: chat, seed, prompt version, request, form, strength, ...).
    report: what it was worth, see `SynthesisReport`.
    dropped: texts that were refused: fac_feature, fac_way, fac_activation, text, reason.
    """

    dataset: Dataset
    report: SynthesisReport
    dropped: Dataset


def make_result(
    synthesizer: Any,
    missing: Any,
    features: np.ndarray,
    taken: Sequence[Candidate],
    outcomes: dict[str, dict],
    ended: str | None,
    *,
    seconds: float,
    max_samples: int | None,
) -> SynthesisResult:
    """Returns the samples in order with what they were worth.

    Args:
        missing: what was asked for, a `FACReport` or ids. features: its ids.
        taken: rows of a pool, refused ones too. outcomes: what was written, by piece (`PieceWork.run`).
    """
    records = [c.record() for c in taken] + [c for o in outcomes.values() for c in o["candidates"]]
    _filter_again(records, synthesizer.settings.keep)
    kept = _without_repeats(_in_order([c for c in records if c["chosen"]]))
    chosen = kept[:max_samples]
    dataset = _dataset(synthesizer, chosen)
    before, after, curve, kl = _coverage(synthesizer, missing, features, chosen)
    own = {c["feature"] for c in chosen} | {f for c in chosen for f in c["asked"].get("fills", [])}
    written = [c for c in records if c["way"] != "pool"]
    tried = {c["feature"] for o in outcomes.values() if o["tried"] for c in o["candidates"]}
    resisted = tried - own - {c["feature"] for c in kept}
    hits = [c for c in written if c["feature"] in c["activates"]]
    refused = [c for c in records if c["refused"]]
    report = SynthesisReport(
        features=features,
        filled=np.array([f for f in features.tolist() if f in own], np.int64),
        resisted=np.array([f for f in features.tolist() if f in resisted], np.int64),
        samples=len(chosen),
        fac_before=before,
        fac_after=after,
        curve=curve,
        kl_before=kl[0],
        kl_after=kl[1],
        ways=by_way(written, seed=synthesizer.settings.seed),
        copied=sum(c["refused"] == "copy of what the prompt showed" for c in hits) / len(hits) if hits else 0.0,
        dropped=dict(Counter(c["refused"].split(":")[0].split(",")[0] for c in refused).most_common()),
        **{
            name: sum(o[name] for o in outcomes.values()) for name in ("requests", "prompt_tokens", "completion_tokens")
        },
        seconds=seconds,
        ended=ended,
    )
    return SynthesisResult(dataset, report, _dropped(refused))


def _filter_again(records: list[dict], keep: Callable[[Mapping[str, Any]], bool] | None) -> None:
    """A journal does not know whether the caller's filter is the one that it was begun with."""
    for c in records:
        if keep is not None and c["chosen"] and not keep(c["row"]):
            c["chosen"], c["refused"] = False, "the caller's own filter"


def _in_order(chosen: list[dict]) -> list[dict]:
    """The pool's rows, then all first samples of features, then all second ones; a feature's strongest comes first."""
    rank: Counter[int] = Counter()
    keyed = []
    for place, c in enumerate(sorted(chosen, key=lambda c: -c["activation"])):
        keyed.append((c["way"] != "pool", rank[c["feature"]], place, c))
        rank[c["feature"]] += 1
    order = {id(c): i for i, c in enumerate(chosen)}
    return [c for *_, c in sorted(keyed, key=lambda k: (k[0], k[1], order[id(k[3])]))]


def _without_repeats(chosen: list[dict]) -> list[dict]:
    """Pieces do not see each other's texts."""
    from .filters import NearDuplicates

    known, kept = NearDuplicates(), []
    for c in chosen:
        if known.source_of(c["text"]):
            c["chosen"], c["refused"] = False, "near-duplicate of another sample"
            continue
        known.add(c["text"], "another sample")
        kept.append(c)
    return kept


def _dataset(synthesizer: Any, chosen: list[dict]) -> Dataset:
    from datasets import Dataset, Features, Value

    from ..dictionary.asking import chat_name, model_name
    from ..tasks.prompts import PROMPT_VERSION

    shared = {
        "task": synthesizer.task.name, "seed": synthesizer.settings.seed, "prompt_version": PROMPT_VERSION,
    }  # fmt: skip
    words = {"chat": chat_name(synthesizer.chat)}
    chats = {"pool": {}, "steering": {"chat": model_name(synthesizer.featurizer.model)}}
    rows = [
        {
            **c["row"],
            "fac_feature": c["feature"],
            "fac_activation": c["activation"],
            "fac_way": c["way"],
            "fac_provenance": json.dumps(
                shared | chats.get(c["way"], words) | c["asked"] | {"request": c["request"], "answer": c["number"]}
            ),
        }
        for c in chosen
    ]
    own = {"fac_feature": "int32", "fac_activation": "float32", "fac_way": "string", "fac_provenance": "string"}
    features = Features({**synthesizer.task.features(), **{name: Value(kind) for name, kind in own.items()}})
    return Dataset.from_dict({name: [row[name] for row in rows] for name in features}, features)


def _dropped(refused: list[dict]) -> Dataset:
    from datasets import Dataset, Features, Value

    kinds = {
        "fac_feature": "int32", "fac_way": "string", "fac_activation": "float32", "text": "string", "reason": "string",
    }  # fmt: skip
    columns = {
        "fac_feature": [c["feature"] for c in refused], "fac_way": [c["way"] for c in refused],
        "fac_activation": [c["activation"] for c in refused], "text": [c["text"] for c in refused],
        "reason": [c["refused"] for c in refused],
    }  # fmt: skip
    return Dataset.from_dict(columns, Features({name: Value(kind) for name, kind in kinds.items()}))


def _coverage(
    synthesizer: Any, missing: Any, features: np.ndarray, chosen: list[dict]
) -> tuple[float, float, np.ndarray, tuple[float, float]]:
    """FAC before and after, the curve, and KL before and after."""
    from ..coverage.coverage import FACReport

    own, task = synthesizer.featurizer, synthesizer.task
    rows = [task.as_read(c["row"], own.reader.pool_over) for c in chosen]
    if isinstance(missing, FACReport):
        table = missing.table
        ids, delta = table["feature"], table["delta"]
        covered = table["covered"].copy()
        counts = np.array([table["anchor_rows"], table["data_rows"]], np.float64)
    else:
        ids = np.sort(features)
        delta = np.broadcast_to(np.asarray(synthesizer.threshold, np.float64), own.d_sae)[ids]
        covered = np.zeros(len(ids), bool)
        counts = None
    curve, active = [covered.mean() if len(ids) else math.nan], np.zeros(len(ids))
    if rows:
        acts = own(rows)
        for number in range(len(rows)):
            part = slice(acts.indptr[number], acts.indptr[number + 1])
            found = np.zeros(own.d_sae, np.float32)
            found[acts.indices[part]] = acts.data[part]
            above = found[ids] > delta
            active += above
            covered |= above
            curve.append(covered.mean() if len(ids) else math.nan)
    curve = np.array(curve)
    if counts is None or not len(ids):
        return math.nan, math.nan, curve, (math.nan, math.nan)
    return float(curve[0]), float(curve[-1]), curve, (_kl(*counts), _kl(counts[0], counts[1] + active))


def _kl(anchor_rows: np.ndarray, data_rows: np.ndarray) -> float:
    p, q = ((rows + 0.5) / (rows + 0.5).sum() for rows in (anchor_rows, data_rows))
    return float(np.sum(p * np.log(p / q)))


def by_way(written: Sequence[dict], *, seed: int = 0) -> dict[str, Effect]:
    """Returns what the texts of each way of writing did for their features, and of "all" where there are several.

    Args:
        written: records of candidates (`Candidate.record`).
    """
    found = {}
    names = list(dict.fromkeys(c["way"] for c in written))
    for name in [*names, "all"] if len(names) > 1 else names:
        texts = [c for c in written if name in (c["way"], "all")]
        sound = [c for c in texts if c["text"] and (not c["refused"] or c["refused"].startswith(_SOUND))]
        features = [c["feature"] for c in texts]
        found[name] = effect(features, [c["feature"] for c in sound], [c["activates"] for c in sound], seed=seed)
    return found
