"""Our engine within a card's memory, as a run of it would be: its plan from what is free, its slots, its passes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from qwenimage_lowvram.engine.files.checkpoint import Checkpoint
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.models.qwen_image.transformer import QwenImageTransformer
from qwenimage_lowvram.engine.planning.forecast import Speeds
from qwenimage_lowvram.engine.planning.memory import plan_memory
from qwenimage_lowvram.engine.planning.request import Limits, SamplingRequest
from qwenimage_lowvram.engine.runs import free_memory
from qwenimage_lowvram.engine.runs.known_speeds import KnownSpeeds
from random_blocks import repeat_blocks
from torch import Tensor

from .cases import Case, Sizes
from .faster import CACHES, RUN_STEPS, branches_at, cached_run, linear_for, prepare, products_dtype
from .steps import SIGMA, Inputs, Ready, synchronize

STEPS = {True: 20, False: 8}  # of a run, guided or not


def open_transformer(
    checkpoint: Checkpoint, sizes: Sizes, device: torch.device, how: str, folder: Path
) -> QwenImageTransformer:
    """how: as Case has it; what it needs of its own is written into `folder`. Raises NotTried where the device lacks
    what it takes."""
    hardware, repeated = Hardware.detect(device), repeat_blocks(checkpoint, sizes.blocks)
    dtype = products_dtype(how, sizes)
    linear = linear_for(repeated, hardware, how, dtype)
    transformer = QwenImageTransformer(repeated, dtype=dtype, hardware=hardware, linear=linear)
    prepare(transformer, how, folder)
    return transformer


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
    cache = CACHES.get(case.how)
    request = SamplingRequest(
        case.side,
        case.side,
        len(inputs.prompts),
        inputs.prompts[0].shape[1],
        timesteps=RUN_STEPS if cache else STEPS[case.guided],
        step_cache=cache,
    )
    plan = plan_memory(transformer.footprint, request, _limits(transformer, case, sizes), speeds)
    if cache is not None:
        with cached_run(
            transformer, plan, inputs, speeds, {"plan": str(plan), "planned_bytes": plan.peak_bytes}
        ) as ready:
            yield ready
        return
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
    branches = branches_at(inputs, SIGMA, transformer.dtype)
    try:
        with transformer.session(slots=plan.slots, ring=plan.ring, mlp_chunk_tokens=plan.mlp_chunk_tokens) as session:

            def step(more: bool) -> list[Tensor]:
                answers = session.forward(branches, more=more)
                if (compiled := transformer.compiled) is not None:
                    facts.update(compiled_times=compiled.times, compile_seconds=compiled.seconds, why=compiled.why_not)
                return answers

            yield Ready(step, sizes.blocks, facts)
    finally:
        transformer.unload()


@torch.no_grad()
def plain_answer(transformer: QwenImageTransformer, inputs: Inputs, sigma: float) -> list[Tensor]:
    """What one pass answers at `sigma`, with nothing resident."""
    transformer.load(())
    try:
        with transformer.session(slots=1) as session:
            return [answer.cpu() for answer in session.forward(branches_at(inputs, sigma, transformer.dtype))]
    finally:
        transformer.unload()


def _limits(transformer: QwenImageTransformer, case: Case, sizes: Sizes) -> Limits:
    device = transformer.hardware.device
    if transformer.hardware.host_device:
        assert case.card is not None
        return Limits(sizes.cards[case.card])
    ram = free_memory.free_ram() + transformer.store.held_bytes
    return Limits(free_memory.free_bytes(device) - free_memory.headroom_bytes(transformer.footprint.slot_bytes), ram)
