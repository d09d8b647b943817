"""Strict parsing of a model's answers: one JSON object, one text, or the entries of a numbered list.

In: the text of a completion. Out: an `Answer`, the value or the reason why it was refused. Only deviations with one
meaning are corrected (a code fence, "Sure, here is one:", quotation marks around everything).
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

_PHRASE = r"(?:sure|certainly|of course|absolutely|okay|ok)\b[^\n{]{0,40}\bhere(?:'s|’s| is| are)\b[^\n{]{0,100}"
_BEFORE_TEXT = re.compile(rf"\A{_PHRASE}:[ \t]*\n", re.IGNORECASE)
_BEFORE_JSON = re.compile(rf"\A(?:{_PHRASE}|here(?:'s|’s| is)\b[^\n{{]{{0,100}}|json)[:.!]?[ \t]*\n", re.IGNORECASE)
_NUMBERED = re.compile(r"\s*(\d{1,9})[.)](?:\s+(.*))?\Z")
_MARKS = re.compile(r"<<[^\s<>](?:[^<>\n]{0,78}[^\s<>])?>>")  # not the shifts of C++, which stand between spaces
_QUOTES = ('""', "''", "“”", "‘’", "«»", "„“")


class Answer(NamedTuple):
    """A value and no reason, or no value and the reason why it was refused."""

    value: Any
    reason: str | None


def read_json(text: str) -> Answer:
    """Returns the JSON object, a dict, that is the whole answer.

    Corrected: white space, a code fence around it, a line such as "Sure, here is one:" before it, line breaks inside
    its strings, the object written as one JSON string. Refused: anything more, a second object, a repeated key.
    """
    body = _BEFORE_JSON.sub("", text.strip()).strip()
    fence, _, inside = body.partition("\n")
    if fence.strip().lower() in ("```", "```json"):
        body = inside.removesuffix("```").strip()
    decoder = json.JSONDecoder(strict=False, object_pairs_hook=_no_repeated_key)
    try:
        value = decoder.decode(body)
        if isinstance(value, str):
            value = decoder.decode(value)
    except (ValueError, RecursionError) as error:
        return Answer(None, f"it is not JSON ({error}): {text[:80]!a}")
    return Answer(value, None) if isinstance(value, dict) else Answer(None, f"it is no JSON object: {text[:80]!a}")


def read_text(text: str) -> Answer:
    """Returns the answer as a text. Removed: white space around it, a line such as "Sure, here is one:" before it, one
    pair of quotation marks around it. Refused: what `check_text` refuses."""
    return check_text(_unquoted(_BEFORE_TEXT.sub("", text.strip()).strip()))


def check_text(text: Any) -> Answer:
    """Returns the text without white space around it. Refused: other types, an empty text or a bare ellipsis, lone
    surrogates (no tokenizer reads them), and words marked with << and >> as in a prompt's spans."""
    if not isinstance(text, str):
        return Answer(None, f"it is of type {type(text).__name__}, not a text")
    text = text.strip()
    if not text.strip(".… "):
        return Answer(None, "it is empty")
    if marks := _MARKS.search(text):
        return Answer(None, f"it holds the marks of the prompt: {marks[0]!a}")
    if re.search("[\ud800-\udfff]", text):
        return Answer(None, "it holds a lone surrogate, which no tokenizer can read")
    return Answer(text, None)


def read_list(text: str, *, number: int, ended: bool = False) -> list[Answer]:
    """Returns the entries of a numbered list that `text` continues after `number` and a dot.

    An entry is one line, and the numbers are consecutive; text after the list is left out. Refused are an entry of
    several lines, what `read_text` refuses and, unless the model `ended` its turn, a last line, which may be cut off.
    """
    entries: list[str] = []
    reasons: dict[int, str] = {}
    lines, closed = text.split("\n"), True
    for i, line in enumerate(lines):
        unfinished = i == len(lines) - 1 and not ended
        numbered = _NUMBERED.match(line)
        if i == 0 or (numbered and int(numbered[1]) == number + len(entries)):
            entries.append((numbered[2] or "") if i else line)
            closed = False
            if unfinished:
                reasons[len(entries) - 1] = "it is cut off"
        elif not line.strip():
            closed = True
        else:
            if not closed and not (unfinished and line.strip().isdigit()):
                reasons[len(entries) - 1] = "it has several lines"
            break
    return [Answer(None, reasons[i]) if i in reasons else read_text(entry) for i, entry in enumerate(entries)]


def _no_repeated_key(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key is repeated")
    return dict(pairs)


def _unquoted(text: str) -> str:
    for left, right in _QUOTES:
        inner = text[1:-1]
        if len(text) > 2 and text[0] == left and text[-1] == right and left not in inner and right not in inner:
            return inner
    return text
