"""A reward model on a narrow set, with and without FACSynthesisCallback: FAC before and after, and accuracy elsewhere.

    python examples/reward_callback.py [--samples 10] [--steps 20] [--output runs/reward_callback]

Pairs are made from requests: the embedded model's own answer is chosen, its answer to another request rejected. The
reward model learns from small programming jobs and is tried on broad requests; a frozen model measures and writes.
Both runs take as many steps.
"""

import argparse
import time
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, set_seed
from trl import RewardConfig, RewardTrainer

from hf_fac import FACSynthesisCallback, FACSynthesizer, LocalChat
from hf_fac.embedded.loader import load_anchor, load_dictionary, load_featurizer, load_seed, model_folder

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--samples", type=int, default=10, help="the most samples that are written")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--output", type=Path, default=Path("runs/reward_callback"))


def pairs(chat: LocalChat, prompts: list[list[dict]]) -> Dataset:
    answers = [[{"role": "assistant", "content": found[0].text}] for found in chat.complete(prompts, max_tokens=40)]
    return Dataset.from_dict({"prompt": prompts, "chosen": answers, "rejected": answers[1:] + answers[:1]})


def main() -> None:
    arguments = parser.parse_args()
    start = time.monotonic()
    featurizer = load_featurizer(pool_over="completion")
    chat = LocalChat(featurizer.model, featurizer.tokenizer)
    narrow = load_seed().shuffle(seed=arguments.seed)["messages"][:60]
    broad = load_anchor().shuffle(seed=arguments.seed)["messages"][:160]
    seed, anchor, held_out = pairs(chat, narrow), pairs(chat, broad[:110]), pairs(chat, broad[110:])
    print(f"{len(seed) + len(anchor) + len(held_out)} pairs made in {time.monotonic() - start:.0f} s")

    def trainer_of(name):
        set_seed(arguments.seed)
        return RewardTrainer(
            AutoModelForSequenceClassification.from_pretrained(model_folder(), num_labels=1),
            args=RewardConfig(
                output_dir=str(arguments.output / name), max_steps=arguments.steps, per_device_train_batch_size=4,
                learning_rate=2e-4, seed=arguments.seed, save_strategy="no", report_to=[], use_cpu=True,
                activation_checkpointing=False, bf16=False,
            ),
            train_dataset=seed,
            eval_dataset=held_out,
            processing_class=featurizer.tokenizer,
            peft_config=LoraConfig(
                r=8, lora_alpha=16, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["score"]
            ),
        )  # fmt: skip

    without = trainer_of("without")
    without.train()
    accuracy = {"without the callback": without.evaluate()["eval_accuracy"]}

    synthesizer = FACSynthesizer(
        chat, featurizer, load_dictionary(), task="helpfulness", samples_per_feature=1, methods=("two_step",),
        prompt_format="list", rounds=1, answer_tokens=40, avoid={"held out": held_out}, seed=arguments.seed,
    )  # fmt: skip
    trainer = trainer_of("with")
    callback = FACSynthesisCallback(trainer, synthesizer, anchor=anchor, max_samples=arguments.samples)
    trainer.add_callback(callback)
    trainer.train()
    accuracy["with the callback"] = trainer.evaluate()["eval_accuracy"]

    numbers = callback.summary
    print(f"{len(callback.new_rows)} pairs for {numbers['fac/missing']} features in {numbers['fac/seconds']:.0f} s:")
    print(f"FAC {numbers['fac/before']:.3f} before, {numbers['fac/after']:.3f} after")
    for name, share in accuracy.items():
        print(f"accuracy on {len(held_out)} held-out broad pairs, {name}: {share:.3f}")
    print(f"{time.monotonic() - start:.0f} s in all; new rows and report: {callback.folder}")


if __name__ == "__main__":
    main()
