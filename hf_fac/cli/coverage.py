"""The commands of `hf-fac` about coverage: `score`, `missing`, and `select` from a pool."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ..storage.differences import differences
from ..storage.files import try_output, whole_file
from ..storage.ranks import rank_and_world_size
from ..storage.scored_rows import COLUMNS, MEASUREMENT, is_scored
from . import options as opt
from .data import check_measured, load_data, load_dictionary, print_left_out, scored
from .options import FeaturizerOptions, MeasuringOptions
from .output import console, marked_text, one_line
from .relevance import ChosenFeatures, read_features

if TYPE_CHECKING:
    from datasets import Dataset

    from ..coverage.coverage import FeatureCoverage
    from ..coverage.report import FACReport
    from ..features.featurizer import SAEFeaturizer


def score(
    data: opt.Data,
    output: Annotated[Path, opt.folder("Folder for the scored rows (Parquet shards).")],
    measuring: MeasuringOptions,
    split: opt.Split = "train",
    keep_above: Annotated[float, typer.Option(help="Floor: activations at or below it are not kept.")] = 0.0,
    shard_rows: Annotated[int, typer.Option(min=1, help="Rows in a shard; a stopped run resumes at a shard.")] = 5000,
) -> None:
    """Add to each row the features that it activates. Run it again to resume."""
    from ..coverage.coverage import FeatureCoverage
    from ..features.shards import score_shards

    try_output(output, folder=True)
    dataset = load_data(data, split)
    featurizer = measuring.featurizer(keep_above=keep_above)
    files = score_shards(featurizer, dataset, output, shard_rows=shard_rows)
    coverage = FeatureCoverage.from_parquet(files, measurement=featurizer.measurement)
    rank, world_size = rank_and_world_size()
    part = f"-{rank:05d}-of-{world_size:05d}" if world_size > 1 else ""
    coverage.save(output / f"coverage{part}.safetensors")
    print_left_out(featurizer, "data set", coverage.rows)
    print_coverage(coverage, output)


def print_coverage(coverage: FeatureCoverage, output: Path) -> None:
    """Prints what a coverage that was written holds."""
    live = int((coverage.maximum > 0).sum())
    console.print(
        f"{coverage.rows:,} rows ({coverage.rows_without_tokens:,} without tokens) activate {live:,} of "
        f"{coverage.d_sae:,} features above {coverage.keep_above:g}. Written to {output}."
    )


def missing(
    data: opt.Data,
    anchor: opt.Anchor,
    measuring: MeasuringOptions,
    split: opt.Split = "train",
    threshold: opt.Threshold = None,
    relative: Annotated[float | None, typer.Option(help="delta as a share of each feature's anchor maximum.")] = None,
    features: opt.Features = None,
    task: Annotated[
        str | None, typer.Option(help="Only features that a dictionary rates for it: name or file.")
    ] = None,
    dictionary: Annotated[
        str | None, typer.Option(help="Folder or Hub repo, for --task; by default the embedded one.")
    ] = None,
    top: opt.Top = 20,
    output: Annotated[Path | None, typer.Option("--output", "-o", dir_okay=False, help="The report, as JSON.")] = None,
) -> None:
    """Print FAC of a data set against an anchor set, and the features it misses. Scores what is not scored yet."""
    from ..coverage.coverage import FeatureCoverage

    if output:
        try_output(output)
    chosen = _chosen_features(features, task, dictionary, is_embedded=measuring.model is None)
    data_rows, anchor_rows = load_data(data, split), load_data(anchor, split)
    featurizer = None
    if not (is_scored(data_rows) and is_scored(anchor_rows)):
        featurizer = measuring.featurizer()
        check_measured({data: data_rows, anchor: anchor_rows}, featurizer.measurement)
    if chosen is not None:
        chosen.check(json.loads(data_rows[0][MEASUREMENT]) if featurizer is None else featurizer.measurement)
    data_rows, anchor_rows = scored(data_rows, featurizer, "data set"), scored(anchor_rows, featurizer, "anchor set")
    report = FeatureCoverage.from_dataset(data_rows).compare(
        FeatureCoverage.from_dataset(anchor_rows), features=None if chosen is None else chosen.ids,
        threshold=threshold, relative=relative,
    )  # fmt: skip
    print_report(report, anchor_rows, featurizer, top)
    print_rows(report, data_rows)
    if output:
        report.save(output)
        console.print(f"The whole report is in {output}.")


def select(
    pool: Annotated[str, typer.Argument(help="Rows to choose from: a file, a folder, or a Hub data set.")],
    report: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="What `hf-fac missing --output` wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", dir_okay=False, help="The chosen rows, as JSON lines.")],
    featurizing: FeaturizerOptions,
    features: opt.Features = None,
    rows: Annotated[int, typer.Option("--rows", "-n", min=1, help="The most rows to choose.")] = 100,
    aim: opt.Aim = "missing",
    split: opt.Split = "train",
) -> None:
    """Choose the rows of a pool that activate most features that a report names as missing, or as too rare.

    A pool that is not scored yet is measured as the report was: give the options that the report was made with.
    """
    import numpy as np
    from fsspec.utils import infer_compression

    from ..coverage.report import FACReport
    from ..coverage.selection import select as select_rows

    try_output(output)
    found, data = FACReport.load(report), load_data(pool, split)
    wanted, demand = (found.missing, np.ones(len(found.missing), int)) if aim == "missing" else found.demand(rows)
    if features is not None:
        only = read_features(features)
        only.check(found.measurement)
        kept = np.isin(wanted, only.among(wanted))
        wanted, demand = wanted[kept], demand[kept]
    check_measured({pool: data}, found.measurement, f"the rows of {report}")
    if not is_scored(data):
        as_reported = {name: found.measurement[name] for name in ("activation", "pool_over", "side", "keep_above")}
        featurizer = featurizing.featurizer(**as_reported)
        if differs := differences(featurizer.measurement, found.measurement):
            raise typer.BadParameter(
                f"With these options {pool} would not be measured as the rows of {report} ({differs}): give "
                "the options that the report was made with."
            )
        data = scored(data, featurizer, "pool")
    chosen = select_rows(data, wanted, rows, demand=demand, threshold=found.threshold)
    with whole_file(output) as partial:
        data.select(chosen.rows).remove_columns(COLUMNS).to_json(partial, compression=infer_compression(str(output)))
    if aim == "missing":
        done = f"activate {len(chosen.covered):,} of {len(wanted):,} missing features"
    else:
        done = f"make up for {len(chosen.covered):,} of {len(wanted):,} deficits"
    console.print(f"{len(chosen.rows):,} rows {done}. Written to {output}.")


def _chosen_features(
    file: Path | None, task: str | None, dictionary: str | None, *, is_embedded: bool
) -> ChosenFeatures | None:
    """F_task: of the file, or what the dictionary has rated for the task; None for all features."""
    from ..tasks.task import get_task

    if (file is not None and task is not None) or (task is None and dictionary is not None):
        raise typer.BadParameter("Give --features, or --task with the --dictionary that was rated for it.")
    if file is not None:
        return read_features(file)
    if task is None:
        return None
    known, name = load_dictionary(dictionary, is_embedded=is_embedded), get_task(task).name
    if known is None:
        raise typer.BadParameter("--task needs --dictionary: one that hf-fac rate has rated for the task.")
    return ChosenFeatures(known.task_features(name), known.measurement, dictionary or "the embedded dictionary")


def print_report(report: FACReport, anchor: Dataset, featurizer: SAEFeaturizer | None, top: int) -> None:
    """Prints FAC and the strongest missing features, each with the row of the scored anchor set that activates it most.
    Without a featurizer the token is not marked."""
    console.print()
    console.print(f"[bold]{report.headline()}[/bold]", markup=True, highlight=False)
    for line in report.facts():
        console.print(line, highlight=False)
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
            text = row_text(anchor[row])
        else:
            reading = featurizer.read([anchor[row]], positions=True)
            position = int(reading.positions[reading.activations.indices == feature][0])
            text = marked_text(featurizer.span(anchor[row], position), "...")
        table.add_row(str(feature), str(support), f"{activation:.1f}", text)
    console.print(table, soft_wrap=False)


def print_rows(report: FACReport, data: Dataset, top: int = 5) -> None:
    """Prints the rows of the scored data set that add most to FAC: features that no other row has, then share."""
    from ..coverage.contributions import row_contributions

    rows = row_contributions(data, report).sort_values(["unique", "share"], ascending=False, kind="stable").head(top)
    table = Table(title="Rows that add most", title_justify="left", show_lines=False, caption_justify="left")
    table.caption = "share: the sum over these features of 1 / (rows that activate it)"
    for name in ("row", "tokens", "anchor\nfeatures", "no other\nrow has", "share"):
        table.add_column(name, justify="right")
    table.add_column("text", overflow="fold")
    for number, row in rows.iterrows():
        figures = (number, row["tokens"], row["anchor_features"], row["unique"])
        table.add_row(*(f"{figure:,.0f}" for figure in figures), f"{row['share']:.1f}", row_text(data[number]))
    console.print(table, soft_wrap=False)


def row_text(row: dict[str, Any]) -> str:
    """Returns the start of what a row's columns of text hold, on one line."""
    from ..inputs.rows import ROW_TYPES

    names = dict.fromkeys(name for columns in ROW_TYPES.values() for name in columns)
    texts = []
    for part in (row[name] for name in names if row.get(name)):
        texts += [part] if isinstance(part, str) else [str(message.get("content") or "") for message in part]
    return one_line(" ".join(texts))[:120]


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
