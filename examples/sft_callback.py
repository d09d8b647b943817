"""SFT on a narrow set, with and without FACSynthesisCallback: FAC before and after, and the loss on broad requests.

    python examples/sft_callback.py [--samples 10] [--steps 10] [--output runs/sft_callback]

The embedded model learns how people put requests from 100 small programming jobs. Of the broad anchor set a part is
held out, the rest says what is missing. The model in training measures and writes. Both runs take as many steps.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

from peft import LoraConfig
from transformers import set_seed
from trl import SFTConfig, SFTTrainer

from hf_fac import FACSynthesisCallback, FACSynthesizer, get_task
from hf_fac.embedded.loader import load_anchor, load_dictionary, load_featurizer, load_seed

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--samples", type=int, default=10, help="the most samples that are written")
parser.add_argument("--steps", type=int, default=10)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--output", type=Path, default=Path("runs/sft_callback"))


def main() -> None:
    arguments = parser.parse_args()
    rows = load_seed().select_columns(["messages"])
    broad = load_anchor().select_columns(["messages"]).train_test_split(test_size=50, seed=arguments.seed)
    anchor, held_out = broad["train"], broad["test"]

    def trainer_of(featurizer, name):
        set_seed(arguments.seed)
        return SFTTrainer(
            featurizer.model,
            args=SFTConfig(
                output_dir=str(arguments.output / name), max_steps=arguments.steps, per_device_train_batch_size=4,
                learning_rate=2e-4, max_length=96, seed=arguments.seed, save_strategy="no", report_to=[],
                use_cpu=True, activation_checkpointing=False, bf16=False,
            ),
            train_dataset=rows,
            eval_dataset=held_out,
            processing_class=featurizer.tokenizer,
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
        )  # fmt: skip

    start = time.monotonic()
    featurizer = load_featurizer(max_length=96)
    untrained = trainer_of(featurizer, "without")
    losses = {"before training": untrained.evaluate()["eval_loss"]}
    untrained.train()
    losses["without the callback"] = untrained.evaluate()["eval_loss"]

    # The model in training writes, and delta is calibrated on the anchor set.
    featurizer = load_featurizer(max_length=96)
    synthesizer = FACSynthesizer(
        featurizer=featurizer, dictionary=load_dictionary(),
        task=replace(get_task("instruction_following"), name="requests", type="messages"), samples_per_feature=1,
        methods=("two_step",), prompt_format="list", rounds=1, answer_tokens=32, avoid={"held out": held_out},
        seed=arguments.seed,
    )  # fmt: skip
    trainer = trainer_of(featurizer, "with")
    callback = FACSynthesisCallback(trainer, synthesizer, anchor=anchor, max_samples=arguments.samples)
    trainer.add_callback(callback)
    trainer.train()
    losses["with the callback"] = trainer.evaluate()["eval_loss"]

    numbers = callback.summary
    print(f"{len(callback.new_rows)} samples for {numbers['fac/missing']} features in {numbers['fac/seconds']:.0f} s:")
    print(f"FAC {numbers['fac/before']:.3f} before, {numbers['fac/after']:.3f} after")
    for name, loss in losses.items():
        print(f"loss on {len(held_out)} held-out broad requests, {name}: {loss:.3f}")
    print(f"{time.monotonic() - start:.0f} s in all; new rows and report: {callback.folder}")


if __name__ == "__main__":
    main()
