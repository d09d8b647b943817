"""How fast rows are selected from a large scored pool, on one core: seconds, peak memory, ratio to a naive greedy.

    python benchmarks/selection.py [--rows 1000000] [--select 2000]

Features have skewed popularity: some thirty are in every row, the rarest in one row of a million. The naive greedy
multiplies the whole incidence matrix by the uncovered weights for each row that it chooses.
"""

import argparse
import os
import resource
import sys
import time

import numpy as np
import pyarrow as pa
from datasets import Dataset
from scipy.sparse import csr_array

from hf_fac.coverage.selection import Selection, select

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--rows", type=int, default=1_000_000)
parser.add_argument("--features", type=int, default=600, help="active features of a row")
parser.add_argument("--select", type=int, default=2_000)
parser.add_argument("--d-sae", type=int, default=65_536)
options = parser.parse_args()


def make_pool(rows: int, features: int, d_sae: int) -> csr_array:
    """A feature from each of `features` bands of ids that widen from 1 to some hundreds; rare towards a band's end."""
    rng = np.random.default_rng(0)
    edges = np.arange(features + 1) + ((d_sae - features) * (np.arange(features + 1) / features) ** 3).astype(int)
    first, size = edges[:-1].astype(np.int32), np.diff(edges).astype(np.float32)
    ids, acts = np.empty((rows, features), np.int32), np.empty((rows, features), np.float32)
    for start in range(0, rows, 4096):
        part = slice(start, start + 4096)
        shape = ids[part].shape
        inside = np.minimum(rng.standard_exponential(shape, np.float32) * size / 10, size - 1)
        ids[part] = first + inside.astype(np.int32)
        acts[part] = rng.standard_exponential(shape, np.float32)
    starts = np.arange(0, rows * features + 1, features, dtype=np.int32)
    return csr_array((acts.reshape(-1), ids.reshape(-1), starts), shape=(rows, d_sae))


def as_dataset(pool: csr_array) -> Dataset:
    columns = {"fac_features": pool.indices, "fac_activations": pool.data}
    lists = [pa.LargeListArray.from_arrays(pool.indptr.astype(np.int64), values) for values in columns.values()]
    return Dataset(pa.table(lists, names=list(columns)))


def naive(pool: csr_array, missing: np.ndarray, n: int, threshold: float) -> list[int]:
    active = csr_array(((pool.data > threshold).astype(np.float32), pool.indices, pool.indptr), shape=pool.shape)
    uncovered = np.zeros(pool.shape[1], np.float32)
    uncovered[missing] = 1
    rows: list[int] = []
    while len(rows) < n:
        gains = active @ uncovered
        best = int(gains.argmax())
        if gains[best] == 0:
            break
        rows.append(best)
        entries = slice(*active.indptr[best : best + 2])
        uncovered[active.indices[entries][active.data[entries] == 1]] = 0
    return rows


def peak_gb() -> float:
    # Kilobytes on Linux, bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def timed(pool: csr_array | Dataset, missing: np.ndarray, n: int, threshold: float) -> tuple[float, str, Selection]:
    """Seconds by the clock, the same beside the processor's own (less where others share the core), the selection."""
    start, own = time.perf_counter(), time.process_time()
    selection = select(pool, missing, n, threshold=threshold)
    seconds, own = time.perf_counter() - start, time.process_time() - own
    return seconds, f"{seconds:.2f} s ({own:.2f} s of the core)", selection


if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
rare = np.sort(np.random.default_rng(1).permutation(options.d_sae)[: options.d_sae // 10])
cases = {
    "all features, delta 0": (np.arange(options.d_sae), 0.0),
    "all features, delta 2": (np.arange(options.d_sae), 2.0),
    "a tenth of the features, delta 2": (rare, 2.0),
}
small = make_pool(max(1, options.rows // 50), options.features, options.d_sae)
n = max(1, options.select // 10)
print(f"one core, load {os.getloadavg()[0]:.1f}; against naive greedy: {small.shape[0]:,} rows, n = {n}")
for name, (missing, threshold) in cases.items():
    seconds, text, selection = timed(small, missing, n, threshold)
    start = time.perf_counter()
    same = naive(small, missing, n, threshold) == selection.rows.tolist()
    slow = time.perf_counter() - start
    print(f"  {name}: {text}, naive {slow:.2f} s, ratio {slow / seconds:.1f}, same rows: {same}")
print(f"  all features, delta 0, as a data set: {timed(as_dataset(small), np.arange(options.d_sae), n, 0.0)[1]}")
del small
start = time.perf_counter()
pool = make_pool(options.rows, options.features, options.d_sae)
held = (pool.data.nbytes + pool.indices.nbytes + pool.indptr.nbytes) / 1e9
print(
    f"pool: {options.rows:,} rows of {options.features}, {held:.2f} GB, made in {time.perf_counter() - start:.0f} s; "
    f"peak memory {peak_gb():.2f} GB; n = {options.select:,}"
)
for name, (missing, threshold) in cases.items():
    _, text, selection = timed(pool, missing, options.select, threshold)
    found = f"{len(selection.rows):,} rows cover {len(selection.covered):,} of {len(missing):,}"
    print(f"  {name}: {text}, {found}; peak memory {peak_gb():.2f} GB")
