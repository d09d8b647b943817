"""The command `hf-fac merge`: what several machines measured becomes one coverage or one dictionary."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..storage.files import try_output
from .coverage import print_coverage
from .data import COVERAGE, coverage_name, rank_of_coverage
from .dictionary import FILE_NAME, print_summary

if TYPE_CHECKING:
    from ..coverage.coverage import FeatureCoverage


def merge(
    output: Annotated[Path, typer.Argument(help="A new .safetensors file; for dictionaries a new folder.")],
    parts: Annotated[
        list[Path],
        typer.Argument(help="Coverages (files), scored rows (folders or Parquet files), or folders of dictionaries."),
    ],
) -> dict[str, Any]:
    """Merge what several machines or processes measured into one coverage, or their dictionaries into one.

    Parts that were measured differently are refused. A feature that a dictionary does not name counts as one that none
    of its rows activates.
    """
    for part in parts:
        if not part.exists():
            raise typer.BadParameter(f"{part} does not exist.")
    if (output / FILE_NAME).exists() or (output.exists() and not output.is_dir()):
        raise typer.BadParameter(f"{output}, the output, exists already: name a new one first, and then the parts.")
    dictionaries = [part for part in parts if (part / FILE_NAME).exists()]
    if not dictionaries:
        return _merge_coverages(output, parts)
    if len(dictionaries) == len(parts):
        return _merge_dictionaries(output, parts)
    other = next(part for part in parts if part not in dictionaries)
    raise typer.BadParameter(f"{dictionaries[0]} is a dictionary and {other} is not: merge each kind separately.")


def _merge_dictionaries(output: Path, parts: list[Path]) -> dict[str, Any]:
    from ..dictionary.dictionary import FeatureDictionary

    _refuse_repeated([part / FILE_NAME for part in parts])
    try_output(output, folder=True)
    merged = FeatureDictionary.merged([FeatureDictionary.load(part) for part in parts])
    merged.save(output)
    return print_summary(merged, output)


def _merge_coverages(output: Path, parts: list[Path]) -> dict[str, Any]:
    if output.suffix != COVERAGE:
        raise typer.BadParameter(f"{output}: expected a name ending in {COVERAGE} for the merged coverage.")
    files_of = [_files(part) for part in parts]
    files = [file for of_part in files_of for file in of_part]
    _refuse_repeated(files)
    _refuse_missing_ranks(files)
    try_output(output)
    merged, part_of = None, {}
    for part, of_part in zip(parts, files_of, strict=True):
        for coverage in _coverages(of_part):
            content = coverage.rows, coverage.maximum_row_hash.tobytes()
            if coverage.maximum.any() and content in part_of:
                raise typer.BadParameter(f"{part} holds the same rows as {part_of[content]}: give each part once.")
            part_of[content] = part
            try:
                merged = coverage if merged is None else merged | coverage
            except ValueError as error:
                raise typer.BadParameter(f"{part} does not merge with {parts[0]}: {error}.") from error
    merged.save(output)
    return print_coverage(merged, output)


def _files(part: Path) -> list[Path]:
    """The coverages of a part, or the Parquet files of its scored rows where it has no coverage."""
    if part.is_file():
        return [part]
    if (whole := part / coverage_name()).exists():
        return [whole]
    coverages = sorted(filter(rank_of_coverage, part.iterdir()))
    rows = sorted(part.rglob("*.parquet"))
    shard = re.fullmatch(r"shard-\d+-of-(\d+)", rows[0].stem) if rows else None
    if not coverages and shard and (n := int(shard[1])) > len(rows):
        raise typer.BadParameter(
            f"{part} holds {len(rows)} of {n} shards and no coverage: run the same hf-fac score again to finish them, "
            "or give the files that are to count."
        )
    if not coverages + rows:
        raise typer.BadParameter(f"{part} holds neither a coverage nor scored rows nor {FILE_NAME}.")
    return coverages or rows


def _refuse_repeated(files: list[Path]) -> None:
    real = [file.resolve() for file in files]
    if repeated := [file for file, n in Counter(real).items() if n > 1]:
        raise typer.BadParameter(f"{repeated[0]} is given twice: its rows would count twice.")
    coverage_in = {file.parent: file for file in real if file.suffix == COVERAGE}
    for file in real:
        if file.suffix == ".parquet" and file.parent in coverage_in:
            raise typer.BadParameter(
                f"{coverage_in[file.parent]} and {file} may count the same rows: give one of the two."
            )


def _refuse_missing_ranks(files: list[Path]) -> None:
    """A set of coverages that several processes wrote is whole only with that of every process."""
    found = list(filter(None, map(rank_of_coverage, files)))
    for world_size in {of for _, of in found}:
        counts = Counter(rank for rank, of in found if of == world_size)
        absent = [rank for rank in range(world_size) if counts[rank] < max(counts.values())]
        if absent:
            names = ", ".join(coverage_name(rank, world_size) for rank in absent[:3])
            raise typer.BadParameter(f"The parts of {world_size} processes are not whole; absent: {names}.")


def _coverages(files: list[Path]) -> Iterator[FeatureCoverage]:
    from ..coverage.coverage import FeatureCoverage

    if files[0].suffix == COVERAGE:
        yield from map(FeatureCoverage.load, files)
    elif files[0].suffix == ".parquet":
        yield FeatureCoverage.from_parquet(files)
    else:
        raise typer.BadParameter(f"{files[0]}: expected a coverage ({COVERAGE}) or scored rows (.parquet).")
