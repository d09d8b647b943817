"""Every command with wrong arguments: what was found, what was expected, what to do; exit code 2, no traceback."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import main, model_options, results
from datasets import Dataset

from hf_fac.cli.commands import app, typer

WRONG = [
    ("init {tmp}/none.csv", "none.csv does not exist"),
    ("init {tmp}/two.csv -o {tmp}/c.yaml", "has the columns a, b: say which one holds what users wrote"),
    ("init {data} -o {data}", "exists already: edit it, or name another --output"),
    ("run {tmp}/none.yaml", "none.yaml does not exist: `hf-fac init DATA` writes it"),
    ("run {tmp}/list.yaml", "list.yaml holds no keys with values"),
    ("run {tmp}/broken.yaml", "broken.yaml is no YAML"),
    ("run {tmp}/key.yaml", "there is no key 'modell'; did you mean model?"),
    ("run {tmp}/section.yaml", "synthesize: there is no key 'max_sample'; did you mean max_samples?"),
    ("run {tmp}/value.yaml", "missing: Invalid value for '--threshold': Input should be a valid number"),
    ("demo --top -1", "greater than or equal to 0"),
    ("score {tmp}/none.jsonl -o {tmp}/x", "none.jsonl does not exist"),
    ("score {tmp}/rows.txt -o {tmp}/x", "expected a file ending in .jsonl, .json, .csv, .parquet"),
    ("score {tmp}/empty.csv -o {tmp}/x", "cannot be read as a data set"),
    ("score {tmp}/two.csv -o {tmp}/x {model}", "Row 0 cannot be read: its columns are ['a', 'b']"),
    ("score {tmp}/two.csv -o {tmp}/x --prompt-column c", "has no column 'c' but a, b"),
    ("score {data} -o {tmp}/x --completion-column a", "--completion-column needs --prompt-column"),
    ("score {data} -o {tmp}/x --model {tmp}/none --sae {tmp}/none", "none does not exist"),
    ("score {data} -o {tmp}/x --model {model_folder} --sae no-such-sae", "'no-such-sae' is no local path, no SAELens"),
    ("score {data} -o {tmp}/x --model {model_folder}", "--model and --sae go together"),
    ("score {data} -o {tmp}/x --revision main", "--revision needs --model and --sae"),
    ("score {data} -o {tmp}/x --modle y", "No such option: --modle"),
    ("missing {data}", "Missing argument 'anchor'"),
    ("missing {data} {tmp}/none.safetensors", "none.safetensors does not exist"),
    ("missing {data} {tmp}/broken.safetensors {model}", "is not a whole safetensors file"),
    ("missing {data} {data} --features {tmp}/none.json", "none.json does not exist"),
    ("missing {data} {data} --features {tmp}/far.json {model}", "far.json holds feature 64, which does not exist"),
    ("missing {data} {data} --features {tmp}/words.json", "words.json holds no feature ids"),
    ("missing {data} {data} --task wisdom", "no task 'wisdom'"),
    ("compare {data} {data} --anchor {data}", "is given twice"),
    ("report {data} -o {tmp}/x.html", "is no report of hf-fac missing: give its --anchor"),
    ("report {tmp}/saved.json -o {tmp}/x.html --threshold 1", "saved.json has its delta: give --threshold"),
    ("report {tmp}/none.json -o {tmp}/x.html --anchor {data}", "none.json does not exist"),
    ("report {data} -o {tmp}/x.html --anchor {data} --synthesis {tmp}", "has no samples.parquet"),
    ("diversity {data} --label-column kind", "has no column 'kind'"),
    ("relevant {data} -o {tmp}/x --label-column kind", "has no column 'kind' but text"),
    ("select {data} {tmp}/none.json -o {tmp}/x", "does not exist"),
    ("select {data} {tmp}/far.json -o {tmp}/x", "is no report of hf_fac"),
    ("interpret -o {tmp}/none", "holds no dictionary yet: give the data"),
    ("interpret {data} -o {tmp}/x --held-out -1", "greater than or equal to 0"),
    ("rate {tmp}/none toxicity --chat m", "none is no folder"),
    ("rate {dictionary} {tmp}/broken.yaml --chat m", "broken.yaml"),
    ("synthesize {data} {data} -o {tmp}/x --task {tmp}/none.yaml", "none.yaml"),
    ("synthesize {data} {data} -o {tmp}/x --method magic", "--method is 'magic'; it must be one of"),
    ("merge {tmp}/x.safetensors {tmp}/none", "none does not exist"),
    ("train-sae {tmp}/none.jsonl -o {tmp}/x --layer 1", "none.jsonl does not exist"),
    ("train-sae {data} -o {tmp}/x", "Missing option '--layer'"),
    ("push {tmp}/none user/x", "does not exist"),
    ("pull user/x -o {data}", "is a file"),
]  # fmt: skip


@pytest.fixture
def places(folders, dictionary_folder, tmp_path) -> dict[str, Path]:
    Dataset.from_list([{"a": "x", "b": "y"}]).to_csv(tmp_path / "two.csv")
    files = {
        "rows.txt": "text", "empty.csv": "text\n", "far.json": "[64]", "words.json": '["a"]', "broken.yaml": "a: [",
        "broken.safetensors": "x", "saved.json": '{"hf_fac": "0.1.0"}', "list.yaml": "- a",
        "key.yaml": "data: d\nanchor: a\nmodell: m",
        "section.yaml": "data: d\nanchor: a\nsynthesize: {max_sample: 1}",
        "value.yaml": "data: d\nanchor: a\nmissing: {threshold: high}",
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    model = " ".join(map(str, model_options(folders)))
    return {
        "tmp": tmp_path, "data": folders / "data.jsonl", "dictionary": dictionary_folder, "model": model,
        "model_folder": folders / "model",
    }  # fmt: skip


@pytest.mark.parametrize(("line", "message"), WRONG)
def test_wrong_arguments_are_one_clear_message_and_exit_code_2(line, message, places, monkeypatch, capsys) -> None:
    said = main(monkeypatch, capsys, *line.format(**places).split(), code=2)
    assert message.format(**places) in said
    assert "Traceback" not in said


def test_every_command_was_tried_with_wrong_arguments() -> None:
    assert {line.split()[0] for line, _ in WRONG} == set(typer.main.get_command(app).commands)


def test_names_of_trl_and_underscores_are_understood(folders, tmp_path) -> None:
    model = ["--model_name_or_path", folders / "model", "--sae", folders / "sae", "--torch_dtype", "float32"]
    rows = ["--dataset_name", folders / "data.jsonl", "--dataset_train_split=train"]
    assert results("score", "--output", tmp_path / "x", *model, *rows, "--shard_rows", 7)["rows"] == 12
