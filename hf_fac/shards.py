"""Score a large data set in shards: a folder of Parquet files, each whole or not there, so that a stopped run goes on.

`datasets.map` starts over after a fault; this does not. Several processes can share one folder.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from .conversations import RowError
from .journal import differences, write_whole
from .scorer import COLUMNS, FACScorer

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

    A shard that is there already is not scored again. A file appears when it is whole, under
    `shard-00003-of-00012.parquet`; `measurement.json` beside them says what was scored and how.

    Args:
        shard_rows: rows in a file, and what a fault can cost.
        rank, world_size: every world_size-th shard, from the rank-th on, is this process's; by default what torchrun
            and accelerate put into RANK and WORLD_SIZE.
    Raises: ValueError when the folder holds shards of other data, or measured otherwise; RowError for a row that cannot
        be read.
    """
    from datasets import Dataset

    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"dataset is a {type(dataset).__name__}, which has no shards of its own: pass a datasets.Dataset (one "
            "split; save a stream with Dataset.from_generator), or map the stream with FACScorer."
        )
    rank = int(os.environ.get("RANK", 0)) if rank is None else rank
    world_size = int(os.environ.get("WORLD_SIZE", 1)) if world_size is None else world_size
    if not 0 <= rank < world_size or shard_rows < 1:
        raise ValueError(f"rank {rank} of {world_size} processes and shard_rows {shard_rows} make no shards.")
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    dataset = dataset.remove_columns([name for name in COLUMNS if name in dataset.column_names])
    _check_manifest(folder / _MANIFEST, featurizer, dataset, shard_rows)
    scorer = FACScorer(featurizer)
    starts = range(0, len(dataset), shard_rows)
    files = []
    for number, start in list(enumerate(starts))[rank::world_size]:
        file = folder / f"shard-{number:05d}-of-{len(starts):05d}.parquet"
        files.append(file)
        if file.exists():
            continue
        stop = min(start + shard_rows, len(dataset))
        try:
            scored = dataset.select(range(start, stop)).map(
                scorer,
                batched=True,
                batch_size=min(shard_rows, 1000),
                features=scorer.features(dataset.features),
                load_from_cache_file=False,
                keep_in_memory=True,
                desc=f"Scoring shard {number + 1} of {len(starts)}",
            )
        except RowError as error:
            raise RowError(f"In rows {start} to {stop - 1}, counted from a multiple of 1,000: {error}") from error
        # Not *.parquet, so that no reader takes half a file for a shard.
        partial = file.with_suffix(f".{os.getpid()}.partial")
        scored.to_parquet(partial)
        os.replace(partial, file)
    return files


def _check_manifest(path: Path, featurizer: SAEFeaturizer, dataset: Dataset, shard_rows: int) -> None:
    import xxhash

    probe = [dataset[i] for i in sorted({0, len(dataset) // 2, len(dataset) - 1})] if len(dataset) else []
    manifest = {
        "measurement": featurizer.measurement,
        "rows": len(dataset),
        "shard_rows": shard_rows,
        "data": xxhash.xxh3_64_hexdigest(json.dumps(probe, sort_keys=True, default=repr).encode()),
    }
    if path.exists():
        if values := differences(json.loads(path.read_text()), manifest):
            raise ValueError(f"{path.parent} holds shards of another run ({values}): choose another folder.")
        return
    write_whole(path, json.dumps(manifest, indent=1))
