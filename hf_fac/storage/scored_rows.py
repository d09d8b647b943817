"""The columns that scoring adds to rows: their names and types, and their one reader.

In: a scored `datasets.Dataset`, a stream or an Arrow table. Out: flat arrays of the feature ids and activations of some
rows at a time, checked. `FACScorer` writes the columns; coverage, selection and synthesis read them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, IterableDataset

FEATURES, ACTIVATIONS, TOKENS, MEASUREMENT = "fac_features", "fac_activations", "fac_tokens", "fac_measurement"
COLUMNS = (FEATURES, ACTIVATIONS, TOKENS, MEASUREMENT)
REMEDY = "score the rows with ds.map(FACScorer(featurizer), batched=True)"


def arrow_schema(columns: Sequence[str] = COLUMNS) -> pa.Schema:
    """Returns the Arrow types of the columns.

    fac_features: list<int32>, ids in ascending order. fac_activations: list<float32>, beside the ids. fac_tokens:
    int32, content tokens that counted. fac_measurement: string, JSON that says how the row was measured.
    """
    import pyarrow as pa

    types = {
        FEATURES: pa.list_(pa.int32()), ACTIVATIONS: pa.list_(pa.float32()), TOKENS: pa.int32(),
        MEASUREMENT: pa.string(),
    }  # fmt: skip
    return pa.schema([(name, types[name]) for name in columns])


def is_scored(dataset: Dataset) -> bool:
    """Returns whether a data set has all columns of scored rows."""
    return set(COLUMNS) <= set(dataset.column_names)


class ScoredRows(NamedTuple):
    """Some rows of a scored data set; a column that was not read has no entries.

    first_row: the number of the first row.
    features: int32 [n_activations], ids, row after row; they are not checked.
    activations: float32 [n_activations].
    starts: int64 [n_rows + 1], where the activations of each row start.
    tokens: int32 [n_rows].
    measurements: each distinct fac_measurement with the number of the first row that has it.
    """

    first_row: int
    features: np.ndarray
    activations: np.ndarray
    starts: np.ndarray
    tokens: np.ndarray
    measurements: list[tuple[int, str]]


def read_scored(table: pa.Table, *, columns: Sequence[str] = COLUMNS, first_row: int = 0) -> ScoredRows:
    """Returns the rows of an Arrow table.

    Args:
        columns: those to read, fac_features and fac_activations among them. Columns of other widths are converted.
        first_row: the number of the table's first row.
    Raises: ValueError for absent columns, other types, nulls, and rows whose two lists differ in length.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if absent := [name for name in columns if name not in table.column_names]:
        raise ValueError(f"the rows have no column {absent[0]!r}: {REMEDY}")
    try:
        parts = table.select(columns).cast(arrow_schema(columns))
    except pa.ArrowException as error:
        rows = f"rows {first_row:,} to {first_row + len(table) - 1:,}"
        raise ValueError(f"{rows} have columns of other types than scored rows ({error}): {REMEDY}") from error
    arrays = {name: parts[name].combine_chunks() for name in columns}
    for name, array in arrays.items():
        _refuse_nulls(array, first_row, name)
    sizes = [pc.list_value_length(arrays[name]).to_numpy() for name in (FEATURES, ACTIVATIONS)]
    if (unequal := np.flatnonzero(sizes[0] != sizes[1])).size:
        row = unequal[0]
        found = f"{sizes[0][row]} features but {sizes[1][row]} activations"
        raise ValueError(f"row {first_row + row:,} has {found}: {REMEDY}")
    texts = arrays[MEASUREMENT].dictionary_encode() if MEASUREMENT in arrays else None
    firsts = [] if texts is None else np.unique(texts.indices.to_numpy(), return_index=True)[1].tolist()
    return ScoredRows(
        first_row=first_row,
        features=arrays[FEATURES].flatten().to_numpy(),
        activations=arrays[ACTIVATIONS].flatten().to_numpy(),
        starts=np.concatenate([[0], np.cumsum(sizes[0], dtype=np.int64)]),
        tokens=arrays[TOKENS].to_numpy() if TOKENS in arrays else np.zeros(0, np.int32),
        measurements=[(first_row + row, texts[row].as_py()) for row in sorted(firsts)],
    )


def parquet_batches(path: str | os.PathLike[str], *, activations: int) -> Iterator[ScoredRows]:
    """Yields all rows of a Parquet file of scored rows, some `activations` at a time, without a copy in a cache.

    Raises: ValueError as `read_scored` does, and for a file that is not whole.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            columns, row = [name for name in COLUMNS if name in file.schema_arrow.names], 0
            groups = [file.metadata.row_group(k) for k in range(file.num_row_groups)]
            chunks = (group.column(k) for group in groups for k in range(group.num_columns))
            held = sum(chunk.num_values for chunk in chunks if chunk.path_in_schema.split(".")[0] == FEATURES)
            batch_size = max(1, activations * file.metadata.num_rows // max(held, 1))
            for batch in file.iter_batches(batch_size=batch_size, columns=columns):
                yield read_scored(pa.Table.from_batches([batch]), first_row=row)
                row += len(batch)
    except pa.ArrowException as error:
        raise ValueError(f"not a whole Parquet file ({error})") from error


def scored_batches(dataset: Dataset | IterableDataset, *, batch_size: int) -> Iterator[ScoredRows]:
    """Yields all rows of a scored data set, `batch_size` at a time.

    Raises: ValueError as `read_scored` does; TypeError for a DatasetDict, and for what is no data set.
    """
    from datasets import Dataset, IterableDataset

    if isinstance(dataset, dict):
        raise TypeError(f"got a {type(dataset).__name__}: pass one split, one of {', '.join(dataset)}")
    if not isinstance(dataset, Dataset | IterableDataset):
        raise TypeError(f"got a {type(dataset).__name__}: pass a data set (Dataset.from_list makes one); {REMEDY}")
    if dataset.column_names is not None and is_scored(dataset):
        dataset = dataset.select_columns(list(COLUMNS))
    row = 0
    for table in dataset.with_format("arrow").iter(batch_size=batch_size):
        yield read_scored(table, first_row=row)
        row += len(table)


def _refuse_nulls(column: pa.Array, first_row: int, name: str) -> None:
    import pyarrow.compute as pc

    rows = np.flatnonzero(column.is_null())
    if name in (FEATURES, ACTIVATIONS) and (entries := column.flatten()).null_count:
        rows = np.append(rows, pc.list_parent_indices(column).filter(entries.is_null()))
    if rows.size:
        raise ValueError(f"row {first_row + rows.min():,} holds a null in {name}: {REMEDY}")
