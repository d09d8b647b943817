"""The text around a token that activates a feature: cut out of a row, and shown on one line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from ..storage.terminal import visible

if TYPE_CHECKING:
    from .rows import Span


class MarkedSpan(NamedTuple):
    """A text that activates a feature: the text before the activating token, the token, the text after it, and the
    activation in the SAE's units (None: unknown). A plain tuple of these is accepted as well."""

    before: str
    token: str
    after: str = ""
    activation: float | None = None


def cut_span(
    text: str, offsets: Sequence[tuple[int, int]], contents: Sequence[Span], position: int, before: int, after: int
) -> MarkedSpan:
    """Returns the text around a token: at most `before` and `after` tokens, within the content that holds it."""
    start, end = offsets[position]
    first = offsets[max(position - before, 0)][0]
    last = offsets[min(position + after, len(offsets) - 1)][1]
    for content in contents:
        if content.start < end and start < content.end:
            first, last = max(first, content.start), min(last, content.end)
    first = min(first, start)
    return MarkedSpan(text[first:start], text[start:end], text[end : max(last, end)])


def mark_span(span: MarkedSpan, *, width: int = 200) -> str:
    """Returns the span on one line as a prompt shows it: before<<token>>after, the token's leading space before <<.

    Control characters, line breaks, bidirectional marks and lone surrogates are shown as escapes, << and >> of the text
    itself as \\<< and \\>>. At most `width` characters are kept on each side and of the token; an ellipsis tells more.
    """
    before, token, after, _ = MarkedSpan(*span)
    bare = token.lstrip() or token
    before += token[: len(token) - len(bare)]
    parts = ("…" * (len(before) > width), before[-width:]), ("", bare[:width]), ("", after[:width])
    shown = [lead + visible(text, keep="").replace("<<", r"\<<").replace(">>", r"\>>") for lead, text in parts]
    return f"{shown[0]}<<{shown[1]}{'…' * (len(bare) > width)}>>{shown[2]}{'…' * (len(after) > width)}"
