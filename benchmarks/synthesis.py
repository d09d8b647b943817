"""What writing for missing features brings, beside chance, and how fast it is: on the embedded model.

    python benchmarks/synthesis.py fill [--features 40] [--seed 0]       # each way of writing, and all together
    python benchmarks/synthesis.py steps [--features 60] [--seeds 3]     # two steps against one, as many texts each
    python benchmarks/synthesis.py speed [--pairs 5]                     # tokens a second beside plain generate

Features are drawn by seed from those that the narrow seed set misses and at least three anchor rows activate. Only a
text written for a feature can fill it; texts that are copies, scraps or near-duplicates count for nothing. Chance is
what as many texts that were written for other features do.
"""

import argparse
import statistics
import time

import numpy as np
import torch

from hf_fac import FeatureCoverage
from hf_fac.chat.local import LocalChat
from hf_fac.embedded.loader import load_anchor, load_dictionary, load_featurizer, load_seed
from hf_fac.storage.journal import Journal
from hf_fac.synthesis.piecework import unbounded
from hf_fac.synthesis.report import by_way
from hf_fac.synthesis.synthesizer import FACSynthesizer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("what", choices=["fill", "steps", "speed"])
parser.add_argument("--features", type=int)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--seeds", type=int, default=3)
parser.add_argument("--pairs", type=int, default=5)
options = parser.parse_args()

featurizer = load_featurizer(pool_over="user")
seed_rows, anchor_rows, dictionary = load_seed(), load_anchor(), load_dictionary()
data, anchor = (
    FeatureCoverage.from_activations(featurizer(rows), measurement=featurizer.measurement)
    for rows in (seed_rows, anchor_rows)
)
report = data.compare(anchor)
supported = report.missing[report.missing_support >= 3]
chat = LocalChat(featurizer.model, featurizer.tokenizer, batch_size=96)


def draw(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).choice(supported, n, replace=False)


def synthesizer(**settings) -> FACSynthesizer:
    avoid = {"the seed set": seed_rows, "the anchor set": anchor_rows}
    settings = {"task": "instruction_following", "form": "list", "avoid": avoid, **settings}
    return FACSynthesizer(chat, featurizer, dictionary, threshold=report.threshold, **settings)


def fill() -> None:
    features = draw(options.features or 40, options.seed)
    print(f"{len(features)} of {len(supported)} missing features with three anchor rows; delta {report.threshold:.3f}")
    for name, ways in (
        ("words", ["one_step"]),
        ("two-step words", ["two_step"]),
        ("steering", ["steering"]),
        ("all together", ["two_step", "steering"]),
    ):
        made = synthesizer(ways=ways, samples_per_feature=1, answer_tokens=160, seed=options.seed)
        result = made.synthesize(features)
        print(f"\n{name}: {len(result.report.filled) / len(features):.2f} filled by a whole sample\n{result.report}")


def searched(features: np.ndarray, way: str, seed: int, journal: Journal) -> list[dict]:
    """All texts of a way, none left out because a feature was filled before. The first round is the same of both ways,
    and written once."""
    made = synthesizer(ways=[way], samples_per_feature=10**6, rounds=1, seed=seed)
    with journal.claim("piece") as piece:
        writer = made._writer(made._gauge(features), "list", piece, unbounded)
        writer.search(features.tolist())
    return [c.record() for own in writer.candidates.values() for c in own]


def steps() -> None:
    n = options.features or 60
    differences = []
    for seed in range(options.seeds):
        features = draw(n, seed)
        filled, journal = {}, Journal(None, {})
        for way in ("one_step", "two_step"):
            written = searched(features, way, seed, journal)
            later = [c for c in written if not c["request"].startswith("0:")]
            everything = by_way([{**c, "way": way} for c in written])[way]
            second = by_way([{**c, "way": way} for c in later])[way]
            hits = {c["feature"] for c in written if not c["refused"] and c["feature"] in c["activates"]}
            filled[way] = np.array([feature in hits for feature in features.tolist()])
            print(
                f"seed {seed}, {way}: {len(written)} texts fill {everything.filled:.3f} (chance "
                f"{everything.filled_by_chance:.3f}); of the {len(later)} that follow the first round "
                f"{second.hit_rate:.3f} hit (chance {second.hits_by_chance:.4f})",
                flush=True,
            )
        differences.extend((filled["two_step"].astype(float) - filled["one_step"]).tolist())
    rng = np.random.default_rng(0)
    means = [np.mean(rng.choice(differences, len(differences))) for _ in range(2000)]
    low, high = np.quantile(means, [0.025, 0.975])
    print(f"two steps fill {np.mean(differences):+.3f} more than one ({low:+.3f} to {high:+.3f}, bootstrap)")


def speed() -> None:
    features = draw(options.features or 40, options.seed)
    made = synthesizer(ways=["one_step"])
    writer = made._writer(made._gauge(features), "list", None, unbounded)
    requests = [writer._request(0, "words", feature) for feature in features.tolist()]
    settings = {"temperature": 0.8, "top_p": 0.9}
    model, tokenizer = featurizer.model, featurizer.tokenizer
    prompts = [
        tokenizer.apply_chat_template(r.conversation, tokenize=False, add_generation_prompt=True) + r.begun
        for r in requests
    ]

    def ours(seed: int) -> float:
        start = time.perf_counter()
        found = chat.complete(
            [r.conversation for r in requests],
            begun=[r.begun for r in requests],
            n=4,
            max_tokens=64,
            seed=seed,
            **settings,
        )
        return sum(c.completion_tokens for cs in found for c in cs) / (time.perf_counter() - start)

    def plain(seed: int) -> float:
        torch.manual_seed(seed)
        start, written = time.perf_counter(), 0
        each = sorted(prompts * 4, key=len)
        for begin in range(0, len(each), chat.batch_size):
            batch = each[begin : begin + chat.batch_size]
            inputs = tokenizer(batch, padding=True, padding_side="left", return_tensors="pt", add_special_tokens=False)
            with torch.inference_mode():
                out = model.generate(**inputs, do_sample=True, max_new_tokens=64, top_k=0, **settings)
            new = out[:, inputs["input_ids"].shape[1] :]
            ended = (new == tokenizer.eos_token_id).long().cumsum(-1)
            written += int((ended - (new == tokenizer.eos_token_id).long() == 0).sum())
        return written / (time.perf_counter() - start)

    ours(0)
    ratios = []
    for number in range(options.pairs):
        order = (ours, plain) if number % 2 else (plain, ours)
        found = {run: run(number) for run in order}
        ratios.append(found[ours] / found[plain])
        print(f"{found[ours]:.0f} tokens/s, plain generate {found[plain]:.0f}: {ratios[-1]:.2f} x", flush=True)
    print(
        f"median of {options.pairs} pairs: {statistics.median(ratios):.2f} x ({min(ratios):.2f} to {max(ratios):.2f})"
    )


{"fill": fill, "steps": steps, "speed": speed}[options.what]()
