"""The weight format that is chosen is the most faithful one that costs next to nothing."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qwenimage_lowvram.engine.planning.draft import least_bytes
from qwenimage_lowvram.engine.planning.forecast import Speeds
from qwenimage_lowvram.engine.planning.format_choice import TOLERANCE, choose_format
from qwenimage_lowvram.engine.planning.memory import plan_memory
from qwenimage_lowvram.engine.planning.request import GIB, Limits, SamplingRequest

from .test_plan import REAL

MIB = 1024**2
INT8 = replace(REAL, stored_bytes=227_000_000, staging_bytes=40 * MIB, native=False)
NF4 = replace(REAL, stored_bytes=128_000_000, staging_bytes=24 * MIB, native=False)
FORMATS = {"bf16": REAL, "int8": INT8, "nf4": NF4}
GUIDED = SamplingRequest(1328, 1328, 2, 512)
LIGHTNING = SamplingRequest(1024, 1024, 1, 512, timesteps=8)


@pytest.mark.parametrize(
    ("request_", "limits", "speeds", "name"),
    [
        # 280 TFLOP hide any transfer on a middling card
        (GUIDED, Limits(4 * GIB, 32 * GIB), Speeds(25e12, 12e9, 2e9), "bf16"),
        # a fast card, one branch: 27 GB over the bus take longer than the computing
        (LIGHTNING, Limits(8 * GIB, 40 * GIB), Speeds(100e12, 12e9, 2e9), "int8"),
        # little RAM and a slow disk: the fewer bytes the better
        (LIGHTNING, Limits(4 * GIB, 2 * GIB), Speeds(100e12, 12e9, 0.5e9), "nf4"),
        (LIGHTNING, Limits(48 * GIB, 40 * GIB), Speeds(100e12, 12e9, 2e9), "bf16"),
    ],
)
def test_the_choice_follows_the_machine(request_: SamplingRequest, limits: Limits, speeds: Speeds, name: str) -> None:
    assert choose_format(FORMATS, request_, limits, speeds).name == name


rates = st.sampled_from([0.2e9, 1e9, 3e9, 25e9])


@settings(deadline=None)
@given(
    request=st.sampled_from([GUIDED, LIGHTNING, SamplingRequest(512, 512, 1, 60)]),
    vram=st.floats(0.1, 48),
    ram=st.floats(0.6, 64),
    speeds=st.builds(Speeds, st.sampled_from([1e12, 20e12, 200e12]), rates, rates),
)
def test_nothing_more_faithful_is_fast_enough(
    request: SamplingRequest, vram: float, ram: float, speeds: Speeds
) -> None:
    limits = Limits(int(vram * GIB), int(ram * GIB))
    choice = choose_format(FORMATS, request, limits, speeds)
    fits = [name for name, footprint in FORMATS.items() if least_bytes(footprint, request) <= limits.vram_bytes]
    if not fits:
        assert str(choice) == "bf16 (per step: none fits)"
        return
    assert list(choice.forecasts) == fits
    seconds = {name: plan_memory(FORMATS[name], request, limits, speeds).forecast.seconds for name in fits}
    fast_enough = [name for name in fits if seconds[name] <= TOLERANCE * min(seconds.values())]
    assert choice.name == fast_enough[0]
    assert f"{choice.name} {seconds[choice.name]:.2f} s" in str(choice)
