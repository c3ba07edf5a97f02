"""A plan keeps its limit, uses it well, and a refusal tells the truth."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qwenimage_lowvram.engine.errors import DoesNotFit, InvalidRequest
from qwenimage_lowvram.engine.footprint import TextEncoderFootprint, TransformerFootprint
from qwenimage_lowvram.engine.plan import (
    GIB,
    MLP_CHUNKS,
    MemoryPlan,
    SamplingRequest,
    activation_bytes,
    least_bytes,
    most_bytes,
    plan_memory,
    plan_text_encoder,
    size_text,
    text_encoder_peak_bytes,
)
from qwenimage_lowvram.engine.report import MemoryReport

ALIAS = Path(__file__).parents[2] / "tools" / "alias"
MIB = 1024**2

# Qwen-Image in bf16, and stored in fp8
REAL = TransformerFootprint(
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
)
REAL_FP8 = replace(
    REAL,
    stored_bytes=226_621_440,
    staging_bytes=37_748_736,
    native=False,
    modulation_staging_bytes=56_623_104,
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
def footprints(draw: st.DrawFn) -> TransformerFootprint:
    native = draw(st.booleans())
    slot = draw(st.integers(1, 500)) * MIB
    return TransformerFootprint(
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
    )


requests = st.builds(
    SamplingRequest,
    width=st.integers(1, 160).map(lambda n: 16 * n),
    height=st.integers(1, 160).map(lambda n: 16 * n),
    branches=st.integers(1, 8),
    prompt_tokens=st.integers(1, 2000),
    reference_tokens=st.sampled_from([0, 0, 4096, 12000]),
)
real = st.one_of(st.sampled_from([REAL, REAL_FP8]), footprints())


def try_plan(footprint: TransformerFootprint, request: SamplingRequest, limit: int) -> MemoryPlan | None:
    try:
        return plan_memory(footprint, request, limit)
    except DoesNotFit:
        return None


def limits(footprint: TransformerFootprint, request: SamplingRequest) -> st.SearchStrategy[int]:
    """From a little below the least to a little above the most."""
    least, most = least_bytes(footprint, request), most_bytes(footprint, request)
    return st.one_of(
        st.integers(least // 2, max(least, most) * 5 // 4),
        st.sampled_from([least - 1, least, least + 1, most - 1, most, most + 1]),
        st.integers(least, least + 3 * footprint.slot_bytes),
    )


@settings(deadline=None)
@given(data=st.data(), footprint=real, request=requests)
def test_a_plan_never_exceeds_its_limit(
    data: st.DataObject, footprint: TransformerFootprint, request: SamplingRequest
) -> None:
    limit = data.draw(limits(footprint, request))
    plan = try_plan(footprint, request, limit)
    assert (plan is None) == (limit < least_bytes(footprint, request))
    if plan is None:
        return
    peaks = (plan.sampling_peak_bytes, plan.modulation_peak_bytes, plan.late_timestep_peak_bytes)
    assert plan.peak_bytes == max(peaks) <= limit == plan.limit_bytes
    assert plan.sampling_peak_bytes >= plan.resident_bytes + plan.slots * footprint.slot_bytes + plan.activation_bytes


@settings(deadline=None)
@given(data=st.data(), footprint=real, request=requests)
def test_every_block_lives_in_one_place(
    data: st.DataObject, footprint: TransformerFootprint, request: SamplingRequest
) -> None:
    plan = try_plan(footprint, request, data.draw(limits(footprint, request)))
    if plan is None:
        return
    assert plan.blocks == footprint.blocks
    assert list(plan.resident) == sorted(set(plan.resident))
    assert set(plan.resident) <= set(range(footprint.blocks))
    assert plan.streamed + len(plan.resident) == footprint.blocks
    assert plan.streamed_bytes_per_step == plan.streamed * footprint.stored_bytes
    assert plan.slots >= 1 or (footprint.native and plan.streamed == 0)
    assert plan.resident_bytes == footprint.outside_bytes + len(plan.resident) * footprint.resident_block_bytes
    # streamed blocks stand as far apart as they can, so that each is fetched behind computing
    gaps = [b - a for a, b in zip(plan.resident, plan.resident[1:], strict=False)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def _rank(plan: MemoryPlan | None) -> tuple[int, int]:
    """(streams in pairs, resident blocks): what more memory must not make worse."""
    if plan is None:
        return -1, -1
    return (2 if plan.streamed == 0 else plan.slots), len(plan.resident)


@settings(deadline=None)
@given(data=st.data(), footprint=real, request=requests)
def test_more_memory_never_makes_a_plan_worse(
    data: st.DataObject, footprint: TransformerFootprint, request: SamplingRequest
) -> None:
    small, large = sorted(data.draw(st.tuples(limits(footprint, request), limits(footprint, request))))
    assert _rank(try_plan(footprint, request, small)) <= _rank(try_plan(footprint, request, large))


@pytest.mark.parametrize("footprint", [REAL, REAL_FP8], ids=["bf16", "fp8"])
def test_no_step_of_the_limit_makes_a_plan_worse(footprint: TransformerFootprint) -> None:
    request = SamplingRequest(1328, 1328, 2, 512)
    least = least_bytes(footprint, request)
    ranks = [_rank(try_plan(footprint, request, least + step * 4 * MIB)) for step in range(-5, 500)]
    assert ranks == sorted(ranks)
    assert len(set(ranks)) > 4


@settings(deadline=None)
@given(footprint=real, request=requests)
def test_from_the_most_on_everything_is_resident(footprint: TransformerFootprint, request: SamplingRequest) -> None:
    most = most_bytes(footprint, request)
    plan = plan_memory(footprint, request, most)
    assert plan.streamed == 0
    assert plan.mlp_chunk_tokens is None
    assert replace(plan, limit_bytes=0) == replace(plan_memory(footprint, request, 2 * most), limit_bytes=0)


@settings(deadline=None)
@given(footprint=real, request=requests, share=st.floats(0.01, 0.999))
def test_a_refusal_does_not_fit_and_what_it_suggests_does(
    footprint: TransformerFootprint, request: SamplingRequest, share: float
) -> None:
    limit = int(least_bytes(footprint, request) * share)
    with pytest.raises(DoesNotFit) as caught:
        plan_memory(footprint, request, limit)
    message = str(caught.value)
    assert least_bytes(footprint, request) > limit
    assert f"the limit is {size_text(limit)} ({request})" in message
    for branches in re.findall(r"\((\d+) instead of \d+ branches\)", message):
        assert plan_memory(footprint, replace(request, branches=int(branches)), limit)
    for width, height in re.findall(r"(?:Use|or) (\d+)x(\d+) \(", message):
        assert plan_memory(footprint, replace(request, width=int(width), height=int(height)), limit)
    (needed,) = re.findall(r"a VRAM limit of ([\d.]+) GB or more", message)
    assert plan_memory(footprint, request, round(float(needed) * GIB))


def test_a_refusal_names_every_way_out() -> None:
    request = SamplingRequest(2048, 2048, 8, 512)
    with pytest.raises(DoesNotFit) as caught:
        plan_memory(REAL, request, int(1.8 * GIB))
    assert str(caught.value) == (
        "Sampling needs 2.35 GiB at least, the limit is 1.80 GiB (2048x2048, 8 branches).\n"
        "Use a smaller batch or no guidance (3 instead of 8 branches), or 1328x1328 (1.33 GiB), or a VRAM limit of "
        "2.36 GB or more."
    )


def test_a_4_gb_card_streams_through_two_slots_and_a_large_one_keeps_all() -> None:
    request = SamplingRequest(1328, 1328, 2, 512)
    small = plan_memory(REAL, request, int(1.7 * GIB))
    assert (small.slots, len(small.resident)) == (2, 0)
    large = plan_memory(REAL, request, 40 * GIB)
    assert (large.streamed, large.mlp_chunk_tokens) == (0, None)
    middle = plan_memory(REAL, request, 12 * GIB)
    assert 20 < len(middle.resident) < 30
    assert len(plan_memory(REAL_FP8, request, 12 * GIB).resident) > 2 * len(middle.resident) - 3


@settings(deadline=None)
@given(request=requests)
def test_activations_grow_with_the_picture_and_the_branches(request: SamplingRequest) -> None:
    for chunk in MLP_CHUNKS:
        here = activation_bytes(REAL, request, chunk)
        for more in (
            replace(request, width=request.width + 16),
            replace(request, branches=request.branches + 1),
            replace(request, reference_tokens=request.reference_tokens + 1),
            replace(request, prompt_tokens=request.prompt_tokens + 1),
        ):
            larger = activation_bytes(REAL, more, chunk)
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
    code = "import sys, qwenimage_lowvram.engine.plan, qwenimage_lowvram.engine.report; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ALIAS)}, capture_output=True, text=True
    )
    assert done.stdout.strip() == "False", done.stderr


PLAN_TEXT = (
    "MemoryPlan(1328x1328, 2 branches: 1 of 60 blocks resident, 59 streamed through 2 slots, 24.90 GiB per step, "
    "MLP in chunks of 4096 tokens; peak 1.92 GiB of 2.00 GiB: weights 0.50 GiB, activations 0.58 GiB)"
)


def test_a_plan_prints_as_one_short_line() -> None:
    plan = plan_memory(REAL, SamplingRequest(1328, 1328, 2, 512), 2 * GIB)
    assert str(plan) == repr(plan) == PLAN_TEXT


def test_a_report_prints_what_was_measured_beside_what_was_planned() -> None:
    plan = plan_memory(REAL, SamplingRequest(1328, 1328, 2, 512), 2 * GIB)
    report = MemoryReport(
        plan=plan,
        device="cuda:0",
        weight_format="bf16",
        steps=20,
        passes=20,
        seconds=50.0,
        fetched_blocks=1200,
        fetched_bytes=1200 * REAL.stored_bytes,
        modulation_bytes=60 * REAL.modulation_slot_bytes,
        waited_seconds=1.25,
        peak_vram_bytes=1_700 * MIB,
        peak_ram_bytes=3 * GIB,
    )
    assert (
        str(report)
        == repr(report)
        == (
            "MemoryReport: 20 steps in 50.0 s (2.50 s/step), 20 passes on cuda:0, weights bf16\n"
            "  device memory: 1.92 GiB planned of 2.00 GiB, 1.66 GiB measured\n"
            "  process memory: 3.00 GiB at its peak\n"
            "  blocks: 1 of 60 resident, 1200 fetched (506.37 GiB), modulation 12.66 GiB, 1.2 s waited"
        )
    )
    assert "the device is the host" in str(replace(report, peak_vram_bytes=None))
    assert str(replace(report, one_by_one="EasyCache")).endswith("each block was visited for each: EasyCache")
    assert report.as_dict()["plan_text"] == PLAN_TEXT
    assert report.as_dict()["plan"]["request"]["width"] == 1328


@pytest.mark.parametrize(
    ("nbytes", "text"), [(0, "0.0 MiB"), (81_100_000, "77.3 MiB"), (GIB // 2, "0.50 GiB"), (3 * GIB, "3.00 GiB")]
)
def test_bytes_read_as_a_person_says_them(nbytes: int, text: str) -> None:
    assert size_text(nbytes) == text
