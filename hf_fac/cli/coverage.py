"""The commands of `hf-fac` about coverage: `score`, `missing`, and `select` from a pool."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ..inputs.rows import row_text
from ..storage.differences import differences
from ..storage.files import try_output, whole_file
from ..storage.ranks import rank_and_world_size
from ..storage.scored_rows import COLUMNS, is_scored
from . import options as opt
from .data import DataOptions, check_measured, coverage_name, measure, print_left_out, scored
from .features import FeatureOptions
from .options import FeaturizerOptions, MeasuringOptions, ThresholdOptions
from .output import console, marked_text, one_line

if TYPE_CHECKING:
    from datasets import Dataset
    from rich.text import Text

    from ..coverage.coverage import FeatureCoverage
    from ..coverage.report import FACReport
    from ..features.featurizer import SAEFeaturizer


def score(
    data: opt.Data,
    output: Annotated[Path, opt.folder("Folder for the scored rows (Parquet shards).")],
    reading: DataOptions,
    measuring: MeasuringOptions,
    shard_rows: Annotated[int, typer.Option(min=1, help="Rows in a shard; a stopped run resumes at a shard.")] = 5000,
) -> dict[str, Any]:
    """Add to each row the features that it activates. Run it again to resume."""
    from ..coverage.coverage import FeatureCoverage
    from ..features.shards import score_shards

    try_output(output, folder=True)
    dataset = reading.load(data)
    featurizer = measuring.featurizer()
    files = score_shards(featurizer, dataset, output, shard_rows=shard_rows)
    coverage = FeatureCoverage.from_parquet(files, measurement=featurizer.measurement)
    coverage.save(output / coverage_name(*rank_and_world_size()))
    print_left_out(featurizer, "data set", coverage.rows)
    return print_coverage(coverage, output)


def print_coverage(coverage: FeatureCoverage, output: Path) -> dict[str, Any]:
    """Prints what a coverage that was written holds, and returns it."""
    live = int((coverage.maximum > 0).sum())
    console.print(
        f"{coverage.rows:,} rows ({coverage.rows_without_tokens:,} without tokens) activate {live:,} of "
        f"{coverage.d_sae:,} features above {coverage.keep_above:g}. Written to {output}."
    )
    return {
        "rows": coverage.rows, "rows_without_tokens": coverage.rows_without_tokens, "active_features": live,
        "d_sae": coverage.d_sae, "output": output,
    }  # fmt: skip


def missing(
    data: Annotated[str, typer.Argument(help="A data set as for `hf-fac score`, scored rows, or a coverage.")],
    anchor: opt.Anchor,
    reading: DataOptions,
    measuring: MeasuringOptions,
    delta: ThresholdOptions,
    which: FeatureOptions,
    top: opt.Top = 20,
    output: Annotated[Path | None, typer.Option("--output", "-o", dir_okay=False, help="The report, as JSON.")] = None,
) -> dict[str, Any]:
    """Print FAC of a data set against an anchor set, and the features it misses. Scores what is not scored yet.

    Data and anchor are rows, scored rows, or coverages (the .safetensors files of `hf-fac score` and `hf-fac merge`).
    """
    if output:
        try_output(output)
    chosen = which.chosen(is_embedded=measuring.model is None)
    measured, featurizer = measure({"data set": data, "anchor set": anchor}, reading, measuring, chosen)
    own, reference = measured["data set"], measured["anchor set"]
    report = own.coverage.compare(
        reference.coverage,
        features=None if chosen is None else chosen.ids,
        threshold=delta.threshold,
        relative=delta.relative,
    )
    print_report(report, reference.rows, featurizer, top)
    if own.rows is not None:
        print_rows(report, own.rows)
    if output:
        report.save(output)
        console.print(f"The whole report is in {output}.")
    return report.to_dict() | {"output": output}


def select(
    pool: Annotated[str, typer.Argument(help="Rows to choose from: a file, a folder, or a Hub data set.")],
    report: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="What `hf-fac missing --output` wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", dir_okay=False, help="The chosen rows, as JSON lines.")],
    reading: DataOptions,
    featurizing: FeaturizerOptions,
    which: FeatureOptions,
    rows: Annotated[int, typer.Option("--rows", "-n", min=1, help="The most rows to choose.")] = 100,
    aim: opt.Aim = "missing",
) -> dict[str, Any]:
    """Choose the rows of a pool that activate most features that a report names as missing, or as too rare.

    A pool that is not scored yet is measured as the report was: give the options that the report was made with.
    """
    import numpy as np
    from fsspec.utils import infer_compression

    from ..coverage.report import FACReport
    from ..coverage.selection import select as select_rows

    try_output(output)
    found, data = FACReport.load(report), reading.load(pool)
    wanted, demand = (found.missing, np.ones(len(found.missing), int)) if aim == "missing" else found.demand(rows)
    if (chosen := which.chosen(is_embedded=featurizing.model is None)) is not None:
        chosen.check(found.measurement)
        kept = np.isin(wanted, chosen.ids)
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
    taken = select_rows(data, wanted, rows, demand=demand, threshold=found.threshold)
    with whole_file(output) as partial:
        data.select(taken.rows).remove_columns(COLUMNS).to_json(partial, compression=infer_compression(str(output)))
    if aim == "missing":
        done = f"activate {len(taken.covered):,} of {len(wanted):,} missing features"
    else:
        done = f"make up for {len(taken.covered):,} of {len(wanted):,} deficits"
    console.print(f"{len(taken.rows):,} rows {done}. Written to {output}.")
    return {"rows": taken.rows, "covered": taken.covered, "wanted": wanted, "output": output}


def print_report(report: FACReport, anchor: Dataset | None, featurizer: SAEFeaturizer | None, top: int) -> None:
    """Prints FAC and the strongest missing features, each with the row of the scored anchor set that activates it most,
    where there are rows. Without a featurizer the token is not marked."""
    from ..coverage.report import active_when
    from ..coverage.row_shares import strongest_rows

    console.print()
    console.print(f"[bold]{report.headline()}[/bold]", markup=True, highlight=False)
    for line in report.facts():
        console.print(line, highlight=False)
    shown = report.missing[:top]
    if not len(shown):
        return
    table = Table(title="Strongest missing features", title_justify="left", show_lines=False)
    table.add_column("feature", justify="right")
    table.add_column("anchor rows", justify="right")
    table.add_column("max", justify="right")
    figures = report.to_pandas().set_index("feature").loc[shown]
    texts = [[] for _ in shown]
    if anchor is not None:
        table.add_column("anchor text that activates it most", overflow="fold")
        strongest = strongest_rows(anchor, shown, active_when(report))
        texts = [[_strongest_text(anchor, i, strongest[i].row, featurizer)] for i in shown.tolist()]
    for one, text in zip(figures.itertuples(), texts, strict=True):
        table.add_row(str(one.Index), f"{one.anchor_support:,}", f"{one.anchor_max:.1f}", *text)
    console.print(table, soft_wrap=False)


def _strongest_text(anchor: Dataset, feature: int, row: int, featurizer: SAEFeaturizer | None) -> Text | str:
    if featurizer is None:
        return row_line(anchor[row])
    reading = featurizer.read([anchor[row]], positions=True)
    position = int(reading.positions[reading.activations.indices == feature][0])
    return marked_text(featurizer.span(anchor[row], position), "...")


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
        table.add_row(*(f"{figure:,.0f}" for figure in figures), f"{row['share']:.1f}", row_line(data[number]))
    console.print(table, soft_wrap=False)


def row_line(row: dict[str, Any]) -> str:
    """Returns the start of what a row's columns of text hold, on one line."""
    return one_line(row_text(row).strip())[:120]
