"""The `hf-fac` command: its sub-commands, and how errors, warnings and interrupts end it.

The modules beside this one parse arguments and print; the work is done by the packages below.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from typing import Any

import typer
from typer.core import TyperGroup
from typer.rich_utils import rich_format_error

from ..storage.terminal import visible
from .coverage import missing, score, select
from .demo import demo
from .dictionary import interpret, rate
from .diversity import diversity
from .hub import pull, push
from .merge import merge
from .options import expand_options
from .output import errors
from .relevance import relevant
from .synthesize import synthesize
from .train import train_sae

RESUMABLE = ("score", "train-sae", "interpret", "rate", "synthesize")


def main() -> None:
    """The console script. An error is one line; with HF_FAC_TRACEBACK=1 a traceback comes before it."""
    warnings.formatwarning = lambda message, *_: visible(f"hf-fac: {message}\n")
    try:
        sys.exit(app(standalone_mode=False))
    except typer.TyperException as error:
        error.message = visible(error.message)
        rich_format_error(error)
        sys.exit(error.exit_code)
    except Exception as error:
        from ..chat.base import ChatError
        from ..hub.errors import HubError  # loads the Hub's client

        if os.environ.get("HF_FAC_TRACEBACK"):
            errors.print("".join(traceback.format_exception(error)))
        message = " ".join(str(error).split("\n"))
        if not isinstance(error, ChatError | HubError | ValueError | OSError):
            message = f"{type(error).__name__}: {message} (HF_FAC_TRACEBACK=1 in the environment prints a traceback.)"
        errors.print("[red]hf-fac:[/red]", end=" ", markup=True)
        errors.print(message)
        sys.exit(1)


class _Commands(TyperGroup):
    def invoke(self, ctx: typer.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            remedy = " Run the same command again to resume." if ctx.invoked_subcommand in RESUMABLE else ""
            typer.echo(f"Stopped.{remedy}", err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="What is my training data missing? Reads data sets with a model's own sparse-autoencoder features. "
    "HF_FAC_TRACEBACK=1 in the environment adds a traceback to an error.",
)
for command in (
    demo, score, missing, diversity, relevant, merge, train_sae, interpret, rate, select, synthesize, push, pull,
):  # fmt: skip
    app.command(command.__name__.replace("_", "-"))(expand_options(command))
