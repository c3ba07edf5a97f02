"""Streaming on a simulated GPU: no race, the CPU's bits, and nothing left, pairwise over what a run can be like."""

from collections.abc import Callable
from itertools import combinations, product
from typing import Any

import pytest

from . import scenarios
from .schedules import SCHEDULES
from .tiny_models import LAYERS

ALL = tuple(range(LAYERS))
HALF, HELD = (0, 3), (1, 4)
AXES: dict[str, tuple[Any, ...]] = {
    "kind": ("bf16", "fp8", "scaled fp8", "int8", "nf4", "GGUF"),
    "resident": ((), HALF, ALL),
    "slots": (1, 2, 3),
    "ring": (4, 9),
    "held": ((), HELD),
    "lora": ((), (("lora", 1.0), ("dora", 0.7))),
    "then": (None, (), (("lora", 0.5),)),
    "residuals": (False, True),
    "chunk": (None, 1),
    "prompts": (1, 1, 2),
    "schedule": (*(name for name in SCHEDULES if name != "at once"), "random"),
    "prefetch": (True, True, False),
}
pytestmark = pytest.mark.slow
Check = Callable[..., list[str]]


def pairwise(axes: dict[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Few rows in which every two values of two axes meet: each row takes the values with most pairs not yet met."""
    names = list(axes)
    counts = [len(axes[name]) for name in names]
    left = {
        ((a, i), (b, j))
        for (a, b) in combinations(range(len(names)), 2)
        for i, j in product(range(counts[a]), range(counts[b]))
    }
    rows = []
    while left:
        (a, i), (b, j) = min(left)
        row = {a: i, b: j}
        for axis in range(len(names)):
            if axis not in row:
                row[axis] = max(range(counts[axis]), key=lambda value: _met(left, row, axis, value))
        left -= {((a, row[a]), (b, row[b])) for a, b in combinations(range(len(names)), 2)}
        rows.append({names[axis]: axes[names[axis]][value] for axis, value in sorted(row.items())})
    return rows


def _met(left: set[Any], row: dict[int, int], axis: int, value: int) -> int:
    pairs = (tuple(sorted(((axis, value), other))) for other in row.items())
    return sum(pair in left for pair in pairs)


ROWS = pairwise(AXES)


def test_every_two_values_of_two_axes_meet() -> None:
    for (one, first), (other, second) in combinations(AXES.items(), 2):
        met = {(repr(row[one]), repr(row[other])) for row in ROWS}
        assert met >= {(repr(a), repr(b)) for a, b in product(first, second)}
    assert len(ROWS) <= 30


@pytest.mark.parametrize("number", range(len(ROWS)))
def test_steps_are_the_cpus_and_no_access_is_a_race(number: int, check: Check) -> None:
    row = dict(ROWS[number])
    schedule, changes = row.pop("schedule"), {"prefetch": row.pop("prefetch")}
    assert not check(scenarios.steps, schedule, seed=number, changes=changes, **row), ROWS[number]
