"""One guided step of a mid-size random transformer: ours streamed and resident, against diffusers' own loop.

    python dev.py bench step

`seconds` is the median of several steps, taken in turns; `peak_bytes` counts live weights and activations on the device
(on the CPU: in memory, cache of the operating system not counted); `fetched_bytes` are weights brought to the device
per step, at each framework's own point of onload. Ours reads the modulation weights once per run, not per step:
`once_bytes`, `once_seconds`. `error` is the largest difference from diffusers with everything resident.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.hooks import apply_group_offloading
from diffusers.hooks.group_offloading import ModuleGroup
from diffusers_step import DEVICE, DTYPE, StepInputs, guide, guided_step, parameters_of
from in_turns import seconds_in_turns
from live_bytes import LiveBytes
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.models.qwen_image.branch import Branch
from qwenimage_lowvram.engine.models.qwen_image.transformer import QwenImageTransformer
from small_checkpoint import make_transformer
from torch import Tensor

TEXT_DIM = 512
SIGMA = 0.5


def rows(quick: bool) -> list[dict[str, Any]]:
    heads, layers, side, rounds = (4, 4, 16, 3) if quick else (8, 8, 32, 5)
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode(), ExitStack() as open_sessions:
        folder = Path(scratch) / "transformer"
        model = make_transformer(layers=layers, heads=heads, head_dim=128, text_dim=TEXT_DIM, seed=0)
        model.to(DTYPE).save_pretrained(folder)
        del model
        inputs = StepInputs.random(side, side, TEXT_DIM, (64, 8))
        resident, activations = _resident(folder, inputs)
        contenders = [resident, _group_offload(folder, inputs, Path(scratch) / "offload", activations)]
        contenders += [_ours(folder, inputs, count, open_sessions) for count in (0, layers // 2, layers)]
        results = [contender.step() for contender in contenders]
        seconds = seconds_in_turns([contender.step for contender in contenders], rounds, DEVICE)
    case = f"{layers} blocks of {heads * 128}, {side * side} tokens"
    return [
        {
            "who": contender.who,
            "case": f"{case}, {contender.case}",
            "seconds": time_taken,
            **contender.measured,
            "error": float((result.float() - results[0].float()).abs().max()),
        }
        for contender, result, time_taken in zip(contenders, results, seconds, strict=True)
    ]


@dataclass(frozen=True)
class _Contender:
    who: str
    case: str
    step: Callable[[], Tensor]
    measured: dict[str, Any]


def _resident(folder: Path, inputs: StepInputs) -> tuple[_Contender, int]:
    """diffusers with everything on the device, and the bytes of its activations."""
    model = QwenImageTransformer2DModel.from_pretrained(folder, torch_dtype=DTYPE).to(DEVICE)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    with LiveBytes(DEVICE.type) as live:
        guided_step(model, inputs, SIGMA)
    measured = {"peak_bytes": weights + live.peak, "fetched_bytes": 0}
    return _Contender("diffusers", "resident", lambda: guided_step(model, inputs, SIGMA), measured), live.peak


def _group_offload(folder: Path, inputs: StepInputs, scratch: Path, activations: int) -> _Contender:
    model = QwenImageTransformer2DModel.from_pretrained(folder, torch_dtype=DTYPE)
    apply_group_offloading(
        model,
        onload_device=DEVICE,
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=DEVICE.type == "cuda",
        offload_to_disk_path=str(scratch),
    )
    with _counted_onloads() as count:
        guided_step(model, inputs, SIGMA)
    measured = {"peak_bytes": count["peak"] + activations, "fetched_bytes": count["bytes"]}
    step = partial(guided_step, model, inputs, SIGMA)
    return _Contender("diffusers group offload", "1 block per group, from disk", step, measured)


@contextmanager
def _counted_onloads() -> Iterator[dict[str, int]]:
    """Count the bytes that diffusers' groups bring to the device, and how many of them lie there at most."""
    count = {"bytes": 0, "now": 0, "peak": 0}
    onload, offload = ModuleGroup.onload_, ModuleGroup.offload_

    def size(group: ModuleGroup) -> int:
        return sum(p.numel() * DTYPE.itemsize for p in parameters_of(group))

    def counted_onload(group: ModuleGroup) -> None:
        onload(group)
        count["bytes"] += size(group)
        count["now"] += size(group)
        count["peak"] = max(count["peak"], count["now"])

    def counted_offload(group: ModuleGroup) -> None:
        count["now"] = max(0, count["now"] - size(group))
        offload(group)

    ModuleGroup.onload_, ModuleGroup.offload_ = counted_onload, counted_offload
    try:
        yield count
    finally:
        ModuleGroup.onload_, ModuleGroup.offload_ = onload, offload


def _ours(folder: Path, inputs: StepInputs, resident: int, open_sessions: ExitStack) -> _Contender:
    transformer = QwenImageTransformer(open_checkpoint(folder), dtype=DTYPE, hardware=Hardware.detect(DEVICE))
    transformer.load(range(resident))
    branches = [Branch(inputs.tokens, (inputs.grid,), prompt, None, SIGMA) for prompt in inputs.prompts]
    start = time.perf_counter()
    transformer.modulation.announce([SIGMA])
    once_seconds = time.perf_counter() - start
    slots = 0 if resident == transformer.config.num_layers else 2
    with LiveBytes(DEVICE.type) as live, transformer.session(slots=slots) as session:
        before = transformer.store.fetched_bytes
        guide(*session.forward(branches))
        fetched = transformer.store.fetched_bytes - before
    measured = {
        "peak_bytes": transformer.loaded_bytes + live.peak,
        "fetched_bytes": fetched,
        "once_bytes": transformer.modulation.fetched_bytes,
        "once_seconds": once_seconds,
    }
    session = open_sessions.enter_context(transformer.session(slots=slots))
    case = f"{resident} resident, the others from disk"
    return _Contender("ours", case, lambda: guide(*session.forward(branches, more=True)), measured)
