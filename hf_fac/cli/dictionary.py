"""The commands of `hf-fac` about features and what they mean: dictionaries, their ratings, what to select for missing
features, and the way to and from the Hub."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..storage.files import try_output, whole_file
from . import options as opt
from .options import check_measured, console, load_data, make_chat, make_featurizer, scored

if TYPE_CHECKING:
    from ..dictionary.dictionary import FeatureDictionary
    from ..features.featurizer import SAEFeaturizer
from ..storage.differences import differences
from ..storage.terminal import visible
from ..storage.validation import checked
from .options import (
    tell_left_out,
)

if TYPE_CHECKING:
    from ..coverage.report import SavedReport
    from ..features.featurizer import SAEFeaturizer
    from .dictionary import FeatureDictionary

Folder = Annotated[Path, typer.Argument(help="The dictionary's folder.")]
SampleSize = Annotated[int | None, typer.Option(help="Ask about so many features only, drawn at random.")]
_DICTIONARY, _PROGRESS = "dictionary.parquet", "progress"


def interpret(
    output: Annotated[Path, typer.Option("--output", "-o", file_okay=False, help="Folder of the dictionary.")],
    data: Annotated[str | None, typer.Argument(help="Rows to collect spans from; not needed to go on.")] = None,
    split: opt.Split = "train",
    model: opt.Model = None,
    sae: opt.Sae = None,
    sae_id: opt.SaeId = None,
    layer: opt.Layer = None,
    activation: opt.Activation = "native",
    pool_over: opt.PoolOver = "all",
    side: opt.Side = "chosen",
    max_length: opt.MaxLength = None,
    on_error: opt.OnError = "raise",
    preset: opt.Preset = None,
    device: opt.Device = None,
    spans: Annotated[int, typer.Option(min=1, help="The most spans of a feature.")] = 10,
    chat: opt.ChatModel = None,
    base_url: opt.BaseUrl = None,
    key_env: opt.KeyEnv = None,
    timeout: opt.Timeout = 120.0,
    max_tokens: opt.MaxTokens = None,
    form: opt.AnswerForm = "json",
    sample: SampleSize = None,
    shuffled: Annotated[
        bool, typer.Option("--shuffled", help="Measure what the detection score is worth: with another's explanation.")
    ] = False,
    seed: opt.Seed = 0,
) -> None:
    """Collect the strongest spans of every feature that a data set activates; with --chat also have them explained,
    verified and the explanations tested. Started again, it goes on where it was."""
    from ..dictionary.build import content_hash, remove_states

    if (output / _DICTIONARY).exists():
        from ..dictionary.dictionary import FeatureDictionary

        dictionary = FeatureDictionary.load(output)
        if data is not None and content_hash(load_data(data, split)) != dictionary.dataset[0]["data"]:
            raise typer.BadParameter(
                f"{output} holds a dictionary of other rows than those of {data}: choose another folder, or leave the "
                "data out to go on with it."
            )
        console.print(f"Going on with the dictionary in {output}; delete it to collect spans anew.")
    elif data is None:
        raise typer.BadParameter(f"{output} holds no dictionary yet: give the data to collect spans from.")
    elif others := sorted(file.name for file in output.rglob("*.parquet")):
        raise typer.BadParameter(f"{output} holds {others[0]}, no part of a dictionary: choose another folder.")
    else:
        try_output(output, folder=True)
        featurizer = make_featurizer(
            model, sae, sae_id, device, layer=layer, activation=activation, pool_over=pool_over, side=side,
            max_length=max_length, on_error=on_error, preset=preset,
        )  # fmt: skip
        dictionary = _collected(featurizer, data, split, spans, output)
    remove_states(output / _PROGRESS)
    _print_summary(dictionary, output)
    if chat is None and base_url is None:
        return
    from ..dictionary.explanation import detect, explain

    try_output(output, folder=True)
    writer = make_chat(chat, base_url, key_env, timeout, max_tokens, form, output / "answers", device)
    how = {"features": _sampled(dictionary, sample, seed), "seed": seed}
    dictionary = explain(dictionary, writer, prompt_format=form, cache_dir=output / "answers", **how)
    dictionary.save(output)
    _print_summary(dictionary, output)
    if shuffled:
        found = detect(dictionary, writer, shuffled=True, cache_dir=output / "answers", **how)
        scores = [one.score for one in found.values() if one.score is not None]
        console.print(f"Detection by another feature's explanation: {_mean(scores)}.")


def rate(
    folder: Folder,
    task: Annotated[str, typer.Argument(help="Name of a built-in task, or a YAML file.")],
    chat: opt.ChatModel = None,
    base_url: opt.BaseUrl = None,
    key_env: opt.KeyEnv = None,
    timeout: opt.Timeout = 120.0,
    max_tokens: opt.MaxTokens = None,
    form: opt.AnswerForm = "json",
    sample: SampleSize = None,
    seed: opt.Seed = 0,
    device: opt.Device = None,
) -> None:
    """Have each explained and verified feature of a dictionary rated for a task. Started again, it goes on."""
    from ..dictionary.dictionary import FeatureDictionary
    from ..dictionary.rating import rate as rate_features
    from ..tasks.task import get_task

    dictionary, wanted = FeatureDictionary.load(folder), get_task(task)
    try_output(folder, folder=True)
    writer = make_chat(chat, base_url, key_env, timeout, max_tokens, form, folder / "answers", device)
    dictionary = rate_features(
        dictionary, task=wanted, chat=writer, features=_sampled(dictionary, sample, seed),
        prompt_format=form, seed=seed, cache_dir=folder / "answers",
    )  # fmt: skip
    dictionary.save(folder)
    ratings = Counter(r["rating"] for row in dictionary for r in row["ratings"] if r["task"] == wanted.name)
    counts = ", ".join(f"{count:,} {rating}" for rating, count in ratings.most_common()) or "no feature could be rated"
    console.print(f"{wanted.name}: {counts}. Written to {folder}.")


def select(
    pool: Annotated[str, typer.Argument(help="Rows to choose from: a file, a folder, or a Hub data set.")],
    report: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="What `hf-fac missing --output` wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", dir_okay=False, help="The chosen rows, as JSON lines.")],
    rows: Annotated[int, typer.Option("--rows", "-n", min=1, help="The most rows to choose.")] = 100,
    split: opt.Split = "train",
    model: opt.Model = None,
    sae: opt.Sae = None,
    sae_id: opt.SaeId = None,
    layer: opt.Layer = None,
    max_length: opt.MaxLength = None,
    on_error: opt.OnError = "raise",
    preset: opt.Preset = None,
    device: opt.Device = None,
) -> None:
    """Choose from a pool the rows that activate most of the features that a report says are missing. A pool that is
    not scored yet is measured as the report was: give the options that it was made with."""
    from fsspec.utils import infer_compression

    from ..coverage.selection import select as select_rows
    from ..storage.scored_rows import COLUMNS, is_scored

    try_output(output)
    found = _read_report(report)
    measured, data = found.measurement.model_dump(exclude_unset=True), load_data(pool, split)
    featurizer = None
    check_measured(data, pool, measured, f"the rows of {report}")
    if not is_scored(data):
        how = {name: measured[name] for name in ("activation", "pool_over", "side", "keep_above")}
        featurizer = make_featurizer(
            model, sae, sae_id, device, layer=layer, max_length=max_length, on_error=on_error, preset=preset, **how
        )
        if differs := differences(featurizer.measurement, measured):
            raise typer.BadParameter(
                f"With these options {pool} would be measured otherwise than the rows of {report} ({differs}): give "
                "the options that the report was made with."
            )
    data = scored(data, featurizer, "pool")
    chosen = select_rows(data, found.missing, rows, threshold=found.threshold)
    with whole_file(output) as partial:
        data.select(chosen.rows).remove_columns(COLUMNS).to_json(partial, compression=infer_compression(str(output)))
    covered, missing = len(chosen.covered), len(found.missing)
    console.print(
        f"{len(chosen.rows):,} rows activate {covered:,} of {missing:,} missing features. Written to {output}."
    )


def push(
    path: Annotated[
        Path, typer.Argument(exists=True, help="Folder of a dictionary or an SAE; a report or coverage file.")
    ],
    repo_id: Annotated[str, typer.Argument(help="The repo on the Hub; the token is the saved one, or HF_TOKEN.")],
    sae_id: Annotated[str | None, typer.Option(help="Folder in the repo, for one of several SAEs.")] = None,
    anchor: Annotated[str | None, typer.Option(help="Of a report: what to call the anchor set on the card.")] = None,
    sae: Annotated[str | None, typer.Option(help="Of a report: what to call the SAE on the card.")] = None,
    revision: opt.Revision = None,
    private: Annotated[bool | None, typer.Option(help="Whether a repo made by this is private.")] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
) -> None:
    """Push a dictionary to a data-set repo, an SAE to a model repo, or figures onto the card of a data set."""
    hub = {"revision": revision, "commit_message": message, "create_pr": create_pr}
    if path.is_file():
        from ..coverage.card import push_coverage_to_hub
        from ..coverage.coverage import FeatureCoverage

        is_coverage = path.suffix == ".safetensors"
        found = FeatureCoverage.load(path) if is_coverage else _read_report(path).model_dump()
        url = push_coverage_to_hub(found, repo_id, anchor=anchor, sae=sae, **hub)
    elif (path / _DICTIONARY).exists():
        from ..dictionary.dictionary import FeatureDictionary

        url = FeatureDictionary.load(path).push_to_hub(repo_id, private=private, **hub)
    else:
        from ..sae.hub import push_sae_to_hub
        from ..sae.loading import load_sae

        url = push_sae_to_hub(load_sae(path), repo_id, sae_id=sae_id, private=private, **hub)
    typer.echo(visible(url))


def pull(
    repo_id: Annotated[str, typer.Argument(help="The repo on the Hub.")],
    output: Annotated[Path, typer.Option("--output", "-o", file_okay=False, help="Folder to write to.")],
    kind: Annotated[str, typer.Option(help="dictionary, or sae.")] = "dictionary",
    sae_id: opt.SaeId = None,
    revision: opt.Revision = None,
) -> None:
    """Pull a dictionary or an SAE; it is checked before it is written."""
    try_output(output, folder=True)
    if kind == "dictionary":
        from ..dictionary.dictionary import FeatureDictionary

        dictionary = FeatureDictionary.from_pretrained(repo_id, revision=revision)
        dictionary.save(output)
        _print_summary(dictionary, output)
    elif kind == "sae":
        from ..sae.loading import load_sae, save_sae

        sae = load_sae(repo_id, sae_id=sae_id, revision=revision)
        save_sae(sae, output)
        console.print(f"{sae.cfg.architecture()}, {sae.cfg.d_sae:,} features. Written to {output}.")
    else:
        raise typer.BadParameter(f"--kind is {kind!r}; it must be dictionary or sae.")


def _collected(featurizer: SAEFeaturizer, data: str, split: str, spans: int, output: Path) -> FeatureDictionary:
    import numpy as np

    from ..dictionary.build import build_dictionary

    dictionary = build_dictionary(
        featurizer, load_data(data, split), spans=spans, source=Path(data).stem, output_dir=output / _PROGRESS, rank=0,
        world_size=1,
    )  # fmt: skip
    tell_left_out(featurizer, "data set", featurizer.left_out.rows)
    live = dictionary.features[np.array(dictionary.dataset["rows"]) > 0]
    if not len(live):
        raise ValueError(f"{data} activates no feature: there is nothing to interpret.")
    dictionary = dictionary.select(live)
    dictionary.save(output)
    return dictionary


def _read_report(file: Path) -> SavedReport:
    from ..coverage.report import SavedReport

    return checked(
        SavedReport, file.read_bytes(), f"{file} is no report of hf_fac", "give what `hf-fac missing --output` wrote"
    )


def _sampled(dictionary: FeatureDictionary, sample: int | None, seed: int) -> list[int] | None:
    import numpy as np

    if sample is None:
        return None
    if not 1 <= sample <= len(dictionary):
        raise typer.BadParameter(f"--sample is {sample}; the dictionary has {len(dictionary):,} features.")
    return np.sort(np.random.default_rng(seed).choice(dictionary.features, sample, replace=False)).tolist()


def _print_summary(dictionary: FeatureDictionary, folder: Path) -> None:
    counts = ", ".join(f"{count:,} {name}" for name, count in dictionary.summary().items() if name != "features")
    scores = [score for score in dictionary.dataset["detection"] if score is not None]
    detection = f"; detection {_mean(scores)}" if scores else ""
    console.print(f"{len(dictionary):,} features in {folder}: {counts}{detection}.")


def _mean(scores: list[float]) -> str:
    import numpy as np

    return f"{np.mean(scores):.3f} (mean of {len(scores):,}, 0.5 is chance)" if scores else "without any score"
