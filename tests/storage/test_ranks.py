"""Which of several processes this one is."""

from __future__ import annotations

import pytest

from hf_fac.storage.ranks import rank_and_world_size


@pytest.mark.parametrize(
    ("environment", "given", "expected"),
    [
        ({}, {}, (0, 1)),
        ({"RANK": "1", "WORLD_SIZE": "4"}, {}, (1, 4)),
        ({"RANK": "1", "WORLD_SIZE": "4"}, {"rank": 0, "world_size": 1}, (0, 1)),
        ({"RANK": "1", "WORLD_SIZE": "4"}, {"rank": 3}, (3, 4)),
        ({"RANK": "", "WORLD_SIZE": ""}, {}, (0, 1)),
    ],
)
def test_what_is_given_comes_before_the_environment(monkeypatch, environment, given, expected):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert rank_and_world_size(**given) == expected


@pytest.mark.parametrize(
    ("rank", "world_size", "message"),
    [
        ("2", "2", "Expected 0 <= rank < world_size; got rank=2, world_size=2"),
        ("-1", "2", "got rank=-1, world_size=2"),
        ("one", "2", "The environment variable RANK is 'one'; expected a whole number"),
    ],
)
def test_a_rank_that_cannot_be_is_refused(monkeypatch, rank, world_size, message):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world_size)
    with pytest.raises(ValueError, match=message):
        rank_and_world_size()
