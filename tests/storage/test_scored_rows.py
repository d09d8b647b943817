"""The columns of scored rows: what is written is read back as flat arrays, batch by batch, whatever holds it."""

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset

from hf_fac.storage.scored_rows import COLUMNS, arrow_schema, is_scored, read_scored, scored_batches

RNG = np.random.default_rng(0)
IDS = [np.sort(RNG.choice(70_000, n, replace=False)).tolist() for n in RNG.integers(0, 5, 23)]
ACTS = [RNG.random(len(ids)).astype(np.float32).tolist() for ids in IDS]
TOKENS = RNG.integers(0, 9, len(IDS)).tolist()
TEXTS = ["{}"] * 9 + ['{"d_sae": 8}'] * (len(IDS) - 9)
PLAIN = Dataset.from_dict(dict(zip(COLUMNS, (IDS, ACTS, TOKENS, TEXTS), strict=True)) | {"text": TEXTS})
TYPED = Dataset(PLAIN.with_format("arrow")[:].select(COLUMNS).cast(arrow_schema()))


@pytest.mark.parametrize("dataset", [PLAIN, TYPED, PLAIN.to_iterable_dataset()], ids=["wide", "typed", "stream"])
def test_rows_are_read_in_batches_as_they_are(dataset):
    batches = list(scored_batches(dataset, batch_size=7))
    assert [batch.first_row for batch in batches] == [0, 7, 14, 21]
    rows = [row for b in batches for row in zip(np.split(b.features, b.starts[1:-1]),
                                                np.split(b.activations, b.starts[1:-1]), strict=True)]  # fmt: skip
    assert [ids.tolist() for ids, _ in rows] == IDS
    assert [acts.tolist() for _, acts in rows] == ACTS
    assert np.concatenate([batch.tokens for batch in batches]).tolist() == TOKENS
    assert [batch.measurements for batch in batches] == [
        [(0, "{}")], [(7, "{}"), (9, '{"d_sae": 8}')], [(14, '{"d_sae": 8}')], [(21, '{"d_sae": 8}')]
    ]  # fmt: skip
    assert {(b.features.dtype, b.activations.dtype, b.starts.dtype) for b in batches} == {
        (np.dtype(np.int32), np.dtype(np.float32), np.dtype(np.int64))
    }


def test_some_columns_and_no_rows_are_read():
    rows = read_scored(TYPED.with_format("arrow")[:0], columns=COLUMNS[:2])
    assert (len(rows.features), rows.starts.tolist(), len(rows.tokens), rows.measurements) == (0, [0], 0, [])


def test_columns_of_another_type_are_refused():
    table = pa.table({name: ["a"] for name in COLUMNS})
    with pytest.raises(
        ValueError, match=r"rows 5 to 5 have columns of other types than scored rows .*: score the rows"
    ):
        read_scored(table, first_row=5)


def test_a_data_set_is_scored_when_it_has_all_columns():
    assert is_scored(PLAIN)
    assert not is_scored(PLAIN.remove_columns("fac_tokens"))


def test_reading_scored_rows_needs_no_torch():
    code = "import sys, hf_fac.storage.scored_rows; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
