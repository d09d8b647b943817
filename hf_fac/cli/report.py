"""The commands of `hf-fac` that write pages to look at: `report` for one data set, `compare` for several."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ..storage.files import try_output
from .data import DataOptions, measure
from .features import FeatureOptions, load_dictionary
from .options import MeasuringOptions, ThresholdOptions
from .output import console

if TYPE_CHECKING:
    from ..coverage.comparison import Comparison
    from ..coverage.report import FACReport
    from ..dictionary.dictionary import FeatureDictionary

Page = Annotated[Path, typer.Option("--output", "-o", dir_okay=False, help="The page, one HTML file.")]
Reference = Annotated[str | None, typer.Option("--anchor", help="The reference data set, scored rows or a coverage.")]


def report(
    source: Annotated[
        str, typer.Argument(help="A report of `hf-fac missing`; or a data set, scored rows or a coverage.")
    ],
    output: Page,
    reading: DataOptions,
    measuring: MeasuringOptions,
    delta: ThresholdOptions,
    anchor: Reference = None,
    data: Annotated[
        str | None, typer.Option(help="For a saved report: its data set, for the rows that bring most.")
    ] = None,
    dictionary: Annotated[
        str | None, typer.Option(help="Folder or Hub repo: what features mean; by default the embedded one.")
    ] = None,
    synthesis: Annotated[
        Path | None, typer.Option(file_okay=False, help="Folder of `hf-fac synthesize`: what was written.")
    ] = None,
    title: Annotated[str | None, typer.Option(help="The page's title.")] = None,
) -> dict[str, Any]:
    """Write one HTML file with what a data set covers of an anchor set and what it misses, to look at in a browser."""
    from ..coverage.report import FACReport
    from ..synthesis.report import SynthesisResult

    try_output(output)
    is_saved = _is_report(Path(source))
    if not is_saved and (anchor is None or data is not None):
        raise typer.BadParameter(
            f"{source} is no report of hf-fac missing: give its --anchor, or give a saved report with its --data."
        )
    if is_saved and (delta.threshold is not None or delta.relative is not None):
        raise typer.BadParameter(f"{source} has its delta: give --threshold and --relative to hf-fac missing.")
    written = None if synthesis is None else SynthesisResult.load(synthesis)
    names = {"data set": data if is_saved else source, "anchor set": anchor}
    measured, _ = measure({title: name for title, name in names.items() if name is not None}, reading, measuring)
    if is_saved:
        found = FACReport.load(source)
    else:
        found = measured["data set"].coverage.compare(measured["anchor set"].coverage, **asdict(delta))
    known = _dictionary(dictionary, found)
    rows = {name: measured[f"{name} set"].rows for name in ("data", "anchor") if f"{name} set" in measured}
    named = {} if title is None else {"title": title}
    found.to_html(output, dictionary=known, synthesis=written, **rows, **named)
    console.print(f"{found.headline()}\nWritten to {output}: open it in a browser.", highlight=False)
    return {"fac": found.fac, "interval": found.interval, "missing": len(found.missing), "output": output}


def compare(
    data: Annotated[list[str], typer.Argument(help="Data sets, folders of scored rows, or coverages.")],
    anchor: Annotated[str, typer.Option(help="The reference data set, scored rows or a coverage.")],
    reading: DataOptions,
    measuring: MeasuringOptions,
    delta: ThresholdOptions,
    which: FeatureOptions,
    html: Annotated[Path | None, typer.Option(dir_okay=False, help="Also write a page, one HTML file.")] = None,
) -> dict[str, Any]:
    """Compare several data sets, or versions of one, with one anchor set at one delta."""
    from ..coverage.comparison import compare as compare_coverages

    if repeated := [name for name in data if data.count(name) > 1]:
        raise typer.BadParameter(f"{repeated[0]} is given twice: give each data set once.")
    if html:
        try_output(html)
    chosen = which.chosen(is_embedded=measuring.model is None)
    measured, _ = measure({name: name for name in data} | {"anchor set": anchor}, reading, measuring, chosen)
    found = compare_coverages(
        {name: measured[name].coverage for name in data},
        measured["anchor set"].coverage,
        features=None if chosen is None else chosen.ids,
        **asdict(delta),
    )
    table = found.to_pandas()
    print_comparison(found)
    if html:
        found.to_html(html)
        console.print(f"The page is in {html}: open it in a browser.")
    return {"data_sets": table.reset_index(names="data").to_dict("records"), "output": html}


def print_comparison(found: Comparison) -> None:
    """Prints FAC of each data set, and what it alone covers."""
    table = Table(title="Data sets beside the anchor set", title_justify="left", caption_justify="left")
    table.add_column("data", overflow="fold")
    for column in ("rows", "tokens\na row", "FAC,\ninterval", "covered", "it\nalone", "cosine"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in found.to_pandas().itertuples():
        table.add_row(
            row.Index, f"{row.rows:,}", f"{row.mean_tokens:.1f}", f"{row.fac:.3f}\n{row.low:.3f}-{row.high:.3f}",
            f"{row.covered:,}", f"{row.alone:,}", f"{row.frequency_cosine:.3f}",
        )  # fmt: skip
    first = next(iter(found.reports.values()))
    table.caption = (
        f"of {len(first.covered) + len(first.missing):,} features of {first.anchor_rows:,} anchor rows; "
        f"delta: {first.threshold_source}\ncosine: how often features are active, beside the anchor"
    )
    console.print(table, soft_wrap=False)


def _is_report(path: Path) -> bool:
    if path.suffix != ".json" or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(9) == b'{"hf_fac"'


def _dictionary(name: str | None, report: FACReport) -> FeatureDictionary | None:
    """The dictionary of the name; without one the embedded, where it describes the report's features."""
    known = load_dictionary(name, is_embedded=True)
    return known if name or known.measurement["fingerprint"] == report.measurement["fingerprint"] else None
