"""What keeps a training run as it was, and what its processes tell one another.

`preserved` restores random state, modes and settings. `ProcessGroup` lets the processes of a run exchange small files
in a folder that they share, and stop together when one fails: none waits in a collective while another one writes.
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
def reraise_oom() -> Iterator[None]:
    """Raise another error where measuring or writing runs out of memory.

    accelerate's `find_executable_batch_size` would take the original error for one of training, shrink the training
    batch and start again.
    Raises: RuntimeError with the remedy.
    """
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
    """Another process of the run failed; the message has its error."""


class ProcessGroup:
    """The processes of a run during one coverage round, and the folder in which they exchange files.

    Args:
        token: the same in every process, a new one for every round.
    """

    def __init__(self, folder: Path, *, rank: int, world_size: int, token: str) -> None:
        self.folder, self.rank, self.world_size, self.token = folder, rank, world_size, token
        self._barriers = 0

    @classmethod
    def join(cls, folder: Path, args: TrainingArguments) -> ProcessGroup:
        """Returns the group of a trainer's processes. All of them must call this at about the same time.

        Raises: RuntimeError when they do not see the same folder.
        """
        from accelerate.utils import broadcast_object_list

        try_output(folder, folder=True)
        token = [uuid.uuid4().hex[:12]]
        if args.world_size > 1:
            if args.process_index == 0:
                (folder / f"run-{token[0]}").touch()
            broadcast_object_list(token)
        group = cls(folder, rank=args.process_index, world_size=args.world_size, token=token[0])
        end = time.monotonic() + _VISIBLE_SECONDS
        while args.world_size > 1 and not (folder / f"run-{group.token}").exists():
            if time.monotonic() > end:
                raise RuntimeError(
                    f"Process {group.rank} does not see what process 0 writes to {folder}: the output folder must lie "
                    "on a file system that all nodes share."
                )
            time.sleep(_POLL_SECONDS)
        return group

    def share(self, n: int) -> range:
        """Returns which of n things this process works on."""
        return range(n * self.rank // self.world_size, n * (self.rank + 1) // self.world_size)

    def check(self) -> None:
        """Raises: OtherProcessFailed when another process has failed."""
        for rank in range(self.world_size):
            ending = self._ending(rank)
            if rank != self.rank and ending.exists() and (error := json.loads(ending.read_text(encoding="utf-8"))):
                raise OtherProcessFailed(f"Process {rank} failed: {error}")

    def wait(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition holds. Raises: OtherProcessFailed when another process has failed meanwhile."""
        while not condition():
            self.check()
            time.sleep(_POLL_SECONDS)

    def barrier(self, values: dict[str, Any], *, remedy: str, note: Any = None) -> Any:
        """Wait until every process has come here with the same values, by name, and return the note of process 0.

        Values and note are JSON.
        Raises: RuntimeError, in all processes, that names what differs; OtherProcessFailed.
        """
        if self.world_size == 1:
            return note
        self._barriers += 1
        files = [self.folder / f"run-{self.token}-{self._barriers}-{rank}" for rank in range(self.world_size)]
        write_whole(files[self.rank], json.dumps({"values": values, "note": note}))
        self.wait(lambda: all(file.exists() for file in files))
        found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        told = {name: [f"{other['values'].get(name)}" for other in found] for name in values}
        different = [f"{name}: {', '.join(texts)}" for name, texts in told.items() if len(set(texts)) > 1]
        if different:
            raise RuntimeError(f"The processes differ in their {'; '.join(different)}. {remedy}")
        return found[0]["note"]

    def leave(self, error: BaseException | None = None) -> None:
        """Tell the others that this process is done with the round, or which error ended it here."""
        if self.world_size > 1:
            # What another process's error ended is no error of this one.
            own = error is not None and not isinstance(error, OtherProcessFailed)
            write_whole(self._ending(self.rank), json.dumps(f"{type(error).__name__}: {error}" if own else None))

    def wait_for_all(self) -> None:
        """Wait until every process has left."""
        while self.world_size > 1 and not all(self._ending(rank).exists() for rank in range(self.world_size)):
            time.sleep(_POLL_SECONDS)

    def _ending(self, rank: int) -> Path:
        return self.folder / f"run-{self.token}-ended-{rank}.json"
