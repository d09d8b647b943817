"""The command line on a tiny model in local folders, and what a stopped scoring run leaves behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import typer
from command_line import main, model_options
from datasets import Dataset, DatasetDict
from tiny import CORPUS

from hf_fac import FACScorer, FeatureCoverage, SAEFeaturizer, score_shards
from hf_fac.cli import commands as cli
from hf_fac.cli.options import load_data
from hf_fac.inputs.rows import RowError


def run(folders, *arguments, **settings):
    command = [sys.executable, "-c", "from hf_fac.cli import main; main()", *map(str, arguments)]
    environment = {**os.environ, "HF_HOME": str(folders / "hf"), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, **settings)


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


@pytest.mark.parametrize("text", ["[INST] hello [/INST]", "[red]apple[bold] and [user] hi", "a :warning: sign"])
def test_an_error_quotes_the_users_text_as_it_is(folders, monkeypatch, capsys, tmp_path, text):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"wrong": text}))
    said = main(
        monkeypatch, capsys, "missing", tmp_path / "rows.jsonl", folders / "anchor.jsonl", *model_options(folders)
    )
    assert "hf-fac: Row 0 cannot be read: its columns are ['wrong']" in said
    assert text in said


def test_a_line_on_the_console_is_not_broken_and_no_markup(capsys):
    line = "Written to /" + "a-long-folder/" * 20 + "[user]/:warning:/[/INST]."
    cli.console.print(line)
    assert line in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing", "{data}", "{data}", "--model", "{tmp}/none", "--sae", "{tmp}/none"], "none"),
        (["missing", "{data}", "{data}", "--device", "gpu"], "gpu cannot be used here"),
        (["missing", "{data}", "{data}", "-o", "{tmp}"], "is a directory"),
        (["score", "{data}", "-o", "{data}"], "is a file"),
        (["score", "{data}", "-o", "{tmp}/x", "--shard-rows", "0"], "greater than or equal to 1"),
        (["select", "{data}", "{tmp}/none.json", "-o", "{tmp}/x"], "does not exist"),
        (["push", "{tmp}/none", "user/x"], "does not exist"),
    ],
)
def test_what_greets_a_wrong_word_is_no_traceback(folders, monkeypatch, capsys, tmp_path, arguments, message):
    places = {"data": folders / "data.jsonl", "tmp": tmp_path}
    assert message in main(monkeypatch, capsys, *(word.format(**places) for word in arguments))


def test_a_report_in_a_new_folder_is_not_lost(folders, monkeypatch, tmp_path):
    output = tmp_path / "new" / "report.json"
    monkeypatch.setattr(sys, "argv", ["hf-fac"])
    arguments = [folders / "data.jsonl", folders / "anchor.jsonl", *model_options(folders), "-o", output]
    cli.app(["missing", *map(str, arguments)], standalone_mode=False)
    assert json.loads(output.read_text())["missing"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("score", "nowhere.jsonl"),
        ("missing", "nowhere.jsonl", "nowhere.jsonl"),
        ("train-sae", "nowhere.jsonl", "--layer", "1", "--model", "nowhere"),
        ("interpret", "nowhere.jsonl", "--model", "nowhere", "--sae", "nowhere"),
        ("select", "nowhere.jsonl", "file"),
        ("synthesize", "nowhere.jsonl", "nowhere.jsonl", "--task", "nothing"),
        ("pull", "nobody/nothing"),
    ],
)
def test_an_output_that_cannot_be_written_is_found_before_any_work(arguments, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    monkeypatch.setattr(sys, "argv", ["hf-fac", *arguments, "--output", "file/out"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "file/out cannot be written (a file is in the way): choose another output." in capsys.readouterr().err


def test_rows_measured_otherwise_are_refused_before_any_is_scored(folders, featurizer, monkeypatch, capsys, tmp_path):
    other = SAEFeaturizer.from_pretrained(
        str(folders / "model"), sae=str(folders / "sae"), device="cpu", activation="relu"
    )
    score_shards(other, Dataset.from_list([{"text": "The river rises."}]), tmp_path / "scored")
    (tmp_path / "unreadable.jsonl").write_text(json.dumps({"text": None}))
    for data in (
        [tmp_path / "unreadable.jsonl", tmp_path / "scored"],
        [tmp_path / "scored", tmp_path / "unreadable.jsonl"],
    ):
        said = main(monkeypatch, capsys, "missing", *data, *model_options(folders))
        assert "scored was measured otherwise" in said
        assert "activation: 'relu' and 'native'" in said


def write(folder, **files):
    folder.mkdir(parents=True)
    for name, texts in files.items():
        rows = Dataset.from_dict({"text": texts})
        if name.endswith("_jsonl"):
            rows.to_json(folder / f"{name.removesuffix('_jsonl')}.jsonl")
        else:
            rows.to_parquet(folder / f"{name.replace('_', '-')}.parquet")
    return str(folder)


def test_a_folder_is_read_split_by_split(tmp_path):
    folder = write(tmp_path / "rows", train_00000_of_00001=["a"], test_00000_of_00001=["b", "c"])
    assert load_data(folder)["text"][:] == ["a"]
    assert load_data(folder, "test")["text"][:] == ["b", "c"]
    assert load_data(folder, "test[:1]")["text"][:] == ["b"]
    with pytest.raises(typer.BadParameter, match=r"split validation\) cannot be read .*\['train', 'test'\]"):
        load_data(folder, "validation")


def test_a_folder_of_json_lines_is_read_whatever_its_name(tmp_path, monkeypatch):
    write(tmp_path / "json", train_jsonl=["a"], test_jsonl=["b"])
    (tmp_path / "test.jsonl").write_text('{"text": "beside it"}')
    monkeypatch.chdir(tmp_path)
    assert load_data("json", "test")["text"][:] == ["b"]


def test_what_synthesize_wrote_is_read_without_what_it_dropped(tmp_path):
    folder = write(tmp_path / "out", samples=["kept"], dropped=["refused"])
    (tmp_path / "out" / "journal").mkdir()
    (tmp_path / "out" / "journal" / "piece-00000.jsonl").write_text('["form", {}]\n')
    assert load_data(folder)["text"][:] == ["kept"]


def test_shards_are_one_data_set_in_order_whatever_the_split(featurizer, rows, tmp_path):
    files = score_shards(featurizer, rows, tmp_path, shard_rows=2)
    assert load_data(str(tmp_path), "test")["n"][:] == list(range(25))
    files[3].unlink()
    with pytest.raises(typer.BadParameter, match=r"holds 12 of 13 shards: start hf-fac score again"):
        load_data(str(tmp_path))


def test_what_save_to_disk_wrote_is_read(tmp_path):
    rows = Dataset.from_dict({"text": ["a"]})
    rows.save_to_disk(tmp_path / "one")
    DatasetDict({"train": rows, "test": Dataset.from_dict({"text": ["b"]})}).save_to_disk(tmp_path / "two")
    assert load_data(str(tmp_path / "one"), "test")["text"][:] == ["a"]
    assert load_data(str(tmp_path / "two"), "test")["text"][:] == ["b"]
    with pytest.raises(typer.BadParameter, match=r"split dev\).* train, test"):
        load_data(str(tmp_path / "two"), "dev")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", "", "it is empty"),
        ("rows.csv", "", "No columns"),
        ("rows.csv", "text\n", "no data"),
        ("rows.jsonl", '{"text": "a"}\n{oops\n', "JSON parse error"),
        ("rows.parquet", "text", "Parquet"),
        ("rows/README.md", "", "any data files"),
        ("rows/rows.py", "print('run')", "scripts are no longer supported"),
    ],
)
def test_what_holds_no_rows_is_refused_with_what_was_expected(tmp_path, name, content, message):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content)
    with pytest.raises(typer.BadParameter, match=rf"(?s)cannot be read as a data set: .*{message}.*expected: one row"):
        load_data(str(tmp_path / name.partition("/")[0]))


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
    assert "Plan without bounds: at most" in done.stdout
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
def test_shards_that_do_not_hold_these_rows_are_refused(folders, featurizer, rows, tmp_path, change, message):
    score_shards(featurizer, rows, tmp_path, shard_rows=10)
    other = SAEFeaturizer.from_pretrained(
        str(folders / "model"), sae=str(folders / "sae"), device="cpu", activation="relu"
    )
    now = change(rows, tmp_path, other)
    (tmp_path / "shard-00002-of-00003.parquet").unlink()
    with pytest.raises(ValueError, match=re.escape(message)):
        score_shards(featurizer, now, tmp_path, shard_rows=10)
    assert not (tmp_path / "shard-00002-of-00003.parquet").exists()


def test_a_shard_under_another_name_is_not_read_as_data(featurizer, rows, tmp_path):
    score_shards(featurizer, rows, tmp_path, shard_rows=10)
    assert len(load_data(str(tmp_path))) == 25
    shutil.copy(tmp_path / FIRST, tmp_path / SECOND)
    with pytest.raises(typer.BadParameter, match=f"{SECOND} is not what hf-fac score wrote there"):
        load_data(str(tmp_path))


def test_a_stream_has_no_shards(featurizer, rows, tmp_path):
    with pytest.raises(TypeError, match=r"dataset is a IterableDataset, .* map the stream with FACScorer"):
        score_shards(featurizer, rows.to_iterable_dataset(), tmp_path)
    assert not list(tmp_path.iterdir())


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


@pytest.mark.parametrize("option", [["--layer", "1"], ["--sae-id", "x"]])
@pytest.mark.parametrize("command", ["missing", "score"])
def test_an_option_of_ones_own_sae_is_refused_for_the_embedded_one(
    option, command, folders, monkeypatch, capsys, tmp_path
):
    data = [folders / "data.jsonl"] * (2 if command == "missing" else 1)
    output = [] if command == "missing" else ["-o", tmp_path]
    said = main(monkeypatch, capsys, command, *data, *output, *option)
    assert f"{option[0]} is of an SAE of yours" in said


@pytest.mark.parametrize("command", ["missing", "score", "interpret"])
def test_rows_that_were_cut_or_skipped_are_counted_with_the_first_reason(
    command, folders, monkeypatch, capsys, tmp_path
):
    rows = [{"text": "The river rises in the hills."}] * 1001 + [{"text": " "}, {"text": None}, {"text": "a b"}]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    options = ["--max-length", 3, "--on-error", "skip", *model_options(folders)]
    data = [
        tmp_path / "rows.parquet",
        *([folders / "anchor.jsonl", "--threshold", 0.1] if command == "missing" else []),
    ]
    output = [] if command == "missing" else ["-o", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["hf-fac"])
    told = "The data set: Of 1,004 rows 1,001 cut at max_length and 2 skipped"
    cli.app([command, *map(str, [*data, *output, *options])], standalone_mode=False)
    said = capsys.readouterr().out
    assert told in said
    assert "it has no text" in said
    if command == "missing":
        assert "(row 1,001: it has no text" in said
        cli.app([command, *map(str, [*data, *output, *options])], standalone_mode=False)
        assert "The data set: 1,004 rows were scored by an earlier run" in capsys.readouterr().out


def test_a_row_that_cannot_be_read_is_named_by_its_number_in_the_data_set(folders, monkeypatch, capsys, tmp_path):
    rows = [{"text": "a"}] * 2500 + [{"text": None}]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    said = main(
        monkeypatch, capsys, "missing", tmp_path / "rows.parquet", folders / "anchor.jsonl", *model_options(folders)
    )
    assert "Row 2500 cannot be read" in said
