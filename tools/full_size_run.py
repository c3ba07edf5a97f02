"""A guided step of a full-size transformer on fake tensors, held against its plan."""

import full_size
import torch
from live_bytes import LiveBytes
from qwenimage_lowvram.engine.compute.linear_choice import DECODED, LinearChoice
from qwenimage_lowvram.engine.files.checkpoint import Checkpoint
from qwenimage_lowvram.engine.models.qwen_image.branch import Branch
from qwenimage_lowvram.engine.models.qwen_image.transformer import QwenImageTransformer
from qwenimage_lowvram.engine.planning.footprint import TransformerFootprint
from qwenimage_lowvram.engine.planning.memory import plan_memory
from qwenimage_lowvram.engine.planning.request import GIB, Limits, SamplingRequest
from torch._subclasses.fake_tensor import FakeTensorMode


def require_planned_peaks(
    checkpoint: Checkpoint, limit_gib: float, linear: LinearChoice = DECODED
) -> TransformerFootprint:
    """Raises AssertionError where a 512x512 step takes a tenth more or less than planned, or more than the limit."""
    with FakeTensorMode(), LiveBytes("cuda") as live, torch.inference_mode():
        transformer = QwenImageTransformer(
            checkpoint,
            dtype=torch.bfloat16,
            hardware=full_size.fake_gpu(),
            source=full_size.EmptySource,
            linear=linear,
        )
        plan = plan_memory(transformer.footprint, SamplingRequest(512, 512, 2, 60), Limits(int(limit_gib * GIB)))
        transformer.load(plan.resident)
        live.reset_peak()
        transformer.modulation.announce([0.9])
        assert abs(live.peak / plan.modulation_peak_bytes - 1) < 0.1
        live.reset_peak()
        with transformer.session(slots=plan.slots, ring=plan.ring, mlp_chunk_tokens=plan.mlp_chunk_tokens) as session:
            tokens = torch.empty(1, 32 * 32, 64, device="cuda", dtype=torch.bfloat16)
            prompt = torch.empty(1, 60, 3584, device="cuda", dtype=torch.bfloat16)
            session.forward([Branch(tokens, ((1, 32, 32),), prompt, None, 0.9) for _ in range(2)])
        assert abs(live.peak / plan.sampling_peak_bytes - 1) < 0.1
        assert live.peak <= plan.limit_bytes
        return transformer.footprint
