"""Instruction following (arXiv 2602.10388): samples are added to a seed set, a model is fine-tuned on each arm.

    python examples/instructions.py --methods random,pool,two_step --seeds 42,43,44 --output runs/instructions
    python examples/instructions.py --judge my-model --judge-url http://127.0.0.1:8000/v1

By default the embedded model learns how people put requests, from the package's narrow ones. The metric is the
log-likelihood of a token (the negative loss) of 40 broad requests that no arm has.

The answers of each trained model are written as AlpacaEval 2 reads them: answers/<method>-<seed>.json in --output.
With a judge the metric is AlpacaEval's win rate over the `output` of the evaluation rows, or over the answers of the
untrained model where these have none.

Rows have messages, or prompt and completion, or AlpacaEval's instruction and output. docs/recipes.md has the paper's
models and data.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from alpaca_eval_judge import ALPACA_EVAL, alpaca_eval_rows, judged
from datasets import Dataset
from peft import LoraConfig
from recipe import Recipe, options, read_rows, run, trained_model, trainer_settings
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl import SFTConfig, SFTTrainer

from hf_fac import LocalChat, get_task
from hf_fac.embedded.loader import load_anchor, load_seed
from hf_fac.storage.files import write_whole

# Learning rate and epochs: the paper's, and those of the embedded model.
_PAPER = (1e-4, 5)
_SMALL = (5e-4, 1)


def main() -> None:
    parser = options(__doc__, samples=8, methods="random,pool,two_step", output="runs/instructions")
    parser.add_argument("--answer-tokens", type=int, default=24, help="the most tokens of an answer")
    parser.add_argument("--judge", help="name of a model that compares answers; needs hf-fac[alpaca-eval]")
    parser.add_argument("--judge-url", help="its server, up to and including /v1; by default OpenAI's")
    parser.add_argument("--judge-key-env", help="name of the environment variable with the server's key")
    parser.add_argument("--judge-reads-text", action="store_true", help="for a server without log-probabilities")
    arguments = parser.parse_args()
    key = os.environ.get(arguments.judge_key_env) if arguments.judge_key_env else None
    if arguments.judge_key_env and not key:
        parser.error("the environment variable that --judge-key-env names holds no key")
    name = trained_model(arguments)
    learning_rate, epochs = _SMALL if arguments.model is None else _PAPER
    tokenizer = AutoTokenizer.from_pretrained(name)

    broad = load_anchor().train_test_split(train_size=160, test_size=40, seed=0)
    given = {"seed_data": load_seed().select(range(40)), "anchor": broad["train"], "evaluation": broad["test"]}
    given |= {option: read_rows(getattr(arguments, option)) for option in given if getattr(arguments, option)}
    seed, anchor, held_out = ([as_conversation(row) for row in rows] for rows in given.values())
    task = get_task("instruction_following")
    if not all(row["completion"] for row in seed + anchor):
        task = replace(task, name="requests", type="messages")

    def task_rows(conversations: list[dict[str, Any]]) -> Dataset:
        if task.type == "messages":
            conversations = [{"messages": row["prompt"] + row["completion"]} for row in conversations]
        return Dataset.from_list(conversations, features=task.features())

    answers = Answers(
        arguments.output / "answers", list(given["evaluation"]), [row["prompt"] for row in held_out], tokenizer,
        arguments.answer_tokens,
    )  # fmt: skip

    def train_and_evaluate(rows: Dataset, seed: int, arm: str) -> dict[str, float]:
        set_seed(seed)
        trainer = SFTTrainer(
            AutoModelForCausalLM.from_pretrained(name),
            args=SFTConfig(
                **trainer_settings(arguments, seed, learning_rate=learning_rate, epochs=epochs),
                per_device_train_batch_size=4, bf16=torch.cuda.is_available(),
                activation_checkpointing=torch.cuda.is_available(),
            ),
            train_dataset=rows,
            eval_dataset=task_rows(held_out),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
        )  # fmt: skip
        trainer.train()
        figures = {"log-likelihood": -trainer.evaluate()["eval_loss"]}
        path = answers.of(trainer.model.merge_and_unload(), f"{arm}-{seed}")
        if arguments.judge is None:
            return figures
        return judged(
            path, answers.reference(name), arguments.output / "judge" / path.stem, judge=arguments.judge,
            base_url=arguments.judge_url, key=key, reads_text=arguments.judge_reads_text,
            length_controlled=set(answers.datasets) <= ALPACA_EVAL,
        ) | figures  # fmt: skip

    settings = {"learning_rate": learning_rate, "epochs": epochs}
    for option in ("answer_tokens", "judge", "judge_url", "judge_reads_text"):
        settings[option] = getattr(arguments, option)
    recipe = Recipe(
        task=task, seed=task_rows(seed), anchor=task_rows(anchor), evaluation=given["evaluation"],
        train_and_evaluate=train_and_evaluate, settings=settings,
    )  # fmt: skip
    run(recipe, arguments)


@dataclass(frozen=True)
class Answers:
    """Writes the answers of models to instructions, in files that AlpacaEval reads.

    folder: of the files. rows: the evaluation's. prompts: the conversations to be answered, one for each row.
    max_tokens: of an answer.
    """

    folder: Path
    rows: list[dict[str, Any]]
    prompts: list[list[dict[str, str]]]
    tokenizer: PreTrainedTokenizerBase
    max_tokens: int

    @property
    def datasets(self) -> list[str]:
        """Where each instruction is from."""
        return [row.get("dataset", "hf-fac") for row in self.rows]

    def of(self, model: PreTrainedModel, name: str) -> Path:
        """Returns the file with the model's answers; temperature 0."""
        chat = LocalChat(model, self.tokenizer)
        found = chat.complete(self.prompts, temperature=0, max_tokens=self.max_tokens)
        return self._write([answer.text for [answer] in found], name)

    def reference(self, model_name: str) -> Path:
        """Returns the file with the answers that others are compared with."""
        path = self.folder / "reference.json"
        if path.exists():
            return path
        if all("output" in row for row in self.rows):
            return self._write([row["output"] for row in self.rows], "reference")
        return self.of(AutoModelForCausalLM.from_pretrained(model_name), "reference")

    def _write(self, outputs: list[str], name: str) -> Path:
        instructions = [prompt[-1]["content"] for prompt in self.prompts]
        path = self.folder / f"{name}.json"
        rows = alpaca_eval_rows(instructions, outputs, name, self.datasets)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(rows, indent=1, ensure_ascii=False))
        return path


def as_conversation(row: dict[str, Any]) -> dict[str, list[dict[str, str]]]:
    """Returns prompt and completion as lists of messages; a row without an answer has an empty completion."""
    if "messages" in row:
        has_answer = row["messages"][-1]["role"] == "assistant"
        cut = len(row["messages"]) - has_answer
        return {"prompt": row["messages"][:cut], "completion": row["messages"][cut:]}
    columns = ("instruction", "output") if "instruction" in row else ("prompt", "completion")
    parts = zip(("prompt", "completion"), ("user", "assistant"), (row[name] for name in columns), strict=True)
    return {
        name: [{"role": role, "content": value}] if isinstance(value, str) else value for name, role, value in parts
    }


if __name__ == "__main__":
    main()
