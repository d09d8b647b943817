"""Which of several processes this one is: given, or what torchrun and accelerate put into the environment."""

from __future__ import annotations

import os


def rank_and_world_size(rank: int | None = None, world_size: int | None = None) -> tuple[int, int]:
    """Returns the number of this process, from 0 on, and how many there are; each is read from the environment (RANK,
    WORLD_SIZE) where it is not given, and without these there is one process.

    Raises: ValueError unless 0 <= rank < world_size.
    """
    rank = _from_environment("RANK", 0) if rank is None else rank
    world_size = _from_environment("WORLD_SIZE", 1) if world_size is None else world_size
    if not 0 <= rank < world_size:
        raise ValueError(f"Expected 0 <= rank < world_size; got rank={rank}, world_size={world_size}.")
    return rank, world_size


def _from_environment(name: str, default: int) -> int:
    found = os.environ.get(name) or str(default)
    try:
        return int(found)
    except ValueError:
        raise ValueError(
            f"The environment variable {name} is {found!r}; expected a whole number, or none outside torchrun."
        ) from None
