"""Layers on asym_w4a8_int8 as stored, where comfy-kitchen is new enough: no race, equal bits, nothing left."""

from collections.abc import Callable
from typing import Any

import pytest
from kitchen_w4a8 import has_w4a8
from qwenimage_lowvram.engine.compute.linear_choice import Computing

from . import scenarios


@pytest.mark.slow
@pytest.mark.skipif(not has_w4a8(), reason="this comfy-kitchen is older than the format (0.2.27)")
def test_steps_with_a_lora_are_the_cpus_and_no_access_is_a_race(check: Callable[..., Any]) -> None:
    options = {"kind": "w4a8", "computing": Computing.FAST, "resident": (1,), "held": (0,), "lora": (("lora", 0.7),)}
    assert not check(scenarios.steps, "late", **options)
