"""At its real size, on fake tensors, Qwen-Image-2.1's transformer takes the memory that the plan says."""

from collections.abc import Iterator

import full_size
import pytest
import torch
from full_size_21 import transformer_21_checkpoint
from live_bytes import LiveBytes
from qwenimage_lowvram.engine.models.qwen_image_21.branch import Branch
from qwenimage_lowvram.engine.models.qwen_image_21.costs import TOKEN_PX
from qwenimage_lowvram.engine.models.qwen_image_21.prefix import Prefix
from qwenimage_lowvram.engine.models.qwen_image_21.transformer import QwenImage21Transformer
from qwenimage_lowvram.engine.planning.memory import least_bytes, plan_memory
from qwenimage_lowvram.engine.planning.request import Limits, SamplingRequest
from torch._subclasses.fake_tensor import FakeTensorMode


@pytest.fixture
def live() -> Iterator[LiveBytes]:
    with FakeTensorMode(), LiveBytes("cuda") as live, torch.inference_mode():
        yield live


def make_transformer(stored: torch.dtype, *, layers: int = 32) -> QwenImage21Transformer:
    return QwenImage21Transformer(
        transformer_21_checkpoint(stored, layers=layers),
        dtype=torch.bfloat16,
        hardware=full_size.fake_gpu(),
        source=full_size.EmptySource,
    )


def make_branches(request: SamplingRequest) -> list[Branch]:
    """Each prompt for as many images as the request has; references of the image's size."""

    def empty(tokens: int, width: int = 64) -> torch.Tensor:
        return torch.empty(1, tokens, width, device="cuda", dtype=torch.bfloat16)

    shape = request.height // TOKEN_PX, request.width // TOKEN_PX
    count = request.reference_tokens // request.frame_tokens
    references = tuple(empty(request.frame_tokens) for _ in range(count))
    prefixes = [
        Prefix(
            empty(request.prompt_tokens, 4096),
            references,
            (shape,) * count,
            tuple(3 * i + 3 for i in range(count)),
            keys=("images", f"text {i}"),
        )
        for i in range(request.distinct_prompts)
    ]
    images = request.branches // request.distinct_prompts
    return [Branch(empty(request.frame_tokens), shape, prefix, 0.9) for prefix in prefixes for _ in range(images)]


REQUESTS = {
    "1024": SamplingRequest(1024, 1024, 1, 300),
    "2048": SamplingRequest(2048, 2048, 1, 300),
    "2752x1536": SamplingRequest(2752, 1536, 1, 300),
    "512": SamplingRequest(512, 512, 1, 60),
    "guidance": SamplingRequest(1024, 1024, 2, 300),
    "edit": SamplingRequest(1024, 1024, 1, 300, reference_tokens=4096),
    "edit with guidance": SamplingRequest(1024, 1024, 2, 300, reference_tokens=4096),
    "edit with three images": SamplingRequest(1024, 1024, 1, 300, reference_tokens=3 * 4096),
    "edit with ten images": SamplingRequest(1024, 1024, 1, 300, reference_tokens=10 * 4096),
    "a batch of four": SamplingRequest(1024, 1024, 4, 300, prompts=1),
    "a long prompt": SamplingRequest(512, 512, 1, 4000),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", REQUESTS)
def test_a_step_takes_what_is_planned(case: str, live: LiveBytes) -> None:
    transformer, request = make_transformer(torch.bfloat16, layers=3), REQUESTS[case]
    plan = plan_memory(transformer.footprint, request, Limits(least_bytes(transformer.footprint, request) + 10**9))
    transformer.load(plan.resident)
    with transformer.session(slots=plan.slots, ring=plan.ring, mlp_chunk_tokens=plan.mlp_chunk_tokens) as session:
        live.reset_peak()
        branches = make_branches(request)
        session.forward(branches)
        del branches
    planned = plan.sampling_peak_bytes - plan.kept.device_bytes  # nothing is kept here
    assert 0.9 * planned < live.peak < 1.1 * planned, plan


@pytest.mark.slow
@pytest.mark.parametrize("case", ["edit with guidance", "edit with ten images"])
@pytest.mark.parametrize("where", ["in RAM", "on the device", "made anew"])
def test_later_steps_take_no_more_than_is_planned(case: str, where: str, live: LiveBytes) -> None:
    transformer, request = make_transformer(torch.bfloat16, layers=3), REQUESTS[case]
    footprint = transformer.footprint
    least, kept_bytes = least_bytes(footprint, request), 3 * footprint.kept_block_bytes(request)
    limits = {
        "in RAM": Limits(least + footprint.slot_bytes, 2 * footprint.ring_bytes + kept_bytes),
        "on the device": Limits(least + 4 * footprint.slot_bytes + kept_bytes, footprint.ring_bytes),
        "made anew": Limits(least, footprint.ring_bytes),
    }
    plan = plan_memory(footprint, request, limits[where])
    assert {"in RAM": plan.kept.in_host, "on the device": plan.kept.on_device, "made anew": plan.kept.remade}[
        where
    ] == 3
    transformer.load(plan.resident, plan.held, (), plan.kept)
    with transformer.session(slots=plan.slots, ring=plan.ring, mlp_chunk_tokens=plan.mlp_chunk_tokens) as session:
        for _ in range(2):
            live.reset_peak()
            branches = make_branches(request)
            session.forward(branches)
            del branches
            assert live.peak < 1.02 * plan.sampling_peak_bytes, plan
        # both prompts begin with the same text before their image
        planned = plan.kept.on_device * plan.kept.block_bytes
        assert 0.99 * planned <= transformer.store.kept.resident_bytes <= planned
    tokens = request.reference_tokens + request.distinct_prompts * request.prompt_tokens
    assert (
        0.99 * (3 + plan.kept.remade) * tokens <= transformer.store.kept.made_tokens <= (3 + plan.kept.remade) * tokens
    )
