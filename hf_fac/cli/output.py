"""What `hf-fac` prints: texts of users and servers as they are, no markup, nothing that controls a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from ..storage.terminal import visible

if TYPE_CHECKING:
    from ..inputs.token_context import MarkedSpan


class _Console(Console):
    """Prints long lines whole, and control characters as escapes."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **options)


console = _Console(soft_wrap=True, markup=False, emoji=False)
errors = _Console(soft_wrap=True, markup=False, emoji=False, stderr=True)


def marked_text(span: MarkedSpan, ellipsis: str = "") -> Text:
    """Returns the span on one line of the terminal, its token in reverse."""
    return Text.assemble(
        ellipsis + one_line(span.before), (one_line(span.token), "bold reverse"), one_line(span.after) + ellipsis
    )


def one_line(text: str) -> str:
    return visible(text.replace("\n", "⏎"), keep="")
