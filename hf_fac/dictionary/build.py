"""One pass over a data set collects the strongest spans of every feature and how often it is active.

In: a featurizer and rows. Out: a `FeatureDictionary` without explanations. What is held does not grow with the data:
the n strongest places of each feature, whose texts are cut out at the end. A stopped pass goes on where it was.
"""

from __future__ import annotations

import json
import os
import warnings
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..storage.files import try_output
from ..storage.parquet import digest_of_hashes, row_hash
from .top_spans import TopSpans, window_hashes

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

    from ..features.featurizer import SAEFeaturizer
    from .dictionary import FeatureDictionary

_CELLS = 1 << 25  # rows x features read at once: where nearly all are active, activations are what takes memory
_MOST_ROWS = 1000
_MOST_CHARACTERS = 2000  # of a span on each side: a tokenizer may make one token of a whole line


def build_dictionary(
    featurizer: SAEFeaturizer,
    dataset: Dataset | list[Any],
    *,
    spans: int = 10,
    before: int = 24,
    after: int = 16,
    output_dir: str | os.PathLike[str] | None = None,
    shard_rows: int = 5000,
    source: str | None = None,
    rank: int | None = None,
    world_size: int | None = None,
) -> FeatureDictionary:
    """The dictionary of a data set: a row for each feature that the featurizer computes, dead ones too.

    A span is the activating token (the first that reaches the row's maximum), `before` tokens before it and `after`
    after it; the same tokens around the same token count once among the spans, but each row counts in the statistics,
    which are those of `FeatureCoverage`. Beside the rows being read it takes 24 bytes for each feature and span.

    Args:
        dataset: a `datasets.Dataset` or a list, rows as the featurizer reads them.
        spans: the most spans of a feature.
        output_dir: keep the state here after each shard; the same call goes on with the first shard not done.
        shard_rows: rows in a shard, and what a fault can cost.
        source: what is written beside each span; by default the data set's own name.
        rank, world_size: every world_size-th shard, from the rank-th on, is read; by default what torchrun and
            accelerate put into RANK and WORLD_SIZE. Each process gets the dictionary of its rows; `a | b` joins them.

    Raises: RowError for a row that cannot be read; ValueError when output_dir holds another pass, or for arguments out
        of range; TypeError for other kinds of data sets. Warns (UserWarning) of rows that were skipped.
    """
    rank = int(os.environ.get("RANK", 0)) if rank is None else rank
    world_size = int(os.environ.get("WORLD_SIZE", 1)) if world_size is None else world_size
    if not 0 <= rank < world_size or min(shard_rows, spans) < 1 or min(before, after) < 0:
        raise ValueError(
            f"rank {rank} of {world_size} processes, shard_rows {shard_rows}, spans {spans}, before {before} and after "
            f"{after} make no spans."
        )
    from datasets import Dataset

    if not isinstance(dataset, Dataset | list):
        raise TypeError(
            f"dataset is a {type(dataset).__name__}: pass a datasets.Dataset (one split) or a list of rows."
        )
    top, rows = TopSpans(featurizer.d_sae, spans), _Rows(dataset)
    measurement = featurizer.measurement | {"feature_fingerprint": featurizer.feature_fingerprint()}
    settings = {
        "measurement": measurement, "spans": spans, "before": before, "after": after, "rank": rank,
        "world_size": world_size, "shard_rows": shard_rows, "dataset_rows": len(dataset),
    }  # fmt: skip
    state = None
    if output_dir is not None:
        state = Path(output_dir) / f"spans-{rank:05d}-of-{world_size:05d}.safetensors"
        try_output(state.parent, folder=True)
        if state.exists():
            top.load(state, settings)
    shards = range(rank * shard_rows, len(dataset), world_size * shard_rows)
    content = ""
    for start in shards[: top.shards_done]:
        content = digest_of_hashes(rows.hashes(start, min(start + shard_rows, len(dataset))), after=content)
    if content != top.content:
        raise ValueError(f"{state} is of a pass over other rows, or in another order: choose another output_dir.")
    batch = max(1, min(_MOST_ROWS, _CELLS // featurizer.d_sae))
    with _progress(sum(min(shard_rows, len(dataset) - start) for start in shards), top.total_rows) as bar:
        for start in shards[top.shards_done :]:
            stop = min(start + shard_rows, len(dataset))
            hashes = rows.hashes(start, stop)
            for first in range(start, stop, batch):
                _read(featurizer, rows, first, min(first + batch, stop), top, before, after)
                bar.update(min(batch, stop - first))
            top.data = (top.data + sum(hashes)) % 2**64
            top.content = digest_of_hashes(hashes, after=top.content)
            top.shards_done += 1
            if state is not None:
                top.save(state, settings)
    if top.skipped:
        warnings.warn(
            f"{top.skipped:,} of {top.total_rows:,} rows were skipped, without text or unreadable", stacklevel=2
        )
    return _dictionary(featurizer, rows, top, before, after, source or rows.name, measurement)


def content_hash(dataset: Dataset | list[Any]) -> str:
    """Returns what a dictionary of these rows, in any order, has in its column `data`."""
    return f"{sum(_Rows(dataset).hashes(0, len(dataset))) % 2**64:016x}"


def remove_states(output_dir: str | os.PathLike[str]) -> None:
    """Remove what `build_dictionary` keeps in a folder to go on from, and the folder where it holds nothing else."""
    for state in Path(output_dir).glob("spans-*-of-*.safetensors"):
        state.unlink()
    with suppress(OSError):
        Path(output_dir).rmdir()


class _Rows:
    """Rows of a data set or list, without the columns that a scorer added."""

    def __init__(self, dataset: Any) -> None:
        from ..storage.scored_rows import COLUMNS

        if not isinstance(dataset, list):
            dataset = dataset.remove_columns([name for name in COLUMNS if name in dataset.column_names])
        self.dataset, self.name = dataset, None if isinstance(dataset, list) else dataset.info.dataset_name

    def __getitem__(self, part: slice) -> list[Any]:
        from ..inputs.rows import as_rows

        return list(as_rows(self.dataset[part]))

    def hashes(self, start: int, stop: int) -> list[int]:
        return [row_hash(row) for i in range(start, stop, _MOST_ROWS) for row in self[i : min(i + _MOST_ROWS, stop)]]


def _read(
    featurizer: SAEFeaturizer, rows: _Rows, start: int, stop: int, top: TopSpans, before: int, after: int
) -> None:
    part = rows[start:stop]
    reading = featurizer.read(part, positions=True, first_row=start)

    def windows(owner: np.ndarray, position: np.ndarray) -> np.ndarray:
        wanted, place = np.unique(owner, return_inverse=True)
        pieces = featurizer.reader([part[i] for i in wanted.tolist()])
        return window_hashes(pieces, place, position, before=before, after=after)

    top.add(start, reading, windows)


def _dictionary(
    featurizer: SAEFeaturizer,
    rows: _Rows,
    top: TopSpans,
    before: int,
    after: int,
    source: str | None,
    measurement: dict[str, Any],
) -> FeatureDictionary:
    from datasets import Dataset

    from .dictionary import FeatureDictionary

    columns = featurizer.encoder.columns
    ids = np.arange(featurizer.d_sae) if columns is None else np.asarray(columns, dtype=np.int64)
    names = featurizer.source() or {}
    loaded = {key: value for key, value in names.items() if key not in ("loader", "fingerprint", "device")}
    settings = {"hf_fac": version("hf-fac"), "spans": top.activation.shape[1], "before": before, "after": after}
    settings |= {"loaded_from": loaded} if loaded else {}
    table = _table(ids, top, _cut(featurizer, rows, top, ids, before, after, source))
    for name, value in (
        ("data", f"{top.data:016x}"),
        ("measurement", json.dumps(measurement, sort_keys=True)),
        ("settings", json.dumps(settings, sort_keys=True, default=str)),
    ):
        table[name] = [value] * len(ids)
    return FeatureDictionary(Dataset(_arrow(table)), measurement=measurement)


def _cut(
    featurizer: SAEFeaturizer, rows: _Rows, top: TopSpans, ids: np.ndarray, before: int, after: int, source: str | None
) -> list[list[dict[str, Any]]]:
    """The spans of each feature as texts: as `SAEFeaturizer.span` cuts them, but each row is tokenized once."""
    from ..inputs.token_context import cut_span
    from .merging import strongest

    found: list[list[dict[str, Any]]] = [[] for _ in ids]
    line, place = np.nonzero(top.activation[ids] > 0)
    feature = ids[line]
    row, position, activation = (
        getattr(top, name)[feature, place].tolist() for name in ("row", "position", "activation")
    )
    last_row, place_in_row = -1, ()
    for i in np.argsort(row, kind="stable").tolist():
        if row[i] != last_row:
            source_row, last_row = rows[row[i] : row[i] + 1][0], row[i]
            text, offsets = featurizer.reader.offsets(source_row)
            place_in_row = text, offsets, featurizer.reader.render(source_row)[1]
        cut = cut_span(*place_in_row, position[i], before, after)
        span = {
            "before": cut.before[-_MOST_CHARACTERS:],
            "token": cut.token[:_MOST_CHARACTERS],
            "after": cut.after[:_MOST_CHARACTERS],
            "activation": activation[i],
            "row": row[i],
            "source": source,
        }
        found[line[i]].append(span)
    # Other tokens can be the same text.
    return [strongest(spans, None) for spans in found]


def _table(ids: np.ndarray, top: TopSpans, spans: list[list[dict[str, Any]]]) -> dict[str, Any]:
    from decimal import Decimal

    rows, whole, parts = (getattr(top, name)[ids].tolist() for name in ("rows", "whole", "trillionths"))
    sums = [Decimal(f"{w}.{p:012d}") for w, p in zip(whole, parts, strict=True)]
    nothing = [None] * len(ids)
    return {
        "feature": ids.astype(np.int32), "explanation": nothing, "explanation_state": ["none"] * len(ids),
        "verification": nothing, "verification_reason": nothing, "detection": nothing, "detection_answers": nothing,
        "ratings": [[]] * len(ids), "rows": rows, "total_rows": [top.total_rows] * len(ids),
        "frequency": [count / top.total_rows if top.total_rows else 0.0 for count in rows],
        "activation_sum": sums,
        "mean_activation": [float(total) / count if count else 0.0 for total, count in zip(sums, rows, strict=True)],
        "max_activation": top.activation[ids, 0], "spans": spans,
    }  # fmt: skip


def _arrow(columns: dict[str, Any]) -> pa.Table:
    import pyarrow as pa

    from .schema import schema

    return pa.table([pa.array(columns[field.name], field.type) for field in schema()], schema=schema())


def _progress(total: int, done: int) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total, initial=done, unit="row", desc="Collecting spans", delay=2, leave=False)
