"""What FACSynthesisCallback costs a run while it has nothing to do, on the embedded model.

    python benchmarks/callback.py [--steps 20]

Every method that the Trainer calls on it is timed, in a second train() whose training set was filled by the first; the
share of the run that is spent in them is printed: under 0.01 is asked. One row a step: the worst case.
"""

import argparse
import tempfile
import time
from dataclasses import replace

from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from hf_fac import FACSynthesisCallback, FACSynthesizer, get_task
from hf_fac.embedded.loader import load_dictionary, load_featurizer, load_seed

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=20)
options = parser.parse_args()

featurizer = load_featurizer()
rows = load_seed().select_columns(["messages"]).select(range(20))
with tempfile.TemporaryDirectory() as folder:
    arguments = SFTConfig(
        output_dir=folder, max_steps=options.steps, per_device_train_batch_size=1, max_length=16, save_strategy="no",
        report_to=[], use_cpu=True, bf16=False, activation_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = SFTTrainer(featurizer.model, args=arguments, train_dataset=rows, processing_class=featurizer.tokenizer)
    task = replace(get_task("instruction_following"), name="requests", type="messages")
    synthesizer = FACSynthesizer(
        featurizer=featurizer, dictionary=load_dictionary(), task=task, threshold=5.657, methods=("two_step",)
    )
    callback = FACSynthesisCallback(trainer, synthesizer, anchor=rows)
    trainer.add_callback(callback)
    trainer.train()
    assert not len(callback.new_rows), "nothing is missing from the rows themselves"

    spent, calls = 0.0, 0

    def timed(method):
        def wrapper(*args, **kwargs):
            global spent, calls
            start = time.perf_counter()
            method(*args, **kwargs)
            spent, calls = spent + time.perf_counter() - start, calls + 1

        return wrapper

    for name in dir(TrainerCallback):
        if name.startswith("on_"):
            setattr(callback, name, timed(getattr(callback, name)))
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
print(
    f"{calls} calls in {options.steps} steps of {seconds / options.steps:.2f} s: {spent / seconds:.1e} of the run "
    f"({1e6 * spent / calls:.1f} µs a call)"
)
