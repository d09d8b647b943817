"""`hf-fac merge`: parts from several machines become one coverage or one dictionary, or are refused with the reason."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command_line import model_options, run
from datasets import Dataset, concatenate_datasets

from hf_fac import FeatureCoverage, FeatureDictionary, score_shards
from hf_fac.cli.options import MeasuringOptions


def in_a_process(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", "from hf_fac.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=None)


@pytest.fixture(scope="module")
def scored(folders, tmp_path_factory):
    """Two data sets scored by two commands, and their coverages."""
    root = tmp_path_factory.mktemp("scored")
    for name in ("data", "anchor"):
        run("score", folders / f"{name}.jsonl", "-o", root / name, "--shard-rows", 9, *model_options(folders))
    run("score", folders / "data.jsonl", "-o", root / "other", "--activation", "relu", *model_options(folders))
    return root


@pytest.fixture(scope="module")
def whole(scored):
    data, anchor = (FeatureCoverage.load(scored / name / "coverage.safetensors") for name in ("data", "anchor"))
    return data | anchor


def test_coverages_and_folders_of_scored_rows_merge_in_any_order(scored, whole, tmp_path):
    shutil.copytree(scored / "anchor", tmp_path / "shards", ignore=shutil.ignore_patterns("coverage*"))
    ways = [
        [scored / "data", scored / "anchor"],
        [scored / "anchor" / "coverage.safetensors", scored / "data"],
        [scored / "data" / "coverage.safetensors", tmp_path / "shards"],
        [*sorted((tmp_path / "shards").glob("*.parquet")), scored / "data"],
    ]
    for number, parts in enumerate(ways):
        output = tmp_path / f"new/{number}.safetensors"
        done = in_a_process("merge", output, *parts) if number == 0 else run("merge", output, *parts)
        said = " ".join(done.stdout.split()) if number == 0 else done
        assert "52 rows (0 without tokens) activate" in said, done
        assert FeatureCoverage.load(output) == whole


def test_coverages_of_several_processes_merge_only_when_all_are_there(folders, tmp_path, monkeypatch):
    options = ["--shard-rows", 9, *model_options(folders)]
    run("score", folders / "anchor.jsonl", "-o", tmp_path / "one", *options)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):  # two machines without a common disk
        monkeypatch.setenv("RANK", rank)
        run("score", folders / "anchor.jsonl", "-o", tmp_path / rank, *options)
    said = run("merge", tmp_path / "half.safetensors", tmp_path / "1", fails=True)
    assert "The parts of 2 processes are not whole; absent: coverage-00000-of-00002.safetensors" in said
    run("merge", tmp_path / "all.safetensors", tmp_path / "0", tmp_path / "1")
    merged, whole = (FeatureCoverage.load(tmp_path / n) for n in ("all.safetensors", "one/coverage.safetensors"))
    assert merged.rows == whole.rows == 40
    np.testing.assert_allclose(merged.maximum, whole.maximum, atol=1e-5)


def test_parts_measured_differently_are_refused_with_what_differs_and_nothing_is_written(scored, tmp_path):
    done = in_a_process("merge", tmp_path / "out.safetensors", scored / "data", scored / "other")
    assert done.returncode != 0
    said = " ".join(done.stderr.replace("│", " ").split())
    assert "does not merge with" in said
    assert "activation: 'native' and 'relu'" in said
    assert "Traceback" not in said
    assert not list(tmp_path.iterdir())


def without_a_shard(scored, tmp_path):
    shutil.copytree(scored / "anchor", tmp_path / "part", ignore=shutil.ignore_patterns("coverage*", "shard-00001*"))
    return [tmp_path / "part"]


def copied(scored, tmp_path):
    shutil.copytree(scored / "anchor", tmp_path / "copy")
    return [scored / "anchor", tmp_path / "copy"]


def unscored(scored, tmp_path):
    Dataset.from_list([{"text": "hello"}]).to_parquet(tmp_path / "rows.parquet")
    return [tmp_path / "rows.parquet"]


def cut_short(scored, tmp_path):
    shard = next((scored / "anchor").glob("*.parquet"))
    (tmp_path / "rows.parquet").write_bytes(shard.read_bytes()[:-9])
    return [tmp_path / "rows.parquet"]


def with_a_dictionary(scored, tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "dictionary.parquet").touch()
    return [tmp_path / "d", scored / "data"]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (lambda scored, _: [scored / "data", scored / "none"], "none does not exist"),
        (lambda scored, _: [scored / "data", scored / "data"], "is given twice"),
        (lambda scored, _: [scored / "data", scored / "data" / "coverage.safetensors"], "is given twice"),
        (
            lambda scored, _: [scored / "data", scored / "data" / "shard-00000-of-00002.parquet"],
            "may count the same rows",
        ),
        (lambda _, tmp_path: [tmp_path], "holds neither a coverage nor scored rows nor dictionary.parquet"),
        (lambda scored, _: [scored / "data" / "measurement.json"], "expected a coverage (.safetensors) or scored rows"),
        (without_a_shard, "holds 4 of 5 shards and no coverage"),
        (copied, "holds the same rows as"),
        (unscored, "rows.parquet: the rows have no column 'fac_features'"),
        (cut_short, "rows.parquet: not a whole Parquet file"),
        (with_a_dictionary, "is a dictionary and"),
    ],
)
def test_parts_that_cannot_be_merged_are_named(parts, message, scored, tmp_path):
    assert message in run("merge", tmp_path / "new" / "out.safetensors", *parts(scored, tmp_path), fails=True)
    assert not list((tmp_path / "new").glob("*"))


def test_the_output_comes_first_and_is_new(scored, tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        shutil.copy(scored / "data" / "coverage.safetensors", tmp_path / name)
    before = (tmp_path / "a.safetensors").read_bytes()
    said = run("merge", tmp_path / "a.safetensors", tmp_path / "b.safetensors", fails=True)
    assert "a.safetensors, the output, exists already: name a new one first" in said
    assert (tmp_path / "a.safetensors").read_bytes() == before
    said = run("merge", tmp_path / "folder", tmp_path / "b.safetensors", fails=True)
    assert "expected a name ending in .safetensors" in said


def test_dictionaries_merge_to_that_of_all_rows(folders, tmp_path):
    options = ["--spans", 3, *model_options(folders)]
    (tmp_path / "all.jsonl").write_text(
        "\n".join((folders / f"{name}.jsonl").read_text() for name in ("data", "anchor"))
    )
    for data in (tmp_path / "all.jsonl", folders / "data.jsonl", folders / "anchor.jsonl"):
        run("interpret", data, "-o", tmp_path / data.stem, *options)
    said = run("merge", tmp_path / "merged", tmp_path / "anchor", tmp_path / "data")
    merged, whole = (FeatureDictionary.load(tmp_path / name) for name in ("merged", "all"))
    assert f"{len(whole)} features in" in said
    assert len(FeatureDictionary.load(tmp_path / "data")) < len(whole)
    for one, other in zip(merged, whole, strict=True):
        assert [span["token"] for span in one["spans"]] == [span["token"] for span in other["spans"]]
        for name in ("feature", "rows", "total_rows", "frequency", "data"):
            assert one[name] == other[name], name
    assert "is given twice" in run("merge", tmp_path / "x", tmp_path / "data", tmp_path / "data", fails=True)


def test_rows_scored_from_python_merge_too(folders, scored, whole, tmp_path):
    options = dict(zip(("model", "sae", "device"), map(str, model_options(folders)[1::2]), strict=True))
    data, anchor = (Dataset.from_json(str(folders / f"{name}.jsonl")) for name in ("data", "anchor"))
    rows = concatenate_datasets([data, anchor])
    score_shards(MeasuringOptions(**options).featurizer(), rows, tmp_path / "scored", shard_rows=10)
    run("merge", Path(tmp_path / "out.safetensors"), tmp_path / "scored")
    merged = FeatureCoverage.load(tmp_path / "out.safetensors")
    assert merged.rows == whole.rows
    np.testing.assert_allclose(merged.maximum, whole.maximum, rtol=1e-4)
