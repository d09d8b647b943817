"""Data sets of the command line: read from files, folders and the Hub, and scored."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..storage.differences import differences
from ..storage.scored_rows import is_scored
from ..storage.validation import read_measurement
from .output import console

if TYPE_CHECKING:
    from datasets import Dataset

    from ..dictionary.dictionary import FeatureDictionary
    from ..features.featurizer import SAEFeaturizer

_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def load_data(name: str, split: str = "train") -> Dataset:
    """Returns a data set from a file, a folder or the Hub; a folder and a Hub data set as `load_dataset` reads them.

    Some inputs hold one set of rows and are read for any split: a file, the shards of `hf-fac score`, the samples
    of `hf-fac synthesize`, and a single data set saved by `save_to_disk`.

    Raises: typer.BadParameter for what is not there or holds no rows.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError, DatasetsError

    path = Path(name)
    if path.is_file() and path.suffix not in _FORMATS:
        raise typer.BadParameter(f"{name}: expected a file ending in {', '.join(_FORMATS)}.")
    if not path.exists() and (path.suffix in _FORMATS or name.startswith((".", "/"))):
        raise typer.BadParameter(f"{name} does not exist.")
    written = _written_by_us(path)
    try:
        if path.is_file():
            return load_dataset(_FORMATS[path.suffix], data_files=name, split="train")
        if written:
            return load_dataset("parquet", data_files=[str(file) for file in written], split="train")
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            return _saved_to_disk(name, split)
        # An absolute path, because a folder's name can be that of a file format.
        return load_dataset(str(path.resolve()) if path.is_dir() else name, split=split)
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


def load_dictionary(name: str | None, *, is_embedded: bool) -> FeatureDictionary | None:
    """Returns the dictionary of a folder or a Hub repo; without a name the embedded one, if that model measures."""
    if name is not None:
        from ..dictionary.dictionary import FeatureDictionary

        return FeatureDictionary.from_pretrained(name)
    if is_embedded:
        from ..embedded.loader import load_dictionary

        return load_dictionary()
    return None


def check_measured(sets: dict[str, Dataset], measurement: dict[str, Any], expected: str = "these options say") -> None:
    """Raises typer.BadParameter, with what differs, where data sets, by name, were scored in another way."""
    for name, dataset in sets.items():
        if "fac_measurement" not in dataset.column_names or not len(dataset):
            continue
        theirs = read_measurement(dataset[0]["fac_measurement"], f"{name}: fac_measurement", "score its rows again")
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
