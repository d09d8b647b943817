"""The command line, called in this process."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hf_fac.cli import app, commands, output

# A console reads its width when it is made, by whichever test comes first.
output.console.width = output.errors.width = 400


def run(*arguments: Any, fails: bool = False) -> str:
    """Returns what a command prints, on one line; an error is raised, or with `fails` returned as text."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "400"})
    if fails:
        assert result.exit_code != 0
        raised = "" if isinstance(result.exception, SystemExit) else str(result.exception)
        return _one_line(result.output) + raised
    if result.exception is not None:
        raise result.exception
    return " ".join(result.output.split())


def main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """Returns what `hf-fac` prints to stderr when it ends with an error."""
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr(sys, "argv", ["hf-fac", *map(str, arguments)])
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # main() changes it
    with pytest.raises(SystemExit) as ended:
        commands.main()
    assert ended.value.code
    return _one_line(capsys.readouterr().err)


def model_options(folders: Path) -> list[Any]:
    return ["--model", folders / "model", "--sae", folders / "sae", "--device", "cpu"]


def _one_line(text: str) -> str:
    return " ".join(text.replace("│", " ").split())
