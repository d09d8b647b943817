"""Programs and functions in processes of their own, for tests that kill and interrupt them."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

HF_FAC = Path(sys.executable).with_name("hf-fac")
# What the commands import takes longer than what they do here: it is imported once, and each process is forked off.
_IMPORTED_ONCE = ["torch", "transformers", "datasets", "sae_lens", "trl", "hf_fac.cli.commands", "trainer_runs"]
_FORKED = multiprocessing.get_context("forkserver")


def forked(function: Callable[..., Any], *arguments: Any) -> BaseProcess:
    """Returns a running copy of this process that calls the function. It has imported all that this one has."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    return process


def exit_code_of(function: Callable[..., Any], *arguments: Any) -> int:
    """Calls the function in a fork of this process; returns the exit code, negative for a signal that ended it."""
    process = forked(function, *arguments)
    process.join()
    return process.exitcode


def start(
    program: Path, arguments: Sequence[str], output: Path, *, environment: Mapping[str, str], anew: bool
) -> BaseProcess:
    """Returns a running Python program, whose stdout and stderr go to the file `output`.

    Args:
        anew: start a new interpreter, which imports all by itself, as a shell does.
    """
    _FORKED.set_forkserver_preload(_IMPORTED_ONCE)
    process = _FORKED.Process(target=_run, args=(program, list(arguments), output, dict(environment), anew))
    process.start()
    return process


def _run(program: Path, arguments: list[str], output: Path, environment: dict[str, str], anew: bool) -> None:
    os.environ.update(environment)
    with output.open("wb") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    if anew:
        os.execv(sys.executable, [sys.executable, str(program), *arguments])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [str(program), *arguments]
    runpy.run_path(str(program), run_name="__main__")
