"""Scoring into shards: whole files, resumed where a run stopped, refused when they hold something else."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from datasets import Dataset
from sae_lens import TopKSAE, TopKSAEConfig
from tiny import CORPUS, byte_level_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from hf_fac import FACScorer, FeatureCoverage, SAEFeaturizer, score_shards
from hf_fac.inputs.rows import RowError


def make_featurizer(**settings) -> SAEFeaturizer:
    torch.manual_seed(0)
    tokenizer = byte_level_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    sae = TopKSAE(TopKSAEConfig(d_in=16, d_sae=64, k=4))
    torch.nn.init.normal_(sae.W_enc)
    return SAEFeaturizer(LlamaForCausalLM(config), tokenizer, sae, layer=1, **settings)


@pytest.fixture(scope="module")
def featurizer():
    return make_featurizer()


@pytest.fixture
def rows():
    words = " ".join(CORPUS).split()
    return Dataset.from_list([{"text": " ".join(words[i : i + 5]), "n": i} for i in range(25)])


def test_shards_hold_what_map_gives_in_the_same_order(featurizer, rows, tmp_path):
    files = score_shards(featurizer, rows, tmp_path, shard_rows=10)
    assert [f.name for f in files] == [f"shard-0000{i}-of-00003.parquet" for i in range(3)]
    sharded = Dataset.from_parquet(list(map(str, files)))
    mapped = rows.map(FACScorer(featurizer), batched=True)
    assert sharded.column_names == mapped.column_names
    for got, expected in zip(sharded, mapped, strict=True):
        # Other batches round otherwise; everything else is the same.
        torch.testing.assert_close(*(torch.tensor(row.pop("fac_activations")) for row in (got, expected)))
        assert got == expected


def test_ranks_share_the_shards_and_merge_to_the_same_coverage(featurizer, rows, tmp_path):
    parts = [score_shards(featurizer, rows, tmp_path, shard_rows=4, rank=r, world_size=2) for r in (1, 0)]
    assert not set(parts[0]) & set(parts[1])
    merged = FeatureCoverage(featurizer.measurement)
    for file in parts[0] + parts[1]:
        merged |= FeatureCoverage.from_dataset(Dataset.from_parquet(str(file)))
    whole = FeatureCoverage.from_dataset(rows.map(FACScorer(featurizer), batched=True))
    assert merged.rows == whole.rows
    torch.testing.assert_close(torch.from_numpy(merged.maximum), torch.from_numpy(whole.maximum))


def test_shards_of_another_run_are_refused(featurizer, rows, tmp_path):
    score_shards(featurizer, rows, tmp_path, shard_rows=10)
    with pytest.raises(ValueError, match="shards of another run"):
        score_shards(featurizer, rows.select(range(20)), tmp_path, shard_rows=10)


FIRST, SECOND, MANIFEST = "shard-00000-of-00003.parquet", "shard-00001-of-00003.parquet", "measurement.json"


def changed(rows, folder, other):
    return Dataset.from_list([row | {"text": "Another text."} if row["n"] == 7 else row for row in rows])


def reordered_without_manifest(rows, folder, other):
    (folder / MANIFEST).unlink()
    return rows.select([0, 2, 1, *range(3, 25)])


def reordered(rows, folder, other):
    return rows.select([0, 2, 1, *range(3, 25)])


def copied(rows, folder, other):
    shutil.copy(folder / FIRST, folder / SECOND)
    return rows


def of_another_sae(rows, folder, other):
    score_shards(other, rows, folder / "other", shard_rows=10)
    shutil.copy(folder / "other" / SECOND, folder / SECOND)
    return rows


def without_a_note(rows, folder, other):
    Dataset.from_parquet(str(folder / SECOND)).to_parquet(folder / SECOND)
    return rows


def cut_short(rows, folder, other):
    (folder / SECOND).write_bytes((folder / SECOND).read_bytes()[:-100])
    return rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed, f"{FIRST} does not hold what is now in rows 0 to 9"),
        (reordered, f"{FIRST} does not hold what is now in rows 0 to 9"),
        (reordered_without_manifest, "lies there without measurement.json"),
        (copied, f"{SECOND} does not hold what is now in rows 10 to 19"),
        (of_another_sae, f"{SECOND} was scored with another model, SAE or setting"),
        (without_a_note, f"{SECOND} was not written by score_shards, or is not whole"),
        (cut_short, f"{SECOND} was not written by score_shards, or is not whole"),
    ],
)
def test_shards_that_do_not_hold_these_rows_are_refused(featurizer, rows, tmp_path, change, message):
    score_shards(featurizer, rows, tmp_path, shard_rows=10)
    other = make_featurizer(activation="relu")
    now = change(rows, tmp_path, other)
    (tmp_path / "shard-00002-of-00003.parquet").unlink()
    with pytest.raises(ValueError, match=re.escape(message)):
        score_shards(featurizer, now, tmp_path, shard_rows=10)
    assert not (tmp_path / "shard-00002-of-00003.parquet").exists()


def test_a_stream_has_no_shards(featurizer, rows, tmp_path):
    with pytest.raises(TypeError, match=r"dataset is a IterableDataset, .* map the stream with FACScorer"):
        score_shards(featurizer, rows.to_iterable_dataset(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_bad_row_is_named_by_its_number_in_the_data_set(featurizer, tmp_path):
    rows = Dataset.from_list([{"text": "fine"}] * 7 + [{"text": None}])
    with pytest.raises(RowError, match="Row 7 cannot be read"):
        score_shards(featurizer, rows, tmp_path, shard_rows=5)
