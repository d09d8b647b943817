"""A user's training script with the callback, which a chat server writes for: `training_script.py folder url`.

Started again it resumes from its last whole checkpoint."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from trainer_runs import callback_for, examples, featurizer_of, sft, trained, weights

from hf_fac import EndpointChat, FACSynthesizer


def main(folder: Path, url: str) -> None:
    torch.set_num_threads(1)
    kind, run = "prompt_completion", folder / "run"
    trainer = sft(examples(kind, 7), run, num_train_epochs=3, save_strategy="steps", save_steps=1)
    featurizer = featurizer_of(trainer.model, trainer.processing_class, pool_over="user")
    synthesizer = FACSynthesizer(
        EndpointChat("m", base_url=url), featurizer, task="instruction_following", samples_per_feature=1,
        methods=("two_step",), prompt_format="text", candidates=3,
    )  # fmt: skip
    callback = callback_for(trainer, kind, synthesizer=synthesizer, refresh="epoch", max_samples=15)
    # The trainer writes this file last.
    whole = [state.parent for state in run.glob("checkpoint-*/trainer_state.json")]
    last = max(whole, key=lambda checkpoint: int(checkpoint.name.split("-")[1]), default=None)
    trained(trainer, resume_from_checkpoint=last and str(last))
    (folder / "rows.json").write_text(json.dumps(callback.new_rows.to_list()))
    torch.save(weights(trainer), folder / "weights.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
