"""How well an SAE does on a model: variance unexplained, active features, dead features, loss recovered.

In go a model, its tokenizer, an SAE and held-out rows of any type; only content tokens that are no sinks are looked at.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from ..inputs import hidden_states as acts
from ..inputs.rows import ConversationReader, Pieces
from .loading import fvu

if TYPE_CHECKING:
    from sae_lens import SAE
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class SAEMetrics(NamedTuple):
    """How well an SAE does on held-out content tokens, sinks left out.

    fvu: fraction of variance unexplained. l0: mean number of active features of a token. dead_share: share of features
    that none of the tokens activates. loss_recovered: (loss with the layer's content tokens zeroed - loss with their
    reconstruction) / (loss zeroed - loss of the model), 1 is lossless; None for a model without a language-model loss.
    tokens: how many were read.
    """

    fvu: float
    l0: float
    dead_share: float
    loss_recovered: float | None
    tokens: int


def evaluate_sae(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sae: SAE,
    rows: Any,
    *,
    layer: int,
    sink_norm: float,
    max_length: int = 1024,
    loss_rows: int = 200,
) -> SAEMetrics:
    """Returns `SAEMetrics` on the content tokens of `rows`; the loss is taken on the first `loss_rows` of them."""
    reader = ConversationReader(tokenizer, max_length=max_length)
    pieces = reader(rows)
    hidden = torch.cat(
        list(content_states(model, pieces, layer, acts.default_batch_tokens(model.device), sink_norm))
        or [torch.zeros(0, sae.cfg.d_in)]
    )
    if len(hidden) < 2:
        raise ValueError("The held-out rows have fewer than two content tokens: give more rows.")
    active = torch.zeros(sae.cfg.d_sae, dtype=torch.bool, device=sae.device)
    l0 = 0.0
    with torch.no_grad():
        for part in hidden.split(1024):
            fires = sae.encode(part.to(sae.device)) > 0
            active |= fires.any(0)
            l0 += float(fires.sum())
    return SAEMetrics(
        fvu=fvu(sae, hidden),
        l0=l0 / len(hidden),
        dead_share=1 - float(active.float().mean()),
        loss_recovered=_loss_recovered(model, pieces, sae, layer, sink_norm, loss_rows),
        tokens=len(hidden),
    )


def content_states(
    model: PreTrainedModel,
    pieces: Pieces,
    layer: int,
    batch_tokens: int,
    sink_norm: float | None,
    causal: bool | None = None,
) -> Iterator[Tensor]:
    """Yields each batch's hidden states [n, d_in] float32 of content tokens, without sinks where a cut-off is given."""
    for batch in acts.hidden_states(model, pieces.ids, layer, batch_tokens=batch_tokens, causal=causal):
        counts = torch.zeros(batch.hidden.shape[:2], dtype=torch.bool)
        for place, i in enumerate(batch.pieces):
            counts[place, : len(pieces.content[i])] = torch.from_numpy(pieces.content[i])
        states = batch.hidden[counts.to(batch.hidden.device)].float()
        if sink_norm is not None:
            states = states[states.norm(dim=-1) <= sink_norm]
        yield states


@contextmanager
def _replaced(model: PreTrainedModel, layer: int, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While it lasts, what the layer gives on is `change` of it."""

    def after(_module: Any, _inputs: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    def before(_module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": change(kwargs["hidden_states"])}

    blocks = acts.find_blocks(model)
    if layer:
        handle = blocks[layer - 1].register_forward_hook(after)
    else:
        handle = blocks[0].register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _loss_recovered(
    model: PreTrainedModel, pieces: Pieces, sae: SAE, layer: int, sink_norm: float, loss_rows: int
) -> float | None:
    if model.get_output_embeddings() is None or not acts.is_causal(model, layer):
        return None
    training = model.training
    model.eval()
    losses = np.zeros(3)
    with torch.no_grad():
        for ids, content in list(zip(pieces.ids, pieces.content, strict=True))[:loss_rows]:
            if len(ids) < 2 or not content.any():
                continue
            batch = torch.from_numpy(ids.astype(np.int64))[None].to(model.device)
            counts = torch.from_numpy(content)[None].to(model.device)

            def changed(hidden: Tensor, to: Any, counts: Tensor = counts) -> Tensor:
                here = counts & (hidden.float().norm(dim=-1) <= sink_norm)
                return torch.where(here[..., None], to(hidden.float()).to(hidden.dtype), hidden)

            for number, to in enumerate((None, lambda x: sae.decode(sae.encode(x)), torch.zeros_like)):
                if to is None:
                    logits = model(input_ids=batch).logits
                else:
                    with _replaced(model, layer, lambda hidden, to=to, changed=changed: changed(hidden, to)):
                        logits = model(input_ids=batch).logits
                each = torch.nn.functional.cross_entropy(logits[0, :-1].float(), batch[0, 1:], reduction="none")
                losses[number] += float(each[counts[0, 1:]].sum())
    model.train(training)
    clean, reconstructed, zeroed = losses
    if zeroed <= clean:
        warnings.warn("Zeroing the layer does not raise the loss, so no loss recovered can be given.", stacklevel=2)
        return None
    return float((zeroed - reconstructed) / (zeroed - clean))
