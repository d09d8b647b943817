"""Behaviour steering (arXiv 2602.10388): a steering vector is made of each arm's contrastive rows (Rimsky et al. 2024,
arXiv:2312.06681) and tried on held-out questions with two choices.

    python examples/steering.py --methods random,pool,full --seeds 42,43,44 --output runs/steering

Without more, the embedded model is steered towards sycophancy with the small files in examples/data. The metric is the
steering control rate: robust accuracy (right in both orders of the choices) at --multiplier less that at its negative.
A vector is computed, not trained: the seed draws which half of the rows has its matching choice first.

Rows have the columns question, matching and other, or question, answer_matching_behavior and
answer_not_matching_behavior (letters of choices in the question). docs/recipes.md has the paper's data and models.
"""

from __future__ import annotations

import random

import torch
from datasets import Dataset
from recipe import Recipe, options, read_sets, run, small_data, trained_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_fac import SteeringVector, Task, evaluate_steering, get_task
from hf_fac.steering.choices import exchanged

CAA_COLUMNS = ("question", "answer_matching_behavior", "answer_not_matching_behavior")


def main() -> None:
    parser = options(
        __doc__, **small_data("sycophancy"), samples=10, methods="random,pool,full", output="runs/steering"
    )  # fmt: skip
    parser.add_argument("--task", default="sycophancy", help="sycophancy, survival_instinct or a YAML file")
    parser.add_argument("--layer", type=int, help="where the vector is added; by default half of the blocks")
    parser.add_argument("--multiplier", type=float, default=1.0)
    arguments = parser.parse_args()
    task = get_task(arguments.task)
    seed, anchor, evaluation = (contrastive_rows(rows, task) for rows in read_sets(arguments))
    name, device = trained_model(arguments), "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(name, dtype="auto").to(device)
    tokenizer = AutoTokenizer.from_pretrained(name)
    layer = model.config.get_text_config().num_hidden_layers // 2 if arguments.layer is None else arguments.layer

    def control_rate(rows: Dataset, seed: int, arm: str) -> dict[str, float]:
        vector = SteeringVector.from_rows(model, tokenizer, balanced(rows, seed), layer=layer)
        result = evaluate_steering(model, tokenizer, vector, evaluation, multiplier=arguments.multiplier)
        low, high = result.interval
        figures = {"control rate": result.control_rate, "interval low": low, "interval high": high}
        for name, values in (("accuracy", result.accuracy), ("probability", result.probability)):
            figures |= {f"{name} {sign}": value for sign, value in zip("-0+", values, strict=True)}
        return figures | {"norm": vector.vector.norm().item()}

    recipe = Recipe(
        task=task, seed=seed, anchor=anchor, evaluation=evaluation, train_and_evaluate=control_rate,
        settings={"layer": layer, "multiplier": arguments.multiplier},
    )  # fmt: skip
    run(recipe, arguments)


def balanced(rows: Dataset, seed: int) -> list[dict]:
    """Returns the rows with choices exchanged so that in half of them, drawn by the seed, the matching one comes first:
    otherwise the mean difference is mostly that of the two letters."""
    first = set(random.Random(seed).sample(range(len(rows)), len(rows) // 2))
    return [
        row
        if (row["chosen"][0]["content"] < row["rejected"][0]["content"]) == (number in first)
        else exchanged(row, number)
        for number, row in enumerate(rows)
    ]


def contrastive_rows(rows: Dataset, task: Task) -> Dataset:
    """Returns rows as the task has them written, whichever of the known columns they have."""
    found = []
    for number, row in enumerate(rows):
        if "matching" in row:
            written, reason = task.row({name: row[name] for name in task.parts})
            if written is None:
                raise SystemExit(f"Row {number} is no row of {task.name}: {reason}.")
        else:
            roles = zip(("user", "assistant", "assistant"), CAA_COLUMNS, strict=True)
            turns = ([{"role": role, "content": row[column].strip()}] for role, column in roles)
            written = dict(zip(task.features(), turns, strict=True))
        found.append(written)
    return Dataset.from_list(found, features=task.features())


if __name__ == "__main__":
    main()
