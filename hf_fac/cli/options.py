"""What the commands of `hf-fac` share: the options that several have, and how a data set, a featurizer and a chat model
are made of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from ..storage.differences import differences
from ..storage.terminal import visible
from ..storage.validation import read_measurement

if TYPE_CHECKING:
    from datasets import Dataset

    from ..chat.base import Chat
    from ..features.featurizer import SAEFeaturizer
    from ..inputs.token_context import MarkedSpan


class _Console(Console):
    """What is printed quotes paths and users' texts: no line is cut, and nothing in it is markup or steers the
    terminal."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **options)


console = _Console(soft_wrap=True, markup=False, emoji=False)
errors = _Console(soft_wrap=True, markup=False, emoji=False, stderr=True)


def _usable(device: str | None) -> str | None:
    if device is not None:
        import torch

        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:  # an AssertionError where torch was built without it
            raise typer.BadParameter(f"{device} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


Data = Annotated[str, typer.Argument(help="A .jsonl, .json, .csv or .parquet file, a folder, or a Hub data set.")]
Split = Annotated[str, typer.Option(help="Which split of a Hub data set or folder.")]
Model = Annotated[str | None, typer.Option(help="Hub id or folder of the model; the embedded SmolLM2-135M by default.")]
Sae = Annotated[str | None, typer.Option(help="Its SAE: a Hub repo, release:sae_id of SAELens, a folder, a .pth file.")]
SaeId = Annotated[str | None, typer.Option(help="Which SAE of a Hub repo that holds several.")]
Layer = Annotated[int | None, typer.Option(help="Layer that the SAE reads, where it does not say.")]
Activation = Annotated[str, typer.Option(help="native, or relu (top-k lifted).")]
PoolOver = Annotated[str, typer.Option(help="Whose tokens count: all, user, assistant or completion.")]
Side = Annotated[str, typer.Option(help="Which completion of preference pairs: chosen or rejected.")]
MaxLength = Annotated[int | None, typer.Option(help="Most tokens of a row; longer rows are cut and counted.")]
OnError = Annotated[str, typer.Option(help="raise, or skip rows that cannot be read.")]
Preset = Annotated[str | None, typer.Option(help="paper: measure as the paper's released code does.")]
Device = Annotated[str | None, typer.Option(callback=_usable, help="cpu, cuda, cuda:1, ...; the GPU if there is one.")]
Threshold = Annotated[
    float | None, typer.Option(help="delta, in the SAE's units; calibrated on the anchor if not given.")
]
Relative = Annotated[float | None, typer.Option(help="delta as a share of each feature's maximum in the anchor.")]
Top = Annotated[int, typer.Option(min=0, help="How many missing features to show.")]
Seed = Annotated[int, typer.Option(help="Of what is drawn at random.")]
ChatModel = Annotated[
    str | None,
    typer.Option("--chat", help="Chat model: its name on the server, or a Hub id or folder; 'embedded': SmolLM2."),
]
BaseUrl = Annotated[str | None, typer.Option(help="Server that speaks chat completions, up to and including /v1.")]
KeyEnv = Annotated[str | None, typer.Option(help="Name of the environment variable that holds the server's key.")]
Timeout = Annotated[float, typer.Option(help="Seconds that a request to the server may take in all.")]
MaxTokens = Annotated[int | None, typer.Option(help="Ask the server nothing more after so many tokens in all.")]
AnswerForm = Annotated[str, typer.Option("--form", help="json, or text for a chat model too small to write JSON.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the repo.")]


def make_featurizer(
    model: str | None, sae: str | None, sae_id: str | None, device: str | None, **settings: Any
) -> SAEFeaturizer:
    if (model is None) != (sae is None):
        raise typer.BadParameter("--model and --sae go together (neither: the embedded model).")
    if model is None:
        from ..embedded.loader import load_featurizer

        for option, value in (("--layer", settings.pop("layer", None)), ("--sae-id", sae_id)):
            if value is not None:
                raise typer.BadParameter(f"{option} is of an SAE of yours: give --model and --sae, or leave it out.")
        return load_featurizer(device=device or "cpu", **settings)
    from ..features.featurizer import SAEFeaturizer

    return SAEFeaturizer.from_pretrained(model, sae, sae_id=sae_id, device=device, **settings)


def make_chat(
    chat: str | None,
    base_url: str | None,
    key_env: str | None,
    timeout: float,
    max_tokens: int | None,
    form: str,
    folder: Path,
    device: str | None,
) -> Chat:
    """Returns a local chat model, or an endpoint whose answers are kept in the folder."""
    import os

    if form not in ("json", "text"):
        raise typer.BadParameter(f"--form is {form!r}; it must be json or text.")
    if chat is None and base_url is None:
        raise typer.BadParameter("Give --chat (a chat model), --base-url (a server), or both (which model of it).")
    if base_url is not None:
        from ..chat.endpoint import EndpointChat

        token = None if key_env is None else os.environ.get(key_env, "").strip()
        if token == "":
            raise typer.BadParameter(  # without what was given, which may be the key itself
                "The environment variable that --key-env names holds no key. Give the variable's name, not the key."
            )
        return EndpointChat(
            chat, base_url=base_url, token=token, timeout=timeout, max_tokens_total=max_tokens, cache_dir=folder
        )
    from ..chat.local import LocalChat

    if chat == "embedded":
        from ..embedded.loader import load_model

        return LocalChat(*load_model(device=device or "cpu"))
    return LocalChat.from_pretrained(chat, device=device)


def load_data(name: str, split: str = "train") -> Dataset:
    """Returns a data set from a file, a folder or the Hub; a folder and a Hub data set as `load_dataset` reads them.

    What holds one set of rows is read whatever the split: a file, the shards of `hf-fac score`, the samples of
    `hf-fac synthesize`, and a single data set saved by `save_to_disk`.
    """
    from datasets import DatasetDict, load_dataset, load_from_disk
    from datasets.exceptions import DatasetGenerationError, DatasetsError

    from ..storage.parquet import read_note

    path = Path(name)
    kinds = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
    if path.is_file() and path.suffix not in kinds:
        raise typer.BadParameter(f"{name}: expected a file ending in {', '.join(kinds)}.")
    if not path.exists() and (path.suffix in kinds or name.startswith((".", "/"))):
        raise typer.BadParameter(f"{name} does not exist.")
    parts = sorted(path.glob("shard-*-of-*.parquet")) if (path / "measurement.json").exists() else []
    if parts and len(parts) < (whole := int(parts[0].stem.rpartition("-")[2])):
        raise typer.BadParameter(f"{name} holds {len(parts)} of {whole} shards: start hf-fac score again, it goes on.")
    for file in parts:
        if (read_note(file) or {}).get("shard") != file.name:
            raise typer.BadParameter(f"{file} is not what hf-fac score wrote there: score the rows into a new folder.")
    if (path / "dropped.parquet").exists() and (path / "samples.parquet").exists():
        parts = [path / "samples.parquet"]
    try:
        if path.is_file():
            return load_dataset(kinds[path.suffix], data_files=name, split="train")
        if parts:
            return load_dataset("parquet", data_files=[str(file) for file in parts], split="train")
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            found = load_from_disk(name)
            if not isinstance(found, DatasetDict):
                return found
            if split not in found:
                raise ValueError(f"it has no such split, but {', '.join(found)}")
            return found[split]
        # In full: a folder's name can be that of a kind of file.
        return load_dataset(str(path.resolve()) if path.is_dir() else name, split=split)
    except (DatasetsError, StopIteration, OSError, RuntimeError, ValueError) as error:
        where = "" if path.exists() else "there is no such file or folder here, and on the Hub: "
        reason = error.__cause__ if type(error) is DatasetGenerationError else error
        raise typer.BadParameter(
            f"{name} (split {split}) cannot be read as a data set: {where}{str(reason)[:400] or 'it is empty'} "
            "(expected: one row or more, in files that load_dataset reads)."
        ) from error


def check_measured(dataset: Dataset, name: str, measurement: dict[str, Any], whose: str) -> None:
    """Nothing where the data set is not scored yet, or was scored as `measurement` says.

    Raises: typer.BadParameter, with what differs.
    """
    if "fac_measurement" not in dataset.column_names or not len(dataset):
        return
    theirs = read_measurement(dataset[0]["fac_measurement"], f"{name}: fac_measurement", "score its rows anew")
    if found := differences(theirs, measurement):
        raise typer.BadParameter(
            f"{name} was measured otherwise than {whose} ({found}): score its rows anew, with the same options."
        )


def scored(dataset: Dataset, featurizer: SAEFeaturizer | None, what: str) -> Dataset:
    """Returns the data set with the columns of `FACScorer`, as it is where it has them."""
    from ..features.pooling import LeftOut
    from ..features.scoring import FACScorer
    from ..storage.scored_rows import is_scored

    if is_scored(dataset):
        return dataset
    scorer = FACScorer(featurizer)
    featurizer.left_out = LeftOut()
    dataset = dataset.map(
        scorer, batched=True, with_indices=True, features=scorer.features(dataset.features), desc=f"Scoring the {what}"
    )
    tell_left_out(featurizer, what, len(dataset))
    return dataset


def tell_left_out(featurizer: SAEFeaturizer, what: str, rows: int) -> None:
    """Prints how many rows were cut or skipped, and that of rows scored before it is not known."""
    read = featurizer.left_out.rows
    told = [str(featurizer.left_out)] if str(featurizer.left_out) else []
    if read < rows:
        told.append(f"{rows - read:,} rows were scored by an earlier run, which said what it left out.")
    if told:
        console.print(f"The {what}: {' '.join(told)}")


def marked_text(span: MarkedSpan, ellipsis: str = "") -> Text:
    """Returns the span on one line of the terminal, its token in reverse."""
    return Text.assemble(
        ellipsis + one_line(span.before), (one_line(span.token), "bold reverse"), one_line(span.after) + ellipsis
    )


def one_line(text: str) -> str:
    return visible(text.replace("\n", "⏎"), keep="")
