"""Steps that the disk bounds come near to what they cannot do without."""

from typing import Any

import pytest
from devtools import bench

# of the bound, at the most; and seconds
NEAR = 1.05
CASES = [(0, 2.9), (1, 1.5), (2, 4.8)]


@pytest.fixture(scope="module")
def bounds() -> Any:
    return bench.load(bench.BENCHMARKS / "bounds.py")


@pytest.mark.parametrize(("number", "most_seconds"), CASES)
def test_todays_plan_is_near_the_bound(number: int, most_seconds: float, bounds: Any) -> None:
    assert len(bounds.CASES) == len(CASES)
    found = bounds.row(bounds.CASES[number])
    assert found["read"] > 0
    assert found["bound"] * 0.99 <= found["seconds"] <= NEAR * found["bound"]
    assert found["seconds"] < most_seconds
    assert found["seconds"] <= found["small_ring"]
    assert found["forecast"] == pytest.approx(found["seconds"], rel=0.02)
