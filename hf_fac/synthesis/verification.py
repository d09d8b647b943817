"""Which of the wanted features a text or row activates, read on the tokens that the task pools: the measure by which
samples are kept, g_i(x) > delta (PAPER.md, Pipeline 7).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ..coverage.coverage import check_threshold

if TYPE_CHECKING:
    from ..features.featurizer import SAEFeaturizer
    from ..tasks.task import Task


class Measured(NamedTuple):
    """What one text was found to activate.

    activation: of the feature it was written for, in the SAE's units; 0.0 where it is not active.
    activates: ids of the wanted features above delta, rising.
    span: what stands before the token that activates its own feature most, that token, what stands after it; None
        where it is not active.
    problem: why the text could not be read, None otherwise.
    """

    activation: float
    activates: list[int]
    span: tuple[str, str, str] | None
    problem: str | None


class Gauge:
    """Measures texts and rows with the featurizer's model, SAE and activation, pooled as the task says.

    Args:
        wanted: int64 ids; others are not looked at.
        threshold: delta in the SAE's units, one number or [d_sae].

    Raises: ValueError for ids out of range, and a delta that is negative, not finite or of another shape.
    """

    def __init__(self, featurizer: SAEFeaturizer, task: Task, wanted: np.ndarray, threshold: float | ArrayLike) -> None:
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < featurizer.d_sae:
            raise ValueError(f"features must lie in [0, {featurizer.d_sae:,}), got {wanted.min()} to {wanted.max()}")
        self.task, self.wanted = task, np.sort(wanted)
        self.delta = np.broadcast_to(check_threshold(threshold, featurizer.d_sae), featurizer.d_sae)
        self._featurizer = featurizer
        self._readers: dict[str, SAEFeaturizer] = {}

    def texts(self, texts: Sequence[str], features: Sequence[int]) -> list[Measured]:
        """Returns what carriers that stand alone activate (`Task.carrier`), each written for its feature."""
        return self.rows([self.task.alone(text) for text in texts], features)

    def rows(
        self, rows: Sequence[Mapping[str, Any]], features: Sequence[int], *, side: str = "chosen"
    ) -> list[Measured]:
        """Returns what rows of the task's type activate; of preference pairs that of one side."""
        if not len(rows):
            return []
        reader = self._reader(side)
        rows = [self.task.as_read(row) for row in rows]
        reading = reader.read(rows, positions=True)
        acts, found = reading.activations, []
        for i, feature in enumerate(features):
            part = slice(acts.indptr[i], acts.indptr[i + 1])
            ids, values = acts.indices[part], acts.data[part]
            own = np.flatnonzero(ids == feature)
            span = None
            if own.size:
                span = reader.span(rows[i], int(reading.positions[part][own[0]]), before=20, after=10)[:3]
            found.append(
                Measured(
                    activation=float(values[own[0]]) if own.size else 0.0,
                    activates=ids[values > self.delta[ids]].tolist(),
                    span=span,
                    problem=reading.skipped.get(i),
                )
            )
        return found

    def _reader(self, side: str) -> SAEFeaturizer:
        from ..features.featurizer import SAEFeaturizer

        if side not in self._readers:
            own = self._featurizer
            self._readers[side] = reader = SAEFeaturizer(
                own.model, own.tokenizer, own.sae, layer=own.layer, activation=own.activation, features=self.wanted,
                pool_over=self.task.pool_over, side=side, max_length=own.reader.max_length, stride=own.reader.stride,
                sink_norm=own.sink_norm, batch_tokens=own.batch_tokens, on_error="skip", preset=own.preset,
            )  # fmt: skip
            reader._fit = own._fit  # whether the SAE fits was checked, or will be, by what it is shown first
        return self._readers[side]
