"""`hf-fac train-sae`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..storage.files import try_output
from . import options as opt
from .data import DataOptions
from .output import console


def train_sae(
    data: opt.Data,
    output: Annotated[Path, opt.folder("Folder for checkpoints and the finished SAE.")],
    layer: Annotated[int, typer.Option(help="0 is the embedding, L the output of the L-th block.")],
    reading: DataOptions,
    model: opt.Model = None,
    architecture: Annotated[str, typer.Option(help="Any that SAELens trains.")] = "topk",
    d_sae: Annotated[int | None, typer.Option(help="Number of features; by default 8 x the hidden size.")] = None,
    k: Annotated[int, typer.Option(help="Active features of a token (TopK).")] = 32,
    epochs: Annotated[int, typer.Option(help="Passes over the data.")] = 1,
    training_tokens: Annotated[int | None, typer.Option(help="Tokens to train on, instead of epochs.")] = None,
    batch_size: Annotated[int, typer.Option(help="Tokens of a step.")] = 2048,
    learning_rate: Annotated[float, typer.Option(help="Learning rate.")] = 1e-3,
    max_length: Annotated[int, typer.Option(help="The most tokens of a row.")] = 1024,
    seed: opt.Seed = 0,
    device: opt.Device = None,
) -> dict[str, Any]:
    """Train a sparse autoencoder on a model's hidden states. Run it again to resume from its last checkpoint."""
    from ..sae.training import train_sae as train

    try_output(output, folder=True)
    dataset = reading.load(data)
    if model is None:
        from ..embedded.loader import load_model

        loaded, tokenizer = load_model(device=device or "cpu")
    else:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto").to(device)
        tokenizer = AutoTokenizer.from_pretrained(model)
    sae = train(
        loaded, tokenizer, dataset, layer=layer, architecture=architecture, d_sae=d_sae, k=k,
        epochs=epochs, training_tokens=training_tokens, batch_size=batch_size, learning_rate=learning_rate,
        max_length=max_length, seed=seed, output_dir=output,
    )  # fmt: skip
    for name, value in sae.cfg.metadata["hf_fac"].items():
        console.print(f"{name}: {value}")
    console.print(f"Written to {output}. Load it with load_sae({str(output)!r}).")
    return sae.cfg.metadata["hf_fac"] | {"output": output}
