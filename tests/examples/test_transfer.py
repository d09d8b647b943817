"""The transfer recipe: which model finds, writes and learns, and what the results say of it."""

from __future__ import annotations

import json
import random
import sys

import pytest
import toxicity
import transfer
from datasets import Dataset
from tiny import byte_level_tokenizer
from tiny_models import tiny_model, tiny_sae
from writing_chat import sentence

from hf_fac import LocalChat, save_sae


@pytest.fixture
def folders(tmp_path):
    """Three tiny models, an SAE of the first, and labelled rows."""
    for number, name in enumerate(("finds", "writes", "learns")):
        tiny_model(seed=number, max_position_embeddings=1024).save_pretrained(tmp_path / name)
        byte_level_tokenizer().save_pretrained(tmp_path / name)
    save_sae(tiny_sae(), tmp_path / "sae")
    rng = random.Random(0)
    for name, n in (("seed", 4), ("anchor", 40), ("evaluation", 8)):
        rows = [{"text": sentence(rng, n=6), "label": i % 2} for i in range(n)]
        Dataset.from_list(rows).to_json(tmp_path / f"{name}.jsonl")
    return tmp_path


def run(folders, monkeypatch, *more):
    command = [
        "transfer.py", f"--find-model={folders / 'finds'}", f"--find-sae={folders / 'sae'}",
        f"--train-model={folders / 'learns'}", f"--seed-data={folders / 'seed.jsonl'}",
        f"--anchor={folders / 'anchor.jsonl'}", f"--evaluation={folders / 'evaluation.jsonl'}", "--samples=2",
        "--seeds=1", "--epochs=1", f"--output={folders / 'out'}", *more,
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    transfer.main()
    return json.loads((folders / "out" / "results.json").read_text())


def test_one_model_finds_another_writes_and_a_third_learns(folders, monkeypatch, capsys):
    asked = []
    complete = LocalChat.complete
    monkeypatch.setattr(
        LocalChat,
        "complete",
        lambda chat, *args, **kw: (asked.append(chat.model), complete(chat, *args, **kw))[1],
    )
    results = run(
        folders, monkeypatch, "--methods=pool,one_step", f"--write-model={folders / 'writes'}",
        f"--train-sae={folders / 'sae'}",
    )  # fmt: skip
    assert {model.config._name_or_path for model in asked} == {str(folders / "writes")}
    assert [results["settings"][role] for role in ("finds", "writes", "learns")] == [
        str(folders / role) for role in ("finds", "writes", "learns")
    ]
    assert list(results["arms"]) == ["seed", "pool", "one_step"]
    assert results["arms"]["pool"]["fac_after"] > results["arms"]["pool"]["fac_before"]
    before, after = results["arms"]["pool"]["fac_of_trained_model"]
    assert after >= before
    assert results["arms"]["one_step"]["requests"] > 0
    assert all(0 < arm["runs"]["1"]["figures"]["average precision"] <= 1 for arm in results["arms"].values())
    said = capsys.readouterr().out
    assert "the same model" not in said
    assert (folders / "out" / "results.md").read_text() in said


def test_models_that_are_the_same_are_named(folders, monkeypatch, capsys):
    run(folders, monkeypatch, "--methods=random")
    said = capsys.readouterr().out
    assert f"finds: {folders / 'finds'} (the same model writes)" in said
    assert f"learns: {folders / 'learns'}\n" in said


def test_a_second_run_trains_nothing_again(folders, monkeypatch):
    results = run(folders, monkeypatch, "--methods=random")
    monkeypatch.delattr(toxicity, "Trainer")
    assert run(folders, monkeypatch, "--methods=random") == results


def test_methods_that_ask_no_second_model_are_refused(folders, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(folders, monkeypatch, "--methods=magpie")
    assert "magpie is no method of this recipe" in capsys.readouterr().err
