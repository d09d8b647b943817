"""The forward pass, stopped at one block: token ids in, the hidden states of one layer out, batch by batch.

Layer L is the output of the L-th block, read by a hook on the block; layer 0 is what enters the first block. Sequences
are read in order of length, in batches that fill a token budget; no block above the layer is computed. Only this module
hooks a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel


class LayerError(ValueError):
    """The model has no such layer, or its blocks cannot be found."""


class Batch(NamedTuple):
    """Hidden states of one batch.

    indices: int64 [n], of the pieces.
    hidden: [n, longest, d_in] in the model's dtype and on its device; states after a piece's end have no meaning.
    """

    indices: np.ndarray
    hidden: Tensor


def find_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """Returns the model's stack of transformer blocks: the module list as long as the text model has layers.

    Raises: LayerError when there is none.
    """
    n_layers = model.config.get_text_config().num_hidden_layers
    stacks = [
        module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module) == n_layers
    ]
    if not stacks:
        raise LayerError(
            f"{type(model).__name__} has no list of {n_layers} blocks (config.num_hidden_layers): no layer can be read."
        )
    # Counting parameters takes longer than the search, and every batch searches.
    return stacks[0] if len(stacks) == 1 else max(stacks, key=lambda stack: sum(p.numel() for p in stack.parameters()))


def check_layer(model: PreTrainedModel, layer: int) -> nn.ModuleList:
    """Returns the blocks. Raises: LayerError when `layer` is not in 0 .. number of blocks."""
    blocks = find_blocks(model)
    if not 0 <= layer <= len(blocks):
        raise LayerError(
            f"Layer {layer} was asked for; {type(model).__name__} has layers 0 (the embedding) to {len(blocks)}."
        )
    return blocks


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients. Afterwards, also after an error, each sub-module has its own mode again."""
    # Not `model.train(mode)` at the end: sub-modules may have been in another mode than the whole.
    modes = [(module, module.training) for module in model.modules()]
    if any(training for _, training in modes):
        model.eval()
    try:
        # Not inference_mode: a later training step must be able to use buffers that the model creates here.
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            if module.training != training:
                module.training = training


@contextmanager
def layer_hook(model: PreTrainedModel, layer: int, function: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Calls `function` with the hidden states at a layer, [n, longest, d_in], in every forward pass of the model.

    What it returns replaces them for the rest of the forward pass; None leaves them as they are. The hook is removed at
    the end, also after an error.

    Args:
        layer: 0 is what enters the first block, L the output of the L-th block.
    Raises: LayerError when the model has no such layer.
    """
    blocks = check_layer(model, layer)

    def changed(hidden: Tensor) -> Tensor:
        replacement = function(hidden)
        return hidden if replacement is None else replacement

    def after(_module: nn.Module, _inputs: object, output: Any) -> Any:
        return (changed(output[0]), *output[1:]) if isinstance(output, tuple) else changed(output)

    def before(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (changed(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": changed(kwargs["hidden_states"])}

    if layer:
        handle = blocks[layer - 1].register_forward_hook(after)
    else:
        handle = blocks[0].register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


class _Reached(Exception):
    """The layer's hidden states are there: the rest of the forward pass is not needed."""


def run_to_layer(model: PreTrainedModel, layer: int, input_ids: Tensor, **inputs: Any) -> Tensor:
    """Returns the hidden states at the layer, [n, longest, d_in]; no block above it is computed.

    Args:
        input_ids: int64 [n, longest].
        inputs: further arguments of the model.
    Raises: LayerError when the model does not make one state for each id.
    """
    found: list[Tensor] = []

    def stop(hidden: Tensor) -> None:
        found.append(hidden)
        raise _Reached  # ends the forward pass

    settings = {} if model.config.is_encoder_decoder or not hasattr(model.config, "use_cache") else {"use_cache": False}
    with suppress(_Reached), evaluation_mode(model), layer_hook(model, layer, stop):
        model(input_ids=input_ids, **settings | inputs)
    if not found:
        raise LayerError(f"{type(model).__name__} ran to its end without passing the block that was to be read.")
    if found[0].ndim != 3 or found[0].shape[:2] != input_ids.shape:
        raise LayerError(
            f"{type(model).__name__} makes hidden states of shape {list(found[0].shape)} of {list(input_ids.shape)} "
            "ids: not one for each token (prompt tuning adds some), so no token can be read."
        )
    return found[0]


def is_causal(model: PreTrainedModel, layer: int) -> bool:
    """Returns whether hidden states do not depend on later tokens, measured with two short sequences."""
    ids = torch.arange(2, 10, device=model.device).repeat(2, 1)
    ids[1, 4:] += 1
    ids %= model.config.get_text_config().vocab_size
    first, second = run_to_layer(model, layer, ids, attention_mask=torch.ones_like(ids))[:, :4].float()
    # States that are not finite equal nothing: such a model is run with a mask, which is slower but never wrong.
    return bool(((first - second).abs() <= 1e-3 * second.abs() + 1e-5 * first.abs().max()).all())


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Returns the array as a tensor on the device, without waiting for a GPU's queue of work."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def default_batch_tokens(device: torch.device) -> int:
    """Returns the default number of tokens in a batch; on the CPU, near the fastest on two cores."""
    return 2048 if device.type == "cpu" else 65536


def most_logit_tokens(model: PreTrainedModel) -> int:
    """Returns for how many tokens the logits fit into 256 MB in float32, at least 1."""
    return max(1, 2**26 // model.config.get_text_config().vocab_size)


def pack(lengths: Sequence[int], batch_tokens: int, past: np.ndarray | None = None) -> list[np.ndarray]:
    """Returns the indices of pieces, longest first, cut into batches whose padded size is at most `batch_tokens`.

    A piece longer than the budget is a batch of its own; pieces without tokens are in no batch.

    Args:
        past: int64, tokens that come before each piece and are read already. A batch and its past, padded, are at most
            eight times the budget.
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    order = order[: int((np.asarray(lengths) > 0).sum())]
    batches, start = [], 0
    while start < len(order):
        length = int(lengths[order[start]])
        size = max(1, batch_tokens // length)
        if past is not None:
            columns = np.maximum.accumulate(past[order[start : start + size]]) + length
            size = max(1, int((columns * np.arange(1, len(columns) + 1) <= 8 * batch_tokens).sum()))
        batches.append(order[start : start + size])
        start += size
    return batches


def hidden_states(
    model: PreTrainedModel, ids: Sequence[np.ndarray], layer: int, *, batch_tokens: int, causal: bool | None = None
) -> Iterator[Batch]:
    """Yields the hidden states at `layer` of every piece that has tokens, in batches of similar length.

    Args:
        ids: per piece, int [n_tokens].
        layer: 0 is what enters the first block, L the output of the L-th block.
        batch_tokens: the most tokens in a batch, padding included.
        causal: what `is_causal` returns; None measures it. A causal model needs no mask, as padding is on the right.
    """
    if not any(len(piece) for piece in ids):
        return
    if causal is None:
        causal = is_causal(model, layer)
    for batch in pack([len(piece) for piece in ids], batch_tokens):
        lengths = np.array([len(ids[i]) for i in batch])
        # Each piece is padded with its own first token: a padding token whose embedding is NaN would make other pieces
        # NaN, even behind a mask.
        padded = np.empty((len(batch), lengths[0]), dtype=np.int64)
        for line, i in zip(padded, batch, strict=True):
            line[:] = ids[i][0]
            line[: len(ids[i])] = ids[i]
        mask = None
        if not causal and lengths[-1] < lengths[0]:
            mask = to_device((np.arange(lengths[0]) < lengths[:, None]).astype(np.int64), model.device)
        yield Batch(batch, run_to_layer(model, layer, to_device(padded, model.device), attention_mask=mask))


def sink_cutoff(norms: np.ndarray) -> float:
    """Returns the norm above which a token is a sink: 10 x the median norm of content tokens."""
    return 10.0 * float(np.median(norms))
