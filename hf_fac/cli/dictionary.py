"""The commands of `hf-fac` about what features mean: `interpret` and `rate`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..dictionary.schema import FAILED
from ..storage.files import try_output
from . import options as opt
from .data import DataOptions, print_left_out
from .features import ChosenFeatures, read_features
from .options import ChatOptions, MeasuringOptions
from .output import console

if TYPE_CHECKING:
    from ..dictionary.dictionary import FeatureDictionary

FILE_NAME = "dictionary.parquet"
_PROGRESS, _CACHE = "progress", "cache"

AnswerFormat = Annotated[Literal["json", "text"], typer.Option(help="text: for a chat too small to write JSON.")]
SampleSize = Annotated[int | None, typer.Option(help="Ask only about this many features, drawn at random.")]


def interpret(
    output: Annotated[Path, opt.folder("Folder of the dictionary.")],
    reading: DataOptions,
    measuring: MeasuringOptions,
    chatting: ChatOptions,
    data: Annotated[str | None, typer.Argument(help="Rows to collect spans from; not needed to resume.")] = None,
    spans: Annotated[int, typer.Option(min=1, help="The most spans of a feature.")] = 10,
    held_out: Annotated[
        int, typer.Option(min=0, help="The most spans that test an explanation; 0: no test, two questions a feature.")
    ] = 5,
    prompt_format: AnswerFormat = "json",
    features: opt.Features = None,
    from_neuronpedia: Annotated[
        str | None,
        typer.Option(help="Take spans and explanations of MODEL/SOURCE there; 'auto': of the source that --sae names."),
    ] = None,
    sample: SampleSize = None,
    shuffled: Annotated[
        bool, typer.Option("--shuffled", help="Also score each feature by another's explanation, as a baseline.")
    ] = False,
    seed: opt.Seed = 0,
) -> dict[str, Any]:
    """Collect the strongest spans of every feature that a data set activates. Run it again to resume.

    With --chat the features are also explained, and the explanations are verified and tested; features that
    Neuronpedia explains keep these explanations.
    """
    from ..dictionary.build import remove_states

    chosen = None if features is None else read_features(features)
    if (output / FILE_NAME).exists():
        dictionary = _known(output, data, reading)
    elif from_neuronpedia is not None:
        dictionary = _downloaded(output, from_neuronpedia, measuring, data, chosen, spans)
    else:
        dictionary = _collected(output, reading, measuring, data, spans)
    is_downloaded = "neuronpedia" in dictionary.measurement
    if chosen is not None and not is_downloaded:
        chosen.check(dictionary.measurement)
    remove_states(output / _PROGRESS)
    summary = print_summary(dictionary, output)
    if not chatting.given:
        return summary
    from ..dictionary.explanation import detect, explain

    try_output(output, folder=True)
    chat = chatting.make(measuring.device)
    asked = {"features": _sampled(dictionary, sample, seed, chosen), "seed": seed, "cache_dir": output / _CACHE}
    dictionary = explain(
        dictionary, chat, held_out=held_out, keep_explanations=is_downloaded, prompt_format=prompt_format, **asked
    )
    dictionary.save(output)
    summary = print_summary(dictionary, output)
    if shuffled:
        found = detect(dictionary, chat, held_out=held_out, shuffled=True, **asked)
        mean, words = _mean_score([one.score for one in found.values()])
        console.print(f"Detection by another feature's explanation: {words}.")
        summary |= {"shuffled_detection": mean}
    answered = summary["explained"] + summary["cannot tell"]
    return summary | {"complete": answered > 0 or not summary["failed"]}


def rate(
    folder: Annotated[Path, typer.Argument(help="The dictionary's folder.")],
    task: Annotated[str, typer.Argument(help="Name of a built-in task, or a YAML file.")],
    chatting: ChatOptions,
    prompt_format: AnswerFormat = "json",
    sample: SampleSize = None,
    seed: opt.Seed = 0,
    device: opt.Device = None,
) -> dict[str, Any]:
    """Have the explained and verified features of a dictionary rated for a task. Run it again to resume."""
    from ..dictionary.dictionary import FeatureDictionary
    from ..dictionary.rating import rate as rate_features
    from ..tasks.task import get_task

    dictionary, rated_for = FeatureDictionary.load(folder), get_task(task)
    try_output(folder, folder=True)
    dictionary = rate_features(
        dictionary, task=rated_for, chat=chatting.make(device), features=_sampled(dictionary, sample, seed),
        prompt_format=prompt_format, seed=seed, cache_dir=folder / _CACHE,
    )  # fmt: skip
    dictionary.save(folder)
    ratings = Counter(r["rating"] for row in dictionary for r in row["ratings"] if r["task"] == rated_for.name)
    counts = ", ".join(f"{count:,} {rating}" for rating, count in ratings.most_common()) or "no feature could be rated"
    console.print(f"{rated_for.name}: {counts}. Written to {folder}.")
    complete = not ratings or set(ratings) != {FAILED}
    return {"task": rated_for.name, "ratings": dict(ratings), "complete": complete, "output": folder}


def _known(folder: Path, data: str | None, reading: DataOptions) -> FeatureDictionary:
    """The dictionary in the folder. Raises typer.BadParameter when it is of other rows than the data's."""
    from ..dictionary.build import content_hash
    from ..dictionary.dictionary import FeatureDictionary

    dictionary = FeatureDictionary.load(folder)
    if data is not None and content_hash(reading.load(data)) != dictionary.dataset[0]["data"]:
        raise typer.BadParameter(
            f"{folder} holds a dictionary of other rows than those of {data}: choose another folder, or leave the data "
            "out to resume with this dictionary."
        )
    console.print(f"Resuming with the dictionary in {folder}; delete it to collect spans again.")
    return dictionary


def _collected(
    folder: Path, reading: DataOptions, measuring: MeasuringOptions, data: str | None, spans: int
) -> FeatureDictionary:
    import numpy as np

    from ..dictionary.build import build_dictionary

    if data is None:
        raise typer.BadParameter(f"{folder} holds no dictionary yet: give the data to collect spans from.")
    if others := sorted(file.name for file in folder.rglob("*.parquet")):
        raise typer.BadParameter(f"{folder} holds {others[0]}, no part of a dictionary: choose another folder.")
    try_output(folder, folder=True)
    featurizer = measuring.featurizer()
    dictionary = build_dictionary(
        featurizer, reading.load(data), spans=spans, source=Path(data).stem, output_dir=folder / _PROGRESS, rank=0,
        world_size=1,
    )  # fmt: skip
    print_left_out(featurizer, "data set", featurizer.left_out.rows)
    live = dictionary.features[np.array(dictionary.dataset["rows"]) > 0]
    if not len(live):
        raise ValueError(f"{data} activates no feature: there is nothing to interpret.")
    dictionary = dictionary.select(live)
    dictionary.save(folder)
    return dictionary


def _downloaded(
    folder: Path,
    source: str,
    measuring: MeasuringOptions,
    data: str | None,
    chosen: ChosenFeatures | None,
    spans: int,
) -> FeatureDictionary:
    from ..dictionary.dictionary import FeatureDictionary

    if data is not None:
        raise typer.BadParameter("Give the data to collect spans from, or --from-neuronpedia, not both.")
    try_output(folder, folder=True)
    featurizer = measuring.featurizer() if source == "auto" else None
    if chosen is not None and featurizer is not None:
        chosen.check(featurizer.measurement)
    ids = None if chosen is None else chosen.ids
    dictionary = FeatureDictionary.from_neuronpedia(featurizer or source, features=ids, spans=spans)
    dictionary.save(folder)
    return dictionary


def _sampled(
    dictionary: FeatureDictionary, sample: int | None, seed: int, chosen: ChosenFeatures | None = None
) -> list[int] | None:
    import numpy as np

    known = dictionary.features
    if chosen is not None:
        known = chosen.among(known)
        if not len(known):
            raise typer.BadParameter(f"The dictionary has none of the features in {chosen.name}.")
    if sample is None:
        return None if chosen is None else known.tolist()
    if not 1 <= sample <= len(known):
        raise typer.BadParameter(f"--sample is {sample}; there are {len(known):,} features to ask about.")
    return np.sort(np.random.default_rng(seed).choice(known, sample, replace=False)).tolist()


def print_summary(dictionary: FeatureDictionary, folder: Path) -> dict[str, Any]:
    """Prints how many features a dictionary has in which state, and returns it."""
    summary = dictionary.summary()
    counts = ", ".join(f"{count:,} {name}" for name, count in summary.items() if name != "features")
    mean, words = _mean_score(dictionary.dataset["detection"])
    detection = "" if mean is None else f"; detection {words}"
    console.print(f"{len(dictionary):,} features in {folder}: {counts}{detection}.")
    return summary | {"detection": mean, "output": folder}


def _mean_score(scores: Iterable[float | None]) -> tuple[float | None, str]:
    """The mean of the detection scores that there are, as a number and in words."""
    known = [score for score in scores if score is not None]
    if not known:
        return None, "without any score"
    mean = sum(known) / len(known)
    return mean, f"{mean:.3f} (mean of {len(known):,}, 0.5 is chance)"
