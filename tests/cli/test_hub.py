"""`hf-fac push` and `hf-fac pull`, on a server that behaves as the Hub does."""

from __future__ import annotations

from command_line import model_options, run
from datasets import load_dataset
from hub_server import WRITE_TOKEN, HubServer, run_with_hub
from typer.testing import CliRunner

from hf_fac.cli import app
from hf_fac.dictionary.dictionary import FeatureDictionary


def test_push_prints_the_url_in_one_line_as_it_is(dictionary_folder, monkeypatch) -> None:
    url = f"https://huggingface.co/datasets/some-organisation/[user]-features/commit/{'0123456789' * 8}"
    monkeypatch.setattr(FeatureDictionary, "push_to_hub", lambda self, repo_id, **settings: url)
    result = CliRunner().invoke(app, ["push", str(dictionary_folder), "some-organisation/features"])
    assert result.output == f"{url}\n"


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
