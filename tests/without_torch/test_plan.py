"""A plan keeps its limit, uses it well, and a refusal tells the truth."""

import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qwenimage_lowvram.engine.compute.attention_kernels import SCORES
from qwenimage_lowvram.engine.compute.chunk_sizes import MLP_CHUNKS, SCORES_AT_A_TIME_BYTES
from qwenimage_lowvram.engine.compute.linear_layers import LayerScratch, LinearLayers
from qwenimage_lowvram.engine.compute.link import Link
from qwenimage_lowvram.engine.compute.step_schedules import STEP_SCHEDULES
from qwenimage_lowvram.engine.errors import DoesNotFit, InvalidRequest
from qwenimage_lowvram.engine.models.qwen_image.costs import QwenImageFootprint
from qwenimage_lowvram.engine.numerics import NUMERICS_VERSION
from qwenimage_lowvram.engine.planning.draft import least_bytes, least_ram_bytes, most_bytes, most_ram_bytes
from qwenimage_lowvram.engine.planning.footprint import TextEncoderFootprint
from qwenimage_lowvram.engine.planning.forecast import TYPICAL, Bound, Speeds
from qwenimage_lowvram.engine.planning.memory import RINGS, SLOTS_GAIN, plan_memory
from qwenimage_lowvram.engine.planning.memory_plan import MemoryPlan
from qwenimage_lowvram.engine.planning.request import GIB, Controls, Limits, SamplingRequest
from qwenimage_lowvram.engine.planning.spread import spread_order
from qwenimage_lowvram.engine.planning.text_encoder import plan_text_encoder, text_encoder_peak_bytes
from qwenimage_lowvram.engine.reports.image_report import ImageReport
from qwenimage_lowvram.engine.reports.memory_report import MemoryReport
from qwenimage_lowvram.engine.texts import size_text

ALIAS = Path(__file__).parents[2] / "tools" / "alias"
MIB = 1024**2

# Qwen-Image in bf16, and stored in fp8
REAL = QwenImageFootprint(
    blocks=60,
    slot_bytes=453_093_376,
    stored_bytes=453_093_376,
    staging_bytes=0,
    native=True,
    outside_bytes=81_100_000,
    modulation_slot_bytes=226_566_144,
    modulation_staging_bytes=0,
    inner_dim=3072,
    head_dim=128,
    joint_attention_dim=3584,
    element_bytes=2,
    ring_bytes=256 * MIB,
)
REAL_FP8 = replace(
    REAL,
    stored_bytes=226_621_440,
    staging_bytes=37_748_736,
    native=False,
    modulation_staging_bytes=56_623_104,
)
# decode_bytes and decode_launches as tests/engine/test_decode_costs.py has them counted
REAL_INT8 = replace(
    REAL,
    stored_bytes=226_825_216,
    staging_bytes=37_798_000,
    native=False,
    decode_bytes=1_586_000_000,
    decode_launches=52,
)
TEXT = TextEncoderFootprint(
    layers=28,
    slot_bytes=466_123_776,
    staging_bytes=0,
    hidden_size=3584,
    intermediate_size=18944,
    chunk_tokens=512,
    head_dim=128,
    element_bytes=2,
)


@st.composite
def footprints(draw: st.DrawFn) -> QwenImageFootprint:
    native = draw(st.booleans())
    slot = draw(st.integers(1, 500)) * MIB
    return QwenImageFootprint(
        blocks=draw(st.integers(1, 60)),
        slot_bytes=slot,
        stored_bytes=slot if native else draw(st.integers(slot // 8, slot * 2)),
        staging_bytes=0 if native else draw(st.integers(1, 60)) * MIB,
        native=native,
        outside_bytes=draw(st.integers(1, 100)) * MIB,
        modulation_slot_bytes=draw(st.integers(1, 250)) * MIB,
        modulation_staging_bytes=0 if native else draw(st.integers(1, 60)) * MIB,
        inner_dim=draw(st.sampled_from([64, 1024, 3072])),
        head_dim=draw(st.sampled_from([32, 128])),
        joint_attention_dim=draw(st.sampled_from([64, 3584])),
        element_bytes=draw(st.sampled_from([2, 4])),
        ring_bytes=draw(st.integers(0, 256)) * MIB,
        host=draw(st.booleans()),
    )


requests = st.builds(
    SamplingRequest,
    width=st.integers(1, 160).map(lambda n: 16 * n),
    height=st.integers(1, 160).map(lambda n: 16 * n),
    branches=st.integers(1, 8),
    prompt_tokens=st.integers(1, 2000),
    reference_tokens=st.sampled_from([0, 0, 4096, 12000]),
    timesteps=st.integers(1, 100),
    controls=st.one_of(
        st.just(Controls()),
        st.builds(Controls, *(st.integers(0, most).map(lambda n: n * MIB) for most in (5000, 900, 900))),
    ),
)
rates = st.sampled_from([1e8, 1e9, 2e9, 6e9, 25e9])
speeds = st.builds(Speeds, st.sampled_from([1e11, 2e12, 20e12, 200e12]), rates, rates)
real = st.one_of(st.sampled_from([REAL, REAL_FP8]), footprints())


def try_plan(
    footprint: QwenImageFootprint, request: SamplingRequest, limits: Limits, speeds: Speeds = TYPICAL
) -> MemoryPlan | None:
    try:
        return plan_memory(footprint, request, limits, speeds)
    except DoesNotFit:
        return None


def around(least: int, most: int, step: int) -> st.SearchStrategy[int]:
    """From a little below the least to a little above the most."""
    return st.one_of(
        st.integers(least // 2, max(least, most) * 5 // 4),
        st.sampled_from([least - 1, least, least + 1, most - 1, most, most + 1]),
        st.integers(least, least + 3 * step),
    )


def vram(footprint: QwenImageFootprint, request: SamplingRequest) -> st.SearchStrategy[int]:
    return around(least_bytes(footprint, request), most_bytes(footprint, request), footprint.slot_bytes)


def ram(footprint: QwenImageFootprint, request: SamplingRequest) -> st.SearchStrategy[int | None]:
    least, most = least_ram_bytes(footprint, request), most_ram_bytes(footprint, request)
    return st.one_of(st.none(), around(least, most, footprint.stored_bytes))


def limits(footprint: QwenImageFootprint, request: SamplingRequest) -> st.SearchStrategy[Limits]:
    return st.builds(Limits, vram(footprint, request), ram(footprint, request))


def fits(footprint: QwenImageFootprint, request: SamplingRequest, limits: Limits) -> bool:
    enough_ram = limits.ram_bytes is None or limits.ram_bytes >= least_ram_bytes(footprint, request)
    return enough_ram and limits.vram_bytes >= least_bytes(footprint, request)


@settings(deadline=None)
@given(data=st.data(), footprint=real, request=requests, speeds=speeds)
def test_a_plan_never_exceeds_its_limits(
    data: st.DataObject, footprint: QwenImageFootprint, request: SamplingRequest, speeds: Speeds
) -> None:
    allowed = data.draw(limits(footprint, request))
    plan = try_plan(footprint, request, allowed, speeds)
    assert (plan is not None) == fits(footprint, request, allowed)
    if plan is None:
        return
    peaks = (plan.sampling_peak_bytes, plan.modulation_peak_bytes, plan.late_timestep_peak_bytes)
    assert plan.peak_bytes == max(peaks) <= allowed.vram_bytes == plan.limit_bytes
    assert plan.sampling_peak_bytes >= plan.resident_bytes + plan.slots * footprint.slot_bytes + plan.activation_bytes
    assert allowed.ram_bytes is None or plan.ram_peak_bytes <= allowed.ram_bytes
    assert plan.ram_peak_bytes >= len(plan.held) * footprint.stored_bytes + request.timesteps * footprint.row_bytes
    assert plan.ram_peak_bytes >= (plan.peak_bytes if footprint.host else footprint.ring_bytes)


@settings(deadline=None)
@given(data=st.data(), footprint=real, request=requests)
def test_every_block_lives_in_one_place(
    data: st.DataObject, footprint: QwenImageFootprint, request: SamplingRequest
) -> None:
    plan = try_plan(footprint, request, data.draw(limits(footprint, request)))
    if plan is None:
        return
    assert plan.blocks == footprint.blocks
    assert list(plan.resident) == sorted(set(plan.resident))
    assert list(plan.held) == sorted(set(plan.held))
    assert set(plan.resident) | set(plan.held) <= set(range(footprint.blocks))
    assert not set(plan.resident) & set(plan.held)
    assert len(plan.resident) + len(plan.held) + plan.from_file == footprint.blocks
    assert plan.streamed_bytes_per_step == plan.streamed * footprint.stored_bytes
    assert not (footprint.host and plan.held)
    assert plan.slots >= 1 or (footprint.native and plan.streamed == 0)
    assert plan.resident_bytes == footprint.outside_bytes + len(plan.resident) * footprint.resident_block_bytes
    # every beginning of the order is spread evenly, so that each fetch has computing to hide behind
    order = spread_order(plan.blocks)
    assert sorted(order) == list(range(plan.blocks))
    assert set(plan.resident) == set(order[: len(plan.resident)])
    assert set(plan.resident) | set(plan.held) == set(order[: len(plan.resident) + len(plan.held)])


@pytest.mark.parametrize("blocks", [1, 2, 7, 28, 60])
def test_blocks_that_stay_are_spread_and_one_more_moves_no_other(blocks: int) -> None:
    order = spread_order(blocks)
    assert len(set(order)) == blocks
    for count in range(2, blocks):
        stay = sorted(order[:count])
        gaps = [b - a for a, b in pairwise([*stay, stay[0] + blocks])]
        assert max(gaps) <= 3 * blocks / count + 1


def _seconds(plan: MemoryPlan | None) -> float:
    return math.inf if plan is None else plan.forecast.seconds


@pytest.mark.slow
@settings(deadline=None)
@given(data=st.data(), footprint=real, request=requests, speeds=speeds)
def test_more_memory_never_makes_a_step_slower_than_two_slots_may_be(
    data: st.DataObject, footprint: QwenImageFootprint, request: SamplingRequest, speeds: Speeds
) -> None:
    one, other = data.draw(st.tuples(limits(footprint, request), limits(footprint, request)))
    ram_bytes = None if one.ram_bytes is None or other.ram_bytes is None else max(one.ram_bytes, other.ram_bytes)
    more = Limits(max(one.vram_bytes, other.vram_bytes), ram_bytes)
    seconds = _seconds(try_plan(footprint, request, more, speeds))
    for fewer in (one, other):
        assert seconds <= SLOTS_GAIN * _seconds(try_plan(footprint, request, fewer, speeds))


@settings(deadline=None)
@given(data=st.data(), footprint=real, request=requests, speeds=speeds)
def test_what_is_left_of_a_limit_is_less_than_a_block(
    data: st.DataObject, footprint: QwenImageFootprint, request: SamplingRequest, speeds: Speeds
) -> None:
    allowed = data.draw(limits(footprint, request))
    plan = try_plan(footprint, request, allowed, speeds)
    if plan is None or footprint.host:
        return
    if allowed.ram_bytes is not None and plan.from_file:
        assert allowed.ram_bytes - plan.ram_peak_bytes < footprint.stored_bytes
    if plan.streamed > 1:
        assert allowed.vram_bytes - plan.peak_bytes < footprint.resident_block_bytes


@pytest.mark.parametrize("footprint", [REAL, REAL_FP8], ids=["bf16", "fp8"])
def test_no_step_of_the_limit_makes_a_plan_worse(footprint: QwenImageFootprint) -> None:
    request = SamplingRequest(1328, 1328, 2, 512)
    least = least_bytes(footprint, request)
    slow_disk = Speeds(flops=1e15, bus_bytes=20e9, disk_bytes=1e9)
    plans = [try_plan(footprint, request, Limits(least + n * 4 * MIB, 8 * GIB), slow_disk) for n in range(-5, 500)]
    seconds = [_seconds(plan) for plan in plans]
    assert all(now <= SLOTS_GAIN * min(seconds[: i + 1]) for i, now in enumerate(seconds))
    assert len(set(seconds)) > 4


@settings(deadline=None)
@given(footprint=real, request=requests)
def test_from_the_most_on_everything_is_resident(footprint: QwenImageFootprint, request: SamplingRequest) -> None:
    most = Limits(most_bytes(footprint, request))
    plan = plan_memory(footprint, request, most)
    assert plan.streamed == 0
    assert plan.mlp_chunk_tokens is None
    more = plan_memory(footprint, request, Limits(2 * most.vram_bytes))
    assert replace(plan, limits=more.limits) == more


@settings(deadline=None)
@given(data=st.data(), footprint=real, request=requests)
def test_a_refusal_does_not_fit_and_what_it_suggests_does(
    data: st.DataObject, footprint: QwenImageFootprint, request: SamplingRequest
) -> None:
    vram_share, ram_share = data.draw(st.tuples(st.floats(0.01, 1.2), st.one_of(st.none(), st.floats(0.01, 1.2))))
    allowed = Limits(
        int(least_bytes(footprint, request) * vram_share),
        None if ram_share is None else int(least_ram_bytes(footprint, request) * ram_share),
    )
    if fits(footprint, request, allowed):
        return
    with pytest.raises(DoesNotFit) as caught:
        plan_memory(footprint, request, allowed)
    message = str(caught.value)
    assert f"({request})" in message
    for branches in re.findall(r"\((\d+) instead of \d+ branches\)", message):
        assert plan_memory(footprint, request.with_branches(int(branches)), allowed)
    for width, height in re.findall(r"(?:Use|or) (\d+)x(\d+) \(", message):
        assert plan_memory(footprint, request.with_size(int(width), int(height)), allowed)
    raised = allowed
    for needed in re.findall(r"a VRAM limit of ([\d.]+) GB or more", message):
        assert least_bytes(footprint, request) > allowed.vram_bytes
        raised = replace(raised, vram_bytes=round(float(needed) * GIB))
    for needed in re.findall(r"a RAM limit of ([\d.]+) GB or more", message):
        assert allowed.ram_bytes is not None
        assert least_ram_bytes(footprint, request) > allowed.ram_bytes
        raised = replace(raised, ram_bytes=round(float(needed) * GIB))
    assert raised != allowed
    assert plan_memory(footprint, request, raised)


def test_controls_are_counted_and_named() -> None:
    request = SamplingRequest(1328, 1328, 2, 512)
    controlled = replace(request, controls=Controls(3 * GIB, GIB // 4, GIB))
    assert least_bytes(REAL, controlled) - least_bytes(REAL, request) == pytest.approx(3.5 * GIB, abs=0.25 * GIB)
    plan, alone = (plan_memory(REAL, asked, Limits(12 * GIB)) for asked in (controlled, request))
    assert 7 <= len(alone.resident) - len(plan.resident) <= 9  # blocks of 0.42 GiB
    assert "ControlNets and model patches 3.25 GiB (weights 3.00 GiB)" in str(plan)
    assert "ControlNet" not in str(alone)
    with pytest.raises(DoesNotFit) as caught:
        plan_memory(REAL, controlled, Limits(2 * GIB))
    assert ", ControlNets and model patches 3.25 GiB (weights 3.00 GiB) of it, but the limit" in str(caught.value)
    assert "Use no ControlNet and no model patch, or" in str(caught.value)


def test_a_refusal_knows_that_smaller_images_take_smaller_controls() -> None:
    """The bytes are InstantX's Union at 1328x1328 in bf16, each prompt with its own."""
    held, working, weights = 431_000_000, 547_000_000, int(3.3 * GIB)
    four = replace(SamplingRequest(1328, 1328, 8, 60), controls=Controls(weights, 4 * held, 4 * working, images=4))
    with pytest.raises(DoesNotFit, match=r"a smaller batch or no guidance \(\d instead of 8 branches\)"):
        plan_memory(REAL, four, Limits(least_bytes(REAL, four.with_branches(2))))
    one = replace(SamplingRequest(1328, 1328, 2, 60), controls=Controls(weights, held, working))
    assert least_bytes(REAL, four.with_branches(2)) == least_bytes(REAL, one)
    with pytest.raises(DoesNotFit, match=r"1024x1024 \("):
        plan_memory(REAL, one, Limits(least_bytes(REAL, one.with_size(1024, 1024))))


def test_without_guidance_an_image_may_keep_all_that_controls_it() -> None:
    controls = Controls(GIB, GIB // 4, GIB // 2, fixed_bytes=GIB // 8, images=1)
    assert replace(SamplingRequest(1328, 1328, 2, 60), controls=controls).with_branches(1).controls == controls
    assert controls.scaled(0.5) == Controls(GIB, GIB // 8, GIB // 8 + 3 * GIB // 16, GIB // 8)


def test_a_refusal_for_want_of_ram_says_so() -> None:
    with pytest.raises(DoesNotFit) as caught:
        plan_memory(REAL, SamplingRequest(1328, 1328, 2, 512), Limits(4 * GIB, GIB // 4))
    assert str(caught.value) == (
        "Sampling needs at least 1.03 GiB and 0.52 GiB of RAM, but the limit is 4.00 GiB and 0.25 GiB of RAM "
        "(1328x1328, 2 branches).\nUse a RAM limit of 0.53 GB or more."
    )


def test_what_a_step_waits_for_is_named() -> None:
    request = SamplingRequest(1328, 1328, 2, 512)

    def bound(ram_gib: int, speeds: Speeds) -> Bound:
        return plan_memory(REAL, request, Limits(4 * GIB, ram_gib * GIB), speeds).forecast.bound

    assert bound(40, Speeds(20e12, 12e9, 2e9)) is Bound.COMPUTE
    assert bound(40, Speeds(900e12, 12e9, 2e9)) is Bound.BUS
    assert bound(8, Speeds(900e12, 12e9, 2e9)) is Bound.DISK
    assert bound(8, Speeds(900e12, 12e9, 20e9)) is Bound.BUS


def test_what_processes_of_an_image_exchange_is_waited_for() -> None:
    fast, slow = Speeds(20e12, 12e9, 2e9), Link(125e6, 1e-3)
    request = SamplingRequest(1024, 1024, 2, 512, ranks=4, link=slow)
    # of q, k, v and the result each process sends three quarters of its 1024 + 128 tokens
    assert REAL.exchanged_bytes(request) == 2 * 4 * 1152 * 3072 * 2 * 3 // 4
    plan = plan_memory(REAL, request, Limits(4 * GIB), fast)
    seconds = 60 * (REAL.exchanged_bytes(request) / 125e6 + 8 * 1e-3)
    assert plan.forecast.link_seconds == pytest.approx(seconds)
    assert plan.forecast.bound is Bound.LINK
    assert "one of 4 parts" in str(plan)
    assert f"{plan.forecast.seconds:.1f} s per step, bound by the link" in str(plan)
    near = plan_memory(REAL, replace(request, link=Link(100e9, 1e-5)), Limits(4 * GIB), fast).forecast
    assert plan.forecast.seconds == pytest.approx(near.seconds + seconds, rel=0.1)
    assert plan_memory(REAL, replace(request, ranks=1), Limits(4 * GIB), fast).forecast.link_seconds == 0


def test_a_step_of_the_real_model_counts_the_operations_that_were_counted_for_it() -> None:
    # 130 TFLOP for one forward at 1328x1328 with a short prompt, counted by torch's flop counter
    assert REAL.step_flops(SamplingRequest(1328, 1328, 1, 20)) == pytest.approx(130e12, rel=0.02)


def test_a_refusal_names_every_way_out() -> None:
    request = SamplingRequest(2048, 2048, 8, 512)
    with pytest.raises(DoesNotFit) as caught:
        plan_memory(REAL, request, Limits(int(1.8 * GIB)))
    assert str(caught.value) == (
        "Sampling needs at least 2.35 GiB, but the limit is 1.80 GiB (2048x2048, 8 branches).\n"
        "Use a smaller batch or no guidance (2 instead of 8 branches), or 1328x1328 (1.33 GiB), or a VRAM limit of "
        "2.36 GB or more."
    )


def test_compiled_blocks_are_planned_without_chunks_and_named() -> None:
    request, compiled = SamplingRequest(1328, 1328, 2, 512), replace(REAL, compiled="exact")
    assert plan_memory(REAL, request, Limits(least_bytes(REAL, request))).mlp_chunk_tokens
    least = least_bytes(compiled, request)
    assert least > least_bytes(REAL, request)
    plan = plan_memory(compiled, request, Limits(least))
    assert (plan.mlp_chunk_tokens, plan.compiled) == (None, "exact")


def test_a_4_gb_card_streams_through_two_slots_and_a_large_one_keeps_all() -> None:
    request = SamplingRequest(1328, 1328, 2, 512)
    small = plan_memory(REAL, request, Limits(int(1.7 * GIB)))
    assert (small.slots, len(small.resident)) == (2, 0)
    large = plan_memory(REAL, request, Limits(40 * GIB))
    assert (large.streamed, large.mlp_chunk_tokens) == (0, None)
    middle = plan_memory(REAL, request, Limits(12 * GIB))
    assert 20 < len(middle.resident) < 30
    assert len(plan_memory(REAL_FP8, request, Limits(12 * GIB)).resident) > 2 * len(middle.resident) - 3


@settings(deadline=None)
@given(request=requests)
def test_activations_grow_with_the_image_and_the_branches(request: SamplingRequest) -> None:
    for chunk in MLP_CHUNKS:
        here = REAL.activation_bytes(request, chunk)
        for more in (
            replace(request, width=request.width + 16),
            replace(request, branches=request.branches + 1),
            replace(request, reference_tokens=request.reference_tokens + 1),
            replace(request, prompt_tokens=request.prompt_tokens + 1),
        ):
            larger = REAL.activation_bytes(more, chunk)
            # where the first chunk is cut, the whole output is allocated beside it: the estimate may fall by that
            assert larger > here or chunk is not None


@pytest.mark.parametrize(
    ("width", "height", "nearest"),
    [
        (1000, 1024, "992x1024"),
        (1024, 1023, "1024x1024"),
        (1330, 1330, "1328x1328"),
        (8, 1024, "16x1024"),
        (0, 0, "16x16"),
        (-64, 64, "16x64"),
    ],
)
def test_a_size_that_cannot_be_made_is_refused_with_the_nearest_one(width: int, height: int, nearest: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"{width}x{height} px cannot be made.*multiples of 16\. Use {nearest}\."):
        SamplingRequest(width, height, 1, 10)


@given(lengths=st.lists(st.integers(1, 4000), min_size=1, max_size=4), share=st.floats(0.3, 1.5))
def test_the_text_encoder_keeps_its_limit_too(lengths: list[int], share: float) -> None:
    limit = int(text_encoder_peak_bytes(TEXT, lengths, 2) * share)
    try:
        slots = plan_text_encoder(TEXT, lengths, limit)
    except DoesNotFit as error:
        assert text_encoder_peak_bytes(TEXT, lengths, 1) > limit
        (needed,) = re.findall(r"a VRAM limit of ([\d.]+) GB or more", str(error))
        assert plan_text_encoder(TEXT, lengths, round(float(needed) * GIB)) >= 1
    else:
        assert text_encoder_peak_bytes(TEXT, lengths, slots) <= limit
        assert slots == 2 or text_encoder_peak_bytes(TEXT, lengths, 2) > limit


def test_planning_imports_no_torch() -> None:
    names = (
        "planning.memory",
        "reports.memory_report",
        "planning.stages",
        "planning.format_choice",
        "planning.block_split",
    )
    code = "".join(f"import qwenimage_lowvram.engine.{name}\n" for name in names)
    code += "import sys; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ALIAS)}, capture_output=True, text=True
    )
    assert done.stdout.strip() == "False", done.stderr


PLAN_TEXT = (
    "Memory plan for 1328x1328, 2 branches: 1 of 60 blocks resident, 27 in RAM, 32 read from the file, through 2 slots "
    "and a ring of 4 pieces, 24.90 GiB per step, MLP in chunks of 4096 tokens; peak 1.93 GiB of 2.00 GiB: weights "
    "0.50 GiB, activations 0.58 GiB; RAM 11.92 GiB of 12.00 GiB; 11.3 s per step, bound by compute, 50 steps in 567 s, "
    "with another seed in 565 s"
)


@pytest.mark.parametrize(
    ("footprint", "asked", "speeds", "ring"),
    [
        # half of bf16 waits in RAM, and each block from the disk comes between such ones
        (REAL, (1328, 2, 10), Speeds(60e12, 24e9, 3.5e9), 12),
        # a disk that gives more than the smallest ring has room for
        (REAL_FP8, (1024, 1, 2), Speeds(60e12, 24e9, 7e9), 12),
    ],
    ids=["bf16 from RAM and disk", "fp8 from a fast disk"],
)
def test_a_larger_ring_comes_where_the_forecast_gains(
    footprint: QwenImageFootprint,
    asked: tuple[int, int, int],
    speeds: Speeds,
    ring: int,
) -> None:
    """On a card of 4 GB, of whose memory half a GB is taken. `asked`: px, branches, GB of RAM."""
    side, branches, ram = asked
    request, allowed = SamplingRequest(side, side, branches, 512, timesteps=20), Limits(7 * GIB // 2, ram * GIB)
    plan = plan_memory(footprint, request, allowed, speeds)
    assert (plan.slots, plan.ring) == (2, ring)
    assert plan.ring_bytes == footprint.ring_bytes + (ring - 4) * 32 * MIB
    assert plan.ram_peak_bytes == plan.ring_bytes + len(plan.held) * footprint.stored_bytes + 36 * footprint.row_bytes
    assert plan.ram_peak_bytes <= ram * GIB
    assert f"through 2 slots and a ring of {ring} pieces" in str(plan)
    forecast = plan.forecast
    assert forecast.seconds <= 1.02 * max(forecast.compute_seconds, forecast.disk_seconds)
    small = plan_memory(footprint, request, allowed, speeds, slots=(2,), rings=RINGS[:1])
    assert small.forecast.seconds > 1.03 * forecast.seconds


@pytest.mark.parametrize(
    ("footprint", "asked", "speeds", "other", "taken"),
    [
        # a slow bus: blocks that are copied and blocks that stay do not come by turns
        (REAL_INT8, (512, 1, 13, 10), Speeds(15e12, 6e9, 3.5e9), 3, True),
        # a slow disk: one slot less is one block less to read
        (REAL_FP8, (512, 1, 13, 2), Speeds(40e12, 12e9, 0.5e9), 1, True),
        (REAL_FP8, (1024, 1, 7, 2), Speeds(8.8e12, 12e9, 0.5e9), 1, False),
        (REAL, (1328, 2, 7, 10), Speeds(60e12, 24e9, 3.5e9), 3, False),
    ],
)
def test_another_number_of_slots_than_two_comes_for_more_than_forecasts_may_be_wrong(
    footprint: QwenImageFootprint,
    asked: tuple[int, int, int, int],
    speeds: Speeds,
    other: int,
    taken: bool,
) -> None:
    """`asked`: px, branches, half GB of VRAM, GB of RAM."""
    side, branches, halves, ram = asked
    request, allowed = SamplingRequest(side, side, branches, 512, timesteps=20), Limits(halves * GIB // 2, ram * GIB)
    plan = plan_memory(footprint, request, allowed, speeds)
    two, others = (
        plan_memory(footprint, request, allowed, speeds, slots=(slots,)).forecast.seconds for slots in (2, other)
    )
    gain = two / others
    assert plan.slots == (other if taken else 2)
    assert plan.forecast.seconds == (others if taken else two)
    assert gain > SLOTS_GAIN if taken else 1 < gain < SLOTS_GAIN


def test_a_plan_prints_as_one_short_line() -> None:
    plan = plan_memory(REAL, SamplingRequest(1328, 1328, 2, 512), Limits(2 * GIB, 12 * GIB))
    assert str(plan) == repr(plan) == PLAN_TEXT


def test_a_report_prints_what_was_measured_beside_what_was_planned() -> None:
    plan = plan_memory(REAL, SamplingRequest(1328, 1328, 2, 512), Limits(2 * GIB, 12 * GIB))
    report = MemoryReport(
        plan=plan,
        device="cuda:0",
        weight_format="bf16",
        steps=20,
        passes=20,
        seconds=60.0,
        pass_seconds=50.0,
        fetched_blocks=1200,
        fetched_bytes=1200 * REAL.stored_bytes,
        modulation_bytes=60 * REAL.modulation_slot_bytes,
        copied_bytes=1180 * REAL.stored_bytes,
        pinned_bytes=27 * REAL.stored_bytes,
        waited_disk_seconds=1.25,
        waited_bus_seconds=0.75,
        peak_vram_bytes=1_700 * MIB,
        peak_ram_bytes=3 * GIB,
        first_step_seconds=4.5,
    )
    assert (
        str(report)
        == repr(report)
        == (
            "MemoryReport: 20 steps in 60.0 s, the first after 4.5 s, 20 passes of 2.50 s on cuda:0 (forecast "
            "11.29 s), weights bf16\n"
            "  forecast of the run: 567.2 s where its weights are read for the first time, 564.6 s with another seed\n"
            "  device memory: 1.93 GiB planned of 2.00 GiB, 1.66 GiB measured\n"
            "  process memory: 3.00 GiB at its peak, 11.92 GiB of it planned\n"
            "  blocks: 1 of 60 resident, 27 in RAM (page-locked), 497.93 GiB copied to the device, 1200 read from the "
            "file (506.37 GiB), modulation 12.66 GiB, 1.2 s waited for the disk, 0.8 s for the bus"
        )
    )
    assert "memory ran out 2 times" in str(replace(report, out_of_memory=2))
    assert "the device uses RAM" in str(replace(report, peak_vram_bytes=None))
    assert str(replace(report, one_by_one="EasyCache")).endswith("so blocks were brought once per prompt: EasyCache")
    compiled = replace(report, compiled="exact", compiled_times=2, compiling_seconds=31.2)
    assert str(compiled).endswith("\n  compiled: 2 times, 31 s")
    error = str(replace(compiled, compiled_error=0.003))
    assert error.endswith("compiled: 2 times, 31 s; not exact: errors of a block up to 0.003")
    assert ", blocks compiled (not exact); peak" in str(replace(report.plan, compiled="not exact"))
    assert str(replace(report, not_compiled="no compiler")).endswith("\n  blocks not compiled: no compiler")
    assert report.as_dict()["plan_text"] == PLAN_TEXT
    assert report.as_dict()["plan"]["request"]["width"] == 1328
    assert report.as_dict()["numerics_version"] == ImageReport(()).as_dict()["numerics_version"] == NUMERICS_VERSION


@pytest.mark.parametrize(
    ("nbytes", "text"), [(0, "0.0 MiB"), (81_100_000, "77.3 MiB"), (GIB // 2, "0.50 GiB"), (3 * GIB, "3.00 GiB")]
)
def test_bytes_read_as_a_person_says_them(nbytes: int, text: str) -> None:
    assert size_text(nbytes) == text


def test_what_the_last_layer_of_attention_takes_is_beside_all_that_attention_holds() -> None:
    """Counted at 1328x1328 with codes of four bits: 0.836 GB, 0.762 of which were planned before."""
    request, of_attention, of_mlp = SamplingRequest(1328, 1328, 2, 512), 100_000_000, 150_000_000
    layers = [LayerScratch(0, of_attention, None, widest=3072), LayerScratch(0, of_mlp, None, widest=12288)]
    as_stored = replace(REAL, linear=LinearLayers.of(["w4a4"], layers))
    assert as_stored.activation_bytes(request, 1024) - REAL.activation_bytes(request, 1024) == of_attention


def test_attention_that_makes_scores_is_planned_and_named() -> None:
    request, limits = SamplingRequest(1328, 1328, 2, 512), Limits(7 * GIB)
    fused = plan_memory(REAL, request, limits)
    made = plan_memory(replace(REAL, attention=SCORES), request, limits)
    assert (fused.attention, made.attention) == ("pytorch", "pytorch in chunks of 1481 queries of 1 head")
    assert "attention" not in repr(fused)
    assert ", attention pytorch in chunks of 1481 queries of 1 head;" in repr(made)
    for chunk in MLP_CHUNKS:
        more = replace(REAL, attention=SCORES).activation_bytes(request, chunk) - REAL.activation_bytes(request, chunk)
        assert 0 <= more <= SCORES_AT_A_TIME_BYTES
    assert least_bytes(replace(REAL, attention=SCORES), request) > least_bytes(REAL, request)


@pytest.mark.parametrize(("name", "count"), [("planned_28", 28), ("planned_20", 20), ("planned_12", 12)])
def test_a_table_of_steps_has_so_many_and_begins_with_what_is_predicted_from(name: str, count: int) -> None:
    computed = STEP_SCHEDULES[name].computed
    assert len(computed) == count
    assert computed[:3] == (0, 1, 2)
    assert all(0 < later - earlier <= 8 for earlier, later in pairwise([*computed, 40]))


def test_a_run_whose_steps_are_not_all_computed_is_planned_forecast_and_named_as_that() -> None:
    every = SamplingRequest(1024, 1024, 2, 512, timesteps=40)
    request, limits = replace(every, step_cache=STEP_SCHEDULES["planned_20"]), Limits(4 * GIB, 32 * GIB)
    plan, exact = plan_memory(REAL, request, limits), plan_memory(REAL, every, limits)
    kept = 2 * request.branches * 64 * 64 * REAL.inner_dim * REAL.element_bytes
    assert plan.activation_bytes - exact.activation_bytes == kept
    assert least_bytes(REAL, request) - least_bytes(REAL, every) == kept
    assert plan.run.again_seconds == 20 * plan.forecast.seconds
    assert plan.run.first_seconds < 0.6 * exact.run.first_seconds
    assert "40 steps, 20 of them computed, in" in str(plan)
    assert "not exact: 20 of 40 steps computed, the others predicted (planned_20)" in str(plan)
    assert "not exact" not in str(exact)


def test_a_table_says_which_runs_it_was_measured_on() -> None:
    table = STEP_SCHEDULES["planned_12"]
    measured = SamplingRequest(1024, 1024, 1, 60, timesteps=40)
    assert table.not_measured("Qwen-Image-2.1", measured) == ""
    others = [replace(measured, width=2048), replace(measured, branches=2), replace(measured, reference_tokens=4096)]
    told = [table.not_measured("Qwen-Image-2.1", other) for other in others] + [table.not_measured("Other", measured)]
    assert all("planned_12 was measured only on Qwen-Image-2.1, 1024x1024, without guidance" in text for text in told)
    assert "this run is Other, 1024x1024, 1 branch" in told[-1]


def test_a_table_is_refused_for_another_number_of_steps() -> None:
    with pytest.raises(InvalidRequest, match=r"(?s)a table for runs of 40 steps; this run has 8\..*set steps to 40"):
        SamplingRequest(1024, 1024, 1, 60, timesteps=8, step_cache=STEP_SCHEDULES["planned_28"])
