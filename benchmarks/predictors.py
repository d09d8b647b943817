"""What predicts performance: FAC, the match of activation frequencies and rival metrics, over many ways of making
training sets of one size (RQ2 of arXiv 2602.10388).

    python benchmarks/predictors.py --task toxicity --data toxicity.jsonl [--draws 12] [--written NAME=FILE]

Training sets of 100 rows (toxicity: positive ones, beside 100 random negative ones) are drawn in some 32 ways: one or
several clusters of hidden states or of words, few rows repeated, rows with their nearest neighbours, rows with or
without a word, short or long rows, single sources, mixtures, written rows (--written, files of written_rows.py), random
ones. Each predictor's variant (delta, features, rows) is chosen on the development half by its correlation over the
means of the ways, frozen, and evaluated once on the held-out half. Printed are Pearson's r over the means of the ways
with a 95 % bootstrap interval over ways, Spearman's rho, r over single sets and within ways, and r along breadth alone
(the clusters).

The ceiling is the r that the true mean of each way would reach, given the noise of the measured means. A predictor that
reads the anchor set, or labels of it, is marked.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path

import numpy as np
from study import POSITIVE, WRITTEN, Performance, Rows, add_all_written, followed, read_rows, study_options

from hf_fac.coverage.association import rank_tests
from hf_fac.coverage.frequency import frequency_cosine, jensen_shannon
from hf_fac.coverage.statistics import kl_divergence
from hf_fac.coverage.text_diversity import distinct, ngram_entropy, parts_of_speech, words
from hf_fac.coverage.vector_diversity import (
    facility_location,
    mean_pairwise_distance,
    mean_shift,
    nearest_neighbour_accuracy,
    nearest_neighbour_distance,
    novel_sum,
    semantic_entropy,
    vendi,
)

SIZE = 100  # rows that follow a way; a toxicity set has as many random negatives beside them
BREADTHS = (1, 2, 3, 4, 6, 8, 12)
CLUSTERS = 16
ACTIVE_SHARES = (0.005, 0.01, 0.02, 0.05, 0.1)  # of the live features, in the median anchor row: sets delta
RELEVANT = 128
SHOWN = ("FAC", "frequency cosine", "mean pairwise distance")  # in the figure

Draw = Callable[[np.random.Generator], np.ndarray]


# --- ways of making a set ---------------------------------------------------------------------------------------------


def clusters_of(vectors: np.ndarray) -> np.ndarray:
    from sklearn.cluster import KMeans

    return KMeans(CLUSTERS, n_init=4, random_state=0).fit_predict(vectors)


def word_vectors(texts: list[str]) -> np.ndarray:
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.preprocessing import normalize

    counts = TfidfVectorizer(min_df=3, sublinear_tf=True).fit_transform(texts)
    return normalize(TruncatedSVD(64, random_state=0).fit_transform(counts))


def ways(rows: Rows, among: np.ndarray) -> Iterator[tuple[str, str, Draw]]:
    """Yields name, family and draw of each way; a draw returns SIZE numbers of rows among `among`."""

    def some(rng: np.random.Generator, of: np.ndarray, n: int = SIZE) -> np.ndarray:
        return rng.choice(of, n, replace=len(of) < n)

    def of_clusters(k: int, cluster: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        large = np.flatnonzero(np.bincount(cluster) >= 5)
        return some(rng, among[np.isin(cluster, rng.choice(large, min(k, len(large)), replace=False))])

    def repeated(k: int, rng: np.random.Generator) -> np.ndarray:
        return np.resize(some(rng, among, k), SIZE)

    def neighbours(k: int, rng: np.random.Generator) -> np.ndarray:
        centres = some(rng, among, k)
        nearest = np.argsort(-(rows.units[centres] @ rows.units[among].T), axis=1)
        return np.resize(among[nearest[:, : SIZE // k + 1].ravel("F")], SIZE)

    def mixed(other: Draw, rng: np.random.Generator) -> np.ndarray:
        return np.concatenate([other(rng)[: SIZE // 2], some(rng, among, SIZE - SIZE // 2)])

    hidden, lexical = clusters_of(rows.units[among]), clusters_of(word_vectors([rows.texts[i] for i in among]))
    for k in BREADTHS:
        yield f"{k} clusters of hidden states", "breadth", partial(of_clusters, k, hidden)
    for k in BREADTHS:
        yield f"{k} clusters of words", "breadth", partial(of_clusters, k, lexical)
    for k in (5, 10, 20, 40):
        yield f"{k} rows repeated", "repeated", partial(repeated, k)
    for k in (1, 3, 10):
        yield f"{k} rows with neighbours", "neighbours", partial(neighbours, k)
    lengths = among[np.argsort(rows.tokens[among], kind="stable")]
    third = len(among) // 3
    yield "short rows", "length", lambda rng: some(rng, lengths[:third])
    yield "long rows", "length", lambda rng: some(rng, lengths[-third:])
    seen = [set(words(rows.texts[i].lower())) for i in among]
    counts = Counter(chain.from_iterable(seen))
    usual = (word for word, count in counts.most_common() if word.isalpha() and count < len(among) / 3)
    frequent = list(islice(usual, 3))
    for number, word in enumerate(frequent):
        has = np.array([word in each for each in seen])
        yield f"rows with frequent word {number + 1}", "word", partial(lambda has, rng: some(rng, among[has]), has)
        if number == 0:
            yield "rows without it", "word", partial(lambda has, rng: some(rng, among[~has]), has)
    names, sizes = np.unique(rows.groups[among], return_counts=True)
    if len(names) > 1:
        for name in names[np.argsort(-sizes)][:2]:
            of = among[rows.groups[among] == name]
            yield f"source {name}", "source", partial(lambda of, rng: some(rng, of), of)
    yield "half 1 cluster, half random", "mixed", partial(mixed, partial(of_clusters, 1, hidden))
    yield "half 10 rows repeated, half random", "mixed", partial(mixed, partial(repeated, 10))
    yield "random", "random", lambda rng: some(rng, among)


def written_ways(written: dict[str, np.ndarray]) -> Iterator[tuple[str, str, Draw]]:
    for name, new in written.items():
        yield f"written, {name}", "written", lambda rng, new=new: np.resize(rng.permutation(new), SIZE)


def training_sets(task: str, rows: Rows, draws: int, written: dict[str, np.ndarray]) -> Iterator[dict]:
    pool = rows.parts["pool"]
    for number, (name, family, draw) in enumerate(chain(ways(rows, followed(task, rows)), written_ways(written))):
        for repeat in range(draws):
            rng = np.random.default_rng([number, repeat])
            drawn = draw(rng)
            others = rng.choice(pool[rows.labels[pool] == 0], SIZE, replace=False) if task == "toxicity" else []
            yield {"way": name, "family": family, "drawn": drawn, "rows": np.r_[drawn, others].astype(int)}


# --- predictors -------------------------------------------------------------------------------------------------------


class Predictors:
    """All predictors of a set, by name and variant. `sees` says what each was given beside the set."""

    def __init__(self, task: str, rows: Rows):
        self.task, self.rows = task, rows
        anchor = rows.parts["anchor"]
        self.anchors = {"all": anchor}
        if task == "toxicity":
            self.anchors["positive"] = anchor[rows.labels[anchor] == POSITIVE]
        self.followed_anchor = self.anchors.get("positive", anchor)  # what the ways choose among, in the anchor set
        self.active = {}
        for share in ACTIVE_SHARES:
            self.active[share] = (rows.activations > self.delta(share)).astype(np.int32).tocsr()
        self.features = {"all": np.arange(rows.activations.shape[1])}
        relevant = self._relevant()
        if relevant is not None:
            self.features["label-relevant"] = relevant
        self.words = [words(text.lower()) for text in rows.texts]
        self.tags = parts_of_speech(map(words, rows.texts))

    def delta(self, share: float) -> float:
        """The activation that the median row of the anchor exceeds with this share of its live features."""
        anchor = self.rows.activations[self.anchors["all"]]
        live = np.unique(anchor.indices[anchor.data > 0]).size
        kth = max(1, int(share * live))
        rows = np.split(anchor.data, anchor.indptr[1:-1])
        return float(np.median([np.partition(row, -kth)[-kth] if len(row) >= kth else 0.0 for row in rows]))

    def _relevant(self) -> np.ndarray | None:
        """The 128 features whose activations separate the labels of the anchor set best (preference: chosen from
        rejected)."""
        import scipy.sparse as sp

        anchor = self.anchors["all"]
        if self.task == "toxicity":
            table, labels = self.rows.activations[anchor], self.rows.labels[anchor]
        elif self.task == "preference":
            table = sp.vstack([self.rows.activations[anchor], self.rows.rejected[anchor]])
            labels = np.repeat([1, 0], len(anchor))
        else:
            return None
        [tests] = rank_tests(sp.csc_array(table), labels[:, None] == 1, [np.ones(len(labels), bool)])
        return np.sort(np.argsort(-np.abs(tests.z[:, 0]))[:RELEVANT])

    def __call__(self, one: dict) -> dict[tuple[str, str], float]:
        values = {}
        for rows_name, anchor in self.anchors.items():
            of = one["rows"] if rows_name == "all" else one["drawn"]
            values |= self._of_features(rows_name, of, anchor)
            values |= self._of_vectors(rows_name, of, anchor)
            text = [self.words[i] for i in of]
            tags = [self.tags[i] for i in of]
            found = {"distinct-1": distinct(text, 1), "distinct-2": distinct(text, 2),
                     "n-gram entropy": ngram_entropy(text, 2), "POS distinct-2": distinct(tags, 2)}  # fmt: skip
            found["mean tokens"] = float(self.rows.tokens[of].mean())
            values |= {(name, rows_name): value for name, value in found.items()}
        return values

    def _of_features(self, rows_name: str, of: np.ndarray, anchor: np.ndarray) -> dict[tuple[str, str], float]:
        values = {}
        for share, active in self.active.items():
            mine, theirs = active[of].sum(0), active[anchor].sum(0)
            for features_name, features in self.features.items():
                p, q = mine[features], theirs[features]
                in_anchor = q > 0
                prefix = "" if features_name == "all" else f", {features_name}"
                found = {
                    "FAC": np.mean(p[in_anchor] > 0), "FAC, 5 rows each": np.mean(p[in_anchor] >= 5),
                    "active features": np.sum(p > 0), "weighted FAC": np.sum(q[p > 0]) / q.sum(),
                    "frequency cosine": frequency_cosine(p, q), "Jensen-Shannon": -jensen_shannon(p, q),
                    "KL": -kl_divergence(q, p),
                }  # fmt: skip
                values |= {(f"{name}{prefix}", f"{rows_name}, {share:.1%}"): float(v) for name, v in found.items()}
        return values

    def _of_vectors(self, rows_name: str, of: np.ndarray, anchor: np.ndarray) -> dict[tuple[str, str], float]:
        x, a = self.rows.units[of].astype(np.float32), self.rows.units[anchor].astype(np.float32)
        found = {
            "mean pairwise distance": mean_pairwise_distance(x), "semantic entropy": semantic_entropy(x, a),
            "Vendi score": vendi(x), "NovelSum": novel_sum(x), "NovelSum, anchor density": novel_sum(x, a),
            "facility location": facility_location(x, a), "mean shift": -mean_shift(x, a),
            "nearest-neighbour distance": -nearest_neighbour_distance(x, a),
        }  # fmt: skip
        if self.task == "toxicity" and rows_name == "all":
            labels = self.rows.labels
            found["nearest-neighbour accuracy"] = nearest_neighbour_accuracy(x, labels[of], a, labels[anchor])
        return {(name, rows_name): value for name, value in found.items()}


def sees(name: str) -> str:
    """What a predictor is given beside the set."""
    if "label" in name or name == "nearest-neighbour accuracy":
        return "anchor, labels"
    alone = ("active features", "distinct", "n-gram", "POS", "mean tokens", "mean pairwise", "Vendi")
    return "" if name.startswith(alone) or name == "NovelSum" else "anchor"


# --- correlations -----------------------------------------------------------------------------------------------------


def correlations(sets: list[dict], values: np.ndarray) -> dict[str, float | list[float]]:
    from scipy.stats import spearmanr

    performance = np.array([one["performance"] for one in sets])
    way = np.array([one["way"] for one in sets])
    names = list(dict.fromkeys(way))
    x, y, r = of_ways(sets, values)
    within_x = values - x[[names.index(name) for name in way]]
    within_y = performance - y[[names.index(name) for name in way]]
    broad = np.array([next(o["family"] for o in sets if o["way"] == name) == "breadth" for name in names])
    rng = np.random.default_rng(0)
    resampled = [pearson(x[i], y[i]) for i in rng.integers(0, len(x), (2000, len(x)))]
    return {
        "r": r, "interval": np.nanquantile(resampled, [0.025, 0.975]).tolist(),
        "rho": float(spearmanr(x, y).statistic), "r of sets": pearson(values, performance),
        "r within": pearson(within_x, within_y), "r of breadth": pearson(x[broad], y[broad]),
        "r without breadth": pearson(x[~broad], y[~broad]),
    }  # fmt: skip


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(), y - y.mean()
    size = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / size) if size else float("nan")


def ceiling(sets: list[dict]) -> float:
    """The r that the true means of the ways would have with the measured ones: sqrt(1 - noise / variance of means)."""
    groups: dict[str, list[float]] = {}
    for one in sets:
        groups.setdefault(one["way"], []).append(one["performance"])
    noise = np.mean([np.var(values, ddof=1) / len(values) for values in groups.values()])
    spread = np.var([np.mean(values) for values in groups.values()], ddof=1)
    return float(np.sqrt(max(0.0, 1 - noise / spread)))


def measured(options: argparse.Namespace, half: str, rows: Rows) -> tuple[list[dict], dict]:
    """The sets of one half with their performance, and the values of all predictors, [sets] each."""
    task, draws = options.task, options.draws
    # Performances, the costly part; those of written rows are not kept, as files of one name can change.
    kept = options.output / f"{task}-{half.replace(' ', '-')}-{draws}.json"
    written = add_all_written(task, rows, options.written)
    performance = Performance(task, rows)
    done = json.loads(kept.read_text()) if kept.exists() else []
    sets = list(training_sets(task, rows, draws, written))
    n_kept = sum(one["family"] != "written" for one in sets)  # the written ones are the last
    for number, one in enumerate(sets):
        if number >= len(done):
            done.append(performance(one["rows"]))
            if number % 20 == 0:
                kept.write_text(json.dumps(done[:n_kept]))
        one["performance"] = done[number]
    kept.write_text(json.dumps(done[:n_kept]))
    predictors = Predictors(task, rows)
    table = [predictors(one) for one in sets]
    print(f"{half}: {len(sets)} sets of {len({o['way'] for o in sets})} ways, performance "
          f"{min(done):.3f} to {max(done):.3f}, ceiling {ceiling(sets):.2f}", flush=True)  # fmt: skip
    return sets, {key: np.array([row[key] for row in table]) for key in table[0]}


def main() -> None:
    parser = study_options(__doc__)
    parser.add_argument("--draws", type=int, default=12)
    parser.add_argument("--written", **WRITTEN)
    options = parser.parse_args()
    halves = read_rows(options.task, options.data, options.output, limit=options.limit)
    results = {half: measured(options, half, rows) for half, rows in halves.items()}
    (sets, values), (held_sets, held_values) = results["development"], results["held out"]
    by_name: dict[str, dict[str, float]] = {}
    for (name, variant), column in values.items():
        by_name.setdefault(name, {})[variant] = of_ways(sets, column)[2]
    lines = []
    for name, found in by_name.items():
        variant = max(found, key=lambda variant: -1.0 if np.isnan(found[variant]) else found[variant])
        held = correlations(held_sets, held_values[name, variant])
        others = {other: of_ways(held_sets, held_values[name, other])[2] for other in found}
        lines.append({"predictor": name, "variant": variant, "sees": sees(name), "development": found[variant], **held,
                      "r of variants": others})  # fmt: skip
    lines.sort(key=lambda line: -line["r"])
    path = options.output / f"{options.task}-{options.draws}"
    path.with_suffix(".json").write_text(json.dumps(lines, indent=1))
    text = f"ceiling {ceiling(sets):.2f} / {ceiling(held_sets):.2f}\n\n{table(lines)}"
    path.with_suffix(".md").write_text(text)
    print(text)
    draw_shown(options.task, held_sets, held_values, lines, path.with_suffix(".png"))


def of_ways(sets: list[dict], values: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Mean values and mean performances, [ways] each, and their r."""
    way = np.array([one["way"] for one in sets])
    performance = np.array([one["performance"] for one in sets])
    x, y = (np.array([column[way == name].mean() for name in dict.fromkeys(way)]) for column in (values, performance))
    return x, y, pearson(x, y)


def table(lines: list[dict]) -> str:
    head = ["predictor", "variant", "sees", "r dev.", "r held out", "95 % interval", "rho", "r of sets", "r within",
            "r breadth", "r others"]  # fmt: skip
    text = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for line in lines:
        low, high = line["interval"]
        cells = [line["predictor"], line["variant"], line["sees"], f"{line['development']:.2f}", f"{line['r']:.2f}",
                 f"{low:.2f} to {high:.2f}"]  # fmt: skip
        cells += [f"{line[key]:.2f}" for key in ("rho", "r of sets", "r within", "r of breadth", "r without breadth")]
        text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text) + "\n"


def draw_shown(task: str, sets: list[dict], values: dict, lines: list[dict], path: Path) -> None:
    """A panel for each predictor of SHOWN, a point for each way."""
    from matplotlib.figure import Figure

    families = {one["way"]: one["family"] for one in sets}
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    panels = figure.subplots(1, len(SHOWN), sharey=True)
    for axes, name in zip(panels, SHOWN, strict=True):
        variant = next(line["variant"] for line in lines if line["predictor"] == name)
        x, y, r = of_ways(sets, values[name, variant])
        for family, marker in zip(dict.fromkeys(families.values()), "osDv^PX*d", strict=False):
            of = [each == family for each in families.values()]
            axes.plot(x[of], y[of], marker, label=family)
        axes.set(xlabel=name, title=f"{name}: r = {r:.2f}")
    panels[0].set_ylabel(f"performance ({task})")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=9, fontsize=8, frameon=False
    )
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
