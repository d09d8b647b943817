"""Feature dictionaries: what is collected from rows, merged, kept, pushed and asked of them. Spans and statistics are
compared with a slow reference written from the definition, the Hub is the local server of `hub_server.py`."""

from __future__ import annotations

import json
import math
import os
import random
import signal
from fractions import Fraction
from itertools import permutations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, concatenate_datasets, load_dataset
from hand_made import MEASUREMENT, by_hand, row_of
from hub_server import WRITE_TOKEN, HubServer, run_with_hub
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import exit_code_of
from scipy.sparse import csr_array
from tiny import CORPUS, byte_level_tokenizer
from tiny_models import tiny_model, tiny_sae

from hf_fac.coverage import FeatureCoverage
from hf_fac.dictionary import FeatureDictionary
from hf_fac.dictionary.build import build_dictionary
from hf_fac.dictionary.schema import schema
from hf_fac.dictionary.top_spans import TopSpans, window_hashes
from hf_fac.features.featurizer import SAEFeaturizer
from hf_fac.features.pooling import FeatureActivations
from hf_fac.inputs.rows import ConversationReader, RowError
from hf_fac.storage.parquet import row_hash

WORDS = " ".join(CORPUS).split()


def make_rows(n: int, *, seed: int = 0) -> list[dict]:
    """Short texts of which some come twice, in whole or around the same words."""
    source = random.Random(seed)
    texts = [" ".join(source.choices(WORDS, k=source.randint(1, 25))) for _ in range(n)]
    for i in range(0, n, 5):
        texts[i] = texts[source.randrange(n)] + source.choice(["", " hello world", " ye\x00s\n"])
    return [{"text": text} for text in texts]


def make_featurizer(**options) -> SAEFeaturizer:
    settings = {"sink_norm": 1e9, **options}
    return SAEFeaturizer(tiny_model(), byte_level_tokenizer(), tiny_sae(seed=settings.pop("seed", 0)), **settings)


@pytest.fixture(scope="module")
def featurizer() -> SAEFeaturizer:
    return make_featurizer()


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return make_rows(60)


@pytest.fixture(scope="module")
def dictionary(featurizer, rows) -> FeatureDictionary:
    return build_dictionary(featurizer, Dataset.from_list(rows), spans=4, before=3, after=2, source="made up")


def slow_spans(featurizer, rows, *, n, before, after) -> tuple[dict[int, list], dict[int, list]]:
    """By feature: [(activation, row, before, token, after)] and all activations, by loops over one reading of all."""
    reading = featurizer.read(rows, positions=True)
    acts = reading.activations
    ids = featurizer.reader(rows).ids
    found, values = {}, {}
    for r in range(len(rows)):
        for k in range(acts.indptr[r], acts.indptr[r + 1]):
            feature, value, position = int(acts.indices[k]), float(acts.data[k]), int(reading.positions[k])
            around = tuple(
                int(ids[r][t]) if 0 <= t < len(ids[r]) else None for t in range(position - before, position + after + 1)
            )
            best = found.setdefault(feature, {}).get(around)
            if best is None or value > best[0]:
                found[feature][around] = (value, r, position)
            values.setdefault(feature, []).append(value)
    spans = {}
    for feature, places in found.items():
        best = sorted(places.values(), key=lambda p: (-p[0], p[1]))[:n]
        spans[feature] = [
            (value, r, *featurizer.span(rows[r], place, before=before, after=after)[:3]) for value, r, place in best
        ]
    return spans, values


def test_spans_and_statistics_are_those_of_the_definition(featurizer, rows, dictionary) -> None:
    spans, values = slow_spans(featurizer, rows, n=4, before=3, after=2)
    coverage = FeatureCoverage.from_activations(featurizer(rows), measurement=featurizer.measurement)
    assert dictionary.features.tolist() == list(range(featurizer.d_sae))
    assert sum(len(places) == 4 for places in spans.values()) > 10
    for row in dictionary:
        i = row["feature"]
        found = [(s["activation"], s["row"], s["before"], s["token"], s["after"]) for s in row["spans"]]
        assert found == spans.get(i, [])
        assert all(s["source"] == "made up" for s in row["spans"])
        acts = values.get(i, [])
        assert (row["rows"], row["total_rows"], row["frequency"]) == (len(acts), len(rows), len(acts) / len(rows))
        assert row["rows"] == int(coverage.group_counts[..., i].sum())
        assert row["max_activation"] == coverage.maximum[i] == max(acts, default=0.0)
        exact = sum(map(Fraction, acts))
        assert abs(Fraction(row["activation_sum"]) - exact) <= len(acts) * Fraction(1, 2**21)
        assert row["mean_activation"] == pytest.approx(float(exact / len(acts)) if acts else 0.0, rel=1e-6)


def test_the_same_tokens_around_the_same_token_count_once_among_the_spans_but_each_row_in_the_statistics(
    featurizer,
) -> None:
    once = build_dictionary(featurizer, [{"text": CORPUS[0]}, {"text": CORPUS[1]}])
    often = build_dictionary(featurizer, [{"text": CORPUS[0]}] * 20 + [{"text": CORPUS[1]}] * 3)
    assert [[s | {"row": 0} for s in row["spans"]] for row in often] == [
        [s | {"row": 0} for s in row["spans"]] for row in once
    ]
    assert {s["row"] for row in often for s in row["spans"]} == {0, 20}
    live = [(a["rows"], b["rows"]) for a, b in zip(once, often, strict=True) if a["rows"]]
    assert live
    assert all(b in (3 * a, 20 * a, 23) for a, b in live)


ENTRY = st.tuples(st.integers(0, 3), st.sampled_from([0.5, 1.0, 2.0, 3.0]), st.integers(0, 4))


@given(st.lists(st.lists(ENTRY, max_size=4, unique_by=lambda e: e[0]), max_size=12), st.randoms(use_true_random=False))
@settings(max_examples=80, deadline=None)
def test_top_spans_are_the_same_for_any_parts_in_any_order(data, source) -> None:
    def reading_of(part):
        entries = [(r, *entry) for r, row in enumerate(part) for entry in row]
        columns = zip(*entries, strict=True) if entries else [[]] * 4
        owner, ids, acts, _ = map(np.array, columns)
        matrix = csr_array((acts.astype(np.float32), (owner.astype(int), ids.astype(int))), shape=(len(part), 4))
        matrix.sort_indices()
        lookup = {(e[0], e[1]): e[3] for e in entries}
        features = [i for r in range(len(part)) for i in matrix.indices[matrix.indptr[r] : matrix.indptr[r + 1]]]
        positions = np.array(
            [
                lookup[r, int(i)]
                for r, i in zip(np.repeat(np.arange(len(part)), np.diff(matrix.indptr)), features, strict=True)
            ],
            dtype=np.int32,
        )
        return FeatureActivations(matrix, np.ones(len(part), np.int32), positions, {}, 0, 0, 0)

    def collect(parts):
        top = TopSpans(4, 2)
        for start in parts:
            # A window's hash is its position here, so that equal ones abound.
            top.add(start, reading_of(data[start : start + 3]), lambda _, position: position.astype(np.uint64))
        return top

    starts = list(range(0, len(data), 3))
    one, other = collect(starts), collect(source.sample(starts, len(starts)))
    for name in ("activation", "window", "row", "position", "rows", "activation_sum"):
        assert (getattr(one, name) == getattr(other, name)).all(), name
    for i in range(4):
        best: dict[int, tuple] = {}
        for r, row in enumerate(data):
            for feature, value, window in row:
                if feature == i:
                    best[window] = min(best.get(window, (0.0, 0)), (-value, r))
        expected = sorted(best.values())[:2]
        n = len(expected)
        assert list(zip(-one.activation[i][:n], one.row[i][:n], strict=True)) == expected
        assert not one.activation[i][n:].any()


def test_sums_of_activations_of_very_different_size_are_the_same_in_any_order() -> None:
    values = (10 ** np.random.default_rng(0).uniform(-5, 5, 400)).astype(np.float32)

    def total(order) -> float:
        top = TopSpans(1, 2)
        for i in order:
            column = csr_array(values[i : i + 4, None])
            reading = FeatureActivations(column, np.ones(4, np.int32), np.zeros(4, np.int32), {}, 0, 0, 0)
            top.add(i, reading, lambda row, _: row.astype(np.uint64))
        return top.activation_sum[0]

    rising = range(0, 400, 4)
    assert total(rising) == total(rising[::-1])
    assert abs(Fraction(total(rising)) - sum(map(Fraction, values.tolist()))) <= 400 * Fraction(1, 2**21)


def test_ranks_and_shards_merge_in_any_order_to_the_dictionary_of_all(featurizer, rows) -> None:
    options = {"spans": 4, "before": 3, "after": 2, "shard_rows": 7}
    whole = build_dictionary(featurizer, rows, **options)
    parts = [build_dictionary(featurizer, rows, **options, rank=r, world_size=3) for r in range(3)]
    assert [part.dataset[0]["total_rows"] for part in parts] == [21, 21, 18]
    for a, b, c in permutations(parts):
        assert (a | b) | c == whole
        assert a | (b | c) == whole
    # The same rows are not counted again.
    assert whole | whole == whole
    assert whole.dataset[0]["data"] == f"{sum(map(row_hash, rows)) % 2**64:016x}"


def test_parts_of_the_features_merge_to_all(dictionary) -> None:
    left, right = dictionary.select(range(20)), dictionary.select(range(15, 48))
    assert left | right == right | left == dictionary
    explained = left.updated({3: {"explanation": "rivers", "explanation_state": "explained"}})
    assert (right | explained | dictionary)[3]["explanation"] == "rivers"


def test_memory_does_not_grow_with_the_data(featurizer, tmp_path) -> None:
    sizes = []
    for n in (30, 300):
        build_dictionary(featurizer, make_rows(n), spans=4, output_dir=tmp_path / str(n), shard_rows=50)
        (state,) = (tmp_path / str(n)).iterdir()
        sizes.append(state.stat().st_size)
    arrays = 24 * 48 * 4 + 2 * 8 * 48
    assert arrays < sizes[0] <= sizes[1] < arrays + 3000
    assert sizes[1] - sizes[0] < 64


def test_rows_are_read_in_batches_that_fit_the_width_of_the_sae(featurizer, monkeypatch) -> None:
    read, sizes = SAEFeaturizer.read, []
    monkeypatch.setattr("hf_fac.dictionary.build._CELLS", 48 * 10)
    monkeypatch.setattr(SAEFeaturizer, "read", lambda self, part, **o: sizes.append(len(part)) or read(self, part, **o))
    build_dictionary(featurizer, make_rows(45), shard_rows=25)
    assert sizes == [10, 10, 5, 10, 10]


def build_until_killed(rows, folder) -> None:
    save, saved = TopSpans.save, []

    def save_then_die(self, *arguments):
        save(self, *arguments)
        saved.append(1)
        if len(saved) == 3:
            arguments[0].with_suffix(".1.partial").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)

    TopSpans.save = save_then_die
    build_dictionary(make_featurizer(), rows, shard_rows=10, output_dir=folder)


def test_a_killed_pass_resumes_after_the_last_shard(featurizer, rows, tmp_path, monkeypatch) -> None:
    assert exit_code_of(build_until_killed, rows, tmp_path) == -signal.SIGKILL
    read, seen = SAEFeaturizer.read, []
    monkeypatch.setattr(SAEFeaturizer, "read", lambda self, part, **o: seen.extend(part) or read(self, part, **o))
    resumed = build_dictionary(featurizer, rows, shard_rows=10, output_dir=tmp_path)
    assert seen == rows[30:]
    again = build_dictionary(featurizer, rows, shard_rows=10, output_dir=tmp_path)
    assert len(seen) == 30
    assert resumed == again == build_dictionary(featurizer, rows, shard_rows=10)


def test_a_folder_with_another_pass_is_refused(featurizer, rows, tmp_path) -> None:
    build_dictionary(featurizer, rows, output_dir=tmp_path)
    for other, options, problem in (
        (rows[:-1], {}, "dataset_rows: 60 and 59"),
        ([*rows[:-1], {"text": "changed"}], {}, "pass over other rows, or in another order"),
        ([rows[1], rows[0], *rows[2:]], {}, "pass over other rows, or in another order"),
        (rows, {"spans": 5}, "spans: 10 and 5"),
        (rows, {"shard_rows": 9}, "shard_rows: 5000 and 9"),
    ):
        with pytest.raises(ValueError, match=problem):
            build_dictionary(featurizer, other, output_dir=tmp_path, **options)
    with pytest.raises(ValueError, match="measurement: "):
        build_dictionary(make_featurizer(seed=1), rows, output_dir=tmp_path)
    next(tmp_path.iterdir()).write_bytes(b"something else")
    with pytest.raises(ValueError, match="no pass of build_dictionary"):
        build_dictionary(featurizer, rows, output_dir=tmp_path)


def test_bad_rows_and_arguments_are_refused_or_counted(rows) -> None:
    featurizer = make_featurizer()
    with pytest.raises(RowError, match=r"^Row 53 cannot be read: .*text is None"):
        build_dictionary(featurizer, [*rows[:53], {"text": None}, *rows[54:]], shard_rows=10)
    with pytest.raises(TypeError, match=r"pass a datasets\.Dataset"):
        build_dictionary(featurizer, Dataset.from_list(rows).to_iterable_dataset())
    for options, problem in (
        ({"spans": 0}, "spans is 0; it must be at least 1"),
        ({"after": -1}, "after is -1; it must be at least 0"),
        ({"shard_rows": 0}, "shard_rows is 0"),
        ({"rank": 2, "world_size": 2}, "got rank=2, world_size=2"),
    ):
        with pytest.raises(ValueError, match=problem):
            build_dictionary(featurizer, rows, **options)
    skipping = make_featurizer(on_error="skip")
    with pytest.warns(UserWarning, match="2 of 4 rows were skipped"):
        found = build_dictionary(skipping, [rows[0], {"text": None}, {"text": " "}, rows[1]])
    assert [row["rows"] for row in found] == [row["rows"] for row in build_dictionary(featurizer, rows[:2])]
    assert found[0]["total_rows"] == 4
    assert build_dictionary(featurizer, []).summary()["live"] == 0


def test_features_that_are_not_computed_have_no_row(rows) -> None:
    found = build_dictionary(make_featurizer(features=[40, 3]), rows)
    assert found.features.tolist() == [3, 40]
    assert found[40]["spans"]


def test_the_texts_of_spans_are_bounded_in_length(featurizer, monkeypatch) -> None:
    monkeypatch.setattr("hf_fac.dictionary.build._MOST_CHARACTERS", 4)
    found = build_dictionary(featurizer, [{"text": "\x00\x1b[31m\u202e x" + "word " * 2000}], before=20, after=20)
    spans = [s for row in found for s in row["spans"]]
    assert spans
    assert max(len(s[part]) for s in spans for part in ("before", "token", "after")) == 4


def test_spans_end_where_the_content_does(featurizer) -> None:
    contents = ["hello world", "thank you", "The river rises in the hills"]
    rows = [
        {
            "messages": [
                {"role": role, "content": text}
                for role, text in zip(("system", "user", "assistant"), contents, strict=True)
            ]
        }
    ]
    spans = [s for row in build_dictionary(featurizer, rows, before=20, after=20) for s in row["spans"]]
    assert len(spans) > 10
    assert {s["before"] + s["token"] + s["after"] for s in spans} <= set(contents)


@pytest.mark.parametrize("prepend_bos", [False, True])
def test_windows_have_the_same_hash_whether_a_row_is_read_whole_or_in_pieces(prepend_bos) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    rows = [{"text": " ".join(CORPUS[:3])}, {"text": "hello"}, {"text": CORPUS[3]}]
    whole = ConversationReader(tokenizer, prepend_bos=prepend_bos)(rows)
    parts = ConversationReader(tokenizer, prepend_bos=prepend_bos, max_length=12, stride=4)(rows)
    assert len(parts.ids) > len(whole.ids) == 3
    row = np.repeat(np.arange(3), [len(ids) for ids in whole.ids])
    position = np.concatenate([np.arange(len(ids)) for ids in whole.ids])
    one, other = (window_hashes(pieces, row, position, before=3, after=2) for pieces in (whole, parts))
    assert (one == other).all()
    around = {}
    for r, t, value in zip(row.tolist(), position.tolist(), one.tolist(), strict=True):
        ids = whole.ids[r].tolist()
        around.setdefault(tuple(ids[k] if 0 <= k < len(ids) else None for k in range(t - 3, t + 3)), set()).add(value)
    assert all(len(values) == 1 for values in around.values())
    assert len({value for values in around.values() for value in values}) == len(around)


@pytest.fixture(scope="module")
def annotated(dictionary) -> FeatureDictionary:
    live = [row["feature"] for row in dictionary if row["spans"]][:3]
    done = {"explanation_state": "explained", "verification": "yes", "verification_reason": "it fits"}
    return dictionary.updated(
        {
            live[0]: done | {
                "explanation": "ends of\nlines — 東京", "detection": 0.75, "detection_answers": 8,
                "ratings": [{"task": "toxicity", "rating": "no", "reason": "a river"}],
            },
            live[1]: done | {"explanation": "words", "ratings": [{"task": "toxicity", "rating": "yes", "reason": "x"}]},
            live[2]: {"explanation_state": "cannot tell"},
        }
    )  # fmt: skip


def test_a_saved_dictionary_is_read_back_as_it_was_and_by_load_dataset(annotated, tmp_path) -> None:
    annotated.save(tmp_path / "d")
    assert [file.name for file in (tmp_path / "d").iterdir()] == ["dictionary.parquet"]
    loaded = FeatureDictionary.load(tmp_path / "d")
    assert loaded == annotated
    assert loaded.measurement == annotated.measurement
    first = (tmp_path / "d" / "dictionary.parquet").read_bytes()
    loaded.save(tmp_path / "d")
    assert (tmp_path / "d" / "dictionary.parquet").read_bytes() == first

    opened = load_dataset(str(tmp_path / "d"), split="train", cache_dir=str(tmp_path / "cache"))
    assert opened.features == annotated.dataset.features
    assert FeatureDictionary(opened.shuffle(seed=1)) == annotated
    (tmp_path / "e").mkdir()
    opened.to_parquet(tmp_path / "e" / "train-00000.parquet")
    assert FeatureDictionary.load(tmp_path / "e") == annotated


def test_a_pushed_dictionary_is_pulled_back_as_it_was(annotated, tmp_path) -> None:
    annotated.save_pretrained(tmp_path / "local")
    with HubServer() as server:
        server.put("user/d", {"data/rows.parquet": b"mine", "notes.txt": b"mine"}, "datasets")
        result = run_with_hub(
            server,
            """
from pathlib import Path
from datasets import load_dataset
from hf_fac.dictionary.dictionary import FeatureDictionary

local = FeatureDictionary.load(args["folder"])
first = local.push_to_hub("user/d", commit_message="first").rsplit("/", 1)[1]
changed = local.updated({0: {"explanation": "other", "explanation_state": "explained"}})
url = changed.push_to_hub("user/d")
local.push_to_hub("user/private", private=True)
now = FeatureDictionary.from_pretrained("user/d")
result = {
    "now": now == changed,
    "old": FeatureDictionary.from_pretrained("user/d", revision=first) == local,
    "revision": now.revision, "url": url,
    "loaded": FeatureDictionary(load_dataset("user/d", split="train")) == changed,
    "streamed": next(iter(load_dataset("user/d", split="train", streaming=True)))["feature"],
}
""",
            token=WRITE_TOKEN,
            args={"folder": str(tmp_path / "local")},
        )
        assert result["now"]
        assert result["old"]
        assert result["loaded"]
        assert result["streamed"] == 0
        assert result["url"].endswith(result["revision"])
        held = server.files("user/d", "datasets")
        assert set(held) == {"dictionary.parquet", "README.md", "data/rows.parquet", "notes.txt", ".gitattributes"}
        card = held["README.md"].decode()
        assert "sparse-autoencoder" in card
        assert 'FeatureDictionary.from_pretrained("user/d")' in card
        assert annotated.measurement["fingerprint"] in card
        assert server.history("user/d", "datasets")[0] == "Upload a feature dictionary with hf_fac"
        private = server.files("user/private", "datasets")["dictionary.parquet"]
        assert private == (tmp_path / "local" / "dictionary.parquet").read_bytes()


def test_the_card_shows_features_as_text_whatever_they_hold() -> None:
    rows = [row_of(i, [f"a | <script>{i}</script> <<*x*>> `b`"]) for i in range(1, 2000, 100)]
    known = {"explanation": "**bold**", "explanation_state": "explained", "detection": 0.75, "settings": json.dumps(
        {"spans": 4, "before": 3, "after": 2, "explained_by": {"neuronpedia": "m/s", "model": "gpt|4", "type": None}}
    )}  # fmt: skip
    measurement = MEASUREMENT | {"d_sae": 2048}
    rows = [row | {"measurement": json.dumps(measurement)} for row in rows]
    plain = FeatureDictionary.from_rows(rows, measurement=measurement)
    explained = plain.updated({1901: known})
    for dictionary, examples in ((plain, 5), (explained, 1)):
        metadata, text = dictionary._card("user/d")
        assert metadata["configs"] == [{"config_name": "default", "data_files": "dictionary.parquet"}]
        assert text.count("&#60;script&#62;") == examples
        assert "<script" not in text
    assert (
        "| 1901 | &#42;&#42;bold&#42;&#42; | a &#124; &#60;script&#62;1901&#60;&#47;script&#62; <b>&#42;x&#42;</b> "
        in text
    )
    assert "| explained | 1 |" in text
    assert "| mean detection score (0.5 is chance) | 0.750 |" in text
    assert "| explained by | gpt&#124;4 &#40;Neuronpedia&#41; |" in text
    assert "failed" not in text.split("## Columns")[0]


def test_a_repo_that_holds_no_dictionary_is_refused_with_what_it_holds(tmp_path) -> None:
    Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "text.parquet")
    with HubServer() as server:
        server.put("user/data", {"data/train.parquet": (tmp_path / "text.parquet").read_bytes()}, "datasets")
        server.put("user/none", {"README.md": b"# nothing", "rows.csv": b"a,b"}, "datasets")
        server.put("user/broken", {"dictionary.parquet": b"PAR1 but not really"}, "datasets")
        result = run_with_hub(
            server,
            """
from hf_fac.dictionary.dictionary import FeatureDictionary
import hf_fac.dictionary.dictionary

def refused(name):
    try:
        return str(FeatureDictionary.from_pretrained(name))
    except Exception as error:
        return f"{type(error).__name__}: {error}"

result = [refused(f"user/{name}") for name in ("data", "none", "broken", "absent")]
hf_fac.dictionary.dictionary._MAX_BYTES = 10
result.append(refused("user/data"))
""",
            token=WRITE_TOKEN,
        )
    assert "user/data is something else than a feature dictionary" in result[0]
    assert "no column 'feature'; its columns are text" in result[0]
    assert "nothing matches *.parquet. There is: .gitattributes, README.md, rows.csv" in result[1]
    assert "user/broken is something else" in result[2]
    assert result[3].startswith("HubError")
    assert "at most 10 were expected" in result[4]


def test_a_folder_that_holds_no_dictionary_is_refused_with_what_is_wrong(dictionary, tmp_path, monkeypatch) -> None:
    with pytest.raises(FileNotFoundError, match="no folder"):
        FeatureDictionary.load(tmp_path / "absent")
    (tmp_path / "model.safetensors").write_bytes(b"1")
    with pytest.raises(ValueError, match=r"no feature dictionary.*there is: model\.safetensors"):
        FeatureDictionary.load(tmp_path)
    table = dictionary.dataset.with_format("arrow")[:]
    broken = {
        "other types": table.set_column(0, "feature", table["explanation_state"]),
        "holds nulls": table.set_column(8, "rows", table["explanation"].cast("int64")),
        "a feature twice": table.take([0, 1, 1]),
        "explanation_state is 'odd'": by_hand(row_of(1, []))._table().set_column(2, "explanation_state", [["odd"]]),
        "does not exist": by_hand(row_of(47, []))._table().set_column(0, "feature", [[48]]),
        "no column 'spans'": table.drop_columns("spans"),
    }
    for number, (problem, wrong) in enumerate(broken.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        pq.write_table(wrong, folder / "x.parquet")
        with pytest.raises(ValueError, match=problem):
            FeatureDictionary.load(folder)
    dictionary.save_pretrained(folder)
    assert FeatureDictionary.load(folder) == dictionary, "other Parquet files are no part of it"
    with pytest.raises(ValueError, match="nothing to save"):
        dictionary.select([]).save(tmp_path / "empty")
    dictionary.save(tmp_path / "whole")
    monkeypatch.setattr("hf_fac.dictionary.dictionary._MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="at most 1,000 were expected"):
        FeatureDictionary.load(tmp_path / "whole")


SPAN = {"before": "a ", "token": "b", "after": " c", "activation": 1.0, "row": 0, "source": None}


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"measurement": "3"}, "its column 'measurement': Input should be "),
        ({"measurement": "{}"}, "its column 'measurement': d_sae: Field required"),
        ({"measurement": json.dumps(MEASUREMENT | {"d_sae": 10**12})}, "d_sae: Input should be less than or equal to"),
        ({"measurement": "[" * 10**5}, "its column 'measurement': Invalid JSON: recursion limit"),
        ({"settings": "[]"}, "its column 'settings': Input should be an object"),
        ({"max_activation": math.nan}, "its column 'max_activation' holds NaN"),
        ({"spans": [SPAN | {"activation": math.inf}]}, "its column 'spans.activation' holds NaN or infinite"),
        ({"spans": [SPAN | {"token": None}]}, "its column 'spans.token' holds nulls"),
        ({"spans": [None]}, "its column 'spans' holds nulls"),
        ({"ratings": [{"task": "t", "rating": "often", "reason": ""}]}, "its ratings.rating is 'often' somewhere"),
        ({"explanation": None, "explanation_state": "explained"}, "its column 'explanation' is null where"),
    ],
)
def test_wrong_values_in_a_dictionarys_file_name_file_and_field(row, problem, tmp_path) -> None:
    good = row_of(1, ["the <<river>> bank"])
    pq.write_table(pa.Table.from_pylist([good | row], schema=schema()), tmp_path / "dictionary.parquet")
    with pytest.raises(ValueError, match=rf"{tmp_path.name} holds something else than a feature dictionary: ") as found:
        FeatureDictionary.load(tmp_path)
    assert problem in str(found.value)


def test_a_dictionary_of_another_model_or_sae_is_refused_with_what_differs(dictionary, featurizer) -> None:
    dictionary.check(featurizer)
    with pytest.raises(ValueError, match=r"another model or SAE.*feature_fingerprint: .*the weights or the SAE differ"):
        dictionary.check(make_featurizer(seed=1))
    with pytest.raises(ValueError, match=r"layer: 2 and 1"):
        dictionary.check(make_featurizer(layer=1))
    trained = make_featurizer()
    with torch.no_grad():
        trained.model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(ValueError, match="the weights or the SAE differ"):
        dictionary.check(trained)


def test_other_settings_and_weights_above_the_layer_are_accepted(dictionary) -> None:
    other = make_featurizer(keep_above=0.5, pool_over="user", side="rejected", activation="relu", max_length=9)
    other.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    other.model.config._name_or_path = "a/copy/elsewhere"
    with torch.no_grad():
        other.model.model.layers[2].mlp.up_proj.weight.zero_()
        other.model.lm_head.weight.zero_()
    dictionary.check(other)
    assert other.fingerprint() != make_featurizer().fingerprint()


def test_what_was_measured_differently_does_not_merge(dictionary) -> None:
    with pytest.raises(ValueError, match=r"do not merge.*keep_above: 0\.0 and 0\.5"):
        dictionary | build_dictionary(make_featurizer(keep_above=0.5), [{"text": "hello"}])
    other = build_dictionary(make_featurizer(seed=1), [{"text": "hello"}])
    with pytest.raises(ValueError, match="measured differently do not merge"):
        dictionary | other
    both = concatenate_datasets([dictionary.select([0]).dataset, other.select([1]).dataset])
    with pytest.raises(ValueError, match="measured differently"):
        FeatureDictionary(both)


def test_lookup_search_and_filter() -> None:
    dictionary = by_hand(
        row_of(5, ["the <<river>> bank", "a <<River>>"]),
        row_of(2, ["money in the <<bank>>"], explanation="Banks, and MONEY", explanation_state="explained"),
        row_of(9, ["我住在<<東京>>都", "a starting <<point>>"]),
    )
    assert dictionary.features.tolist() == [2, 5, 9]
    assert [row["feature"] for row in dictionary] == [2, 5, 9]
    assert dictionary[5]["spans"][0]["token"] == "river"
    assert dictionary.spans(2) == [("money in the ", "bank", "", 10.0)]
    assert 5 in dictionary
    assert 3 not in dictionary
    for ask in (lambda: dictionary[3], lambda: dictionary.select([2, 3]), lambda: dictionary.updated({3: {}})):
        with pytest.raises(KeyError, match="feature 3 is not one of the 3"):
            ask()
    for words, found in (
        ("RIVER", [5]), ("bank", [2, 5]), ("bank money", [2]), ("banks", [2]), ("art", []), ("京", [9]), ("a (", []),
        ("", [2, 5, 9]),
    ):  # fmt: skip
        assert dictionary.search(words).features.tolist() == found, words
    assert dictionary.filter(lambda row: row["rows"] == 2).features.tolist() == [5, 9]
    assert dictionary.filter(lambda row: False).search("x").summary()["features"] == 0
    assert dictionary.summary() == {
        "features": 3, "live": 3, "explained": 1, "cannot tell": 0, "failed": 0, "verified": 0,
    }  # fmt: skip


def test_task_features_are_the_verified_and_relevant_ones() -> None:
    def rated(feature, rating, verification="yes"):
        ratings = [{"task": "toxicity", "rating": rating, "reason": ""}] if rating else []
        return row_of(feature, [], explanation="x", explanation_state="explained", verification=verification) | {
            "ratings": ratings
        }

    dictionary = by_hand(
        rated(1, "yes"), rated(2, "probably", "maybe"), rated(3, "maybe", "probably"), rated(4, "no"),
        rated(5, "failed"), rated(6, None), rated(7, "yes", "no"), rated(8, "yes", None), rated(9, "yes", "failed"),
    )  # fmt: skip
    assert dictionary.task_features("toxicity").tolist() == [1, 2, 3]
    assert dictionary.task_features("toxicity").dtype == np.int64
    assert dictionary.task_features("toxicity", at_least="probably").tolist() == [1, 2]
    assert dictionary.task_features("toxicity", at_least="yes", verified=False).tolist() == [1, 7, 8, 9]
    with pytest.raises(ValueError, match=r"No feature was rated for 'kindness' \(but for toxicity\)"):
        dictionary.task_features("kindness")
    with pytest.raises(ValueError, match="at_least is 'no'"):
        dictionary.task_features("toxicity", at_least="no")
    coverage = FeatureCoverage.from_activations(csr_array(np.eye(10, 48, dtype=np.float32)), measurement=MEASUREMENT)
    empty = FeatureCoverage(MEASUREMENT)
    report = empty.compare(coverage, features=dictionary.task_features("toxicity"), threshold=0.5)
    assert sorted(report.missing.tolist()) == [1, 2, 3]


def test_of_two_annotations_the_one_that_says_most_is_kept_with_its_ratings() -> None:
    def part(data, **columns):
        return by_hand(row_of(1, [f"{data} <<x>>"], data=data * 16, **columns))

    good = {"explanation": "good", "explanation_state": "explained", "verification": "yes"}
    no, yes = ({"task": "t", "rating": rating, "reason": "r"} for rating in ("no", "yes"))
    parts = [
        part("a", **good, ratings=[no]),
        part("b", explanation_state="failed"),
        part("c", **good | {"explanation": "worse", "verification": "maybe"}, ratings=[yes]),
        part("d", explanation_state="cannot tell"),
        part("e", **good, ratings=[yes, yes | {"task": "u"}]),
    ]
    merged = {json.dumps((a | b | c | d | e)[1], default=str) for a, b, c, d, e in [*permutations(parts)][::24]}
    assert len(merged) == 1
    (row,) = map(json.loads, merged)
    assert row["explanation"] == "good"
    assert row["ratings"] == [yes, yes | {"task": "u"}]
    assert [s["before"] for s in row["spans"]] == ["a ", "b ", "c ", "d "]
    assert (row["rows"], row["total_rows"], row["frequency"]) == (5, 250, 0.02)
    with pytest.raises(ValueError, match="after: 2 and 9"):
        parts[0] | part("b", settings=json.dumps({"spans": 4, "before": 3, "after": 9}))


def test_the_schema_is_what_the_columns_say(dictionary) -> None:
    assert dictionary.dataset.column_names == schema().names
    assert dictionary.dataset.features.arrow_schema.remove_metadata() == schema()
    assert dictionary.measurement["d_sae"] == 48
    assert json.loads(dictionary[0]["settings"]) == {"hf_fac": "0.1.0", "spans": 4, "before": 3, "after": 2}
    assert "layer 2" in repr(dictionary)
