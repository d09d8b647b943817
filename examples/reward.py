"""Reward modelling (arXiv 2602.10388): pairs are added to a seed set, a reward model learns from each arm.

    python examples/reward.py --methods random,pool,two_step --seeds 42,43,44 --output runs/reward

By default the embedded model learns from pairs of its own: its answer to a request is chosen, its answer to another one
rejected. The seed set has narrow requests, the anchor set broad ones. The metric is the accuracy by section of
RewardBench (Lambert et al. 2024, arXiv:2403.13787), on 40 pairs in examples/data that have its columns and are no part
of it.

Rows are pairs as TRL reads them, texts or messages, with or without a prompt, or transcripts of "Human:" and
"Assistant:" turns as in hh-rlhf. docs/recipes.md has the paper's models and data.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from recipe import Recipe, options, read_rows, run, trained_model, trainer_settings
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from trl import RewardConfig, RewardTrainer, extract_prompt

from hf_fac import LocalChat, get_task, transcript_to_messages
from hf_fac.embedded.loader import load_anchor, load_model, load_seed
from hf_fac.storage.files import write_whole

# By section, the weights of its subsets (rewardbench/constants.py of allenai/reward-bench). They are numbers of pairs,
# but for math-prm, which weighs as much as all code.
SECTIONS = {
    "Chat": {
        "alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95, "mt-bench-easy": 28, "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37, "llmbar-natural": 100, "llmbar-adver-neighbor": 134, "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100, "refusals-offensive": 100, "xstest-should-refuse": 250, "xstest-should-respond": 154,
        "donotanswer": 136,
    },
    "Reasoning": {
        "math-prm": 984, "hep-cpp": 164, "hep-go": 164, "hep-java": 164, "hep-js": 164, "hep-python": 164,
        "hep-rust": 164,
    },
}  # fmt: skip
DATA = Path(__file__).parent / "data" / "reward_evaluation.jsonl"
# Learning rate and epochs: the paper's, and those of the embedded model.
_PAPER = {"lora": (8e-5, 1), "head": (8e-5, 5)}
_SMALL = {"lora": (1e-3, 1), "head": (5e-3, 3)}
_ROLES = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}


def main() -> None:
    parser = options(__doc__, evaluation=DATA, samples=8, methods="random,pool,two_step", output="runs/reward")
    parser.add_argument("--tune", choices=("lora", "head"), default="lora", help="LoRA, or the reward head")
    arguments = parser.parse_args()
    name, tune = trained_model(arguments), arguments.tune
    learning_rate, epochs = (_SMALL if arguments.model is None else _PAPER)[tune]
    tokenizer = AutoTokenizer.from_pretrained(name)
    evaluation = read_rows(arguments.evaluation)

    def train_and_evaluate(rows: Dataset, seed: int, arm: str) -> dict[str, float]:
        set_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=1)
        if tune == "head":
            model.requires_grad_(False).score.requires_grad_(True)
        lora = LoraConfig(
            r=8, lora_alpha=32, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["score"]
        )
        trainer = RewardTrainer(
            model,
            args=RewardConfig(
                **trainer_settings(arguments, seed, learning_rate=learning_rate, epochs=epochs),
                per_device_train_batch_size=4, bf16=torch.cuda.is_available(),
                activation_checkpointing=torch.cuda.is_available(),
            ),
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=lora if tune == "lora" else None,
        )  # fmt: skip
        trainer.train()
        return section_accuracy(trainer.model, tokenizer, evaluation)

    recipe = Recipe(
        task=get_task("helpfulness"),
        seed=pairs(arguments.seed_data, load_seed()["messages"][:40], arguments.output / "seed_pairs.jsonl"),
        anchor=pairs(arguments.anchor, load_anchor()["messages"][:120], arguments.output / "anchor_pairs.jsonl"),
        evaluation=evaluation, train_and_evaluate=train_and_evaluate,
        settings={"tune": tune, "learning_rate": learning_rate, "epochs": epochs},
    )  # fmt: skip
    run(recipe, arguments)


def section_accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, Any]], *, batch_size: int = 16
) -> dict[str, float]:
    """Returns the accuracy of a reward model: "accuracy", the mean over sections, and that of each section by its name.

    A pair is right when the chosen answer has the higher reward. A section's accuracy is the mean over its subsets with
    the weights of RewardBench. Sections without rows are left out; rows without subsets have no sections.

    Args:
        model: a sequence classifier with one label.
        rows: prompt, chosen and rejected as `as_pair` reads them, and subset.

    Raises: ValueError for subsets that RewardBench does not have.
    """
    known = {subset for weights in SECTIONS.values() for subset in weights}
    subsets = [row.get("subset") for row in rows]
    if unknown := set(subsets) - known - {None}:
        raise ValueError(f"RewardBench has no subset {min(unknown)!r}; its subsets are {', '.join(sorted(known))}.")
    conversations = [as_pair(row) for row in rows]
    chosen, rejected = (
        rewards(model, tokenizer, [pair["prompt"] + pair[side] for pair in conversations], batch_size=batch_size)
        for side in ("chosen", "rejected")
    )
    is_right = (chosen > rejected).float()
    if None in subsets:
        return {"accuracy": is_right.mean().item()}
    right: dict[str, list[float]] = defaultdict(list)
    for subset, value in zip(subsets, is_right.tolist(), strict=True):
        right[subset].append(value)
    sections = {}
    for section, weights in SECTIONS.items():
        if found := [subset for subset in weights if subset in right]:
            weighted = sum(weights[subset] * sum(right[subset]) / len(right[subset]) for subset in found)
            sections[section] = weighted / sum(weights[subset] for subset in found)
    return {"accuracy": sum(sections.values()) / len(sections), **sections}


@torch.no_grad()
def rewards(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, conversations: Sequence[list[dict]], *, batch_size: int
) -> torch.Tensor:
    """Returns the reward of each conversation: float32 [n]."""
    texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in conversations]
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found = torch.empty(len(texts))
    model.eval()
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        batch = tokenizer([texts[i] for i in places], add_special_tokens=False, padding=True, return_tensors="pt")
        found[places] = model(**batch.to(model.device)).logits[:, 0].float().cpu()
    return found


def as_pair(row: dict[str, Any]) -> dict[str, list[dict[str, str]]]:
    """Returns prompt, chosen and rejected as lists of messages, of texts, messages or transcripts."""
    if row.get("prompt") is None:
        sides = {side: row[side] for side in ("chosen", "rejected")}
        return extract_prompt({k: transcript_to_messages(v) if isinstance(v, str) else v for k, v in sides.items()})
    return {
        name: [{"role": role, "content": row[name]}] if isinstance(row[name], str) else row[name]
        for name, role in _ROLES.items()
    }


def pairs(given: str | None, requests: list[list[dict[str, str]]], path: Path) -> Dataset:
    """Returns the given pairs; without any, those that the embedded model makes of requests, kept in a file."""
    if given is None and not path.exists():
        found = LocalChat(*load_model()).complete(requests, max_tokens=24)
        answers = [[{"role": "assistant", "content": answer.text}] for [answer] in found]
        columns = zip(requests, answers, answers[1:] + answers[:1], strict=True)
        rows = [dict(zip(_ROLES, values, strict=True)) for values in columns]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))
    return Dataset.from_list([as_pair(row) for row in read_rows(given or path)])


if __name__ == "__main__":
    main()
