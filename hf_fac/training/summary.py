"""What the callback tells of a run: a section of the model card, a table for trackers, a report of each round, and the
enlarged set in one file. None of it may end a run that was paid for.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, List, Value

from ..hub.cards import PAPER, table
from ..storage.files import write_whole
from ..storage.parquet import write_parquet


def model_card_section(summary: dict[str, float]) -> str:
    """Returns a section of the model card, in Markdown."""
    numbers = {name.removeprefix("fac/"): value for name, value in summary.items()}
    trained_on = numbers["new_rows"] - numbers["dropped"]
    text = (
        f"{trained_on:,} rows of the training set were synthesized for features that its other rows activate "
        "too seldom or not at all"
    )
    if numbers["dropped"]:
        text += f" ({numbers['dropped']:,} more were dropped by the trainer's own filters)"
    figures = []
    if "before" in numbers:
        text += (
            ". Feature Activation Coverage (FAC), the share of an anchor set's features that the training set "
            f"activates too, went from {numbers['before']:.3f} to {numbers['after']:.3f}"
        )
        rows = {
            "FAC before": f"{numbers['before']:.3f}, {numbers['missing']:,} features missing",
            "FAC after": f"{numbers['after']:.3f}",
            "features activated by rows written for them": numbers["activated"],
            "features given up": numbers["exhausted"],
            "rows written": numbers["new_rows"],
            "completions asked for": numbers["requests"],
        }
        figures = [
            table(("figure", "value"), rows.items()),
            "FAC says what the training set activates in the model, not how good the trained model is.",
        ]
    return "\n\n".join(["## FAC Synthesis", f"{text} ([arXiv 2602.10388]({PAPER}), hf-fac).", *figures])


def log_table(rows: Dataset, report_to: list[str]) -> None:
    """Log rows to the trackers that have tables, conversations as JSON."""
    table = rows.to_pandas()
    for name, kind in rows.features.items():
        if not isinstance(kind, Value):
            table[name] = [json.dumps(value, ensure_ascii=False) for value in rows[name]]
    for name in ("wandb", "trackio"):
        if name in report_to:
            tracker = importlib.import_module(name)
            tracker.log({"fac/rows": tracker.Table(dataframe=table)})


def write_report(new: dict[str, Any], path: Path) -> None:
    """Append a round to those of earlier epochs; rounds of later epochs belong to an earlier run and go."""
    rounds = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    write_whole(path, json.dumps([*(found for found in rounds if found["epoch"] < new["epoch"]), new], indent=1))


def write_enlarged(own_rows: Dataset, new: Dataset, path: Path) -> None:
    """Write the trainer's own rows and the new ones. What only some have, columns and keys, is null in the others."""
    # A key that is null in all rows has a type that pyarrow cannot join with another.
    typed = [rows.cast(_without_nulls(rows.features)).with_format("arrow") for rows in (own_rows, new)]
    write_parquet(Dataset(pa.concat_tables([rows[:] for rows in typed], promote_options="permissive")), path)


def _without_nulls(kind: Any) -> Any:
    if isinstance(kind, Value):
        return Value("string") if kind.dtype == "null" else kind
    if isinstance(kind, List):
        return List(_without_nulls(kind.feature), length=kind.length)
    if isinstance(kind, dict):
        return type(kind)({name: _without_nulls(part) for name, part in kind.items()})
    return kind
