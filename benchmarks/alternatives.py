"""Scoring beside what people write today, on the embedded model: how many times as fast, in rows a second.

    python benchmarks/alternatives.py [--rows 120] [--runs 5]

batches: transformers' `output_hidden_states=True` on padded batches of 16 rows in the given order, SAELens' `encode` of
    the layer's hidden states, the maximum over each row's tokens.
one at a time: the same, row by row.
SAELens' activation store: `ActivationsStore.get_activations` of the rows' text in contexts of 128 tokens, and `encode`.
    It joins rows, so that it gives no rows' maxima; its time is taken for as many tokens as the rows have.

Every run does all of them one after the other, in alternating order; the ratio to the featurizer is taken in each run,
and the median of the runs is printed.
"""

import argparse
import os
import statistics

import torch
from bare_pass import activation_store, times_of_first

from hf_fac.embedded.loader import LAYER, load_anchor, load_embedded_sae, load_model
from hf_fac.features.featurizer import SAEFeaturizer

CONTEXT, BATCH = 128, 16

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--rows", type=int, default=120)
parser.add_argument("--runs", type=int, default=5)
parser.add_argument("--device", default="cpu")
options = parser.parse_args()

model, tokenizer = load_model(device=options.device)
model.eval()
sae = load_embedded_sae(device=options.device)
featurizer = SAEFeaturizer(model, tokenizer, sae)
rows = [{"messages": row["messages"]} for row in load_anchor()][: options.rows]
texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows]
n_tokens = sum(len(ids) for ids in featurizer.reader(rows).ids)


@torch.no_grad()
def in_batches(size: int) -> list[torch.Tensor]:
    maxima = []
    for start in range(0, len(texts), size):
        padded = tokenizer(texts[start : start + size], return_tensors="pt", padding=True, add_special_tokens=False)
        padded = padded.to(model.device)
        hidden = model(**padded, output_hidden_states=True).hidden_states[LAYER]
        for states, mask in zip(hidden, padded["attention_mask"].bool(), strict=True):
            maxima.append(sae.encode(states[mask]).amax(0))
    return maxima


@torch.no_grad()
def from_store(store) -> None:
    for _ in range(round(n_tokens / (CONTEXT * BATCH))):
        tokens = store.get_batch_tokens()
        sae.encode(store.get_activations(tokens).reshape(-1, sae.cfg.d_in))


def main() -> None:
    featurizer(rows[:20])
    store = activation_store(texts, context=CONTEXT, batch=BATCH, device=options.device)
    others = {"batches": lambda: in_batches(BATCH), "one at a time": lambda: in_batches(1),
              "SAELens' activation store": lambda: from_store(store)}  # fmt: skip
    ratios = times_of_first({"hf-fac": lambda: featurizer(rows), **others}, options.runs)
    print(f"{len(rows)} rows, {n_tokens} tokens, {options.device}, load {os.getloadavg()[0]:.1f}")
    for name, found in ratios.items():
        print(f"{name}: {statistics.median(found):.2f} x the time ({min(found):.2f} to {max(found):.2f})")


if __name__ == "__main__":
    main()
