"""Rows written for features that narrow training sets miss, as ways for added_rows.py and predictors.py (RQ1 and RQ5 of
arXiv 2602.10388).

    python benchmarks/written_rows.py --task toxicity --data toxicity.jsonl --method two_step --rows 100
        [--temperature 0.8] [--share 0.01] [--samples-per-feature 1]

All is done on the development half. The features are those that more than half of the seed sets of added_rows.py miss
and at least three rows of the anchor set activate; the most frequent ones come first. SmolLM2-135M-Instruct writes, one
row after the other is measured and kept if it activates its feature, until there are as many as asked for. Printed are
the share of texts and of features that this took, beside the permutation baseline: what as many texts that were written
for other features do.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace

import numpy as np
from added_rows import SHARE, seed_and_pools
from datasets import Dataset
from predictors import Predictors, clusters_of
from study import MAX_TOKENS, Rows, conversation, followed, read_rows, study_options

from hf_fac import FACSynthesizer, LocalChat, Task, get_task
from hf_fac.embedded import load_featurizer
from hf_fac.synthesis.settings import METHODS

SEED_SETS, SUPPORT = 20, 3
TWEET = "an insulting, threatening or contemptuous tweet, as people write it when they are angry; nobody real is named"


def task_of(name: str) -> Task:
    if name == "toxicity":
        return replace(get_task("toxicity"), pool_over="all", label="toxic", parts={"text": TWEET})
    return replace(get_task("helpfulness" if name == "preference" else "instruction_following"), pool_over="all")


def often_missed(task: str, rows: Rows, predictors: Predictors, share: float) -> np.ndarray:
    """Features that more than half of the seed sets miss, the most frequent ones of the anchor set first."""
    active, every = predictors.active[share], followed(task, rows)
    support = active[predictors.followed_anchor].sum(0)
    cluster = clusters_of(rows.units[every])
    seeds = [seed_and_pools(rows, every, np.random.default_rng(n), cluster)[0] for n in range(SEED_SETS)]
    missed = np.mean([active[seed].sum(0) == 0 for seed in seeds], axis=0)
    features = np.flatnonzero((missed > 0.5) & (support >= SUPPORT))
    return features[np.argsort(-support[features], kind="stable")]


def as_row(task: str, made: dict) -> dict:
    """A written row, with the columns of the data."""
    if task == "toxicity":
        return {"text": made["text"], "label": made["label"]}
    texts = {part: made[part][-1]["content"] for part in task_of(task).parts}
    if task == "instructions":
        return texts
    return {side: f"Human: {texts['prompt']}\n\nAssistant: {texts[side]}" for side in ("chosen", "rejected")}


def main() -> None:
    parser = study_options(__doc__)
    parser.add_argument("--method", choices=METHODS, default="two_step")
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--share", type=float, default=SHARE, help="sets delta; one of those of predictors.py")
    parser.add_argument("--samples-per-feature", type=int, default=1)
    parser.add_argument("--name", help="of the file, NAME.jsonl; by default TASK-METHOD")
    options = parser.parse_args()
    halves = read_rows(options.task, options.data, options.output, limit=options.limit)
    rows = halves["development"]
    predictors = Predictors(options.task, rows)
    features = often_missed(options.task, rows, predictors, options.share)
    delta = predictors.delta(options.share)
    anchor = [conversation(options.task, rows.records[i]) for i in predictors.followed_anchor]
    featurizer = load_featurizer(max_length=MAX_TOKENS[options.task])
    synthesizer = FACSynthesizer(
        LocalChat(featurizer.model, featurizer.tokenizer, batch_size=96), featurizer, task=task_of(options.task),
        threshold=delta, methods=[options.method], prompt_format="list", temperature=options.temperature,
        samples_per_feature=options.samples_per_feature, answer_tokens=96,
        avoid={half: of.texts for half, of in halves.items()},
    )  # fmt: skip
    start = time.perf_counter()
    result = synthesizer.synthesize(
        features, anchor=Dataset.from_list(anchor), cache_dir=options.output / "written", max_samples=options.rows
    )
    name = options.name or f"{options.task}-{options.method}"
    with (options.output / f"{name}.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(as_row(options.task, made)) + "\n" for made in result.dataset)
    print(f"{name}: {len(features)} features are often missed; delta {delta:.2f}; {time.perf_counter() - start:.0f} s")
    print(result.report)


if __name__ == "__main__":
    main()
