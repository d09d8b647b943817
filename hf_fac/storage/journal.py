"""What was asked, answered, measured and decided, on disk as it happens, so that a killed run loses nothing.

A journal is a folder: the settings it was made under, and one file of JSON lines for each piece of the work. A piece is
claimed by one process at a time; the lock goes with the process, so that what a killed one held is free again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from .differences import differences
from .files import try_output, write_whole

_SETTINGS = "settings.json"
_FORMAT = "hf_fac journal 2"


class Journal:
    """The pieces of a job, by name, in a folder that several processes may share; without a folder, in memory.

    Args:
        settings: JSON values: all that shapes the results.

    Raises: ValueError when the folder was begun under other settings, or is no journal.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, settings: Mapping[str, Any]) -> None:
        self.folder = None if folder is None else Path(folder)
        self.settings = json.loads(json.dumps(settings))
        self._memory: dict[str, Piece] = {}
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / _SETTINGS
        if not path.exists():
            if others := [entry.name for entry in self.folder.iterdir() if not _is_ours(entry.name)]:
                raise ValueError(f"{self.folder} is no journal: it holds {others[0]}. Choose an empty folder.")
            write_whole(path, json.dumps({"format": _FORMAT, "settings": self.settings}, indent=1), keep_first=True)
        self._check(path)

    def _check(self, path: Path) -> None:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            format_, settings = found["format"], found["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no journal's ({error!r}): choose another folder.") from error
        if format_ != _FORMAT:
            raise ValueError(f"{path}: expected {_FORMAT!r}, found {format_!r}; choose another folder.")
        if found := differences(settings, self.settings):
            raise ValueError(f"{self.folder} was begun under other settings ({found}): choose another folder.")

    @contextmanager
    def claim(self, name: str) -> Iterator[Piece | None]:
        """Yields the piece to write to, or None while another process has it."""
        if self.folder is None:
            yield self._memory.setdefault(name, Piece(None))
            return
        from filelock import FileLock, Timeout

        lock = FileLock(self.folder / f"{name}.lock")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            yield None
            return
        try:
            piece = Piece(self.folder / f"{name}.jsonl")
            try:
                yield piece
            finally:
                piece.close()
        finally:
            lock.release()

    def read(self, name: str) -> Piece:
        """Returns a piece as far as it is written, to look at."""
        if self.folder is None:
            return self._memory.get(name) or Piece(None)
        return Piece(self.folder / f"{name}.jsonl", writing=False)


class Piece:
    """Values by key, in the order in which they came; nothing is ever changed."""

    def __init__(self, path: Path | None, *, writing: bool = True) -> None:
        self.path = path
        self.values: dict[str, Any] = {}
        self._file = None
        if path is None:
            return
        try:
            for key, value in map(json.loads, whole_lines(path, mend=writing)):
                self.values[key] = value
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is not as it was written ({error}): choose another folder.") from error
        if writing:
            self._file = path.open("a", encoding="utf-8")

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    def add(self, entries: Iterable[tuple[str, Any]]) -> None:
        """Put values beside new keys; they are on disk when this returns."""
        lines = []
        for key, value in entries:
            if key in self.values:
                raise ValueError(f"{key!r} is in the journal already.")
            lines.append(json.dumps([key, value]))
            self.values[key] = json.loads(lines[-1])[1]
        if self._file is not None:
            put_lines(self._file, lines)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class SharedLines:
    """Objects by key in a file of JSON lines that several processes add to at the same time; what one of them added
    after another began is not known to that one. A line that a killed process left half is closed and skipped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, dict[str, Any]] = {}
        try_output(path.parent, folder=True)
        written = path.read_bytes() if path.exists() else b""
        for line in written.splitlines():
            with suppress(ValueError, KeyError, TypeError, AttributeError):
                entry = json.loads(line)
                key = entry.pop("key")
                self.known[key] = entry
        if written and not written.endswith(b"\n"):
            self._append(b"\n")

    def add(self, key: str, entry: dict[str, Any]) -> None:
        self.known[key] = entry
        self._append(json.dumps({"key": key, **entry}).encode() + b"\n")

    def _append(self, line: bytes) -> None:
        # In one write, so that lines stay whole.
        with open(self.path, "ab", buffering=0) as file:
            if file.write(line) < len(line):
                raise OSError(f"{self.path} takes no more: is the disk full?")


def whole_lines(path: Path, *, mend: bool) -> list[bytes]:
    """Returns a file's lines without half a last one, as a kill can leave it; mend: take that off the file too."""
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if mend and whole != content:
        os.truncate(path, len(whole))
    return whole.splitlines()


def put_lines(file: TextIO, lines: list[str]) -> None:
    """Write lines that are on disk when this returns."""
    if lines:
        file.write("\n".join(lines) + "\n")
        file.flush()
        os.fsync(file.fileno())


def digest(value: Any) -> str:
    """Returns a short hash of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _is_ours(name: str) -> bool:
    # Another process may have put the settings there in between.
    return name.endswith((".partial", ".lock", ".jsonl")) or name.startswith("result-") or name == _SETTINGS
