"""The forward pass, stopped at one block: token ids in, the hidden states of one layer out, batch by batch.

Layer L is the output of the L-th block, read by a hook on the block; layer 0 is what enters the first block. Pieces of
text are run in order of length, as many at once as fill a token budget; no block above the layer is computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

SINK_FACTOR = 10.0


class LayerError(ValueError):
    """The layer asked for is not there, or a model's blocks cannot be found."""


class Batch(NamedTuple):
    """Hidden states of one batch.

    pieces: int64 [n], which of the pieces given these are.
    hidden: [n, longest, d_in] in the model's dtype and on its device; what lies beyond a piece's end is meaningless.
    """

    pieces: np.ndarray
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
    return max(stacks, key=lambda stack: sum(p.numel() for p in stack.parameters()))


def check_layer(model: PreTrainedModel, layer: int) -> None:
    """Raises: LayerError when `layer` is not in 0 .. number of blocks."""
    n_layers = len(find_blocks(model))
    if not 0 <= layer <= n_layers:
        raise LayerError(
            f"Layer {layer} was asked for; {type(model).__name__} has layers 0 (the embedding) to {n_layers}."
        )


class _Reached(Exception):
    """The hidden states are there: the rest of the forward pass is not needed."""


@contextmanager
def _stopping(model: PreTrainedModel, blocks: nn.ModuleList, layer: int, box: list[Tensor]) -> Iterator[None]:
    """While it lasts, a forward pass puts the layer's hidden states into `box` and ends there."""

    def after(_module: nn.Module, _inputs: object, output: object) -> None:
        box.append(output[0] if isinstance(output, tuple) else output)
        raise _Reached

    def before(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        box.append(args[0] if args else kwargs["hidden_states"])
        raise _Reached

    if layer:
        handle = blocks[layer - 1].register_forward_hook(after)
    else:
        handle = blocks[0].register_forward_pre_hook(before, with_kwargs=True)
    # Not `model.train(was)` at the end: parts may have been in another mode than the whole.
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        # Not inference_mode: buffers that the model makes on the way must still serve a later training step.
        with torch.no_grad():
            yield
    finally:
        handle.remove()
        for module in training:
            module.training = True


def _forward(model: PreTrainedModel, ids: Tensor, mask: Tensor | None, box: list[Tensor]) -> Tensor:
    settings = {} if model.config.is_encoder_decoder or not hasattr(model.config, "use_cache") else {"use_cache": False}
    try:
        model(input_ids=ids, attention_mask=mask, **settings)
    except _Reached:
        hidden = box.pop()
        if hidden.ndim != 3 or hidden.shape[:2] != ids.shape:
            raise LayerError(
                f"{type(model).__name__} makes hidden states of shape {list(hidden.shape)} of {list(ids.shape)} ids: "
                "not one for each token (prompt tuning adds some), so no token can be read."
            ) from None
        return hidden
    raise LayerError(f"{type(model).__name__} ran to its end without passing the block that was to be read.")


def is_causal(model: PreTrainedModel, layer: int) -> bool:
    """Returns whether later tokens leave earlier hidden states alone, measured with two short sequences."""
    ids = torch.arange(2, 10, device=model.device).repeat(2, 1)
    ids[1, 4:] += 1
    ids %= model.config.get_text_config().vocab_size
    box: list[Tensor] = []
    with _stopping(model, find_blocks(model), layer, box):
        first, second = _forward(model, ids, torch.ones_like(ids), box)[:, :4].float()
    # States that are not finite are equal to none, and a model with such is run with a mask: never wrong, only slower.
    return bool(((first - second).abs() <= 1e-3 * second.abs() + 1e-5 * first.abs().max()).all())


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Returns the array as a tensor on the device; a GPU's queue of work is not waited for."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def default_batch_tokens(device: torch.device) -> int:
    """Returns how many tokens a batch holds where the caller does not say: near what measures best on two CPU cores."""
    return 2048 if device.type == "cpu" else 65536


def pack(lengths: Sequence[int], batch_tokens: int) -> list[np.ndarray]:
    """Returns the indices of pieces, longest first, cut into batches whose padded size is at most `batch_tokens`.

    A piece longer than the budget is a batch of its own; pieces without tokens are in no batch.
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    order = order[: int((np.asarray(lengths) > 0).sum())]
    batches, start = [], 0
    while start < len(order):
        size = max(1, batch_tokens // int(lengths[order[start]]))
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
        causal: whether `is_causal`; None measures it. A causal model needs no mask where padding stands on the right.
    """
    if not any(len(piece) for piece in ids):
        return
    check_layer(model, layer)
    if causal is None:
        causal = is_causal(model, layer)
    blocks, box = find_blocks(model), []
    for batch in pack([len(piece) for piece in ids], batch_tokens):
        lengths = np.array([len(ids[i]) for i in batch])
        # Each is padded with a token of its own: one whose embedding is NaN would spoil others, behind a mask too.
        padded = np.empty((len(batch), lengths[0]), dtype=np.int64)
        for place, i in enumerate(batch):
            padded[place] = ids[i][0]
            padded[place, : len(ids[i])] = ids[i]
        mask = None
        if not causal and lengths[-1] < lengths[0]:
            mask = to_device((np.arange(lengths[0]) < lengths[:, None]).astype(np.int64), model.device)
        with _stopping(model, blocks, layer, box):
            hidden = _forward(model, to_device(padded, model.device), mask, box)
        yield Batch(batch, hidden)


def sink_cutoff(norms: np.ndarray) -> float:
    """Returns the norm above which a token is a sink: 10 x the median norm of content tokens."""
    return SINK_FACTOR * float(np.median(norms))
