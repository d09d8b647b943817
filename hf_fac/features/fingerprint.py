"""Hashes of a model, an SAE and a tokenizer, which identify a measurement.

In: weights, settings of the architecture, adapters, the tokenizer's rules. Out: values that are the same in every
process and on every device.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from ..inputs.hidden_states import find_blocks

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def parameters_up_to(model: PreTrainedModel, layer: int) -> Iterator[tuple[str, Tensor]]:
    """Yields name and tensor of every parameter and buffer that shapes the hidden states at `layer`.

    That is everything, adapters included, except the head and the blocks above the layer. A parameter that the layer
    does not depend on (a final norm) may be among them; none that it depends on is missing. Names start at the
    backbone, so that a causal model, a classifier and a reward model on the same backbone agree.
    """
    body = _backbone(model)
    above = {id(t) for block in list(find_blocks(model))[layer:] for t in (*block.parameters(), *block.buffers())}
    for name, tensor in (*body.named_parameters(), *body.named_buffers()):
        if id(tensor) not in above:
            yield name, tensor


def model_settings(model: PreTrainedModel) -> dict[str, Any]:
    """Returns what shapes the hidden states besides the weights: the architecture's settings and the active adapters.

    Left out of the config are the fields that all architectures share (names, versions, labels, dtype), and those that
    trainers change without changing hidden states: token ids and the cache.
    """
    from transformers import PretrainedConfig

    shared = {*PretrainedConfig().to_dict(), "use_cache"}
    config = model.config.get_text_config().to_dict()
    settings = {key: value for key, value in config.items() if key not in shared and not key.endswith("_token_id")}
    return {"class": type(_backbone(model)).__name__, "config": settings, "adapters": adapters(model)}


def tokenizer_settings(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Returns what determines a text's token ids and which of them are special: the rules and a hash of the vocabulary.

    Padding and truncation are left out: a call elsewhere may change them.
    """
    import xxhash

    backend = tokenizer.backend_tokenizer
    stages = ("normalizer", "pre_tokenizer", "post_processor")
    states = {stage: getattr(backend, stage) for stage in stages}
    return {
        "words": xxhash.xxh3_128_hexdigest(backend.model.__getstate__()),
        "added": repr(sorted((i, repr(token)) for i, token in tokenizer.added_tokens_decoder.items())),
        "special": repr(sorted(set(tokenizer.all_special_ids))),
        "template": json.dumps(tokenizer.chat_template, sort_keys=True),
        **{stage: "" if state is None else state.__getstate__().decode() for stage, state in states.items()},
    }


def adapters(model: PreTrainedModel) -> list[str]:
    """Returns for each layer with adapters which act and how strongly: the tensors alone do not say."""
    if "peft" not in sys.modules:
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [
        # Only LoRA and its kin have a scaling.
        f"{name} {layer.active_adapters} {layer.disable_adapters} {layer.merged_adapters} "
        f"{sorted(getattr(layer, 'scaling', {}).items())}"
        for name, layer in _backbone(model).named_modules()
        if isinstance(layer, BaseTunerLayer)
    ]


class TensorHash:
    """Hashes the names, shapes, dtypes and values of tensors.

    CPU tensors are read at every call (10 GB a second). Tensors on another device are copied only when `change_marks`
    differ from those of the last call.
    """

    def __init__(self) -> None:
        self._known: tuple[list[int], str] | None = None

    def __call__(self, tensors: Iterable[tuple[str, Tensor]]) -> str:
        import xxhash

        tensors = sorted(((name, tensor.detach()) for name, tensor in tensors), key=lambda pair: pair[0])
        here = all(tensor.device.type == "cpu" for _, tensor in tensors)
        marks = None if here else change_marks([tensor for _, tensor in tensors])
        if marks is None or self._known is None or self._known[0] != marks:
            digest = xxhash.xxh3_128()
            for name, tensor in tensors:
                digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
                digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
            self._known = (marks, digest.hexdigest())
        return self._known[1]


def change_marks(tensors: list[Tensor], *, most: int | None = None) -> list[int]:
    """Change detector: at least one value changes when any tensor changes. Tensors are read on their device.

    Args:
        most: entries of each tensor that are read; None reads all. With fewer, one change is missed: through `.data`,
            of entries that are not read.
    """
    flat = [tensor.reshape(-1) for tensor in tensors]
    if most is not None:
        flat = [tensor[:: max(1, len(tensor) // most)].contiguous() for tensor in flat]
    sums = [tensor.view(_BITS[tensor.element_size()]).sum() for tensor in flat]
    versions = [number for t in tensors for number in (t.data_ptr(), 0 if t.is_inference() else t._version)]
    return [*torch.stack([total.to(sums[0].device) for total in sums]).tolist(), *versions]


def _backbone(model: PreTrainedModel) -> nn.Module:
    from transformers import PreTrainedModel

    # What PEFT calls the base model of its wrapper is another thing.
    return model.base_model if isinstance(model, PreTrainedModel) else model
