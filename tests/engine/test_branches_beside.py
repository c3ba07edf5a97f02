"""Branches of a pass on two devices: within each one's limit at full size."""

from dataclasses import replace

import full_size
import pytest
import torch
from live_bytes import LiveBytes
from qwenimage_lowvram.engine.models.qwen_image.transformer import QwenImageTransformer
from qwenimage_lowvram.engine.planning.branch_split import Card, plan_branches
from qwenimage_lowvram.engine.planning.forecast import TYPICAL
from qwenimage_lowvram.engine.planning.request import GIB, Limits, SamplingRequest
from torch._subclasses.fake_tensor import FakeTensorMode

from .test_full_size import make_branch

LAYERS = 5


@pytest.mark.slow
def test_what_each_device_holds_is_what_was_planned() -> None:
    """Fake tensors refuse operations on tensors of two devices; and tell what each holds."""
    first, second = (replace(full_size.fake_gpu(), device=torch.device(f"cuda:{i}")) for i in range(2))
    with FakeTensorMode(), LiveBytes("cuda:0") as here, LiveBytes("cuda:1") as there, torch.inference_mode():
        transformer = QwenImageTransformer(
            full_size.transformer_checkpoint(layers=LAYERS),
            dtype=torch.bfloat16,
            hardware=first,
            others=[second],
            source=full_size.EmptySource,
        )
        request = SamplingRequest(1024, 1024, 3, 512)
        card = Card("cuda:1", int(2.2 * GIB), TYPICAL)
        plan = plan_branches(transformer.footprint, request, Limits(int(2.6 * GIB)), TYPICAL, [card])
        assert plan is not None
        (other,) = plan.beside
        assert (plan.request.branches, other.plan.request.branches) == (2, 1)
        assert 0 < len(other.plan.resident) < len(plan.resident) < LAYERS
        transformer.load(plan.resident, plan.held, beside=plan.beside)
        transformer.modulation.announce([0.9])
        with transformer.session(
            slots=plan.slots,
            ring=plan.ring,
            mlp_chunk_tokens=plan.mlp_chunk_tokens,
            branches=plan.request.branches,
            beside=plan.beside,
        ) as session:
            velocities = session.forward([make_branch(request) for _ in range(3)])
        assert all(velocity.device == first.device for velocity in velocities)
        assert 0.9 * plan.peak_bytes < here.peak <= plan.peak_bytes
        assert 0.9 * other.plan.peak_bytes < there.peak <= other.plan.peak_bytes
        transformer.unload()
        del velocities
        assert here.now == there.now == 0
