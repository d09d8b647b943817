"""How much memory scoring takes above model and SAE, and how its time grows with rows, length and width of the SAE.

    python benchmarks/memory.py [--runs 3] [--length 512] [--width 65536]

Each case runs in a process of its own (Linux): it makes a small Llama and an SAE with random weights, reads one short
row, and then measures the peak of its resident memory while it reads the rows, above what it held before. Hidden states
of one batch are part of that and named beside it. Lengths are in tokens. Times and peaks are medians of `--runs`
processes; a fit of time = a + b x size, over each table, says how far from a straight line the times are.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

D_IN, ROWS = 256, 32


def resident(name: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024 / 1e6


def measure(kind: str, rows: int, length: int, width: int) -> None:
    import torch
    from sae_lens import StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from hf_fac.embedded.loader import model_folder
    from hf_fac.features.featurizer import SAEFeaturizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=D_IN, intermediate_size=2 * D_IN, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=8192,
    )  # fmt: skip
    if kind == "TopK":
        sae = TopKSAE(TopKSAEConfig(d_in=D_IN, d_sae=width, k=32))
    else:
        sae = StandardSAE(StandardSAEConfig(d_in=D_IN, d_sae=width))
    torch.nn.init.normal_(sae.W_enc)
    featurizer = SAEFeaturizer(LlamaForCausalLM(config).eval(), tokenizer, sae, layer=1, max_length=length)
    words = np.random.default_rng(0).choice([f" word{i}" for i in range(1000)], (rows, length))
    texts = ["".join(row) for row in words]
    featurizer(texts[:1])
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before, start = resident("VmRSS"), time.perf_counter()
    featurizer(texts)
    seconds, states = time.perf_counter() - start, featurizer.settings.batch_tokens * D_IN * 4 / 1e6
    print(json.dumps([seconds, resident("VmHWM") - before, states]))


def measured(case: tuple, runs: int) -> list[float]:
    """Medians: seconds, MB above the model and SAE, MB of a batch's hidden states."""
    command = [sys.executable, "-W", "ignore", __file__, "--measure", *map(str, case)]
    found = []
    for _ in range(runs):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    return [statistics.median(values) for values in zip(*found, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--width", type=int, default=65_536)
    options = parser.parse_args()
    length, width = options.length, options.width
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; Llama of width {D_IN}")
    for kind in ("TopK", "standard"):
        tables = {
            "rows": [(kind, ROWS * k // 2, length, width) for k in (1, 2, 4)],
            "length": [(kind, ROWS, length * k // 2, width) for k in (1, 2, 4)],
            "width": [(kind, ROWS, length, width * k // 4) for k in (1, 2, 4)],
        }
        for number, (name, cases) in enumerate(tables.items(), start=1):
            print(f"{kind} SAE, by {name}:")
            times = []
            for case in cases:
                seconds, peak, states = measured(case, options.runs)
                times.append(seconds)
                print(
                    f"  {case[1]} rows of {case[2]:,} tokens, {case[3]:,} features: {seconds:.2f} s "
                    f"({seconds / times[0]:.2f} x the first), {peak:.0f} MB, hidden states {states:.0f} MB of it"
                )
            sizes = [case[number] for case in cases]
            fit = np.polyval(np.polyfit(sizes, times, 1), sizes)
            print(f"  a straight line is at most {np.abs(fit / times - 1).max():.0%} off")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2], *map(int, sys.argv[3:]))
    else:
        main()
