"""Blocks on several devices: within each one's limit, and the same numbers."""

from dataclasses import replace
from pathlib import Path

import full_size
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from live_bytes import LiveBytes
from qwenimage_lowvram.engine.caches.requantized_weights import RequantizedWeights
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.models.qwen_image.transformer import QwenImageTransformer, TimestepRounding
from qwenimage_lowvram.engine.planning.block_split import secondary_bytes, share_out_blocks
from qwenimage_lowvram.engine.planning.draft import least_bytes, most_bytes
from qwenimage_lowvram.engine.planning.memory import plan_memory
from qwenimage_lowvram.engine.planning.memory_plan import SecondaryDevice
from qwenimage_lowvram.engine.planning.request import GIB, Limits, SamplingRequest
from torch._subclasses.fake_tensor import FakeTensorMode

from ..without_torch.test_plan import REAL, REAL_FP8
from .test_full_size import make_branch as full_size_branch
from .test_transformer import LAYERS, Tiny, diffusers_forward, make_branch

REQUEST = SamplingRequest(1328, 1328, 2, 512)
CARD = Hardware(torch.device("cpu"), streams=False, pinned=False, prefetch=True, host_device=False)


@settings(deadline=None)
@given(
    footprint=st.sampled_from([REAL, REAL_FP8]),
    first=st.floats(0.5, 40),
    others=st.lists(st.floats(0.1, 30), max_size=3),
)
def test_every_device_keeps_its_limit_and_every_block_has_one_place(
    footprint: object, first: float, others: list[float]
) -> None:
    limits = [(f"cuda:{i + 1}", int(gib * GIB)) for i, gib in enumerate(others)]
    secondaries = share_out_blocks(footprint, REQUEST, int(first * GIB), limits)
    end = footprint.blocks
    for secondary in secondaries:
        assert secondary.blocks.stop == end
        assert (
            secondary.peak_bytes == secondary_bytes(footprint, REQUEST, len(secondary.blocks)) <= secondary.limit_bytes
        )
        end = secondary.blocks.start
    assert end >= 1
    if first * GIB < least_bytes(footprint, REQUEST):
        return
    plan = plan_memory(footprint, REQUEST, Limits(int(first * GIB)), secondaries=secondaries)
    assert plan.blocks == end
    assert (
        len(plan.resident) + plan.streamed + sum(len(secondary.blocks) for secondary in secondaries) == footprint.blocks
    )
    alone = plan_memory(footprint, REQUEST, Limits(int(first * GIB)))
    assert plan.forecast.seconds <= alone.forecast.seconds
    assert plan.forecast.compute_seconds == alone.forecast.compute_seconds
    if most_bytes(footprint, REQUEST) <= first * GIB:
        assert not secondaries


def test_a_plan_says_where_else_blocks_are() -> None:
    secondaries = share_out_blocks(REAL, REQUEST, 8 * GIB, [("cuda:1", 8 * GIB)])
    plan = plan_memory(REAL, REQUEST, Limits(8 * GIB, 16 * GIB), secondaries=secondaries)
    assert str(plan).endswith("; blocks 43 to 59 on cuda:1")


@pytest.mark.slow
@pytest.mark.parametrize("weight_format", ["as stored", "int8"])
@pytest.mark.parametrize("resident", [(), (0, 1)])
def test_blocks_on_further_devices_make_the_same_numbers(
    resident: tuple[int, ...], weight_format: str, tiny: Tiny, tmp_path: Path
) -> None:
    model, folder = tiny(torch.float32, zero_cond_t=True)
    checkpoint = open_checkpoint(folder)
    if weight_format != "as stored":
        weights = RequantizedWeights.of(checkpoint, weight_format, tmp_path)
        assert weights is not None
        checkpoint = weights.make(torch.device("cpu"))
    branches = [make_branch(13, references=((1, 3, 5),)), make_branch(5, masked=3)]
    results = []
    second = replace(CARD, device=torch.device("cpu:0"))
    for secondaries in ((), (SecondaryDevice("cpu:0", range(3, LAYERS), 0, 0),)):
        transformer = QwenImageTransformer(
            checkpoint,
            dtype=torch.float32,
            hardware=CARD,
            others=[second],
            rounding=TimestepRounding.DIFFUSERS,
        )
        transformer.load(resident, secondaries=secondaries)
        with transformer.session(slots=2, secondaries=secondaries) as session:
            for more in (True, False):
                results.append(session.forward(branches, more=more))
        assert transformer.secondaries["cpu:0"].resident == set(range(3, LAYERS) if secondaries else ())
        transformer.unload()
        assert transformer.secondaries["cpu:0"].resident_bytes == 0
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(result, results[0], strict=True))
    if weight_format == "as stored":
        for one, branch in zip(results[0], branches, strict=True):
            assert torch.equal(one, diffusers_forward(model, branch))


@pytest.mark.slow
def test_activations_are_handed_on_between_devices_at_full_size() -> None:
    """Fake tensors refuse operations on tensors of two devices; and tell what the second one holds."""
    first, second = (replace(full_size.fake_gpu(), device=torch.device(f"cuda:{i}")) for i in range(2))
    with FakeTensorMode(), LiveBytes("cuda:1") as live, torch.inference_mode():
        transformer = QwenImageTransformer(
            full_size.transformer_checkpoint(layers=6),
            dtype=torch.bfloat16,
            hardware=first,
            others=[second],
            source=full_size.EmptySource,
        )
        request = SamplingRequest(1024, 1024, 2, 512)
        secondaries = share_out_blocks(transformer.footprint, request, int(1.6 * GIB), [("cuda:1", int(2.5 * GIB))])
        assert secondaries == (SecondaryDevice("cuda:1", range(2, 6), secondaries[0].peak_bytes, int(2.5 * GIB)),)
        plan = plan_memory(transformer.footprint, request, Limits(int(1.6 * GIB)), secondaries=secondaries)
        transformer.load(plan.resident, secondaries=secondaries)
        transformer.modulation.announce([0.9])
        with transformer.session(slots=plan.slots, ring=plan.ring, secondaries=secondaries) as session:
            branches = [full_size_branch(request) for _ in range(2)]
            velocities = session.forward(branches)
        assert all(velocity.device == first.device for velocity in velocities)
        assert 0.9 * secondaries[0].peak_bytes < live.peak <= secondaries[0].peak_bytes
        transformer.unload()
        assert live.now == 0
