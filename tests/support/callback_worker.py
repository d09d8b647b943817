"""One process of a run with the callback; started by torchrun: `callback_worker.py folder what [seconds]`."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch

torch.set_num_threads(1)

from trainer_runs import (  # noqa: E402
    TinySynthesizer,
    callback_for,
    examples,
    featurizer_of,
    real_synthesizer,
    reward,
    sft,
    steps,
    trained,
    weights,
    with_new,
)


def main(folder: Path, what: str, seconds: float) -> None:
    rank = int(os.environ["RANK"])
    kind, make = ("preference", reward) if "reward" in what else ("messages", sft)
    if "real" in what:
        kind = "prompt_completion"
    settings = {"ddp_timeout": 20, "save_strategy": "epoch"}
    rows = examples(kind, 7)
    extra = {}
    if "epoch" in what:
        extra = {"refresh": "epoch", "max_samples": 8}
    if "dropped" in what:
        settings |= {"max_length": 60}
    if "packed" in what:
        settings |= {"packing": True, "max_length": 48, "padding_free": False}
        extra = {"train_dataset": rows}
    trainer = make(rows, folder / "run", **settings)
    assert trainer.args.world_size == 2
    synthesizer = TinySynthesizer(
        featurizer_of(trainer.model, trainer.processing_class), kind,
        seconds=seconds * rank, words=8 + rank * ("differs" in what), fails_in=1 if "fails" in what else None,
        raises_in=1 if "raises" in what else None,
    )  # fmt: skip
    if "real" in what:
        synthesizer = real_synthesizer(trainer, kind)
        synthesizer.written, synthesizer.calls = [], 1
    callback = callback_for(
        trainer, kind, synthesizer=synthesizer, on_error="warn" if "warn" in what else "raise", **extra
    )
    started = time.monotonic()
    try:
        trained(trainer)
    except Exception as error:
        (folder / f"error-{rank}.txt").write_text(f"{type(error).__name__}: {error}\n{time.monotonic() - started}")
        # torchrun would stop the other one; each is to stop by itself.
        time.sleep(6)
        raise
    result = {
        "rows": callback.new_rows.to_list(), "written": synthesizer.written, "calls": synthesizer.calls,
        "steps": trainer.state.max_steps, "log": steps(trainer), "n": len(trainer.train_dataset),
    }  # fmt: skip
    (folder / f"result-{rank}.json").write_text(json.dumps(result))
    torch.save(weights(trainer), folder / f"weights-{rank}.pt")
    if "start" in what:
        other = trained(make(with_new(rows, callback.new_rows), folder / "other", **settings))
        torch.save(weights(other), folder / f"expected-{rank}.pt")
    if "resume" in what:
        again = make(rows, folder / "run", **settings)
        callback = callback_for(again, kind, **extra)
        trained(again, resume_from_checkpoint=str(sorted((folder / "run").glob("checkpoint-*"))[0]))
        assert callback.synthesizer.calls < synthesizer.calls
        torch.save(weights(again), folder / f"resumed-{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]) if len(sys.argv) > 3 else 0.0)
