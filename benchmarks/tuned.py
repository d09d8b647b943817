"""Whether what predictors.py finds with a head holds when the model learns too: LoRA and a head, a set of each second
way.

    python benchmarks/tuned.py --task toxicity --data toxicity.jsonl

Of the held-out half of the toxicity task the first set of each second way is learned by the first 15 blocks of the
model, with LoRA of rank 8 on all their matrices and a head on mean hidden states, 2 epochs; 400 test rows. Printed are
r with the performance of the head alone over the same sets, and r and rho of the predictors in the variants that
predictors.py, which runs first, chose on the development half.
"""

from __future__ import annotations

import json

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from predictors import Predictors, pearson, training_sets
from scipy.stats import spearmanr
from study import MAX_TOKENS, Performance, Rows, average_precision, read_rows, study_options

from hf_fac.embedded import LAYER, load_model

EPOCHS, BATCH, TEST_ROWS = 2, 10, 400


class Tuned:
    """What a training set brings LoRA and a head: average precision at 10 % prevalence."""

    def __init__(self, rows: Rows):
        self.rows = rows
        self.tokenizer = load_model()[1]
        pool = rows.inputs[rows.parts["pool"]]
        self.mean, self.scale = torch.tensor(pool.mean(0)).float(), torch.tensor(pool.std(0) + 1e-6).float()

    def __call__(self, indices: np.ndarray, seed: int) -> float:
        torch.manual_seed(seed)
        model = load_model()[0].model
        model.layers = model.layers[:LAYER]
        model.norm = torch.nn.Identity()
        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
        head = torch.nn.Linear(model.config.hidden_size, 1)
        torch.nn.init.zeros_(head.weight)
        adam = torch.optim.AdamW(
            [{"params": [p for p in model.parameters() if p.requires_grad], "lr": 5e-4},
             {"params": head.parameters(), "lr": 1e-3}]
        )  # fmt: skip
        model.train()
        for _ in range(EPOCHS):
            for batch in np.split(indices[torch.randperm(len(indices)).numpy()], len(indices) // BATCH):
                labels = torch.tensor(self.rows.labels[batch]).float()
                adam.zero_grad()
                torch.nn.functional.binary_cross_entropy_with_logits(
                    self._logits(model, head, batch), labels
                ).backward()
                adam.step()
        model.eval()
        test = self.rows.parts["test"][:TEST_ROWS]
        with torch.no_grad():
            batches = np.array_split(test[np.argsort(self.rows.tokens[test])], TEST_ROWS // 40)
            scores = torch.cat([self._logits(model, head, batch) for batch in batches]).numpy()
        return average_precision(self.rows.labels[np.concatenate(batches)], scores)

    def _logits(self, model: torch.nn.Module, head: torch.nn.Module, batch: np.ndarray) -> torch.Tensor:
        texts = [self.rows.records[i]["text"] for i in batch]
        inputs = self.tokenizer(
            texts, return_tensors="pt", padding=True, truncation=True, max_length=MAX_TOKENS["toxicity"]
        )
        mask = inputs["attention_mask"][:, :, None].float()
        hidden = model(**inputs, use_cache=False).last_hidden_state
        return head(((hidden * mask).sum(1) / mask.sum(1) - self.mean) / self.scale)[:, 0]


def main() -> None:
    options = study_options(__doc__, ("toxicity",)).parse_args()
    rows = read_rows(options.task, options.data, options.output, limit=options.limit)["held out"]
    sets = list(training_sets(options.task, rows, 1, {}))[::2]
    tuned, head, predictors = Tuned(rows), Performance(options.task, rows), Predictors(options.task, rows)
    found, alone, values = [], [], []
    for number, one in enumerate(sets):
        found.append(tuned(one["rows"], number))
        alone.append(head(one["rows"]))
        values.append(predictors(one))
        print(f"{one['way']}: {found[-1]:.3f} with LoRA, {alone[-1]:.3f} with a head", flush=True)
    print(f"\nr of LoRA and head: {pearson(np.array(found), np.array(alone)):.2f}\n")
    print("| predictor | variant | r, LoRA | rho, LoRA | r, head |\n|---|---|---|---|---|")
    for line in json.loads((options.output / f"{options.task}-12.json").read_text()):
        name, variant = line["predictor"], line["variant"]
        column = np.array([row[name, variant] for row in values])
        r, rho = pearson(column, np.array(found)), spearmanr(column, found).statistic
        print(f"| {name} | {variant} | {r:.2f} | {rho:.2f} | {pearson(column, np.array(alone)):.2f} |")


if __name__ == "__main__":
    main()
