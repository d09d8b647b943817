"""`hf-fac relevant`, and the files of features that other commands take."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
import typer
from pydantic import NonNegativeInt

from ..storage.differences import differences
from ..storage.feature_ids import check_feature_ids
from ..storage.files import try_output
from ..storage.scored_rows import is_scored
from ..storage.validation import checked
from . import options as opt
from .data import check_measured, load_data, scored
from .options import MeasuringOptions
from .output import console

if TYPE_CHECKING:
    from datasets import Dataset
    from numpy.typing import ArrayLike


def relevant(
    data: opt.Data,
    output: Annotated[Path, typer.Option("--output", "-o", dir_okay=False, help="The features, as JSON.")],
    measuring: MeasuringOptions,
    label_column: Annotated[str | None, typer.Option(help="Column of the rows' classes.")] = None,
    score_column: Annotated[str | None, typer.Option(help="Column of the rows' scores, numbers.")] = None,
    background: Annotated[
        str | None, typer.Option(help="A data set of other rows: find what the data activates more often.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="delta with --background; by default calibrated on the data.")
    ] = None,
    split: opt.Split = "train",
    fdr: Annotated[float, typer.Option(help="The most to expect of false features among the selected.")] = 0.05,
    seed: opt.Seed = 0,
) -> None:
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
    sets = {name: load_data(name, split) for name in (data, background) if name is not None}
    for option, column in (("--label-column", label_column), ("--score-column", score_column)):
        if column is not None and column not in sets[data].column_names:
            raise typer.BadParameter(f"{option}: {data} has no column {column!r} but {_columns(sets[data])}.")
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


def _columns(dataset: Dataset) -> str:
    return ", ".join(name for name in dataset.column_names if not name.startswith("fac_"))


class ChosenFeatures(NamedTuple):
    """F_task. ids: of features. measurement: how they were found; None for a list of ids. name: of their file."""

    ids: ArrayLike
    measurement: dict[str, Any] | None
    name: str

    def check(self, measurement: dict[str, Any]) -> None:
        """Raises typer.BadParameter when they are not of the model and the SAE that the rows are measured with."""
        check_feature_ids(self.ids, measurement["d_sae"], name=self.name, may_repeat=True)
        if self.measurement is None or self.measurement.get("fingerprint") == measurement.get("fingerprint"):
            return
        parts = ({key: of.get(key) for key in ("model", "layer", "d_sae")} for of in (self.measurement, measurement))
        if found := differences(*parts):
            raise typer.BadParameter(f"{self.name} has features of another model or SAE than the rows ({found}).")

    def among(self, ids: np.ndarray) -> np.ndarray:
        """Returns those of the ids that were chosen, in the order of `ids`."""
        return ids[np.isin(ids, self.ids)]


def read_features(path: Path) -> ChosenFeatures:
    """Returns what a file of features holds. Raises: ValueError, with the file's name, for other content."""
    from ..coverage.relevance import RelevantFeatures

    content, name = path.read_bytes(), str(path)
    if content.lstrip()[:1] == b"[":
        remedy = "give what `hf-fac relevant` wrote, or a JSON list of ids"
        return ChosenFeatures(
            checked(list[NonNegativeInt], content, f"{name} holds no feature ids", remedy), None, name
        )
    found = RelevantFeatures.load(path)
    return ChosenFeatures(found.ids, found.measurement, name)
