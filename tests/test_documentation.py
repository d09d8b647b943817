"""README and docs: code compiles and calls what there is, commands parse, links and file names lead somewhere."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
from pathlib import Path

import pytest
import typer

import hf_fac
from hf_fac.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
SNIPPETS = [
    pytest.param(code, id=f"{name}-{number}")
    for name, text in TEXT.items()
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
]
BLOCKS = [block for text in TEXT.values() for block in re.findall(r"^```\n(.*?)^```", text, re.DOTALL | re.MULTILINE)]
COMMANDS = sorted(set(re.findall(r"^hf-fac .*$", "\n".join(BLOCKS), re.MULTILINE)))
# What stands behind the names that snippets use without making them.
OBJECTS = {
    "featurizer": hf_fac.SAEFeaturizer, "synthesizer": hf_fac.FACSynthesizer, "coverage": hf_fac.FeatureCoverage,
    "dictionary": hf_fac.FeatureDictionary, "report": hf_fac.FACReport, "result": hf_fac.SynthesisResult,
}  # fmt: skip


@pytest.mark.parametrize("code", SNIPPETS)
def test_a_snippet_calls_what_there_is_with_arguments_that_there_are(code: str) -> None:
    known = dict(OBJECTS)
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module == "hf_fac":
            known |= {alias.name: getattr(hf_fac, alias.name) for alias in node.names}
    for call in (node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)):
        called = _resolved(call.func, known)
        if called is not None:
            parameters = inspect.signature(called).parameters
            given = {keyword.arg for keyword in call.keywords}
            assert given <= set(parameters) or any(p.kind == p.VAR_KEYWORD for p in parameters.values())


def _resolved(node: ast.expr, known: dict[str, object]) -> object | None:
    """What a name or an attribute of a known object is; None for what is not hf_fac's."""
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in known:
        return getattr(known[node.value.id], node.attr)
    return None


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_line_has_options_that_there_are(line: str) -> None:
    _, name, *words = shlex.split(line, comments=True)
    command = typer.main.get_command(app).commands[name]
    options = {option: p for p in command.params for option in p.opts if option.startswith("-")}
    assert {word for word in words if word.startswith("-")} <= set(options)
    required = [p for p in command.params if p.required and any(option.startswith("-") for option in p.opts)]
    assert all(set(p.opts) & set(words) for p in required)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_link_and_a_file_name_lead_to_a_file(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if not link.startswith("http")]
    assert [link for link in links if not (page.parent / link).exists()] == []
    places = re.findall(r"\]\(((?!http)[^)#]*)#([^)]+)\)", text)
    assert [
        f"{file}#{place}" for file, place in places if place not in _places(page.parent / file if file else page)
    ] == []
    packages = "|".join(path.name for path in (ROOT / "hf_fac").iterdir() if path.is_dir())
    files = re.findall(rf"`((?:{packages})/\w+\.py|(?:tests|examples|benchmarks|hf_fac)/[\w./]+)", text)
    assert [file for file in files if not (ROOT / file).exists() and not (ROOT / "hf_fac" / file).exists()] == []


def _places(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_architecture_names_every_module() -> None:
    rows = dict(re.findall(r"^\| `(\w+)/` \|(.*)\|$", TEXT["architecture.md"], re.MULTILINE))
    for path in (ROOT / "hf_fac").glob("*/*.py"):
        if path.stem != "__init__":
            assert f"`{path.stem}`" in rows[path.parent.name], path


def test_the_api_page_has_every_public_name_once() -> None:
    assert sorted(re.findall(r"^::: hf_fac\.(\w+)$", TEXT["api.md"], re.MULTILINE)) == sorted(hf_fac.__all__)
