"""Each metric against a slow reference from its definition, and what must not change it."""

from __future__ import annotations

import math
import sys
import tracemalloc
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import byte_level_tokenizer
from tiny_models import D_IN, tiny_model, tiny_sae

from hf_fac import FACScorer, FeatureCoverage, RowError, SAEFeaturizer, diversity
from hf_fac.coverage import text_diversity, vector_diversity
from hf_fac.coverage.text_diversity import distinct, ngram_entropy, parts_of_speech, words
from hf_fac.coverage.vector_diversity import (
    facility_location,
    mean_pairwise_distance,
    mean_shift,
    nearest_neighbour_accuracy,
    nearest_neighbour_distance,
    novel_sum,
    semantic_entropy,
    unit_vectors,
    vendi,
)

TEXTS = ["the river rises", "the river rises in the hills", "add warm water", "a", "add warm water and knead it"]


def vectors(n: int, d: int = 6, *, seed: int = 0) -> np.ndarray:
    return unit_vectors(np.random.default_rng(seed).normal(0.3, 1, (n, d)))


def cosine_distance(x: np.ndarray, y: np.ndarray) -> float:
    return 1 - float(np.dot(x.astype(float), y.astype(float)))


def slow_novel_sum(units: np.ndarray, anchor: np.ndarray | None) -> float:
    novelty = []
    for x in units:
        nearest_first = sorted(max(cosine_distance(x, y), 0) for y in units)
        weights = [1 / rank for rank in range(1, len(units) + 1)]
        value = sum(w * d for w, d in zip(weights, nearest_first, strict=True)) / sum(weights)
        if anchor is not None:
            others = {y.tobytes(): cosine_distance(x, y) for y in anchor}
            nearest = sorted(d for d in others.values() if d > 1e-6)[:10]
            value *= (sum(nearest) / len(nearest)) ** -0.5
        novelty.append(value)
    return sum(novelty) / len(novelty)


texts_of_words = st.lists(st.lists(st.sampled_from("abcd"), max_size=6), max_size=6)


@given(texts_of_words, st.integers(1, 3))
def test_distinct_and_entropy_are_those_of_the_ngrams_within_texts(texts, n) -> None:
    ngrams = [tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
    counts = Counter(ngrams)
    expected = len(set(ngrams)) / len(ngrams) if ngrams else math.nan
    assert distinct(texts, n) == pytest.approx(expected, nan_ok=True)
    shares = [count / len(ngrams) for count in counts.values()]
    expected = -sum(share * math.log(share) for share in shares) if ngrams else math.nan
    assert ngram_entropy(texts, n) == pytest.approx(expected, nan_ok=True)


@given(texts_of_words.filter(lambda texts: any(map(len, texts))))
def test_repeating_all_texts_halves_distinct_and_leaves_entropy(texts) -> None:
    assert distinct(texts * 2, 1) == pytest.approx(distinct(texts, 1) / 2)
    assert ngram_entropy(texts * 2, 1) == pytest.approx(ngram_entropy(texts, 1))


def test_words_are_runs_of_letters_and_single_marks_of_punctuation() -> None:
    assert words("Grüße, it's 3.5!\n") == ["Grüße", ",", "it", "'", "s", "3", ".", "5", "!"]


def test_parts_of_speech_are_told_by_the_taggers_own_model_wherever_it_runs(tmp_path, monkeypatch) -> None:
    (tmp_path / "morphmodel_en.pgz").write_bytes(b"no model")
    monkeypatch.chdir(tmp_path)
    assert parts_of_speech([["The", "river", "rises"], []]) == [["AT0", "NN1", "VVZ"], []]


@pytest.mark.parametrize("n", [2, 3, 40])
def test_the_mean_distance_of_pairs_is_that_of_the_pairs(n) -> None:
    units = vectors(n)
    pairs = [cosine_distance(units[i], units[j]) for i in range(n) for j in range(n) if i != j]
    assert mean_pairwise_distance(units) == pytest.approx(np.mean(pairs), abs=1e-6)


def test_one_row_has_no_pairs() -> None:
    assert math.isnan(mean_pairwise_distance(vectors(1)))


@pytest.mark.parametrize(("n", "d"), [(1, 4), (5, 30), (60, 4)])
def test_the_vendi_score_is_that_of_the_matrix_of_cosines(n, d) -> None:
    units = vectors(n, d).astype(float)
    shares = np.linalg.eigvalsh(units @ units.T / n)
    shares = shares[shares > 1e-12]
    assert vendi(units) == pytest.approx(np.exp(-np.sum(shares * np.log(shares))), rel=1e-5)


@pytest.mark.parametrize("block", [1, 7, 10**6])
@pytest.mark.parametrize("n_anchor", [None, 1, 8, 50])
def test_novel_sum_is_its_definition_whatever_the_block(block, n_anchor, monkeypatch) -> None:
    monkeypatch.setattr(vector_diversity, "_BLOCK", block)
    units = vectors(30)
    # Some rows are in the anchor set too, and some of the anchor set are there twice.
    anchor = None if n_anchor is None else np.concatenate([vectors(n_anchor, seed=1), units[: 2 * (n_anchor > 1)]])
    anchor = anchor if anchor is None else np.concatenate([anchor, anchor[:2]])
    assert novel_sum(units, anchor) == pytest.approx(slow_novel_sum(units, anchor), rel=1e-4)


def test_memory_grows_with_the_rows_and_not_with_their_square(monkeypatch) -> None:
    monkeypatch.setattr(vector_diversity, "_BLOCK", 2**16)
    units, anchor = vectors(3000, 4), vectors(3000, 4, seed=1)
    facility_location(units[:9], anchor[:9])  # loads what it needs
    tracemalloc.start()
    novel_sum(units, anchor)
    facility_location(units, anchor)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e6 < 4 * 3000**2 / 5


def test_semantic_entropy_is_that_of_the_shares_of_well_separated_clusters() -> None:
    corners, noise = np.eye(20, 24), np.random.default_rng(0).normal(0, 0.01, (400, 24))
    anchor = unit_vectors(np.repeat(corners, 20, axis=0) + noise)
    units = anchor[[*range(0, 60), *range(60, 80, 2), *range(60, 80, 2)]]  # four of the clusters, 20 rows each
    assert semantic_entropy(units, anchor) == pytest.approx(math.log(4))
    assert semantic_entropy(anchor) == pytest.approx(math.log(20))
    assert semantic_entropy(units[:1], anchor) == 0
    assert semantic_entropy(np.repeat(units[[0, 20, 40]], 5, axis=0)) == pytest.approx(math.log(3))


def test_distances_to_the_anchor_are_those_of_a_loop() -> None:
    units, anchor, pick = vectors(20), vectors(35, seed=1), np.random.default_rng(2)
    labels, anchor_labels = pick.choice(["a", "b"], 20).astype(object), pick.choice(["a", "b"], 35).astype(object)
    to_data = [[cosine_distance(a, x) for x in units] for a in anchor]
    assert facility_location(units, anchor) == pytest.approx(np.mean([1 - min(row) for row in to_data]), abs=1e-6)
    nearest = [min(cosine_distance(x, a) for a in anchor) for x in units]
    assert nearest_neighbour_distance(units, anchor) == pytest.approx(np.mean(nearest), abs=1e-6)
    right = [labels[int(np.argmin(row))] == label for row, label in zip(to_data, anchor_labels, strict=True)]
    assert nearest_neighbour_accuracy(units, labels, anchor, anchor_labels) == pytest.approx(np.mean(right))
    difference = units.astype(float).mean(0) - anchor.astype(float).mean(0)
    assert mean_shift(units, anchor) == pytest.approx(np.sqrt(np.sum(difference**2)))


def test_a_set_beside_itself_is_as_close_as_can_be() -> None:
    units, labels = vectors(30), np.arange(30).astype(object)
    assert facility_location(units, units) == pytest.approx(1, abs=1e-6)
    assert nearest_neighbour_distance(units, units) == pytest.approx(0, abs=1e-6)
    assert mean_shift(units, units) == 0
    assert nearest_neighbour_accuracy(units, labels, units, labels) == 1


@settings(max_examples=8, deadline=None)
@given(st.integers(2, 40), st.integers(0, 1000))
def test_order_changes_nothing_and_duplicates_make_a_set_no_more_diverse(n, seed) -> None:
    units, anchor = vectors(n, seed=seed), vectors(30, seed=seed + 1)
    shuffled, twice = units[np.random.default_rng(seed).permutation(n)], np.repeat(units, 2, axis=0)
    metrics = {
        "distance": mean_pairwise_distance, "entropy": semantic_entropy, "vendi": vendi, "novel": novel_sum,
        "novel beside": lambda x: novel_sum(x, anchor), "entropy beside": lambda x: semantic_entropy(x, anchor),
        "facility": lambda x: facility_location(x, anchor), "shift": lambda x: mean_shift(x, anchor),
        "nearest": lambda x: nearest_neighbour_distance(x, anchor),
    }  # fmt: skip
    for name, metric in metrics.items():
        assert metric(shuffled) == pytest.approx(metric(units), rel=1e-4, abs=1e-6), name
        if name in ("distance", "novel", "novel beside"):
            assert metric(twice) < metric(units), name
        else:
            assert metric(twice) == pytest.approx(metric(units), rel=1e-4, abs=1e-6), name


# The table


@pytest.fixture(scope="module")
def featurizer() -> SAEFeaturizer:
    return SAEFeaturizer(tiny_model(), byte_level_tokenizer(), tiny_sae(), sink_norm=1e6)


def rows(texts: list[str]) -> Dataset:
    return Dataset.from_dict({"text": texts, "label": [len(text) % 2 for text in texts]})


def test_the_table_has_a_line_for_each_metric_with_what_it_rests_on(featurizer) -> None:
    featurizer = featurizer.with_settings(on_error="skip")
    data, anchor = (
        rows(texts).map(FACScorer(featurizer.with_settings()), batched=True)
        for texts in ([*TEXTS, " "], ["please send me the invoice", "the hills", "hello world"])
    )
    table = diversity(data, featurizer, anchor=anchor, label_column="label")
    assert list(table.columns) == ["value", "higher_is", "n", "mean_words", "needs", "source"]
    assert table["value"].notna().all()
    assert table["n"].tolist() == [6] * 4 + [len(TEXTS)] * (len(table) - 4)
    coverage = FeatureCoverage.from_dataset(data)
    report = coverage.compare(FeatureCoverage.from_dataset(anchor))
    assert table.loc["FAC", "value"] == report.fac
    assert table.loc["frequency cosine", "value"] == report.frequency_cosine
    assert table.loc["Jensen-Shannon", "value"] == report.jensen_shannon
    assert table.loc["active features", "value"] == (coverage.maximum > report.threshold).sum()
    assert table["mean_words"].tolist() == pytest.approx([sum(len(text.split()) for text in TEXTS) / 5] * len(table))
    units = unit_vectors(featurizer.mean_hidden_states(TEXTS))
    assert table.loc["Vendi score", "value"] == pytest.approx(vendi(units))
    assert table.loc["distinct-1", "value"] == 12 / 19
    tags = distinct(parts_of_speech([text.split() for text in TEXTS]), 2)
    assert table.loc["pos-distinct-2", "value"] == tags

    alone = diversity(rows(TEXTS), featurizer)
    assert list(alone.index) == list(table.index)
    assert alone["value"].isna().tolist() == table["needs"].str.startswith("anchor").tolist()


def test_the_texts_and_vectors_are_of_the_content_that_counts(featurizer) -> None:
    user, both = (diversity(CHATS, featurizer.with_settings(pool_over=who)) for who in ("user", "all"))
    words_of = [(len(a.split()), len(b.split())) for a, b in pairwise(TEXTS)]
    assert user["mean_words"].iloc[0] == np.mean([a for a, _ in words_of])
    assert both["mean_words"].iloc[0] == np.mean([a + b for a, b in words_of])
    states = featurizer.with_settings(pool_over="user").mean_hidden_states(CHATS)
    assert user.loc["mean pairwise distance", "value"] == mean_pairwise_distance(unit_vectors(states))


def test_vectors_of_the_callers_replace_those_of_the_model(featurizer) -> None:
    data, own, theirs = rows(TEXTS), vectors(5, 3) * 7, vectors(4, 3, seed=1)
    table = diversity(data, featurizer, anchor=TEXTS[:4], embeddings=own, anchor_embeddings=theirs)
    assert table.loc["facility location", "value"] == pytest.approx(facility_location(unit_vectors(own), theirs))
    assert table.loc["distinct-1", "value"] == diversity(data, featurizer).loc["distinct-1", "value"]
    own[2] = 0
    assert diversity(data, featurizer, embeddings=own).loc["Vendi score", "n"] == 4


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"embeddings": np.ones((3, 4))}, r"of the data set have shape \(3, 4\); expected \[5, d\]"),
        ({"embeddings": np.full((5, 4), np.nan)}, "of the data set are not all finite"),
        ({"embeddings": np.zeros((5, 4))}, "no row of the data set has content tokens"),
        ({"anchor": TEXTS, "embeddings": np.ones((5, 4))}, "go together"),
        ({"anchor": TEXTS, "embeddings": np.ones((5, 4)), "anchor_embeddings": np.ones((5, 3))}, "4 dimensions and"),
        ({"label_column": "class"}, "row 0 of the data set has no column 'class'"),
    ],
)
def test_wrong_arguments_are_named(arguments, problem, featurizer) -> None:
    with pytest.raises(ValueError, match=problem):
        diversity(rows(TEXTS), featurizer, **arguments)


def test_a_row_that_cannot_be_read_is_named(featurizer) -> None:
    with pytest.raises(RowError, match="Row 1 of the anchor set cannot be read"):
        diversity(TEXTS, featurizer, anchor=["a", {"number": 1}])


def test_metrics_of_absent_libraries_are_left_out_and_say_what_to_install(featurizer, monkeypatch) -> None:
    for name in ("HanTa", "HanTa.HanoverTagger", "vendi_score", "vendi_score.vendi"):
        monkeypatch.setitem(sys.modules, name, None)
    table = diversity(TEXTS, featurizer)
    absent = table[table["value"].isna() & ~table["needs"].str.startswith("anchor")]
    assert list(absent.index) == ["pos-distinct-2", "Vendi score"]
    assert absent["needs"].str.contains(text_diversity.INSTALL, regex=False).all()
    with pytest.raises(ImportError, match="pip install"):
        vendi(vectors(3))


# Mean hidden states


def slow_means(featurizer: SAEFeaturizer, given: list) -> np.ndarray:
    """Of each row, read alone by a whole forward pass, the mean of the states of the tokens that count."""
    means = []
    for row in given:
        pieces, states = featurizer.reader([row]), {}
        for ids, content, offset in zip(pieces.ids, pieces.content, pieces.offset, strict=True):
            if not len(ids):
                continue
            with torch.no_grad():
                output = featurizer.model(input_ids=torch.tensor(ids[None].astype(int)), output_hidden_states=True)
            for token in np.flatnonzero(content).tolist():
                state = output.hidden_states[featurizer.layer][0, token].numpy()
                states.setdefault(offset + token, state)  # an overlap counts in the first window
        kept = [state for state in states.values() if np.linalg.norm(state) <= featurizer.settings.sink_norm]
        means.append(np.mean(kept, axis=0) if kept else np.zeros(D_IN))
    return np.array(means, np.float32)


CHATS = [
    {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]} for a, b in pairwise(TEXTS)
]


@pytest.mark.parametrize("given", [[*TEXTS, TEXTS[0]], CHATS], ids=["text", "messages"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"batch_tokens": 9}, {"max_length": 6}, {"max_length": 6, "stride": 2}],
    ids=str,
)
def test_mean_hidden_states_are_those_of_a_loop_over_tokens(given, changes, featurizer) -> None:
    featurizer = featurizer.with_settings(**changes)
    found = featurizer.mean_hidden_states(given)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, slow_means(featurizer, given), rtol=1e-4, atol=1e-5)


def test_mean_hidden_states_leave_sinks_out(featurizer) -> None:
    norms = np.linalg.norm(slow_means(featurizer, list("abcdefgh")), axis=1)  # of one token each
    cut = featurizer.with_settings(sink_norm=float(np.median(norms)))
    found, given = cut.mean_hidden_states([*"abcdefgh", *TEXTS]), [*"abcdefgh", *TEXTS]
    assert 0 < cut.read(given).sinks < featurizer.read(given).tokens.sum()
    np.testing.assert_array_equal(found[:8].any(axis=1), norms <= cut.settings.sink_norm)
    np.testing.assert_allclose(found, slow_means(cut, given), rtol=1e-4, atol=1e-5)


def test_rows_without_tokens_have_zeros_and_broken_states_name_their_row(featurizer) -> None:
    skipping = featurizer.with_settings(on_error="skip")
    assert not skipping.mean_hidden_states(["a", " "])[1].any()
    assert skipping.mean_hidden_states([]).shape == (0, D_IN)
    model = tiny_model()
    broken = featurizer.tokenizer(TEXTS[2])["input_ids"][0]
    model.get_input_embeddings().weight.data[broken] = torch.nan
    broken = SAEFeaturizer(model, featurizer.tokenizer, tiny_sae(), sink_norm=1e6)
    with pytest.raises(RowError, match="Row 2 cannot be measured"):
        broken.mean_hidden_states(TEXTS[:3])
    assert not broken.with_settings(on_error="skip").mean_hidden_states(TEXTS[:3])[2].any()
