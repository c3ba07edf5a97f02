"""What torch keeps of the card after a run: what the plan says, and pieces beside it."""

import pytest
from qwenimage_lowvram.engine.compute.step_schedules import Measured, StepSchedule
from qwenimage_lowvram.engine.planning.draft import least_bytes, whole_bytes
from qwenimage_lowvram.engine.planning.forecast import TYPICAL
from qwenimage_lowvram.engine.planning.memory import plan_memory
from qwenimage_lowvram.engine.planning.request import Limits, SamplingRequest
from qwenimage_lowvram.engine.runs.sampling_run import SamplingRun
from qwenimage_lowvram.engine.runs.surroundings import Alone
from qwenimage_lowvram.engine.runs.timeline import Timeline

from .device import SimulatedGPU
from .reserved import MIB, Reserved
from .rig import PIECE_BYTES, PROMPT_TOKENS, Rig, finish, host, known
from .seams import small_pieces
from .tiny_models import DIM, TinyModels

# a tiny block's weights are then as large as a real one's, of 3072 numbers a token; and a token is 48
SCALE = (3072 // DIM) ** 2
TIMES = tuple(1 - i / 20 for i in range(20))
STEPS = 2  # that are taken of them
# of twice as many, the second half is predicted
CACHE = StepSchedule("of a test", len(TIMES), (0, 1, 10), Measured("Qwen-Image", 64, 48))
PIECES = 2 / 3  # of activations, as MemoryPlan says
ROUNDING_BYTES = 16 * MIB  # many small tensors, each of which takes 512 bytes or more


def mib(*sizes: int) -> list[int]:
    return [nbytes * MIB for nbytes in sizes]


def test_a_request_is_cut_from_the_smallest_free_piece_of_its_stream() -> None:
    reserved = Reserved()
    large, small = (reserved.take(nbytes, "compute") for nbytes in mib(400, 100))
    assert reserved.nbytes == reserved.allocated_bytes == 500 * MIB
    reserved.give_back(large)
    reserved.give_back(small)
    pieces = [reserved.take(nbytes, "compute") for nbytes in mib(60, 60, 340)]
    assert [piece.address for piece in pieces] == mib(400, 0, 60)
    assert reserved.nbytes == 500 * MIB
    reserved.take(60 * MIB, "copy")
    assert reserved.nbytes == 560 * MIB


def test_free_neighbours_are_one_piece_again() -> None:
    reserved = Reserved()
    whole = reserved.take(300 * MIB, "compute")
    reserved.give_back(whole)
    pieces = [reserved.take(100 * MIB, "compute") for _ in range(3)]
    for piece in (pieces[0], pieces[2], pieces[1]):
        reserved.give_back(piece)
    assert reserved.take(300 * MIB, "compute").address == 0
    assert reserved.nbytes == reserved.peak_allocated_bytes == 300 * MIB


@pytest.mark.parametrize(
    ("nbytes", "segment", "taken"),
    [
        (1, 2 * MIB, 512),
        (MIB, 2 * MIB, MIB),
        (MIB + 1, 20 * MIB, MIB + 512),
        (10 * MIB, 10 * MIB, 10 * MIB),
        (11 * MIB + 1, 12 * MIB, 12 * MIB),  # what is left of it is too little to be cut off
    ],
)
def test_segments_are_as_torch_takes_them(nbytes: int, segment: int, taken: int) -> None:
    reserved = Reserved()
    reserved.take(nbytes, "compute")
    assert (reserved.nbytes, reserved.allocated_bytes) == (segment, taken)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "more_blocks", "side", "cache"),
    [
        ("bf16", 0, 5, None),
        ("bf16", None, 9, None),
        ("int8", 2.5, 5, None),
        ("fp8", None, 9, None),
        ("nf4", 0, 9, None),
        ("GGUF", 2.5, 12, None),
        ("bf16", 0, 12, CACHE),
        ("int8", 2.5, 9, CACHE),
    ],
)
def test_after_modulation_and_sampling_torch_keeps_little_more_than_the_plan(
    kind: str, more_blocks: float | None, side: int, cache: StepSchedule | None, tiny_models: TinyModels
) -> None:
    """With the least memory and so many blocks' more; None: with all blocks on the card. `side`: of the image, in
    tokens. `cache`: the last of the steps are predicted."""
    request = SamplingRequest(
        16 * side, 16 * side, len(PROMPT_TOKENS), max(PROMPT_TOKENS), timesteps=len(TIMES), step_cache=cache
    )
    with SimulatedGPU("late") as gpu, small_pieces(PIECE_BYTES):
        reserved = gpu.allocator.reserved = Reserved(SCALE)
        rig = Rig(tiny_models, gpu)
        model = rig.transformer(kind)
        vram = whole_bytes(model.footprint, request)
        if more_blocks is not None:
            vram = least_bytes(model.footprint, request) + int(more_blocks * model.footprint.slot_bytes)
        plan = plan_memory(model.footprint, request, Limits(vram))
        branches = [
            rig.branches(t, prompts=2, image_shape=(1, side, side)) for t in TIMES[: 2 * STEPS if cache else STEPS]
        ]
        run = SamplingRun(
            model, plan, steps=len(TIMES), speeds=known(rig, TYPICAL), timeline=Timeline(), surroundings=Alone()
        )
        try:
            run.load()
            run.begin(TIMES)
            for branch in branches:
                host(run.forward(branch))
        finally:
            run.end(finished=False)
        finish(model)
    planned = plan.peak_bytes * SCALE
    assert reserved.peak_allocated_bytes <= planned + ROUNDING_BYTES
    assert reserved.nbytes <= planned + PIECES * plan.activation_bytes * SCALE
