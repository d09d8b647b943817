"""The commands about dictionaries, selection and the Hub, on a tiny model in local folders, with real servers."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import typer
from command_line import model_options, run
from datasets import load_dataset
from flaky_server import FlakyServer, SlowServer
from hub_server import WRITE_TOKEN, HubServer, run_with_hub
from scipy.sparse import csr_array
from typer.testing import CliRunner

from hf_fac.cli.commands import _RESUMES, app
from hf_fac.coverage.coverage import FeatureCoverage
from hf_fac.dictionary.dictionary import FeatureDictionary

KEY = "sk-a-key-that-nobody-may-see"


class Teacher(FlakyServer):
    """Explains each feature by the number of its question, finds every explanation right, and says yes to all else."""

    def proper(self, asked: dict[str, Any]) -> dict[str, Any]:
        reply, content = super().proper(asked), asked["messages"][-1]["content"]
        text = "Yes."
        if '{"explanation"' in content:
            text = json.dumps({"explanation": f"words like number {len(self.came)}"})
        elif '{"rating"' in content:
            text = json.dumps({"rating": "probably", "reason": "Most of them fit."})
        reply["choices"][0]["message"]["content"] = text
        reply["choices"][0]["finish_reason"] = "stop"
        return reply


@pytest.fixture
def server() -> Iterator[Teacher]:
    with Teacher(key=KEY) as running:
        yield running


def test_interpret_collects_explains_and_goes_on(server, dictionary_folder, monkeypatch, recwarn) -> None:
    assert [file.name for file in dictionary_folder.iterdir()] == ["dictionary.parquet"]
    built = FeatureDictionary.load(dictionary_folder)
    assert built.summary()["live"] == len(built) > 20
    assert {span["source"] for row in built for span in row["spans"]} == {"anchor"}

    monkeypatch.setenv("TEACHER_KEY", KEY)
    chat = ["--chat", "teacher", "--base-url", server.url, "--key-env", "TEACHER_KEY"]
    said = run("interpret", "-o", dictionary_folder, *chat, "--sample", 8, "--shuffled")
    assert "Going on with the dictionary" in said
    assert "8 explained" in said
    assert "Detection by another feature's explanation: 0.500" in said, "who always says yes knows nothing"
    explained = FeatureDictionary.load(dictionary_folder)
    assert explained.summary()["explained"] == explained.summary()["verified"] == 8
    asked = sum(server.came.values())
    run("interpret", "-o", dictionary_folder, *chat, "--sample", 8, "--shuffled")
    assert sum(server.came.values()) == asked, "nothing is asked twice"
    assert FeatureDictionary.load(dictionary_folder) == explained

    said = run("rate", dictionary_folder, "toxicity", *chat)
    assert said.startswith("toxicity: 8 probably.")
    rated = FeatureDictionary.load(dictionary_folder)
    assert len(rated.task_features("toxicity")) == 8
    written = [file for file in dictionary_folder.rglob("*") if file.is_file()]
    assert {file.name for file in written} >= {"cache-0.sqlite"}
    assert not any(KEY.encode() in file.read_bytes() for file in written)
    assert set(server.keys) == {f"Bearer {KEY}"}


def test_a_dictionary_of_other_rows_is_not_gone_on_with(dictionary_folder, folders, tmp_path) -> None:
    lines = (folders / "anchor.jsonl").read_text().splitlines()
    (tmp_path / "same.jsonl").write_text("\n".join(lines))
    (tmp_path / "other.jsonl").write_text("\n".join([*lines[:7], json.dumps({"text": "Another."}), *lines[8:]]))
    assert "Going on with" in run("interpret", tmp_path / "same.jsonl", "-o", dictionary_folder)
    said = run("interpret", tmp_path / "other.jsonl", "-o", dictionary_folder, fails=True)
    assert "holds a dictionary of other rows than those of" in said


def test_interpret_deletes_only_what_it_wrote(folders, tmp_path) -> None:
    (tmp_path / "progress").mkdir()
    (tmp_path / "progress" / "notes").write_text("mine")
    run("interpret", folders / "data.jsonl", "-o", tmp_path, *model_options(folders))
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["dictionary.parquet", "notes", "progress"]


def test_a_local_model_explains_too(dictionary_folder, folders, tmp_path) -> None:
    FeatureDictionary.load(dictionary_folder).save(tmp_path)
    chat = ["--chat", folders / "model", "--form", "text", "--device", "cpu"]
    # An untrained model says little that can be read.
    with pytest.warns(UserWarning, match="failed"):
        run("interpret", "-o", tmp_path, *chat, "--sample", 2)
    states = {row["explanation_state"] for row in FeatureDictionary.load(tmp_path)}
    assert states & {"explained", "failed", "cannot tell"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["interpret", "-o", "{tmp}/none"], "holds no dictionary yet: give the data"),
        (["interpret", "-o", "{d}", "--chat", "m", "--base-url", "http://x/v1", "--key-env", "NO_KEY"], "holds no key"),
        (["interpret", "-o", "{d}", "--chat", "m", "--form", "xml"], "--form is 'xml'"),
        (["interpret", "-o", "{d}", "--chat", "m", "--base-url", "http://x/v1", "--sample", "99999"], "--sample is"),
        (["rate", "{d}", "toxicity"], "Give --chat"),
        (["rate", "{d}", "wisdom", "--chat", "m"], "no task 'wisdom'"),
        (["rate", "{tmp}", "toxicity", "--chat", "m"], "holds no feature dictionary"),
        (["select", "{f}/data.jsonl", "{f}/model/config.json", "-o", "{tmp}/x.jsonl"], "is no report"),
        (["select", "{f}/data.jsonl", "{f}/data.jsonl", "-o", "{tmp}/x.jsonl"], "is no report"),
        (["push", "{f}/data.jsonl", "user/x"], "no report of hf_fac"),
        (["pull", "user/x", "-o", "{tmp}", "--kind", "model"], "must be dictionary or sae"),
        (["push", "{tmp}", "user/x"], "holds no single SAE"),
        (["push", "{f}/model/config.json", "user/x"], "no report of hf_fac"),
    ],
)
def test_bad_input_is_named(arguments, message, dictionary_folder, folders, tmp_path) -> None:
    places = {"d": dictionary_folder, "f": folders, "tmp": tmp_path}
    assert message in run(*(argument.format(**places) for argument in arguments), fails=True)


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
    assert "was measured otherwise than" in other


def test_select_measures_a_pool_as_the_report_was_measured_or_not_at_all(folders, tmp_path) -> None:
    options, report = model_options(folders), tmp_path / "report.json"
    data, chosen = [folders / "data.jsonl", folders / "anchor.jsonl"], tmp_path / "new" / "chosen.jsonl"
    how = ["--max-length", 3, "--preset", "paper"]
    (tmp_path / "unreadable.jsonl").write_text((folders / "anchor.jsonl").read_text() + '\n{"text": null}')
    for setting in (how[:2], how[2:]):
        run("missing", *data, *options, *setting, "--threshold", 0.1, "-o", report)
        said = run("select", tmp_path / "unreadable.jsonl", report, "-o", chosen, *options, fails=True)
        assert "would be measured otherwise than the rows of" in said
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


def test_push_prints_the_url_in_one_line_as_it_is(dictionary_folder, monkeypatch) -> None:
    url = f"https://huggingface.co/datasets/some-organisation/[user]-features/commit/{'0123456789' * 8}"
    monkeypatch.setattr(FeatureDictionary, "push_to_hub", lambda self, repo_id, **settings: url)
    result = CliRunner().invoke(app, ["push", str(dictionary_folder), "some-organisation/features"])
    assert result.output == f"{url}\n"


def test_a_folder_with_other_parquet_files_is_refused_before_spans_are_collected(folders, tmp_path) -> None:
    (tmp_path / "unreadable.jsonl").write_text('{"text": null}\n')
    (tmp_path / "rows.parquet").touch()
    said = run("interpret", tmp_path / "unreadable.jsonl", "-o", tmp_path, *model_options(folders), fails=True)
    assert "holds rows.parquet, no part of a dictionary: choose another folder" in said


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


def test_push_and_pull_go_to_the_hub_and_back(dictionary_folder, folders, tmp_path) -> None:
    report = tmp_path / "report.json"
    run(
        "missing", folders / "data.jsonl", folders / "anchor.jsonl", *model_options(folders), "--threshold", 0.1,
        "-o", report,
    )  # fmt: skip
    with HubServer() as hub:
        hub.put("user/rows", {"data.jsonl": b"{}"}, "datasets")
        code = """
from datasets import load_dataset
from hf_fac.cli import app

for command in args["commands"]:
    app(command, standalone_mode=False)
result = load_dataset("user/features", split="train")["feature"][:]
"""
        commands = [
            ["push", dictionary_folder, "user/features", "--message", "features"],
            ["push", folders / "sae", "user/sae", "--private"],
            ["push", report, "user/rows", "--anchor", "broad", "--sae", "user/sae"],
            ["pull", "user/features", "-o", tmp_path / "d"],
            ["pull", "user/sae", "--kind", "sae", "-o", tmp_path / "s"],
        ]
        features = run_with_hub(
            hub, code, token=WRITE_TOKEN, args={"commands": [[str(word) for word in line] for line in commands]}
        )
        assert hub.history("user/features", "datasets")[0] == "features"
        assert hub.repos["models", "user/sae"].private
        assert b"**" in hub.files("user/rows", "datasets")["README.md"]
    there = FeatureDictionary.load(dictionary_folder)
    assert features == there.features.tolist()
    pulled = (tmp_path / "d" / "dictionary.parquet").read_bytes()
    assert pulled == (dictionary_folder / "dictionary.parquet").read_bytes()
    for file in ("cfg.json", "sae_weights.safetensors"):
        assert (tmp_path / "s" / file).read_bytes() == (folders / "sae" / file).read_bytes()
    opened = load_dataset(str(tmp_path / "d"), split="train", cache_dir=str(tmp_path / "cache"))
    assert FeatureDictionary(opened) == there


def test_a_key_given_as_a_variables_name_is_not_shown(server, dictionary_folder, monkeypatch) -> None:
    monkeypatch.setenv("BLANK_KEY", " \n")
    for name in (KEY, f"{KEY}\n", "", "BLANK_KEY"):
        said = run("rate", dictionary_folder, "toxicity", "--base-url", server.url, "--key-env", name, fails=True)
        assert "holds no key. Give the variable's name, not the key" in said
        assert KEY not in said
    assert not server.came


def test_a_key_with_a_line_break_is_written_nowhere(dictionary_folder, tmp_path, monkeypatch) -> None:
    built = FeatureDictionary.load(dictionary_folder)
    built = built.select(built.features[:3])
    explained = {"explanation": "words", "explanation_state": "explained", "verification": "yes"}
    built.updated(dict.fromkeys(built.features.tolist(), explained)).save(tmp_path)
    with FlakyServer(rate=1, faults=("echo",), key=KEY) as server:
        options = ["--chat", "teacher", "--base-url", server.url, "--key-env", "TEACHER_KEY"]
        monkeypatch.setenv("TEACHER_KEY", f"{KEY}\n")
        with pytest.warns(UserWarning, match="toxicity"):
            run("rate", tmp_path, "toxicity", *options)
        monkeypatch.setenv("TEACHER_KEY", f"{KEY}\n{KEY}")
        said = run("rate", tmp_path, "toxicity", *options, fails=True)
    assert "copy it again" in said
    assert KEY not in said
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    [reason] = {rating["reason"] for row in FeatureDictionary.load(tmp_path) for rating in row["ratings"]}
    assert "the server says Bearer ***" in reason
    assert not any(KEY.encode() in file.read_bytes() for file in written)


def test_a_command_is_stopped_though_a_server_does_not_answer(dictionary_folder, tmp_path) -> None:
    built = FeatureDictionary.load(dictionary_folder)
    explained = {"explanation": "words", "explanation_state": "explained", "verification": "yes"}
    built.updated(dict.fromkeys(built.features.tolist(), explained)).save(tmp_path)
    with SlowServer() as server:
        command = ["rate", str(tmp_path), "toxicity", "--chat", "m", "--base-url", server.url, "--timeout", "77"]
        child = subprocess.Popen(
            [sys.executable, "-c", "from hf_fac.cli import main; main()", *command],
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        for _ in range(8):
            assert server.waiting.acquire(timeout=120)
        child.send_signal(signal.SIGINT)
        assert any("Interrupted: waiting for 8 requests under way, at most 77 s" in line for line in child.stderr)
        child.send_signal(signal.SIGINT)
        said = child.stderr.read()
        assert child.wait(timeout=30) == 130
        assert said.strip().endswith("Stopped: the same command goes on where it was.")
        assert "Traceback" not in said
        server.open.set()


def test_commands_that_are_said_to_go_on_say_so_in_their_help() -> None:
    commands = typer.main.get_command(app).commands
    assert {name for name, command in commands.items() if "it goes on" in command.help} == set(_RESUMES)
