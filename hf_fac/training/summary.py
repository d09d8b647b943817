"""What the callback tells of a run: a section of the model card, a table for trackers, a report of each round, and the
enlarged set in one file. None of it may end a run that was paid for.
"""

from __future__ import annotations

import importlib
import json
import os
import warnings
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value, concatenate_datasets

from ..storage.files import write_whole
from ..storage.parquet import write_parquet
from ..storage.validation import Strict, checked

_FIRST = ("fac/before", "fac/missing")  # of the first round; later ones find less
_SUMMED = ("fac/synthesized", "fac/dropped", "fac/requests", "fac/completion_tokens")


def summed_up(earlier: dict[str, float], new: dict[str, float]) -> dict[str, float]:
    """Returns the numbers of a run, by name, after one more round."""
    both = earlier | new
    both |= {name: earlier[name] for name in _FIRST if name in earlier}
    return both | {name: earlier.get(name, 0) + new.get(name, 0) for name in _SUMMED}


def model_card_section(summary: dict[str, float]) -> str:
    """Returns a section of the model card, in Markdown."""
    numbers = {name.removeprefix("fac/"): value for name, value in summary.items()}
    trained_on = numbers["new_rows"] - numbers["dropped"]
    text = f"{trained_on:,} rows of the training set were synthesized for features that it did not activate"
    if numbers["dropped"]:
        text += f" ({numbers['dropped']:,} more were dropped by the trainer's own filters)"
    if "before" in numbers:
        text += (
            f". Against an anchor set it was missing {numbers['missing']:,} features, {numbers['activated']:,} of them "
            "are activated by rows written for them. Feature Activation Coverage (FAC) went from "
            f"{numbers['before']:.3f} to {numbers['after']:.3f}"
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


class _Round(Strict):
    epoch: int


def write_report(new: dict[str, Any], path: Path) -> None:
    """Append a round to those of earlier epochs; rounds of later epochs belong to an earlier run and go.

    A file that holds anything else is renamed, with a UserWarning.
    """
    rounds: list[_Round] = []
    if path.exists():
        try:
            rounds = checked(list[_Round], path.read_bytes(), str(path), "it holds no list of rounds")
        except ValueError as error:
            aside = path.with_name(f"{path.stem}-unreadable{path.suffix}")
            os.replace(path, aside)
            warnings.warn(f"{error} It was renamed to {aside.name}.", stacklevel=2)
    earlier = [found.model_dump() for found in rounds if found.epoch < new["epoch"]]
    write_whole(path, json.dumps([*earlier, new], indent=1))


def write_enlarged(seed: Dataset, new: Dataset, path: Path) -> None:
    """Write the trainer's own rows and the new ones, in the types of the former (messages may have more keys there)."""
    if "chosen" in new.column_names and ("prompt" in seed.column_names) != ("prompt" in new.column_names):
        # DPOTrainer splits pairs that have no prompt of their own.
        seed, new = _with_whole_pairs(seed), _with_whole_pairs(new)
    # A key that is null in all rows has a type that nothing can be cast to.
    seed_types, new_types = _without_nulls(seed.features), _without_nulls(new.features)
    if seed_types != seed.features:
        seed = seed.cast(seed_types)
    new = new.cast(Features({name: seed_types.get(name, kind) for name, kind in new_types.items()}))
    write_parquet(concatenate_datasets([seed, new]), path)


def _with_whole_pairs(rows: Dataset) -> Dataset:
    if "prompt" not in rows.column_names:
        return rows
    return rows.map(
        lambda row: {side: row["prompt"] + row[side] for side in ("chosen", "rejected")},
        remove_columns="prompt", desc="Adding prompts to completions", keep_in_memory=True,
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
