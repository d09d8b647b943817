"""Options that several commands of `hf-fac` have, and the featurizer and the chat that are made of them.

A command takes a group of options as one parameter, an object of a dataclass; `expand_options` shows typer its fields.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

if TYPE_CHECKING:
    from ..chat.base import Chat
    from ..features.featurizer import SAEFeaturizer


def expand_options(command: Callable[..., None]) -> Callable[..., None]:
    """Returns the command with the fields of its groups of options as parameters, which is what typer reads."""
    signature = inspect.signature(command, eval_str=True)
    groups = {name: p.annotation for name, p in signature.parameters.items() if is_dataclass(p.annotation)}

    def expanded(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        command(**values)

    parameters: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        if name not in groups:
            parameters.append(parameter)
            continue
        hints = get_type_hints(groups[name], include_extras=True)
        for field in fields(groups[name]):
            parameters.append(parameter.replace(name=field.name, default=field.default, annotation=hints[field.name]))
    by_name = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    expanded.__signature__ = inspect.Signature(by_name)
    expanded.__name__, expanded.__doc__ = command.__name__, command.__doc__
    return expanded


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
Anchor = Annotated[str, typer.Argument(help="The reference data set: large and diverse, with rows of the same types.")]
Split = Annotated[str, typer.Option(help="The split of a Hub data set or folder.")]
Device = Annotated[str | None, typer.Option(callback=_check_device, help="cpu, cuda, cuda:1, ...; by default a GPU.")]
Threshold = Annotated[float | None, typer.Option(help="delta in the SAE's units; by default calibrated on the anchor.")]
Features = Annotated[
    Path | None,
    typer.Option(exists=True, dir_okay=False, help="Only these: what `hf-fac relevant` wrote, or a JSON list of ids."),
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


@dataclass(frozen=True)
class FeaturizerOptions:
    """The model and the SAE that measure, and which rows they can read."""

    model: Model = None
    sae: Annotated[str | None, typer.Option(help="A Hub repo, SAELens release:sae_id, folder or .pth file.")] = None
    sae_id: SaeId = None
    layer: Annotated[int | None, typer.Option(help="The layer that the SAE reads, if the SAE does not say it.")] = None
    max_length: Annotated[int | None, typer.Option(help="The most tokens of a row; longer rows are cut.")] = None
    on_error: Annotated[Literal["raise", "skip"], typer.Option(help="What to do with an unreadable row.")] = "raise"
    preset: Annotated[Literal["paper"] | None, typer.Option(help="Measure as the paper's released code does.")] = None
    device: Device = None

    def featurizer(self, **settings: Any) -> SAEFeaturizer:
        """Returns the featurizer; `settings` are further ones of `SAEFeaturizer`."""
        if (self.model is None) != (self.sae is None):
            raise typer.BadParameter("--model and --sae go together (without both, the embedded model is used).")
        settings = asdict(self) | settings
        model, sae, sae_id = (settings.pop(name) for name in ("model", "sae", "sae_id"))
        if model is not None:
            from ..features.featurizer import SAEFeaturizer

            return SAEFeaturizer.from_pretrained(model, sae, sae_id=sae_id, **settings)
        from ..embedded.loader import load_featurizer

        for option, value in (("--layer", settings.pop("layer")), ("--sae-id", sae_id)):
            if value is not None:
                raise typer.BadParameter(f"{option} needs --model and --sae: the embedded SAE's layer is known.")
        return load_featurizer(device=settings.pop("device") or "cpu", **settings)


@dataclass(frozen=True)
class MeasuringOptions(FeaturizerOptions):
    """What is measured, too."""

    activation: Annotated[Literal["native", "relu"], typer.Option(help="relu: without the SAE's top-k.")] = "native"
    pool_over: Annotated[
        Literal["all", "user", "assistant", "completion"], typer.Option(help="Whose tokens count.")
    ] = "all"
    side: Annotated[Literal["chosen", "rejected"], typer.Option(help="What is read of a preference pair.")] = "chosen"


@dataclass(frozen=True)
class ChatOptions:
    """The chat model."""

    chat: Annotated[str | None, typer.Option(help="Name on the server, Hub id or folder; 'embedded': SmolLM2.")] = None
    base_url: Annotated[str | None, typer.Option(help="Server of chat completions, up to and including /v1.")] = None
    key_env: Annotated[str | None, typer.Option(help="Name of the environment variable with the server's key.")] = None
    timeout: Annotated[float, typer.Option(help="The most seconds that one request to the server may take.")] = 120.0
    max_tokens: Annotated[int | None, typer.Option(help="Ask no more after so many tokens, prompts included.")] = None

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
