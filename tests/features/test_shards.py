"""Scoring into shards: whole files, resumed where a run stopped, refused when they hold something else."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
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


def make_rows(n: int) -> Dataset:
    words = " ".join(CORPUS).split()
    return Dataset.from_list([{"text": " ".join(words[i : i + 5]), "n": i} for i in range(n)])


@pytest.fixture
def rows():
    return make_rows(25)


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


WORKER = """
import os, sys
sys.path[:0] = sys.argv[1].split(":")
import torch.distributed as dist
from test_shards import make_featurizer, make_rows
from hf_fac import score_shards
from hf_fac.features import shards

dist.init_process_group("gloo")
write, written = shards.write_parquet, []
def write_then_tell(*arguments, **settings):
    write(*arguments, **settings)
    written.append(1)
    if sys.argv[3] == "killed" and len(written) == 2 + dist.get_rank():
        os.kill(os.getpid(), 9)
shards.write_parquet = write_then_tell
score_shards(make_featurizer(), make_rows(60), sys.argv[2], shard_rows=5)
dist.barrier()
"""


@pytest.mark.slow
def test_processes_of_torchrun_that_are_killed_resume_where_they_stopped(featurizer, tmp_path):
    def torchrun(how):
        paths = f"{Path(__file__).parent}:{Path(__file__).parents[1] / 'support'}"
        return subprocess.run(
            [
                sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1",
                "--master_port", str(free_port()), tmp_path / "worker.py", paths, tmp_path / "shards", how,
            ],
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    (tmp_path / "worker.py").write_text(WORKER)
    assert torchrun("killed").returncode != 0
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "shards").glob("*.parquet")}
    assert 2 <= len(before) <= 5
    done = torchrun("to the end")
    assert done.returncode == 0, done.stderr
    files = sorted((tmp_path / "shards").glob("*"))
    assert [file.name for file in files] == [MANIFEST, *(f"shard-{i:05d}-of-00012.parquet" for i in range(12))]
    assert all(file.stat().st_mtime_ns == when for file, when in before.items())
    merged = FeatureCoverage.from_parquet(files[1:])
    whole = FeatureCoverage.from_dataset(make_rows(60).map(FACScorer(featurizer), batched=True))
    assert merged.rows == whole.rows
    np.testing.assert_allclose(merged.maximum, whole.maximum, rtol=1e-4)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


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
