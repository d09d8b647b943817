"""The commands about coverage, on a tiny model in local folders: what they print, write, refuse and resume."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from command_line import main, model_options, run
from datasets import Dataset
from processes import forked
from scipy.sparse import csr_array
from tiny import CORPUS

from hf_fac import FACReport, FeatureCoverage, SAEFeaturizer, row_contributions, score_shards
from hf_fac.cli.coverage import row_line
from hf_fac.cli.output import console


def test_missing_scores_two_files_and_writes_what_it_prints_into_a_new_folder(folders, tmp_path):
    report = tmp_path / "new" / "report.json"
    said = run("missing", folders / "data.jsonl", folders / "anchor.jsonl", *model_options(folders), "-o", report)
    written = json.loads(report.read_text())
    assert f"FAC {written['fac']:.3f}" in said
    assert f"{len(written['missing'])} missing" in said
    assert written["missing"]
    assert written["threshold_source"].split(",")[0] in said
    assert written["measurement"]["d_sae"] == 64


def test_score_then_missing_equals_missing_at_once(folders, tmp_path):
    options = model_options(folders)
    for name in ("data", "anchor"):
        run("score", folders / f"{name}.jsonl", "-o", tmp_path / name, "--shard-rows", 7, *options)
    first, second, threshold = tmp_path / "one.json", tmp_path / "two.json", ["--threshold", 0.1]
    run("missing", tmp_path / "data", tmp_path / "anchor", *threshold, "-o", first)
    run("missing", folders / "data.jsonl", folders / "anchor.jsonl", *threshold, "-o", second, *options)
    one, two = (json.loads(report.read_text()) for report in (first, second))
    np.testing.assert_allclose(one.pop("table")["data_max"], two.pop("table")["data_max"], rtol=1e-4)
    assert one == two


def test_missing_takes_merged_coverages_without_a_model(folders, tmp_path):
    options, places = model_options(folders), [folders / "data.jsonl", folders / "anchor.jsonl"]
    for name, place in zip(("data", "anchor"), places, strict=True):
        run("score", place, "-o", tmp_path / name, "--shard-rows", 7, *options)
    run("merge", tmp_path / "both.safetensors", tmp_path / "data", tmp_path / "anchor")
    reports = {}
    for name, data in (("coverage", [tmp_path / "data" / "coverage.safetensors", tmp_path / "both.safetensors"]),
                       ("rows", [tmp_path / "data", tmp_path / "both.safetensors"])):  # fmt: skip
        said = run("missing", *data, "--threshold", 0.1, "-o", tmp_path / f"{name}.json")
        reports[name] = json.loads((tmp_path / f"{name}.json").read_text())
        assert f"{len(reports[name]['missing'])} missing" in said
        assert "Strongest missing features" in said
        assert ("Rows that add most" in said) == (name == "rows")
    assert reports["rows"] == reports["coverage"]
    assert reports["rows"]["anchor_rows"] == 52
    other = [*options, "--activation", "relu"]
    said = run("missing", places[0], tmp_path / "both.safetensors", *other, fails=True)
    assert "both.safetensors was not measured as these options say" in said


def test_missing_prints_intervals_saturation_and_the_rows_that_add_most(folders, tmp_path):
    run("score", folders / "data.jsonl", "-o", tmp_path / "data", *model_options(folders))
    said = run("missing", folders / "data.jsonl", folders / "anchor.jsonl", *model_options(folders), "--threshold", 0.1,
               "-o", tmp_path / "report.json")  # fmt: skip
    report = FACReport.load(tmp_path / "report.json")
    assert f"interval {report.interval[0]:.3f} to {report.interval[1]:.3f}" in said
    assert f"kind and size: {report.single_interval[0]:.3f} to {report.single_interval[1]:.3f}" in said
    assert f"{report.saturation:.0%} of the way to saturation" in said
    data = Dataset.from_parquet([str(file) for file in (tmp_path / "data").glob("shard-*.parquet")])
    rows = row_contributions(data, report).sort_values(["unique", "share"], ascending=False, kind="stable")
    printed = said.partition("Rows that add most")[2]
    places = [printed.index(f"│ {data[number]['text']} │") for number in rows.index[:5].tolist()]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"text": "a\nb", "topic": "x", "fac_tokens": 3}, "a⏎b"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]}, "a"),
        ({"chosen": [{"role": "assistant", "content": "b"}], "prompt": "a", "rejected": None}, "a b"),
    ],
)
def test_a_row_is_shown_by_its_content(row, text):
    assert row_line(row) == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing", "nowhere.jsonl", "nowhere.jsonl"], "does not exist"),
        (["missing", "{data}", "{data}", "--model", "{tmp}"], "--model and --sae go together"),
        (["missing", "{data}", "{data}", "--threshold", "-1", "{options}"], "threshold"),
        (["missing", "{data}", "{data}", "--pool-over", "user", "{options}"], "plain text has no roles"),
        (["missing", "{data}", "{data}", "--model", "{tmp}/none", "--sae", "{tmp}/none"], "none"),
        (["missing", "{data}", "{data}", "--device", "gpu"], "gpu cannot be used here"),
        (["missing", "{data}", "{data}", "-o", "{tmp}"], "is a directory"),
        (
            ["missing", "nowhere.csv", "{data}", "--pool-over", "tool"],
            "'tool' is not one of 'all', 'user'",
        ),
        (["score", "nowhere.csv", "-o", "{tmp}/x", "--preset", "mine"], "'mine' is not one of 'paper'"),
        (["missing", "{data}", "{data}", "--layer", "1"], "--layer needs --model and --sae"),
        (["score", "{data}", "-o", "{tmp}", "--sae-id", "x"], "--sae-id needs --model and --sae"),
        (["score", "{data}", "-o", "{data}"], "is a file"),
        (["score", "{data}", "-o", "{tmp}/x", "--shard-rows", "0"], "greater than or equal to 1"),
        (["select", "{data}", "{tmp}/none.json", "-o", "{tmp}/x"], "does not exist"),
        (["push", "{tmp}/none", "user/x"], "does not exist"),
    ],
)
def test_wrong_input_is_one_clear_line(folders, monkeypatch, capsys, tmp_path, arguments, message):
    places = {"data": folders / "data.jsonl", "tmp": tmp_path}
    options = model_options(folders) if "{options}" in arguments else []
    words = [word.format(**places) for word in arguments if word != "{options}"]
    said = main(monkeypatch, capsys, *words, *options)
    assert message in said
    assert "Traceback" not in said


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
    console.print(line)
    assert line in capsys.readouterr().out.splitlines()


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
    said = main(monkeypatch, capsys, *arguments, "--output", "file/out")
    assert "file/out cannot be written (a file is in the way): choose another output." in said


def test_rows_measured_differently_are_refused_before_any_is_scored(folders, monkeypatch, capsys, tmp_path):
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
        assert "scored was not measured as these options say" in said
        assert "activation: 'relu' and 'native'" in said


@pytest.mark.parametrize("command", ["missing", "score", "interpret"])
def test_rows_that_were_cut_or_skipped_are_counted_with_the_first_reason(command, folders, tmp_path):
    rows = [{"text": "The river rises in the hills."}] * 1001 + [{"text": " "}, {"text": None}, {"text": "a b"}]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    options = ["--max-length", 3, "--on-error", "skip", *model_options(folders)]
    data = [
        tmp_path / "rows.parquet",
        *([folders / "anchor.jsonl", "--threshold", 0.1] if command == "missing" else []),
    ]
    output = [] if command == "missing" else ["-o", tmp_path / "out"]
    told = "The data set: Of 1,004 rows 1,001 cut at max_length and 2 skipped"
    said = run(command, *data, *output, *options)
    assert told in said
    assert "it has no text" in said
    if command == "missing":
        assert "(row 1,001: it has no text" in said
        again = run(command, *data, *output, *options)
        assert "The data set: 1,004 rows were scored by an earlier run" in again


def test_a_row_that_cannot_be_read_is_named_by_its_number_in_the_data_set(folders, monkeypatch, capsys, tmp_path):
    rows = [{"text": "a"}] * 2500 + [{"text": None}]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    said = main(
        monkeypatch, capsys, "missing", tmp_path / "rows.parquet", folders / "anchor.jsonl", *model_options(folders)
    )
    assert "Row 2500 cannot be read" in said


def test_select_takes_what_a_report_misses_from_a_pool(folders, tmp_path) -> None:
    report, chosen = tmp_path / "report.json", tmp_path / "chosen.jsonl"
    options = model_options(folders)
    run("missing", folders / "data.jsonl", folders / "anchor.jsonl", *options, "--threshold", 0.1, "-o", report)
    said = run("select", folders / "anchor.jsonl", report, "-o", chosen, "-n", 3, *options)
    missing = json.loads(report.read_text())["missing"]
    assert len(missing) > 3
    rows = [json.loads(line) for line in chosen.read_text().splitlines()]
    anchor = [json.loads(line) for line in (folders / "anchor.jsonl").read_text().splitlines()]
    assert len(rows) <= 3
    assert all(row in anchor for row in rows)
    assert f"{len(rows)} rows activate" in said
    assert f"of {len(missing)} missing features" in said
    (tmp_path / "more.jsonl").write_text((folders / "data.jsonl").read_text() + "\n" + chosen.read_text())
    again = tmp_path / "again.json"
    run("missing", tmp_path / "more.jsonl", folders / "anchor.jsonl", *options, "--threshold", 0.1, "-o", again)
    covered = len(missing) - len(json.loads(again.read_text())["missing"])
    assert f"{len(rows)} rows activate {covered} of" in said

    run("score", folders / "anchor.jsonl", "-o", tmp_path / "pool", "--activation", "relu", *options)
    other = run("select", tmp_path / "pool", report, "-o", chosen, fails=True)
    assert "was not measured as the rows of" in other


def test_select_can_aim_at_features_that_are_too_rare_as_well(folders, tmp_path) -> None:
    report, chosen = tmp_path / "report.json", tmp_path / "chosen.jsonl"
    options = model_options(folders)
    data, anchor = folders / "data.jsonl", folders / "anchor.jsonl"
    said = run("missing", data, anchor, *options, "--threshold", 0.1, "-o", report)
    assert "how often, beside the anchor: cosine 0." in said
    assert "tokens a row" in said
    said = run("select", anchor, report, "-o", chosen, "-n", 4, "--aim", "deficits", *options)
    assert len(chosen.read_text().splitlines()) == 4
    features, _ = FACReport.load(report).demand(4)
    assert f"of {len(features)} deficits" in said


def test_select_measures_a_pool_as_the_report_was_measured_or_not_at_all(folders, tmp_path) -> None:
    options, report = model_options(folders), tmp_path / "report.json"
    data, chosen = [folders / "data.jsonl", folders / "anchor.jsonl"], tmp_path / "new" / "chosen.jsonl"
    how = ["--max-length", 3, "--preset", "paper"]
    (tmp_path / "unreadable.jsonl").write_text((folders / "anchor.jsonl").read_text() + '\n{"text": null}')
    for setting in (how[:2], how[2:]):
        run("missing", *data, *options, *setting, "--threshold", 0.1, "-o", report)
        said = run("select", tmp_path / "unreadable.jsonl", report, "-o", chosen, *options, fails=True)
        assert "would not be measured as the rows of" in said
        assert "max_length, preset, the tokenizer" in said or "activation: 'native' and 'relu'" in said
    run("missing", *data, *options, *how[:2], "--threshold", 0.1, "-o", report)
    pool = tmp_path / "unreadable.jsonl"
    said = run("select", pool, report, "-o", chosen, *options, *how[:2], "--on-error", "skip")
    assert "missing features. Written to" in said
    assert chosen.read_text()

    for name, rows in zip(("one", "two"), data, strict=True):
        run("score", rows, "-o", tmp_path / name, "--keep-above", 0.05, *options)
    run("missing", tmp_path / "one", tmp_path / "two", "--threshold", 0.1, "-o", report)
    assert "missing features. Written to" in run("select", data[1], report, "-o", chosen, *options)


def test_missing_select_and_synthesize_score_the_same_files_once(folders, tmp_path) -> None:
    options, report = model_options(folders), tmp_path / "report.json"
    for name in ("data", "anchor"):  # files that no other test has scored
        (tmp_path / f"{name}.jsonl").write_text((folders / f"{name}.jsonl").read_text() + '\n{"text": "new"}')
    data, anchor = tmp_path / "data.jsonl", tmp_path / "anchor.jsonl"
    said = run("missing", data, anchor, *options, "--threshold", 0.1, "-o", report)
    assert "scored by an earlier run" not in said
    program = "import sys; from hf_fac.cli import main\ntry: main()\nfinally: print('torch' in sys.modules)"
    command = ["select", anchor, report, "-o", tmp_path / "chosen.jsonl", *options]
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, command)], capture_output=True, text=True, check=True
    )
    assert "The pool: 41 rows were scored by an earlier run" in done.stdout
    assert done.stdout.split()[-1] == "False", "nothing was computed"
    said = run("synthesize", data, anchor, "-o", tmp_path / "out", *options, "--threshold", 0.1, "--plan")
    assert "The data set: 13 rows were scored by an earlier run" in said
    assert "The anchor set: 41 rows were scored by an earlier run" in said


def test_each_rank_of_score_writes_its_own_coverage(folders, tmp_path, monkeypatch) -> None:
    data, options = folders / "anchor.jsonl", ["--shard-rows", 9, *model_options(folders)]
    run("score", data, "-o", tmp_path / "one", *options)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        run("score", data, "-o", tmp_path / "two", *options)
    parts = sorted((tmp_path / "two").glob("coverage*.safetensors"))
    assert [part.name for part in parts] == [f"coverage-0000{i}-of-00002.safetensors" for i in (0, 1)]
    merged, whole = FeatureCoverage.load(parts[0]) | FeatureCoverage.load(parts[1]), tmp_path / "one"
    whole = FeatureCoverage.load(whole / "coverage.safetensors")
    assert merged.rows == whole.rows == 40
    np.testing.assert_allclose(merged.maximum, whole.maximum, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"measurement": None}, "measurement: "),
        ({"measurement": {}}, "measurement.d_sae: Field required"),
        ({"missing": ["a"]}, "missing.0: Input should be a valid integer, got 'a'"),
        ({"threshold": None}, "threshold"),
        ({"rows": -1}, "rows: Input should be greater than or equal to 0"),
        (None, "Invalid JSON: recursion limit"),
    ],
)
def test_a_report_with_wrong_content_names_file_and_field(change, problem, folders, tmp_path) -> None:
    measurement = {
        "model": "m", "layer": 1, "d_sae": 64, "activation": "native", "pool_over": "all", "side": "chosen",
        "keep_above": 0.0, "fingerprint": "f",
    }  # fmt: skip
    coverage = FeatureCoverage.from_activations(csr_array(np.eye(64, dtype=np.float32)), measurement=measurement)
    good, report = coverage.compare(coverage, threshold=0.1).to_dict(), tmp_path / "report.json"
    report.write_text("[" * 10**5 if change is None else json.dumps(good | change))
    for command in (["select", folders / "data.jsonl", report, "-o", tmp_path / "x"], ["push", report, "user/x"]):
        said = run(*command, fails=True)
        assert "report.json is no report of hf_fac: " in said
        assert problem in said


def test_a_killed_run_resumes_and_scores_nothing_twice(folders, tmp_path):
    words = " ".join(CORPUS).split()
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"text": " ".join(words[i % 40 : i % 40 + 20])}) for i in range(3000)))
    command = ["score", data, "-o", tmp_path / "out", "--shard-rows", 100, *model_options(folders)]
    process = forked(run, *command)
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "out").glob("*.parquet"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.join()
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "out").glob("*.parquet")}
    assert 3 <= len(before) < 30
    run(*command)
    assert all(f.stat().st_mtime_ns == when for f, when in before.items())
    scored = Dataset.from_parquet([str(f) for f in sorted((tmp_path / "out").glob("*.parquet"))])
    assert scored["text"] == [json.loads(line)["text"] for line in data.read_text().splitlines()]
