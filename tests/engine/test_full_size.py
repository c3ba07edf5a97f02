"""At its real size, on fake tensors, the model takes the memory that the plan says, and a 4 GB card has that.

Counted are the storages of tensors on the device. Fused attention is counted as one kernel: its output and the
log-sum-exp that flash and memory-efficient kernels keep (see LiveBytes); only inference mode hands it over whole.
What kernels allocate inside themselves, and the driver's own context, are not counted.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import full_size
import pytest
import torch
from live_bytes import LiveBytes
from qwenimage_lowvram.engine.caches.requantized_weights import RequantizedWeights
from qwenimage_lowvram.engine.compute.context_parallel import Ranks
from qwenimage_lowvram.engine.files.checkpoint import Checkpoint
from qwenimage_lowvram.engine.lora.lora_file import match
from qwenimage_lowvram.engine.lora.weight_patches import lora_patches
from qwenimage_lowvram.engine.models.qwen25_vl.text_encoder import TextEncoder
from qwenimage_lowvram.engine.models.qwen_image.branch import Branch
from qwenimage_lowvram.engine.models.qwen_image.costs import PROMPT_SIZES
from qwenimage_lowvram.engine.models.qwen_image.transformer import QwenImageTransformer
from qwenimage_lowvram.engine.models.qwen_image.variants import Variant
from qwenimage_lowvram.engine.planning.draft import least_bytes
from qwenimage_lowvram.engine.planning.memory import plan_memory
from qwenimage_lowvram.engine.planning.memory_plan import MemoryPlan
from qwenimage_lowvram.engine.planning.request import GIB, Limits, SamplingRequest
from qwenimage_lowvram.engine.planning.stages import ImageRequest
from qwenimage_lowvram.engine.planning.text_encoder import text_encoder_peak_bytes
from torch import distributed
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

pytestmark = pytest.mark.slow

SIZES = [(1664, 928), (1328, 1328)]
PROMPT_TOKENS = 512
FP8 = torch.float8_e4m3fn


@pytest.fixture
def live() -> Iterator[LiveBytes]:
    with FakeTensorMode(), LiveBytes("cuda") as live, torch.inference_mode():
        yield live


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """The whole model in each format, headers only."""
    source, folder = full_size.transformer_checkpoint(), tmp_path_factory.mktemp("cache")
    quantized = {name: RequantizedWeights.of(source, name, folder) for name in ("int8", "nf4")}
    return {
        "bf16": source,
        **{name: weights.checkpoint(data_start=0) for name, weights in quantized.items() if weights},
    }


def make_transformer(
    stored: torch.dtype, *, layers: int = 60, dtype: torch.dtype = torch.bfloat16
) -> QwenImageTransformer:
    return QwenImageTransformer(
        full_size.transformer_checkpoint(stored, layers=layers),
        dtype=dtype,
        hardware=full_size.fake_gpu(),
        source=full_size.EmptySource,
    )


def make_branch(request: SamplingRequest, dtype: torch.dtype = torch.bfloat16) -> Branch:
    """With references of the image's size, where there are any."""
    height, width = request.height // 16, request.width // 16
    references = ((1, height, width),) * (request.reference_tokens // (height * width))
    return Branch(
        torch.empty(1, request.image_tokens, 64, device="cuda", dtype=dtype),
        ((request.frames, height, width), *references),
        torch.empty(1, request.prompt_tokens, 3584, device="cuda", dtype=dtype),
        None,
        0.9,
    )


def sampling_peak(
    live: LiveBytes, transformer: QwenImageTransformer, plan: MemoryPlan, on_block: Callable[[int], None] | None = None
) -> int:
    """The most that a step has on the device, the resident blocks included."""
    transformer.load(plan.resident)
    transformer.modulation.announce([0.9])
    with transformer.session(slots=plan.slots, ring=plan.ring, mlp_chunk_tokens=plan.mlp_chunk_tokens) as session:
        live.reset_peak()
        branches = [make_branch(plan.request, transformer.dtype) for _ in range(plan.request.branches)]
        session.forward(branches, on_block=on_block)
        del branches
    return live.peak


def test_a_guided_step_of_the_whole_model_takes_less_than_1900_mb(live: LiveBytes) -> None:
    transformer = make_transformer(torch.bfloat16)
    assert transformer.footprint.blocks == 60
    plan = plan_memory(transformer.footprint, SamplingRequest(1328, 1328, 2, PROMPT_TOKENS), Limits(int(1.9e9)))
    assert plan.slots == 2
    peak = sampling_peak(live, transformer, plan)
    assert 0.9 * plan.sampling_peak_bytes < peak < 1.1 * plan.sampling_peak_bytes
    assert peak <= 1.9e9


HALF_REQUESTS = {
    "1328": SamplingRequest(1328, 1328, 2, PROMPT_TOKENS),
    "2048": SamplingRequest(2048, 2048, 1, PROMPT_TOKENS),
    "512": SamplingRequest(512, 512, 1, 1000),
    "edit": SamplingRequest(1024, 1024, 2, 1200, reference_tokens=4096),
}


@pytest.mark.parametrize("spare_bytes", [0, 6 * 10**9])
@pytest.mark.parametrize("case", HALF_REQUESTS)
def test_products_in_fp16_take_what_is_planned(case: str, spare_bytes: int, live: LiveBytes) -> None:
    transformer, request = make_transformer(torch.bfloat16, layers=3, dtype=torch.float16), HALF_REQUESTS[case]
    plan = plan_memory(
        transformer.footprint, request, Limits(least_bytes(transformer.footprint, request) + spare_bytes)
    )
    assert "products in fp16 between activations in fp32" in str(plan)
    peak = sampling_peak(live, transformer, plan)
    assert 0.9 * plan.sampling_peak_bytes < peak < 1.1 * plan.sampling_peak_bytes


# what the driver's context takes of a card
CONTEXT_BYTES = int(0.6e9)
CARDS = [4, 8, 16]
REQUESTS = [(1328, 1328, 1), (1664, 928, 1), (2048, 2048, 1), (1024, 1024, 4)]
WEIGHT_FORMATS = ["bf16", "int8", "nf4"]


def with_formats(cards: Sequence[int], requests: Sequence[Any]) -> list[tuple[int, Any, str]]:
    """Each card with each request, and one of the formats: another one than at the next card, or the next request."""
    return [
        (card, request, WEIGHT_FORMATS[(i + j) % len(WEIGHT_FORMATS)])
        for i, card in enumerate(cards)
        for j, request in enumerate(requests)
    ]


class _Seen(Exception):
    """Enough blocks have passed."""


def assert_fits(
    live: LiveBytes, transformer: QwenImageTransformer, request: SamplingRequest, card_gb: float
) -> MemoryPlan:
    """All blocks find their place; three of them, and what comes before the blocks, tell the peak: within the card, and
    within 10 % of the plan, which is returned."""
    plan = plan_memory(transformer.footprint, request, Limits(int(card_gb * 1e9) - CONTEXT_BYTES))

    def stop(index: int) -> None:
        if index == 3:
            raise _Seen

    with pytest.raises(_Seen):
        sampling_peak(live, transformer, plan, on_block=stop)
    assert live.peak <= plan.limit_bytes
    assert 0.9 * plan.sampling_peak_bytes < live.peak < 1.1 * plan.sampling_peak_bytes
    return plan


@pytest.mark.parametrize(("card_gb", "size", "weight_format"), with_formats(CARDS, REQUESTS), ids=str)
def test_guided_images_fit_the_cards(
    card_gb: int,
    size: tuple[int, int, int],
    weight_format: str,
    checkpoints: dict[str, Checkpoint],
    live: LiveBytes,
) -> None:
    transformer = QwenImageTransformer(
        checkpoints[weight_format],
        dtype=torch.bfloat16,
        hardware=full_size.fake_gpu(),
        source=full_size.EmptySource,
    )
    width, height, batch = size
    request = SamplingRequest(width, height, 2 * batch, PROMPT_TOKENS)
    plan = assert_fits(live, transformer, request, card_gb)
    assert plan.limit_bytes - plan.peak_bytes < transformer.footprint.resident_block_bytes or plan.streamed <= 1


@pytest.mark.parametrize(
    ("side", "layers", "card_gb", "stored"),
    [(640, 4, 4, FP8), (640, 4, 8, torch.bfloat16), (1024, 4, 8, FP8), (640, 8, 4, torch.bfloat16)],
    ids=str,
)
def test_layers_fit_the_cards(side: int, layers: int, card_gb: int, stored: torch.dtype, live: LiveBytes) -> None:
    """Of Qwen-Image-Layered: each layer, the image, and the image that is taken apart count."""
    transformer = QwenImageTransformer(
        full_size.transformer_checkpoint(stored, layered=True),
        dtype=torch.bfloat16,
        hardware=full_size.fake_gpu(),
        source=full_size.EmptySource,
    )
    request = ImageRequest(
        side, side, 1, True, 50, PROMPT_TOKENS - PROMPT_SIZES.behind, layers=layers, prompts=PROMPT_SIZES
    ).sampling
    tokens = (side // 16) ** 2
    assert (request.frames, request.image_tokens) == (layers + 1, (layers + 2) * tokens)
    assert_fits(live, transformer, request, card_gb)


# tokens of a prompt with so many images as the tower sees them: 384x384 px, by the first Edit 1024x1024 px
EDITS = [
    (Variant.EDIT, 1, 1600),
    (Variant.EDIT_2509, 1, 400),
    (Variant.EDIT_2509, 3, 800),
    (Variant.EDIT_2511, 1, 400),
    (Variant.EDIT_2511, 3, 800),
]


@pytest.mark.parametrize(("card_gb", "edit", "weight_format"), with_formats([4, 8], EDITS), ids=str)
def test_guided_edits_fit_the_cards(
    card_gb: int,
    edit: tuple[Variant, int, int],
    weight_format: str,
    checkpoints: dict[str, Checkpoint],
    live: LiveBytes,
) -> None:
    variant, images, prompt_tokens = edit
    transformer = QwenImageTransformer(
        checkpoints[weight_format],
        dtype=torch.bfloat16,
        hardware=full_size.fake_gpu(),
        source=full_size.EmptySource,
        variant=variant,
    )
    request = SamplingRequest(1024, 1024, 2, prompt_tokens, reference_tokens=4096 * images)
    assert_fits(live, transformer, request, card_gb)


# blocks are alike and pass through the same slots: a few tell as much as sixty, in a tenth of the time
@pytest.mark.parametrize("limit_gib", [2.0, 6.0])
@pytest.mark.parametrize("stored", [torch.bfloat16, FP8], ids=str)
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_sampling_takes_what_the_plan_says(
    width: int, height: int, stored: torch.dtype, limit_gib: float, live: LiveBytes
) -> None:
    transformer = make_transformer(stored, layers=5)
    request = SamplingRequest(width, height, 2, PROMPT_TOKENS)
    plan = plan_memory(transformer.footprint, request, Limits(int(limit_gib * GIB)))
    assert (plan.streamed == 0) == (limit_gib == 6.0)
    peak = sampling_peak(live, transformer, plan)
    assert 0.9 * plan.sampling_peak_bytes < peak < 1.1 * plan.sampling_peak_bytes
    assert peak <= plan.limit_bytes


CASES = [
    (512, 512, 1, 60, 1.5, torch.bfloat16),
    (512, 512, 1, 1024, 1.5, FP8),
    (1024, 1024, 2, 546, 1.6, torch.bfloat16),
    (2048, 2048, 2, 512, 2.4, FP8),
    (2048, 2048, 6, 512, 4.0, torch.bfloat16),
    (1328, 1328, 4, 100, 99.0, FP8),
]


@pytest.mark.parametrize(("width", "height", "branches", "tokens", "limit_gib", "stored"), CASES)
def test_the_plan_is_right_for_other_requests_too(
    width: int, height: int, branches: int, tokens: int, limit_gib: float, stored: torch.dtype, live: LiveBytes
) -> None:
    transformer = make_transformer(stored, layers=4)
    request = SamplingRequest(width, height, branches, tokens)
    plan = plan_memory(transformer.footprint, request, Limits(int(limit_gib * GIB)))
    peak = sampling_peak(live, transformer, plan)
    assert 0.9 * plan.sampling_peak_bytes < peak < 1.1 * plan.sampling_peak_bytes


@pytest.mark.parametrize("chunk", [4096, 512])
def test_chunks_take_what_the_plan_says(chunk: int, live: LiveBytes) -> None:
    transformer = make_transformer(torch.bfloat16, layers=4)
    request = SamplingRequest(2048, 2048, 2, 512)
    whole = plan_memory(transformer.footprint, request, Limits(100 * GIB))
    plan = replace(whole, resident=(), slots=1, mlp_chunk_tokens=chunk)
    weights = whole.sampling_peak_bytes - whole.activation_bytes - 3 * transformer.footprint.slot_bytes
    predicted = weights + transformer.footprint.activation_bytes(request, chunk)
    assert 0.9 * predicted < sampling_peak(live, transformer, plan) < 1.1 * predicted


@pytest.fixture
def of_processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Ranks]]:
    """`of_processes(4)`: the first of so many, whose exchanges move nothing, on devices that are not there."""

    def first_of(count: int) -> Ranks:
        distributed.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
        # asks the others for a number, which fake tensors have not
        monkeypatch.setattr("diffusers.models.attention_dispatch.gather_size_by_comm", lambda size, _: [size] * count)
        return Ranks.of_group(torch.device("cuda"))

    yield first_of
    distributed.destroy_process_group()


@pytest.mark.parametrize(("side", "branches", "count"), [(1328, 2, 2), (2048, 1, 4)])
def test_a_process_that_shares_an_image_takes_what_its_plan_says(
    side: int, branches: int, count: int, of_processes: Callable[[int], Ranks]
) -> None:
    ranks = of_processes(count)
    with FakeTensorMode(), LiveBytes("cuda") as live, torch.inference_mode():
        transformer = QwenImageTransformer(
            full_size.transformer_checkpoint(layers=3),
            dtype=torch.bfloat16,
            hardware=full_size.fake_gpu(),
            source=full_size.EmptySource,
            ranks=ranks,
        )
        request = SamplingRequest(side, side, branches, PROMPT_TOKENS, ranks=count)
        plan = plan_memory(transformer.footprint, request, Limits(int(1.9e9)))
        plan = replace(plan, mlp_chunk_tokens=512)  # attention is the widest point
        alone = transformer.footprint.activation_bytes(replace(request, ranks=1), 512)
        planned = transformer.footprint.activation_bytes(request, 512)
        assert planned < 0.8 * alone
        predicted = plan.sampling_peak_bytes - plan.activation_bytes + planned
        assert 0.9 * predicted < sampling_peak(live, transformer, plan) <= 1.01 * predicted


WITHOUT_FUSED = [(512, 0, None), (1328, 0, None), (1024, 4096, Variant.EDIT_2511)]


@pytest.mark.parametrize(("side", "references", "variant"), WITHOUT_FUSED, ids=str)
def test_scores_take_what_the_plan_says(side: int, references: int, variant: Variant | None) -> None:
    """On a device without a fused kernel for attention; at 1328x1328 px the whole scores would be 4.9 GiB in fp32."""
    with FakeTensorMode(), LiveBytes("cuda", fused=False) as live, torch.inference_mode():
        transformer = QwenImageTransformer(
            full_size.transformer_checkpoint(layers=3),
            dtype=torch.bfloat16,
            hardware=replace(full_size.fake_gpu(), fused_attention=frozenset()),
            source=full_size.EmptySource,
            variant=variant,
        )
        request = SamplingRequest(side, side, 2, PROMPT_TOKENS, reference_tokens=references)
        plan = plan_memory(transformer.footprint, request, Limits(int(1.9e9)))
        plan = replace(plan, mlp_chunk_tokens=512)  # attention is the widest point
        assert "attention pytorch in chunks of" in repr(plan)
        weights = plan.sampling_peak_bytes - plan.activation_bytes
        predicted = weights + transformer.footprint.activation_bytes(request, 512)
        assert 0.9 * predicted < sampling_peak(live, transformer, plan) <= predicted


@pytest.mark.parametrize("stored", [torch.bfloat16, FP8], ids=str)
@pytest.mark.parametrize("late", [False, True])
def test_the_modulation_pass_takes_what_the_plan_says(late: bool, stored: torch.dtype, live: LiveBytes) -> None:
    transformer = make_transformer(stored, layers=12)
    plan = plan_memory(transformer.footprint, SamplingRequest(512, 512, 1, 60), Limits(2 * GIB))
    transformer.load(plan.resident)
    if late:
        with transformer.session(slots=plan.slots, ring=plan.ring):
            live.reset_peak()
            transformer.modulation.row(0.5)
        predicted = plan.late_timestep_peak_bytes
    else:
        live.reset_peak()
        transformer.modulation.announce([1.0, 0.9, 0.5])
        predicted = plan.modulation_peak_bytes
    assert 0.9 * predicted < live.peak < 1.1 * predicted


class _EmbeddedEncoder(TextEncoder):
    """Rows of the embedding are read from a file, and there is none here."""

    def _embed(self, prompts: Sequence[Sequence[int]], images: Any) -> list[torch.Tensor]:
        return [torch.empty(1, len(ids), 3584, device="cuda", dtype=torch.bfloat16) for ids in prompts]


@pytest.mark.parametrize("stored", [torch.bfloat16, FP8], ids=str)
@pytest.mark.parametrize("lengths", [(546, 40), (1058, 1058)], ids=str)
def test_the_text_encoder_takes_less_than_1100_mb(
    lengths: tuple[int, int], stored: torch.dtype, live: LiveBytes
) -> None:
    encoder = _EmbeddedEncoder(
        full_size.text_encoder_checkpoint(stored, layers=4),  # which take as much as 28
        dtype=torch.bfloat16,
        hardware=full_size.fake_gpu(),
        source=full_size.EmptySource,
    )
    states = encoder.encode([[1] * length for length in lengths])
    assert [s.shape for s in states] == [(1, length, 3584) for length in lengths]
    assert live.peak < 1.1e9
    predicted = text_encoder_peak_bytes(encoder.footprint, lengths, 2)
    assert 0.9 * predicted < live.peak < 1.1 * predicted
    assert live.now == 0


@pytest.mark.parametrize("length", [546, 2048])
def test_the_text_encoders_scores_take_what_is_planned(length: int) -> None:
    with FakeTensorMode(), LiveBytes("cuda", fused=False) as live, torch.inference_mode():
        encoder = _EmbeddedEncoder(
            full_size.text_encoder_checkpoint(layers=3),
            dtype=torch.bfloat16,
            hardware=replace(full_size.fake_gpu(), fused_shared_attention=frozenset()),
            source=full_size.EmptySource,
        )
        encoder.encode([[1] * length])
        predicted = text_encoder_peak_bytes(encoder.footprint, (length,), 2)
        assert 0.85 * predicted < live.peak < 1.02 * predicted


@pytest.mark.parametrize("weight_format", ["bf16", "int8"])
def test_a_lightning_lora_fits_a_4_gb_card(
    weight_format: str, checkpoints: dict[str, Checkpoint], live: LiveBytes
) -> None:
    transformer = QwenImageTransformer(
        checkpoints[weight_format],
        dtype=torch.bfloat16,
        hardware=full_size.fake_gpu(),
        source=full_size.EmptySource,
    )
    lora = match(full_size.lightning_lora(transformer.weights), transformer.weights)
    assert 0.8e9 < lora.nbytes < 0.9e9
    before = transformer.footprint.stored_bytes
    transformer.patch(lora_patches([(lora, 1.0)]))
    assert transformer.footprint.stored_bytes - before == pytest.approx(lora.nbytes / 60, rel=0.01)
    request = SamplingRequest(1328, 1328, 1, PROMPT_TOKENS, timesteps=8)
    assert_fits(live, transformer, request, 4)
