"""What the commands of `hf-fac` share: the options that several have, and how a data set, a featurizer and a chat model
are made of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from datasets import Dataset

    from .chat import Chat
    from .featurizer import SAEFeaturizer

console = Console(soft_wrap=False)

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
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; the GPU if there is one.")]
Threshold = Annotated[
    float | None, typer.Option(help="delta, in the SAE's units; calibrated on the anchor if not given.")
]
Relative = Annotated[float | None, typer.Option(help="delta as a share of each feature's maximum in the anchor.")]
Top = Annotated[int, typer.Option(help="How many missing features to show.")]
Seed = Annotated[int, typer.Option(help="Of what is drawn at random.")]
ChatModel = Annotated[
    str | None,
    typer.Option("--chat", help="Chat model: its name on the server, or a Hub id or folder; 'embedded': SmolLM2."),
]
BaseUrl = Annotated[str | None, typer.Option(help="Server that speaks chat completions, up to and including /v1.")]
KeyEnv = Annotated[str | None, typer.Option(help="Environment variable that holds the server's key.")]
MaxTokens = Annotated[int | None, typer.Option(help="Ask the server nothing more after so many tokens in all.")]
AnswerForm = Annotated[str, typer.Option("--form", help="json, or text for a chat model too small to write JSON.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the repo.")]


def make_featurizer(
    model: str | None, sae: str | None, sae_id: str | None, device: str | None, **settings: Any
) -> SAEFeaturizer:
    if (model is None) != (sae is None):
        raise typer.BadParameter("--model and --sae go together (neither: the embedded model).")
    if model is None:
        from .embedded import load_featurizer

        settings.pop("layer", None)
        return load_featurizer(device=device or "cpu", **settings)
    from .featurizer import SAEFeaturizer

    return SAEFeaturizer.from_pretrained(model, sae, sae_id=sae_id, device=device, **settings)


def make_chat(
    chat: str | None,
    base_url: str | None,
    key_env: str | None,
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
        raise typer.BadParameter("Give --chat (a chat model), or --base-url and --chat (a server and its model).")
    if base_url is not None:
        from .endpoint import EndpointChat

        if key_env is not None and not os.environ.get(key_env):
            raise typer.BadParameter(f"The environment variable {key_env} holds no key.")
        token = os.environ[key_env] if key_env else None
        return EndpointChat(chat, base_url=base_url, token=token, max_tokens_total=max_tokens, cache_dir=folder)
    from .chat import LocalChat

    if chat == "embedded":
        from .embedded import load_model

        return LocalChat(*load_model(device=device or "cpu"))
    return LocalChat.from_pretrained(chat, device=device)


def load_data(name: str, split: str = "train") -> Dataset:
    """Returns a data set from a file, a folder (saved by `save_to_disk`, or with data files) or the Hub."""
    from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

    path = Path(name)
    kinds = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
    if path.is_file():
        if path.suffix not in kinds:
            raise typer.BadParameter(f"{name}: expected a file ending in {', '.join(kinds)}.")
        return load_dataset(kinds[path.suffix], data_files=str(path), split="train")
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        found = load_from_disk(name)
        if isinstance(found, DatasetDict):
            if split not in found:
                raise typer.BadParameter(f"{name} has no split {split!r}; it has {', '.join(found)}.")
            return found[split]
        return found
    if path.is_dir() and sorted(path.glob("*.parquet")):
        return Dataset.from_parquet([str(file) for file in sorted(path.glob("*.parquet"))])
    if path.suffix in kinds or name.startswith((".", "/")):
        raise typer.BadParameter(f"{name} does not exist.")
    return load_dataset(name, split=split)


def scored(dataset: Dataset, featurizer: SAEFeaturizer | None, what: str) -> Dataset:
    """Returns the data set with the columns of `FACScorer`, as it is where it has them."""
    from .scorer import COLUMNS, FACScorer

    if set(COLUMNS) <= set(dataset.column_names):
        return dataset
    scorer = FACScorer(featurizer)
    return dataset.map(scorer, batched=True, features=scorer.features(dataset.features), desc=f"Scoring the {what}")
