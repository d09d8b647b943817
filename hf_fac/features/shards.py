"""Score a large data set in shards: a folder of Parquet files, each whole or not there, so that a stopped run goes on.

`datasets.map` starts over after a fault; this does not. Several processes can share one folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from ..storage.differences import differences
from ..storage.files import try_output, write_whole
from ..storage.parquet import read_note, rows_digest, write_parquet
from ..storage.ranks import rank_and_world_size
from ..storage.scored_rows import COLUMNS
from ..storage.validation import check_counts, checked
from .scoring import FACScorer

if TYPE_CHECKING:
    from datasets import Dataset

    from .featurizer import SAEFeaturizer

_MANIFEST = "measurement.json"


def score_shards(
    featurizer: SAEFeaturizer,
    dataset: Dataset,
    output_dir: str | Path,
    *,
    shard_rows: int = 5000,
    rank: int | None = None,
    world_size: int | None = None,
) -> list[Path]:
    """Returns the Parquet files of this process's shards, in order; each holds rows with `FACScorer`'s columns.

    A shard of the same rows that is there already is not scored again. A file appears when it is whole, under
    `shard-00003-of-00012.parquet`, with a hash of its rows in its metadata; `measurement.json` beside them says how
    they were scored.

    Args:
        shard_rows: rows in a file, and what a fault can cost.
        rank, world_size: every world_size-th shard, from the rank-th on, is this process's; by default what torchrun
            and accelerate put into RANK and WORLD_SIZE.
    Raises: ValueError when the folder holds shards of other rows, or measured with another featurizer; RowError for a
        row that cannot be read; OSError when nothing can be written there.
    """
    from datasets import Dataset

    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"dataset is a {type(dataset).__name__}, which cannot be cut into shards: pass a datasets.Dataset (one "
            "split; save a stream with Dataset.from_generator), or map the stream with FACScorer."
        )
    rank, world_size = rank_and_world_size(rank, world_size)
    check_counts(shard_rows=shard_rows)
    folder = Path(output_dir)
    try_output(folder, folder=True)
    dataset = dataset.remove_columns([name for name in COLUMNS if name in dataset.column_names])
    _check_manifest(folder / _MANIFEST, featurizer, dataset, shard_rows)
    starts = range(0, len(dataset), shard_rows)
    shards = {
        folder / f"shard-{number:05d}-of-{len(starts):05d}.parquet": range(start, min(start + shard_rows, len(dataset)))
        for number, start in list(enumerate(starts))[rank::world_size]
    }
    fingerprint = featurizer.measurement["fingerprint"]
    written = [file for file in shards if file.exists()]
    for file in written:
        _check_shard(file, dataset, shards[file], fingerprint)
    scorer = FACScorer(featurizer)
    for file in [file for file in shards if file not in written]:
        _score_shard(scorer, dataset, shards[file], file, fingerprint)
    return list(shards)


def _score_shard(scorer: FACScorer, dataset: Dataset, part: range, file: Path, fingerprint: str) -> None:
    rows = dataset.select(part)
    scored = rows.map(
        scorer,
        batched=True,
        batch_size=min(len(part), 1000),
        with_indices=True,
        fn_kwargs={"first_row": part.start},
        features=scorer.features(dataset.features),
        load_from_cache_file=False,
        keep_in_memory=True,
        desc=f"Scoring {file.stem}",
    )
    write_parquet(scored, file, note={"shard": file.name, "fingerprint": fingerprint, "rows": rows_digest(rows)})


def _check_manifest(path: Path, featurizer: SAEFeaturizer, dataset: Dataset, shard_rows: int) -> None:
    manifest = {"measurement": featurizer.measurement, "rows": len(dataset), "shard_rows": shard_rows}
    # Looked for before the manifest, because another process writes its manifest before its shards.
    shard = next(path.parent.glob("shard-*-of-*.parquet"), None)
    if path.exists():
        found = checked(dict, path.read_bytes(), str(path), "choose another folder")
        if values := differences(found, manifest):
            raise ValueError(f"{path.parent} holds shards of another run ({values}): choose another folder.")
        return
    if shard is not None:
        raise ValueError(
            f"{shard} lies there without {path.name}, which says how it was scored: choose another folder."
        )
    write_whole(path, json.dumps(manifest, indent=1), keep_first=True)


def _check_shard(file: Path, dataset: Dataset, part: range, fingerprint: str) -> None:
    note = read_note(file)
    if note is None:
        problem = "was not written by score_shards, or is not whole"
    elif note["fingerprint"] != fingerprint:
        problem = "was scored with another model, SAE or setting"
    elif note["rows"] != rows_digest(dataset.select(part)):
        problem = f"does not hold what is now in rows {part[0]} to {part[-1]} of the data"
    else:
        return
    raise ValueError(f"{file} {problem}: choose another folder, or delete the file to have these rows scored again.")
