from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_line import model_options, run
from sae_lens import TopKSAE, TopKSAEConfig
from tiny import CORPUS, byte_level_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from hf_fac import save_sae


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny model with its tokenizer, an SAE for its layer 1, and two data sets."""
    root = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    tokenizer = byte_level_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    sae = TopKSAE(TopKSAEConfig(d_in=16, d_sae=64, k=4))
    torch.nn.init.normal_(sae.W_enc)
    sae.cfg.metadata.hook_name = "blocks.0.hook_resid_post"
    save_sae(sae, root / "sae")
    words = " ".join(CORPUS).split()
    for name, size in (("data", 12), ("anchor", 40)):
        rows = [{"text": " ".join(words[i % 30 : i % 30 + 1 + i % 6])} for i in range(size)]
        (root / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


@pytest.fixture(scope="module")
def dictionary_folder(folders, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("dictionary") / "d"
    run("interpret", folders / "anchor.jsonl", "-o", output, *model_options(folders))
    return output
