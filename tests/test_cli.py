"""The command line on a tiny model in local folders, and what a stopped scoring run leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from datasets import Dataset
from sae_lens import TopKSAE, TopKSAEConfig
from tiny import CORPUS, byte_level_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from hf_fac import FACScorer, FeatureCoverage, SAEFeaturizer, save_sae, score_shards
from hf_fac.conversations import RowError


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny model with its tokenizer, an SAE for its layer 1, and two data sets."""
    root = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    tokenizer = byte_level_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    sae = TopKSAE(TopKSAEConfig(d_in=16, d_sae=64, k=4))
    torch.nn.init.normal_(sae.W_enc)
    sae.cfg.metadata.hook_name = "blocks.0.hook_resid_post"
    save_sae(sae, root / "sae")
    words = " ".join(CORPUS).split()
    for name, size in (("data", 12), ("anchor", 40)):
        rows = [{"text": " ".join(words[i % 30 : i % 30 + 1 + i % 6])} for i in range(size)]
        (root / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def run(folders, *arguments, **settings):
    command = [sys.executable, "-c", "from hf_fac.cli import main; main()", *map(str, arguments)]
    environment = {**os.environ, "HF_HOME": str(folders / "hf"), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, **settings)


def model_options(folders):
    return ["--model", folders / "model", "--sae", folders / "sae", "--device", "cpu"]


def test_missing_scores_two_files_and_writes_what_it_prints(folders):
    report = folders / "report.json"
    done = run(
        folders, "missing", folders / "data.jsonl", folders / "anchor.jsonl", *model_options(folders), "-o", report
    )
    assert done.returncode == 0, done.stderr
    written = json.loads(report.read_text())
    assert f"FAC {written['fac']:.3f}" in done.stdout
    assert f"{len(written['missing'])} missing" in done.stdout
    assert written["threshold_source"].split(",")[0] in done.stdout
    assert written["measurement"]["d_sae"] == 64


def test_score_then_missing_equals_missing_at_once(folders):
    for name in ("data", "anchor"):
        done = run(
            folders,
            "score",
            folders / f"{name}.jsonl",
            "-o",
            folders / name,
            "--shard-rows",
            7,
            *model_options(folders),
        )
        assert done.returncode == 0, done.stderr
    first, second = folders / "one.json", folders / "two.json"
    done = run(folders, "missing", folders / "data", folders / "anchor", "--threshold", 0.1, "-o", first)
    assert done.returncode == 0, done.stderr
    run(
        folders, "missing", folders / "data.jsonl", folders / "anchor.jsonl", "--threshold", 0.1, "-o", second,
        *model_options(folders),
    )  # fmt: skip
    assert json.loads(first.read_text()) == json.loads(second.read_text())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing", "nowhere.jsonl", "nowhere.jsonl"], "does not exist"),
        (["missing", "{}/data.jsonl", "{}/anchor.jsonl", "--model", "{}/model"], "--model and --sae go together"),
        (["missing", "{}/data.jsonl", "{}/anchor.jsonl", "--threshold", "-1"], "threshold"),
        (["missing", "{}/data.jsonl", "{}/anchor.jsonl", "--pool-over", "user"], "plain text has no roles"),
    ],
)
def test_bad_input_is_one_clear_line(folders, arguments, message):
    arguments = [a.format(folders) for a in arguments]
    if "--model" not in arguments and "nowhere" not in arguments[1]:
        arguments += model_options(folders)
    done = run(folders, *arguments)
    assert done.returncode != 0
    assert message in " ".join((done.stdout + done.stderr).split())
    assert "Traceback" not in done.stderr


def test_synthesize_plans_writes_and_goes_on(folders):
    output, known = folders / "written", folders / "dictionary"
    done = run(folders, "interpret", folders / "anchor.jsonl", "-o", known, *model_options(folders))
    assert done.returncode == 0, done.stderr
    command = [
        "synthesize", folders / "data.jsonl", folders / "anchor.jsonl", "-o", output, "--dictionary", known,
        "--chat", folders / "model", "--form", "list", "--threshold", 0.1, "--max-requests", 40,
        *model_options(folders),
    ]  # fmt: skip
    done = run(folders, *command, "--plan")
    assert done.returncode == 0, done.stderr
    assert "Plan: at most" in done.stdout
    assert not (output / "report.json").exists()
    done = run(folders, *command)
    assert done.returncode == 0, done.stderr
    report = json.loads((output / "report.json").read_text())
    assert 0 < report["requests"] <= 40
    assert len(Dataset.from_parquet(str(output / "samples.parquet"))) == report["samples"]
    assert len(Dataset.from_parquet(str(output / "dropped.parquet"))) == sum(report["dropped"].values())
    journal = {file.name: file.read_bytes() for file in (output / "journal").glob("*.jsonl")}
    again = run(folders, *command)
    assert again.returncode == 0, again.stderr
    assert {file.name: file.read_bytes() for file in (output / "journal").glob("*.jsonl")} == journal


def test_help_names_every_command(folders):
    done = run(folders, "--help")
    for command in (
        "demo",
        "score",
        "missing",
        "train-sae",
        "interpret",
        "rate",
        "select",
        "synthesize",
        "push",
        "pull",
    ):
        assert command in done.stdout


@pytest.fixture(scope="module")
def featurizer(folders):
    return SAEFeaturizer.from_pretrained(str(folders / "model"), sae=str(folders / "sae"), device="cpu")


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


def test_a_bad_row_is_named_with_its_shard(featurizer, tmp_path):
    rows = Dataset.from_list([{"text": "fine"}] * 7 + [{"text": None}])
    with pytest.raises(RowError, match=r"In rows 5 to 7.*Row 2"):
        score_shards(featurizer, rows, tmp_path, shard_rows=5)


def test_a_killed_run_goes_on_and_scores_nothing_twice(folders, tmp_path):
    words = " ".join(CORPUS).split()
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"text": " ".join(words[i % 40 : i % 40 + 20])}) for i in range(3000)))
    command = [
        sys.executable, "-c", "from hf_fac.cli import main; main()", "score", str(data), "-o", str(tmp_path / "out"),
        "--shard-rows", "100", *map(str, model_options(folders)),
    ]  # fmt: skip
    environment = {**os.environ, "HF_HOME": str(folders / "hf"), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "out").glob("*.parquet"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "out").glob("*.parquet")}
    assert 3 <= len(before) < 30
    assert subprocess.run(command, env=environment, capture_output=True, timeout=300).returncode == 0
    assert all(f.stat().st_mtime_ns == when for f, when in before.items())
    scored = Dataset.from_parquet([str(f) for f in sorted((tmp_path / "out").glob("*.parquet"))])
    assert scored["text"] == [json.loads(line)["text"] for line in data.read_text().splitlines()]
