"""The scorer as an actor of Ray Data: Arrow tables of rows in, the same rows with their activations out.

Only names travel to an actor: each loads model and SAE itself, on the GPU that Ray gives it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..storage.scored_rows import COLUMNS, arrow_schema
from .featurizer import SAEFeaturizer
from .scoring import FACScorer

if TYPE_CHECKING:
    import pyarrow as pa


class RayFACScorer:
    """`FACScorer` for `map_batches` of Ray Data (`pip install hf-fac[ray]`):

        scored = dataset.map_batches(
            RayFACScorer,
            fn_constructor_kwargs={"model": "user/model", "sae": "user/sae"},
            batch_format="pyarrow",
            batch_size=1000,
            concurrency=2,  # actors, each with a model of its own
            num_gpus=1,  # for each actor; leave it out on the CPU
        )

    Rows, columns and measurement are those of `FACScorer`, so that scored parts merge, whichever of the two made them.
    """

    def __init__(self, model: str, sae: str, **settings: Any) -> None:
        """Loads model and SAE; `model`, `sae` and `settings` are arguments of `SAEFeaturizer.from_pretrained`."""
        self._scorer = FACScorer(SAEFeaturizer.from_pretrained(model, sae, **settings))

    def __call__(self, table: pa.Table) -> pa.Table:
        """Returns a batch with the columns of `FACScorer`, typed as `storage.scored_rows.arrow_schema` says.

        Raises: RowError, which counts the row in its batch; TypeError for a batch that is no Arrow table.
        """
        import pyarrow as pa

        if not isinstance(table, pa.Table):
            raise TypeError(f'RayFACScorer got a batch as a {type(table).__name__}: give batch_format="pyarrow".')
        table = table.drop_columns([name for name in COLUMNS if name in table.column_names])
        scored = self._scorer(table.to_pydict())
        for field in arrow_schema():
            table = table.append_column(field, pa.array(scored[field.name], field.type))
        return table
