"""The command line, called in this process."""

from __future__ import annotations

from typing import Any

from typer.testing import CliRunner

from hf_fac.cli import app


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
