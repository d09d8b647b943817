"""What a training run must not notice, and what its processes agree on without a collective.

`preserved` gives back random state, modes and settings as they were. `Ranks` lets the processes of a run exchange files
in a folder that they share, and stop together when one fails: none waits in a collective while another writes.
"""

from __future__ import annotations

import json
import random
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..inputs.hidden_states import evaluation_mode
from ..storage.files import try_output, write_whole

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase, TrainingArguments

_POLL_SECONDS = 0.2
_VISIBLE_SECONDS = 60  # for a file of the first process to appear to the others, on a network file system


@contextmanager
def preserved(models: list[nn.Module], tokenizers: list[PreTrainedTokenizerBase]) -> Iterator[None]:
    """While it lasts the models are in evaluation mode, without gradients. Afterwards their modes and `use_cache`, the
    tokenizers' sides, and the random state of Python, NumPy and torch (every GPU) are as they were."""
    configs = [getattr(model, name, None) for model in models for name in ("config", "generation_config")]
    settings = [
        (owner, name, getattr(owner, name))
        for owners, names in ((configs, ["use_cache"]), (tokenizers, ["padding_side", "truncation_side"]))
        for owner in owners
        for name in names
        if hasattr(owner, name)
    ]
    state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda_state = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    try:
        with ExitStack() as stack:
            for model in models:
                stack.enter_context(evaluation_mode(model))
            yield
    finally:
        for owner, name, value in settings:
            setattr(owner, name, value)
        random.setstate(state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if cuda_state is not None:
            torch.cuda.set_rng_state_all(cuda_state)


@contextmanager
def never_a_smaller_batch() -> Iterator[None]:
    """Errors by which accelerate's `find_executable_batch_size` would shrink the training batch, and begin again,
    become others: here it is not training that ran out of memory."""
    from accelerate.utils.memory import should_reduce_batch_size

    try:
        yield
    except Exception as error:
        if not should_reduce_batch_size(error):
            raise
        raise RuntimeError(
            "Measuring rows or writing samples, not training, ran out of memory: a smaller training batch would not "
            "help. Make the SAEFeaturizer with a lower batch_tokens, the LocalChat with a lower batch_size, or let "
            "another device or an EndpointChat write."
        ) from error


class OtherProcessFailed(RuntimeError):
    """Another process of the run failed; its error is in the text."""


class Ranks:
    """The processes of a run, at one piece of work, in a folder that all of them see.

    Args:
        token: the same in every process, another for every piece of work.
    """

    def __init__(self, folder: Path, *, rank: int, world_size: int, token: str) -> None:
        self.folder, self.rank, self.world_size, self.token = folder, rank, world_size, token
        self._compared = 0

    @classmethod
    def meet(cls, folder: Path, args: TrainingArguments) -> Ranks:
        """Returns the processes of a trainer, all of which must call this at about the same time.

        Raises: RuntimeError when the folder is not the same one everywhere.
        """
        from accelerate.utils import broadcast_object_list

        try_output(folder, folder=True)
        token = [uuid.uuid4().hex[:12]]
        if args.world_size > 1:
            if args.process_index == 0:
                (folder / f"run-{token[0]}").touch()
            broadcast_object_list(token)
        ranks = cls(folder, rank=args.process_index, world_size=args.world_size, token=token[0])
        end = time.monotonic() + _VISIBLE_SECONDS
        while args.world_size > 1 and not (folder / f"run-{ranks.token}").exists():
            if time.monotonic() > end:
                raise RuntimeError(
                    f"Process {ranks.rank} does not see what process 0 writes to {folder}: the output folder must lie "
                    "on a file system that all nodes share."
                )
            time.sleep(_POLL_SECONDS)
        return ranks

    def share(self, n: int) -> range:
        """Returns which of n things are this process's."""
        return range(n * self.rank // self.world_size, n * (self.rank + 1) // self.world_size)

    def check(self) -> None:
        """Raise OtherProcessFailed when another process has failed."""
        for rank in range(self.world_size):
            if rank != self.rank and (found := self._read(rank)) is not None and "error" in found:
                raise OtherProcessFailed(f"Process {rank} failed: {found['error']}")

    def wait(self, done: Callable[[], bool]) -> None:
        """Return when it is done. Raises: OtherProcessFailed when it will not be, as another process has failed."""
        while not done():
            self.check()
            time.sleep(_POLL_SECONDS)

    def fail(self, error: BaseException) -> None:
        """Tell the others, unless it is they who failed."""
        stopped = isinstance(error, OtherProcessFailed)
        self._write({"stopped": True} if stopped else {"error": f"{type(error).__name__}: {error}"})

    def wait_for_all(self) -> None:
        """Return when every process has failed, was stopped, or has agreed."""
        while self.world_size > 1 and any(self._read(rank) is None for rank in range(self.world_size)):
            time.sleep(_POLL_SECONDS)

    def compare(self, values: dict[str, Any], remedy: str) -> None:
        """Return when every process has come here with the same values, JSON by name.

        Raises: RuntimeError, in all, that names what differs; OtherProcessFailed when one failed instead.
        """
        if self.world_size == 1:
            return
        self._compared += 1
        files = [self.folder / f"run-{self.token}-{self._compared}-{rank}" for rank in range(self.world_size)]
        write_whole(files[self.rank], json.dumps(values))
        self.wait(lambda: all(file.exists() for file in files))
        found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        told = {name: [f"{other.get(name)}" for other in found] for name in values}
        different = [f"{name}: {', '.join(texts)}" for name, texts in told.items() if len(set(texts)) > 1]
        if different:
            raise RuntimeError(f"The processes differ in their {'; '.join(different)}. {remedy}")

    def agree(self, value: Any, note: float) -> float:
        """Returns the first process's note when every process has come here with the same value.

        Raises: OtherProcessFailed when one failed instead; RuntimeError, in all, when the values differ.
        """
        self._write({"value": value, "note": note})
        if self.world_size == 1:
            return note
        self.wait_for_all()
        self.check()
        found = [self._read(rank) for rank in range(self.world_size)]
        if any(other["value"] != value for other in found):
            raise RuntimeError(f"The processes differ in their new rows: {[other['value'] for other in found]}.")
        return found[0]["note"]

    def _file(self, rank: int) -> Path:
        return self.folder / f"run-{self.token}-{rank}.json"

    def _read(self, rank: int) -> dict[str, Any] | None:
        try:
            return json.loads(self._file(rank).read_text())
        except FileNotFoundError:
            return None

    def _write(self, value: dict[str, Any]) -> None:
        if self.world_size > 1:
            write_whole(self._file(self.rank), json.dumps(value))
