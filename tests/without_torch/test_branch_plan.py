"""Branches on several devices: what each holds, what host memory holds for all, and what the forecast counts."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qwenimage_lowvram.engine.models.branch_shares import shared_out
from qwenimage_lowvram.engine.planning.branch_split import Card, branch_counts, plan_branches
from qwenimage_lowvram.engine.planning.forecast import TYPICAL
from qwenimage_lowvram.engine.planning.memory import plan_memory
from qwenimage_lowvram.engine.planning.request import GIB, Controls, Limits, SamplingRequest
from qwenimage_lowvram.engine.planning.several_cards import plan_on_cards

from .test_plan import REAL, REAL_FP8

REQUEST = SamplingRequest(1328, 1328, 2, 512, timesteps=20, prompts=2)


def cards(*gib: float) -> list[Card]:
    return [Card(f"cuda:{i + 1}", int(one * GIB), TYPICAL) for i, one in enumerate(gib)]


@settings(deadline=None, max_examples=12)
@given(
    footprint=st.sampled_from([REAL, REAL_FP8]),
    first=st.floats(2, 30),
    second=st.floats(0.5, 30),
    ram=st.one_of(st.none(), st.floats(1, 40)),
    branches=st.integers(2, 6),
)
def test_each_device_keeps_its_limit_and_a_block_is_held_once(
    footprint: object, first: float, second: float, ram: float | None, branches: int
) -> None:
    limits = Limits(int(first * GIB), None if ram is None else int(ram * GIB))
    request = replace(REQUEST, branches=branches)
    plan = plan_branches(footprint, request, limits, TYPICAL, cards(second))
    if plan is None:
        return
    (other,) = plan.beside
    assert plan.request.branches + other.plan.request.branches == branches
    assert plan.whole_request == request
    for one, limit in ((plan, first), (other.plan, second)):
        assert one.peak_bytes <= limit * GIB
        assert len(one.resident) + one.streamed == footprint.blocks
        assert one.forecast.seconds <= plan.forecast.seconds
    held = {*plan.held, *other.plan.held}
    both = set(plan.resident) & set(other.plan.resident)
    assert not held & both
    if ram is not None:
        assert plan.ram_peak_bytes <= ram * GIB
        beside_held = plan.ram_peak_bytes - len(held) * footprint.stored_bytes
        assert beside_held >= 0
    read = set(range(footprint.blocks)) - held - both
    assert plan.from_file <= len(read)
    assert other.plan.from_file <= len(read)


def test_two_equal_cards_take_half_the_time_where_steps_compute() -> None:
    alone = plan_memory(REAL_FP8, REQUEST, Limits(8 * GIB, 24 * GIB))
    plan = plan_branches(REAL_FP8, REQUEST, Limits(8 * GIB, 24 * GIB), TYPICAL, cards(8))
    assert plan is not None
    assert plan.forecast.seconds == pytest.approx(alone.forecast.seconds / 2, rel=0.03)
    assert plan.run.step_seconds == plan.forecast.seconds
    assert "1 of 2 branches" in str(plan)
    assert "1 branch on cuda:1: " in str(plan)


def test_blocks_that_lie_on_another_card_are_read_too() -> None:
    plan = plan_on_cards(REAL_FP8, replace(REQUEST, branches=1), Limits(4 * GIB), TYPICAL, cards(4))
    (other,) = plan.further
    there = len(plan.resident) + len(other.blocks)
    assert plan.run.load_seconds == pytest.approx(there * REAL_FP8.stored_bytes / TYPICAL.disk_bytes)


def test_where_the_disk_is_waited_for_a_second_card_gains_nothing() -> None:
    slow = replace(TYPICAL, disk_bytes=0.2e9)
    alone = plan_memory(REAL, REQUEST, Limits(4 * GIB, 2 * GIB), slow)
    plan = plan_branches(REAL, REQUEST, Limits(4 * GIB, 2 * GIB), slow, [replace(cards(4)[0], speeds=slow)])
    assert plan is not None
    assert plan.forecast.seconds > 0.95 * alone.forecast.seconds


def test_the_slower_card_is_waited_for() -> None:
    slow = replace(cards(8)[0], speeds=replace(TYPICAL, flops=TYPICAL.flops / 3))
    plan = plan_branches(REAL_FP8, REQUEST, Limits(8 * GIB), TYPICAL, [slow])
    alone = plan_memory(REAL_FP8, REQUEST, Limits(8 * GIB))
    assert plan is not None
    assert plan.forecast.seconds > alone.forecast.seconds  # and whoever plans takes one card


@pytest.mark.parametrize(
    "changes",
    [{"branches": 1}, {"controls": Controls(weights_bytes=1)}, {"branches": 64}],
    ids=["one branch", "ControlNets", "more images than the first card has room to hand on"],
)
def test_what_is_not_divided(changes: dict[str, object]) -> None:
    request = replace(REQUEST, **changes)
    assert plan_branches(REAL_FP8, request, Limits(12 * GIB), TYPICAL, cards(12)) is None


def test_a_card_that_is_too_small_takes_no_part() -> None:
    assert plan_branches(REAL_FP8, REQUEST, Limits(8 * GIB), TYPICAL, cards(0.5)) is None


def test_branches_go_to_where_they_are_done_soonest() -> None:
    assert branch_counts(2, [1.0, 1.0]) == [1, 1]
    assert branch_counts(6, [2.0, 1.0]) == [4, 2]
    assert branch_counts(3, [1.0, 1.0]) == [2, 1]
    assert branch_counts(3, [1.0, 5.0]) == [1, 2]


def test_a_pass_of_fewer_or_more_branches_is_shared_out_alike() -> None:
    assert shared_out(6, [4, 2]) == [{0, 1, 2, 3}, {4, 5}]
    assert shared_out(3, [4, 2]) == [{0, 1}, {2}]
    assert shared_out(1, [1, 1]) == [{0}, set()]
    assert shared_out(5, [1, 1]) == [{0, 1, 2}, {3, 4}]
    assert shared_out(4, [2, 2], [range(1, 3)]) == [{0, 1, 2}, {3}]
    assert shared_out(3, [1]) == [{0, 1, 2}]
