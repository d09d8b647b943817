"""The recipes' scaffold: which rows an arm has, what is trained, what a second run does again."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from datasets import Dataset
from recipe import Recipe, as_task_rows, options, read_rows, run, table
from tiny import byte_level_tokenizer
from tiny_models import tiny_model, tiny_sae
from writing_chat import sentence

from hf_fac import get_task, save_sae
from hf_fac.storage.parquet import read_parquet

TASK = replace(get_task("toxicity"), label="toxic", parts={"text": "a rude message"})
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folders of a tiny model and its SAE."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder / "model")
    byte_level_tokenizer().save_pretrained(folder / "model")
    return [f"--model={folder / 'model'}", f"--sae={save_sae(tiny_sae(), folder / 'sae')}"]


def labelled(n, *, seed):
    rng = random.Random(seed)
    return Dataset.from_list([{"text": sentence(rng, n=6), "label": i % 2, "other": i} for i in range(n)])


class Training:
    """The metric is the number of rows and the seed; `dies_at` is the run that fails."""

    def __init__(self, dies_at=None):
        self.runs, self.arms, self.dies_at = [], [], dies_at

    def __call__(self, rows, seed, arm):
        if len(self.runs) == self.dies_at:
            raise KeyboardInterrupt
        self.runs.append((rows, seed))
        self.arms.append(arm)
        return {"size": float(len(rows) + seed), "second": 0.0}


def recipe_of(training, **settings):
    sets = {"seed": labelled(4, seed=0), "anchor": labelled(40, seed=1), "evaluation": labelled(5, seed=2)}
    return Recipe(task=TASK, train_and_evaluate=training, keep=lambda row: row["label"] == 1, **sets | settings)


def arguments_of(model, folder, methods, *more):
    parser = options("", samples=2, methods="random", output="unused")
    return parser.parse_args([*model, f"--methods={methods}", "--seeds=1,3", f"--output={folder}", *more])


def test_every_method_gives_its_rows_and_a_line_of_the_table(model, tmp_path, capsys):
    training, methods = Training(), ["full", "random", "pool", "one_step", "self_instruct", "magpie"]
    results = run(recipe_of(training), arguments_of(model, tmp_path, ",".join(methods)))
    arms = results["arms"]
    assert list(arms) == ["seed", *methods]
    assert [arms[name]["rows"] for name in ("seed", "full", "random", "pool")] == [0, 40, 2, 2]
    assert arms["seed"]["fac_after"] == arms["seed"]["fac_before"] < arms["full"]["fac_after"] == 1
    assert arms["pool"]["fac_after"] > arms["random"]["fac_after"]
    assert arms["self_instruct"]["requests"] <= arms["one_step"]["requests"]
    assert arms["magpie"]["requests"] <= arms["one_step"]["requests"]
    for name in methods:
        added = read_parquet(tmp_path / f"{name}.parquet")
        assert len(added) == arms[name]["rows"]
        assert name == "full" or set(added["label"]) <= {1}
        rows = next(rows for rows, _ in training.runs if len(rows) == 4 + len(added))
        assert rows.column_names == ["text", "label"]
    assert json.loads((tmp_path / "results.json").read_text()) == results
    printed = capsys.readouterr().out
    assert (tmp_path / "results.md").read_text() in printed
    line = next(line for line in printed.splitlines() if line.startswith("| full"))
    before = arms["full"]["fac_before"]
    assert line.startswith(f"| full | 40 | {before:.3f} | 1.000 | 46.0000 | 1.4142 | +100.0000 | 0 | 0 |")


def test_a_stopped_recipe_goes_on_where_it_was(model, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(recipe_of(Training(dies_at=3)), arguments_of(model, tmp_path, "random,pool"))
    written = (tmp_path / "random.parquet").stat().st_mtime_ns
    second = Training()
    results = run(recipe_of(second), arguments_of(model, tmp_path, "random,pool"))
    assert [(len(rows), seed) for rows, seed in second.runs] == [(6, 3), (6, 1), (6, 3)]
    assert (tmp_path / "random.parquet").stat().st_mtime_ns == written
    third = Training()
    assert run(recipe_of(third), arguments_of(model, tmp_path, "random,pool")) == results
    assert not third.runs
    assert second.arms == ["random", "pool", "pool"]
    run(recipe_of(third), arguments_of(model, tmp_path, "pool,full", "--seeds=3,8"))
    assert [(len(rows), seed) for rows, seed in third.runs] == [(4, 8), (6, 8), (44, 3), (44, 8)]


@pytest.mark.parametrize(
    ("more", "settings", "told"),
    [
        (["--samples=5"], {}, "samples: 2 and 5"),
        ([], {"seed": labelled(5, seed=0)}, "seed rows: '4, .*' and '5, "),
        ([], {"settings": {"epochs": 2}}, "epochs: 'absent' and 2"),
    ],
)
def test_results_of_other_settings_are_not_mixed(model, tmp_path, more, settings, told):
    run(recipe_of(Training()), arguments_of(model, tmp_path, "random"))
    with pytest.raises(SystemExit, match=f"(?s)holds results of other settings .*{told}.*choose another --output"):
        run(recipe_of(Training(), **settings), arguments_of(model, tmp_path, "random", *more))


def test_what_is_asked_for_wrongly_is_told(model, tmp_path, capsys):
    with pytest.raises(SystemExit):
        arguments_of(model, tmp_path, "random,poll")
    assert "no method 'poll'; the methods are full, random, pool" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="magpie spends what a synthesis spends: name one of one_step"):
        run(recipe_of(Training()), arguments_of(model, tmp_path / "a", "magpie"))
    with pytest.raises(SystemExit, match="--model and --sae go together"):
        run(recipe_of(Training()), arguments_of(model[:1], tmp_path / "b", "random"))


def test_rows_are_read_from_files(tmp_path):
    rows = labelled(3, seed=0)
    rows.to_json(tmp_path / "rows.jsonl")
    rows.to_csv(tmp_path / "rows.csv")
    rows.to_parquet(tmp_path / "rows.parquet")
    for file in tmp_path.glob("rows.*"):
        assert as_task_rows(read_rows(str(file)), TASK).to_list() == as_task_rows(rows, TASK).to_list()


def test_one_seed_has_no_deviation():
    arm = {"rows": 0, "fac_before": 0.5, "fac_after": 0.5, "requests": 0, "prompt_tokens": 0, "completion_tokens": 0,
           "seconds": 0.1, "runs": {"1": {"figures": {"size": 3.0}, "seconds": 1.0}}}  # fmt: skip
    assert "| seed | 0 | 0.500 | 0.500 | 3.0000 |  |" in table({"arms": {"seed": arm}}, [], [1])


@pytest.mark.slow
def test_the_toxicity_recipe_runs_to_its_metric(tmp_path):
    command = [sys.executable, EXAMPLES / "toxicity.py", "--methods=random,pool,two_step", "--samples=4", "--seeds=42"]
    done = subprocess.run([*command, f"--output={tmp_path}"], env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    arms = json.loads((tmp_path / "results.json").read_text())["arms"]
    assert list(arms) == ["seed", "random", "pool", "two_step"]
    assert all(0 < arm["runs"]["42"]["figures"]["average precision"] <= 1 for arm in arms.values())
