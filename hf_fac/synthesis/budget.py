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
    place. requests, prompt_tokens, completion_tokens: spent so far. refused: the bound that said no, else None.
    """

    max_samples: int | None = None
    max_requests: int | None = None
    max_seconds: float | None = None
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    refused: str | None = None
    started: float = field(default_factory=time.monotonic)
    _asked_for_time: int = 0

    def __post_init__(self) -> None:
        check_counts(max_samples=self.max_samples, max_requests=self.max_requests)
        if self.max_seconds is not None and not self.max_seconds >= 0:
            raise ValueError(f"max_seconds is {self.max_seconds!r}; it must be 0 or more, or None for no bound.")

    def affordable(self, completions_each: int) -> int:
        """Returns for how many requests there is room when each may need so many completions."""
        if self.max_requests is None:
            return sys.maxsize
        n = (self.max_requests - self.requests) // completions_each
        if n < 1:
            self.refused = f"max_requests {self.max_requests:,}"
        return max(0, n)

    def has_time(self, cache: Cache) -> bool:
        """Whether something new may begin; the clock of process 0 decides for all."""
        if self.max_seconds is None:
            return True
        self._asked_for_time += 1
        expired = time.monotonic() - self.started > self.max_seconds
        if cache.agree(f"time {self._asked_for_time}", expired):
            self.refused = f"max_seconds {self.max_seconds:g}"
        return self.refused is None

    def wants_more(self, accepted: int) -> bool:
        """Whether more samples may be accepted."""
        if self.max_samples is not None and accepted >= self.max_samples:
            self.refused = f"max_samples {self.max_samples:,}"
        return self.refused is None

    def samples_left(self, accepted: int) -> int:
        return sys.maxsize if self.max_samples is None else self.max_samples - accepted

    def spend(self, requests: int, prompt_tokens: int, completion_tokens: int) -> None:
        self.requests += requests
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += completion_tokens
