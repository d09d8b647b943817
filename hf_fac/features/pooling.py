"""From dense maxima of each batch to sparse activations of each row: copied off the device, gathered, windows merged.

A piece is a row's token ids, or one window of a long row; equal pieces are computed once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from scipy.sparse import csr_array
    from torch import Tensor

    from ..inputs.rows import TokenizedRows


class FeatureActivations(NamedTuple):
    """The features that n rows activate.

    activations: csr_array [n, d_sae] float32, sorted; only what exceeds `keep_above` is stored.
    tokens: int32 [n], content tokens that counted; 0 for a row with nothing left, or skipped.
    positions: int32, beside `activations.data`: the index in the row's token ids of the first token that reaches the
        maximum; None unless asked for.
    skipped: index of the row -> reason: rows without any text and, with `on_error="skip"`, those that cannot be read.
    truncated: rows that lost tokens to `max_length`.
    sinks: content tokens of all rows that do not count because of their huge norm.
    special_in_content: special tokens inside content, which do not count.
    """

    activations: csr_array
    tokens: np.ndarray
    positions: np.ndarray | None
    skipped: dict[int, str]
    truncated: int
    sinks: int
    special_in_content: int


@dataclass
class LeftOut:
    """How many of the rows read so far were truncated or skipped. As a text it is "" when none was."""

    rows: int = 0
    truncated: int = 0
    skipped: int = 0
    first: str = ""

    def add(self, rows: FeatureActivations, first_row: int) -> None:
        self.rows += len(rows.tokens)
        self.truncated += rows.truncated
        self.skipped += len(rows.skipped)
        if rows.skipped and not self.first:
            index = min(rows.skipped)
            self.first = f" (row {first_row + index:,}: {rows.skipped[index]})"

    def __str__(self) -> str:
        counts = (f"{self.truncated:,} cut at max_length", self.truncated), (f"{self.skipped:,} skipped", self.skipped)
        told = " and ".join(words for words, count in counts if count)
        return f"Of {self.rows:,} rows {told}{self.first}." if told else ""


class PooledActivations:
    """Collects the sparse maxima of pieces, batch by batch."""

    def __init__(self, n_pieces: int) -> None:
        self.piece, self.column, self.value, self.position = [], [], [], []
        self.counted = np.zeros((n_pieces, 3), np.int64)

    def add(self, maxima: HostBatch, keep_above: float) -> None:
        place, column = np.nonzero(maxima.values > keep_above)
        self.piece.append(maxima.pieces[place])
        self.column.append(column.astype(np.int32))
        self.value.append(maxima.values[place, column])
        if maxima.positions is not None:
            self.position.append(maxima.at[maxima.positions[place, column]].astype(np.int32))
        self.counted[maxima.pieces] = maxima.counted

    def gather(self, pieces: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, ...]:
        """Returns the number of entries of each piece, and their columns, values and positions, piece after piece.

        Args:
            pieces: indices of pieces, in the order wanted; one may occur twice.
            offsets: for each of them, what is added to its positions.
        """
        owner = np.concatenate([*self.piece, np.zeros(0, np.int64)])
        order = np.argsort(owner, kind="stable")
        starts = np.searchsorted(owner[order], [pieces, pieces + 1])
        sizes = starts[1] - starts[0]
        ends = np.cumsum(sizes)
        take = order[np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts[0] - (ends - sizes), sizes)]
        column = np.concatenate([*self.column, np.zeros(0, np.int32)])[take]
        value = np.concatenate([*self.value, np.zeros(0, np.float32)])[take]
        position = np.concatenate([*self.position, np.zeros(0, np.int32)])
        position = position[take] + np.repeat(offsets, sizes).astype(np.int32) if len(position) else position
        return sizes, column, value, position


class Transfer:
    """Copies a batch's results to the CPU without making a GPU wait."""

    def __init__(self, pieces: np.ndarray, at: np.ndarray, *results: Tensor | None) -> None:
        self.pieces, self.at, self.arrived = pieces, at, None
        place = results[0].device
        if place.type != "cuda":
            self.host = [None if r is None else r.cpu() for r in results]
            return
        self.host = [None if r is None else _pinned_copy(r) for r in results]
        self.arrived = torch.cuda.Event()
        # The stream of the results' own GPU, which need not be the current one.
        self.arrived.record(torch.cuda.current_stream(place))

    def wait(self) -> HostBatch:
        if self.arrived is not None:
            self.arrived.synchronize()
        return HostBatch(self.pieces, self.at, *(None if h is None else h.numpy() for h in self.host))


def _pinned_copy(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


class HostBatch(NamedTuple):
    """A batch's results on the CPU.

    pieces: [n], the indices of its pieces.
    at: [tokens], the index in its piece of each content token of the batch.
    values: [n, columns], maxima.
    counted: [n, 3], how many of each piece's content tokens count, are sinks, are not finite.
    positions: [n, columns], indices into `at`.
    """

    pieces: np.ndarray
    at: np.ndarray
    values: np.ndarray
    counted: np.ndarray
    positions: np.ndarray | None


class UniquePieces(NamedTuple):
    """Pieces, each distinct one once.

    ids, content: of each piece, as in `TokenizedRows`.
    continues: whether the piece is a later window of its row.
    owner: int64, for each piece given, the index of its equal among these.
    """

    ids: list[np.ndarray]
    content: list[np.ndarray]
    continues: list[bool]
    owner: np.ndarray


def unique_pieces(pieces: TokenizedRows, *, causal: bool) -> UniquePieces:
    """Returns the pieces that the model has to read, each once.

    In a causal model the tokens after the last content token are cut off, as they change nothing. A piece without
    content keeps no ids.
    """
    seen: dict[tuple[bytes, bytes, bool], int] = {}
    unique = UniquePieces([], [], [], np.zeros(len(pieces.ids), np.int64))
    for i, (ids, content, offset) in enumerate(zip(pieces.ids, pieces.content, pieces.offset, strict=True)):
        counting = np.flatnonzero(content)
        end = 0 if not len(counting) else counting[-1] + 1 if causal else len(ids)
        ids, content = ids[:end], content[:end]
        owner = seen.setdefault((ids.tobytes(), content.tobytes(), offset > 0), len(seen))
        unique.owner[i] = owner
        if owner == len(unique.ids):
            unique.ids.append(ids)
            unique.content.append(content)
            unique.continues.append(offset > 0)
    return unique


def merge_windows(
    row: np.ndarray, column: np.ndarray, value: np.ndarray, position: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Returns the entries with one for each row and column: the largest value, at the first position that has it."""
    order = np.lexsort((position if len(position) else value, -value, column, row))
    row, column, value = row[order], column[order], value[order]
    keep = np.ones(len(row), bool)
    keep[1:] = (row[1:] != row[:-1]) | (column[1:] != column[:-1])
    return row[keep], column[keep], value[keep], position[order][keep] if len(position) else position
