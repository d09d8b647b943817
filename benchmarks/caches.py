"""A second `map` in a new process: how long it takes, and what that time consists of.

    python benchmarks/caches.py [--runs 5]

The first process scores the embedded seed set, saved to disk, with the embedded model. Each later one does the same
call, whose rows are in the cache of `datasets`. Beside it: a process that loads the same data set and maps it with a
function of one line, also from the cache, and one that only imports torch. Every process starts anew; times are medians
over the runs, which alternate, and include the start of Python.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PREPARE = """
import sys
from hf_fac.embedded import load_seed
load_seed().save_to_disk(sys.argv[1])
"""
SCORED = """
import sys, time
times = [time.perf_counter()]
from datasets import load_from_disk
from hf_fac import FACScorer
from hf_fac.embedded import load_featurizer
times.append(time.perf_counter())
featurizer = load_featurizer()
times.append(time.perf_counter())
rows = load_from_disk(sys.argv[1]).map(FACScorer(featurizer), batched=True)
assert rows[0]["fac_tokens"] > 0
times.append(time.perf_counter())
print(*(later - earlier for earlier, later in zip(times, times[1:])), "torch" in sys.modules)
"""
PLAIN = """
import sys
from datasets import load_from_disk
rows = load_from_disk(sys.argv[1]).map(lambda row: {"length": len(row["messages"])})
assert rows[0]["length"]
"""
TORCH = "import torch"


def seconds(program: str, folder: Path) -> tuple[float, str]:
    """Wall time of a new process, and what it printed last."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program, str(folder)], check=True, capture_output=True, text=True)
    return time.perf_counter() - start, done.stdout.strip().rpartition("\n")[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "rows"
        seconds(PREPARE, folder)
        first, _ = seconds(SCORED, folder)
        seconds(PLAIN, folder)
        times: dict[str, list[float]] = {"scored": [], "plain": [], "torch": []}
        stages = []
        for _ in range(runs):
            for name, program in (("scored", SCORED), ("plain", PLAIN), ("torch", TORCH)):
                taken, said = seconds(program, folder)
                times[name].append(taken)
                if name == "scored":
                    *parts, has_torch = said.split()
                    assert has_torch == "False", "the second map loaded torch"
                    stages.append([float(part) for part in parts])
    middle = {name: statistics.median(values) for name, values in times.items()}
    imports, known, mapped = (statistics.median(stage) for stage in zip(*stages, strict=True))
    print(f"{os.cpu_count()} CPU cores, load {os.getloadavg()[0]:.1f}, {runs} runs")
    print(f"first process (loads the model, scores 100 rows): {first:.1f} s")
    print(
        f"second map in a new process: {middle['scored']:.2f} s ({min(times['scored']):.2f} to "
        f"{max(times['scored']):.2f}), {first / middle['scored']:.0f} x faster; imports {imports:.2f} s, the "
        f"fingerprint from hashes of the files {known:.2f} s, map from the cache {mapped:.2f} s"
    )
    print(f"{middle['scored'] / middle['plain']:.2f} x the time of a cached map of one line ({middle['plain']:.2f} s)")
    print(f"{middle['scored'] / middle['torch']:.2f} x the time of importing torch alone ({middle['torch']:.2f} s)")


if __name__ == "__main__":
    main()
