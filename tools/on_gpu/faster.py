"""Our engine by what is faster than its plain path, and what the plain path answers to the same."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from qwenimage_lowvram.engine.compute.attention_choice import choose_attention
from qwenimage_lowvram.engine.compute.attention_kernels import KITCHEN_INT8
from qwenimage_lowvram.engine.compute.compilation import INDUCTOR, CompileSettings
from qwenimage_lowvram.engine.compute.linear_choice import DECODED, Computing, LinearChoice, linear_of
from qwenimage_lowvram.engine.compute.step_schedules import FirstBlockRule, Measured, StepCache, StepSchedule
from qwenimage_lowvram.engine.errors import Unsupported
from qwenimage_lowvram.engine.files.checkpoint import Checkpoint, open_checkpoint
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.lora.changes import Matrix, Sum
from qwenimage_lowvram.engine.lora.deltas import Delta
from qwenimage_lowvram.engine.lora.weight_patches import LoraPatch
from qwenimage_lowvram.engine.models.qwen_image.branch import Branch
from qwenimage_lowvram.engine.models.qwen_image.transformer import QwenImageTransformer
from qwenimage_lowvram.engine.planning.forecast import Speeds
from qwenimage_lowvram.engine.planning.memory_plan import MemoryPlan
from qwenimage_lowvram.engine.runs.branch_keys import BranchKey
from qwenimage_lowvram.engine.runs.known_speeds import KnownSpeeds
from qwenimage_lowvram.engine.runs.sampling_run import SamplingRun
from qwenimage_lowvram.engine.runs.surroundings import Alone
from qwenimage_lowvram.engine.runs.timeline import Timeline
from safetensors.torch import save_file
from torch import Tensor

from .card import NotTried
from .cases import COMPILED, FIRST_BLOCK, HALF, PLANNED, STORED, STORED_ATTENTION, STORED_LORA, Sizes
from .steps import Inputs, Ready

RANK = 16
RUN_STEPS = 8
# the last step is predicted by the one; by the other, wherever block 0 adds nearly what it added before
CACHES: Mapping[str, StepCache] = {
    PLANNED: StepSchedule("of 8 steps", RUN_STEPS, (0, 1, 3, 6), Measured("Qwen-Image", 0, 0)),
    FIRST_BLOCK: FirstBlockRule(0.1),
}
SIGMAS = [1 - step / RUN_STEPS for step in range(RUN_STEPS)]


def linear_for(checkpoint: Checkpoint, hardware: Hardware, how: str, dtype: torch.dtype) -> LinearChoice:
    """Raises NotTried where the device has no product for the file."""
    if how not in (STORED, STORED_LORA, STORED_ATTENTION):
        return DECODED
    linear = linear_of(Computing.FAST, checkpoint, [hardware], dtype)
    if not linear.backends:
        raise NotTried(linear.why_not)
    return linear


def products_dtype(how: str, sizes: Sizes) -> torch.dtype:
    dtype: torch.dtype = torch.float16 if how == HALF else getattr(torch, sizes.dtype)
    return dtype


def prepare(transformer: QwenImageTransformer, how: str, folder: Path) -> None:
    """What is set on an open model. Raises NotTried where the device has no such kernel."""
    if how == STORED_LORA:
        transformer.patch(_a_lora(transformer, folder / "lora.safetensors"))
    if how == STORED_ATTENTION:
        try:
            attention = choose_attention(KITCHEN_INT8.name, [transformer.hardware], torch.bfloat16, tried={})
        except Unsupported as error:
            raise NotTried(str(error).splitlines()[0]) from None
        transformer.attend_by(attention)
    if how == COMPILED:
        # elsewhere than on a card the way is tried, not the compiler
        backend = INDUCTOR if transformer.hardware.device.type == "cuda" else "aot_eager"
        transformer.compile_by(CompileSettings(exact=False, backend=backend))


@contextmanager
def cached_run(
    transformer: QwenImageTransformer, plan: MemoryPlan, inputs: Inputs, speeds: Speeds, facts: dict[str, object]
) -> Iterator[Ready]:
    """A step of which is a whole run of SIGMAS, of the same image; its answer is that to the last of them."""
    known = KnownSpeeds(transformer.hardware, transformer.dtype, transformer.file, file=None, device_name="the device")
    known.put(speeds)

    def run(more: bool) -> list[Tensor]:
        sampling = SamplingRun(
            transformer, plan, steps=RUN_STEPS, speeds=known, timeline=Timeline(), surroundings=Alone()
        )
        keys = [BranchKey(0, which) for which in range(len(inputs.prompts))]
        answers: list[Tensor] = []
        try:
            sampling.load()
            sampling.begin(SIGMAS)
            for sigma in SIGMAS:
                answers = sampling.forward(branches_at(inputs, sigma, transformer.dtype), keys=keys)
        finally:
            report = sampling.end(finished=False)
        facts.update(computed_steps=report.computed_steps, predicted_steps=report.predicted_steps)
        return answers

    try:
        yield Ready(run, plan.blocks, facts)
    finally:
        transformer.unload()


def branches_at(inputs: Inputs, sigma: float, dtype: torch.dtype) -> Sequence[Branch]:
    tokens = inputs.tokens.to(dtype)
    return [Branch(tokens, (inputs.grid,), prompt.to(dtype), None, sigma) for prompt in inputs.prompts]


def _a_lora(transformer: QwenImageTransformer, file: Path) -> dict[str, LoraPatch]:
    """On every matrix of attention and MLPs; that of the first block, for all."""
    shapes = {
        name: shape
        for name, shape in transformer.weights.items()
        if name.startswith("transformer_blocks.") and len(shape) == 2 and "_mod." not in name
    }
    first = {name.split(".", 2)[2]: shape for name, shape in shapes.items() if name.split(".")[1] == "0"}
    if not file.exists():
        generator = torch.Generator().manual_seed(2)
        tensors = {}
        for name, (rows, columns) in first.items():
            tensors[f"{name}.up"] = torch.randn(rows, RANK, generator=generator).bfloat16() / 20
            tensors[f"{name}.down"] = (torch.randn(RANK, columns, generator=generator) / columns**0.5).bfloat16()
        save_file(tensors, file)
    entries = open_checkpoint(file).tensors
    patches = {}
    for name, shape in shapes.items():
        own = name.split(".", 2)[2]
        delta = Delta(name, shape, Sum(Matrix((entries[f"{own}.up"], entries[f"{own}.down"]))))
        patches[name] = LoraPatch(name, ((delta, 1.0),))
    return patches
