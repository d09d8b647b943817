"""What the recipes share: options, arms, and the table of their results.

An arm is a training set: the seed rows and what one method adds to them. A script reads its data, says how to train and
evaluate, and calls `run`, which makes the arms and trains each with every seed. Under --output it keeps

    <method>.parquet    the rows that a method added
    results.json        settings, what the seed rows miss; by method its rows, FAC, cost, and the figures of each seed
    results.md          the table that is printed
    results.png         the metric of each method, where matplotlib is installed
    cache/              what was written and measured

from which the same command goes on after a kill. The methods:

    full            the whole anchor set
    random          rows of the anchor set, drawn at random
    pool            rows of the anchor set that activate the most missing features (`select`)
    one_step, two_step, contrastive, steering
                    rows written for missing features (`FACSynthesizer`)
    self_instruct   rows written after the example of a few seed rows (Wang et al. 2023, arXiv:2212.10560)
    magpie          rows that the model writes as the user, from the chat template alone (Xu et al. 2024,
                    arXiv:2406.08464)

The last two ask for no more completions than the first synthesis among the methods. "seed" adds nothing and is always
the first arm.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets, load_dataset
from numpy.typing import ArrayLike

from hf_fac import (
    FACReport,
    FACScorer,
    FACSynthesizer,
    FeatureCoverage,
    FeatureDictionary,
    LocalChat,
    SAEFeaturizer,
    SteeredChat,
    Task,
    select,
)
from hf_fac.embedded.loader import load_featurizer, model_folder
from hf_fac.storage.cache import Cache
from hf_fac.storage.differences import differences
from hf_fac.storage.files import write_whole
from hf_fac.storage.parquet import read_parquet, rows_digest, write_parquet
from hf_fac.synthesis.budget import Budget
from hf_fac.synthesis.candidates import Request
from hf_fac.synthesis.filters import NearDuplicates, flaw, texts_of
from hf_fac.synthesis.settings import METHODS as SYNTHESES
from hf_fac.synthesis.text_source import TextSource
from hf_fac.tasks.parsing import read_list
from hf_fac.tasks.prompts import next_part_prompt

WRITTEN_WITHOUT_FEATURES = ("self_instruct", "magpie")
METHODS = ("full", "random", "pool", *SYNTHESES, *WRITTEN_WITHOUT_FEATURES)
_DATA = Path(__file__).parent / "data"
_SETS = ("seed_data", "anchor", "evaluation")
_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_SHOWN = 3  # seed rows in a request of self_instruct


@dataclass(frozen=True)
class Recipe:
    """What a script knows of its task.

    task: of the rows. seed, anchor: rows with the task's columns; other columns are left out.
    evaluation: rows of any type, which no written row may nearly repeat.
    train_and_evaluate: from an arm's rows, a seed and the arm's name to figures by name; the first is the metric.
    keep: which rows a method may add, of the anchor set and of those written; "full" adds all.
    write_model: Hub id or folder of the model that syntheses write with. None: the one that measures.
    features: from the anchor set with the columns of `FACScorer` to F_task. None: all features, or those that the
        dictionary of --dictionary is rated for.
    unconditional_task: of "magpie", whose texts may have any label: where `task` fixes the label, one that asks for it.
    settings: further ones that shape results, as JSON values.
    """

    task: Task
    seed: Dataset
    anchor: Dataset
    evaluation: Dataset
    train_and_evaluate: Callable[[Dataset, int, str], dict[str, float]]
    keep: Callable[[Mapping[str, Any]], bool] = lambda row: True
    write_model: str | None = None
    features: Callable[[Dataset], ArrayLike] | None = None
    unconditional_task: Task | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def options(description: str, **defaults: Any) -> argparse.ArgumentParser:
    """Returns a parser of the options that all recipes have, with a script's defaults: seed_data, anchor, evaluation,
    samples, methods, output."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub id or folder; by default the embedded model")
    parser.add_argument("--sae", help="Hub repo, SAELens release:sae_id, folder or .pth file; goes with --model")
    parser.add_argument("--dictionary", help="folder or Hub repo; by default the spans of the anchor set")
    parser.add_argument("--seed-data", help=".jsonl, .json, .csv, .parquet or REPO[@REVISION][:CONFIG][:SPLIT]")
    parser.add_argument("--anchor", help="likewise, the large and diverse reference")
    parser.add_argument("--evaluation", help="likewise")
    parser.add_argument("--samples", type=int, help="rows that a method adds")
    parser.add_argument("--methods", type=_methods, help=", ".join(METHODS))
    parser.add_argument("--seeds", type=_numbers, default=[42, 43, 44], help="of training, such as 42,43,44")
    parser.add_argument("--threshold", type=float, help="delta; by default calibrated on the anchor set")
    parser.add_argument("--output", type=Path, help="folder; the same command goes on there")
    parser.set_defaults(**defaults)
    return parser


def read_rows(name: str | Path) -> Dataset:
    """Returns the rows of a file, or of a split ("train" unless one is named) of a data set on the Hub."""
    if (suffix := Path(name).suffix) in _FORMATS:
        return load_dataset(_FORMATS[suffix], data_files=str(name), split="train")
    repo, *parts = str(name).split(":")
    repo, _, revision = repo.partition("@")
    *config, split = parts or ["train"]
    return load_dataset(repo, *config, split=split, revision=revision or None)


def small_data(name: str) -> dict[str, Path]:
    """Returns defaults of `options`: the files in examples/data that begin with this name."""
    return {option: _DATA / f"{name}_{option.removesuffix('_data')}.jsonl" for option in _SETS}


def read_sets(arguments: argparse.Namespace) -> list[Dataset]:
    """Returns the rows of --seed-data, --anchor and --evaluation."""
    return [read_rows(getattr(arguments, option)) for option in _SETS]


def trained_model(arguments: argparse.Namespace) -> str:
    """Returns the id or folder of the model that is trained."""
    return arguments.model or str(model_folder())


def trainer_settings(arguments: argparse.Namespace, seed: int, *, learning_rate: float, epochs: int) -> dict[str, Any]:
    """Returns what all trainers of the recipes are given: nothing is saved or logged."""
    return {
        "output_dir": str(arguments.output / "trainer"), "learning_rate": learning_rate, "num_train_epochs": epochs,
        "seed": seed, "save_strategy": "no", "logging_strategy": "no", "report_to": [], "disable_tqdm": True,
    }  # fmt: skip


def run(recipe: Recipe, arguments: argparse.Namespace) -> dict[str, Any]:
    """Make each arm, train and evaluate it with each seed, print the table. Returns what results.json holds."""
    if (arguments.model is None) != (arguments.sae is None):
        raise SystemExit("--model and --sae go together; without both the embedded model is used.")
    arguments.output.mkdir(parents=True, exist_ok=True)
    arms, path = Arms(recipe, arguments), arguments.output / "results.json"
    results = _read_results(path, arms.settings())
    for name in ["seed", *arguments.methods]:
        if name not in results["arms"]:
            results["arms"][name] = _make(name, arms, results, path)
            results["report"] = arms.report.to_dict()
            _write_results(path, results)
        arm = results["arms"][name]
        rows = concatenate_datasets([arms.seed, as_task_rows(read_parquet(_rows_file(path, name)), recipe.task)])
        for seed in arguments.seeds:
            if str(seed) in arm["runs"]:
                continue
            start = time.monotonic()
            figures = recipe.train_and_evaluate(rows, seed, name)
            arm["runs"][str(seed)] = {"figures": figures, "seconds": round(time.monotonic() - start, 1)}
            _write_results(path, results)
            print(f"{name}, seed {seed}: {', '.join(f'{key} {value:.4f}' for key, value in figures.items())}")
    text = table(results, arguments.methods, arguments.seeds)
    write_whole(path.with_suffix(".md"), text)
    print(f"\n{text}")
    _draw(results, arguments.methods, arguments.seeds, path.with_suffix(".png"))
    return results


class Arms:
    """Makes the rows of each method. What it needs is loaded and measured when a method first asks for it."""

    def __init__(self, recipe: Recipe, arguments: argparse.Namespace) -> None:
        self.recipe, self.task, self.arguments = recipe, recipe.task, arguments
        self.seed, self.anchor = (as_task_rows(rows, self.task) for rows in (recipe.seed, recipe.anchor))
        self.avoid = {"the seed set": list(self.seed), "the evaluation set": list(recipe.evaluation)}

    def settings(self) -> dict[str, Any]:
        """What results depend on; methods and seeds can be added to later."""
        names = ("model", "sae", "dictionary", "samples", "threshold")
        sets = {"seed": self.seed, "anchor": self.anchor, "evaluation": self.recipe.evaluation}
        versions = {name: version(name) for name in ("hf-fac", "torch", "transformers")}
        return (
            {name: getattr(self.arguments, name) for name in names}
            | {f"{name} rows": f"{len(rows)}, {rows_digest(rows)}" for name, rows in sets.items()}
            | {"task": json.loads(json.dumps(asdict(self.task))), "versions": versions}
            | self.recipe.settings
        )

    @cached_property
    def featurizer(self) -> SAEFeaturizer:
        if self.arguments.model is None:
            return load_featurizer(pool_over=self.task.pool_over)
        return SAEFeaturizer.from_pretrained(self.arguments.model, self.arguments.sae, pool_over=self.task.pool_over)

    @cached_property
    def writer(self) -> LocalChat | None:
        name = self.recipe.write_model
        return None if name is None else LocalChat.from_pretrained(name)

    @cached_property
    def dictionary(self) -> FeatureDictionary | None:
        name = self.arguments.dictionary
        return None if name is None else FeatureDictionary.from_pretrained(name)

    @cached_property
    def scored_anchor(self) -> Dataset:
        return self._scored(self.anchor)

    @cached_property
    def report(self) -> FACReport:
        """What the seed rows miss."""
        if self.dictionary is not None:
            features = self.dictionary.task_features(self.task.name)
        else:
            features = self.recipe.features and self.recipe.features(self.scored_anchor)
        seed, anchor = (FeatureCoverage.from_dataset(s) for s in (self._scored(self.seed), self.scored_anchor))
        return seed.compare(anchor, features=features, threshold=self.arguments.threshold)

    def fac_with(self, rows: Dataset) -> float:
        """Returns FAC of the seed rows and these together."""
        if not len(rows):
            return self.report.fac
        return self.report.with_added([FeatureCoverage.from_dataset(self._scored(rows)).maximum]).fac

    def rows_of(self, method: str, max_requests: int | None) -> tuple[Dataset, dict[str, float]]:
        """Returns the rows that a method adds, and its cost: requests, prompt_tokens, completion_tokens.

        Args:
            max_requests: the bound of methods that write without features.
        """
        if method in SYNTHESES:
            return self._synthesized(method)
        if method in WRITTEN_WITHOUT_FEATURES:
            return self._written(method, max_requests)
        free = {"requests": 0, "prompt_tokens": 0, "completion_tokens": 0}
        if method in ("seed", "full"):
            return self.anchor.select(range(len(self.anchor) if method == "full" else 0)), free
        may_add = [i for i, row in enumerate(self.anchor) if self.recipe.keep(row)]
        if method == "random":
            return self.anchor.select(random.Random(0).sample(may_add, min(self.arguments.samples, len(may_add)))), free
        return self.anchor.select(self._selected(np.array(may_add, np.int64))), free

    def _selected(self, left: np.ndarray) -> list[int]:
        """Of these rows of the anchor set, those that activate the most missing features; then, once they are covered,
        likewise of the others."""
        chosen: list[int] = []
        while (n := self.arguments.samples - len(chosen)) > 0:
            pool, report = self.scored_anchor.select(left), self.report
            found = select(pool, report.missing, n, threshold=report.threshold).rows
            if not len(found):
                break
            chosen += left[found].tolist()
            left = np.delete(left, found)
        return chosen

    def _synthesized(self, method: str) -> tuple[Dataset, dict[str, float]]:
        is_embedded = self.writer is None and self.arguments.model is None
        synthesizer = FACSynthesizer(
            self.writer, self.featurizer, self.dictionary, task=self.task, methods=(method,), avoid=self.avoid,
            keep=self.recipe.keep, prompt_format="list" if is_embedded else None,
        )  # fmt: skip
        result = synthesizer.synthesize(
            self.report, anchor=self._measurable(self.anchor), cache_dir=self.arguments.output / "cache",
            max_samples=self.arguments.samples,
        )  # fmt: skip
        return result.dataset, _cost(result.report)

    def _written(self, method: str, max_requests: int | None) -> tuple[Dataset, dict[str, float]]:
        """Rows written without features: a text for the first part, then the other parts, filtered as a synthesis does
        but for the measurement."""
        if max_requests is None:
            raise SystemExit(f"{method} spends what a synthesis spends: name one of {', '.join(SYNTHESES)} before it.")
        chat = LocalChat(self.featurizer.model, self.featurizer.tokenizer)
        task = (method == "magpie" and self.recipe.unconditional_task) or self.task
        budget, samples, each = Budget(max_requests=max_requests), self.arguments.samples, len(task.parts)
        source = TextSource(chat, None, "", Cache(self.arguments.output / "cache"), budget)
        known = NearDuplicates({name: texts_of(rows) for name, rows in self.avoid.items()})
        rows: list[dict[str, Any]] = []
        wave = 0
        while len(rows) < samples and (n := min(budget.completions_left() // each, 2 * (samples - len(rows)))):
            texts = self._from_seed(source, n, wave) if method == "self_instruct" else self._as_user(source, n, wave)
            for row in _completed(task, [text for text in texts if not flaw(text)], source, wave):
                text = next(texts_of([row]))
                if len(rows) < samples and known.source_of(text) is None and self.recipe.keep(row):
                    known.add(text, "a sample")
                    rows.append(row)
            wave += 1
        return as_task_rows(rows, self.task), _cost(budget)

    def _from_seed(self, source: TextSource, n: int, wave: int) -> list[str]:
        """Entries of numbered lists that begin with seed rows."""
        part = next(iter(self.task.parts.values()))
        order = [{"role": "user", "content": f"Write a numbered list. Each entry is {part}, on one line."}]
        known = [" ".join(text.split()) for text in map(_users_text, self.seed)]
        draw = random.Random(wave)
        requests = []
        for _ in range(n):
            shown = draw.sample(known, min(_SHOWN, len(known)))
            prefill = "\n".join(f"{number}. {text}" for number, text in enumerate([*shown, ""], 1)).rstrip()
            requests.append(Request(0, order, prefill, len(shown) + 1))
        answers = source.complete(requests, n=1, temperature=0.8, max_tokens=64, stop=("\n",), seed=wave)
        entries = (
            read_list(answer.text, number=request.next_number, ended=answer.finish == "stop")[0].value
            for request, [answer] in zip(requests, answers, strict=True)
        )
        return [text for text in entries if text]

    def _as_user(self, source: TextSource, n: int, wave: int) -> list[str]:
        """Texts that the model writes where the chat template has the user's message."""
        prompt = SteeredChat(source.chat, self.featurizer.sae, layer=self.featurizer.layer).user_prompt()
        writer = TextSource(prompt.steered.chat, None, "", source.cache, source.budget)
        request = Request(0, prompt.conversation)
        [answers] = writer.complete([request], n=n, temperature=0.8, max_tokens=64, stop=prompt.stop, seed=wave)
        return [answer.text.strip() for answer in answers if answer.finish == "stop" and answer.text.strip()]

    def _measurable(self, rows: Dataset) -> Dataset:
        """Rows as the featurizer reads them."""
        return Dataset.from_list([dict(self.task.featurizer_row(row)) for row in as_task_rows(rows, self.task)])

    def _scored(self, rows: Dataset) -> Dataset:
        rows, scorer = self._measurable(rows), FACScorer(self.featurizer)
        return rows.map(scorer, batched=True, with_indices=True, features=scorer.features(rows.features))


def _completed(task: Task, texts: Sequence[str], source: TextSource, wave: int) -> list[dict[str, Any]]:
    """Whole rows of texts for the task's first part."""
    found = [{next(iter(task.parts)): text} for text in texts]
    while found and len(found[0]) < len(task.parts):
        asked = [next_part_prompt(task, parts) for parts in found]
        requests = [Request(0, conversation) for _, conversation in asked]
        answers = source.complete(requests, n=1, temperature=0.7, max_tokens=256, stop=(), seed=wave)
        read = [
            parts | {name: task.read_part(name, answer.text).value}
            for parts, (name, _), [answer] in zip(found, asked, answers, strict=True)
            if answer.finish == "stop"
        ]
        found = [parts for parts in read if None not in parts.values()]
    rows = (task.row(parts).value for parts in found)
    return [row for row in rows if row is not None]


def as_task_rows(rows: Iterable[Mapping[str, Any]], task: Task) -> Dataset:
    """Returns rows with the task's columns alone."""
    columns, rows = task.features(), list(rows)
    return Dataset.from_dict({name: [row[name] for row in rows] for name in columns}, features=columns)


def table(results: Mapping[str, Any], methods: Sequence[str], seeds: Sequence[int]) -> str:
    """Returns the table in Markdown. Gain: what 100 added rows gain over the seed rows, at the rate of those added."""
    metric = next(iter(results["arms"]["seed"]["runs"][str(seeds[0])]["figures"]))
    lines = [
        f"| method | added | FAC before | after | {metric} | deviation | gain per 100 | requests | tokens | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    seed_mean, _ = _metric(results, "seed", seeds)
    for name in ["seed", *methods]:
        arm, (mean, deviation) = results["arms"][name], _metric(results, name, seeds)
        gain = f"{100 * (mean - seed_mean) / arm['rows']:+.4f}" if arm["rows"] else ""
        deviation = "" if math.isnan(deviation) else f"{deviation:.4f}"
        tokens = arm["prompt_tokens"] + arm["completion_tokens"]
        lines.append(
            f"| {name} | {arm['rows']:,} | {arm['fac_before']:.3f} | {arm['fac_after']:.3f} | {mean:.4f} | "
            f"{deviation} | {gain} | {arm['requests']:,} | {tokens:,} | {arm['seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def _make(name: str, arms: Arms, results: dict[str, Any], path: Path) -> dict[str, Any]:
    """Make and keep the rows of a method; returns its results."""
    syntheses = (method for method in arms.arguments.methods if method in SYNTHESES and method in results["arms"])
    first = next(syntheses, None)
    report, start = arms.report, time.monotonic()
    rows, cost = arms.rows_of(name, None if first is None else results["arms"][first]["requests"])
    seconds = time.monotonic() - start
    write_parquet(rows, _rows_file(path, name))
    fac = {"fac_before": report.fac, "fac_after": arms.fac_with(rows)}
    return {"rows": len(rows), **fac, **cost, "seconds": round(seconds, 1), "runs": {}}


def _rows_file(path: Path, name: str) -> Path:
    return path.with_name(f"{name}.parquet")


def _read_results(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    if not path.exists():
        return {"settings": settings, "arms": {}}
    results = json.loads(path.read_text(encoding="utf-8"))
    if found := differences(results["settings"], settings):
        raise SystemExit(f"{path} holds results of other settings ({found}): choose another --output.")
    return results


def _write_results(path: Path, results: dict[str, Any]) -> None:
    write_whole(path, json.dumps(results, indent=1))


def _metric(results: Mapping[str, Any], name: str, seeds: Sequence[int]) -> tuple[float, float]:
    """The mean over seeds, and the sample's standard deviation, NaN of one seed."""
    values = [next(iter(results["arms"][name]["runs"][str(seed)]["figures"].values())) for seed in seeds]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else float("nan")


def _draw(results: Mapping[str, Any], methods: Sequence[str], seeds: Sequence[int], path: Path) -> None:
    if find_spec("matplotlib") is None:
        return
    from matplotlib.figure import Figure

    names = ["seed", *methods]
    means, deviations = zip(*(_metric(results, name, seeds) for name in names), strict=True)
    figure = Figure(figsize=(6, 0.4 * len(names) + 1.2), layout="constrained")
    axes = figure.subplots()
    axes.errorbar(means, names, xerr=deviations, fmt="o", capsize=3)
    axes.invert_yaxis()
    axes.set_xlabel(f"{next(iter(results['arms']['seed']['runs'][str(seeds[0])]['figures']))}, {len(seeds)} seeds")
    figure.savefig(path)


def _cost(spent: Any) -> dict[str, float]:
    return {name: getattr(spent, name) for name in ("requests", "prompt_tokens", "completion_tokens")}


def _users_text(row: Mapping[str, Any]) -> str:
    """What the user says in a row, without the choices of a contrastive one."""
    return next(texts_of([row])).split("\n\nChoices:")[0]


def _methods(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in METHODS]:
        raise argparse.ArgumentTypeError(f"no method {unknown[0]!r}; the methods are {', '.join(METHODS)}")
    return names


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]
