"""On a real CUDA device, with blocks of the real size: limits hold, nothing drifts, and every way out frees it all."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.models.qwen_image.branch import Branch
from qwenimage_lowvram.engine.models.qwen_image.transformer import QwenImageTransformer
from qwenimage_lowvram.engine.planning.memory import plan_memory
from qwenimage_lowvram.engine.planning.memory_plan import MemoryPlan
from qwenimage_lowvram.engine.planning.request import GIB, Limits, SamplingRequest
from qwenimage_lowvram.engine.runs.dtype_choice import product_error
from qwenimage_lowvram.engine.streaming import OnBlock
from random_blocks import REAL_BLOCKS, Stored, repeat_blocks, write_transformer
from streaming_contenders import HEADROOM_BYTES
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
FILE_BLOCKS = 2
PROMPT_TOKENS = 512
STEPS = 30
SMALL = SamplingRequest(512, 512, 2, PROMPT_TOKENS)
# of six blocks: one in three stays on the device, in host memory, and in the file
RESIDENT, HELD = (0, 3), (1, 4)


class Interrupted(Exception):
    pass


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Stored, Path]:
    made = {}
    for stored in Stored:
        made[stored] = tmp_path_factory.mktemp("blocks") / stored.value
        write_transformer(made[stored], layers=FILE_BLOCKS, stored=stored)
    return made


@pytest.fixture
def open_model(folders: dict[Stored, Path]) -> Callable[..., QwenImageTransformer]:
    def open_(
        stored: Stored = Stored.BF16, *, blocks: int = 6, dtype: torch.dtype = torch.bfloat16
    ) -> QwenImageTransformer:
        checkpoint = repeat_blocks(open_checkpoint(folders[stored]), blocks)
        hardware = Hardware.detect(torch.device("cuda"))
        return QwenImageTransformer(checkpoint, dtype=dtype, hardware=hardware)

    return open_


@pytest.fixture
def limit_memory() -> Iterator[Callable[[int], None]]:
    """`limit_memory(nbytes)`: torch gets no more than that of the device until the test ends."""
    total = torch.cuda.get_device_properties(0).total_memory

    def limit(nbytes: int) -> None:
        if nbytes > total:
            pytest.skip(f"the device has {total / GIB:.0f} GB")
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(nbytes / total)

    yield limit
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def branches_of(request: SamplingRequest, timestep: float, dtype: torch.dtype = torch.bfloat16) -> list[Branch]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=generator).to("cuda", dtype)

    height, width = request.height // 16, request.width // 16
    tokens = random(height * width, 64)
    return [Branch(tokens, ((1, height, width),), random(n, 3584), None, timestep) for n in (PROMPT_TOKENS, 9)]


def plan_of(transformer: QwenImageTransformer, request: SamplingRequest, limit_bytes: int) -> MemoryPlan:
    return plan_memory(transformer.footprint, request, Limits(limit_bytes - HEADROOM_BYTES))


def run(
    transformer: QwenImageTransformer, plan: MemoryPlan, timesteps: list[float], on_block: OnBlock | None = None
) -> Tensor:
    """The last step's predictions, one after the other, on the host."""
    transformer.load(plan.resident, plan.held)
    transformer.modulation.announce(timesteps)
    with transformer.session(slots=plan.slots, ring=plan.ring, mlp_chunk_tokens=plan.mlp_chunk_tokens) as session:
        for left, timestep in reversed(list(enumerate(reversed(timesteps)))):
            branches = branches_of(plan.request, timestep, transformer.dtype)
            predictions = session.forward(branches, more=left > 0, on_block=on_block)
        return torch.cat(predictions).cpu()


@pytest.mark.parametrize("stored", Stored)
@pytest.mark.parametrize("limit_gib", [4, 8, 16])
def test_real_peaks_are_within_the_limit_and_near_the_plan(
    limit_gib: int,
    stored: Stored,
    open_model: Callable[..., QwenImageTransformer],
    limit_memory: Callable[[int], None],
) -> None:
    transformer = open_model(stored, blocks=REAL_BLOCKS)
    request = SamplingRequest(1328, 1328, 2, PROMPT_TOKENS)
    plan = plan_of(transformer, request, limit_gib * GIB)
    assert len(plan.resident) > 0
    plan = replace(plan, held=())  # sixty blocks of two in the file: nothing is gained by holding them
    limit_memory(limit_gib * GIB)
    torch.cuda.reset_peak_memory_stats()
    assert torch.isfinite(run(transformer, plan, [1.0, 0.5])).all()
    assert torch.cuda.max_memory_allocated() <= plan.limit_bytes
    assert torch.cuda.max_memory_reserved() <= limit_gib * GIB
    assert torch.cuda.max_memory_allocated() > 0.9 * plan.peak_bytes
    transformer.unload()


def test_products_in_fp16_are_right_and_take_what_is_planned(open_model: Callable[..., QwenImageTransformer]) -> None:
    assert product_error(torch.device("cuda")) < 1e-3
    answers = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        transformer = open_model(dtype=dtype)
        plan = plan_of(transformer, SMALL, 16 * GIB)
        torch.cuda.reset_peak_memory_stats()
        answers[dtype] = run(transformer, plan, [0.5]).float()
        assert 0.9 * plan.peak_bytes < torch.cuda.max_memory_allocated() <= plan.limit_bytes
        transformer.unload()
    errors = {dtype: (made - answers[torch.float32]).norm() for dtype, made in answers.items()}
    assert errors[torch.float16] < errors[torch.bfloat16]


@pytest.mark.parametrize("stored", Stored)
def test_30_steps_do_not_drift(stored: Stored, open_model: Callable[..., QwenImageTransformer]) -> None:
    transformer = open_model(stored)
    transformer.load(RESIDENT, HELD)
    transformer.modulation.announce([0.5])
    process = psutil.Process()
    first, allocated, resident = None, [], []
    with transformer.session(slots=2) as session:
        for step in range(STEPS):
            prediction = torch.cat(session.forward(branches_of(SMALL, 0.5), more=step + 1 < STEPS)).cpu()
            first = prediction if first is None else first
            assert torch.equal(prediction, first)
            allocated.append(torch.cuda.memory_allocated())
            resident.append(process.memory_info().rss)
    assert len(set(allocated[1:])) == 1
    assert resident[-1] - resident[4] < 32 * 1024**2
    assert transformer.store.held == set(HELD)
    assert transformer.store.pinned_bytes == transformer.store.held_bytes > 0
    transformer.unload()


def test_streamed_blocks_predict_what_diffusers_does_with_everything_resident(
    folders: dict[Stored, Path], open_model: Callable[..., QwenImageTransformer]
) -> None:
    transformer = open_model(blocks=FILE_BLOCKS)
    plan = plan_memory(transformer.footprint, SMALL, Limits(64 * GIB))
    plan = replace(plan, resident=(), held=(1,), slots=2)
    streamed = run(transformer, plan, [0.5, 0.5])
    transformer.unload()
    model = QwenImageTransformer2DModel.from_pretrained(folders[Stored.BF16], torch_dtype=torch.bfloat16).to("cuda")
    with torch.no_grad():
        expected = [
            model(
                hidden_states=branch.tokens,
                encoder_hidden_states=branch.prompt_embeds,
                timestep=torch.full((1,), 0.5, device="cuda", dtype=torch.bfloat16),
                img_shapes=[list(branch.shapes)],
                return_dict=False,
            )[0]
            for branch in branches_of(SMALL, 0.5)
        ]
    assert torch.equal(streamed, torch.cat(expected).cpu())


def fails(action: Callable[[], object], error: type[Exception]) -> bool:
    """Whether `action` raises `error`. Nothing keeps its traceback, which would keep its tensors."""
    try:
        action()
    except error:
        return True
    return False


@pytest.mark.parametrize("stored", Stored)
def test_an_interrupted_run_is_freed_to_the_byte(
    stored: Stored, open_model: Callable[..., QwenImageTransformer]
) -> None:
    transformer = open_model(stored)
    plan = replace(plan_memory(transformer.footprint, SMALL, Limits(64 * GIB)), resident=RESIDENT, held=HELD, slots=2)
    expected = run(transformer, plan, [0.5])  # cuBLAS keeps its workspace from now on
    transformer.unload()
    before = torch.cuda.memory_allocated()
    for interrupted in range(transformer.footprint.blocks):

        def interrupt(index: int, at: int = interrupted) -> None:
            if index == at:
                raise Interrupted

        assert fails(lambda on_block=interrupt: run(transformer, plan, [0.5], on_block), Interrupted)
        transformer.unload()
        assert torch.cuda.memory_allocated() == before
    assert torch.equal(run(transformer, plan, [0.5]), expected)
    transformer.unload()
    transformer.store.set_held(())
    assert transformer.store.held_bytes == 0


@pytest.mark.parametrize("stored", Stored)
@pytest.mark.parametrize("part", [0.3, 0.6, 0.9])
def test_a_run_out_of_memory_is_freed_to_the_byte(
    part: float,
    stored: Stored,
    open_model: Callable[..., QwenImageTransformer],
    limit_memory: Callable[[int], None],
) -> None:
    transformer = open_model(stored)
    request = SamplingRequest(1328, 1328, 2, PROMPT_TOKENS)
    plan = plan_memory(transformer.footprint, request, Limits(64 * GIB))
    plan = replace(plan, resident=RESIDENT, held=HELD, slots=2)
    torch.cuda.reset_peak_memory_stats()
    expected = run(transformer, plan, [0.5])
    peak = torch.cuda.max_memory_allocated()
    transformer.unload()
    before = torch.cuda.memory_allocated()
    torch.cuda.empty_cache()
    limit_memory(int(before + part * (peak - before)))
    assert fails(lambda: run(transformer, plan, [0.5]), torch.OutOfMemoryError)
    transformer.unload()
    assert torch.cuda.memory_allocated() == before
    torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.equal(run(transformer, plan, [0.5]), expected)
    transformer.unload()
