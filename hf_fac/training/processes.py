"""What the processes of a training run tell one another during a coverage round.

They exchange small files in a folder that they share, and stop together when one fails: none waits in a collective
while another one writes.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..storage.cache import Processes
from ..storage.files import try_output, write_whole

if TYPE_CHECKING:
    from transformers import TrainingArguments

_POLL_SECONDS = 0.2
_VISIBLE_SECONDS = 60  # for a file of the first process to appear to the others, on a network file system


class OtherProcessFailed(RuntimeError):
    """Another process of the run failed; the message has its error."""


class ProcessGroup:
    """The processes of a run during one coverage round, and the folder in which they exchange files.

    A process works inside `with group:`. When it leaves, the others learn that it is done, or which error ended it.

    processes: how these processes share one job.

    Args:
        token: the same in every process, a new one for every round.
    """

    def __init__(self, folder: Path, *, rank: int, world_size: int, token: str) -> None:
        self.folder = folder
        self.rank = rank
        self.world_size = world_size
        self.token = token
        self.processes = Processes(rank, world_size, run=token, check=self.check)
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

    def barrier(self, values: dict[str, Any] | None = None, *, remedy: str = "", note: Any = None) -> Any:
        """Wait until every process has come here with the same values, by name, and return the note of process 0.

        Values and note are JSON.
        Raises: RuntimeError, in all processes, that names what differs; OtherProcessFailed.
        """
        if self.world_size == 1:
            return note
        self._barriers += 1
        values = values or {}
        files = [self.folder / f"run-{self.token}-{self._barriers}-{rank}" for rank in range(self.world_size)]
        write_whole(files[self.rank], json.dumps({"values": values, "note": note}))
        self.wait(lambda: all(file.exists() for file in files))
        found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        told = {name: [f"{other['values'].get(name)}" for other in found] for name in values}
        if different := [f"{name}: {', '.join(texts)}" for name, texts in told.items() if len(set(texts)) > 1]:
            raise RuntimeError(f"The processes differ in their {'; '.join(different)}. {remedy}")
        return found[0]["note"]

    def __enter__(self) -> ProcessGroup:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if self.world_size > 1:
            # What another process's error ended is no error of this one.
            failed = error is not None and not isinstance(error, OtherProcessFailed)
            write_whole(self._ending(self.rank), json.dumps(f"{type(error).__name__}: {error}" if failed else None))

    def wait_for_all(self) -> None:
        """Wait until every process has left."""
        while self.world_size > 1 and not all(self._ending(rank).exists() for rank in range(self.world_size)):
            time.sleep(_POLL_SECONDS)

    def _ending(self, rank: int) -> Path:
        return self.folder / f"run-{self.token}-ended-{rank}.json"
