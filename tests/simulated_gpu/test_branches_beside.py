"""Branches on two simulated cards: one card's bits, no race, each block read once, nothing left."""

from collections.abc import Callable
from typing import Any

import pytest

from .branches_beside import branches_beside, one_card_fails

Check = Callable[..., list[str]]
ALL = tuple(range(5))
CASES: list[dict[str, Any]] = [
    {"kind": "bf16"},
    {"kind": "int8", "first": (), "second": (), "held": ()},
    {"kind": "nf4", "first": ALL, "second": (0, 3)},
    {"kind": "bf16", "first": ALL, "second": (0, 3), "slots": 1},
    {"kind": "bf16", "first": ALL, "second": ALL, "held": ()},
    {"kind": "GGUF", "first": (), "second": (0,), "slots": 3},
    {"kind": "int8", "images": 2, "own": 3, "lora": (("lora", 1.0), ("dora", 0.7))},
    {"kind": "bf16", "stop_at": 0},
    {"kind": "int8", "stop_at": 3, "slots": 3},
    {"kind": "bf16", "first": ALL, "second": (0, 3), "shrink_at": 2},
    {"kind": "nf4", "first": (0, 1, 3), "second": (0,), "shrink_at": 3},
    {"kind": "bf16", "residuals": True, "held": (1, 2, 4)},
]
pytestmark = pytest.mark.slow
SCHEDULES = ("late", "random", "copies late", "compute late")


@pytest.mark.parametrize("number", range(len(CASES)))
def test_results_are_one_cards_and_no_access_is_a_race(number: int, check: Check) -> None:
    schedule = SCHEDULES[number % len(SCHEDULES)]
    assert not check(branches_beside, schedule, seed=number, **CASES[number]), (CASES[number], schedule)


@pytest.mark.parametrize("changes", [{"pinned": False}, {"pinned_limit_bytes": 300_000}, {"prefetch": False}])
def test_a_slower_host_changes_nothing(changes: Any, check: Check) -> None:
    assert not check(branches_beside, "random", changes=changes, kind="int8", held=(1, 2))


@pytest.mark.parametrize("fail_at", [3, 40, 100, 190])
def test_where_a_card_has_no_memory_one_card_makes_the_same(fail_at: int, check: Check) -> None:
    assert not check(one_card_fails, "late", kind="int8", fail_at=fail_at)
