"""The strongest places of every feature, kept in arrays whose size does not grow with the data.

In: activations of rows as a featurizer reads them, part by part. Out: the n strongest places of each feature, each with
different text around it, and exact statistics. They are saved to disk, so that a stopped pass can be resumed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..storage.differences import differences
from ..storage.files import whole_file
from ..storage.parquet import digest_of_hashes

if TYPE_CHECKING:
    from ..features.pooling import FeatureActivations
    from ..inputs.rows import TokenizedRows

_PER_UNIT = 2.0**20  # steps in which activations are summed
_ARRAYS = ("activation", "window", "row", "position", "rows", "activation_sum")
_ODD = 0x9E3779B97F4A7C15
_COUNTS = ("total_rows", "data", "skipped", "shards_done", "content")


class TopSpans:
    """The n strongest places of each feature, and statistics over rows. Rows may come in any order and in any parts.

    activation: float32 [d_sae, n], falling; 0 is an empty place. Of equal activations the first rows are kept.
    window: uint64 [d_sae, n], a hash of the tokens around; no two of a feature are the same.
    row, position: int64 and int32 [d_sae, n], of the token in its row.
    rows: int64 [d_sae], rows that activate the feature.
    activation_sum: float64 [d_sae], over those rows, of activations rounded to multiples of 2**-20. Sums below 2**33
        are exact, and therefore the same in any order.
    data: the sum of the rows' hashes. content: a hash of the rows read, in their order.
    """

    def __init__(self, d_sae: int, n: int) -> None:
        self.activation = np.zeros((d_sae, n), np.float32)
        self.window = np.zeros((d_sae, n), np.uint64)
        self.row = np.zeros((d_sae, n), np.int64)
        self.position = np.zeros((d_sae, n), np.int32)
        self.rows, self.activation_sum = np.zeros(d_sae, np.int64), np.zeros(d_sae, np.float64)
        self.total_rows = self.data = self.skipped = self.shards_done = 0
        self.content = ""

    def add(
        self, first_row: int, reading: FeatureActivations, windows: Callable[[np.ndarray, np.ndarray], np.ndarray]
    ) -> None:
        """Counts rows from `first_row` on. `windows` returns hashes of the text at these rows and positions."""
        acts = reading.activations
        feature, value, d_sae = acts.indices.astype(np.int64), acts.data, len(self.rows)
        rounded = np.rint(value.astype(np.float64) * _PER_UNIT) / _PER_UNIT
        self.activation_sum += np.bincount(feature, rounded, d_sae)
        self.rows += np.bincount(feature, minlength=d_sae)
        self.total_rows += acts.shape[0]
        self.skipped += len(reading.skipped)
        # Rows of later parts may have smaller numbers, so activations equal to the weakest one kept may replace it.
        strong = np.flatnonzero(value >= self.activation[feature, -1])
        if len(strong):
            row = np.repeat(np.arange(acts.shape[0]), np.diff(acts.indptr))[strong]
            position = reading.positions[strong]
            self._keep(feature[strong], value[strong], windows(row, position), first_row + row, position)

    def end_shard(self, hashes: list[int]) -> None:
        """Counts a shard as done; `hashes` are those of its rows, in their order."""
        self.data = (self.data + sum(hashes)) % 2**64
        self.content = digest_of_hashes(hashes, after=self.content)
        self.shards_done += 1

    def _keep(
        self, feature: np.ndarray, activation: np.ndarray, window: np.ndarray, row: np.ndarray, position: np.ndarray
    ) -> None:
        touched, n = np.unique(feature), self.activation.shape[1]
        held = self.activation[touched] > 0
        feature = np.concatenate([feature, np.repeat(touched, n)[held.ravel()]])
        columns = {"activation": activation, "window": window, "row": row, "position": position}
        columns = {name: np.concatenate([new, getattr(self, name)[touched][held]]) for name, new in columns.items()}
        falling, row = -columns["activation"], columns["row"]
        order = np.lexsort((row, falling, columns["window"], feature))
        same = (np.diff(feature[order]) == 0) & (np.diff(columns["window"][order]) == 0)
        order = order[np.append(True, ~same)[: len(order)]]
        order = order[np.lexsort((row[order], falling[order], feature[order]))]
        line = np.searchsorted(touched, feature[order])
        place = np.arange(len(order)) - np.searchsorted(line, line)
        order, line, place = order[place < n], line[place < n], place[place < n]
        for name, values in columns.items():
            kept = np.zeros((len(touched), n), values.dtype)
            kept[line, place] = values[order]
            getattr(self, name)[touched] = kept

    def save(self, path: Path, settings: dict[str, Any]) -> None:
        from safetensors.numpy import save_file

        metadata = {"settings": json.dumps(settings)} | {name: json.dumps(getattr(self, name)) for name in _COUNTS}
        with whole_file(path) as partial:
            save_file({name: getattr(self, name) for name in _ARRAYS}, partial, metadata)

    def load(self, path: Path, settings: dict[str, Any]) -> None:
        """Raises: ValueError, with what differs, for a pass over other rows or with other settings."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata()
                found = json.loads(metadata["settings"])
                if values := differences(found, settings):
                    raise ValueError(f"{path} is of another pass ({values}): choose another output_dir.")
                vars(self).update({name: file.get_tensor(name) for name in _ARRAYS})
                vars(self).update({name: json.loads(metadata[name]) for name in _COUNTS})
        except (SafetensorError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is no pass of build_dictionary ({error}): delete it, or choose another output_dir."
            ) from error


def window_hashes(
    pieces: TokenizedRows, row: np.ndarray, position: np.ndarray, *, before: int, after: int
) -> np.ndarray:
    """Returns a hash of the token ids around each place, and of the row's ends when they are near: uint64 [m].

    row, position: int64 [m], of the place's token.
    """
    from pandas.util import hash_array

    lengths = np.zeros(pieces.n_rows, np.int64)
    for owner, ids, offset in zip(pieces.row, pieces.ids, pieces.offset, strict=True):
        lengths[owner] = max(lengths[owner], offset + len(ids))
    starts = before + np.concatenate([[0], np.cumsum(lengths + before + after)])
    tokens = np.full(starts[-1] + after, -1, np.int64)
    # Pieces of a row overlap. The first token of a later piece may be a BOS, so the earlier piece is written last.
    for owner, ids, offset in reversed(list(zip(pieces.row, pieces.ids, pieces.offset, strict=True))):
        tokens[starts[owner] + offset :][: len(ids)] = ids
    powers = np.uint64(_ODD) ** np.arange(before + 1 + after, dtype=np.uint64)
    hashes = np.convolve(hash_array(tokens), powers, "valid")  # a polynomial modulo 2**64 for each window
    return hash_array(hashes[starts[row] + position - before])
