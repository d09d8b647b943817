"""Options that several commands of `hf-fac` have, and the featurizer and the chat that are made of them.

A command takes a group of options as one parameter, an object of a dataclass; `expand_options` shows typer its fields.
"""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args, get_type_hints

import typer

from .output import print_json, print_where

if TYPE_CHECKING:
    from ..chat.base import Chat
    from ..features.featurizer import SAEFeaturizer

ENDED_EARLY = 3  # exit code: a bound or the chat ended it, and the same command goes on
RESULTS = "hf_fac.results"  # key of a context's meta: what the stages of `hf-fac run` returned
_TRL_NAMES = {"model-name-or-path": "model", "dataset-train-split": "split", "torch-dtype": "dtype"}


def expand_options(command: Callable[..., dict[str, Any]]) -> Callable[..., None]:
    """Returns the command as typer reads it: the fields of its groups of options are parameters, and so are --json and
    --quiet. What the command returns is printed as JSON, or kept for `hf-fac run`; `complete` false ends it with exit
    code 3."""
    signature = inspect.signature(command, eval_str=True)
    groups = {name: p.annotation for name, p in signature.parameters.items() if is_dataclass(p.annotation)}

    def expanded(ctx: typer.Context, json: bool, quiet: bool, **values: Any) -> None:
        is_stage = RESULTS in ctx.meta
        if not is_stage:
            print_where(as_json=json, quiet=quiet)
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        if "ctx" in signature.parameters:
            values["ctx"] = ctx
        result = command(**values)
        if is_stage:
            ctx.meta[RESULTS].append(result)
            return
        if json:
            print_json(result)
        if not result.get("complete", True):
            raise typer.Exit(ENDED_EARLY)

    parameters = [_parameter("ctx", typer.Context)]
    for name, parameter in signature.parameters.items():
        if name == "ctx":
            continue
        parameters += _fields_as_parameters(groups[name]) if name in groups else [parameter]
    parameters += _fields_as_parameters(OutputOptions)
    by_name = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    expanded.__signature__ = inspect.Signature(by_name)
    expanded.__name__, expanded.__doc__ = command.__name__, command.__doc__
    return expanded


def _parameter(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _fields_as_parameters(group: type) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    parameters = []
    for field in fields(group):
        kind, option = get_args(hints[field.name])
        option = copy.copy(option)
        option.rich_help_panel = group.title
        parameters.append(_parameter(field.name, Annotated[kind, option], field.default))
    return parameters


def option_name(name: str) -> str:
    """Returns an option's name, without its dashes, as the commands declare it: in kebab-case; underscores and TRL's
    names are understood."""
    name = name.replace("_", "-")
    return _TRL_NAMES.get(name, name)


def with_data_first(arguments: list[str]) -> list[str]:
    """Returns the arguments with the value of TRL's --dataset_name as the first of those without a name."""
    for place, word in enumerate(arguments):
        name, is_given, value = word.partition("=")
        if name.replace("_", "-") == "--dataset-name":
            rest = arguments[place + 1 :]
            values = [value] if is_given else rest[:1]
            return [*values, *arguments[:place], *(rest if is_given else rest[1:])]
    return arguments


def _check_device(device: str | None) -> str | None:
    if device not in (None, "cpu"):
        import torch

        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:  # an AssertionError where torch was built without it
            raise typer.BadParameter(f"{device} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def folder(help: str) -> Any:
    """Returns the option for a folder that a command writes to."""
    return typer.Option("--output", "-o", file_okay=False, help=help)


Data = Annotated[str, typer.Argument(help="A .jsonl, .json, .csv or .parquet file, a folder, or a Hub data set.")]
Anchor = Annotated[
    str,
    typer.Argument(
        help="The reference data set: large and diverse, with rows of the same types; 'embedded': the package's own."
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        callback=_check_device,
        help="cpu, cuda, cuda:1, ...; by default a GPU if there is one, for the embedded model the CPU.",
    ),
]
Features = Annotated[
    Path | None,
    typer.Option(
        dir_okay=False,
        help="Only these: what `hf-fac relevant` wrote, the missing features of a report, or a JSON list of ids.",
    ),
]
Aim = Annotated[
    Literal["missing", "deficits"],
    typer.Option(help="Features that no row activates, or those that fewer rows activate than the anchor's rate says."),
]
Top = Annotated[int, typer.Option(min=0, help="How many missing features to show.")]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn at random.")]
Model = Annotated[str | None, typer.Option(help="The model's Hub id or folder; by default the embedded one.")]
SaeId = Annotated[str | None, typer.Option(help="Which SAE of a Hub repo that holds several.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the repo.")]


_ONLY_WITH_A_MODEL = ("model", "sae", "sae_id", "layer", "dtype", "revision", "sae_revision", "trust_remote_code")


@dataclass(frozen=True)
class OutputOptions:
    """What scripts want of the words that a command prints."""

    title: ClassVar[str] = "What is printed"
    json: Annotated[bool, typer.Option("--json", help="Print the results as JSON to stdout, all else to stderr.")] = (
        False
    )
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but warnings and errors.")] = False


@dataclass(frozen=True)
class ThresholdOptions:
    """delta, above which an activation counts."""

    title: ClassVar[str] = "delta"
    threshold: Annotated[
        float | None, typer.Option(help="delta in the SAE's units; by default calibrated on the anchor.")
    ] = None
    relative: Annotated[float | None, typer.Option(help="delta as a share of each feature's anchor maximum.")] = None


@dataclass(frozen=True)
class FeaturizerOptions:
    """The model and the SAE that measure, and which rows they can read."""

    title: ClassVar[str] = "What measures"
    model: Model = None
    sae: Annotated[str | None, typer.Option(help="A Hub repo, SAELens release:sae_id, folder or .pth file.")] = None
    sae_id: SaeId = None
    layer: Annotated[int | None, typer.Option(help="The layer that the SAE reads, if the SAE does not say it.")] = None
    max_length: Annotated[int | None, typer.Option(help="The most tokens of a row; longer rows are cut.")] = None
    on_error: Annotated[Literal["raise", "skip"], typer.Option(help="What to do with an unreadable row.")] = "raise"
    preset: Annotated[Literal["paper"] | None, typer.Option(help="Measure as the paper's released code does.")] = None
    stride: Annotated[
        int | None, typer.Option(help="Read longer rows in windows that overlap by this many tokens; none is cut.")
    ] = None
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens in one forward pass.")] = None
    dtype: Annotated[str, typer.Option(help="The model's: auto, float32, bfloat16, ...")] = "auto"
    revision: Annotated[str | None, typer.Option(help="The model's branch, tag or commit.")] = None
    sae_revision: Annotated[str | None, typer.Option(help="The branch, tag or commit of the SAE's Hub repo.")] = None
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run code of the model's repo.")] = (
        False
    )
    device: Device = None

    def featurizer(self, **settings: Any) -> SAEFeaturizer:
        """Returns the featurizer; `settings` are further ones of `SAEFeaturizer`."""
        if (self.model is None) != (self.sae is None):
            raise typer.BadParameter("--model and --sae go together (without both, the embedded model is used).")
        settings = asdict(self) | settings
        names = {field: settings.pop(field) for field in _ONLY_WITH_A_MODEL}
        for option, name in (("--model", self.model), ("--sae", self.sae)):
            if name is not None and name.startswith((".", "/", "~")) and not Path(name).expanduser().exists():
                raise typer.BadParameter(f"{option}: {name} does not exist.")
        if self.model is not None:
            from ..features.featurizer import SAEFeaturizer

            return SAEFeaturizer.from_pretrained(**names, **settings)
        from ..embedded.loader import load_featurizer

        defaults = {field.name: field.default for field in fields(FeaturizerOptions)}
        for field, value in names.items():
            if value != defaults[field]:
                option = f"--{field.replace('_', '-')}"
                raise typer.BadParameter(f"{option} needs --model and --sae: the embedded model and SAE are known.")
        settings["device"] = settings["device"] or "cpu"
        return load_featurizer(**settings)


@dataclass(frozen=True)
class MeasuringOptions(FeaturizerOptions):
    """What measures, and what of a row is measured."""

    title: ClassVar[str] = "What measures"
    activation: Annotated[Literal["native", "relu"], typer.Option(help="relu: without the SAE's top-k.")] = "native"
    pool_over: Annotated[
        Literal["all", "user", "assistant", "completion"], typer.Option(help="Whose tokens count.")
    ] = "all"
    side: Annotated[Literal["chosen", "rejected"], typer.Option(help="What is read of a preference pair.")] = "chosen"
    keep_above: Annotated[float, typer.Option(help="Floor: activations at or below it are not kept.")] = 0.0


@dataclass(frozen=True)
class ChatOptions:
    """The chat model."""

    title: ClassVar[str] = "The chat model"
    chat: Annotated[str | None, typer.Option(help="Name on the server, Hub id or folder; 'embedded': SmolLM2.")] = None
    base_url: Annotated[str | None, typer.Option(help="Server of chat completions, up to and including /v1.")] = None
    key_env: Annotated[str | None, typer.Option(help="Name of the environment variable with the server's key.")] = None
    timeout: Annotated[float, typer.Option(help="The most seconds that one request to the server may take.")] = 120.0
    max_tokens: Annotated[
        int | None, typer.Option(help="Stop asking the server after this many tokens, prompts included.")
    ] = None

    @property
    def given(self) -> bool:
        return self.chat is not None or self.base_url is not None

    def make(self, device: str | None) -> Chat:
        """Returns a local chat model or an endpoint. What calls it keeps the answers."""
        if not self.given:
            raise typer.BadParameter("Give --chat (a chat model), --base-url (a server), or both (which model of it).")
        if self.base_url is not None:
            from ..chat.endpoint import EndpointChat

            return EndpointChat(
                self.chat, base_url=self.base_url, token=self._token(), timeout=self.timeout,
                max_tokens_total=self.max_tokens,
            )  # fmt: skip
        from ..chat.local import LocalChat

        if self.chat == "embedded":
            from ..embedded.loader import load_model

            return LocalChat(*load_model(device=device or "cpu"))
        return LocalChat.from_pretrained(self.chat, device=device)

    def _token(self) -> str | None:
        token = None if self.key_env is None else os.environ.get(self.key_env, "").strip()
        if token == "":
            raise typer.BadParameter(  # does not quote what was given, which may be the key itself
                "The environment variable that --key-env names holds no key. Give the variable's name, not the key."
            )
        return token
