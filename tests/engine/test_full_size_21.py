"""At its real size, on fake tensors, Qwen-Image-2.1's transformer takes the memory that the plan says."""

from collections.abc import Iterator

import full_size
import pytest
import torch
from full_size_21 import transformer_21_checkpoint
from full_size_formats import in_format
from live_bytes import LiveBytes
from qwenimage_lowvram.engine.files.checkpoint import Checkpoint
from qwenimage_lowvram.engine.models.qwen_image_21.branch import Branch
from qwenimage_lowvram.engine.models.qwen_image_21.costs import TOKEN_PX
from qwenimage_lowvram.engine.models.qwen_image_21.prefix import Prefix
from qwenimage_lowvram.engine.models.qwen_image_21.transformer import QwenImage21Transformer
from qwenimage_lowvram.engine.planning.draft import least_bytes
from qwenimage_lowvram.engine.planning.memory import plan_memory
from qwenimage_lowvram.engine.planning.memory_plan import MemoryPlan
from qwenimage_lowvram.engine.planning.request import GIB, Limits, SamplingRequest
from qwenimage_lowvram.engine.streaming import OnBlock
from torch._subclasses.fake_tensor import FakeTensorMode


@pytest.fixture
def live() -> Iterator[LiveBytes]:
    with FakeTensorMode(), LiveBytes("cuda") as live, torch.inference_mode():
        yield live


def make_transformer(checkpoint: Checkpoint, dtype: torch.dtype = torch.bfloat16) -> QwenImage21Transformer:
    return QwenImage21Transformer(
        checkpoint,
        dtype=dtype,
        hardware=full_size.fake_gpu(),
        source=full_size.EmptySource,
    )


def make_branches(request: SamplingRequest, dtype: torch.dtype = torch.bfloat16) -> list[Branch]:
    """Each prompt for as many images as the request has; references of the image's size."""

    def empty(tokens: int, width: int = 64) -> torch.Tensor:
        return torch.empty(1, tokens, width, device="cuda", dtype=dtype)

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


FORMATS = ("bf16", "int8", "nf4")
CARDS = {4: 10, 8: 24, 16: 24}  # GB of the card, and GiB of the machine's RAM for what is held and kept
CONTEXT_BYTES = 600_000_000  # that the driver takes of a card
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


IN_HALF = ("512", "2048", "edit with guidance", "edit with ten images")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "dtype", "spare_bytes"),
    [(case, torch.bfloat16, 10**9) for case in REQUESTS]
    + [(case, torch.float16, spare) for case in IN_HALF for spare in (0, 6 * 10**9)],
    ids=str,
)
def test_a_step_takes_what_is_planned(case: str, dtype: torch.dtype, spare_bytes: int, live: LiveBytes) -> None:
    transformer, request = make_transformer(transformer_21_checkpoint(layers=3), dtype), REQUESTS[case]
    least = least_bytes(transformer.footprint, request)
    plan = plan_memory(transformer.footprint, request, Limits(least + spare_bytes))
    transformer.load(plan.resident)
    with transformer.session(slots=plan.slots, ring=plan.ring, mlp_chunk_tokens=plan.mlp_chunk_tokens) as session:
        live.reset_peak()
        branches = make_branches(request, transformer.dtype)
        session.forward(branches)
        del branches
    planned = plan.sampling_peak_bytes - plan.kept.device_bytes  # nothing is kept here
    assert 0.9 * planned < live.peak < 1.1 * planned, plan


FITTING = ("1024", "2048", "edit", "edit with three images", "edit with ten images")
# each request in each format and on each card, and each format on each card
PAIRS = [
    (case, weight_format, list(CARDS)[(i + j) % len(CARDS)])
    for i, case in enumerate(FITTING)
    for j, weight_format in enumerate(FORMATS)
]
WHOLE = [("1024", "bf16", 4), ("edit", "nf4", 8)]


class _Seen(Exception):
    """Enough blocks have passed."""


@pytest.fixture(scope="module")
def checkpoints() -> dict[str, Checkpoint]:
    """The whole model in each format, headers only."""
    return {name: in_format(transformer_21_checkpoint(), name) for name in FORMATS}


def plan_on_card(transformer: QwenImage21Transformer, case: str, card_gb: int) -> MemoryPlan:
    limits = Limits(card_gb * 10**9 - CONTEXT_BYTES, CARDS[card_gb] * GIB)
    return plan_memory(transformer.footprint, REQUESTS[case], limits)


def forward(
    live: LiveBytes,
    transformer: QwenImage21Transformer,
    plan: MemoryPlan,
    on_block: OnBlock | None = None,
    *,
    steps: int = 1,
) -> None:
    transformer.load(plan.resident, plan.held, (), plan.kept)
    with transformer.session(slots=plan.slots, mlp_chunk_tokens=plan.mlp_chunk_tokens) as session:
        live.reset_peak()
        for _ in range(steps):
            session.forward(make_branches(plan.request), on_block=on_block)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "weight_format", "card_gb"), PAIRS)
def test_images_fit_the_cards(
    case: str, weight_format: str, card_gb: int, checkpoints: dict[str, Checkpoint], live: LiveBytes
) -> None:
    """All blocks find their place. Four of them tell the peak of the first step, with what they keep on the device;
    what the others keep beside it is as large."""
    transformer = make_transformer(checkpoints[weight_format])
    plan = plan_on_card(transformer, case, card_gb)

    def stop(index: int) -> None:
        if index == 4:
            raise _Seen

    with pytest.raises(_Seen):
        forward(live, transformer, plan, stop)
    require_as_planned(live.peak + sum(index > 3 for index in plan.kept.device) * plan.kept.block_bytes, plan)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "weight_format", "card_gb"), WHOLE)
def test_two_whole_steps_fit_the_cards(
    case: str, weight_format: str, card_gb: int, checkpoints: dict[str, Checkpoint], live: LiveBytes
) -> None:
    transformer = make_transformer(checkpoints[weight_format])
    plan = plan_on_card(transformer, case, card_gb)
    assert plan.blocks == 32
    forward(live, transformer, plan, steps=2)
    require_as_planned(live.peak, plan)


def require_as_planned(peak: int, plan: MemoryPlan) -> None:
    assert 0.9 * plan.sampling_peak_bytes < peak <= plan.sampling_peak_bytes <= plan.limit_bytes, plan


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        ("edit with guidance", torch.bfloat16),
        ("edit with guidance", torch.float16),
        ("edit with ten images", torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("where", ["in RAM", "on the device", "made anew"])
def test_later_steps_take_no_more_than_is_planned(case: str, dtype: torch.dtype, where: str, live: LiveBytes) -> None:
    transformer, request = make_transformer(transformer_21_checkpoint(layers=3), dtype), REQUESTS[case]
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
            branches = make_branches(request, transformer.dtype)
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
