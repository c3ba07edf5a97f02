"""Each ordering call of the engine is needed: without it a scenario shows a race, other bits, or an error."""

from collections.abc import Callable
from typing import Any

import pytest

from . import branches_beside, kept_prefix, scenarios, sudden_ends
from .mutations import OrderingCall, ordering_calls
from .rig import PIECE_BYTES

pytestmark = pytest.mark.slow
Case = tuple[Callable[..., Any], str, dict[str, Any]]
CASES: dict[str, Case] = {
    "int8": (scenarios.steps, "late", {"kind": "int8", "resident": (0, 3), "held": (1, 2)}),
    "bf16": (scenarios.steps, "compute late", {"kind": "bf16", "resident": (0, 3), "held": (1, 2)}),
    "left": (sudden_ends.left, "late", {"kind": "int8", "slots": 3}),
    "left, bf16": (sudden_ends.left, "copies late", {"kind": "bf16", "slots": 3}),
    "left beside rows": (sudden_ends.left_beside_rows, "late", {"kind": "bf16", "stop_at": 4}),
    "expected": (scenarios.expected, "late", {"kind": "bf16", "asked": (1.0, 0.75, 0.75)}),
    "several moments": (scenarios.several_moments, "late", {"kind": "bf16"}),
    "taken": (sudden_ends.taken, "late", {"kind": "int8", "what": "resident"}),
    "taken within": (sudden_ends.taken, "late", {"kind": "int8", "what": "resident", "inside": (3,)}),
    "held taken": (sudden_ends.taken, "late", {"kind": "bf16", "what": "held"}),
    "held taken within": (sudden_ends.taken, "late", {"kind": "int8", "what": "held", "inside": (3,)}),
    "all taken within": (sudden_ends.taken, "late", {"kind": "int8", "what": "all", "inside": (1, 2, 3)}),
    "followed": (scenarios.followed, "late", {"kind": "bf16", "resident": (0, 3), "held": (1,)}),
    "brought": (scenarios.brought, "late", {"kind": "int8"}),
    "unreadable": (sudden_ends.unreadable, "late", {"kind": "bf16"}),
    "unreadable held": (sudden_ends.unreadable, "late", {"kind": "bf16", "fail": ((1, 2 * PIECE_BYTES),), "slots": 1}),
    "kept": (kept_prefix.prefix_kept, "late", {"remade": 0, "on_device": 2, "then": 1}),
    "kept, taken": (kept_prefix.prefix_kept, "copies late", {"remade": 1, "on_device": 4, "then": 0}),
    "kept, brought": (
        kept_prefix.prefix_kept,
        "compute late",
        {"remade": 0, "on_device": 0, "then": 3, "stops": ((0, 2), (1, 2))},
    ),
    "kept, others": (kept_prefix.prompts_change, "copies late", {}),
    "beside, taken": (
        branches_beside.branches_beside,
        "late",
        {"kind": "bf16", "first": (0, 1, 2, 3, 4), "second": (0, 3), "shrink_at": 2},
    ),
}
# what to look at first, by words of the call's name
FIRST = {
    "kept_tensors": ("kept", "kept, taken", "kept, brought", "kept, others"),
    "modulation": ("left beside rows",),
    "row_slots": ("left beside rows", "several moments"),
    "expected_timesteps": ("expected", "several moments"),
    "__exit__": ("left", "left, bf16"),
    "set_resident": ("taken", "taken within"),
    "set_held": ("held taken", "held taken within"),
    "keep": ("followed", "brought"),
    "_stop": ("unreadable held",),
    "end_run": ("taken", "left", "unreadable"),
    "_late_slot": ("beside, taken",),
}
# name -> why nothing can go wrong without it
NEAR = "the streamer has waited for a later moment before it calls on_block"
REDUNDANT = {
    "row_slots._fill: copying": "the compute stream would make the copy, which takes its time: test_simulated_time",
    "expected_timesteps.run: record_compute": NEAR,
    "expected_timesteps.run: host_waits": NEAR,  # as it is found within both
    "expected_timesteps.look: host_waits": NEAR,
}
CALLS = ordering_calls()


def test_what_is_called_redundant_exists() -> None:
    assert REDUNDANT.keys() <= {call.name for call in CALLS}
    assert all(any(word in name for word in FIRST) for name in REDUNDANT)
    assert len(CALLS) > 10


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_wrong_while_all_calls_are_there(case: str, check: Callable[..., Any]) -> None:
    scenario, schedule, options = CASES[case]
    assert not check(scenario, schedule, **options)


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
def test_an_ordering_call_that_is_taken_away_is_seen(call: OrderingCall, check: Callable[..., Any]) -> None:
    first = next((cases for word, cases in FIRST.items() if word in call.name), ())
    others = () if call.name in REDUNDANT else CASES  # of these, those are enough in which the call has most to do
    found: list[str] = []
    for case in dict.fromkeys((*first, *others)):
        scenario, schedule, options = CASES[case]
        with call.removed():
            found = check(scenario, schedule, stop_at_race=True, **options)
        if found:
            break
    assert bool(found) is not (call.name in REDUNDANT), found
