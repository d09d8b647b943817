"""The command line, called in this process."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from typer.testing import CliRunner

from hf_fac.cli import app, commands


def run(*arguments: Any, fails: bool = False) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if fails:
        assert result.exit_code != 0
        raised = "" if isinstance(result.exception, SystemExit) else str(result.exception)
        return " ".join(result.output.replace("│", " ").split()) + raised
    if result.exception is not None:
        raise result.exception
    return " ".join(result.output.split())


def model_options(folders):
    return ["--model", folders / "model", "--sae", folders / "sae", "--device", "cpu"]


def main(monkeypatch, capsys, *arguments):
    """What `hf-fac` says on stderr when it refuses."""
    monkeypatch.setattr(sys, "argv", ["hf-fac", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        commands.main()
    assert ended.value.code
    return " ".join(capsys.readouterr().err.replace("│", " ").split())
