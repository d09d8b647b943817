"""What rows added to a narrow training set bring, by the way in which they were chosen or written (RQ1 of arXiv
2602.10388).

    python benchmarks/added_rows.py --task toxicity --data toxicity.jsonl [--seeds 40] [--sizes 20 50 100]
        [--written NAME=FILE]

A seed set of up to 100 rows comes from two of sixteen clusters of hidden states. To it are added 20, 50 or 100 rows of
a pool that is like the test rows, or of one in which most clusters are rare: at random, of the lengths that coverage
picks, by greedy coverage of all features or of the label-relevant ones, by deficits, by facility location; and rows
that written_rows.py wrote (--written, a file a way, of which each seed takes a random part). Toxicity: all of this is
about positive rows; as many random negative ones, the same for all ways, are in the seed set and added.

Printed are the mean performance less that of the seed set, and the difference from random rows with a 95 % interval and
the p-value of the paired t-test over seeds, Holm-corrected within a table; the mean number of tokens, for long rows
teach more; and FAC of the positive rows against those of the anchor set.
"""

from __future__ import annotations

import json

import numpy as np
from predictors import CLUSTERS, Predictors, clusters_of
from scipy import stats
from study import WRITTEN, Performance, Rows, add_all_written, followed, read_rows, study_options

from hf_fac.coverage.selection import select

SEED_ROWS, SEED_CLUSTERS = 100, 2
SHARE = 0.01  # delta: the median anchor row activates 1 % of the live features, as `compare` calibrates it


class Choices:
    """Ways of choosing n rows of a pool for a seed set; each returns row numbers."""

    def __init__(self, task: str, rows: Rows):
        self.task, self.rows = task, rows
        predictors = Predictors(task, rows)
        self.active, self.features = predictors.active[SHARE], predictors.features
        self.anchor = predictors.followed_anchor
        self.anchor_support = self.active[self.anchor].sum(0)

    def all_ways(self, seed: np.ndarray, pool: np.ndarray, n: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        random = rng.choice(pool, n, replace=False)
        found = {"random": random}
        for name, features in self.features.items():
            prefix = f"{name} features"
            found[f"{prefix}, coverage"] = self._filled(self._coverage(seed, pool, n, features), pool, n, rng)
            found[f"{prefix}, deficits"] = self._filled(self._deficits(seed, pool, n, features), pool, n, rng)
        found["facility location"] = self._facility_location(seed, pool, n)
        found["random of the lengths of coverage"] = self._like(found["all features, coverage"], pool, rng)
        return found

    def fac(self, indices: np.ndarray) -> float:
        return float(np.mean(self.active[indices].sum(0)[self.anchor_support > 0] > 0))

    def _coverage(self, seed: np.ndarray, pool: np.ndarray, n: int, features: np.ndarray) -> np.ndarray:
        has = self.active[seed].sum(0)[features] > 0
        missing = features[(self.anchor_support[features] > 0) & ~has]
        return pool[select(self.active[pool].astype(np.float32), missing, n).rows]

    def _deficits(self, seed: np.ndarray, pool: np.ndarray, n: int, features: np.ndarray) -> np.ndarray:
        """Rows that make up for what the set of seed and n rows would fall short of the anchor's rates."""
        rate = self.anchor_support[features] / len(self.anchor)
        short = np.floor(rate * (len(seed) + n) - self.active[seed].sum(0)[features]).astype(int)
        wanted = short >= 1
        demand = short[wanted]
        return pool[select(self.active[pool].astype(np.float32), features[wanted], n, demand=demand).rows]

    def _facility_location(self, seed: np.ndarray, pool: np.ndarray, n: int) -> np.ndarray:
        similar = self.rows.units[self.anchor] @ self.rows.units[pool].T
        best = (self.rows.units[self.anchor] @ self.rows.units[seed].T).max(1)
        chosen: list[int] = []
        for _ in range(n):
            covered = np.maximum(similar, best[:, None]).sum(0)
            covered[chosen] = -np.inf
            chosen.append(int(covered.argmax()))
            best = np.maximum(best, similar[:, chosen[-1]])
        return pool[chosen]

    def _like(self, rows: np.ndarray, pool: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """For each row another one of the pool, drawn from the 20 that are closest in length."""
        left, drawn = pool.tolist(), []
        for row in rng.permutation(rows):
            length = np.abs(self.rows.tokens[left] - self.rows.tokens[row])
            near = np.argsort(length + rng.random(len(left)) * 1e-3)[:20]
            drawn.append(left.pop(int(rng.choice(near))))
        return np.array(drawn)

    @staticmethod
    def _filled(rows: np.ndarray, pool: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
        """Random rows of the pool follow, where a choice ended early."""
        rest = rng.permutation(np.setdiff1d(pool, rows))
        return np.r_[rows, rest[: n - len(rows)]].astype(int)


def seed_and_pools(rows: Rows, every: np.ndarray, rng: np.random.Generator, cluster: np.ndarray) -> tuple:
    """The seed rows, and by name the pools, all among `every`, whose clusters stand beside it."""
    inside = every[np.isin(cluster, rng.choice(CLUSTERS, SEED_CLUSTERS, replace=False))]
    seed = rng.choice(inside, min(SEED_ROWS, len(inside)), replace=False)
    rest = np.setdiff1d(every, seed)
    # Each next cluster is drawn 0.6 times as often as the one before.
    weight = 0.6 ** rng.permutation(CLUSTERS)[cluster[np.searchsorted(every, rest)]]
    size = len(rest) // 2
    skewed = rng.choice(rest, size, replace=False, p=weight / weight.sum())
    return seed, {"i.i.d. pool": rng.choice(rest, size, replace=False), "skewed pool": skewed}


def main() -> None:
    parser = study_options(__doc__)
    parser.add_argument("--seeds", type=int, default=40)
    parser.add_argument("--written", **WRITTEN)
    parser.add_argument("--sizes", type=int, nargs="+", default=[20, 50, 100])
    options = parser.parse_args()
    rows = read_rows(options.task, options.data, options.output, limit=options.limit)["held out"]
    written = add_all_written(options.task, rows, options.written)
    performance, choices = Performance(options.task, rows), Choices(options.task, rows)
    every = followed(options.task, rows)
    negative = np.setdiff1d(rows.parts["pool"], every)
    cluster = clusters_of(rows.units[every])
    lines: list[dict] = []
    for number in range(options.seeds):
        rng = np.random.default_rng([7, number])
        seed, pools = seed_and_pools(rows, every, rng, cluster)
        others = rng.permutation(negative)
        before = performance(np.r_[seed, others[: len(seed)]])
        for pool_name, pool in pools.items():
            for n in options.sizes:
                added = choices.all_ways(seed, pool, n, rng)
                added |= {name: rng.choice(new, min(n, len(new)), replace=False) for name, new in written.items()}
                for way, new in added.items():
                    gain = performance(np.r_[seed, new, others[: len(seed) + len(new)]]) - before
                    lines.append({"seed": number, "pool": pool_name, "n": n, "way": way, "gain": gain,
                                  "n added": len(new), "tokens": float(rows.tokens[new].mean()),
                                  "FAC": choices.fac(np.r_[seed, new])})  # fmt: skip
        print(f"seed {number}: {len(seed)} rows, performance {before:.3f}, FAC {choices.fac(seed):.3f}", flush=True)
    text = tables(lines)
    print(text)
    (options.output / f"added-{options.task}.json").write_text(json.dumps(lines))
    (options.output / f"added-{options.task}.md").write_text(text)


def tables(lines: list[dict]) -> str:
    text = ["| pool | n | way | gain | over random | 95 % | p (Holm) | gain per sample | tokens | FAC |",
            "|" + "---|" * 10]  # fmt: skip
    for pool in dict.fromkeys(line["pool"] for line in lines):
        for n in dict.fromkeys(line["n"] for line in lines):
            here = [line for line in lines if (line["pool"], line["n"]) == (pool, n)]
            by_way: dict[str, np.ndarray] = {
                way: np.array([line["gain"] for line in here if line["way"] == way])
                for way in dict.fromkeys(line["way"] for line in here)
            }
            others = [way for way in by_way if way != "random"]
            p = np.array([stats.ttest_rel(by_way[way], by_way["random"]).pvalue for way in others])
            order = np.argsort(p)
            holm = np.empty(len(p))
            holm[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
            for way, gains in by_way.items():
                of_way = [line for line in here if line["way"] == way]
                tokens, n_added, fac = (np.mean([line[key] for line in of_way]) for key in ("tokens", "n added", "FAC"))
                cells = [pool, str(n), way, f"{gains.mean():+.4f}", "", "", ""]
                if way != "random":
                    over = gains - by_way["random"]
                    half = stats.t.ppf(0.975, len(over) - 1) * over.std(ddof=1) / len(over) ** 0.5
                    cells[4:] = [f"{over.mean():+.4f}", f"{over.mean() - half:+.4f} to {over.mean() + half:+.4f}",
                                 f"{holm[others.index(way)]:.2g}"]  # fmt: skip
                cells += [f"{gains.mean() / n_added:+.5f}", f"{tokens:.0f}", f"{fac:.3f}"]
                text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    main()
