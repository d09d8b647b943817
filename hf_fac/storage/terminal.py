"""Texts of users, files and servers as they may be shown on a terminal: what would steer it is shown as an escape."""

from __future__ import annotations

import unicodedata


def visible(text: str, *, keep: str = "\n\t") -> str:
    """Returns the text with escapes for control characters (escape sequences, C1), bidirectional marks, lone surrogates
    and what else cannot be seen. `keep`: control characters that stay as they are."""
    # Cf holds bidirectional marks, but also the joiners that some scripts and emoji need.
    keep += "\u200c\u200d"
    return "".join(
        c.encode("unicode_escape").decode()
        if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c not in keep
        else c
        for c in text
    )
