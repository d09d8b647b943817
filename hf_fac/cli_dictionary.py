"""The commands of `hf-fac` about feature dictionaries."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import cli_options as opt
from .cli_options import console, load_data, make_featurizer


def interpret(
    data: opt.Data,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the dictionary.")],
    split: opt.Split = "train",
    model: opt.Model = None,
    sae: opt.Sae = None,
    sae_id: opt.SaeId = None,
    layer: opt.Layer = None,
    activation: opt.Activation = "native",
    pool_over: opt.PoolOver = "all",
    side: opt.Side = "chosen",
    max_length: opt.MaxLength = None,
    on_error: opt.OnError = "raise",
    preset: opt.Preset = None,
    device: opt.Device = None,
    spans: Annotated[int, typer.Option(help="The most spans of a feature.")] = 10,
) -> None:
    """Collect the strongest spans of every feature that a data set activates. Started again, it goes on."""
    import shutil

    import numpy as np

    from .spans import build_dictionary

    featurizer = make_featurizer(
        model, sae, sae_id, device, layer=layer, activation=activation, pool_over=pool_over, side=side,
        max_length=max_length, on_error=on_error, preset=preset,
    )  # fmt: skip
    progress = output / "progress"
    dictionary = build_dictionary(
        featurizer, load_data(data, split), spans=spans, source=Path(data).stem, output_dir=progress, rank=0,
        world_size=1,
    )  # fmt: skip
    live = dictionary.features[np.array(dictionary.dataset["rows"]) > 0]
    dictionary = dictionary.select(live)
    dictionary.save(output)
    shutil.rmtree(progress)
    console.print(f"{len(dictionary):,} of {featurizer.d_sae:,} features are live. Written to {output}.")
