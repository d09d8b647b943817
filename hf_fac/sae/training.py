"""Train a sparse autoencoder on the hidden states of one layer of any transformers model.

In: a model, its tokenizer and a data set of any of the row types. Out: a SAELens SAE that reads raw hidden states, with
its training data and metrics in its metadata. SAELens' trainer does the steps; this module feeds it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import torch
from tqdm.auto import tqdm

from ..inputs.hidden_states import check_layer, default_batch_tokens, is_causal, sink_cutoff
from ..inputs.rows import ConversationReader
from ..storage.files import try_output, whole_folder
from ..storage.parquet import rows_digest
from ..storage.validation import check_counts
from .evaluation import content_states, evaluate_sae
from .formats import SAELENS_WEIGHTS, hook_of_layer
from .loading import fold_input_scale, inference_parts, save_sae

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from sae_lens import SAE, TrainingSAE
    from sae_lens.training.sae_trainer import SAETrainer
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_ROWS_AT_ONCE = 256
_CHECKPOINTS, _SAMPLES, _PROGRESS = "sae-training", "samples-", "progress.json"
_HELD_OUT = 200  # rows of a stream
_SCALE_ROWS = 32  # some thousand tokens tell a mean and a median well enough


def train_sae(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset | IterableDataset | list,
    *,
    layer: int,
    d_sae: int | None = None,
    architecture: str = "topk",
    k: int = 32,
    epochs: int = 1,
    training_tokens: int | None = None,
    eval_dataset: Dataset | list | None = None,
    batch_size: int = 2048,
    learning_rate: float = 1e-3,
    buffer_tokens: int = 2**19,
    batch_tokens: int | None = None,
    max_length: int = 1024,
    seed: int = 0,
    output_dir: str | Path | None = None,
    sae_options: dict[str, Any] | None = None,
) -> SAE:
    """Returns an SAE trained on content tokens at `layer` (0: the embedding, L: the output of block L).

    Hidden states are computed on the fly and shuffled in a buffer; a data set that fits into the buffer is read by the
    model once, whatever the number of epochs. Special, template, padding and sink tokens are left out. Inputs are
    divided by their mean norm / sqrt(d_in) while training; the scale is folded into the weights at the end.

    Args:
        d_sae: number of features; 8 x the hidden size when None.
        architecture: any that SAELens trains ("topk", "batchtopk", "standard", "jumprelu", "gated", ...).
        k: active features a token, for architectures that fix it.
        epochs: how often the data set is read, unless `training_tokens` gives the number of tokens to train on.
        training_tokens: required for a streaming data set.
        eval_dataset: held-out rows; when None, 5 % of the rows (at most 500) are set aside. A streaming data set gives
            its first 200.
        batch_size, learning_rate: tokens a step; Adam with warm-up over 5 % and linear decay over the last 20 %.
        buffer_tokens: tokens in the shuffle buffer, 4 * d_in bytes each (one group of 256 rows may come on top).
        batch_tokens: tokens in one forward pass.
        output_dir: where the finished SAE is written, and in `sae-training` checkpoints, one at the end of every
            buffer. A killed run resumes from its last checkpoint when it is started again; other settings or rows are
            refused.
        sae_options: more fields of the architecture's SAELens config (`l1_coefficient`, ...).

    Returns: the SAE, float32 on the model's device, with `sae.cfg.metadata["hf_fac"]`: layer, model_revision,
        sink_norm, training_data, training_tokens, seed, and the figures of `SAEMetrics` on the held-out rows.
    Raises: ValueError for settings that cannot be, RowError for a row that cannot be read; before any work, OSError
        when output_dir cannot be written to or another process trains an SAE there.
    """
    check_layer(model, layer)
    d_in = model.config.get_text_config().hidden_size
    d_sae = 8 * d_in if d_sae is None else d_sae
    _check_settings(
        architecture, learning_rate, d_sae=d_sae, k=k, epochs=epochs, training_tokens=training_tokens,
        batch_size=batch_size, max_length=max_length, buffer_tokens=buffer_tokens, batch_tokens=batch_tokens,
    )  # fmt: skip
    with _Checkpoints(output_dir) as checkpoints:
        train, held_out = _split(dataset, eval_dataset, seed)
        reader = ConversationReader(tokenizer, max_length=max_length)
        batch_tokens = batch_tokens or default_batch_tokens(model.device)
        stream = _Stream(model, reader, train, layer, buffer_tokens, batch_tokens, seed)
        total = training_tokens or epochs * stream.count_tokens()
        scale, sink_norm = stream.measure_scale()
        batch_size = min(batch_size, total)
        steps = max(total // batch_size, 1)
        torch.manual_seed(seed)
        sae_options = {"d_in": d_in, "d_sae": d_sae, **(sae_options or {})}
        new_sae = _new_sae(model, layer, architecture, sae_options, k)
        trainer = _trainer(new_sae, steps, batch_size, learning_rate)
        # The rows of a stream are not known yet.
        keeps_rows = output_dir is not None and hasattr(train, "__len__")
        settings = {
            "config": {name: value for name, value in new_sae.cfg.to_dict().items() if name != "metadata"},
            "layer": layer, "steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "seed": seed,
            "buffer_tokens": buffer_tokens, "max_length": max_length, "scale": round(scale, 4),
            "model": new_sae.cfg.metadata.model_name, "rows": rows_digest(train) if keeps_rows else None,
        }  # fmt: skip
        start = checkpoints.restore(trainer, settings)
        fills = stream.fills(start, sink_norm, scale, batch_size=batch_size, steps=steps - trainer.n_training_steps)
        for position in _train(trainer, fills, steps, batch_size, seed):
            checkpoints.save(trainer, position)
        sae = fold_input_scale(_inference_sae(trainer.sae, model.device), scale)
        metrics = evaluate_sae(model, tokenizer, sae, held_out, layer=layer, sink_norm=sink_norm, max_length=max_length)
        figures = metrics._asdict()
        sae.cfg.metadata["hf_fac"] = {
            "layer": layer, "model_revision": getattr(model.config, "_commit_hash", None), "sink_norm": sink_norm,
            "training_data": _describe(dataset), "training_tokens": trainer.n_training_samples, "seed": seed,
            "eval_tokens": figures.pop("tokens"), **figures,
        }  # fmt: skip
        if output_dir is not None:
            save_sae(sae, output_dir)
        checkpoints.clear()
    return sae


def _check_settings(architecture: str, learning_rate: float, *, d_sae: int, k: int, **counts: int | None) -> None:
    from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

    check_counts(d_sae=d_sae, k=k, **counts)
    if k > d_sae:
        raise ValueError(f"k is {k}, more active features a token than the SAE's d_sae = {d_sae}: take fewer.")
    if not 0 < learning_rate < float("inf"):
        raise ValueError(f"learning_rate is {learning_rate!r}; it must be a positive number.")
    if architecture not in SAE_TRAINING_CLASS_REGISTRY:
        raise ValueError(
            f"SAELens trains no {architecture!r}; it trains {', '.join(sorted(SAE_TRAINING_CLASS_REGISTRY))}."
        )


def _new_sae(model: PreTrainedModel, layer: int, architecture: str, options: dict[str, Any], k: int) -> TrainingSAE:
    from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

    sae_class, config_class = SAE_TRAINING_CLASS_REGISTRY[architecture]
    has_k = "k" in config_class.__dataclass_fields__
    config = config_class(**{"device": str(model.device), **({"k": k} if has_k else {}), **options})
    config.metadata.model_name = model.config._name_or_path or type(model).__name__
    # With learned positions hook_embed is another place: they are added after it.
    config.metadata.hook_name = hook_of_layer(layer) if layer else "blocks.0.hook_resid_pre"
    config.metadata.prepend_bos = False
    return sae_class(config)


def _trainer(sae: TrainingSAE, steps: int, batch_size: int, learning_rate: float) -> SAETrainer:
    """SAELens' trainer, without data: it is given batches one by one."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    trainer_config = SAETrainerConfig(
        total_training_samples=steps * batch_size,
        train_batch_size_samples=batch_size,
        lr=learning_rate,
        lr_end=learning_rate / 10,
        lr_warm_up_steps=steps // 20,
        lr_decay_steps=steps // 5,
        # A feature counts as dead, and is revived, after a twentieth of the run without an activation.
        dead_feature_window=max(steps // 20, 25),
        device=sae.cfg.device,
        autocast=sae.cfg.device.startswith("cuda"),
    )
    return SAETrainer(trainer_config, sae, iter(()))


def _train(
    trainer: SAETrainer, fills: Iterator[tuple[Tensor, _Position]], steps: int, batch_size: int, seed: int
) -> Iterator[_Position]:
    """Trains up to `steps`, and yields the position after each buffer but the last."""
    with tqdm(total=steps, initial=trainer.n_training_steps, desc="Training the SAE", unit="step") as bar:
        for fill, position in fills:
            order = torch.randperm(len(fill), generator=torch.Generator().manual_seed(seed + position.fills))
            for part in order[: max(len(fill) // batch_size, 1) * batch_size].split(batch_size):
                trainer.step(fill[part])
                trainer.n_training_steps += 1
                bar.update()
                if trainer.n_training_steps >= steps:
                    return
            yield position


def _inference_sae(sae: Any, device: torch.device) -> SAE:
    from sae_lens import SAE

    # Not by way of a folder, whose disk may be full.
    parts = inference_parts(sae.eval())
    return SAE.load_from_disk("", device=str(device), converter=lambda *_, **__: parts)


class _Position(NamedTuple):
    """Position in a stream: the next row to read, the number of buffers before, whether one buffer holds all rows."""

    epoch: int
    row: int
    fills: int
    whole: bool = False


@dataclass
class _Stream:
    """Buffers of hidden states of a data set's content tokens, in an order that depends on seed and epoch only.

    n_tokens: content tokens of the data set, once counted. first: states of the first rows, read for the scale.
    """

    model: PreTrainedModel
    reader: ConversationReader
    dataset: Dataset | IterableDataset
    layer: int
    buffer_tokens: int
    batch_tokens: int
    seed: int
    n_tokens: int | None = None
    first: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.causal = is_causal(self.model, self.layer)

    def groups(self, epoch: int, row: int) -> Iterator[list[dict]]:
        """Yields the rows of an epoch from `row` on, up to 256 at a time."""
        if hasattr(self.dataset, "__len__"):
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.dataset))[row:]
            for start in range(0, len(order), _ROWS_AT_ONCE):
                yield self.dataset.select(order[start : start + _ROWS_AT_ONCE]).to_list()
            return
        shuffled = self.dataset.shuffle(seed=self.seed + epoch, buffer_size=10_000).skip(row)
        for batch in shuffled.batch(_ROWS_AT_ONCE):
            yield [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]

    def count_tokens(self) -> int:
        if not hasattr(self.dataset, "__len__"):
            raise ValueError("A streaming data set has no length: say how many tokens to train on (training_tokens=).")
        self.n_tokens = sum(int(c.sum()) for group in self.groups(0, 0) for c in self.reader(group).content)
        return self.n_tokens

    def measure_scale(self) -> tuple[float, float]:
        """The mean norm over sqrt(d_in), and the norm above which a token is a sink, from the first rows."""
        first = next(self.groups(0, 0), [])[:_SCALE_ROWS]
        self.first = list(self.states(first, None))
        if not any(map(len, self.first)):
            raise ValueError(
                f"The first {_SCALE_ROWS} rows have no content token to train on. Without eval_dataset=, the first "
                f"{_HELD_OUT} of a stream are held out."
            )
        norms = torch.cat(self.first).norm(dim=-1).cpu().numpy()
        cutoff = sink_cutoff(norms)
        d_in = self.model.config.get_text_config().hidden_size
        return float(norms[norms <= cutoff].mean()) / d_in**0.5, cutoff

    def states(self, rows: list[dict], sink_norm: float | None) -> Iterator[Tensor]:
        pieces = self.reader(rows)
        return content_states(self.model, pieces, self.layer, self.batch_tokens, sink_norm, self.causal)

    def fills(
        self, start: _Position, sink_norm: float, scale: float, *, batch_size: int, steps: int
    ) -> Iterator[tuple[Tensor, _Position]]:
        """Yields a buffer [n, d_in] float32, and the position after it, without end.

        Of each buffer whole batches are used; the one that completes `steps` is yielded as soon as it can, so that no
        row is read for nothing.
        """
        held, n_held, (epoch, row, fills, whole) = [], 0, start
        if whole:
            # A buffer that holds everything is always read in the order of the first epoch, and to the end.
            epoch, steps = 0, sys.maxsize
        n_tokens = min(self.buffer_tokens, self.n_tokens or self.buffer_tokens)
        bar = tqdm(total=n_tokens, desc="Reading hidden states", unit="token", unit_scale=True, leave=False)

        def add(states: Tensor) -> int:
            held.append(states.cpu() / scale)
            bar.update(len(states))
            return len(states)

        while True:
            whole = row == 0 and not held
            if (epoch, row) == (0, 0):
                # These were read for the scale.
                n_held += sum(add(states[states.norm(dim=-1) <= sink_norm]) for states in self.first)
                row = min(_SCALE_ROWS, getattr(self.dataset, "num_rows", _SCALE_ROWS))
            for group in self.groups(epoch, row):
                row += len(group)
                for states in self.states(group, sink_norm):
                    n_held += add(states)
                    if n_held >= steps * batch_size:
                        break
                if n_held >= min(self.buffer_tokens, steps * batch_size):
                    whole, fills, steps = False, fills + 1, steps - n_held // batch_size
                    bar.reset()
                    yield torch.cat(held), _Position(epoch, row, fills)
                    held.clear()
                    n_held = 0
            if whole and not n_held:
                raise ValueError("The data set has no content token to train on.")
            epoch, row = epoch + 1, 0
            if whole:
                # All of it fits: later epochs shuffle the same buffer again.
                bar.close()
                buffer = torch.cat(held)
                held.clear()
                while True:
                    fills += 1
                    yield buffer, _Position(epoch, 0, fills, True)
                    epoch += 1


def _split(dataset: Any, eval_dataset: Any, seed: int) -> tuple[Dataset | IterableDataset, Any]:
    from datasets import Dataset, IterableDataset

    if isinstance(dataset, IterableDataset):
        if eval_dataset is not None:
            return dataset, eval_dataset
        return dataset.skip(_HELD_OUT), list(dataset.take(_HELD_OUT))
    if not isinstance(dataset, Dataset):
        rows = list(dataset)
        dataset = Dataset.from_list([{"text": row} if isinstance(row, str) else row for row in rows])
    if eval_dataset is not None:
        return dataset, eval_dataset
    if len(dataset) < 20:
        raise ValueError(f"{len(dataset)} rows are too few to set some aside; give eval_dataset=, or at least 20 rows.")
    parts = dataset.train_test_split(test_size=min(500, len(dataset) // 20), seed=seed)
    return parts["train"], parts["test"]


def _describe(dataset: Any) -> str:
    info = getattr(dataset, "info", None)
    name = getattr(info, "dataset_name", None) or type(dataset).__name__
    size = f", {len(dataset)} rows" if hasattr(dataset, "__len__") else ", streamed"
    return name + size


class _Checkpoints:
    """The last checkpoint of a run, in `output_dir/sae-training`; without an output_dir none is kept.

    Within its context no other process trains an SAE there. Only checkpoints of the run's own settings are deleted.

    Raises: BlockingIOError when another process trains there; OSError when nothing can be written there.
    """

    def __init__(self, output_dir: str | Path | None) -> None:
        self.folder = None if output_dir is None else Path(output_dir) / _CHECKPOINTS
        self.key = ""

    def __enter__(self) -> Self:
        from filelock import FileLock, Timeout

        if self.folder is not None:
            try_output(self.folder.parent, folder=True)
            self.folder.mkdir(exist_ok=True)
            self.lock = FileLock(self.folder / "lock")
            try:
                self.lock.acquire(blocking=False)
            except Timeout:
                raise BlockingIOError(
                    f"Another process is training an SAE into {self.folder.parent}: choose another output_dir."
                ) from None
        return self

    def __exit__(self, *_: object) -> None:
        if self.folder is not None:
            (self.folder / "lock").unlink(missing_ok=True)
            self.lock.release()
            with suppress(OSError):  # it holds checkpoints
                self.folder.rmdir()

    def _found(self) -> dict[Path, dict]:
        """The progress of each checkpoint, the last one first."""
        paths = [] if self.folder is None else self.folder.glob(f"{_SAMPLES}*/{_PROGRESS}")
        found = {path.parent: json.loads(path.read_text(encoding="utf-8")) for path in paths}
        return dict(sorted(found.items(), key=lambda item: item[1]["samples"], reverse=True))

    def restore(self, trainer: Any, settings: dict) -> _Position:
        """Raises: ValueError for a checkpoint of other settings."""
        from safetensors.torch import load_file

        self.key = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
        for path, progress in self._found().items():
            if progress["settings"] != self.key:
                raise ValueError(
                    f"{path} is a checkpoint of a run with other settings or rows; give another output_dir, or delete "
                    f"{self.folder}."
                )
            trainer.load_trainer_state(path)
            trainer.sae.load_state_dict(load_file(path / SAELENS_WEIGHTS))
            torch.set_rng_state(torch.tensor(progress["rng"], dtype=torch.uint8))
            return _Position(*progress["position"])
        return _Position(0, 0, 0)

    def save(self, trainer: Any, position: _Position) -> None:
        if self.folder is None:
            return
        progress = {
            "settings": self.key, "samples": trainer.n_training_samples, "position": position,
            "rng": torch.get_rng_state().tolist(),
        }  # fmt: skip
        path = self.folder / f"{_SAMPLES}{trainer.n_training_samples}"
        with whole_folder(path) as partial:
            trainer.save_checkpoint(partial.name, base_path=str(partial.parent))
            (partial / _PROGRESS).write_text(json.dumps(progress), encoding="utf-8")
        self.clear(but=path)

    def clear(self, *, but: Path | None = None) -> None:
        for path, progress in self._found().items():
            if path != but and progress["settings"] == self.key:
                shutil.rmtree(path)
