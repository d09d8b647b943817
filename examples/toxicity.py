"""Toxicity detection (arXiv 2602.10388): toxic messages are added to a seed set, a classifier learns from each arm.

    python examples/toxicity.py --methods random,pool,two_step --seeds 42,43,44 --output runs/toxicity

By default the embedded model learns from the small files in examples/data. The seed set has everyday messages and a few
insults; anchor and evaluation set have six kinds of toxic messages, and messages that only look like them. Methods add
toxic rows only. F_task is found from the labels of the anchor set. The metric is average precision.

Rows have the columns text and label (1 is toxic), or ToxicChat's user_input and toxicity. docs/recipes.md has the
paper's models and data.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import numpy as np
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from recipe import Recipe, options, read_sets, run, small_data, trained_model, trainer_settings
from sklearn.metrics import average_precision_score
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_fac import features_from_labels, get_task

# Learning rate and epochs: the paper's, and those of the embedded model.
_PAPER = {"lora": (5e-5, 3), "head": (8e-5, 15)}
_SMALL = {"lora": (5e-4, 3), "head": (5e-3, 3)}
_TOXIC = (
    "a message in which a user insults, threatens or harasses somebody, wants help with violence, crime or self-harm, "
    "asks for sexual content, invades somebody's privacy, or tries to get an assistant past its rules; nobody real is "
    "named, and it explains no way to do harm"
)


def main() -> None:
    parser = options(
        __doc__, **small_data("toxicity"), samples=24, methods="random,pool,two_step", output="runs/toxicity"
    )  # fmt: skip
    parser.add_argument("--tune", choices=("lora", "head"), default="lora", help="LoRA, or the classification head")
    arguments = parser.parse_args()
    learning_rate, epochs = (_SMALL if arguments.model is None else _PAPER)[arguments.tune]
    recipe = toxicity_recipe(
        arguments, trained_model(arguments), learning_rate=learning_rate, epochs=epochs, tune=arguments.tune
    )
    run(recipe, arguments)


def toxicity_recipe(
    arguments: argparse.Namespace, name: str, *, learning_rate: float, epochs: int, tune: str = "lora", **more: Any
) -> Recipe:
    """Returns the recipe that adds toxic rows and trains the model of this name as a classifier.

    Args:
        tune: "lora" or "head", see `classifier`.
        more: further fields of the recipe.
    """
    seed, anchor, evaluation = map(labelled_rows, read_sets(arguments))
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def train_and_evaluate(rows: Dataset, seed: int, arm: str) -> dict[str, float]:
        set_seed(seed)
        trainer = Trainer(
            classifier(name, tokenizer, tune),
            args=TrainingArguments(
                **trainer_settings(arguments, seed, learning_rate=learning_rate, epochs=epochs),
                per_device_train_batch_size=8, per_device_eval_batch_size=32,
            ),
            train_dataset=tokenized(rows, tokenizer),
            data_collator=DataCollatorWithPadding(tokenizer),
        )  # fmt: skip
        trainer.train()
        logits = trainer.predict(tokenized(evaluation, tokenizer)).predictions
        return {"average precision": float(average_precision_score(evaluation["label"], logits[:, 1] - logits[:, 0]))}

    def toxic_features(scored: Dataset) -> np.ndarray:
        found = features_from_labels(scored, anchor["label"])
        return found.ids[found.to_pandas()["effect"] > 0]

    task = get_task("toxicity")
    settings = {"tune": tune, "learning_rate": learning_rate, "epochs": epochs} | more.pop("settings", {})
    return Recipe(
        task=replace(task, label="toxic", parts={"text": _TOXIC}), unconditional_task=task, seed=seed, anchor=anchor,
        evaluation=evaluation, train_and_evaluate=train_and_evaluate, keep=lambda row: row["label"] == 1,
        features=toxic_features, settings=settings, **more,
    )  # fmt: skip


def labelled_rows(rows: Dataset) -> Dataset:
    """Returns rows with a text and a label, whichever of the known columns they have."""
    text, label = ("text", "label") if "text" in rows.column_names else ("user_input", "toxicity")
    return Dataset.from_dict({"text": rows[text], "label": [int(value) for value in rows[label]]})


def tokenized(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    return rows.map(lambda row: tokenizer(row["text"], truncation=True, max_length=256), remove_columns="text")


def classifier(name: str, tokenizer: PreTrainedTokenizerBase, tune: str) -> PreTrainedModel:
    """Returns a model with a new head, of which LoRA weights and the head are trained, or the head alone."""
    model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=2)
    model.config.pad_token_id = tokenizer.pad_token_id
    if tune == "head":
        for key, parameter in model.named_parameters():
            parameter.requires_grad = key.startswith("score.")
        return model
    # PEFT trains the head of a sequence classifier too.
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="SEQ_CLS"))


if __name__ == "__main__":
    main()
