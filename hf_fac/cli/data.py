"""Data sets of the command line: read from files, folders and the Hub, and scored."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple

import typer

from ..storage.differences import differences
from ..storage.scored_rows import MEASUREMENT, is_scored
from ..storage.validation import read_measurement
from .features import ChosenFeatures
from .options import MeasuringOptions
from .output import console

if TYPE_CHECKING:
    from datasets import Dataset

    from ..coverage.coverage import FeatureCoverage
    from ..features.featurizer import SAEFeaturizer

_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
COVERAGE = ".safetensors"
_RANK = re.compile(rf"coverage-(\d+)-of-(\d+){re.escape(COVERAGE)}")
EMBEDDED = "embedded"


def coverage_name(rank: int = 0, world_size: int = 1) -> str:
    """Returns the name of the file in which a process saves its coverage."""
    return f"coverage-{rank:05d}-of-{world_size:05d}{COVERAGE}" if world_size > 1 else f"coverage{COVERAGE}"


def rank_of_coverage(file: Path) -> tuple[int, int] | None:
    """Returns rank and world size in the name that `coverage_name` gave a file; None for other names."""
    found = _RANK.fullmatch(file.name)
    return (int(found[1]), int(found[2])) if found else None


@dataclass(frozen=True)
class DataOptions:
    """How data sets are read: which part of them, and the columns of those that have other names than TRL's."""

    title: ClassVar[str] = "How data sets are read"
    split: Annotated[str, typer.Option(help="The split of a Hub data set or folder.")] = "train"
    dataset_config: Annotated[str | None, typer.Option(help="The configuration of a Hub data set.")] = None
    prompt_column: Annotated[str | None, typer.Option(help="The column with what users wrote.")] = None
    completion_column: Annotated[
        str | None, typer.Option(help="The column with the answers; needs --prompt-column.")
    ] = None
    text_column: Annotated[str | None, typer.Option(help="The column with plain text.")] = None

    def load(self, name: str, *, is_anchor: bool = False) -> Dataset:
        """Returns a data set, its columns as TRL's. An anchor set may have TRL's columns already.

        Raises: typer.BadParameter as `load_data` does, and for columns that the data set lacks.
        """
        if self.completion_column and not self.prompt_column:
            raise typer.BadParameter("--completion-column needs --prompt-column: an answer follows what a user wrote.")
        if self.text_column and self.prompt_column:
            raise typer.BadParameter("Give --text-column, or --prompt-column: rows are plain text or conversations.")
        dataset = load_data(name, self.split, self.dataset_config)
        if is_scored(dataset):
            return dataset
        given = {
            "prompt": self.prompt_column, "completion": self.completion_column, "text": self.text_column,
        }  # fmt: skip
        columns = {ours: theirs for ours, theirs in given.items() if theirs is not None}
        absent = [theirs for theirs in columns.values() if theirs not in dataset.column_names]
        if is_anchor and absent:
            return dataset
        if absent:
            raise typer.BadParameter(f"{name} has no column {absent[0]!r} but {column_names(dataset)}.")
        return _with_columns(dataset, columns) if columns else dataset


def _with_columns(dataset: Dataset, columns: Mapping[str, str]) -> Dataset:
    """The rows as TRL's types: plain text, or a user's message and the assistant's."""
    from ..inputs.rows import COLUMN_ROLES, ROW_TYPES

    known = {name for names in ROW_TYPES.values() for name in names}
    taken = [name for name in dataset.column_names if name in known or name in columns.values()]
    roles = {ours: COLUMN_ROLES.get(ours) for ours in columns}

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        return {
            ours: row[theirs] if roles[ours] is None else [{"role": roles[ours], "content": row[theirs]}]
            for ours, theirs in columns.items()
        }

    return dataset.map(convert, remove_columns=taken, desc="Reading the columns")


def column_names(dataset: Dataset) -> str:
    """Returns the names of a data set's own columns, in words."""
    return ", ".join(name for name in dataset.column_names if not name.startswith("fac_"))


def load_data(name: str, split: str = "train", config: str | None = None) -> Dataset:
    """Returns a data set from a file, a folder or the Hub; a folder and a Hub data set as `load_dataset` reads them.

    Some inputs hold one set of rows and are read for any split: a file, the shards of `hf-fac score`, the samples
    of `hf-fac synthesize`, a single data set saved by `save_to_disk`, and "embedded", the package's anchor set.

    Raises: typer.BadParameter for what is not there or holds no rows.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError, DatasetsError

    path = Path(name)
    if name == EMBEDDED and not path.exists():
        from ..embedded.loader import load_anchor

        return load_anchor()
    if path.is_file() and path.suffix not in _FORMATS:
        raise typer.BadParameter(f"{name}: expected a file ending in {', '.join(_FORMATS)}.")
    if not path.exists() and (path.suffix in _FORMATS or name.startswith((".", "/"))):
        raise typer.BadParameter(f"{name} does not exist: expected a file, a folder, or the name of a Hub data set.")
    written = _written_by_us(path)
    try:
        if path.is_file():
            return load_dataset(_FORMATS[path.suffix], data_files=name, split="train")
        if written:
            return load_dataset("parquet", data_files=[str(file) for file in written], split="train")
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            return _saved_to_disk(name, split)
        # An absolute path, because a folder's name can be that of a file format.
        return load_dataset(str(path.resolve()) if path.is_dir() else name, config, split=split)
    except (DatasetsError, StopIteration, OSError, RuntimeError, ValueError) as error:
        where = "" if path.exists() else "there is no such file or folder here, and on the Hub: "
        reason = error.__cause__ if type(error) is DatasetGenerationError else error
        raise typer.BadParameter(
            f"{name} (split {split}) cannot be read as a data set: {where}{str(reason)[:400] or 'it is empty'} "
            "(expected: one row or more, in files that load_dataset reads)."
        ) from error


def _written_by_us(folder: Path) -> list[Path]:
    """The Parquet files in a folder of `hf-fac score` or `hf-fac synthesize` that hold rows."""
    from ..storage.parquet import read_note

    if (folder / "dropped.parquet").exists() and (folder / "samples.parquet").exists():
        return [folder / "samples.parquet"]
    if not (folder / "measurement.json").exists():
        return []
    shards = sorted(folder.glob("shard-*-of-*.parquet"))
    if shards and len(shards) < (n := int(shards[0].stem.rpartition("-")[2])):
        raise typer.BadParameter(
            f"{folder} holds {len(shards)} of {n} shards: run the same hf-fac score again to finish them."
        )
    for file in shards:
        if (read_note(file) or {}).get("shard") != file.name:
            raise typer.BadParameter(f"{file} is not what hf-fac score wrote there: score the rows into a new folder.")
    return shards


def _saved_to_disk(name: str, split: str) -> Dataset:
    from datasets import DatasetDict, load_from_disk

    found = load_from_disk(name)
    if not isinstance(found, DatasetDict):
        return found
    if split not in found:
        raise ValueError(f"it has no such split, but {', '.join(found)}")
    return found[split]


class Measured(NamedTuple):
    """A data set's coverage, and its scored rows where there are any: none for a coverage that was merged."""

    coverage: FeatureCoverage
    rows: Dataset | None


def measure(
    sets: Mapping[str, str],
    reading: DataOptions,
    measuring: MeasuringOptions,
    chosen: ChosenFeatures | None = None,
) -> tuple[dict[str, Measured], SAEFeaturizer | None]:
    """Returns each data set by its title, and the featurizer; None where all were measured before.

    Options of measuring are held against sets that were measured before only where another set is measured now.

    Args:
        sets: by title, names of data sets, or of files that hold a coverage. The title "anchor set" is the anchor's.
        chosen: features that have to be of the same model and SAE.
    Raises: typer.BadParameter where that is not so, before anything is measured.
    """
    from ..coverage.coverage import FeatureCoverage

    found = {title: _coverage_or_rows(name, title, reading) for title, name in sets.items()}
    featurizer = None
    if any(not isinstance(one, FeatureCoverage) and not is_scored(one) for one in found.values()):
        featurizer = measuring.featurizer()
        check_measured({sets[title]: one for title, one in found.items()}, featurizer.measurement)
        if chosen is not None:
            chosen.check(featurizer.measurement)
    measured = {}
    for title, one in found.items():
        if isinstance(one, FeatureCoverage):
            measured[title] = Measured(one, None)
        else:
            rows = scored(one, featurizer, title)
            measured[title] = Measured(FeatureCoverage.from_dataset(rows), rows)
    if chosen is not None and featurizer is None:
        chosen.check(next(iter(measured.values())).coverage.measurement)
    return measured, featurizer


def _coverage_or_rows(name: str, title: str, reading: DataOptions) -> FeatureCoverage | Dataset:
    from ..coverage.coverage import FeatureCoverage

    if Path(name).suffix != COVERAGE:
        return reading.load(name, is_anchor=title == "anchor set")
    if not Path(name).is_file():
        raise typer.BadParameter(f"{name} does not exist: expected a coverage of hf-fac score or hf-fac merge.")
    return FeatureCoverage.load(name)


def check_measured(
    sets: Mapping[str, Dataset | FeatureCoverage], measurement: dict[str, Any], expected: str = "these options say"
) -> None:
    """Raises typer.BadParameter, with what differs, where data sets, by name, were scored in another way."""
    from datasets import Dataset

    for name, one in sets.items():
        if not isinstance(one, Dataset):
            theirs = one.measurement
        elif MEASUREMENT in one.column_names and len(one):
            theirs = read_measurement(one[0][MEASUREMENT], f"{name}: {MEASUREMENT}", "score its rows again")
        else:
            continue
        if found := differences(theirs, measurement):
            raise typer.BadParameter(
                f"{name} was not measured as {expected} ({found}): score its rows again, with the same options."
            )


def scored(dataset: Dataset, featurizer: SAEFeaturizer | None, title: str) -> Dataset:
    """Returns the data set with the columns of `FACScorer`; one that has them stays as it is."""
    from ..features.left_out import LeftOut
    from ..features.scoring import FACScorer

    if is_scored(dataset):
        return dataset
    scorer = FACScorer(featurizer)
    featurizer.left_out = LeftOut()
    dataset = dataset.map(
        scorer, batched=True, with_indices=True, features=scorer.features(dataset.features), desc=f"Scoring the {title}"
    )
    print_left_out(featurizer, title, len(dataset))
    return dataset


def print_left_out(featurizer: SAEFeaturizer, title: str, rows: int) -> None:
    """Prints how many rows were cut or skipped, and how many of all `rows` an earlier run had scored."""
    read = featurizer.left_out.rows
    notes = [str(featurizer.left_out)] if str(featurizer.left_out) else []
    if read < rows:
        notes.append(f"{rows - read:,} rows were scored by an earlier run, which said what it left out.")
    if notes:
        console.print(f"The {title}: {' '.join(notes)}")
