"""The commands of `hf-fac` that share results on the Hub: `push` and `pull`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..storage.files import try_output
from . import options as opt
from .data import COVERAGE
from .dictionary import FILE_NAME, print_summary
from .output import console


def push(
    path: Annotated[Path, typer.Argument(exists=True, help="Folder of a dictionary or SAE; report or coverage file.")],
    repo_id: Annotated[str, typer.Argument(help="The repo on the Hub; the token is the saved one, or HF_TOKEN.")],
    sae_id: Annotated[str | None, typer.Option(help="Folder in the repo, for one of several SAEs.")] = None,
    anchor: Annotated[str | None, typer.Option(help="For a report: the anchor set's name on the card.")] = None,
    sae: Annotated[str | None, typer.Option(help="For a report: the SAE's name on the card.")] = None,
    revision: opt.Revision = None,
    private: Annotated[bool | None, typer.Option(help="Whether a new repo is private.")] = None,
    message: Annotated[str | None, typer.Option(help="The commit's message.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of a commit.")] = False,
) -> dict[str, Any]:
    """Push a dictionary to a data-set repo, an SAE to a model repo, or figures to the card of a data set."""
    hub = {"revision": revision, "commit_message": message, "create_pr": create_pr}
    if path.is_file():
        from ..coverage.card import push_coverage_to_hub
        from ..coverage.coverage import FeatureCoverage
        from ..coverage.report import FACReport

        is_coverage = path.suffix == COVERAGE
        found = FeatureCoverage.load(path) if is_coverage else FACReport.load(path)
        url = push_coverage_to_hub(found, repo_id, anchor=anchor, sae=sae, **hub)
    elif (path / FILE_NAME).exists():
        from ..dictionary.dictionary import FeatureDictionary

        url = FeatureDictionary.load(path).push_to_hub(repo_id, private=private, **hub)
    else:
        from ..sae.hub import push_sae_to_hub
        from ..sae.loading import load_sae

        url = push_sae_to_hub(load_sae(path), repo_id, sae_id=sae_id, private=private, **hub)
    console.print(url)
    return {"url": url}


def pull(
    repo_id: Annotated[str, typer.Argument(help="The repo on the Hub.")],
    output: Annotated[Path, opt.folder("Folder to write to.")],
    kind: Annotated[Literal["dictionary", "sae"], typer.Option(help="What the repo holds.")] = "dictionary",
    sae_id: opt.SaeId = None,
    revision: opt.Revision = None,
) -> dict[str, Any]:
    """Pull a dictionary or an SAE; it is checked before it is written."""
    try_output(output, folder=True)
    if kind == "dictionary":
        from ..dictionary.dictionary import FeatureDictionary

        dictionary = FeatureDictionary.from_pretrained(repo_id, revision=revision)
        dictionary.save(output)
        return print_summary(dictionary, output)
    from ..sae.loading import load_sae, save_sae

    sae = load_sae(repo_id, sae_id=sae_id, revision=revision)
    save_sae(sae, output)
    console.print(f"{sae.cfg.architecture()}, {sae.cfg.d_sae:,} features. Written to {output}.")
    return {"architecture": sae.cfg.architecture(), "d_sae": sae.cfg.d_sae, "output": output}
