"""What a synthesis may still spend. The budget says no; the loop then ends and says why."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..storage.validation import check_counts

if TYPE_CHECKING:
    from ..storage.cache import Cache


@dataclass
class Budget:
    """Bounds on samples, completions and time, None for no bound, and what was spent.

    Completions that the cache knew count like those that were asked for now, so that the same call ends at the same
    place. requests, prompt_tokens, completion_tokens: spent so far. clock_readings: how often the time was asked for.
    """

    max_samples: int | None = None
    max_requests: int | None = None
    max_seconds: float | None = None
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    started: float = field(default_factory=time.monotonic)
    clock_readings: int = 0

    def __post_init__(self) -> None:
        check_counts(max_samples=self.max_samples, max_requests=self.max_requests)
        if self.max_seconds is not None and not self.max_seconds >= 0:
            raise ValueError(f"max_seconds is {self.max_seconds!r}; it must be 0 or more, or None for no bound.")

    def spend(self, requests: int, prompt_tokens: int, completion_tokens: int) -> None:
        self.requests += requests
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += completion_tokens

    def samples_left(self, n_samples: int) -> int:
        return sys.maxsize if self.max_samples is None else self.max_samples - n_samples

    def completions_left(self) -> int:
        return sys.maxsize if self.max_requests is None else self.max_requests - self.requests

    def bound_reached(self, n_samples: int, completions: int, cache: Cache) -> str | None:
        """Returns the bound that so many more completions would exceed, None where there is none.

        Args:
            n_samples: accepted so far. cache: the clock of process 0 decides for all processes.
        """
        if self.samples_left(n_samples) < 1:
            return f"max_samples {self.max_samples:,}"
        if self.completions_left() < completions:
            return f"max_requests {self.max_requests:,}"
        if self.max_seconds is None:
            return None
        self.clock_readings += 1
        expired = time.monotonic() - self.started > self.max_seconds
        return f"max_seconds {self.max_seconds:g}" if cache.agree(f"time {self.clock_readings}", expired) else None
