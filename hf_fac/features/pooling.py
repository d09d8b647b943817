"""Sparse maxima on their way from batches of pieces to rows: copied off the device, gathered, windows merged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from scipy.sparse import csr_array
    from torch import Tensor

    from ..inputs.rows import Pieces


class Reading(NamedTuple):
    """What a featurizer finds in n rows.

    activations: csr_array [n, d_sae] float32, sorted; only what exceeds `keep_above` is stored.
    tokens: int32 [n], content tokens that counted; 0 for a row with nothing left, or skipped.
    positions: int32, beside `activations.data`: the index in the row's token ids of the first token that reaches the
        maximum; None unless asked for.
    skipped: index of the row -> reason: rows without any text and, with `on_error="skip"`, those that cannot be read.
    truncated: rows that lost tokens to `max_length`.
    sinks: content tokens left out for their huge norm, of all rows.
    special_in_content: special tokens inside content, left out.
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
    """How many of the rows read since this was made lost tokens, or were skipped; "" as a text where none was."""

    rows: int = 0
    truncated: int = 0
    skipped: int = 0
    first: str = ""

    def add(self, reading: Reading, first_row: int) -> None:
        self.rows += len(reading.tokens)
        self.truncated += reading.truncated
        self.skipped += len(reading.skipped)
        if reading.skipped and not self.first:
            index = min(reading.skipped)
            self.first = f" (row {first_row + index:,}: {reading.skipped[index]})"

    def __str__(self) -> str:
        counts = (f"{self.truncated:,} cut at max_length", self.truncated), (f"{self.skipped:,} skipped", self.skipped)
        told = " and ".join(words for words, count in counts if count)
        return f"Of {self.rows:,} rows {told}{self.first}." if told else ""


class Maxima:
    """Sparse maxima of pieces as they arrive, put together into rows at the end."""

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
        """Of pieces in the order given (a piece may come twice): how many entries each has, and the entries' columns,
        values and positions, the offset of the piece added to the last."""
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
    """A batch's results on their way from the device, without holding it up."""

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

    pieces: [n], which they are.
    at: [tokens], the index in its piece of each content token of the batch.
    values: [n, columns].
    counted: [n, 3], of each piece's content tokens: how many count, are sinks, are not finite.
    positions: [n, columns], indices into `at`.
    """

    pieces: np.ndarray
    at: np.ndarray
    values: np.ndarray
    counted: np.ndarray
    positions: np.ndarray | None


class UniquePieces(NamedTuple):
    """Pieces without those that repeat an earlier one.

    ids, content: of each as in `Pieces`.
    continues: whether it is a later window of its row.
    owner: int64, for each of the pieces given, which of these it equals.
    """

    ids: list[np.ndarray]
    content: list[np.ndarray]
    continues: list[bool]
    owner: np.ndarray


def unique_pieces(pieces: Pieces, *, causal: bool) -> UniquePieces:
    """The pieces that have to be run. What follows the last content token changes nothing in a causal model and is cut
    off; a piece without content is left with no ids."""
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
    """Entries of several windows of a row become one: the largest value, at the first position that has it."""
    order = np.lexsort((position if len(position) else value, -value, column, row))
    row, column, value = row[order], column[order], value[order]
    keep = np.ones(len(row), bool)
    keep[1:] = (row[1:] != row[:-1]) | (column[1:] != column[:-1])
    return row[keep], column[keep], value[keep], position[order][keep] if len(position) else position
