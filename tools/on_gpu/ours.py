"""Our engine within a card's memory, as a run of it would be: its plan from what is free, its slots, its passes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from qwenimage_lowvram.engine.files.checkpoint import Checkpoint
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.models.qwen_image.branch import Branch
from qwenimage_lowvram.engine.models.qwen_image.transformer import QwenImageTransformer
from qwenimage_lowvram.engine.planning.forecast import Speeds
from qwenimage_lowvram.engine.planning.memory import plan_memory
from qwenimage_lowvram.engine.planning.request import Limits, SamplingRequest
from qwenimage_lowvram.engine.runs import free_memory
from qwenimage_lowvram.engine.runs.known_speeds import KnownSpeeds
from random_blocks import repeat_blocks

from .cases import Case, Sizes
from .steps import SIGMA, Inputs, Ready, synchronize

STEPS = {True: 20, False: 8}  # of a run, guided or not


def open_transformer(checkpoint: Checkpoint, sizes: Sizes, device: torch.device) -> QwenImageTransformer:
    return QwenImageTransformer(
        repeat_blocks(checkpoint, sizes.blocks), dtype=torch.bfloat16, hardware=Hardware.detect(device)
    )


def measure_speeds(transformer: QwenImageTransformer) -> Speeds:
    return KnownSpeeds(
        transformer.hardware, transformer.dtype, transformer.file, file=None, device_name="the device"
    ).get()


@contextmanager
def streamed(
    transformer: QwenImageTransformer, case: Case, sizes: Sizes, inputs: Inputs, speeds: Speeds
) -> Iterator[Ready]:
    """Held blocks stay in host memory afterwards, for the next case. Raises DoesNotFit."""
    device = transformer.hardware.device
    request = SamplingRequest(
        case.side, case.side, len(inputs.prompts), inputs.prompts[0].shape[1], timesteps=STEPS[case.guided]
    )
    plan = plan_memory(transformer.footprint, request, _limits(transformer, case, sizes), speeds)
    transformer.load(plan.resident, plan.held)
    start = time.perf_counter()
    transformer.modulation.announce([SIGMA])
    synchronize(device)
    facts = {
        "forecast_seconds": plan.forecast.seconds,
        "once_seconds": time.perf_counter() - start,
        "resident": len(plan.resident),
        "held": len(plan.held),
        "from_file": plan.from_file,
        "planned_bytes": plan.peak_bytes,
        "plan": str(plan),
    }
    branches = [Branch(inputs.tokens, (inputs.grid,), prompt, None, SIGMA) for prompt in inputs.prompts]
    try:
        with transformer.session(slots=plan.slots, ring=plan.ring, mlp_chunk_tokens=plan.mlp_chunk_tokens) as session:
            yield Ready(lambda more: session.forward(branches, more=more), sizes.blocks, facts)
    finally:
        transformer.unload()


def _limits(transformer: QwenImageTransformer, case: Case, sizes: Sizes) -> Limits:
    device = transformer.hardware.device
    if transformer.hardware.host_device:
        assert case.card is not None
        return Limits(sizes.cards[case.card])
    ram = free_memory.free_ram() + transformer.store.held_bytes
    return Limits(free_memory.free_bytes(device) - free_memory.headroom_bytes(transformer.footprint.slot_bytes), ram)
