"""The README.md of a Hub repo as text. In: a card, Hub metadata and one section of Markdown; out: the card with both in
it, and everything a person or another tool wrote still there. Knows no network: `hub.py` carries cards to and fro."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def merge_card(text: str, *, metadata: Mapping[str, Any], section: str, body: str) -> str:
    """A card with our metadata and our section in it, all else as it was written.

    Metadata: lists are united (entries with the same `config_name` or `name` are replaced), mappings merged, other
    values replaced by ours; None says nothing. Body: what stands between `<!-- hf_fac:SECTION start -->` and
    `<!-- hf_fac:SECTION end -->` is replaced; a section that is not there yet is appended.

    Args:
        text: the README.md as it is; empty when there is none.
        section: printable, without ">".

    Raises:
        ValueError: the metadata is not a YAML mapping, the section's marks do not pair, or its name cannot be one.
    """
    import yaml
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    if not section.strip() or ">" in section or not section.isprintable():
        raise ValueError(f"{section!r} cannot name a section of a card: expected printable text without '>'")
    block = REGEX_YAML_BLOCK.search(text)
    try:
        old = (yaml.load(block[2], Loader=_loader()) if block else None) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"the metadata of README.md is not YAML, correct it by hand: {error}") from None
    if not isinstance(old, dict):
        raise ValueError(f"the metadata of README.md is a {type(old).__name__}, not a mapping; correct it by hand")
    merged = _united(old, {key: value for key, value in metadata.items() if value is not None})
    if merged != old:
        written = yaml.safe_dump(merged, sort_keys=False, allow_unicode=True).rstrip("\n")
        opening, closing, rest = ("---\n", "\n---\n\n", text.lstrip())
        if block:
            opening, closing, rest = block[1], block[3], text[block.end() :]
        text = opening + written + closing + rest
    return _with_section(text, section, body)


def cell(value: Any) -> str:
    """A value as one cell of a Markdown table: whole numbers with commas, others with four digits."""
    text = f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
    return " ".join(text.replace("|", "\\|").split())


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


def _united(old: Any, new: Any) -> Any:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return {**old, **{key: _united(old[key], value) if key in old else value for key, value in new.items()}}
    if not isinstance(old, list) and not isinstance(new, list):
        return new
    known: dict[str, Any] = {}
    for side in (old, new):
        for item in side if isinstance(side, list) else [] if side is None else [side]:
            name = (item.get("config_name") or item.get("name")) if isinstance(item, Mapping) else None
            known[f"named {name}" if name else repr(item)] = item
    return list(known.values())


def _loader() -> type:
    import yaml

    class Loader(yaml.SafeLoader):
        """As the Hub reads cards: YAML 1.2, where the language `no` is a word."""

    boolean, known = "tag:yaml.org,2002:bool", yaml.SafeLoader.yaml_implicit_resolvers
    Loader.yaml_implicit_resolvers = {first: [r for r in rules if r[0] != boolean] for first, rules in known.items()}
    Loader.add_implicit_resolver(boolean, re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"), list("tTfF"))
    return Loader
