"""How fast scored rows become a coverage, streamed: seconds and peak memory for a million rows, and whether the time
grows in proportion to rows, active features and width.

    python benchmarks/coverage.py [--rows 1000000] [--pairs 3] [--folder FOLDER]

The rows lie in Parquet shards as `score_shards` writes them, made beforehand; some 8 bytes for each activation are
needed on the disk. Features have skewed popularity, as in benchmarks/selection.py. Each case runs in a process of its
own on one core. Its time includes reading the files; its peak memory is that of the whole process, beside what the same
process takes before it reads (imports). Times are medians of `--pairs` runs; the ratios are against the first line of
their table.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hf_fac.storage.scored_rows import arrow_schema

SHARD_ROWS, FEATURES, D_SAE = 5_000, 600, 65_536


def make_shards(folder: Path, rows: int, features: int, d_sae: int, *, seed: int = 0) -> list[str]:
    """A feature from each of `features` bands of ids that widen; rare towards a band's end."""
    folder.mkdir(parents=True)
    rng, files = np.random.default_rng(seed), []
    edges = np.arange(features + 1) + ((d_sae - features) * (np.arange(features + 1) / features) ** 3).astype(int)
    first, size = edges[:-1].astype(np.int32), np.diff(edges).astype(np.float32)
    measurement = json.dumps({"d_sae": d_sae, "keep_above": 0.0})
    for start in range(0, rows, SHARD_ROWS):
        n = min(SHARD_ROWS, rows - start)
        inside = np.minimum(rng.standard_exponential((n, features), np.float32) * size / 10, size - 1)
        ids = pa.array((first + inside.astype(np.int32)).reshape(-1))
        acts = pa.array(rng.standard_exponential(n * features, np.float32) * 2 + np.float32(1e-6))
        starts = pa.array(np.arange(0, n * features + 1, features, dtype=np.int32))
        columns = [pa.ListArray.from_arrays(starts, ids), pa.ListArray.from_arrays(starts, acts)]
        columns += [pa.array(np.full(n, 100, np.int32)), pa.array([measurement] * n)]
        files.append(str(folder / f"shard-{len(files):05d}.parquet"))
        pq.write_table(pa.table(columns, schema=arrow_schema()), files[-1], row_group_size=1000)
    return files


def status(name: str) -> float:
    """A line of this process's status, in MB; NaN where there is none (not Linux)."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return float("nan")
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024 / 1e6


def measure(files: list[str]) -> None:
    from hf_fac.coverage.coverage import FeatureCoverage

    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    FeatureCoverage.from_parquet(files[:1])
    before = status("VmRSS")
    start, own = time.perf_counter(), time.process_time()
    coverage = FeatureCoverage.from_parquet(files)
    seconds, own = time.perf_counter() - start, time.process_time() - own
    print(json.dumps([seconds, own, status("VmHWM"), before, coverage.rows]))


def measured(files: list[str], runs: int) -> list[float]:
    """Medians over processes: seconds by the clock, of the core, peak and earlier memory in MB, rows."""
    command = [sys.executable, __file__, "--measure"]
    found = [
        json.loads(subprocess.run(command, input="\n".join(files), capture_output=True, text=True, check=True).stdout)
        for _ in range(runs)
    ]
    return [statistics.median(values) for values in zip(*found, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--pairs", type=int, default=3, help="runs of each case in the tables")
    parser.add_argument("--folder", help="where the shards are written; by default a temporary folder")
    options = parser.parse_args()
    small = max(options.rows // 50, 1000)
    tables = {
        "rows": [(small * k, FEATURES, D_SAE) for k in (1, 2, 4)],
        "active features of a row": [(small, FEATURES * k // 2, D_SAE) for k in (1, 2, 4)],
        "width of the SAE": [(small, FEATURES, D_SAE * k // 4) for k in (1, 2, 4)],
    }
    print(f"one core, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory(dir=options.folder) as root:
        for name, cases in tables.items():
            print(f"by {name}:")
            times = []
            for rows, features, d_sae in cases:
                files = make_shards(Path(root) / f"{rows}-{features}-{d_sae}-{name[0]}", rows, features, d_sae)
                clock, own, peak, before, _ = measured(files, options.pairs)
                times.append(own)
                print(
                    f"  {rows:,} rows of {features:,} of {d_sae:,}: {clock:.2f} s ({own:.2f} s of the core, "
                    f"{own / times[0]:.2f} x the first), peak {peak:.0f} MB, {peak - before:.0f} above that before"
                )
            if name != "width of the SAE":
                sizes = np.array([case[0] * case[1] for case in cases])
                slope, offset = np.polyfit(sizes, times, 1)
                worst = np.abs(np.polyval([slope, offset], sizes) / times - 1).max()
                print(f"  fit: {slope * 1e9:.1f} ns an activation + {offset:.2f} s, at most {worst:.0%} off")
        files = make_shards(Path(root) / "whole", options.rows, FEATURES, D_SAE)
        clock, own, peak, before, rows = measured(files, 1)
        print(
            f"{rows:,.0f} rows of {FEATURES} of {D_SAE:,}: {clock:.1f} s ({own:.1f} s of the core), "
            f"peak {peak:.0f} MB, {peak - before:.0f} above that before"
        )


if __name__ == "__main__":
    if sys.argv[1:] == ["--measure"]:
        measure(sys.stdin.read().split("\n"))
    else:
        main()
