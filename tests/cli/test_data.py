"""Data sets as the command line reads them: files, folders, and what its own commands wrote."""

from __future__ import annotations

import shutil

import pytest
import typer
from command_line import model_options, run
from datasets import Dataset, DatasetDict

from hf_fac.cli.data import load_data


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
    (tmp_path / "out" / "cache").mkdir()
    assert load_data(folder)["text"][:] == ["kept"]


def test_shards_are_one_data_set_whatever_the_split_and_refused_when_not_whole(folders, tmp_path):
    run("score", folders / "anchor.jsonl", "-o", tmp_path, "--shard-rows", 10, *model_options(folders))
    texts = load_data(str(folders / "anchor.jsonl"))["text"][:]
    assert load_data(str(tmp_path), "test")["text"][:] == texts
    first, *_, last = sorted(tmp_path.glob("shard-*.parquet"))
    last.unlink()
    with pytest.raises(typer.BadParameter, match=r"holds 3 of 4 shards: run the same hf-fac score again"):
        load_data(str(tmp_path))
    shutil.copy(first, last)
    with pytest.raises(typer.BadParameter, match=f"{last.name} is not what hf-fac score wrote there"):
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
