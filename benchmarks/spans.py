"""How fast a dictionary's spans are collected, beside plain scoring of the same rows, on the embedded model.

    python benchmarks/spans.py [--pairs 7] [--repeat 1] [--device cpu]

Each pair runs `featurizer(rows)` and `build_dictionary(featurizer, rows)`, the texts of all spans included, one after
the other; the ratio of their times is taken in each pair, and the median of the pairs is printed: 0.8 or more is asked.
The embedded anchor set is the worst case: so few rows that nearly every activation is among the ten strongest.
--repeat takes each row so many times, with its number before it, so that most are not.
"""

import argparse
import os
import statistics
import time

import torch

from hf_fac.dictionary.build import build_dictionary
from hf_fac.dictionary.top_spans import TopSpans
from hf_fac.embedded.loader import load_anchor, load_featurizer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--pairs", type=int, default=7)
parser.add_argument("--repeat", type=int, default=1)
parser.add_argument("--device", default="cpu")
options = parser.parse_args()

featurizer = load_featurizer(device=options.device)
rows = [{"messages": row["messages"]} for row in load_anchor()]
if options.repeat > 1:
    rows = [
        {"messages": [{"role": "user", "content": f"{number}. {row['messages'][0]['content']}"}, *row["messages"][1:]]}
        for number in range(options.repeat)
        for row in rows
    ]
tokens = sum(map(len, featurizer.reader(rows).ids))


def score() -> None:
    for start in range(0, len(rows), 1000):
        featurizer(rows[start : start + 1000])


def seconds(job) -> float:
    if featurizer.model.device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


jobs = [score, lambda: build_dictionary(featurizer, rows)]
featurizer(rows[:40])
ratios, speeds = [], []
for number in range(options.pairs):
    # Which goes first alternates, so that a drift of the machine cancels.
    order = [0, 1] if number % 2 == 0 else [1, 0]
    times = {job: seconds(jobs[job]) for job in order}
    ratios.append(times[0] / times[1])
    speeds.append(tokens / times[1])
size = sum(getattr(TopSpans(featurizer.d_sae, 10), name).nbytes for name in ("activation", "window", "row", "position"))
print(f"{len(rows)} rows, {tokens} tokens, {featurizer.d_sae} features, load {os.getloadavg()[0]:.1f}")
print(
    f"{statistics.median(ratios):.3f} of plain scoring (median of {options.pairs} pairs, {min(ratios):.3f} to "
    f"{max(ratios):.3f}); {statistics.median(speeds):,.0f} tokens/s; {size / 1e6:.1f} MB of spans held"
)
