"""`hf-fac`: the command line. It parses arguments and prints; the work is done by the rooms below."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from typer.core import TyperGroup

from ..storage.files import try_output, write_whole
from ..storage.terminal import visible
from . import dictionary as cli_dictionary
from . import options as opt
from . import synthesize as cli_synthesis
from .options import (
    check_measured,
    console,
    errors,
    load_data,
    make_featurizer,
    marked_text,
    one_line,
    scored,
    tell_left_out,
)

if TYPE_CHECKING:
    from datasets import Dataset

    from ..coverage.report import FACReport
    from ..features.featurizer import SAEFeaturizer

_RESUMES = ("score", "train-sae", "interpret", "rate", "synthesize")


class _Commands(TyperGroup):
    def invoke(self, ctx: typer.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            goes_on = ": the same command goes on where it was" if ctx.invoked_subcommand in _RESUMES else ""
            typer.echo(f"Stopped{goes_on}.", err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="What is my training data missing? Reads data sets with a model's own sparse-autoencoder features. With "
    "HF_FAC_TRACEBACK=1 in the environment an error also says where it comes from.",
)


@app.command()
def demo(top: opt.Top = 10) -> None:
    """Find what the embedded seed set misses of the anchor set with SmolLM2-135M-Instruct, and write it; offline."""
    from transformers.utils.logging import disable_progress_bar

    from ..coverage.coverage import FeatureCoverage
    from ..embedded.loader import load_anchor, load_featurizer, load_seed

    disable_progress_bar()
    console.print("Loading SmolLM2-135M-Instruct and its SAE (layer 15, 4,096 features) ...")
    featurizer = load_featurizer()
    seed, anchor = load_seed(), load_anchor()
    console.print(
        f"Seed set: {len(seed)} narrow instructions (Python, shell, SQL). "
        f"Anchor set: {len(anchor)} broad instructions on {len(set(anchor['topic']))} topics."
    )
    avoid = {"the seed set": seed, "the anchor set": anchor}
    seed, anchor = scored(seed, featurizer, "seed set"), scored(anchor, featurizer, "anchor set")
    report = FeatureCoverage.from_dataset(seed).compare(FeatureCoverage.from_dataset(anchor))
    print_report(report, anchor, featurizer, top)
    cli_synthesis.demo_samples(report, featurizer, avoid)


@app.command()
def score(
    data: opt.Data,
    output: Annotated[
        Path, typer.Option("--output", "-o", file_okay=False, help="Folder for the scored rows (Parquet shards).")
    ],
    split: opt.Split = "train",
    model: opt.Model = None,
    sae: opt.Sae = None,
    sae_id: opt.SaeId = None,
    layer: opt.Layer = None,
    activation: opt.Activation = "native",
    keep_above: Annotated[float, typer.Option(help="Floor: activations at or below it are not kept.")] = 0.0,
    pool_over: opt.PoolOver = "all",
    side: opt.Side = "chosen",
    max_length: opt.MaxLength = None,
    on_error: opt.OnError = "raise",
    preset: opt.Preset = None,
    device: opt.Device = None,
    shard_rows: Annotated[
        int, typer.Option(min=1, help="Rows in a shard; a stopped run goes on at the first missing one.")
    ] = 5000,
) -> None:
    """Add to each row which features it activates. Started again, it goes on where it was."""
    from datasets import Dataset

    from ..coverage.coverage import FeatureCoverage
    from ..features.shards import score_shards

    try_output(output, folder=True)
    dataset = load_data(data, split)
    featurizer = make_featurizer(
        model, sae, sae_id, device, layer=layer, activation=activation, keep_above=keep_above, pool_over=pool_over,
        side=side, max_length=max_length, on_error=on_error, preset=preset,
    )  # fmt: skip
    files = score_shards(featurizer, dataset, output, shard_rows=shard_rows)
    coverage = FeatureCoverage(featurizer.measurement)
    for file in files:
        coverage |= FeatureCoverage.from_dataset(Dataset.from_parquet(str(file)))
    rank, world_size = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    part = f"-{rank:05d}-of-{world_size:05d}" if world_size > 1 else ""
    coverage.save(output / f"coverage{part}.safetensors")
    tell_left_out(featurizer, "data set", coverage.rows)
    live = int((coverage.maximum > 0).sum())
    console.print(
        f"{coverage.rows:,} rows ({coverage.rows_without_tokens:,} without tokens) activate {live:,} of "
        f"{coverage.d_sae:,} features above {coverage.keep_above:g}. Written to {output}."
    )


@app.command()
def missing(
    data: opt.Data,
    anchor: Annotated[str, typer.Argument(help="The reference data set, large and diverse, in the same forms.")],
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
    threshold: opt.Threshold = None,
    relative: opt.Relative = None,
    top: opt.Top = 20,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", dir_okay=False, help="Write the whole report here, as JSON.")
    ] = None,
) -> None:
    """Print FAC of a data set against an anchor set, and the features it misses. Takes scored data or scores it."""
    from ..coverage.coverage import FeatureCoverage
    from ..storage.scored_rows import is_scored

    if output:
        try_output(output)
    data_rows, anchor_rows = load_data(data, split), load_data(anchor, split)
    featurizer = None
    if not (is_scored(data_rows) and is_scored(anchor_rows)):
        featurizer = make_featurizer(
            model, sae, sae_id, device, layer=layer, activation=activation, pool_over=pool_over, side=side,
            max_length=max_length, on_error=on_error, preset=preset,
        )  # fmt: skip
        for rows, name in ((data_rows, data), (anchor_rows, anchor)):
            check_measured(rows, name, featurizer.measurement, "the other set would be")
    data_rows, anchor_rows = scored(data_rows, featurizer, "data set"), scored(anchor_rows, featurizer, "anchor set")
    report = FeatureCoverage.from_dataset(data_rows).compare(
        FeatureCoverage.from_dataset(anchor_rows), threshold=threshold, relative=relative
    )
    print_report(report, anchor_rows, featurizer, top)
    if output:
        write_whole(output, json.dumps(report.to_dict(), indent=1))
        console.print(f"The whole report is in {output}.")


@app.command("train-sae")
def train_sae_command(
    data: opt.Data,
    output: Annotated[
        Path, typer.Option("--output", "-o", file_okay=False, help="Folder for checkpoints and the finished SAE.")
    ],
    layer: Annotated[int, typer.Option(help="0 is the embedding, L the output of block L.")],
    split: opt.Split = "train",
    model: opt.Model = None,
    architecture: Annotated[str, typer.Option(help="Any that SAELens trains.")] = "topk",
    d_sae: Annotated[int | None, typer.Option(help="Features; 8 x the hidden size by default.")] = None,
    k: Annotated[int, typer.Option(help="Active features a token (TopK).")] = 32,
    epochs: Annotated[int, typer.Option()] = 1,
    training_tokens: Annotated[int | None, typer.Option(help="Instead of epochs.")] = None,
    batch_size: Annotated[int, typer.Option(help="Tokens a step.")] = 2048,
    learning_rate: Annotated[float, typer.Option()] = 1e-3,
    max_length: Annotated[int, typer.Option()] = 1024,
    seed: Annotated[int, typer.Option()] = 0,
    device: opt.Device = None,
) -> None:
    """Train a sparse autoencoder on a model's hidden states. Started again, it goes on from its last checkpoint."""
    from ..sae.training import train_sae

    try_output(output, folder=True)
    if model is None:
        from ..embedded.loader import load_model

        loaded, tokenizer = load_model(device=device or "cpu")
    else:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto").to(device)
        tokenizer = AutoTokenizer.from_pretrained(model)
    sae = train_sae(
        loaded, tokenizer, load_data(data, split), layer=layer, architecture=architecture, d_sae=d_sae, k=k,
        epochs=epochs, training_tokens=training_tokens, batch_size=batch_size, learning_rate=learning_rate,
        max_length=max_length, seed=seed, output_dir=output,
    )  # fmt: skip
    for name, value in sae.cfg.metadata["hf_fac"].items():
        console.print(f"{name}: {value}")
    console.print(f"Written to {output}. Load it with load_sae({str(output)!r}).")


for command in (
    cli_dictionary.interpret,
    cli_dictionary.rate,
    cli_dictionary.select,
    cli_synthesis.synthesize,
    cli_dictionary.push,
    cli_dictionary.pull,
):
    app.command()(command)


def print_report(report: FACReport, anchor: Dataset, featurizer: SAEFeaturizer | None, top: int) -> None:
    """Prints the figures, and the strongest missing features with the anchor text that activates each most."""
    low, high = report.interval
    console.print()
    console.print(
        f"[bold]FAC {report.fac:.3f}[/bold]  ({report.confidence:.0%} interval {low:.3f} to {high:.3f})", markup=True
    )
    console.print(
        f"Of {len(report.covered) + len(report.missing):,} features that the anchor set activates, "
        f"{len(report.covered):,} are covered and [bold]{len(report.missing):,} missing[/bold].",
        markup=True,
    )
    console.print(f"delta: {report.threshold_source}", highlight=False)
    console.print(
        f"{report.rows:,} rows against {report.anchor_rows:,}; KL(anchor || data) {report.kl_divergence:.2f} nats."
    )
    shown = report.missing[:top].tolist()
    if not shown:
        return
    table = Table(title="Strongest missing features", title_justify="left", show_lines=False)
    table.add_column("feature", justify="right")
    table.add_column("anchor rows", justify="right")
    table.add_column("max", justify="right")
    table.add_column("anchor text that activates it most", overflow="fold")
    strongest = strongest_rows(anchor, shown)
    for feature, support in zip(shown, report.missing_support, strict=False):
        row, activation = strongest[feature]
        if featurizer is None:
            text = _plain(anchor[row])[:120]
        else:
            reading = featurizer.read([anchor[row]], positions=True)
            position = int(reading.positions[reading.activations.indices == feature][0])
            span = featurizer.span(anchor[row], position)
            text = marked_text(span, "...")
        table.add_row(str(feature), str(support), f"{activation:.1f}", text)
    console.print(table, soft_wrap=False)


def strongest_rows(scored: Dataset, features: list[int]) -> dict[int, tuple[int, float]]:
    """Returns for each feature the row of a scored data set that activates it most, and by how much."""
    import numpy as np

    best = dict.fromkeys(features, (-1, 0.0))
    for number, row in enumerate(scored.select_columns(["fac_features", "fac_activations"]).with_format("numpy")):
        for place in np.flatnonzero(np.isin(row["fac_features"], features)):
            feature, activation = int(row["fac_features"][place]), float(row["fac_activations"][place])
            if activation > best[feature][1]:
                best[feature] = (number, activation)
    return best


def _plain(row: dict[str, Any]) -> str:
    return one_line(" ".join(str(value) for name, value in row.items() if not name.startswith("fac_")))


def main() -> None:
    """The console script. An error is one line; with HF_FAC_TRACEBACK=1 it says where it comes from."""
    import sys
    import traceback
    import warnings

    from typer.rich_utils import rich_format_error

    from ..chat.base import ChatError
    from ..hub.errors import HubError

    warnings.formatwarning = lambda message, *_: visible(f"hf-fac: {message}\n")
    try:
        sys.exit(app(standalone_mode=False))
    except typer.TyperException as error:
        error.message = visible(error.message)
        rich_format_error(error)
        sys.exit(error.exit_code)
    except Exception as error:
        if os.environ.get("HF_FAC_TRACEBACK"):
            errors.print("".join(traceback.format_exception(error)))
        told = " ".join(str(error).split("\n"))
        if not isinstance(error, ChatError | HubError | ValueError | OSError):
            told = f"{type(error).__name__}: {told} (HF_FAC_TRACEBACK=1 in the environment shows where it comes from.)"
        errors.print("[red]hf-fac:[/red]", end=" ", markup=True)
        errors.print(told)
        sys.exit(1)
