"""The commands of `hf-fac` that write what is missing: `synthesize`, and the demo's second half."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ..storage.files import try_output, write_whole
from ..storage.parquet import write_parquet
from . import options as opt
from .options import check_measured, console, load_data, make_chat, make_featurizer, marked_text, scored

if TYPE_CHECKING:
    from ..coverage.report import FACReport
    from ..features.featurizer import SAEFeaturizer
    from ..synthesis.report import SynthesisResult

_DEMO_FEATURES = 10
_DEMO_SECONDS = 60.0  # then the rows that are begun are finished


def synthesize(
    data: opt.Data,
    anchor: Annotated[str, typer.Argument(help="The reference data set, large and diverse, in the same forms.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", file_okay=False, help="Folder for samples, report and journal.")
    ],
    task: Annotated[str, typer.Option(help="A built-in task, or a YAML file.")] = "instruction_following",
    dictionary: Annotated[str | None, typer.Option(help="Folder or Hub repo; the embedded model's by default.")] = None,
    split: opt.Split = "train",
    model: opt.Model = None,
    sae: opt.Sae = None,
    sae_id: opt.SaeId = None,
    layer: opt.Layer = None,
    pool_over: opt.PoolOver = "all",
    device: opt.Device = None,
    threshold: opt.Threshold = None,
    chat: opt.ChatModel = None,
    base_url: opt.BaseUrl = None,
    key_env: opt.KeyEnv = None,
    timeout: opt.Timeout = 120.0,
    max_tokens: opt.MaxTokens = None,
    samples_per_feature: Annotated[int, typer.Option(min=1, help="The most samples kept for a feature.")] = 2,
    form: Annotated[str | None, typer.Option(help="list, text or json; what works best is tried by default.")] = None,
    only_rated: Annotated[
        bool, typer.Option("--only-rated", help="Only features that the dictionary rates for the task.")
    ] = False,
    max_samples: Annotated[int | None, typer.Option(min=1, help="The most samples.")] = None,
    max_requests: Annotated[int | None, typer.Option(min=1, help="The most texts asked for.")] = None,
    max_seconds: Annotated[float | None, typer.Option(help="Begin nothing new after so many seconds.")] = None,
    seed: opt.Seed = 0,
    plan: Annotated[bool, typer.Option("--plan", help="Say what it costs at most, and stop.")] = False,
) -> None:
    """Write samples that activate the features a data set misses. Started again, it goes on where it was."""
    from ..coverage.coverage import FeatureCoverage
    from ..dictionary.dictionary import FeatureDictionary
    from ..synthesis.piecework import FORMS
    from ..synthesis.synthesizer import FACSynthesizer
    from ..tasks.task import get_task

    try_output(output, folder=True)
    wanted = get_task(task)
    if form not in (None, *FORMS):
        raise typer.BadParameter(f"--form is {form!r}; it must be one of {', '.join(FORMS)}.")
    if dictionary is not None:
        known = FeatureDictionary.from_pretrained(dictionary)
    elif model is None:
        from ..embedded.loader import load_dictionary

        known = load_dictionary()
    else:
        raise typer.BadParameter("Give --dictionary: hf-fac interpret makes one for a model.")
    features = known.task_features(wanted.name) if only_rated else None
    rows, reference = load_data(data, split), load_data(anchor, split)
    featurizer = make_featurizer(model, sae, sae_id, device, layer=layer, pool_over=pool_over)
    known.check(featurizer)
    for dataset, name in ((rows, data), (reference, anchor)):
        check_measured(dataset, name, featurizer.measurement, "samples will be")
    if chat is None and base_url is None:
        chat = "embedded"
    writer = make_chat(chat, base_url, key_env, timeout, max_tokens, "text", output / "answers", device)
    scored_rows, scored_anchor = scored(rows, featurizer, "data set"), scored(reference, featurizer, "anchor set")
    report = FeatureCoverage.from_dataset(scored_rows).compare(
        FeatureCoverage.from_dataset(scored_anchor), features=features, threshold=threshold
    )
    console.print(str(report), highlight=False)
    synthesizer = FACSynthesizer(
        writer, featurizer, known, task=wanted, threshold=report.threshold, samples_per_feature=samples_per_feature,
        form=form, avoid={"the data set": rows, "the anchor set": reference}, seed=seed,
    )  # fmt: skip
    console.print(f"Plan without bounds: {synthesizer.plan(report)}", highlight=False)
    if plan:
        return
    result = synthesizer.synthesize(
        report, journal=output / "journal", max_samples=max_samples, max_requests=max_requests, max_seconds=max_seconds
    )
    write_parquet(result.dataset, output / "samples.parquet")
    write_parquet(result.dropped, output / "dropped.parquet")
    write_whole(output / "report.json", json.dumps(result.report.to_dict(), indent=1))
    console.print(str(result.report), highlight=False)
    console.print(f"Samples, what was dropped, and the report are in {output}.")
    if result.report.ended:
        console.print(
            f"It ended before all was tried: {result.report.ended.rstrip('.')}. Raise that bound, or see to it that "
            "the chat answers; the same command then goes on where it stopped.",
            style="bold",
        )


def demo_samples(report: FACReport, featurizer: SAEFeaturizer, avoid: dict) -> None:
    """Writes samples for the strongest missing features with the embedded model and prints them."""
    from ..chat.local import LocalChat
    from ..embedded.loader import load_dictionary
    from ..synthesis.synthesizer import FACSynthesizer

    features = report.missing[:_DEMO_FEATURES]
    console.print(
        f"\nWriting samples for the {len(features)} strongest missing features with the same model (135M parameters: "
        "it writes what it can) ..."
    )
    synthesizer = FACSynthesizer(
        LocalChat(featurizer.model, featurizer.tokenizer, batch_size=96), featurizer, load_dictionary(),
        task="instruction_following", threshold=report.threshold, samples_per_feature=1, form="list", candidates=4,
        rounds=1, answer_tokens=128, avoid=avoid,
    )  # fmt: skip
    result = synthesizer.synthesize(report, features=features, max_seconds=_DEMO_SECONDS)
    print_samples(result, featurizer)


def print_samples(result: SynthesisResult, featurizer: SAEFeaturizer) -> None:
    table = Table(title="Samples written for missing features", title_justify="left")
    table.add_column("feature", justify="right")
    table.add_column("written by")
    table.add_column("activation", justify="right")
    table.add_column("the sample's prompt, the token that activates the feature most marked", overflow="fold")
    for row in result.dataset:
        reading = featurizer.read([{"messages": row["prompt"]}], positions=True)
        acts = reading.activations
        place = (acts.indices == row["fac_feature"]).nonzero()[0]
        span = featurizer.span({"messages": row["prompt"]}, int(reading.positions[place[0]]), before=60, after=40)
        text = marked_text(span)
        table.add_row(str(row["fac_feature"]), row["fac_way"], f"{row['fac_activation']:.1f}", text)
    console.print(table, soft_wrap=False)
    told = result.report
    console.print(
        f"{told.samples} samples fill {len(told.filled)} of {len(told.features)} features. "
        f"[bold]FAC {told.fac_before:.3f} before, {told.fac_after:.3f} after[/bold] ({told.requests} texts written in "
        f"{told.seconds:.0f} s; {sum(told.dropped.values())} dropped: copies, scraps, cut off).",
        highlight=False,
        markup=True,
    )
    for name, way in told.ways.items():
        console.print(
            f"{name}: {way.hit_rate:.0%} of texts activate the feature they were written for; by chance "
            f"{way.hits_by_chance:.1%}",
            highlight=False,
        )
