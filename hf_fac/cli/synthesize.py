"""`hf-fac synthesize`: writes what a data set is missing."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import typer

from ..storage.files import try_output
from . import options as opt
from .data import DataOptions, check_measured, scored
from .features import load_dictionary, read_features
from .options import ChatOptions, MeasuringOptions, ThresholdOptions
from .output import console, same_command


@dataclass(frozen=True)
class WritingOptions:
    """How samples are written; the names are those of `FACSynthesizer`."""

    title: ClassVar[str] = "How samples are written"
    aim: opt.Aim = "missing"
    samples_per_feature: Annotated[int, typer.Option(min=1, help="The most samples kept for a feature.")] = 2
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            help="one_step, two_step, contrastive, steering; again for more, in order. Default: two_step, steering.",
        ),
    ] = None
    prompt_format: Annotated[
        Literal["list", "text", "json"] | None, typer.Option(help="By default each is tried on a few features.")
    ] = None
    candidates: Annotated[int, typer.Option(min=1, help="Texts asked for at a time for each feature.")] = 4
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of the second step.")] = 3
    temperature: Annotated[float, typer.Option(help="Of a method's first round; each further round adds 0.15.")] = 0.8
    seed: opt.Seed = 0


@dataclass(frozen=True)
class BoundOptions:
    """The most that is spent; the names are those of `FACSynthesizer.synthesize`."""

    title: ClassVar[str] = "Bounds"
    max_samples: Annotated[int | None, typer.Option(min=1, help="The most samples.")] = None
    max_requests: Annotated[int | None, typer.Option(min=1, help="The most completions asked for.")] = None
    max_seconds: Annotated[float | None, typer.Option(help="Start nothing new after this many seconds.")] = None


def synthesize(
    data: opt.Data,
    anchor: opt.Anchor,
    output: Annotated[Path, opt.folder("Folder for samples, report and cache.")],
    reading: DataOptions,
    measuring: MeasuringOptions,
    delta: ThresholdOptions,
    chatting: ChatOptions,
    writing: WritingOptions,
    bounds: BoundOptions,
    task: Annotated[str, typer.Option(help="A built-in task, or a YAML file.")] = "instruction_following",
    dictionary: Annotated[
        str | None,
        typer.Option(help="Folder or Hub repo; by default the embedded one, and with --model one of the anchor set."),
    ] = None,
    features: opt.Features = None,
    only_rated: Annotated[bool, typer.Option("--only-rated", help="Only features rated for the task.")] = False,
    pool: Annotated[str | None, typer.Option(help="Rows to take first: a file, a folder, or a Hub data set.")] = None,
    avoid: Annotated[
        list[str] | None, typer.Option(help="A data set that no sample may nearly repeat; again for more.")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print what all rounds would cost, and stop.")] = False,
) -> dict[str, Any]:
    """Write samples that activate the features a data set misses, or too rarely activates. Run it again to resume.

    Without --chat and --base-url the model that measures also writes.
    """
    from ..coverage.coverage import FeatureCoverage
    from ..dictionary.build import build_dictionary
    from ..synthesis.synthesizer import FACSynthesizer
    from ..tasks.task import get_task

    try_output(output, folder=True)
    _check_methods(writing)
    written_for, known = get_task(task), load_dictionary(dictionary, is_embedded=measuring.model is None)
    if only_rated and (known is None or features is not None):
        raise typer.BadParameter("--only-rated needs --dictionary, rated for the task, and goes without --features.")
    wanted = known.task_features(written_for.name) if only_rated else None
    chosen = None if features is None else read_features(features)
    rows, reference = reading.load(data), reading.load(anchor, is_anchor=True)
    others = {name: reading.load(name, is_anchor=True) for name in (*(avoid or ()), *((pool,) if pool else ()))}
    featurizer = measuring.featurizer()
    if chosen is not None:
        chosen.check(featurizer.measurement)
        wanted = chosen.ids
    check_measured({data: rows, anchor: reference, **others}, featurizer.measurement)
    if known is None:
        known = build_dictionary(featurizer, reference, source=Path(anchor).stem, rank=0, world_size=1)
    avoided = {"the data set": rows, "the anchor set": reference} | {name: others[name] for name in avoid or ()}
    synthesizer = FACSynthesizer(
        chatting.make(measuring.device) if chatting.given else None, featurizer, known, task=written_for,
        avoid=avoided, **asdict(writing),
    )  # fmt: skip
    scored_rows, scored_anchor = scored(rows, featurizer, "data set"), scored(reference, featurizer, "anchor set")
    report = FeatureCoverage.from_dataset(scored_rows).compare(
        FeatureCoverage.from_dataset(scored_anchor), features=wanted, **asdict(delta)
    )
    console.print(str(report), highlight=False)
    cost = synthesizer.plan(report)
    console.print(f"Plan without bounds: {cost}", highlight=False)
    if plan:
        return asdict(cost)
    scored_pool = None if pool is None else scored(others[pool], featurizer, "pool")
    result = synthesizer.synthesize(report, cache_dir=output / "cache", pool=scored_pool, **asdict(bounds))
    result.save(output)
    console.print(str(result.report), highlight=False)
    console.print(f"Samples, dropped texts and the report are in {output}.")
    is_complete = result.report.ended is None or result.report.samples == bounds.max_samples
    if not is_complete:
        _say_how_to_resume(result.report.ended)
    return result.report.to_dict() | {"complete": is_complete, "output": output}


def _say_how_to_resume(ended: str) -> None:
    remedy = f"raise that bound, or see to it that the chat answers, and run: {same_command()}"
    console.print(f"Ended early by {ended.rstrip('.')}. To resume, {remedy}", style="bold")


def _check_methods(writing: WritingOptions) -> None:
    from ..synthesis.settings import METHODS

    if unknown := [name for name in writing.methods or () if name not in METHODS]:
        raise typer.BadParameter(f"--method is {unknown[0]!r}; it must be one of {', '.join(METHODS)}.")
