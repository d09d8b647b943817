"""How long a report takes once rows are scored, beside reading them: 65,536 features, 600 active in a row.

    python benchmarks/report.py [--rows 20000] [--runs 5]

Every run reads data and anchor set from shards, of --rows rows each, and makes the report with its intervals, deficits,
rarefaction, HTML page and figure. The ratio of each to the reading is taken in each run; medians are printed.
"""

import argparse
import os
import statistics
import tempfile
from pathlib import Path

from bare_pass import seconds
from coverage import D_SAE, FEATURES, make_shards

from hf_fac import FeatureCoverage

DELTA = 4.0

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--rows", type=int, default=20_000)
parser.add_argument("--runs", type=int, default=5)
options = parser.parse_args()


def run(data_files: list[str], anchor_files: list[str], folder: Path) -> dict[str, float]:
    made = {}

    def read() -> None:
        made["data"], made["anchor"] = map(FeatureCoverage.from_parquet, (data_files, anchor_files))

    def compare() -> None:
        made["report"] = made["data"].compare(made["anchor"], threshold=DELTA)

    jobs = {
        "reading": read,
        "compare": compare,
        "deficits": lambda: made["report"].deficits(),
        "rarefaction": lambda: made["report"].rarefaction([options.rows // 4, options.rows // 2]),
        "HTML page": lambda: made["report"].to_html(folder / "report.html"),
        "figure": lambda: made["report"].plot().savefig(folder / "report.png"),
    }
    return {name: seconds(job) for name, job in jobs.items()}


def main() -> None:
    with tempfile.TemporaryDirectory() as root:
        data, anchor = (
            make_shards(Path(root) / name, options.rows, FEATURES, D_SAE, seed=seed)
            for seed, name in enumerate(("data", "anchor"))
        )
        times = [run(data, anchor, Path(root)) for _ in range(options.runs)]
    print(f"two sets of {options.rows:,} rows, {options.runs} runs, load {os.getloadavg()[0]:.1f}")
    for name in times[0]:
        found, ratios = [one[name] for one in times], [one[name] / one["reading"] for one in times]
        middle, low, high = statistics.median(ratios), min(ratios), max(ratios)
        print(f"{name}: {statistics.median(found):.2f} s, {middle:.3f} of reading ({low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
