"""What reading rows lost: counts of rows and tokens, and one sentence that says so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .pooling import FeatureActivations


@dataclass
class LeftOut:
    """What the rows read so far lost: how many were truncated or skipped, and tokens of content that do not count.

    As a text it is "" where no row was truncated or skipped and no special token stands in content. Sinks are left out
    of the text: nearly every plain text starts with one.
    """

    rows: int = 0
    truncated: int = 0
    skipped: int = 0
    first_reason: str = ""
    special_in_content: int = 0
    sinks: int = 0

    def add(self, reading: FeatureActivations, first_row: int) -> None:
        self.rows += len(reading.tokens)
        self.truncated += reading.truncated
        self.skipped += len(reading.skipped)
        self.special_in_content += reading.special_in_content
        self.sinks += reading.sinks
        if reading.skipped and not self.first_reason:
            index = min(reading.skipped)
            self.first_reason = f" (row {first_row + index:,}: {reading.skipped[index]})"

    def __str__(self) -> str:
        counts = (f"{self.truncated:,} cut at max_length", self.truncated), (f"{self.skipped:,} skipped", self.skipped)
        told = " and ".join(words for words, count in counts if count)
        sentences = [f"Of {self.rows:,} rows {told}{self.first_reason}."] if told else []
        if self.special_in_content:
            sentences.append(f"Special tokens in content, which do not count: {self.special_in_content:,}.")
        return " ".join(sentences)
