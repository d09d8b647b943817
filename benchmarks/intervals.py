"""How often the intervals of FAC and of the match of frequencies hold what they are for, on simulated data sets: shares
of cases, 0.95 is aimed at.

    python benchmarks/intervals.py [--draws 300] [--rows 25 100 400]

Each source draws rows in its own way: features independent of each other; features of topics, rows of one topic each,
some topics far more frequent; blocks of rare features that a row activates together. Data sets are drawn from a pool of
5,000 rows, the anchor set is 1,000 others. `mean` is the share of data sets whose `interval` holds the mean FAC of all
of them, `single` the share of pairs in which the `single_interval` of one holds FAC of the other, `at n / 4` and
`at n / 2` the share whose `rarefaction` interval holds the mean FAC of data sets of that size. `gain` is the mean
`expected_gain` of as many rows again beside the true one, in units of FAC.

The second table is of the match: data sets are drawn with unequal chances, anchor sets of four times as many rows with
equal ones. It has means over the pairs of sets, and the share of pairs whose interval holds the mean.
"""

import argparse
import warnings

import numpy as np
from scipy.sparse import csr_array

from hf_fac import FeatureCoverage

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--draws", type=int, default=300)
parser.add_argument("--rows", type=int, nargs="+", default=[25, 100, 400])
parser.add_argument("--features", type=int, default=600)
options = parser.parse_args()
POOL, ANCHOR, DELTA = 5000, 1000, 0.5


def independent(rng: np.random.Generator, n: int, d: int) -> np.ndarray:
    return rng.random((n, d)) < np.exp(rng.normal(-4.5, 1.5, d)).clip(0, 0.9)


def topics(rng: np.random.Generator, n: int, d: int, *, evenness: float = 3.0) -> np.ndarray:
    topic_of_feature = rng.integers(0, 30, d)
    topic_of_row = rng.choice(30, n, p=rng.dirichlet(np.full(30, evenness)))
    return rng.random((n, d)) < np.where(topic_of_row[:, None] == topic_of_feature, rng.uniform(0, 0.5, d), 0.003)


def skewed_topics(rng: np.random.Generator, n: int, d: int) -> np.ndarray:
    return topics(rng, n, d, evenness=0.5)


def blocks(rng: np.random.Generator, n: int, d: int) -> np.ndarray:
    active = rng.random((n, d // 10)) < np.exp(rng.normal(-4.5, 1.2, d // 10)).clip(0, 0.5)
    return np.repeat(active, 10, axis=1) & (rng.random((n, d // 10 * 10)) < 0.7)


def cover(active: np.ndarray) -> FeatureCoverage:
    measurement = {"model": "simulated", "layer": 0, "d_sae": active.shape[1], "keep_above": 0.0}
    return FeatureCoverage.from_activations(csr_array(active.astype(np.float32)), measurement=measurement)


warnings.simplefilter("ignore", UserWarning)  # FAC near 1
rng = np.random.default_rng(0)
print(f"{'source':15}{'rows':>5}{'FAC':>7}{'mean':>7}{'single':>8}{'at n/4':>8}{'at n/2':>8}{'gain':>7}{'true':>7}")
for source in (independent, topics, skewed_topics, blocks):
    for n in options.rows:
        rows = source(rng, ANCHOR + POOL, options.features)
        anchor, pool, in_anchor = cover(rows[:ANCHOR]), rows[ANCHOR:], rows[:ANCHOR].any(axis=0)
        draws = [pool[rng.choice(POOL, n, replace=False)] for _ in range(options.draws)]
        sizes = [n // 4, n // 2, n]
        facs = np.array([[draw[:k].any(axis=0)[in_anchor].mean() for k in sizes] for draw in draws])
        means = facs.mean(axis=0)
        twice = [pool[rng.choice(POOL, 2 * n, replace=False)].any(axis=0)[in_anchor].mean() for _ in draws]
        reports = [cover(draw).compare(anchor, threshold=DELTA) for draw in draws]
        low, high = np.array([report.single_interval for report in reports]).T
        holds = (low[:, None] <= facs[:, -1]) & (facs[:, -1] <= high[:, None])
        single = holds[~np.eye(len(draws), dtype=bool)].mean()
        curves = np.array([report.rarefaction(sizes)[["low", "high"]].to_numpy() for report in reports])
        at = ((curves[..., 0] <= means) & (means <= curves[..., 1])).mean(axis=0)
        gain = np.mean([report.expected_gain(n) for report in reports]) / in_anchor.sum()
        print(
            f"{source.__name__:15}{n:5}{means[-1]:7.2f}{at[2]:7.3f}{single:8.3f}{at[0]:8.3f}{at[1]:8.3f}{gain:7.3f}"
            f"{np.mean(twice) - means[-1]:7.3f}"
        )

MEASURES = {
    "cosine": ("frequency_cosine", "frequency_cosine_interval"),
    "Jensen-Shannon": ("jensen_shannon", "jensen_shannon_interval"),
    "KL": ("kl_divergence", "kl_interval"),
}
print(f"\n{'source':15}{'rows':>5}" + "".join(f"{name:>17}{'held':>7}" for name in MEASURES))
for source in (independent, topics, skewed_topics, blocks):
    for n in options.rows:
        pool = source(rng, POOL, options.features)
        tilt = pool @ rng.normal(size=pool.shape[1])
        chances = np.exp((tilt - tilt.mean()) / tilt.std())
        chances /= chances.sum()
        line = f"{source.__name__:15}{n:5}"
        reports = []
        for _ in range(options.draws):
            data, anchor = (
                pool[rng.choice(POOL, size, replace=False, p=p)] for size, p in ((n, chances), (4 * n, None))
            )
            reports.append(cover(data).compare(cover(anchor), threshold=DELTA))
        for value, interval in MEASURES.values():
            mean = np.mean([getattr(report, value) for report in reports])
            low, high = np.array([getattr(report, interval) for report in reports]).T
            line += f"{mean:17.3f}{np.mean((low <= mean) & (mean <= high)):7.3f}"
        print(line)
