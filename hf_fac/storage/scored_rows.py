"""The columns that scoring adds to rows: their names and types, and their one reader.

In: a scored `datasets.Dataset`, a stream or an Arrow table. Out: flat arrays of the feature ids and activations of some
rows at a time, checked. `FACScorer` writes the columns; coverage, selection and synthesis read them.
"""

from __future__ import annotations

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

    if absent := [name for name in columns if name not in table.column_names]:
        raise ValueError(f"the rows have no column {absent[0]!r}: {REMEDY}")
    try:
        parts = table.select(columns).cast(arrow_schema(columns))
    except pa.ArrowException as error:
        rows = f"rows {first_row:,} to {first_row + len(table) - 1:,}"
        raise ValueError(f"{rows} have columns of other types than scored rows ({error}): {REMEDY}") from error
    arrays = {name: _one_array(parts[name]) for name in columns}
    sizes = [_list_sizes(arrays[name], first_row, name) for name in (FEATURES, ACTIVATIONS)]
    for name in set(columns) & {TOKENS, MEASUREMENT}:
        _refuse_null(np.flatnonzero(arrays[name].is_null()), first_row, name)
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


def scored_batches(dataset: Dataset | IterableDataset, *, batch_size: int) -> Iterator[ScoredRows]:
    """Yields all rows of a scored data set, `batch_size` at a time. Raises: ValueError as `read_scored` does."""
    if dataset.column_names is not None and is_scored(dataset):
        dataset = dataset.select_columns(list(COLUMNS))
    row = 0
    for table in dataset.with_format("arrow").iter(batch_size=batch_size):
        yield read_scored(table, first_row=row)
        row += len(table)


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    import pyarrow as pa

    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks or [pa.array([], column.type)])


def _list_sizes(lists: pa.ListArray, first_row: int, name: str) -> np.ndarray:
    """How many entries each row has. Raises: ValueError for a null."""
    import pyarrow.compute as pc

    if lists.null_count:
        _refuse_null(np.flatnonzero(lists.is_null()), first_row, name)
    sizes = pc.list_value_length(lists).to_numpy()
    entries = lists.flatten()
    if entries.null_count:
        _refuse_null(np.searchsorted(np.cumsum(sizes), np.flatnonzero(entries.is_null()), "right"), first_row, name)
    return sizes


def _refuse_null(rows: np.ndarray, first_row: int, name: str) -> None:
    if rows.size:
        raise ValueError(f"row {first_row + rows[0]:,} holds a null in {name}: {REMEDY}")
