"""The strongest places of every feature, kept in arrays whose size does not grow with the data.

In: activations of rows as a featurizer reads them, part by part. Out: the n places of each feature where it is
strongest, no surroundings twice, and exact statistics; on disk, a state from which a stopped pass goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..storage.differences import differences
from ..storage.files import whole_file

if TYPE_CHECKING:
    from ..features.pooling import FeatureActivations
    from ..inputs.rows import TokenizedRows

_TRILLION = 10**12
_ARRAYS = ("activation", "window", "row", "position", "rows", "whole", "trillionths")
_COUNTS = ("total_rows", "data", "skipped", "shards_done", "content")


class TopSpans:
    """The n strongest places of each feature, and statistics over rows. Rows may come in any order and in any parts.

    activation: float32 [d_sae, n], falling; 0 is an empty place. window: uint64, a hash of the tokens around; no two of
    a feature are the same. row: int64, position: int32, of the token in its row; of equal activations the first rows.
    rows: int64 [d_sae], rows that activate the feature. whole, trillionths: int64 [d_sae], the sum of activations over
    those rows in integers, so that it is the same in any order: whole + trillionths / 10**12.
    data: the sum of the rows' hashes. content: a hash of the rows read, in their order.
    """

    def __init__(self, d_sae: int, n: int) -> None:
        self.activation = np.zeros((d_sae, n), np.float32)
        self.window = np.zeros((d_sae, n), np.uint64)
        self.row = np.zeros((d_sae, n), np.int64)
        self.position = np.zeros((d_sae, n), np.int32)
        self.rows, self.whole, self.trillionths = np.zeros((3, d_sae), np.int64)
        self.total_rows = self.data = self.skipped = self.shards_done = 0
        self.content = ""

    def add(
        self, first_row: int, reading: FeatureActivations, windows: Callable[[np.ndarray, np.ndarray], np.ndarray]
    ) -> None:
        """Count rows `first_row` and on. `windows` gives the hashes at rows and positions, int64 [m] each, of them.

        Raises: ValueError for an activation from 2**40 up, beyond which sums would not be exact.
        """
        acts = reading.activations
        feature, value, d_sae = acts.indices.astype(np.int64), acts.data, len(self.rows)
        if len(value) and value.max() >= 2**40:
            raise ValueError(f"An activation is {value.max():g}; expected less than 2**40. Check the SAE's scale.")
        exact = value.astype(np.float64)
        whole = np.floor(exact)
        # Sums of integers in float64, each below 2**53.
        self.whole += np.bincount(feature, whole, d_sae).astype(np.int64)
        parts = np.bincount(feature, np.rint((exact - whole) * _TRILLION), d_sae).astype(np.int64)
        carried, self.trillionths = np.divmod(self.trillionths + parts, _TRILLION)
        self.whole += carried
        self.rows += np.bincount(feature, minlength=d_sae)
        self.total_rows += acts.shape[0]
        self.skipped += len(reading.skipped)
        # Rows of parts that come later may have smaller numbers, so that equals are candidates too.
        rivals = np.flatnonzero(value >= self.activation[feature, -1])
        owner = np.repeat(np.arange(acts.shape[0]), np.diff(acts.indptr))[rivals]
        position = reading.positions[rivals]
        self._keep(feature[rivals], value[rivals], windows(owner, position), first_row + owner, position)

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
                f"{path} is no pass of build_dictionary ({error}): delete it, or choose another."
            ) from error


def window_hashes(
    pieces: TokenizedRows, row: np.ndarray, position: np.ndarray, *, before: int, after: int
) -> np.ndarray:
    """uint64 [m]: a hash of the token ids around each place, and of where the row begins and ends among them."""
    lengths = np.zeros(pieces.n_rows, np.int64)
    for owner, ids, offset in zip(pieces.row, pieces.ids, pieces.offset, strict=True):
        lengths[owner] = max(lengths[owner], offset + len(ids))
    starts = before + np.concatenate([[0], np.cumsum(lengths + before + after)])
    tokens = np.full(starts[-1] + after, -1, np.int64)
    # Windows overlap, and in a later one a BOS may stand in place of the first token: the earlier one has it right.
    for owner, ids, offset in reversed(list(zip(pieces.row, pieces.ids, pieces.offset, strict=True))):
        tokens[starts[owner] + offset :][: len(ids)] = ids
    mixed = _mixed(tokens.astype(np.uint64))
    size = max(len(tokens) - before - after, 0)
    hashes = np.zeros(size, np.uint64)
    for shift in range(before + after + 1):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + mixed[shift : shift + size]
    return _mixed(hashes[starts[row] + position - before])


def _mixed(x: np.ndarray) -> np.ndarray:
    # splitmix64 (Steele, Lea & Flood 2014)
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
