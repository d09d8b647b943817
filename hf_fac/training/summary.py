"""What `FACSynthesisCallback` tells of a run: a paragraph for the model card, a table for trackers, the report of each
turn, and the whole set in one file. By-products all: none of them may end a run that is paid for.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value, concatenate_datasets

from ..storage.files import write_whole
from ..storage.parquet import write_parquet

_FIRST = ("fac/before", "fac/missing")  # of the first turn; later ones find what is there by then
_SUMMED = ("fac/synthesized", "fac/requests", "fac/completion_tokens")


def summed_up(earlier: dict[str, float], turn: dict[str, float]) -> dict[str, float]:
    """Returns the numbers of a run, by name, after one more turn."""
    both = earlier | turn
    both |= {name: earlier[name] for name in _FIRST if name in earlier}
    return both | {name: earlier.get(name, 0) + turn.get(name, 0) for name in _SUMMED if name in both}


def paragraph(summary: dict[str, float]) -> str:
    """Returns a section of the model card."""
    numbers = {name.removeprefix("fac/"): value for name, value in summary.items()}
    trained_on = numbers["new_rows"] - numbers["dropped"]
    text = f"{trained_on:,} rows of the training set were synthesized for features that it did not activate"
    if numbers["dropped"]:
        text += f" ({numbers['dropped']:,} more were dropped by the trainer's own filters)"
    if "before" in numbers:
        text += (
            f". Against an anchor set it was missing {numbers['missing']:,} features, {numbers['filled']:,} were "
            f"filled. Feature Activation Coverage (FAC) went from {numbers['before']:.3f} to {numbers['after']:.3f}"
        )
    return f"## FAC Synthesis\n\n{text} ([arXiv 2602.10388](https://arxiv.org/abs/2602.10388), hf-fac)."


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


def write_report(turn: dict[str, Any], path: Path) -> None:
    """Put a turn behind those of earlier epochs; later ones are of a run that was begun anew."""
    turns = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    earlier = [other for other in turns if other["epoch"] < turn["epoch"]]
    write_whole(path, json.dumps([*earlier, turn], indent=1))


def write_enlarged(seed: Dataset, new: Dataset, path: Path) -> None:
    """Write seed and new rows; where the two say a column differently (more keys in messages), in the seed's way."""
    if "chosen" in new.column_names and ("prompt" in seed.column_names) != ("prompt" in new.column_names):
        # DPOTrainer split its pairs, which the task does not, or the other way round.
        seed, new = _with_whole_pairs(seed), _with_whole_pairs(new)
    # A key that is null in all rows has a type that nothing can be cast to.
    theirs, ours = _without_nulls(seed.features), _without_nulls(new.features)
    if theirs != seed.features:
        seed = seed.cast(theirs)
    new = new.cast(Features({name: theirs.get(name, kind) for name, kind in ours.items()}))
    write_parquet(concatenate_datasets([seed, new]), path)


def _with_whole_pairs(rows: Dataset) -> Dataset:
    if "prompt" not in rows.column_names:
        return rows
    return rows.map(
        lambda row: {side: row["prompt"] + row[side] for side in ("chosen", "rejected")},
        remove_columns="prompt", desc="Putting prompts before the completions", keep_in_memory=True,
        load_from_cache_file=False,
    )  # fmt: skip


def _without_nulls(kind: Any) -> Any:
    if isinstance(kind, Value):
        return Value("string") if kind.dtype == "null" else kind
    if isinstance(kind, List):
        return List(_without_nulls(kind.feature), length=kind.length)
    if isinstance(kind, dict):
        return type(kind)({name: _without_nulls(part) for name, part in kind.items()})
    return kind
