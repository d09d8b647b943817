"""What training an SAE costs beyond its two parts: the forward passes and SAELens' own steps.

    python benchmarks/sae_training.py [--rows 300] [--pairs 5]

Each pair runs `train_sae` on the embedded model (layer 15, 4,096 features, TopK), then the bare forward pass over the
same token ids and as many `SAETrainer.step` calls on ready activations, and takes the ratio of the times. `train_sae`'s
figures on held-out rows are left out of its time on both sides: they are no part of training.
"""

import argparse
import statistics
import time

import torch
from datasets import Dataset
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

import hf_fac.sae.training as training
from hf_fac.embedded.loader import LAYER, load_anchor, load_model
from hf_fac.inputs.hidden_states import hidden_states
from hf_fac.inputs.rows import ConversationReader
from hf_fac.sae.evaluation import SAEMetrics

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--rows", type=int, default=300)
parser.add_argument("--pairs", type=int, default=5)
options = parser.parse_args()

model, tokenizer = load_model()
rows = load_anchor().select(range(options.rows)).remove_columns("topic")
training.evaluate_sae = lambda *_, **__: SAEMetrics(0.0, 0.0, 0.0, None, 0)
pieces = ConversationReader(tokenizer, max_length=1024)(rows)
tokens = sum(int(content.sum()) for content in pieces.content)
steps = tokens // 1024


def whole() -> float:
    start = time.perf_counter()
    training.train_sae(
        model, tokenizer, Dataset.from_list(rows.to_list()), eval_dataset=rows.select(range(2)),
        layer=LAYER, d_sae=4096, batch_size=1024, buffer_tokens=8192,
    )  # fmt: skip
    return time.perf_counter() - start


def parts() -> float:
    trainer = SAETrainer(
        SAETrainerConfig(total_training_samples=steps * 1024, train_batch_size_samples=1024, lr_end=1e-4),
        TopKTrainingSAE(TopKTrainingSAEConfig(d_in=576, d_sae=4096, k=32)),
        iter(()),
    )
    batches = torch.randn(steps, 1024, 576)
    start = time.perf_counter()
    for _ in hidden_states(model, pieces.ids, LAYER, batch_tokens=2048, causal=True):
        pass
    for batch in batches:
        trainer.step(batch)
        trainer.n_training_steps += 1
    return time.perf_counter() - start


parts()
ratios = []
for number in range(options.pairs):
    pair = (whole(), parts()) if number % 2 == 0 else (parts(), whole())[::-1]
    ratios.append(pair[0] / pair[1])
print(
    f"{tokens} tokens, {steps} steps: train_sae takes {statistics.median(ratios):.2f} x its forward passes plus "
    f"SAETrainer's steps (median of {options.pairs} pairs, {min(ratios):.2f} to {max(ratios):.2f})"
)
