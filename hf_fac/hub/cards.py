"""The README.md of a Hub repo as text. In: a card, Hub metadata and one section of Markdown. Out: the card with both in
it, and everything else as a person or another tool wrote it. Knows no network."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from ..storage.terminal import visible

PAPER = "https://arxiv.org/abs/2602.10388"
_BOOLEAN = "tag:yaml.org,2002:bool"


def merge_card(text: str, *, metadata: Mapping[str, Any], section: str, body: str) -> str:
    """Returns the card with our metadata and our section in it; the rest is unchanged.

    Metadata: lists are united (an entry replaces one with the same `config_name`), other values are replaced; None
    leaves a value as it is. Body: the text between `<!-- hf_fac:SECTION start -->` and
    `<!-- hf_fac:SECTION end -->` is replaced; a section that is not there yet is appended.

    Args:
        text: the README.md as it is; empty when there is none.

    Raises:
        ValueError: the metadata is not a YAML mapping, or the section's marks do not pair.
    """
    return _with_section(_with_metadata(text, metadata), section, body)


def base_model(name: str | None) -> list[str] | None:
    """Returns a card's `base_model` for a model's name; None for what is no repo id (a local folder, say)."""
    # The Hub refuses a card whose base model is not a repo id, and a local folder's name means nothing there.
    return [name] if name is not None and is_repo_id(name) and not Path(name).exists() else None


def is_repo_id(name: str) -> bool:
    """Returns whether a name has the form of a repo's, "user/repo"."""
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) is not None


def cell(value: Any) -> str:
    """Returns a value as one cell of a Markdown table: whole numbers with commas, others with four digits."""
    text = f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
    return " ".join(text.replace("|", "\\|").split())


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Returns a Markdown table, its values as `cell` writes them."""
    lines = [header, ["---"] * len(header), *([cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def literal(text: str, *, most: int = 200) -> str:
    """Returns a text on one line without Markdown or HTML; after `most` characters comes an ellipsis."""
    line = re.sub(r"\s+", " ", visible(text))
    line = line[:most] + "…" * (len(line) > most)
    return "".join(c if c.isalnum() or c in " ,.;:'?-…" or ord(c) > 127 else f"&#{ord(c)};" for c in line)


def folded(title: str, body: str) -> str:
    """Returns Markdown that opens when a reader clicks on the title."""
    return f"<details>\n<summary>{title}</summary>\n\n{body}\n\n</details>"


def _with_metadata(text: str, metadata: Mapping[str, Any]) -> str:
    block = REGEX_YAML_BLOCK.search(text)
    try:
        old = (yaml.load(block[2], Loader=_Yaml12Loader) if block else None) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"the metadata of README.md is not YAML, correct it by hand: {error}") from None
    if not isinstance(old, dict):
        raise ValueError(f"the metadata of README.md is a {type(old).__name__}, not a mapping; correct it by hand")
    new = {key: value for key, value in metadata.items() if value is not None}
    lists = {key: _union(old.get(key), value) for key, value in new.items() if isinstance(value, list)}
    merged = {**old, **new, **lists}
    if merged == old:
        return text
    written = yaml.safe_dump(merged, sort_keys=False, allow_unicode=True).rstrip("\n")
    if block:
        return block[1] + written + block[3] + text[block.end() :]
    return f"---\n{written}\n---\n\n{text.lstrip()}"


def _with_section(text: str, section: str, body: str) -> str:
    start, end = f"<!-- hf_fac:{section} start -->", f"<!-- hf_fac:{section} end -->"
    # A mark inside the body (a quoted span may hold anything) would end the section early the next time.
    ours = f"{start}\n{body.strip().replace('<!-- hf_fac:', '&lt;!-- hf_fac:')}\n{end}"
    if start not in text and end not in text:
        return f"{text.rstrip()}\n\n{ours}\n".lstrip()
    before, _, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    if not closed or start in rest or end in before + after:
        raise ValueError(f"README.md should have {start} and {end} once each, in this order; correct it by hand")
    return before + ours + after


def _union(old: Any, new: list[Any]) -> list[Any]:
    entries: dict[str, Any] = {}
    for item in [*(old if isinstance(old, list) else [] if old is None else [old]), *new]:
        name = item.get("config_name") if isinstance(item, Mapping) else None
        entries[name or repr(item)] = item
    return list(entries.values())


class _Yaml12Loader(yaml.SafeLoader):
    """YAML 1.2, as the Hub reads cards: the language `no` is a word. ModelCard reads and rewrites it as false."""


_Yaml12Loader.yaml_implicit_resolvers = {
    first: [rule for rule in rules if rule[0] != _BOOLEAN]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Yaml12Loader.add_implicit_resolver(_BOOLEAN, re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"), list("tTfF"))
