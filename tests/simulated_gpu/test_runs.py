"""Runs that are interrupted, robbed of memory, or beside another model or card: no race, equal bits, nothing left."""

from collections.abc import Callable
from itertools import cycle
from typing import Any

import pytest
import torch
from block_scaled_stand_ins import stand_in
from qwenimage_lowvram.engine.compute.linear_choice import Computing

from . import beside, kept_prefix, predicted, scenarios, sudden_ends

pytestmark = pytest.mark.slow
CASES: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (scenarios.interrupted, {"kind": "bf16", "at": 0, "more": True}),
    (scenarios.interrupted, {"kind": "int8", "at": 2, "more": False}),
    (scenarios.interrupted, {"kind": "nf4", "at": 4, "more": True}),
    (scenarios.shrunk, {"kind": "bf16", "inside": False}),
    (scenarios.shrunk, {"kind": "int8", "inside": True, "held": (3,)}),
    (scenarios.unannounced, {"kind": "bf16"}),
    (scenarios.unannounced, {"kind": "GGUF"}),
    (scenarios.expected, {"kind": "int8", "asked": (1.0, 0.75, 0.75, 0.5)}),
    (scenarios.several_moments, {"kind": "int8"}),
    (scenarios.two_models, {"kinds": ("bf16", "nf4")}),
    (sudden_ends.left, {"kind": "int8"}),
    (sudden_ends.left_beside_rows, {"kind": "nf4", "stop_at": 3}),
    (sudden_ends.taken, {"kind": "bf16", "what": "resident"}),
    (sudden_ends.taken, {"kind": "int8", "what": "held", "inside": (3,)}),
    (sudden_ends.taken, {"kind": "int8", "what": "all", "inside": (1, 2)}),
    (sudden_ends.unreadable, {"kind": "bf16"}),
    (beside.two_cards, {"kind": "bf16"}),
    (beside.two_cards, {"kind": "int8"}),
    (beside.prompts, {"stop_at": 1}),
    (beside.images, {"stop_at": 1}),
    (beside.decoded, {"tile_px": 32}),
    (kept_prefix.prefix_kept, {"remade": 0, "on_device": 2, "then": 1}),
    (kept_prefix.prefix_kept, {"remade": 0, "on_device": 5, "then": 0, "stops": ((0, 2), (2, 3))}),
    (kept_prefix.prompts_change, {}),
    (predicted.predicted, {"kind": "bf16"}),
    (predicted.predicted, {"kind": "bf16", "cache": predicted.RULE}),
    (predicted.predicted, {"kind": "nf4", "cache": predicted.RULE, "more_blocks": 4, "fail_at": 400}),
    (predicted.predicted, {"kind": "int8", "cache": predicted.MIXED, "more_blocks": 2.5}),
    (scenarios.steps, {"kind": "bf16", "dtype": torch.float16, "resident": (1,), "held": (0,), "residuals": True}),
    (scenarios.steps, {"kind": "nf4", "dtype": torch.float16, "resident": (1,), "prompts": 2}),
    (kept_prefix.prefix_kept, {"remade": 1, "on_device": 1, "then": 0, "dtype": torch.float16}),
    (scenarios.steps, {"kind": "int8", "computing": Computing.FAST, "resident": (1,), "held": (0,), "prompts": 2}),
    (scenarios.steps, {"kind": "int8", "computing": Computing.FAST, "resident": (2,), "then": (("lora", 0.7),)}),
    (
        scenarios.steps,
        {
            "kind": "w4a4",
            "computing": Computing.FAST,
            "resident": (1,),
            "held": (0,),
            "chunk": 5,
            "lora": (("lora", 0.7),),
        },
    ),
    (scenarios.steps, {"kind": "nunchaku", "computing": Computing.FAST, "resident": (1,), "held": (0,)}),
]
# the clocks find races under any schedule: they come by turns
TURNS = list(zip(CASES, cycle(("late", "random", "copies late", "compute late")), strict=False))


@pytest.mark.parametrize("number", range(len(CASES)))
def test_results_are_the_cpus_and_no_access_is_a_race(number: int, check: Callable[..., Any]) -> None:
    (scenario, options), schedule = TURNS[number]
    assert not check(scenario, schedule, seed=number, **options), (scenario.__name__, options, schedule)


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp8"])
def test_layers_on_scaled_blocks_are_the_cpus_and_no_access_is_a_race(
    kind: str, check: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch)
    options = {"kind": kind, "computing": Computing.FAST, "resident": (1,), "held": (0,)}
    assert not check(scenarios.steps, "late", **options, lora=(("lora", 0.7),))


@pytest.mark.parametrize("fail_at", [3, 40, 100, 190])
@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_a_run_that_finds_no_memory_ends_in_the_same_image(kind: str, fail_at: int, check: Callable[..., Any]) -> None:
    assert not check(scenarios.without_memory, "late", kind=kind, fail_at=fail_at)


@pytest.mark.parametrize("changes", [{"pinned": False}, {"pinned_limit_bytes": 300_000}])
def test_memory_that_is_not_page_locked_costs_time_alone(changes: Any, check: Callable[..., Any]) -> None:
    assert not check(scenarios.steps, "random", changes=changes, kind="int8", resident=(0,), held=(1, 2, 3))
