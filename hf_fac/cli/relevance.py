"""`hf-fac relevant`: which features matter for a task, found in labels, scores or a contrast."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..storage.files import try_output
from ..storage.scored_rows import is_scored
from . import options as opt
from .data import DataOptions, check_measured, column_names, scored
from .options import MeasuringOptions
from .output import console


def relevant(
    data: opt.Data,
    output: Annotated[Path, typer.Option("--output", "-o", dir_okay=False, help="The features, as JSON.")],
    reading: DataOptions,
    measuring: MeasuringOptions,
    label_column: Annotated[str | None, typer.Option(help="Column of the rows' classes.")] = None,
    score_column: Annotated[str | None, typer.Option(help="Column of the rows' scores, numbers.")] = None,
    background: Annotated[
        str | None, typer.Option(help="A data set of other rows: find what the data activates more often.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="delta with --background; by default calibrated on the data.")
    ] = None,
    fdr: Annotated[float, typer.Option(help="The largest expected share of false features among the selected.")] = 0.05,
    seed: opt.Seed = 0,
) -> dict[str, Any]:
    """Find the features that matter for a task, by labels, by scores, or beside a background set.

    Give one of --label-column, --score-column and --background. Other commands take the file as --features.
    """
    from ..coverage.relevance import features_from_contrast, features_from_labels, features_from_outcome

    if sum(one is not None for one in (label_column, score_column, background)) != 1:
        raise typer.BadParameter("Give one of --label-column, --score-column and --background.")
    if threshold is not None and background is None:
        raise typer.BadParameter("--threshold goes with --background: labels and scores need no delta.")
    if not 0 < fdr < 1:
        raise typer.BadParameter(f"--fdr is {fdr}; it must be a number between 0 and 1.")
    try_output(output)
    sets = {name: reading.load(name) for name in (data, background) if name is not None}
    for option, column in (("--label-column", label_column), ("--score-column", score_column)):
        if column is not None and column not in sets[data].column_names:
            raise typer.BadParameter(f"{option}: {data} has no column {column!r} but {column_names(sets[data])}.")
    if not all(map(is_scored, sets.values())):
        featurizer = measuring.featurizer()
        check_measured(sets, featurizer.measurement)
        sets = {name: scored(rows, featurizer, "data set") for name, rows in sets.items()}
    rows, chosen = sets[data], {"fdr": fdr, "seed": seed}
    if label_column is not None:
        found = features_from_labels(rows, rows[label_column], **chosen)
    elif score_column is not None:
        found = features_from_outcome(rows, rows[score_column], **chosen)
    else:
        found = features_from_contrast(rows, sets[background], threshold=threshold, **chosen)
    found.save(output)
    console.print(f"{found}\nWritten to {output}.", highlight=False)
    return {
        "source": found.source, "tested": found.tested, "passed": found.passed, "features": found.ids, "output": output,
    }  # fmt: skip
