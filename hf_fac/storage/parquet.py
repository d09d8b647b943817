"""Rows as Parquet files that are whole or not there, and a hash of what rows hold.

In: a `datasets.Dataset`. Out: a file with a note in its metadata, from which a later run knows what the file holds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import xxhash

from .files import whole_file

if TYPE_CHECKING:
    from datasets import Dataset

_ROWS_AT_ONCE = 1000
_NOTE = b"hf_fac"


def write_parquet(rows: Dataset, path: str | os.PathLike[str], *, note: dict[str, Any] | None = None) -> None:
    """Write a file that is whole or not there. `note` is JSON for the file's metadata, which `read_note` returns."""
    import pyarrow.parquet as pq

    schema = rows.features.arrow_schema
    if note is not None:
        schema = schema.with_metadata({**(schema.metadata or {}), _NOTE: json.dumps(note)})
    with whole_file(path) as partial, pq.ParquetWriter(partial, schema) as writer:
        for table in rows.with_format("arrow").iter(batch_size=_ROWS_AT_ONCE):
            writer.write_table(table.cast(schema))


def read_parquet(path: str | os.PathLike[str]) -> Dataset:
    """Returns what `write_parquet` wrote; datasets' own way would keep a copy in the cache."""
    import pyarrow.parquet as pq
    from datasets import Dataset

    return Dataset(pq.read_table(path))


def read_note(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Returns the note in a Parquet file's metadata, None where there is none or the file is not whole."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return json.loads((pq.read_schema(path).metadata or {}).get(_NOTE, b"null"))
    except (pa.ArrowInvalid, ValueError):
        return None


def row_hash(row: Any) -> int:
    """64 bits of a row's content."""
    return xxhash.xxh3_64_intdigest(json.dumps(row, sort_keys=True, default=repr).encode())


def digest_of_hashes(hashes: Iterable[int], *, after: str = "") -> str:
    """Returns a hash of rows in their order, from their `row_hash`es and the hash of the rows before them: 32
    hexadecimal digits."""
    digest = xxhash.xxh3_128(after.encode())
    for value in hashes:
        digest.update(value.to_bytes(8, "little"))
    return digest.hexdigest()


def rows_digest(rows: Dataset) -> str:
    """Returns a hash of the rows' content in their order, whatever they lie in: 32 hexadecimal digits."""
    parts = (rows.select(range(i, min(i + _ROWS_AT_ONCE, len(rows)))) for i in range(0, len(rows), _ROWS_AT_ONCE))
    return digest_of_hashes(row_hash(row) for part in parts for row in part.to_list())
