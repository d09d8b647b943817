"""The pieces that a model has to read, each distinct one once. In: tokenized rows. Out: `UniquePieces`.

A piece is a row's token ids, or one window of a long row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .rows import TokenizedRows


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


def unique_pieces(tables: Sequence[TokenizedRows], *, causal: bool) -> UniquePieces:
    """Returns the pieces of all tables that the model has to read, each once.

    In a causal model the tokens after the last content token are cut off, as they change nothing. A piece without
    content keeps no ids.
    """
    seen: dict[tuple[bytes, bytes, bool], int] = {}
    pieces = [piece for table in tables for piece in zip(table.ids, table.content, table.offset, strict=True)]
    unique = UniquePieces([], [], [], np.zeros(len(pieces), np.int64))
    for i, (ids, content, offset) in enumerate(pieces):
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
