"""The time of training an SAE beside its parts, SAELens and sparsify, on the embedded model.

    python benchmarks/sae_training.py [--rows 300] [--runs 5]

train_sae: layer 15, 4,096 features, TopK, steps of 1,024 tokens. Its figures on held-out rows are left out of its time:
    they are no part of training.
parts: the forward pass over the same token ids and as many `SAETrainer.step` calls on ready activations.
SAELens: as many steps of `SAETrainer` on an `ActivationsStore` of the rows' text, joined to contexts of 128 tokens.
sparsify (where it is installed): its `Trainer` on the same text in chunks of 128 tokens, as many steps. It learns with
    another optimizer, signum.

Every run does all of them one after the other, in alternating order; the ratio to `train_sae` is taken in each run, and
the median of the runs is printed.
"""

import argparse
import os
import statistics
import tempfile
from importlib.util import find_spec

import torch
from bare_pass import activation_store, times_of_first
from datasets import Dataset
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

import hf_fac.sae.training as training
from hf_fac.embedded.loader import LAYER, load_anchor, load_model
from hf_fac.inputs.hidden_states import hidden_states
from hf_fac.inputs.rows import ConversationReader
from hf_fac.sae.evaluation import SAEMetrics

CONTEXT, STEP, D_SAE, K = 128, 1024, 4096, 32

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--rows", type=int, default=300)
parser.add_argument("--runs", type=int, default=5)
options = parser.parse_args()

model, tokenizer = load_model()
rows = load_anchor().select(range(options.rows)).remove_columns("topic")
training.evaluate_sae = lambda *_, **__: SAEMetrics(0.0, 0.0, 0.0, None, 0)
pieces = ConversationReader(tokenizer, max_length=1024)(rows)
tokens = sum(int(content.sum()) for content in pieces.content)
steps = tokens // STEP
texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows]


def ours() -> None:
    training.train_sae(
        model, tokenizer, Dataset.from_list(rows.to_list()), eval_dataset=rows.select(range(2)),
        layer=LAYER, d_sae=D_SAE, batch_size=STEP, buffer_tokens=8 * STEP,
    )  # fmt: skip


def steps_on(batches) -> None:
    trainer = SAETrainer(
        SAETrainerConfig(total_training_samples=steps * STEP, train_batch_size_samples=STEP, lr_end=1e-4),
        TopKTrainingSAE(TopKTrainingSAEConfig(d_in=576, d_sae=D_SAE, k=K)),
        iter(()),
    )
    for _, batch in zip(range(steps), batches, strict=False):
        trainer.step(batch)
        trainer.n_training_steps += 1


def parts() -> None:
    for _ in hidden_states(model, pieces.ids, LAYER, batch_tokens=2048, causal=True):
        pass
    steps_on(torch.randn(steps, STEP, 576))


def sparsify(other_model) -> None:
    from sparsify import SparseCoderConfig, TrainConfig, Trainer
    from sparsify.data import chunk_and_tokenize

    n_chunks = steps * STEP // CONTEXT
    data = Dataset.from_dict({"text": texts * 2})
    data = chunk_and_tokenize(data, tokenizer, max_seq_len=CONTEXT, num_proc=1).select(range(n_chunks))
    config = TrainConfig(
        SparseCoderConfig(num_latents=D_SAE, k=K), batch_size=STEP // CONTEXT, layers=[LAYER - 1], log_to_wandb=False,
        save_dir=tempfile.mkdtemp(),
    )  # fmt: skip
    Trainer(config, data, other_model).fit()


def main() -> None:
    store = activation_store(texts, context=CONTEXT, batch=STEP // CONTEXT)
    others = {"parts": parts, "SAELens": lambda: steps_on(store)}
    if find_spec("sparsify"):
        other_model = load_model()[0]
        others["sparsify"] = lambda: sparsify(other_model)
    parts()
    ratios = times_of_first({"train_sae": ours, **others}, options.runs)
    print(f"{tokens} tokens of content in {steps} steps, {sum(map(len, pieces.ids))} tokens read by train_sae")
    print(f"load {os.getloadavg()[0]:.1f}; times of train_sae's:")
    for name, found in ratios.items():
        print(f"{name}: {statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})")


if __name__ == "__main__":
    main()
